#!yaml
# No backups are made any more; those that were made, and their key, stay.
include:
  - slm_database.check

No timer makes backups:
  slmdb_backup.unscheduled:
    - require:
      - slmdb_pillar: The pillar is valid

The backup engine has no configuration of ours:
  slmdb_backup.absent:
    - require:
      - slmdb_backup: No timer makes backups

No copy of the modules is left:
  slmdb_runner.absent:
    - require:
      - slmdb_backup: No timer makes backups
