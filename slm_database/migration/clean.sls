#!yaml
# A migration has nothing to undo: data and tables are the database's. Going back is a restore.
include:
  - slm_database.check
