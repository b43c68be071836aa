#!yaml
# Updates of PostgreSQL come as those of any other package.
include:
  - slm_database.check

PostgreSQL is updated like any other package:
  slmdb_hold.absent:
    - require:
      - slmdb_pillar: The pillar is valid
