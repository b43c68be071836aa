"""The password is seen nowhere but in its file: no output, log, cache, event or process has it."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support import salt_daemons, secrets
from tests.support.salt_daemons import BIN, ENVIRONMENT, run

pytestmark = pytest.mark.once
SETTINGS = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "shared_preload_libraries": "pg_stat_statements",
}
PILLAR = {"slm_database": {"settings": SETTINGS, "extensions": ["pg_stat_statements"]}}
PLACES = ("/etc", "/opt", "/root", "/run", "/srv", "/tmp", "/var")
# The machine's own: kept images of hosts, and the layers of which the world's directories are made.
ELSEWHERE = ("/var/cache/autobot-slm-database-tests", "/tmp/slmdb-world-*", "/tmp/pytest-of-*")


class Watcher(threading.Thread):
    """Keep the command line and the environment of every process that comes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen = {}
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(0.03):
            for name in os.listdir("/proc"):
                if name.isdigit():
                    self.look(Path("/proc") / name)

    def look(self, directory):
        try:
            command = (directory / "cmdline").read_bytes()
            if (directory.name, command) not in self.seen:
                self.seen[directory.name, command] = (directory / "environ").read_bytes()
        except OSError:
            return


@pytest.fixture
def loud(monkeypatch):
    """Every daemon logs all it can."""
    plain = salt_daemons.Daemon.__init__

    def with_all(self, directory, config):
        plain(self, directory, {**config, "log_level_logfile": "all"})

    monkeypatch.setattr(salt_daemons.Daemon, "__init__", with_all)


@pytest.fixture
def watched():
    """Processes are watched while the test runs."""
    watcher = Watcher()
    watcher.start()
    yield watcher
    watcher.ended.set()
    watcher.join()


def files_with(passwords, marker):
    """Return the files, written since the marker was, that hold one of the passwords."""
    prune = [word for path in ELSEWHERE for word in ("-path", path, "-o")][:-1]
    found = ["find", *PLACES, "(", *prune, ")", "-prune", "-o", "-type", "f", "-size", "-64M"]
    found += ["-newer", marker, "-print0"]
    written = subprocess.run(found, capture_output=True, check=False).stdout
    held = set()
    for name in written.split(b"\0")[:-1]:
        try:
            data = Path(os.fsdecode(name)).read_bytes()
        except OSError:
            continue
        if any(password.encode() in data for password in passwords):
            held.add(os.fsdecode(name))
    return held


def test_the_password_is_seen_nowhere(loud, site, watched):
    """First apply, repeat, drift, failure, rotation and `-l all`: then every place is searched."""
    master = site.master("slm.19", pillar=PILLAR)
    bus = (site.base / "events").open("wb")
    events = subprocess.Popen(
        [BIN / "salt-run", "-c", master.directory / "etc", "state.event", "pretty=True"],
        env=ENVIRONMENT,
        stdout=bus,
        stderr=bus,
        stdin=subprocess.DEVNULL,
    )
    said, passwords = [], set()
    marker = site.base / "marker"
    marker.touch()

    def salt(*words):
        said.append(master.salt("slm.19", *words).text)
        if secrets.FILE.exists():
            passwords.add(secrets.value("SLM_DB_PASSWORD"))

    def call(*words):
        options = ("-c", site.base / "minion0" / "etc", "-l", "all")
        answer = run(BIN / "salt-call", *options, *words)
        said.append(answer.stdout + answer.stderr)

    salt("state.apply", "slm_database")
    salt("state.apply", "slm_database")
    secrets.psql("ALTER ROLE autobot_slm PASSWORD NULL")
    salt("state.apply", "slm_database.secret", "test=True")
    salt("state.apply", "slm_database.secret")
    secrets.psql("ALTER ROLE autobot_slm PASSWORD NULL")
    secrets.psql("CREATE ROLE reader; GRANT pg_monitor TO reader")
    for what in ("SELECT ON ALL TABLES", "EXECUTE ON ALL FUNCTIONS"):
        secrets.psql(f"GRANT {what} IN SCHEMA pg_catalog TO reader")
    secrets.psql("ALTER ROLE postgres SET role = reader")
    salt("state.apply", "slm_database.secret")
    assert "CREATEROLE" in said[-1] or "permission denied" in said[-1]
    assert "denied for" not in said[-1]  # what it may read it has read
    call("state.apply", "slm_database.secret")
    secrets.psql("SET ROLE postgres; ALTER ROLE postgres RESET ALL")
    salt("slmdb_secret.apply")
    salt("slmdb_secret.rotate", "dry_run=True")
    salt("slmdb_secret.rotate")
    call("slmdb_secret.rotate")
    passwords.add(secrets.value("SLM_DB_PASSWORD"))
    for name in ("facts", "fingerprint", "variables"):
        salt(f"slmdb_secret.{name}", *([str(secrets.FILE)] if name == "variables" else []))
    salt("slmdb.health")
    assert len(passwords) == 3, said

    watched.ended.set()
    watched.join()
    events.terminate()
    events.wait()
    bus.close()
    assert (site.base / "events").read_bytes().count(b"salt/job/") > 10
    statements = secrets.psql("SELECT query FROM pg_stat_statements", "autobot_slm")
    logs = b"".join(path.read_bytes() for path in Path("/var/log/postgresql").glob("*"))
    assert b"rolpassword" in logs
    assert "rolpassword" in statements
    for password in passwords:
        assert password not in "".join(said)
        assert password not in statements
        for (_, command), environment in watched.seen.items():
            assert password.encode() not in command + environment
    assert files_with(passwords, marker) == {str(secrets.FILE)}
