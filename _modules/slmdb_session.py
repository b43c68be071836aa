"""
Sessions of the server: who holds others up, and an end to one of them.

What a session asks may hold a secret, so no statement is shown.
"""

from __future__ import annotations

import time
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_session"

PID_MAX = 2**22  # Linux's
CANCELLED = 2  # seconds for a statement to end by itself
GONE = 10  # seconds for the session
STARTED = """to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')"""
SESSION = f"""
SELECT pid, pg_get_userbyid(usesysid) AS user,
       (SELECT datname FROM pg_database WHERE oid = datid) AS database,
       application_name, backend_type AS kind, state, {STARTED} AS started
  FROM pg_stat_get_activity(%(pid)s)
"""
# A pid may be given to another session at any time.
SAME = f"FROM pg_stat_get_activity(%(pid)s) WHERE {STARTED} = %(started)s"
CANCEL = f"SELECT pg_cancel_backend(pid) {SAME} AND state = 'active'"
TERMINATE = f"SELECT pg_terminate_backend(pid, {GONE * 1000}) AS gone {SAME}"


def __virtual__() -> str:
    return __virtualname__


def blocking() -> list[dict[str, Any]]:
    """
    Name the sessions that hold others up by a lock and wait for nobody themselves.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_session.blocking

    Returns a list, the longest wait first, empty if nobody waits: ``pid`` (0: a prepared
    transaction), ``user``, ``database``, ``application_name``, ``kind`` (``client backend``, or a
    process of the server), ``state``, ``seconds`` (in its transaction), ``started`` (the session,
    UTC), ``waiting`` (how many wait for it, also behind others) and ``longest_wait`` (seconds).
    Raises ``CommandExecutionError`` if the server cannot be asked.
    """
    return __salt__["slmdb_health.blockers"]()


def _found(pid: int) -> dict[str, Any] | None:
    return next(iter(__salt__["slmdb_server.query"](SESSION, {"pid": pid})), None)


def _refuse(pid: int, started: str, session: dict[str, Any] | None) -> None:
    """One line for whatever is not the client's session that is meant."""
    if session is None:
        raise CommandExecutionError(
            f"pid {pid}: there is no such session; slmdb_session.blocking names who holds others up"
        )
    if session["kind"] != "client backend":
        raise CommandExecutionError(f"pid {pid}: it is no client's session but {session['kind']}")
    if session["started"] != started:
        raise CommandExecutionError(
            f"pid {pid}: that session began at {session['started']}, not at {started}: "
            "it is another one"
        )
    if (session["user"], session["application_name"]) == ("postgres", "slmdb"):
        raise CommandExecutionError(
            f"pid {pid}: it is a session of the formula itself; end the run that it belongs to"
        )


def end(pid: int, started: str, dry_run: bool = False) -> dict[str, Any]:
    """
    End a client's session; what it did in an open transaction is rolled back.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_session.end pid=3282 started='2026-11-23T20:15:00Z'

    pid
        Of the session, as ``slmdb_session.blocking`` and ``slmdb.health`` name it.
    started
        When that session began (UTC): the same pid may be another one's by now.
    dry_run
        True says which session it is and does nothing.

    A statement is cancelled first; then the session is ended and waited for, up to 10 seconds.

    Returns ``pid``, ``user``, ``database``, ``application_name``, ``kind``, ``state`` (as it was),
    ``started`` and ``ended``. Raises ``SaltInvocationError`` for a wrong argument, and
    ``CommandExecutionError`` if there is no such session, if it is another one, a process of the
    server or one of the formula itself, or if it is still there in the end.
    """
    __salt__["slmdb_kinds.refuse"]("pid", "integer", pid, 1, PID_MAX)
    __salt__["slmdb_kinds.refuse"]("started", "instant", started)
    session = _found(pid)
    _refuse(pid, started, session)
    if not dry_run:
        _end({"pid": pid, "started": started})
    return {**(session or {}), "ended": not dry_run}


def _end(which: dict[str, Any]) -> None:
    query = __salt__["slmdb_server.query"]
    until = time.monotonic() + CANCELLED
    cancelled = query(CANCEL, which)
    while cancelled and time.monotonic() < until:
        left = _found(which["pid"])
        if not left or left["state"] != "active":
            break
        time.sleep(0.05)
    rows = query(TERMINATE, which)
    if rows and not rows[0]["gone"]:
        raise CommandExecutionError(
            f"pid {which['pid']}: it was told to end and is still there after {GONE} s; "
            "it ends as soon as it looks, else with the server"
        )
