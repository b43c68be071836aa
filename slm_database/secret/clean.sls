#!yaml
# Our keys leave the secret file only if pillar says `clean: secret: true`; else it is kept and named.
include:
  - slm_database.check

The password is removed or kept:
  slmdb_secret.absent:
    - require:
      - slmdb_pillar: The pillar is valid
