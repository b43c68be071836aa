#!yaml
# The instance: one that exists is used, else one is made. On systemd our unit is what starts it.
include:
  - slm_database.check
  - slm_database.package

The instance exists:
  slmdb_instance.present:
    - require:
      - slmdb_package: The server is installed

Our unit is what starts the instance:
  slmdb_unit.present:
    - require:
      - slmdb_instance: The instance exists
