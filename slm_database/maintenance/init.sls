#!yaml
# Does what is parked, on purpose only: not part of the default run. A window or an approval is
# needed; each step begins when the one before it has succeeded.
include:
  - slm_database.check

What is parked is done:
  slmdb_maintenance.done:
    - require:
      - slmdb_pillar: The pillar is valid
