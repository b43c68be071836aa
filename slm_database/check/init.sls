#!jinja|yaml
# Comes before everything else, in every SLS of the formula: a minion that has never seen the
# formula gets its modules, one that has an older version gets the new ones, and the pillar is
# checked as a whole before anything on the host is touched.
#
# The sync happens while this renders, because a state that syncs is not executed with test=True.
# salt-ssh ships the modules by itself, and a sync there would delete what it shipped. Without a
# master a look at the files' inodes says whether there is anything to sync (slmdb_sync).
{%- set new = [] %}
{%- if "__master_opts__" not in opts and not ("slmdb_sync.current" in salt and salt["slmdb_sync.current"]()) %}
{%-   set environments = none if saltenv in (none, "base") else "base," ~ saltenv %}
{%-   do new.extend(salt["saltutil.sync_modules"](saltenv=environments, refresh=False)) %}
{%-   do new.extend(salt["saltutil.sync_states"](saltenv=environments, refresh=False)) %}
{%- endif %}

The formula is loaded:
  test.nop:
    - force_reload_modules: {{ (new | length > 0) | json }}
    # What the modules read; salt-ssh ships the files that a state names.
    - files:
      - salt://slm_database/defaults.yaml
      - salt://slm_database/osfingermap.yaml

The pillar is valid:
  slmdb_pillar.valid:
    - require:
      - test: The formula is loaded
