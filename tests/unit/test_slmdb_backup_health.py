"""What of the backups is a problem, what a warning, and when."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000  # 2027-01-15T08:00:00Z
LAST = {"label": "L", "at": "2027-01-15T07:00:00Z", "age_seconds": 3600, "damaged": False}
WELL = {
    "enabled": True,
    "since": "2026-01-01T00:00:00Z",
    "without": None,
    "repositories": [
        {"repository": 1, "where": "/r", "local": True, "there": True, "last": LAST, "failed": None}
        | {"backups": 1, "held": True, "lacks": None, "closed": None},
        {"repository": 2, "where": "s3", "local": False, "there": None, "last": LAST}
        | {"backups": None, "held": True, "failed": None, "lacks": None, "closed": None},
    ],
    "program": None,
    "keys": [],
    "stopped": [],
    "ended": {},
    "aside": None,
    "wal": {"mode": "on", "waiting_seconds": None, "failing": None, "reason": None, "gap": None},
    "verified": None,
    "copy": {"problem": None},
    "drill": {"last": None, "proven": {"at": "2027-01-14T08:00:00Z", "proven": True}},
}


@pytest.fixture(scope="module")
def judge():
    path = CHECKOUT / "_modules/slmdb_backup_health.py"
    spec = importlib.util.spec_from_file_location("slmdb_backup_health_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = yaml.safe_load((CHECKOUT / "slm_database/defaults.yaml").read_text())["backup"]

    def judged(**changed):
        found = copy.deepcopy(WELL)
        for key, value in changed.items():
            *parents, last = key.split("__")
            part = found
            for name in parents:
                part = part[int(name) if name.isdigit() else name]
            part[last] = value
        return module.judge(found, settings, NOW)

    judged.module = module
    return judged


def test_well_is_silent(judge):
    assert judge() == {"problems": [], "warnings": []}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"repositories__0__there": False}, "repository 1 (/r) is not there"),
        (
            {"repositories__0__there": False, "repositories__0__held": False},
            "repository 1 (/r) is not set up yet; state.apply slm_database.backup does it",
        ),
        (
            {"since": None, "without": "2027-01-14T05:00:00Z"},
            "backups are not set up for 27 h, limit 26h: no run of the whole formula was completed",
        ),
        ({"repositories__1__last": None}, "repository 2 (s3): no backup yet for"),
        ({"repositories__1__last": {**LAST, "age_seconds": 93601}}, "backup, L, is 26 h old"),
        ({"repositories__0__last": {**LAST, "damaged": True}}, "pages whose checksum is wrong"),
        (
            {"aside": "/d.before-1"},
            "the data is in /d.before-1: repeat the restore, or move it back",
        ),
        (
            {"program": "/p"},
            "pgBackRest is not installed (/p), so nothing is backed up or archived; "
            "state.apply slm_database.backup brings it",
        ),
        ({"keys": ["/k: mode is 0644"]}, "/k: mode is 0644"),
        ({"repositories__0__closed": ["/r/archive"]}, "the server cannot use /r/archive"),
        ({"repositories__1__lacks": "W"}, "repository 2 (s3) lacks archived WAL up to W"),
        ({"wal__waiting_seconds": 3601}, "WAL waits for 60 min to be archived, limit 1h"),
        (
            {"wal__waiting_seconds": 3601, "wal__reason": "sh: 1: not found"},
            "WAL waits for 60 min to be archived, limit 1h: sh: 1: not found",
        ),
        (
            {"wal__waiting_seconds": 3601, "wal__failing": {"wal": "W", "since": "then"}},
            "WAL segment W cannot be archived since then",
        ),
        ({"wal__gap": "W"}, "a gap at W"),
        (
            {"verified": {"at": "then", "right": False, "problems": ["a", "b"]}},
            "verify of then found: a; b",
        ),
        (
            {"drill__last": {"at": "then", "proven": False, "problems": ["no row"]}},
            "the restore drill of then failed: no row",
        ),
        (
            {"drill__proven": {"at": "2026-12-30T00:00:00Z", "proven": True}},
            "the last proven restore is 16 d old, limit 15d",
        ),
        ({"drill__proven": None}, "no restore was proven for"),
    ],
)
def test_a_problem(judge, changed, words):
    said = judge(**changed)
    assert len(said["problems"]) == 1 and words in said["problems"][0], said
    assert said["warnings"] == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"enabled": False}, "slm_database:backup:enabled is false"),
        ({"since": None}, "backups are not set up yet; state.apply slm_database.backup does it"),
        (
            {"since": None, "without": "2027-01-15T07:00:00Z"},
            "backups are not set up yet: no run of the whole formula was completed here; "
            "state.apply slm_database does it",
        ),
        ({"repositories": WELL["repositories"][:1]}, "backups are only local"),
        ({"copy__problem": "no off-host copy yet"}, "no off-host copy yet"),
        ({"ended": {"full": "exit-code 203"}}, "autobot-slm-backup-full failed (exit-code 203): "),
        (
            {"ended": {"full": "signal 9"}}
            | {"repositories__0__failed": {"at": "then", "reason": "it was ended"}},
            "the backup of then failed: it was ended",
        ),
        ({"wal__mode": "off"}, "archive_mode waits for a restart"),
        (
            {"drill__proven": {"at": "2029-01-14T08:00:00Z", "proven": True}},
            "the last proven restore is of 2029-01-14T08:00:00Z, which is still to come",
        ),
        (
            {"wal__failing": {"wal": "W", "since": None}, "wal__reason": "no space"},
            "WAL segment W cannot be archived: no space",
        ),
        (
            {"repositories__0__failed": {"at": "then", "reason": "no space"}},
            "the backup of then failed: no space",
        ),
        (
            {"since": "2027-01-15T07:00:00Z", "repositories__0__last": None}
            | {"drill__proven": None},
            "repository 1 (/r): no backup yet; ",
        ),
    ],
)
def test_a_warning(judge, changed, words):
    said = judge(**changed)
    assert said["problems"] == []
    assert len(said["warnings"]) == 1 and words in said["warnings"][0], said


def test_a_part_that_could_not_be_read_adds_nothing(judge):
    """The report has the line that says so already."""
    assert judge.module.judge({}, {}, NOW) == {"problems": [], "warnings": []}


def test_what_systemd_says_of_a_job_is_told(judge):
    """A timer that is stopped, a unit that is masked, and a service that failed, of ours alone."""
    judge.module.__context__ = {
        "slmdb_units": {
            "autobot-slm-database": {"ActiveState": ["failed"], "MainPID": ["0"]},
            "autobot-slm-backup-full.timer": {"LoadState": ["loaded"], "ActiveState": ["inactive"]},
            "autobot-slm-backup-dump.timer": {"LoadState": ["masked"]},
            "autobot-slm-backup-drill.service": {
                "LoadState": ["loaded"],
                "ActiveState": ["failed"],
                "Result": ["signal"],
                "ExecMainStatus": ["9"],
            },
            "autobot-slm-backup-dump.service": {"LoadState": ["loaded"], "Result": ["success"]},
        }
    }
    assert judge.module._stopped() == [
        "autobot-slm-backup-full.timer is inactive",
        "autobot-slm-backup-dump.timer is masked",
    ]
    assert judge.module._ended() == {"drill": "signal 9"}
