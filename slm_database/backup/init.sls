#!yaml
# Backups by pgBackRest, where slm_database:backup:enabled says so; else nothing happens here.
# That the server archives its WAL is part of its configuration (slm_database.config).
include:
  - slm_database.check
  - slm_database.access.verified

The backup engine is configured:
  slmdb_backup.configured:
    - require:
      - sls: slm_database.access.verified

The repository knows the instance:
  slmdb_backup.present:
    - require:
      - slmdb_backup: The backup engine is configured

Timers have a copy of the modules:
  slmdb_runner.present:
    - require:
      - slmdb_backup: The backup engine is configured

Backups are made when the schedule says so:
  slmdb_backup.scheduled:
    - require:
      - slmdb_runner: Timers have a copy of the modules
