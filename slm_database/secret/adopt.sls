# An older install's role and databases get their new names, if pillar asks for that with `adopt`.
# Comes before the roles and databases are made: theirs are the names.
include:
  - slm_database.secret.check

The older install is adopted:
  slmdb_secret.adopted:
    - require:
      - sls: slm_database.secret.check
