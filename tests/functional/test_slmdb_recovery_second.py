"""A host is lost with the repository that was on it; what the second one has brings all back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

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
from tests.support import s3, secrets
from tests.support import world as worlds

CANARY = "canary-of-the-store"
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


@pytest.mark.once
def test_wal_comes_from_whichever_repository_has_it(minions, tmp_path):
    """The one that has the backup was away when the last WAL was archived."""
    second = {"type": "path", "path": str(SECOND)}
    gone = Lost(tmp_path, second=second, drill={"keep_free": "0%"})
    lose(minions, gone, other=SECOND)
    worlds.fresh()
    shutil.rmtree(KEYS, ignore_errors=True)
    gone.bring_repository()
    gone.bring_repository(SECOND, "other")
    sorted(REPOSITORY.glob("archive/*/*/*/0*.zst"))[-1].unlink()
    other = minions(gone.pillar, id="lost.19")
    unpack(other, gone)
    made = other.state("slmdb_recovery.restored")
    assert (made.result, made.comment) == (True, "Changed.")
    whole_formula(other)
    assert entries(other) == ["after the backup", "before the backup"]
    other.call("slmdb_server.forget")


@pytest.mark.once
def test_a_store_whose_keys_pillar_had(minions, tmp_path):
    """The copy brings them too, into a pillar that only root can read; nothing else is needed."""
    directory = Path("/etc/ssl/s3")
    store_directory = tmp_path / "s3"
    store_directory.mkdir()
    with s3.store(store_directory, "AKIA", CANARY) as store:
        told = {"type": "s3", "path": "/slm", "bucket": s3.BUCKET, "endpoint": "localhost"}
        told |= {"region": s3.REGION, "uri_style": "path", "port": store.port}
        told |= {"ca_file": f"{directory}/{store.certificate.name}"}
        told |= {"key_pillar": "k", "secret_pillar": "vault:slm:s"}
        gone = Lost(tmp_path, second=told)
        gone.pillar |= {"k": "AKIA", "vault": {"slm": {"s": CANARY}}}
        lose(minions, gone, before=lambda: shutil.copytree(store_directory, directory))
        worlds.fresh()
        shutil.rmtree(KEYS, ignore_errors=True)
        shutil.rmtree(REPOSITORY, ignore_errors=True)
        other = minions(id="lost.19")
        (roots,) = other.loaders.opts["pillar_roots"]["base"]
        Path(roots, "top.sls").unlink()
        pillar = Path(roots, "slm_database.sls")
        assert CANARY not in str(unpack(other, gone))
        assert oct(pillar.stat().st_mode)[-3:] == "600"
        other.tell(yaml.safe_load(pillar.read_text()))
        whole_formula(other, "slm_database.recovery")
        assert entries(other) == ["after the backup", "before the backup"]
        assert whole_formula(other, "slm_database.recovery") == set()
        made = other.call("slmdb_backup.create")
        assert made["others"][0]["type"] == "incremental"
        other.call("slmdb_server.forget")
