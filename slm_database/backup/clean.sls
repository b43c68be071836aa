# No backups are made any more; those that were made, and their key, stay.
include:
  - slm_database.check

No backups are made:
  slmdb_backup.absent:
    - require:
      - slmdb_pillar: The pillar is valid
