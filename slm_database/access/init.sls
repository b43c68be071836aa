#!yaml
# Who may log in: pg_hba.conf and pg_ident.conf, judged before they count.
include:
  - slm_database.check
  - slm_database.config

The access rules are applied:
  slmdb_access.applied:
    - require:
      - sls: slm_database.config
