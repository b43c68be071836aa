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
