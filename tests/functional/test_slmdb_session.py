"""slmdb_session names who holds others up, and ends that session and no other."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg2
import pytest
from salt.exceptions import CommandExecutionError

from tests.support import documents

GUIDE = documents.CHECKOUT / "docs/monitoring.md"
KEYS = ["pid", "user", "database", "application_name", "kind", "state"]
STARTED = """
SELECT to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS started
  FROM pg_stat_activity WHERE pid = %s
"""


@pytest.fixture(scope="module")
def minion(shared_server):
    """A server that lets the application in, with a table of it."""
    for noun in ("slmdb_role", "slmdb_database", "slmdb_secret", "slmdb_config", "slmdb_access"):
        shared_server.call(f"{noun}.apply")
    shared_server.call("slmdb_server.execute", "ALTER SYSTEM SET max_prepared_transactions = 2")
    shared_server.call("slmdb_service.restart")
    with session() as owner, owner.cursor() as cursor:
        cursor.execute("CREATE TABLE nodes (id int)")
        owner.commit()
    return shared_server


@contextlib.contextmanager
def session(**login):
    """A session of the application."""
    where = {"host": "/var/run/postgresql", "user": "autobot_slm", "dbname": "autobot_slm"}
    made = psycopg2.connect(**where, **login)
    try:
        yield made
    finally:
        with contextlib.suppress(psycopg2.Error):
            made.close()


def execute(made, statement):
    with made.cursor() as cursor:
        cursor.execute(statement)


@contextlib.contextmanager
def waiting(minion, *statements):
    """As many sessions that wait for each other in this order."""
    with contextlib.ExitStack() as stack:
        threads = []
        for statement in statements:
            made = stack.enter_context(session())

            def wait(made=made, statement=statement):
                with contextlib.suppress(psycopg2.Error):
                    execute(made, statement)
                    made.rollback()

            threads.append(threading.Thread(target=wait, daemon=True))
            threads[-1].start()
            until(lambda: blocked(minion) == len(threads))
        yield
        until(lambda: blocked(minion) == 0)
        for thread in threads:
            thread.join(10)


def blocked(minion):
    statement = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    return minion.call("slmdb_server.query", statement)[0]["count"]


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def started(minion, pid):
    return minion.call("slmdb_server.query", STARTED, [pid])[0]["started"]


def pid(made):
    return made.info.backend_pid


def test_nobody_waits(minion):
    assert minion.call("slmdb_session.blocking") == []


def test_who_holds_others_up_is_named_and_ended(minion):
    """The one at the root, with all who wait, also those behind others who wait."""
    change = "ALTER TABLE nodes ADD COLUMN name text"
    with session(application_name="report") as holder:
        execute(holder, "SELECT 'canary' FROM nodes")
        reads = ["SELECT 1 FROM nodes"] * 2
        with waiting(minion, change, *reads):
            (row,) = minion.call("slmdb_session.blocking")
            names = ["autobot_slm", "autobot_slm", "report", "client backend"]
            assert [row[key] for key in KEYS] == [pid(holder), *names, "idle in transaction"]
            assert row["waiting"] == 3 and row["started"] == started(minion, pid(holder))
            assert 0 <= row["longest_wait"] <= row["seconds"] < 60
            assert "canary" not in json.dumps(row)
            told = {"pid": row["pid"], "started": row["started"]}
            said = minion.call("slmdb_session.end", **told, dry_run=True)
            assert said["ended"] is False and len(minion.call("slmdb_session.blocking")) == 1
            said = minion.call("slmdb_session.end", **told)
            assert said == {**{key: row[key] for key in (*KEYS, "started")}, "ended": True}
        with pytest.raises(psycopg2.OperationalError):
            execute(holder, "SELECT 1")
    assert minion.call("slmdb_session.blocking") == []


def test_a_prepared_transaction_has_no_session(minion):
    """Nor has it a pid: 0 stands for all of them."""
    with session() as holder:
        execute(holder, "LOCK TABLE nodes; PREPARE TRANSACTION 'left'")
    with session() as other:
        other.autocommit = True
        with waiting(minion, "SELECT 1 FROM nodes"):
            (row,) = minion.call("slmdb_session.blocking")
            assert (row["pid"], row["kind"], row["waiting"]) == (0, None, 1)
            execute(other, "ROLLBACK PREPARED 'left'")


def test_a_statement_is_cancelled_before_its_session_ends(minion):
    """What the client is told first is that somebody wanted it so."""
    told = []

    def sleep(made):
        try:
            execute(made, "SELECT pg_sleep(60)")
        except psycopg2.Error as err:
            told.append(err.pgcode)

    with session() as made:
        thread = threading.Thread(target=sleep, args=[made], daemon=True)
        thread.start()
        state = "SELECT state FROM pg_stat_activity WHERE pid = %s AND query ~ 'sleep'"
        until(lambda: minion.call("slmdb_server.query", state, [pid(made)]))
        which = {"pid": pid(made), "started": started(minion, pid(made))}
        assert minion.call("slmdb_session.end", **which)["state"] == "active"
        thread.join(10)
    assert told == ["57014"]


def test_no_other_session_is_ended(minion):
    """A pid that another one has by now, a process of the server, ours, and nobody's."""
    query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
    server = minion.call("slmdb_server.query", query)[0]["pid"]
    own = minion.call("slmdb_server.query", "SELECT pg_backend_pid() AS pid")[0]["pid"]
    with session() as made:
        long_ago = "2020-01-01T00:00:00Z"
        wrong = [
            (pid(made), long_ago, f"that session began at {started(minion, pid(made))}, not at"),
            (server, started(minion, server), "it is no client's session but checkpointer"),
            (own, started(minion, own), "it is a session of the formula itself"),
            (2**22, long_ago, "there is no such session"),
        ]
        for number, moment, words in wrong:
            with pytest.raises(CommandExecutionError) as refused:
                minion.call("slmdb_session.end", pid=number, started=moment)
            line = str(refused.value.strerror)
            assert line.startswith(f"pid {number}: ") and words in line and "\n" not in line
        execute(made, "SELECT 1")


def test_the_guide_s_commands(minion):
    """Typed as they are shown, with this session's pid and beginning."""
    (look,) = [one for one in documents.commands(GUIDE) if "slmdb_session" in one]
    (end,) = documents.commands(GUIDE, "waits")
    salt = [str(Path(sys.executable).with_name("salt-call")), "-c", str(minion.directory)]
    salt += ["--local", "--log-level=quiet", "--retcode-passthrough", "--out=json"]

    def typed(command):
        program, *words = shlex.split(command)
        assert program == "bin/salt-call"
        done = subprocess.run([*salt, *words], capture_output=True, check=True)
        return json.loads(done.stdout)["local"]

    with session() as holder:
        execute(holder, "LOCK TABLE nodes IN ACCESS EXCLUSIVE MODE")
        with waiting(minion, "SELECT 1 FROM nodes"):
            (row,) = typed(look)
            end = end.replace("3282", str(row["pid"]))
            end = end.replace("2026-11-23T20:15:00Z", row["started"])
            assert str(pid(holder)) in end and row["started"] in end
            assert typed(end)["ended"] is True
