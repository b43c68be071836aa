"""A host is lost with the repository that was on it; what the second one has brings all back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional.test_slmdb_recovery import (
    DATA,
    REPOSITORY,
    Lost,
    entries,
    execute,
    failures,
    lose,
    unpack,
    whole_formula,
)
from tests.support import secrets
from tests.support import world as worlds

SECOND = Path("/srv/second")
KEYS = Path("/etc/pgbackrest/autobot-slm")


@pytest.fixture(scope="module")
def lost(minions, tmp_path_factory):
    """All that is left of a host is its second repository and the copy."""
    second = {"type": "path", "path": str(SECOND)}
    told = Lost(tmp_path_factory.mktemp("lost"), second=second, drill={"keep_free": "0%"})
    return lose(minions, told, kept=SECOND)


@pytest.fixture
def other(lost, minions):
    """Another host, to which the second repository was brought."""
    worlds.fresh()
    lost.bring_repository(SECOND)
    minion = minions(lost.pillar, id="lost.19")
    yield minion
    minion.call("slmdb_server.forget")


def test_everything_is_back_from_the_second(other, lost):
    """The first begins anew, with its old key; both have backups again, and either is proven."""
    assert not REPOSITORY.exists() or list(REPOSITORY.iterdir()) == []
    unpack(other, lost)
    key = (KEYS / "key.conf").read_text()
    whole_formula(other, "slm_database.recovery")
    assert entries(other) == ["after the backup", "before the backup"]
    assert secrets.value("SLM_DB_PASSWORD") == lost.password
    assert other.call("slmdb_instance.system_identifier") == lost.identifier
    assert (KEYS / "key.conf").read_text() == key
    assert whole_formula(other, "slm_database.recovery") == set()
    execute(other, "INSERT INTO log VALUES ('afterwards')")
    made = other.call("slmdb_backup.create")
    assert (made["type"], made["others"][0]["type"]) == ("full", "incremental")
    assert other.call("slmdb_backup.verify")["right"] is True
    for number in (1, 2):
        answer = other.call("slmdb_backup.drill", number)
        assert (answer["repository"], answer["problems"]) == (number, [])
    assert other.call("slmdb.health", timeout=15)["problems"] == []


def test_the_key_of_the_second_is_missing(other, lost):
    """Said before anything is touched, with its name."""
    unpack(other, lost)
    (KEYS / "key-2.conf").unlink()
    (line,) = failures(other)
    assert f"the repository in {SECOND} is encrypted and its key {KEYS}/key-2.conf" in line
    assert not DATA.exists() and not (KEYS / "key-2.conf").exists()


def test_neither_is_there(other, lost):
    """A mount that is missing here, too: both places are named."""
    unpack(other, lost)
    SECOND.rename("/srv/elsewhere")
    (line,) = failures(other)
    assert f"no repository of ours in {REPOSITORY} or {SECOND}; bring" in line
    assert not DATA.exists() and not SECOND.exists()
