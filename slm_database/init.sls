#!yaml
# The whole formula, in the order in which a host becomes the database. Each component includes
# what it stands on, so that any of them can be applied alone.
include:
  - slm_database.check
  - slm_database.secret.check
  - slm_database.package
  - slm_database.policy
  - slm_database.instance
  - slm_database.config
  - slm_database.access
  - slm_database.service
  - slm_database.secret.adopt
  - slm_database.role
  - slm_database.secret
  - slm_database.database
  - slm_database.backend
  - slm_database.access.verified
  - slm_database.backup
  - slm_database.record
