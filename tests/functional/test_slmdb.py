"""What every state does with an error: one line that says where, and a result; no traceback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REFUSED = "slm_database:version: 17 is asked for, but instance 15/main exists"
HERE = Path("/var/lib/autobot-slm-database")


ASKING = (
    "slmdb_instance.absent",
    "slmdb_instance.port_available",
    "slmdb_instance.present",
    "slmdb_secret.absent",
    "slmdb_secret.applicable",
)
# In test mode nobody logs in.
CALLS = [("slmdb_access.verified", False)]
CALLS += [(function, test) for function in ASKING for test in (True, False)]


@pytest.mark.parametrize(("function", "test"), CALLS)
def test_what_cannot_be_asked_is_a_line(instance, minions, function, test):
    """Whether a state makes something true or only asks."""
    result = minions({"slm_database": {"version": "17"}}).state(function, test=test)
    assert (result.result, result.changes) == (False, {})
    assert str(result.comment).startswith(REFUSED)
    assert "\n" not in str(result.comment)


def test_what_was_kept_is_named_as_far_as_it_can_be_asked(instance, minions):
    """It never fails: the clean is over."""
    result = minions({"slm_database": {"version": "17"}}).state("slmdb_record.kept")
    assert result.result is True
    assert str(result.comment).startswith(REFUSED)


def test_an_error_of_the_system_is_a_line_with_its_path(bare, minions):
    """A directory that cannot be removed, for one: something is mounted there."""
    minion = minions()
    minion.call("slmdb_record.apply")
    busy = HERE / "original"
    busy.mkdir()
    subprocess.run(["mount", "--bind", str(busy), str(busy)], check=True)
    try:
        result = minion.state("slmdb_record.absent")
    finally:
        subprocess.run(["umount", str(busy)], check=True)
    assert result.result is False
    assert str(result.comment).splitlines()[0] == f"{busy}: Device or resource busy"
    assert "Traceback" not in str(result.comment)
    assert minion.state("slmdb_record.absent").result is True
