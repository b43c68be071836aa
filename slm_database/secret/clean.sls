# Our keys leave the secret file only if pillar says `clean: secret: true`; else what is kept is named.
include:
  - slm_database.check

The password is removed or kept:
  slmdb_secret.absent:
    - require:
      - sls: slm_database.check
