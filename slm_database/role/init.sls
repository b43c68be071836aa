#!yaml
# The application's role and the extra ones of the pillar. Passwords are the secret's business.
include:
  - slm_database.check
  - slm_database.secret.adopt

The roles are present:
  slmdb_role.present:
    - require:
      - slmdb_secret: The older install is adopted
