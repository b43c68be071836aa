"""A state and an execution module that say which version of the formula a run has."""

from __future__ import annotations

STATE = """
def told(name):
    comment = "state %(version)s, module " + __salt__["slmdb_probe.version"]()
    return {"name": name, "result": True, "changes": {}, "comment": comment}
"""
MODULE = """
def version():
    return "%(version)s"
"""
SLS = """
include:
  - slm_database.check
The probe is told:
  slmdb_probe.told:
    - require:
      - sls: slm_database.check
"""


def publish(formula, version):
    """Change a state and an execution module of the formula; return their files."""
    files = [formula / name / "slmdb_probe.py" for name in ("_states", "_modules")]
    for path, text in zip(files, (STATE, MODULE), strict=True):
        path.write_text(text % {"version": version})
    (formula / "slm_database" / "probe.sls").write_text(SLS)
    return files
