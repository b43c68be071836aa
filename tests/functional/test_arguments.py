"""What a function of ours is told wrongly: one line that names the argument, and nothing else."""

from __future__ import annotations

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

WHOLE, AMOUNT = "a whole number from 1 to 3600", "a number from 0.1 to 3600"
WRONG = [
    *(
        ("slmdb.pg_isready", {"timeout": value}, WHOLE)
        for value in (2.5, 0, -1, "abc", [1], None, True, 10**30)
    ),
    *(
        (function, {"timeout": value}, AMOUNT)
        for function in ("slmdb.health", "slmdb.revision", "slmdb_backup.info")
        for value in (0, -1, "abc", [1], True, 10**30)
    ),
    *(("slmdb_alembic.initialize", {"timeout": value}, "to 86400") for value in (0, "abc", [1])),
    *(("slmdb_backup.create", {"type": value}, "full") for value in ("x", ["x"], {"a": 1}, 5)),
    *(("slmdb_backup.rows", {"repository": value}, "allowed: 1") for value in (7, "1", [1])),
    *(("slmdb_backup.drill", {"repository": value}, "allowed: 1") for value in (7, "1", [1])),
    *(("slmdb_secret.fingerprint", {"file": value}, "path") for value in (5, "a b", [1], "")),
    ("slmdb_secret.fingerprint", {"file": "/nope"}, "there is no file /nope"),
    *(("slmdb_pending.end_of_life", {"today": value}, "2027-06-01") for value in (5, "x", [1])),
]


@pytest.mark.parametrize(("function", "given", "words"), WRONG)
def test_a_wrong_argument_is_one_line(shared_server, function, given, words):
    """Its name, what was given, what is allowed."""
    with pytest.raises(SaltInvocationError) as refused:
        shared_server.call(function, **given)
    line = str(refused.value.strerror)
    assert line.startswith(f"{next(iter(given))}: ") and words in line and "\n" not in line


@pytest.mark.parametrize("keys", [[5], [[1]], ["port", 5]])
def test_a_setting_that_is_none_is_one_line(shared_server, keys):
    """Whatever Salt's YAML made of the name."""
    with pytest.raises(CommandExecutionError, match=r"^slm_database:.*there is no such setting$"):
        shared_server.call("slmdb_pillar.get", *keys)


def test_what_is_not_there_can_be_taken_away(shared_server):
    """A drop-in whose directory nobody made."""
    assert shared_server.call("slmdb_backend.remove") is None


@pytest.mark.parametrize(
    ("function", "arguments"), [("slmdb_unit.reload_units", []), ("slmdb_alembic.initialize", [5])]
)
def test_a_host_without_what_is_asked_for_is_one_line(shared_server, function, arguments):
    """No systemd, no backend: neither is a fault of the function."""
    with pytest.raises(CommandExecutionError) as refused:
        shared_server.call(function, *arguments)
    assert "\n" not in str(refused.value.strerror)
