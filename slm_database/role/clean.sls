#!yaml
# Drops the roles of the settings, only with slm_database:clean:role.
include:
  - slm_database.check

The roles are gone where pillar says so:
  slmdb_role.absent:
    - require:
      - slmdb_pillar: The pillar is valid
