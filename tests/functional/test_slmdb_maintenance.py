"""A maintenance: gated, in order, until the first failure, with the server up at the end."""

from __future__ import annotations

import fcntl
import json
import logging
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.functional.test_slm_database import apply, begin_applied
from tests.support import backend
from tests.support import world as worlds

PARKED = {"settings": {"max_connections": 37}}
APPROVED = {"slm_database": {**PARKED, "maintenance": {"approve": True}}}
STATE = "What is parked is done"
LOCK = Path("/var/lib/autobot-slm-database/pgbackrest/lock/autobot-slm-backup.lock")


@pytest.fixture(scope="module")
def venv():
    """Made outside of the world, and before it is fresh."""
    return backend.venv()


@pytest.fixture
def parked(minions, venv):
    """A host to which the formula was applied, and a setting that waits for a restart since."""
    begin_applied(minions)
    worlds.forget_updates()
    minion = minions({"slm_database": PARKED})
    minion.call("slmdb_service.start")
    assert minion.state("slmdb_config.applied").result is True
    yield minion
    minion.call("slmdb_server.forget")


def connections(minion):
    rows = minion.call("slmdb_server.query", "SELECT current_setting('max_connections') AS value")
    return rows[0]["value"]


def started(minion):
    return minion.call("slmdb_instance.facts")["started"]


def test_nothing_happens_without_a_window_or_an_approval(parked):
    """The policy is manual: it says so, changes nothing, and the next run says it again."""
    before = started(parked)
    for test in (True, False):
        refused = parked.state("slmdb_maintenance.done", test=test)
        assert (refused.result, refused.changes) == (False, {})
        assert "policy is manual" in refused.comment and "Parked: restart" in refused.comment
    assert started(parked) == before and connections(parked) == "100"


def test_a_closed_window_says_when_it_opens(parked):
    """One that begins in two hours and is an hour long."""
    now = time.time()
    opens, closes = (time.strftime("%H:%M", time.localtime(now + 3600 * hours)) for hours in (2, 3))
    windows = [f"daily {opens}-{closes}"]
    parked.tell(
        {"slm_database": {**PARKED, "maintenance": {"policy": "window", "windows": windows}}}
    )
    refused = parked.state("slmdb_maintenance.done")
    assert refused.result is False and f"T{opens}" in refused.comment
    status = parked.call("slmdb_window.status")
    assert (status["open"], status["permitted"], status["until"]) == (False, False, None)
    assert f"T{opens}" in status["next"]
    assert status["would"] == ["restart for max_connections: 100 → 37"]


def test_an_approval_lets_one_run_do_what_is_parked(parked, caplog):
    """Announced, done, reported with the time away, seen while it ran; and then nothing is left."""
    parked.tell(APPROVED)
    announced = parked.state("slmdb_maintenance.done", test=True)
    assert announced.result is None and connections(parked) == "100"
    with caplog.at_level(logging.WARNING):
        done = parked.state("slmdb_maintenance.done")
    assert done.result is True, done.comment
    assert (
        done.changes
        == announced.changes
        == {"restart": {"old": None, "new": "for max_connections"}}
    )
    assert "approved for this run" in done.comment and "The server was away for" in done.comment
    lines = [record.getMessage() for record in caplog.records]
    assert "slmdb maintenance: restart: begun" in lines
    assert any(line.startswith("slmdb maintenance: restart: done") for line in lines)
    assert connections(parked) == "37"
    again = parked.state("slmdb_maintenance.done")
    assert (again.result, again.changes) == (True, {})


def test_one_maintenance_at_a_time(parked):
    """Of a minion's schedule and of an operator, who have caches of their own."""
    parked.tell(APPROVED)
    lock = Path("/var/lib/autobot-slm-database/maintenance.lock")
    lock.write_text("4711\n")
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = parked.state("slmdb_maintenance.done")
        assert (refused.result, refused.changes) == (False, {})
        assert refused.comment == "another maintenance runs, process 4711; wait until it is over"
    assert parked.state("slmdb_maintenance.done").result is True


def test_a_window_that_closes_meanwhile(parked):
    """The backup before it took too long: what is disruptive is not begun any more."""
    for state in ("configured", "present"):
        assert parked.state(f"slmdb_backup.{state}").result is True
    closes = (time.time() + 40) // 60 * 60 + 60
    begin, end = (time.strftime("%H:%M", time.localtime(at)) for at in (closes - 3600, closes))
    maintenance = {"policy": "window", "windows": [f"daily {begin}-{end}"]}
    parked.tell({"slm_database": {**PARKED, "maintenance": maintenance}})
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.touch()
    for path in (LOCK, LOCK.parent):
        shutil.chown(path, "postgres", "postgres")
    holder = subprocess.Popen(["flock", LOCK, "sleep", str(closes - time.time() + 1)])
    before = started(parked)
    done = parked.state("slmdb_maintenance.done")
    holder.wait()
    assert done.result is False and started(parked) == before
    assert "backup: " in done.comment
    assert "restart: the window closed meanwhile: no window is open" in done.comment


