"""A private world for one process and its children: own network, own /etc, /var/lib, /run …

The process that calls `enter` leaves the machine's mount and network namespaces. What the tests
install, write and start then happens on the formula's real paths without touching the machine, and
a fresh world is only a remount away. There is no systemd in it, and nothing to reach but loopback.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
OVERLAID = ("/etc", "/opt", "/srv", "/var/lib", "/var/log", "/var/cache")
STATE: dict = {}


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def enter() -> None:
    """Leave the machine's namespaces, once per process."""
    if STATE:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare failed: the tests need root")
    _run("mount", "--make-rprivate", "/")
    _run("ip", "link", "set", "lo", "up")
    base = Path(tempfile.mkdtemp(prefix="slmdb-world-", dir="/tmp"))
    _run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(base))
    STATE.update(base=base, count=0, mounted=[], owner=os.getpid(), snapshots={})
    atexit.register(leave)


def leave() -> None:
    """End what was started; the mounts end with the process."""
    if STATE.get("owner") == os.getpid():
        end_processes()
        _run("umount", "--lazy", str(STATE["base"]))
        shutil.rmtree(STATE["base"], ignore_errors=True)


def end_processes() -> None:
    """SIGKILL every process of this network namespace that is not this one or above it."""
    ours = os.readlink("/proc/self/ns/net")
    spared = _ancestors()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [pid for pid in _processes(ours) if pid not in spared]
        if not left:
            return
        for pid in left:
            with_suppressed_kill(pid)
        time.sleep(0.02)


def with_suppressed_kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, os.WNOHANG)
    except OSError:
        pass


def _ancestors() -> set[int]:
    spared, pid = set(), os.getpid()
    while pid > 1:
        spared.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return spared


def _processes(namespace: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
            if os.readlink(f"/proc/{entry}/ns/net") == namespace and state != "Z":
                found.append(int(entry))
        except OSError:
            continue
    return found


def fresh(snapshot: str | None = None) -> None:
    """Begin again: a host with the packages but no instance, or as `keep` kept it."""
    enter()
    end_processes()
    for target in reversed(STATE["mounted"]):
        _run("umount", "--lazy", target)
    if STATE["count"]:
        # It is memory: hundreds of layers, each with a server's journal, would fill it.
        shutil.rmtree(STATE["layer"], ignore_errors=True)
    STATE["count"] += 1
    layer = STATE["base"] / f"layer-{STATE['count']}"
    below = STATE["snapshots"].get(snapshot, [])
    STATE.update(mounted=[], layer=layer, below=below)
    for target in OVERLAID:
        _overlay(target, layer, below)
    _mount_run()
    if not below:
        _make_bare()


def _overlay(target: str, layer: Path, below: list[Path]) -> None:
    name = target.strip("/").replace("/", "-")
    upper, work = layer / name / "upper", layer / name / "work"
    upper.mkdir(parents=True)
    work.mkdir()
    lower = [*(str(kept / name / "upper") for kept in below), target]
    like = os.stat(lower[0])
    os.chown(upper, like.st_uid, like.st_gid)
    os.chmod(upper, like.st_mode & 0o7777)
    options = f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work}"
    _run("mount", "-t", "overlay", "-o", options, "overlay", target)
    STATE["mounted"].append(target)


def _mount_run() -> None:
    _run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/run")
    STATE["mounted"].append("/run")
    for directory, mode in (
        ("/run/postgresql", 0o2775),
        ("/run/lock", 0o1777),
        ("/run/sshd", 0o755),
    ):
        os.makedirs(directory)
        os.chmod(directory, mode)
    shutil.chown("/run/postgresql", "postgres", "postgres")


def _make_bare() -> None:
    """The machine's own instances and traces of the formula are not part of the world."""
    for pattern, parent in (("*", "/etc/postgresql"), ("*", "/var/lib/postgresql")):
        for path in Path(parent).glob(pattern):
            shutil.rmtree(path)
    for path in (
        "/etc/autobot",
        "/var/lib/autobot-slm-database",
        "/etc/postgresql-common/createcluster.d",
    ):
        shutil.rmtree(path, ignore_errors=True)


def forget_updates() -> None:
    """The machine's package lists may know of updates, which cannot be downloaded from here."""
    sources = Path("/etc/apt/sources.list.d").glob("*")
    for path in [*Path("/var/lib/apt/lists").glob("*_*"), *sources]:
        path.unlink()
    Path("/etc/apt/sources.list").write_text("")


def keep(snapshot: str) -> None:
    """Remember the world as it is, its processes ended, for `fresh(snapshot)`."""
    end_processes()
    kept = STATE["base"] / f"snapshot-{snapshot}"
    _run("cp", "-a", str(STATE["layer"]), str(kept))
    STATE["snapshots"][snapshot] = [kept, *STATE["below"]]
