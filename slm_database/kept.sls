#!yaml
# Names what a clean left on the host.
include:
  - slm_database.check

What was kept is named:
  slmdb_record.kept:
    - require:
      - slmdb_pillar: The pillar is valid
