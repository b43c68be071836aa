#!yaml
# Takes our drop-in from the backend's unit.
include:
  - slm_database.check

The backend's unit has no drop-in of ours:
  slmdb_backend.absent:
    - require:
      - slmdb_pillar: The pillar is valid
