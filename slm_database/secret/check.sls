#!yaml
# Stops a run on a secret file that cannot be used, before anything on the host is touched.
include:
  - slm_database.check

The secret can be applied:
  slmdb_secret.applicable:
    - require:
      - slmdb_pillar: The pillar is valid
