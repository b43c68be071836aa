#!yaml
# The packages go only with slm_database:clean:packages.
include:
  - slm_database.check

The packages are as they were where pillar says so:
  slmdb_package.absent:
    - require:
      - slmdb_pillar: The pillar is valid
