"""A host whose server archives its WAL, with a backup; kept, woken, and damaged."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.support import world as worlds

PILLAR = {"slm_database": {"backup": {"enabled": True}}}
REPOSITORY = Path("/var/lib/pgbackrest")
STATES = (
    "slmdb_config.applied",
    "slmdb_access.applied",
    "slmdb_service.running",
    "slmdb_backup.configured",
    "slmdb_backup.present",
)


def keep(minion, snapshot):
    """Remember the world as it is, with its server stopped."""
    minion.call("slmdb_server.forget")
    minion.call("slmdb_service.stop")
    worlds.keep(snapshot)


@contextlib.contextmanager
def woken(minions, pillar, snapshot):
    """A minion of the world that was kept, whose server runs."""
    worlds.fresh(snapshot)
    minion = minions(pillar)
    minion.call("slmdb_service.start")
    yield minion
    minion.call("slmdb_server.forget")


def make(minions, pillar, snapshot, statements, *states):
    """Keep a world with an instance in which these statements ran before its backup."""
    worlds.fresh()
    minion = minions(pillar)
    minion.call("slmdb_instance.apply")
    for state in (*STATES, *states):
        result = minion.state(state)
        assert result.result is True, result
    for statement in statements:
        minion.call("slmdb_server.execute", statement)
    minion.call("slmdb_backup.create")
    keep(minion, snapshot)


def largest_file():
    """The largest of the data's files in the repository."""
    files = [path for path in REPOSITORY.rglob("*") if path.is_file() and "pg_data" in str(path)]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    """Flip a bit in the middle of a file; return what it was before."""
    before = path.read_bytes()
    data = bytearray(before)
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    return before
