#!yaml
# Drops the databases of the settings, only with slm_database:clean:data.
include:
  - slm_database.check

The databases are gone where pillar says so:
  slmdb_database.absent:
    - require:
      - slmdb_pillar: The pillar is valid
