#!yaml
# Drops the instance, only with slm_database:clean:data and role and if nothing of anybody else is in it.
include:
  - slm_database.check

The instance is gone where pillar says so:
  slmdb_instance.absent:
    - require:
      - slmdb_pillar: The pillar is valid
