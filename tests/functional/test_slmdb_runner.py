"""Our functions called as a timer does: without a minion, a pillar or the checkout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import world as worlds

PILLAR = {"slm_database": {"backup": {"enabled": True}, "database": "another"}}
STATE = "slmdb_runner.present"
CURRENT = Path("/var/lib/autobot-slm-database/formula/current")
BARE = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "/nonexistent", "LANG": "POSIX"}


@pytest.fixture
def applied(instance, minions):
    """A host whose last apply recorded its settings and left the copy."""
    minion = minions(PILLAR)
    for state in (STATE, "slmdb_record.present"):
        assert minion.state(state).result is True
    return minion


def call(minion, function, *arguments, check=False):
    """Run what a timer would, as cron starts it."""
    words = minion.call("slmdb_runner.command", function, *arguments)
    return subprocess.run(
        words, env=BARE, cwd="/tmp", capture_output=True, text=True, check=check, timeout=120
    )


def told(minion, *keys):
    """A setting as a job sees it, written to a file: a job that goes well says nothing."""
    answer = call(minion, "slmdb_pillar.get", *keys, "--out=json", "--out-file=/srv/told")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    return json.loads(Path("/srv/told").read_text())["local"]


def test_apply_apply_again_and_test_mode(instance, minions):
    """What is announced is what is done, once; disabled, it goes again."""
    minion = minions(PILLAR)
    announced = minion.state(STATE, test=True)
    assert announced.result is None and not CURRENT.parent.exists()
    made = minion.state(STATE)
    assert (made.result, made.changes) == (True, announced.changes)
    again = minion.state(STATE)
    assert (again.result, again.changes) == (True, {})
    assert CURRENT.parent.stat().st_mode & 0o077 == 0
    assert minion.state("slmdb_runner.absent").result is True
    assert not CURRENT.parent.exists()
    assert minion.state("slmdb_runner.absent").changes == {}


def test_a_job_has_the_settings_of_the_last_apply(applied):
    """The recorded ones over the defaults, whatever the environment of cron is."""
    assert told(applied, "database") == "another"
    assert told(applied, "backup", "schedule", "drill") == "Sun 04:00"


def test_what_fails_is_said_and_has_a_status(applied):
    """One line of why, and no traceback."""
    answer = call(applied, "slmdb_pillar.get", "nothing")
    assert answer.returncode != 0 and answer.stdout == ""
    assert "slm_database:nothing: there is no such setting" in answer.stderr
    assert "Traceback" not in answer.stderr
    wrong = call(applied, "test.retcode", "3")
    assert wrong.returncode == 3
    long = call(applied, "cmd.run_all", "seq 1 100000; false")
    assert long.returncode != 0 and len(long.stderr) <= 4000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_a_signal_ends_has_failed(applied, tmp_path, number):
    """The unit of a timer must not look like one whose work was done."""
    begun = tmp_path / "begun"
    words = applied.call(
        "slmdb_runner.command", "cmd.run", f"echo $PPID >{begun}; sleep 60 & wait $!"
    )
    with subprocess.Popen(words, env=BARE, cwd="/", stderr=subprocess.PIPE, text=True) as job:
        while not (begun.exists() and begun.read_text().strip()):
            assert job.poll() is None
            time.sleep(0.05)
        os.kill(int(begun.read_text()), number)
        assert job.stderr.read().strip() == f"interrupted by {number.name}"
    assert job.returncode == 128 + number


def test_a_host_that_was_never_applied_as_a_whole_is_told_so(instance, minions):
    """Defaults are nobody's settings."""
    minion = minions(PILLAR)
    assert minion.state(STATE).result is True
    answer = call(minion, "slmdb_pillar.get", "database")
    assert answer.returncode == 1 and "apply slm_database as a whole first" in answer.stderr


@pytest.mark.once
def test_two_jobs_and_an_apply_do_not_disturb_each_other(applied, minions):
    """Each answers, and a job keeps the modules it began with."""
    words = applied.call("slmdb_runner.command", "test.sleep", "4")
    jobs = [subprocess.Popen(words, env=BARE, cwd="/") for _ in range(2)]
    before = os.readlink(CURRENT)
    changed = {"slm_database": {**PILLAR["slm_database"], "database": "third"}}
    minions(changed)
    assert applied.state("slmdb_record.present").result is True
    assert told(applied, "database") == "third"
    assert [job.wait(300) for job in jobs] == [0, 0]
    assert (CURRENT.parent / before).is_dir()


def test_another_formula_makes_another_copy(applied):
    """A copy that differs is replaced; the one before stays for whoever runs it, older ones go."""
    names = []
    for number in range(3):
        (CURRENT.parent / f"old{number}").mkdir()
        CURRENT.unlink()
        CURRENT.symlink_to(f"old{number}")
        changes = applied.state(STATE).changes[str(CURRENT)]
        assert changes["old"] == f"old{number}" and changes["new"] == os.readlink(CURRENT)
        names = sorted(path.name for path in CURRENT.parent.iterdir())
        assert names == sorted(["current", changes["new"], f"old{number}"])
    assert told(applied, "database") == "another"


def test_a_checkout_that_is_gone_is_not_missed(applied):
    """The copy holds all that a job reads."""
    copy = CURRENT.resolve()
    text = (copy / "minion").read_text() + (copy / "run").read_text()
    assert str(worlds.STATE["base"]) not in text
    assert str(Path(__file__).resolve().parents[2]) not in text
    assert {path.name for path in (copy / "slm_database").iterdir()} == {
        "defaults.yaml",
        "osfingermap.yaml",
    }
    shutil.rmtree("/var/cache/autobot-slm-database/runner", ignore_errors=True)
    assert told(applied, "database") == "another"
