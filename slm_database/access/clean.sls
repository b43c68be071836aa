#!yaml
# The access rules are again what they were before the formula.
include:
  - slm_database.check

The access rules are as before:
  slmdb_access.absent:
    - require:
      - slmdb_pillar: The pillar is valid
