#!yaml
# Undoes the formula, in the reverse order. Data, roles, the secret and the packages go only where
# slm_database:clean says so; what was kept is named at the end.
include:
  - slm_database.check
  - slm_database.backup.clean
  - slm_database.backend.clean
  - slm_database.database.clean
  - slm_database.role.clean
  - slm_database.secret.clean
  - slm_database.access.clean
  - slm_database.config.clean
  - slm_database.instance.clean
  - slm_database.service.clean
  - slm_database.policy.clean
  - slm_database.package.clean
  - slm_database.record.clean
  - slm_database.kept
