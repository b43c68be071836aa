# The password: made once, kept in the secret file, in step with the role's verifier.
include:
  - slm_database.secret.check

The password is persisted:
  slmdb_secret.present:
    - require:
      - sls: slm_database.secret.check
