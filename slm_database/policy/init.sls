#!yaml
# An update of PostgreSQL is somebody's decision: every package of the server's major is held, and
# unattended-upgrades and needrestart are kept off the server.
include:
  - slm_database.check
  - slm_database.package

PostgreSQL is updated and restarted only on purpose:
  slmdb_hold.present:
    - require:
      - sls: slm_database.package
