#!yaml
# The application's database and the extra ones: owners, extensions, and nothing for PUBLIC.
include:
  - slm_database.check
  - slm_database.role

The databases are present:
  slmdb_database.present:
    - require:
      - slmdb_role: The roles are present
