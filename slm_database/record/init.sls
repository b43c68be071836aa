#!yaml
# What this run was told, kept for reports that come without a pillar. Only a whole run records.
include:
  - slm_database.check
  - slm_database.access.verified

The settings are recorded:
  slmdb_record.present:
    - require:
      - sls: slm_database.access.verified
