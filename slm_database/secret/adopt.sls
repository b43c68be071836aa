#!yaml
# An older install's role and databases get their new names, if pillar asks for that with `adopt`.
# Comes before the roles and databases are made, which else would make the new names anew.
include:
  - slm_database.check
  - slm_database.service
  - slm_database.secret.check

The older install is adopted:
  slmdb_secret.adopted:
    - require:
      - slmdb_service: The server runs
      - slmdb_secret: The secret can be applied
