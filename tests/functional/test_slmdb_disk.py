"""Room on a disk: what is free is told, what would not fit is refused in one line."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

MIB = 1024**2


@pytest.fixture
def disk(bare):
    """A disk of 16 MiB."""
    path = Path("/srv/small")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_what_is_free_is_told(disk, minions):
    """In bytes; of what is not there nothing is known, and nothing is refused."""
    minion = minions()
    (disk / "filler").write_bytes(bytes(10 * MIB))
    assert minion.call("slmdb_disk.free", str(disk)) == 6 * MIB
    assert minion.call("slmdb_disk.free", "/nowhere") is None
    assert minion.call("slmdb_disk.refuse", "/nowhere", "this", 10**15) is None


def test_what_would_not_fit_is_refused(disk, minions):
    """Where, what, how much, and what to do; as much as is free still fits."""
    minion = minions()
    assert minion.call("slmdb_disk.refuse", str(disk), "this", 16 * MIB) is None
    assert minion.call("slmdb_disk.refuse", str(disk), "this", 10 * MIB, keep=6 * MIB) is None
    with pytest.raises(CommandExecutionError) as caught:
        minion.call("slmdb_disk.refuse", str(disk), "the next dump", 17 * MIB)
    assert str(caught.value) == (
        "/srv/small has 16 MiB free, the next dump needs about 17 MiB; make room"
    )
    with pytest.raises(CommandExecutionError) as caught:
        told = {"advice": "wait", "key": "slm_database:port", "keep": 9 * MIB}
        minion.call("slmdb_disk.refuse", str(disk), "this", 8 * MIB, **told)
    assert str(caught.value) == (
        "slm_database:port: /srv/small has 16 MiB free, this needs about 8 MiB and leaves 9 MiB; "
        "wait"
    )
    assert os.listdir(disk) == []


def test_who_looks_at_another_disk_is_another_process(disk, minions):
    """What hangs there hangs alone; on the disk of the server's data nobody is sent."""
    within = minions().modules["slmdb_disk.within"]
    assert within(60, str(disk / "repository"), os.getpid) != os.getpid()
    assert within(60, "/var/lib/pgbackrest", os.getpid) == os.getpid()
    with pytest.raises(FileNotFoundError):
        within(60, str(disk / "repository"), os.listdir, str(disk / "repository"))
    with pytest.raises(TimeoutError):
        within(0.2, str(disk), time.sleep, 60)