def test_a_port_that_comes_into_force_is_the_backend_s_as_well(parked):
    """Its URL is in the secret file; the migrations of the same maintenance read it."""
    settings = {**PARKED, "port": 5544, "maintenance": {"approve": True}}
    parked.tell({"slm_database": {**settings, "maintenance": {}}})
    assert parked.state("slmdb_config.applied").result is True
    assert b":5432/" in Path("/etc/autobot/slm-secrets.env").read_bytes()
    parked.tell({"slm_database": settings})
    done = parked.state("slmdb_maintenance.done")
    assert done.result is True, done.comment
    assert "has the new port, autobot-slm-backend finds it there" in done.comment
    assert b":5544/" in Path("/etc/autobot/slm-secrets.env").read_bytes()
    assert parked.call("slmdb_secret.login") is True


def test_an_approval_is_not_recorded(parked):
    """A report that reads the record later does not take it for its own."""
    parked.tell(APPROVED)
    parked.call("slmdb_record.apply")
    kept = json.loads(Path("/var/lib/autobot-slm-database/settings.json").read_text())
    assert kept["maintenance"]["approve"] is False


def test_an_open_window_and_the_policy_auto_permit_it(parked):
    """The default run honours the same gate."""
    window = {"policy": "window", "windows": ["daily 00:00-24:00"]}
    for told, why in ((window, "a window is open until "), ({"policy": "auto"}, "policy is auto")):
        parked.tell({"slm_database": {**PARKED, "maintenance": told}})
        assert why in parked.call("slmdb_window.reason")
        assert parked.call("slmdb_window.restart_permitted") == parked.call("slmdb_window.reason")
        assert parked.state("slmdb_maintenance.done", test=True).result is None
    assert parked.state("slmdb_config.in_force").result is True
    assert connections(parked) == "37"


def test_a_restart_may_also_be_asked_for_or_be_the_first(parked):
    """Nothing else is permitted by that."""
    assert parked.call("slmdb_window.restart_permitted") is None
    parked.tell({"slm_database": {**PARKED, "restart": "now"}})
    assert parked.call("slmdb_window.restart_permitted") == "slm_database:restart is now"
    parked.tell({"slm_database": PARKED})
    Path("/var/lib/autobot-slm-database/last-good/conf").unlink()
    assert parked.call("slmdb_window.restart_permitted") == "first install"
    assert parked.call("slmdb_window.reason") is None


