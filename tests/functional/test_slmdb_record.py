"""What the formula remembers of a host: forgotten by a clean, which takes nothing else along."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path("/var/lib/autobot-slm-database")
DUMP = "20260102T030405Z/autobot_slm.dump"


@pytest.fixture
def host(bare, minions):
    """A host that remembers all that there is to remember, and where nothing runs."""
    minion = minions()
    minion.call("slmdb_record.apply")
    for name in (
        "last-good/conf",
        "last-good/.slmdb-half",
        "original/pg_hba.conf",
        "pgbackrest/lock/autobot-slm-archive.lock",
        "pgbackrest/spool/archive/autobot-slm/out/000000010000000000000001.ok",
        "drill.json",
        "repository-2.json",
    ):
        write(name)
    return minion


def write(name: str) -> Path:
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text")
    return path


def test_a_clean_forgets_all_of_it(host):
    """Test mode names what goes; then nothing is left, and nothing is said of leaving anything."""
    announced = host.state("slmdb_record.absent", test=True)
    gone = host.state("slmdb_record.absent")
    assert (announced.result, gone.result) == (None, True)
    assert gone.changes == announced.changes
    assert list(HERE.iterdir()) == []
    assert gone.comment == "Changed."
    assert host.state("slmdb_record.absent").changes == {}


@pytest.mark.parametrize("place", ["dumps", "archive/of/dumps", "last-good", "pgbackrest/spool"])
def test_dumps_stay_wherever_pillar_has_them_now(host, minions, place):
    """Pillar named another place once: what was dumped there is nobody's to delete."""
    dump = write(f"{place}/{DUMP}")
    minion = minions({"slm_database": {"backup": {"dump": {"path": "/srv/dumps"}}}})
    gone = minion.state("slmdb_record.absent")
    assert gone.result is True
    assert dump.read_text() == "text"
    assert [path for path in HERE.rglob("*") if path.is_file()] == [dump]
    (line,) = gone.comment.splitlines()[1:]
    assert line.startswith(f"left: {HERE / place.split('/')[0]}") and "(dumps:" in line
    assert minion.state("slmdb_record.absent").changes == {}


def test_files_of_others_stay_and_are_named(host):
    """A copy for another host, a link, and what somebody laid beside the last good files."""
    left = [write("copy.age"), write("last-good/notes"), write("mine/copy.age")]
    elsewhere = Path("/srv/elsewhere")
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("text")
    (HERE / "original").rename(HERE / "moved")
    (HERE / "original").symlink_to(elsewhere)
    gone = host.state("slmdb_record.absent")
    assert gone.result is True
    for path in [*left, HERE / "moved/pg_hba.conf", elsewhere / "precious"]:
        assert path.read_text() == "text"
    for name in ("copy.age", "last-good/notes", "mine", "moved", "original"):
        assert f"left: {HERE / name} (" in gone.comment
    assert not (HERE / "last-good/conf").exists()
