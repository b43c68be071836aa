"""
One migration from its start to its end: a step begins only when the one before it has succeeded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_migration_run"

log = logging.getLogger(__name__)

# There from before the first tables until they are all made: a kill in between is no reason to ask.
AWAY = "The server is away; slmdb.revision tells where the database is when it is back."
PATIENCE = 30  # seconds for a server that crashed to be back
LATELY = 86400  # seconds; what is there later is not left by a kill
BEGUN = "/var/lib/autobot-slm-database/initialize.begun"
LOCK = 0x736C6D  # "slm", the key of the advisory lock in the database
HOLDER = """
SELECT pid, to_char(backend_start, 'YYYY-MM-DD HH24:MI:SS') AS since
  FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
   AND (application_name = 'slmdb_migration'
        OR %s AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = %s))
 ORDER BY backend_start LIMIT 1
"""
BLOCKERS = """
SELECT b.pid, b.usename AS user, b.state, b.application_name AS application,
       to_char(b.query_start, 'YYYY-MM-DD HH24:MI:SS') AS since
  FROM pg_stat_activity a JOIN pg_stat_activity b ON b.pid = ANY (pg_blocking_pids(a.pid))
 WHERE a.datname = current_database() AND a.application_name = 'slmdb_migration'
   AND a.pid <> b.pid ORDER BY b.query_start LIMIT 1
"""
# A digest of every column: a change that was committed without a revision shows here.
SHAPE = """
SELECT md5(coalesce(string_agg(concat_ws(' ', a.attrelid::regclass, a.attname, a.atttypid::regtype,
           a.atttypmod, a.attnotnull), ',' ORDER BY a.attrelid::regclass::text, a.attnum), ''))
           AS shape
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE NOT a.attisdropped AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""


def __virtual__() -> str:
    return __virtualname__


def _query(statement: str, parameters: list | None = None) -> list[dict]:
    database = __salt__["slmdb_migration.database"]()
    return __salt__["slmdb_server.query"](statement, parameters, database=database)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the database's lock for migrations, or say who holds it."""
    connection = __salt__["slmdb_server.connect"](__salt__["slmdb_migration.database"]())
    try:
        connection.autocommit = True
        ask = __salt__["slmdb_server.ask"]
        (row,) = ask(connection, "SELECT NOT pg_try_advisory_lock(%s) AS held", [LOCK])
        # The Alembic of a run that was killed outlives it, and its lock does not.
        others = ask(connection, HOLDER, [row["held"], LOCK])
        if row["held"] or others:
            pid, since = others[0].values() if others else ("unknown", "a moment ago")
            raise CommandExecutionError(
                f"Another migration of this database runs (server process {pid}, since {since}); "
                "try again when it is over"
            )
        yield
    finally:
        connection.close()


class _Watch(threading.Thread):
    """Remembers who keeps the migration waiting, for as long as it runs."""

    def __init__(self, connection: Any) -> None:
        super().__init__(daemon=True)
        self.connection, self.over, self.blocker = connection, threading.Event(), None

    def run(self) -> None:
        with contextlib.suppress(Exception):  # who waits for whom is a comfort, not a condition
            while not self.over.wait(0.2):
                with self.connection.cursor() as cursor:
                    cursor.execute(BLOCKERS)
                    self.blocker = cursor.fetchone() or self.blocker

    def sentence(self) -> str:
        if not self.blocker:
            return ""
        pid, user, state, application, since = self.blocker
        return (
            f" It waited for process {pid} of user {user} ({state}, {application or 'unnamed'}), "
            f"whose query began at {since}; that was left alone."
        )


@contextlib.contextmanager
def _watched() -> Iterator[_Watch]:
    connection = __salt__["slmdb_server.connect"](__salt__["slmdb_migration.database"]())
    connection.autocommit = True
    watch = _Watch(connection)
    watch.start()
    try:
        yield watch
    finally:
        watch.over.set()
        watch.join()
        connection.close()


def _end_own_sessions() -> None:
    """End what a killed migration left on the server, and wait until it has rolled back."""
    mine = "FROM pg_stat_activity WHERE application_name = 'slmdb_migration'"
    _query(f"SELECT pg_terminate_backend(pid) {mine} AND datname = current_database()")
    for _ in range(100):
        if not _query(f"SELECT pid {mine} AND datname = current_database()"):
            return
        time.sleep(0.1)


def _first(plan: dict[str, Any]) -> bool:
    """Whether nothing is there yet, but what an earlier try at the first tables left."""
    if plan["empty"]:
        return True
    begun = os.path.exists(BEGUN) and time.time() - os.stat(BEGUN).st_mtime < LATELY
    return bool(begun and plan["initialize"] and not plan["current"])


def _allowed(plan: dict[str, Any]) -> str:
    """Why this may happen now. The first tables of an empty database disturb nobody."""
    if _first(plan):
        return "the database is empty"
    reason = __salt__["slmdb_window.reason"]()
    if not reason:
        raise CommandExecutionError(
            f"A schema change needs a window or an approval: {__salt__['slmdb_window.refusal']()}"
        )
    return reason


def _initialize(seconds: float) -> None:
    log.info("slmdb: the backend makes its tables")
    with _watched() as watch:
        done = __salt__["slmdb_alembic.initialize"](seconds)
    if done["retcode"] != 0:
        raise CommandExecutionError(
            f"The backend's initialize() {_how(done, seconds)}; nothing was migrated."
            + watch.sentence()
        )
    missing = __salt__["slmdb_alembic.missing_tables"]()
    if missing:
        raise CommandExecutionError(
            f"The backend's initialize() ended well, but tables are missing: {', '.join(missing)}; "
            "nothing was migrated"
        )


