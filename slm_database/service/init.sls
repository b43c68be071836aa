#!yaml
# The server runs, under our unit, and starts at boot.
include:
  - slm_database.check
  - slm_database.config
  - slm_database.access

The server runs:
  slmdb_service.running:
    - require:
      - sls: slm_database.config
      - sls: slm_database.access

# At first install, with restart: now, an approval or an open window; else it stays parked.
What waits for a restart is in force if that is permitted:
  slmdb_config.in_force:
    - require:
      - slmdb_service: The server runs
