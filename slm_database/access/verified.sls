#!yaml
# The end of a run: who must get in does, who must not is refused; else the run has failed.
include:
  - slm_database.check
  - slm_database.access
  - slm_database.service
  - slm_database.role
  - slm_database.secret
  - slm_database.database

The login matrix is right:
  slmdb_access.verified:
    - require:
      - sls: slm_database.access
      - sls: slm_database.service
      - sls: slm_database.role
      - sls: slm_database.secret
      - sls: slm_database.database
