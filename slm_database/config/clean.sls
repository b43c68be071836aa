#!yaml
# Our file in conf.d goes; Debian's own configuration is what is left.
include:
  - slm_database.check

The configuration is gone:
  slmdb_config.absent:
    - require:
      - slmdb_pillar: The pillar is valid
