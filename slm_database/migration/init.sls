#!yaml
# Schema changes, on purpose only: not part of the default run. The backend's own initialize() comes
# first where tables are missing, then a restore point, then its Alembic; a window or an approval is
# needed once there are tables.
include:
  - slm_database.check

The schema is what the backend's code wants:
  slmdb_migration.applied:
    - require:
      - slmdb_pillar: The pillar is valid
