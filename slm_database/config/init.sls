#!yaml
# One file in conf.d: the formula's settings, those that fit the host, and the operator's. The
# server judges it before it counts; what needs a restart is parked unless one is permitted.
include:
  - slm_database.check
  - slm_database.instance

The configuration is applied:
  slmdb_config.applied:
    - require:
      - sls: slm_database.instance
