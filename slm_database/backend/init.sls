#!yaml
# What the backend's unit needs: the secret file, its place after the database, look-ups in homes.
include:
  - slm_database.check
  - slm_database.secret

The backend's unit knows its database:
  slmdb_backend.present:
    - require:
      - sls: slm_database.secret
