#!yaml
# PostgreSQL's packages. A port that another program holds stops the run before anything changes.
include:
  - slm_database.check
  - slm_database.secret.check
  - slm_database.package.repository

The port is ours:
  slmdb_instance.port_available:
    - require:
      - slmdb_pillar: The pillar is valid
      - slmdb_secret: The secret can be applied

The server is installed:
  slmdb_package.installed:
    - require:
      - slmdb_instance: The port is ours
      - sls: slm_database.package.repository
