"""A repository that did not get all WAL says so until a later backup, or that WAL, is there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.functional.test_slmdb_backup_health import backed_up, host, said, write_wal
from tests.functional.test_slmdb_backup_second import PILLAR as WITH_SECOND
from tests.functional.test_slmdb_backup_second import SECOND

__all__ = ["backed_up", "host"]  # fixtures

FIRST, ELSEWHERE = Path("/var/lib/pgbackrest"), Path("/srv/elsewhere")
HELD = Path("/var/lib/autobot-slm-database/repositories.json")
STATES = ("slmdb_config.applied", "slmdb_backup.configured", "slmdb_backup.present")
MOVED = {"slm_database": {"backup": {"path": str(ELSEWHERE)}}}
OFF = {"slm_database": {"backup": {"enabled": False}}}


def applied(minion, pillar):
    """Apply another pillar; what is announced is what is done, once."""
    minion.tell(pillar)
    for state in STATES:
        announced = minion.state(state, test=True)
        made = minion.state(state)
        assert made.result is True, made.comment
        assert made.changes == announced.changes
        assert minion.state(state).changes == {}


def restart(minion):
    minion.call("slmdb_server.forget")
    minion.call("slmdb_service.stop")
    minion.call("slmdb_service.start")


def work(minion):
    """Commit something, and have it archived wherever that goes."""
    write_wal(minion)
    minion.call("slmdb_backup.settle")


def until_backed_up(minion, where, number=1):
    """Health names the repository, what it lacks and what to do; then it is well."""
    line = said(minion)
    assert line.startswith(f"repository {number} ({where}) lacks archived WAL up to 0000"), line
    assert "slmdb_backup.create" in line and " | " not in line
    work(minion)
    assert said(minion) == line
    restored = minion.call("slmdb_backup.restore")["gap"]
    minion.call("slmdb_backup.create")
    assert said(minion) == ""
    return restored


@pytest.mark.once
def test_a_repository_that_was_moved(backed_up):
    """As the guide does it: what came between the copy and the apply is told, or brought along."""
    subprocess.run(["cp", "-a", str(FIRST), str(ELSEWHERE)], check=True)
    work(backed_up)
    applied(backed_up, MOVED)
    line = said(backed_up)
    work(backed_up)
    subprocess.run(["cp", "-an", f"{FIRST}/.", str(ELSEWHERE)], check=True)
    assert "lacks archived WAL" in line and said(backed_up) == ""
    assert backed_up.call("slmdb_backup.restore")["gap"] is None


@pytest.mark.once
def test_a_repository_that_was_moved_is_whole_after_a_backup(backed_up):
    """If nobody copies again."""
    subprocess.run(["cp", "-a", str(FIRST), str(ELSEWHERE)], check=True)
    work(backed_up)
    applied(backed_up, MOVED)
    assert "has a gap at" in until_backed_up(backed_up, ELSEWHERE)


@pytest.mark.once
def test_a_move_in_which_nothing_was_written_lacks_nothing(backed_up):
    """Nor does a first apply, or one that only adds a repository."""
    backed_up.call("slmdb_backup.settle")
    subprocess.run(["cp", "-a", str(FIRST), str(ELSEWHERE)], check=True)
    applied(backed_up, MOVED)
    applied(backed_up, {"slm_database": {"backup": {**MOVED["slm_database"]["backup"]}}})
    assert said(backed_up) == ""
    told = {**MOVED["slm_database"]["backup"], **WITH_SECOND["slm_database"]["backup"]}
    applied(backed_up, {"slm_database": {"backup": told}})
    work(backed_up)
    assert said(backed_up) == ""


@pytest.mark.once
def test_a_path_that_was_changed_and_changed_back(backed_up):
    """The first place lacks what went to the other."""
    applied(backed_up, MOVED)
    work(backed_up)
    assert said(backed_up) == ""
    applied(backed_up, None)
    assert "has a gap at" in until_backed_up(backed_up, FIRST)


@pytest.mark.once
@pytest.mark.parametrize("restarted", [False, True])
def test_backups_that_were_off_for_a_while(backed_up, restarted):
    """Nobody gets the WAL of meanwhile, with a restart or without."""
    applied(backed_up, OFF)
    write_wal(backed_up)
    if restarted:
        restart(backed_up)
        write_wal(backed_up)
    applied(backed_up, None)
    if restarted:
        restart(backed_up)
    assert "has a gap at" in until_backed_up(backed_up, FIRST)


@pytest.mark.once
def test_what_is_written_while_archiving_waits_for_a_restart(backed_up):
    """Backups are on again, and archive_mode is not."""
    applied(backed_up, OFF)
    restart(backed_up)
    applied(backed_up, None)
    for _ in range(2):
        write_wal(backed_up)
    restart(backed_up)
    assert "has a gap at" in until_backed_up(backed_up, FIRST)


@pytest.mark.once
def test_a_second_repository_that_was_away(backed_up):
    """It has its backup from before, and not what was written meanwhile; the first has all."""
    applied(backed_up, WITH_SECOND)
    backed_up.call("slmdb_backup.create")
    applied(backed_up, None)
    assert json.loads(HELD.read_text())["2"]["since"] is None
    work(backed_up)
    assert said(backed_up) == ""
    applied(backed_up, WITH_SECOND)
    assert until_backed_up(backed_up, SECOND, 2) is None
