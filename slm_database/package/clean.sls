#!yaml
# The packages go only with slm_database:clean:packages; their repository goes, whatever came from it.
include:
  - slm_database.check

The packages are as they were where pillar says so:
  slmdb_package.absent:
    - require:
      - slmdb_pillar: The pillar is valid

PGDG's repository is gone:
  slmdb_repository.absent:
    - require:
      - slmdb_package: The packages are as they were where pillar says so
