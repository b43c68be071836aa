"""Asks a booted host about its database as an operator would, without Salt."""

from __future__ import annotations

import contextlib
import json
import shlex
import time

from tests.support.host import FORMULA

UNIT = "autobot-slm-database"
READY = "/var/run/postgresql:5432 - accepting connections"


def apply(host, *arguments, check=True):
    """Run bin/apply."""
    return host.run([f"{FORMULA}/bin/apply", *arguments], check=check, timeout=900)


def apply_states(host, *arguments):
    """Run bin/apply and return what Salt says of each state."""
    return json.loads(apply(host, *arguments, "--out=json").stdout)["local"]


def announced(states):
    return {name for name, state in states.items() if state["result"] is None}


def changed(states):
    return {name for name, state in states.items() if state["changes"]}


def failed(states):
    return {name: state["comment"] for name, state in states.items() if state["result"] is False}


def _salt_call(host, words):
    """Run a function of the formula with the host's own pillar."""
    line = [f"{FORMULA}/bin/salt-call", "--out=json", "-l", "error", *words]
    return host.run(line, check=False, timeout=600)


def call(host, *words):
    """Return what a function of the formula returns."""
    answer = _salt_call(host, words)
    assert answer.stdout.startswith("{"), answer.stdout + answer.stderr
    return json.loads(answer.stdout)["local"]


def refusal(host, *words):
    """Return the one line with which a function of the formula refuses."""
    answer = _salt_call(host, words)
    assert answer.returncode != 0, answer.stdout
    (line,) = [one for one in answer.stderr.splitlines() if words[0] in one]
    return line


@contextlib.contextmanager
def restored(host, **target):
    """Restore beside what runs; the copy goes by the command that the answer names."""
    words = [f"{key}={value}" for key, value in target.items()]
    answer = call(host, "slmdb_backup.restore", *words)
    try:
        yield answer
    finally:
        host.run(answer["remove"])


def health(host):
    """Return the exit status and the report of slmdb.health; a busy machine has time for it."""
    words = [f"{FORMULA}/bin/salt-call", "--retcode-passthrough", "--out=json"]
    answer = host.run([*words, "slmdb.health", "timeout=15"], check=False)
    return answer.returncode, json.loads(answer.stdout)["local"]


def ready(host):
    """Return the line of pg_isready for the application."""
    line = host.run("pg_isready -U autobot_slm -d autobot_slm -t 10", check=False)
    return line.stdout.strip()


def sql(host, statement, port=5432):
    """Return what psql prints for the administrator."""
    words = ["runuser", "-u", "postgres", "--", "psql", "-XAt", "-p", str(port), "-c", statement]
    return host.run(words).stdout.strip()


def until(host, condition, patience=300):
    """Wait until the server says that this is true."""
    deadline = time.monotonic() + patience
    while sql(host, f"SELECT {condition}") != "t":
        assert time.monotonic() < deadline, condition
        time.sleep(0.2)


def shrink(host, directory, kibibytes):
    """Leave a file system in memory only so much more than it holds."""
    used = int(host.run(f"df --output=used -B1K {directory} | tail -1").stdout)
    host.run(f"mount -o remount,size={used + kibibytes}k {directory}")


def active(host, unit=UNIT):
    return host.run(["systemctl", "is-active", unit], check=False).stdout.strip()


def show(host, unit, name):
    return host.run(["systemctl", "show", "--value", "-p", name, unit]).stdout.strip()


def postmaster(host):
    """Return the process id of the server that runs, 0 if none does."""
    return int(show(host, UNIT, "MainPID"))


def system_identifier(host):
    """Return what initdb gave the one instance of the host."""
    program = (
        "$(ls -d /usr/lib/postgresql/*/bin)/pg_controldata $(ls -d /var/lib/postgresql/*/main)"
    )
    lines = host.run(program).stdout.splitlines()
    return next(line.split(":")[1].strip() for line in lines if "system identifier" in line)


def came_back(host, before, patience=120):
    """
    Wait for another server than this one; on the way the unit must not claim one that is not there.

    Returns whether it told the truth throughout and the server came back.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        claimed = active(host) == "active"
        if claimed and ready(host) == READY:
            if postmaster(host) not in (0, before):
                return True
        elif claimed and active(host) == "active" and ready(host) != READY:
            return False
        time.sleep(0.1)
    return False


def environment_value(host, path, key):
    """Return the value of a key of an environment file."""
    for line in host.read(path).splitlines():
        if line.startswith(f"{key}="):
            return shlex.split(line.split("=", 1)[1])[0]
    return None
