#!yaml
# A host that was lost, on purpose only: the whole formula, with the data of the repository where an
# empty instance would be made. The key must be there (slmdb_recovery.unpack brings it).
include:
  - slm_database

The data is restored from the repository:
  slmdb_recovery.restored:
    - require:
      - slmdb_package: The server is installed
    - require_in:
      - slmdb_instance: The instance exists
