#!yaml
# The password: made once, kept in the secret file, in step with the role's verifier.
include:
  - slm_database.check
  - slm_database.role
  - slm_database.secret.check

The password is persisted:
  slmdb_secret.present:
    - require:
      - slmdb_role: The roles are present
      - slmdb_secret: The secret can be applied
