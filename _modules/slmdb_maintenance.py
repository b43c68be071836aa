"""
A maintenance: everything that is parked, done in one go, each step only after the one before.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_maintenance"

ROOM = 512 * 1024**2
HEALTH_TIMEOUT = 10
LONG = 60
LOCK = "/var/lib/autobot-slm-database/maintenance.lock"
# The query itself may hold a secret, so it is not shown.
TRANSACTIONS = """
SELECT pid::text AS who, usename AS user, datname AS database, state,
       to_char(query_start, 'YYYY-MM-DD HH24:MI:SS TZ') AS since,
       to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS started,
       extract(epoch FROM clock_timestamp() - xact_start)::int AS seconds
  FROM pg_stat_activity
 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
   AND xact_start < clock_timestamp() - make_interval(secs => %(long)s)
UNION ALL
SELECT 'prepared ' || gid, owner, database, 'prepared',
       to_char(prepared, 'YYYY-MM-DD HH24:MI:SS TZ'), NULL,
       extract(epoch FROM clock_timestamp() - prepared)::int
  FROM pg_prepared_xacts WHERE prepared < clock_timestamp() - make_interval(secs => %(long)s)
 ORDER BY seconds DESC
"""


def __virtual__() -> str:
    return __virtualname__


class _Watch(threading.Thread):
    """Measures for how long the server does not accept connections."""

    def __init__(self, command: list[str]) -> None:
        super().__init__(daemon=True)
        self.command, self.over, self.away = command, threading.Event(), 0.0

    def run(self) -> None:
        before = time.monotonic()
        while not self.over.wait(0.05):
            # Salt's functions cannot be called from a thread of one's own.
            gone = subprocess.run(self.command, capture_output=True, check=False).returncode
            now = time.monotonic()
            self.away += now - before if gone else 0
            before = now

    def end(self) -> float:
        self.over.set()
        self.join()
        return self.away


def _watch() -> _Watch:
    found = __salt__["slmdb_instance.facts"]()
    program = os.path.join(found["bin_directory"], "pg_isready")
    where = ["-q", "-t", "1", "-h", found["socket_directory"], "-p", str(found["port"])]
    watch = _Watch([program, *where])
    watch.start()
    return watch


def plan() -> dict[str, Any]:
    """
    Say what a maintenance would do now, if it were permitted.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_maintenance.plan

    Returns ``changes`` (``{what: {"old": …, "new": …}}``, empty if nothing is parked), ``updates``
    (as ``slmdb_update.available``), ``restart`` (whether the server will be) and ``refused`` (why
    the migrations cannot be done, or ``None``). Raises ``CommandExecutionError`` if the server
    cannot be asked.
    """
    updates = __salt__["slmdb_update.available"]()
    server = f"postgresql-{__salt__['slmdb_instance.version']()}"
    changes = {
        row["package"]: {"old": row["installed"], "new": row["candidate"]} for row in updates
    }
    reasons = [row["name"] for row in __salt__["slmdb_pending.restart"]()]
    reasons += ["server"] if server in changes and "server" not in reasons else []
    if reasons:
        changes["restart"] = {"old": None, "new": f"for {', '.join(reasons)}"}
    refused = None
    try:
        changes.update(_migrations())
    except CommandExecutionError as err:
        refused = str(err)
    return {"changes": changes, "updates": updates, "restart": bool(reasons), "refused": refused}


def _migrations() -> dict[str, Any]:
    if not __salt__["slmdb_alembic.facts"]()["deployed"]:
        return {}
    return __salt__["slmdb_migration.differences"]()


def transactions(longer: int = LONG) -> list[str]:
    """
    Name the transactions that are open for a long time; nobody ends them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_maintenance.transactions 60

    longer
        Seconds from which on a transaction is a long one.

    Returns one line each, the oldest first. Raises ``CommandExecutionError`` if the server cannot
    be asked.
    """
    return [
        f"{'' if row['state'] == 'prepared' else 'pid '}{row['who']}, user {row['user']}, "
        f"database {row['database']}, {row['state']}, query began {row['since']}, "
        f"open for {row['seconds']} s"
        + (f", session began {row['started']}" if row["started"] else "")
        for row in __salt__["slmdb_server.query"](TRANSACTIONS, {"long": longer})
    ]


def _healthy(job: dict[str, Any]) -> str:
    report = __salt__["slmdb_health.report"](HEALTH_TIMEOUT)
    problems = report["problems"]
    if "restart" in job["changes"] and "restart" not in job["done"]:
        problems = [line for line in problems if "outside its unit" not in line]
    if problems:
        raise CommandExecutionError("; ".join(problems))
    return "healthy"


def _room(job: dict[str, Any]) -> str:
    data = __salt__["slmdb_instance.facts"]()["data_directory"]
    free = []
    for path in (data, os.path.join(data, "pg_wal"), "/usr", "/var/cache/apt/archives"):
        if os.path.isdir(path):
            __salt__["slmdb_disk.refuse"](path, "a maintenance", ROOM)
            free.append(__salt__["slmdb_disk.free"](path) or 0)
    return f"at least {min(free) // 1024**2} MiB are free"


def _no_long_transactions(job: dict[str, Any]) -> str:
    lines = transactions(job["long"])
    if lines:
        raise CommandExecutionError(f"long transactions are open: {'; '.join(lines)}")
    return f"none is open for more than {job['long']} s"


def _backup(job: dict[str, Any]) -> str | None:
    return __salt__["slmdb_backup.before_change"]()


def _still_permitted() -> None:
    """What went before may have taken longer than the window is open."""
    if not __salt__["slmdb_window.reason"]():
        raise CommandExecutionError(
            f"the window closed meanwhile: {__salt__['slmdb_window.refusal']()}"
        )


def _update(job: dict[str, Any]) -> str | None:
    if not job["updates"]:
        return None
    _still_permitted()
    __salt__["slmdb_server.forget"]()
    __salt__["slmdb_update.apply"](job["updates"])
    return ", ".join(f"{row['package']} {row['candidate']}" for row in job["updates"])


def _restart(job: dict[str, Any]) -> str | None:
    rows = __salt__["slmdb_pending.restart"]()
    if __salt__["slmdb_server.available"]():
        if not rows:
            return None
        _still_permitted()
    __salt__["slmdb_lastgood.restart"]()
    left = [row["name"] for row in __salt__["slmdb_pending.restart"]()]
    if left:
        raise CommandExecutionError(f"after a restart still parked: {', '.join(left)}")
    names = [row["name"] for row in rows]
    return f"for {', '.join(names)}{_moved() if 'port' in names else ''}"


def _moved() -> str:
    """At another port the backend finds the server by its URL, in the secret file, alone."""
    try:
        if "rotation" in __salt__["slmdb_secret.differences"]():
            return "; the secret file has the old port until an apply, which changes the password"
        __salt__["slmdb_secret.apply"]()
    except CommandExecutionError as err:
        return f"; the secret file has the old port: {err}"
    unit = __salt__["slmdb_pillar.get"]("backend", "unit")
    return f"; the secret file has the new port, {unit} finds it there when it is restarted"


def _migrate(job: dict[str, Any]) -> str | None:
    try:
        changes = _migrations()
    except CommandExecutionError as err:
        if {"tables", "revision"}.intersection(job["changes"]):
            raise
        return f"warning: none was planned, and none is possible: {err}"
    if not changes:
        return None
    # The backup of this maintenance is fresh, and the gate was passed.
    __salt__["slmdb_migration.apply"]()
    return ", ".join(sorted(changes))


def _logins(job: dict[str, Any]) -> str:
    wrong = __salt__["slmdb_access.verify"]()
    if wrong:
        raise CommandExecutionError("; ".join(wrong))
    return "who must get in does, who must not is refused"


STEPS = {
    "health before": _healthy,
    "free disk": _room,
    "long transactions": _no_long_transactions,
    "backup": _backup,
    "update": _update,
    "restart": _restart,
    "migrations": _migrate,
    "health after": _healthy,
    "logins": _logins,
}


def _tell(step: str, state: str, said: str = "") -> None:
    """Show progress while it happens: a line on the minion, an event on the master's bus."""
    __salt__["slmdb_event.tell"]("maintenance", step, state, said)


