"""
A smaller host on this one: a disk of so many operations and megabytes a second, so much memory.

What a server gains by its settings shows where the disk or the memory is short; a machine that
measures often has plenty of both. The disk is a file behind a loop device whose traffic the kernel
throttles, the memory a control group that counts the page cache, too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

BLOCK = Path("/sys/fs/cgroup/blkio")
MEMORY = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _throttle(numbers: str, operations: int, bytes_: int) -> None:
    for what in ("read", "write"):
        for unit, limit in (("iops", operations), ("bps", bytes_)):
            (BLOCK / f"blkio.throttle.{what}_{unit}_device").write_text(f"{numbers} {limit}\n")


@contextlib.contextmanager
def disk(
    directory: Path, gigabytes: int, operations: int, megabytes: int
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """
    Give a directory on a new disk, and a function that limits it, each way.

    Filling it may be quick; what is measured comes after the limit.
    """
    if not (BLOCK / "blkio.throttle.write_iops_device").exists():
        sys.exit(f"{BLOCK}: the kernel's block throttle is not there (control groups, version 1)")
    image, mounted = directory / "disk.img", directory / "disk"
    mounted.mkdir()
    with image.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, gigabytes * 1024**3)
    _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
    # Direct: what the disk holds must not be cached a second time, below it.
    device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
    numbers = os.stat(device).st_rdev
    name = f"{os.major(numbers)}:{os.minor(numbers)}"
    try:
        _run("mount", device, str(mounted))
        yield mounted, lambda: _throttle(name, operations, megabytes * 10**6)
    finally:
        _throttle(name, 0, 0)
        subprocess.run(["umount", "--lazy", str(mounted)], check=False)
        subprocess.run(["losetup", "--detach", device], check=False)


@contextlib.contextmanager
def memory(megabytes: int) -> Iterator[None]:
    """
    Hold this process and what it starts, page cache included, to so much memory.

    What others have read before would be cached at their cost: it is dropped.
    """
    base, knob = next(
        ((base, knob) for base, knob in MEMORY if (base / "cgroup.procs").exists()), MEMORY[1]
    )
    group = base / f"slmdb-bench-{os.getpid()}"
    group.mkdir()
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        (group / knob).write_text(str(megabytes * 1024**2))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (base / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            group.rmdir()