def test_a_long_transaction_is_named_and_left_alone(parked):
    """Its process, user and age; nothing was restarted; without it the maintenance is done."""
    parked.tell(APPROVED)
    connection = parked.modules["slmdb_server.connect"]()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid(), 'a secret'")
        pid = cursor.fetchone()[0]
    time.sleep(1.1)
    before = started(parked)
    stopped = parked.state("slmdb_maintenance.done", long_transaction=1)
    assert (stopped.result, stopped.changes) == (False, {})
    assert f"pid {pid}, user postgres" in stopped.comment and "a secret" not in stopped.comment
    assert re.search(r"session began \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stopped.comment)
    assert "Not done: long transactions, backup, update, restart" in stopped.comment
    assert started(parked) == before and connection.closed == 0
    connection.close()
    assert parked.state("slmdb_maintenance.done", long_transaction=1).result is True


def test_a_restart_that_fails_leaves_the_server_up(parked):
    """The last good configuration is back, the reason is given, and what was not done is named."""
    parked.call("slmdb_lastgood.save")
    conf = parked.call("slmdb_instance.facts")["conf_file"]
    parked.tell(APPROVED)
    with Path(conf).open("a") as stream:
        stream.write("huge_pages = 'on'\n")
    failed = parked.state("slmdb_maintenance.done")
    assert failed.result is False and "restart" not in failed.changes
    assert "Failed: restart: the server did not start" in failed.comment
    assert (
        "the server is up" in failed.comment and "Not done: restart, migrations" in failed.comment
    )
    assert parked.call("slmdb_server.available") is True


def test_a_restart_that_would_fail_is_not_tried(parked):
    """What others wrote is not in the last good configuration: the server is left alone."""
    before = started(parked)
    statement = "ALTER SYSTEM SET shared_preload_libraries = 'nosuch'"
    parked.call("slmdb_server.execute", statement)
    parked.tell(APPROVED)
    failed = parked.state("slmdb_maintenance.done")
    assert failed.result is False and "restart" not in failed.changes
    assert "Failed: restart: not restarted, the server would not start: " in failed.comment
    assert started(parked) == before


class _OnFirst(logging.Handler):
    """Does something at once when a line is logged."""

    def __init__(self, line, action):
        super().__init__()
        self.line, self.action = line, action

    def emit(self, record):
        if self.action and self.line in record.getMessage():
            action, self.action = self.action, None
            action()


def test_a_server_that_only_refuses_the_formula_is_not_restarted(parked):
    """It serves the application, and nobody knows whether it would come back."""
    parked.tell(APPROVED)
    before, connection = started(parked), parked.call("slmdb_server.connect")
    connection.autocommit = True
    ask = connection.cursor().execute

    def shut_out():
        ask("ALTER ROLE postgres NOLOGIN")
        ask(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    handler = _OnFirst("maintenance: health before: begun", shut_out)
    logging.getLogger().addHandler(handler)
    try:
        failed = parked.state("slmdb_maintenance.done")
    finally:
        logging.getLogger().removeHandler(handler)
        ask("ALTER ROLE postgres LOGIN")
    assert failed.result is False and "the server runs and was left alone" in failed.comment
    assert handler.action is None and started(parked) == before
    assert connections(parked) == "100"
    assert parked.state("slmdb_maintenance.done").result is True


def test_migrations_come_after_the_restart(parked, venv):
    """A backend was deployed: its tables, its migrations and the restart are one maintenance."""
    parked.tell(APPROVED)
    backend.deploy(venv)
    announced = parked.state("slmdb_maintenance.done", test=True)
    done = parked.state("slmdb_maintenance.done")
    assert done.result is True, done.comment
    assert done.changes == announced.changes
    assert set(done.changes) == {"restart", "tables", "revision"}
    assert done.comment.index("restart: for") < done.comment.index("migrations: revision, tables")
    assert parked.state("slmdb_maintenance.done").changes == {}


def test_migrations_that_are_impossible_do_not_stop_the_rest(parked, venv):
    """They are reported; the restart is done; and with nothing else parked nothing starts."""
    parked.tell(APPROVED)
    backend.deploy()
    done = parked.state("slmdb_maintenance.done")
    assert set(done.changes) == {"restart"}, done.comment
    assert "migrations: warning: none was planned" in done.comment
    assert "Failed: migrations" not in done.comment
    assert connections(parked) == "37"
    again = parked.state("slmdb_maintenance.done")
    assert (again.result, again.changes) == (True, {})
    assert "Nothing is parked.\nWarning: migrations: The backend has no virtual" in again.comment


def test_a_migration_that_fails_comes_after_what_was_done(parked, venv):
    """The tables and the restart are there, and said to be; the revision is not."""
    parked.tell(APPROVED)
    backend.deploy(venv)
    backend.add("e1", "d1", "Fails", backend.sql("SELECT 1/0"))
    failed = parked.state("slmdb_maintenance.done")
    assert failed.result is False and set(failed.changes) == {"restart", "tables"}
    assert "Failed: migrations" in failed.comment and "division by zero" in failed.comment
    assert "Not done: migrations, health after, logins." in failed.comment
    assert connections(parked) == "37"


def test_the_sls_does_it(parked):
    """The command of an operator, refused and approved."""
    assert apply(parked, "slm_database.maintenance")[STATE]["result"] is False
    Path("/etc/apt/sources.list").write_text("deb http://127.0.0.1:1 bookworm main\n")
    parked.tell(APPROVED)
    done = apply(parked, "slm_database.maintenance")
    assert done[STATE]["result"] is True, done[STATE]["comment"]
    assert "The package lists could not be fetched" in done[STATE]["comment"]


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ({"rrule": "FREQ=HOURLY", "start": "02:00", "duration": "2h"}, "FREQ=HOURLY"),
        (
            {"rrule": "FREQ=DAILY", "start": "02:00", "duration": "2h", "timezone": "A/B"},
            "timezone",
        ),
    ],
)
def test_a_window_that_cannot_be_is_a_mistake_in_pillar(minions, window, words):
    """Before anything is touched, with its key."""
    told = {"slm_database": {"maintenance": {"windows": [window]}}}
    (line,) = minions(told).call("slmdb_pillar.problems")
    assert line.startswith("slm_database:maintenance:windows:0:") and words in line