def _how(done: dict[str, Any], seconds: float) -> str:
    if done["retcode"] is None:
        return f"was ended because it took longer than {seconds} s (slm_database:migration:timeout)"
    killed = __salt__["slmdb_program.fate"](done["retcode"])
    if killed:
        return killed
    return f"failed: {__salt__['slmdb_migration.last_line'](done['stderr'] or done['stdout'])}"


def _restore_point(plan: dict[str, Any], done: dict[str, Any]) -> None:
    """Take a backup if backups are set up, and mark the place in the WAL that follows it."""
    done["backup"] = __salt__["slmdb_backup.before_change"]()
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{moment}-before-{'-'.join(plan['targets']) or 'initialize'}"[:63]
    if _query("SHOW wal_level")[0]["wal_level"] == "minimal":
        return  # there is nothing to restore to
    _query("SELECT pg_create_restore_point(%s)", [name])
    done["restore_point"] = name


def ways_out(restore_point: str | None, backup: str | None) -> str:
    """
    Say what can be done after a failure, as far as something was marked before it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration_run.ways_out NAME LABEL

    restore_point, backup
        The name and the label, or ``None``.

    Returns a sentence with a blank before it, or nothing. Raises nothing.
    """
    if not restore_point:
        return ""
    if not backup:
        return f" Mend it and run again; restore point {restore_point}, without a backup."
    return (
        " Mend it and run again, or go back with slmdb_backup.restore "
        f"restore_point={restore_point} (backup {backup})."
    )


def _upgrade(plan: dict[str, Any], done: dict[str, Any], seconds: float) -> None:
    shape = _query(SHAPE)[0]["shape"]
    log.info("slmdb: alembic upgrade %s", plan["target"])
    with _watched() as watch:
        ran = __salt__["slmdb_alembic.alembic"](["upgrade", plan["target"]], seconds)
    if ran["retcode"] == 0:
        return
    how = f"alembic upgrade {plan['target']} {_how(ran, seconds)}.{watch.sentence()}"
    if not _answers():
        raise CommandExecutionError(f"{how} {AWAY}")
    _end_own_sessions()
    done["to"] = now = __salt__["slmdb_migration.tracked"]()["current"]
    raise CommandExecutionError(f"{how} {_where(plan, now, shape)}")


def _answers() -> bool:
    """Whether the server is there, or is back in time if that was why the migration failed."""
    deadline = time.monotonic() + PATIENCE
    while not __salt__["slmdb_server.available"]():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _where(plan: dict[str, Any], now: list[str], shape: str) -> str:
    """What a failed migration left."""
    before, reached = ", ".join(plan["current"]) or "no revision", ", ".join(now) or "no revision"
    if now != plan["current"]:
        return (
            f"It partly committed: the database went from {before} to {reached}, "
            f"not to {', '.join(plan['targets'])}."
        )
    if _query(SHAPE)[0]["shape"] != shape:
        return (
            f"The database is at {reached} as before, but its tables changed: a part of the failed "
            "migration was committed outside its transaction."
        )
    return f"The database is where it was: {reached}."


def run(target: str | None = None) -> dict[str, Any]:
    """
    Migrate the database, as ``slmdb_migration.apply`` says.

    For callers in Python.

    target
        As for ``alembic upgrade``; ``None``: ``migration:target`` from pillar.

    Returns ``permitted``, ``initialized``, ``restore_point``, ``backup``, ``from`` and ``to``.
    Raises ``CommandExecutionError`` with one line if it may not or could not be done;
    ``slmdb_migration.achieved`` knows what was done by then.
    """
    done: dict[str, Any] = {"permitted": None, "initialized": False, "restore_point": None}
    done.update({"backup": None, "from": [], "to": []})
    __context__["slmdb_migration"] = done
    with _alone():
        plan = _plan(target)
        done["from"] = done["to"] = plan["current"]
        if plan["initialize"] or plan["steps"]:
            done["permitted"] = _allowed(plan)
            try:
                _migrate(plan, done)
            except CommandExecutionError as err:
                ways = ways_out(done["restore_point"], done["backup"])
                dot = "." if ways and not str(err).endswith(".") else ""
                raise CommandExecutionError(f"{err}{dot}{ways}") from err
    return done


def _migrate(plan: dict[str, Any], done: dict[str, Any]) -> None:
    """The tables, then the revisions. Only an empty database has nothing to go back to."""
    seconds = __salt__["slmdb_pillar.get"]("migration", "timeout")
    if _first(plan):
        __salt__["slmdb_file.write"](BEGUN, b"")
    else:
        _restore_point(plan, done)
        _allowed(plan)  # the backup may have taken longer than the window is open
    if plan["empty"] or plan["initialize"]:
        _initialize(seconds)
        done["initialized"] = True
        __salt__["slmdb_file.remove"](BEGUN)
        plan = _plan(plan["target"])
    if plan["steps"]:
        if not done["restore_point"]:
            _restore_point(plan, done)
        _upgrade(plan, done, seconds)
        done["to"] = _read_back(plan)


def _plan(target: str | None) -> dict[str, Any]:
    plan = __salt__["slmdb_migration.plan"](target)
    if plan["refused"]:
        raise CommandExecutionError(plan["refused"])
    return plan


def _read_back(plan: dict[str, Any]) -> list[str]:
    now = __salt__["slmdb_migration.tracked"]()["current"]
    left = __salt__["slmdb_migration.plan"](plan["target"])
    # A relative target has moved on with the database.
    if not plan["target"].startswith("+") and (left["refused"] or left["steps"]):
        raise CommandExecutionError(
            f"alembic upgrade {plan['target']} ended well, but the database is at "
            f"{', '.join(now) or 'no revision'}"
        )
    return now