def _bring_up() -> str:
    """After a failure the database is up, whatever it takes; what runs serves the application."""
    if __salt__["slmdb_server.available"]():
        return "the server is up"
    if __salt__["slmdb_instance.facts"]()["running"]:
        return "the server runs and was left alone, though it does not answer the formula"
    try:
        __salt__["slmdb_lastgood.start"]()
    except CommandExecutionError as err:
        if not __salt__["slmdb_server.available"]():
            return f"the server is down: {err}"
    return "the server was started again"


def _do(job: dict[str, Any], step: str) -> bool:
    """One step; whether the next one may begin."""
    began = time.monotonic()
    _tell(step, "begun")
    try:
        said = STEPS[step](job)
    except (CommandExecutionError, SaltInvocationError, OSError) as err:
        job["failed"] = {"step": step, "comment": str(err), "server": _bring_up()}
        _tell(step, "failed", str(err))
        return False
    job["done"][step] = {"seconds": round(time.monotonic() - began, 1), "comment": said}
    _tell(step, "done", said or "nothing to do")
    return True


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One maintenance at a time: Salt itself sees only the runs of its own cache directory."""
    with __salt__["slmdb_file.alone"](LOCK, "maintenance") as lock:
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def run(long_transaction: int = LONG) -> dict[str, Any]:
    """
    Do what is parked, step by step, until the first failure.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_maintenance.run

    long_transaction
        Seconds from which on an open transaction stops the maintenance.

    Returns ``permitted`` (why), ``changes`` (what was done of what was planned), ``done`` (step to
    ``seconds`` and ``comment``; ``None``: there was nothing to do), ``failed`` (``step``,
    ``comment``, ``server``, or ``None``), ``not_done`` (steps) and ``away`` (seconds for which the
    server accepted no connections, to a tenth). Raises ``CommandExecutionError`` if a window or an
    approval is missing, another maintenance runs, or it cannot be told what is parked.
    """
    why = __salt__["slmdb_window.reason"]()
    if not why:
        raise CommandExecutionError(__salt__["slmdb_window.refusal"]())
    with _alone():
        return _run(why, long_transaction)


def _run(why: str, long_transaction: int) -> dict[str, Any]:
    job: dict[str, Any] = {**plan(), "long": long_transaction, "done": {}, "failed": None}
    _tell("maintenance", "begun", why)
    watch = _watch()
    try:
        for step in STEPS:
            if not _do(job, step):
                break
    finally:
        away = round(watch.end(), 1)
    _tell("maintenance", "failed" if job["failed"] else "done", f"server away for {away} s")
    return {
        "permitted": why,
        "changes": _achieved(job),
        "done": job["done"],
        "failed": job["failed"],
        "not_done": [step for step in STEPS if step not in job["done"]],
        "away": away,
    }


def _achieved(job: dict[str, Any]) -> dict[str, Any]:
    """What of the planned changes is there: all, or after a failure what is not parked any more."""
    if not job["failed"]:
        return job["changes"]
    try:
        left = plan()
    except CommandExecutionError:
        return {}
    unknown = ("tables", "revision") if left["refused"] else ()
    # Nothing waits any more either when a failed restart brought back the last good configuration.
    undone = () if "restart" in job["done"] else ("restart",)
    parked = {*left["changes"], *unknown, *undone}
    return {what: row for what, row in job["changes"].items() if what not in parked}


def sentences(report: dict[str, Any]) -> list[str]:
    """
    Say what a maintenance did, and what it did not, line by line.

    For callers in Python.

    report
        What ``run`` returned.

    Returns lines. Raises nothing.
    """
    lines = [f"Permitted: {report['permitted']}."]
    for step, row in report["done"].items():
        lines.append(f"{step}: {row['comment'] or 'nothing to do'} ({row['seconds']} s).")
    lines.append(f"The server was away for {report['away']} s.")
    if report["failed"]:
        failed = report["failed"]
        lines.append(f"Failed: {failed['step']}: {failed['comment']}; {failed['server']}.")
        lines.append(f"Not done: {', '.join(report['not_done'])}. Safe to repeat.")
    return lines
