#!yaml
# PGDG's repository, if pillar says `repository: pgdg`; else none of ours. The key that the
# formula ships is compared with the pinned fingerprint before it is trusted.
include:
  - slm_database.check
  - slm_database.secret.check

PostgreSQL comes from the repository that pillar names:
  slmdb_repository.present:
    - shipped: salt://slm_database/package/files/apt.postgresql.org.asc
    - require:
      - slmdb_pillar: The pillar is valid
      - slmdb_secret: The secret can be applied
