"""Holds: every package of the server's major, no automatic updates, and the way back."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

OURS = {"postgresql-15", "postgresql-client-15"}
FILES = (
    Path("/etc/apt/apt.conf.d/52autobot-slm-database"),
    Path("/etc/needrestart/conf.d/autobot-slm-database.conf"),
    Path("/var/lib/autobot-slm-database/packages.json"),
    Path("/var/lib/autobot-slm-database/holds.json"),
)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def held():
    return set(output("apt-mark", "showhold").split())


@pytest.fixture
def host(bare, minions):
    return minions()


def test_all_packages_of_the_major_are_held(host):
    """apt is asked, not the module; what was announced is what changed."""
    announced = host.state("slmdb_hold.present", test=True)
    assert held() == set() and not any(path.exists() for path in FILES)
    made = host.state("slmdb_hold.present")
    assert (announced.result, made.result) == (None, True)
    assert made.changes == announced.changes
    assert held() >= OURS
    again = host.state("slmdb_hold.present")
    assert (again.result, again.changes) == (True, {})


def test_apt_keeps_a_held_package(host):
    """An upgrade of everything leaves it alone, and so does an unattended apt install."""
    host.call("slmdb_hold.apply")
    simulated = output("apt-get", "-s", "-y", "upgrade")
    assert "Inst postgresql-15 " not in simulated


def test_unattended_upgrades_reads_its_list_as_meant(host):
    """apt's own parser and Python's matching decide."""
    import re

    host.call("slmdb_hold.apply")
    dumped = output("apt-config", "dump", "Unattended-Upgrade::Package-Blacklist")
    patterns = [line.split('"')[1] for line in dumped.splitlines() if ":: " in line]
    for name in (*OURS, "postgresql", "postgresql-15-pgvector", "postgresql-plpython3-15"):
        assert any(re.match(pattern, name) for pattern in patterns), name
    for name in ("postgresql-common", "postgresql-16", "postgresql-client-16", "libpq5", "openssl"):
        assert not any(re.match(pattern, name) for pattern in patterns), name


def test_an_update_by_hand_is_noticed_once(host):
    """Another version than the last run saw is a change of the next run, and of that one only."""
    host.call("slmdb_hold.apply")
    versions = json.loads(FILES[2].read_text())
    FILES[2].write_text(json.dumps({**versions, "postgresql-15": "15.1-1"}))
    output("apt-mark", "unhold", "postgresql-15")
    seen = host.state("slmdb_hold.present")
    assert seen.result is True
    assert seen.changes["postgresql-15"]["old"] == "15.1-1"
    assert seen.changes["postgresql-15: hold"] == {"old": None, "new": "held"}
    assert host.state("slmdb_hold.present").changes == {}


def test_a_package_that_the_run_installed_is_nobody_s_hand(host):
    """It is held, as announced, and then known."""
    host.call("slmdb_hold.apply")
    versions = json.loads(FILES[2].read_text())
    FILES[2].write_text(json.dumps({k: v for k, v in versions.items() if k != "postgresql-15"}))
    output("apt-mark", "unhold", "postgresql-15")
    announced = host.state("slmdb_hold.present", test=True)
    made = host.state("slmdb_hold.present")
    assert made.changes == announced.changes
    assert made.changes == {"postgresql-15: hold": {"old": None, "new": "held"}}
    assert json.loads(FILES[2].read_text()) == versions


@contextlib.contextmanager
def busy_dpkg(seconds):
    """Hold dpkg's lock, as another apt does while it installs."""
    command = "import fcntl, sys, time; f = open('/var/lib/dpkg/lock-frontend', 'w'); "
    command += f"fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep({seconds})"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            yield other
        finally:
            other.kill()


def test_another_dpkg_is_waited_for(host):
    """apt-mark itself fails at once."""
    with busy_dpkg(60) as other:
        assert subprocess.run(["apt-mark", "hold", "postgresql-15"]).returncode
        threading.Timer(2, other.kill).start()
        assert host.state("slmdb_hold.present").result is True
    assert held() >= OURS


def test_a_dpkg_that_goes_on_for_too_long_is_named(host, monkeypatch):
    """One line, with the process that holds the lock."""
    monkeypatch.setitem(host.modules["slmdb_hold.mark"].func.__globals__, "PATIENCE", 1)
    with busy_dpkg(60) as other, pytest.raises(CommandExecutionError) as caught:
        host.call("slmdb_hold.mark", "hold", ["postgresql-15"])
    words = str(caught.value)
    assert words.startswith("apt-mark hold postgresql-15: dpkg was busy for 1 s: dpkg: error: ")
    assert words.endswith(str(other.pid)) and "\n" not in words


def test_clean_gives_back_what_was_held_by_us(host):
    """What an operator held by himself stays held."""
    output("apt-mark", "hold", "tzdata", "postgresql-client-15")
    host.call("slmdb_hold.apply")
    announced = host.state("slmdb_hold.absent", test=True)
    gone = host.state("slmdb_hold.absent")
    assert (announced.result, gone.result) == (None, True)
    assert gone.changes == announced.changes
    assert held() == {"tzdata", "postgresql-client-15"} and not any(path.exists() for path in FILES)
    assert host.state("slmdb_hold.absent").changes == {}


def test_where_nobody_wrote_down_whose_the_holds_are_all_are_ours(host):
    """As on a host that an earlier version of the formula held."""
    host.call("slmdb_hold.apply")
    FILES[3].unlink()
    assert host.state("slmdb_hold.present").changes == {}
    host.state("slmdb_hold.absent")
    assert held() == set()
