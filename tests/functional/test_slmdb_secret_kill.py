"""kill -9 at any system call: no line lost, a password that works, one only after the next run."""

from __future__ import annotations

import collections
import logging
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import secrets

POINTS = 80  # of each of the three runs
FOREIGN = secrets.FOREIGN + b"LAST=without newline"
pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def minion(shared_server):
    secrets.wipe()
    subprocess.run(["groupadd", "--system", secrets.GROUP], check=True)
    shared_server.call("slmdb_secret.apply")
    return shared_server


def prepare_first(minion):
    """Nothing of ours: a file of the backend's, and a role without a password."""
    secrets.psql("ALTER ROLE autobot_slm PASSWORD NULL")
    secrets.write(FOREIGN)


def prepare_repeat(minion):
    """A file that is right, but for its mode, and a server that has drifted."""
    prepare_first(minion)
    minion.call("slmdb_secret.apply")
    secrets.FILE.chmod(0o644)
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'drifted'")


def prepare_rotation(minion):
    """All is right."""
    if not secrets.FILE.exists() or minion.call("slmdb_secret.differences"):
        prepare_first(minion)
        minion.call("slmdb_secret.apply")


RUNS = {
    "first": (prepare_first, "slmdb_secret.apply"),
    "repeat": (prepare_repeat, "slmdb_secret.apply"),
    "rotation": (prepare_rotation, "slmdb_secret.rotate"),
}


def fork(minion, function):
    """Start a run in a child that stops itself first, so that strace can take hold of it."""
    minion.call("slmdb_server.forget")
    child = os.fork()
    if child == 0:
        logging.disable(logging.CRITICAL)
        os.kill(os.getpid(), signal.SIGSTOP)
        status = 1
        try:
            minion.call(function)
            status = 0
        finally:
            os._exit(status)
    os.waitpid(child, os.WUNTRACED)
    return child


def trace(child, *options):
    """Let the child go on under strace; return how it ended."""
    command = ["strace", "-qq", "-p", str(child), *options]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.002)
    os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    tracer.wait(120)
    return status


def calls(minion, function, log):
    """Count the system calls of an undisturbed run, by name."""
    assert trace(fork(minion, function), "-o", str(log)) == 0
    names = re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE)
    return collections.Counter(names)


def points(counted):
    """Choose among all system calls: first and last of each kind, the rest evenly."""
    every = [(name, number + 1) for name, count in counted.items() for number in range(count)]
    edges = {(name, number) for name, count in counted.items() for number in (1, count)}
    step = max(1, (len(every) - len(edges)) // max(1, POINTS - len(edges)))
    chosen = sorted(edges) + [point for point in every if point not in edges][::step]
    return chosen[: max(POINTS, len(edges))]


def passwords_in_file():
    names = ("SLM_DB_PASSWORD", "SLM_DB_PASSWORD_NEXT", "SLM_DB_PASSWORD_PREVIOUS")
    return [found for name in names if (found := secrets.value(name))]


def foreign():
    lines = secrets.FILE.read_bytes().splitlines(True)
    ours = (b"SLM_DB_PASSWORD", b"DATABASE_URL", b"SLM_DATABASE_URL")
    return b"".join(line for line in lines if not line.startswith(ours))


def check_killed(run):
    assert foreign() == FOREIGN
    if run == "rotation":
        assert any(secrets.log_in(password) for password in passwords_in_file())


def check_recovered(minion):
    minion.call("slmdb_secret.apply")
    assert minion.call("slmdb_secret.differences") == {}
    assert foreign() == FOREIGN
    (password,) = set(passwords_in_file())
    assert "_NEXT" not in secrets.FILE.read_text()
    assert secrets.log_in(password)
    assert os.listdir(secrets.DIRECTORY) == [secrets.FILE.name]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_may_be_killed_at_any_system_call(minion, run, tmp_path):
    """What is left: the foreign lines, a password that opens, and after the next run only one."""
    prepare, function = RUNS[run]
    prepare(minion)
    chosen = points(calls(minion, function, tmp_path / "calls"))
    killed = 0
    for name, number in chosen:
        prepare(minion)
        inject = f"inject={name}:signal=KILL:when={number}"
        status = trace(
            fork(minion, function), "-o", "/dev/null", "-e", f"trace={name}", "-e", inject
        )
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        check_killed(run)
        check_recovered(minion)
    print(f"{run}: killed at {killed} of {len(chosen)} chosen system calls")
    # How often a run polls and allocates is the machine's affair: some calls are not reached.
    assert killed >= POINTS * 3 // 4
