#!yaml
# Forgets what the last apply was told.
include:
  - slm_database.check

Nothing is recorded:
  slmdb_record.absent:
    - require:
      - slmdb_pillar: The pillar is valid
