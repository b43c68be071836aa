#!yaml
# Gives the instance back to Debian's own unit.
include:
  - slm_database.check

Debian's unit has the instance back:
  slmdb_unit.absent:
    - require:
      - slmdb_pillar: The pillar is valid
