"""
Giving the running backend its new password, and seeing that it logs in with it.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_secret_backend"

_PATIENCE = 30
_PAUSE = 0.02
_RUNNING = ("active", "reloading", "activating")
_SESSIONS = """
SELECT client_port AS port FROM pg_catalog.pg_stat_activity
WHERE usename = %s AND backend_start > %s AND state IS NOT NULL AND state <> 'starting'
  AND application_name NOT LIKE 'slmdb%%'
"""
# How many sessions there have ever been, short ones too; ours are in the database postgres.
_COUNT = "SELECT sum(sessions)::bigint AS n FROM pg_stat_database WHERE datname <> 'postgres'"
_SOCKET = -1  # what pg_stat_activity has for the port of a session over the Unix socket
# It is logged wherever a refused login would be, and less urgent: who finds it misses none of them.
_MARK = "DO $$ BEGIN RAISE LOG 'slmdb reads the log: %%', %s; END $$"
_LOG_PATIENCE = 3
# Who is refused is so in the language of the configuration, not in that of a role's settings.
_LANGUAGE = """
SELECT setting FROM pg_catalog.pg_settings WHERE name = 'lc_messages'
  AND source IN ('default', 'configuration file', 'command line')
"""
_ENGLISH = re.compile(r"(C|POSIX|en)([._@]|\Z)")


def __virtual__() -> str:
    return __virtualname__


def _unit() -> str:
    name = __salt__["slmdb_pillar.get"]("backend", "unit")
    return name if name.endswith(".service") else f"{name}.service"


def _state() -> dict[str, str]:
    command = ["systemctl", "show", "-p", "LoadState,ActiveState", _unit()]
    answer = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
    pairs = (line.partition("=") for line in answer["stdout"].splitlines())
    return {name: value for name, _, value in pairs}


def _skipped(want: dict[str, Any], states: tuple[str, ...] = _RUNNING) -> str | None:
    """Say why the backend is left alone; None if it is not."""
    if want["rotate_backend"] == "none":
        return "left alone (secret:rotate_backend is none)"
    if not __salt__["slmdb_instance.systemd"]():
        return "left alone (no systemd here)"
    state = _state()
    if state.get("LoadState") != "loaded":
        return "not deployed: restart skipped"
    if state.get("ActiveState") not in states:
        return "not running: restart skipped"
    return None


def former(changes: dict[str, Any]) -> str | None:
    """
    Say what becomes of a running backend when the server gets a password that somebody wrote into
    the file: it keeps what it was started with.

    For callers in Python.

    changes
        What ``slmdb_secret.differences`` returned.

    Returns one line, or ``None``: nobody did, a rotation sees to the backend, or none runs. Raises
    nothing.
    """
    verifier = changes.get(f"verifier of {__salt__['slmdb_pillar.get']('role')}") or {}
    if verifier.get("old") != "another password" or not __salt__["slmdb_instance.systemd"]():
        return None
    if _state().get("ActiveState") not in _RUNNING:
        return None
    return (
        f"{_unit()} keeps the password with which it was started; if that is the former one it can "
        f"open no new session from then on: systemctl restart {_unit()} after this run"
    )


def intention(want: dict[str, Any]) -> str:
    """
    Say what a rotation would do with the backend.

    want
        What ``slmdb_secret_plan.wanted`` returns.

    Returns a few words.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_backend.intention "$WANTED"
    """
    return _skipped(want) or f"{want['rotate_backend']} {_unit()}"


def renew(want: dict[str, Any]) -> str:
    """
    Let the backend read the secret file again, and wait until it has logged in.

    want
        What ``slmdb_secret_plan.wanted`` returns.

    Returns a few words about what was done. Raises ``CommandExecutionError`` if the backend does
    not come back or makes no connection.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_backend.renew "$WANTED"
    """
    skipped = _skipped(want)
    if skipped:
        return skipped
    try:
        return _renewed(want)
    except OSError as err:
        raise CommandExecutionError(
            f"whether {_unit()} logs in cannot be told: {err.strerror}"
        ) from err


def _renewed(want: dict[str, Any]) -> str:
    verb = want["rotate_backend"]
    began = __salt__["slmdb_server.query"]("SELECT clock_timestamp() AS now")[0]["now"]
    before = _ports(want["role"], "-infinity")
    over_socket = bool(before) and set(before) == {_SOCKET}
    counted = _count()
    command = ["systemctl", verb, _unit()]
    answer = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
    if answer["retcode"]:
        raise CommandExecutionError(
            f"systemctl {verb} {_unit()} failed; see journalctl -u {_unit()}"
        )
    _wait_for_session(want["role"], began, over_socket, counted)
    return f"{verb}ed, and it logged in" if verb != "restart" else "restarted, and it logged in"


def restore(want: dict[str, Any], touched: bool) -> None:
    """
    Let the backend have the old password again; one that failed with the new one is started again.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    touched
        Whether this rotation restarted it: then it is started even if it ended without error.

    Returns nothing and raises nothing: the old password is in force whatever the backend does.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_backend.restore "$WANTED" False
    """
    states = (*_RUNNING, "failed", *(("inactive",) if touched else ()))
    if _skipped(want, states):
        return
    verb = want["rotate_backend"] if _state().get("ActiveState") in _RUNNING else "restart"
    for words in (["reset-failed", _unit()], [verb, _unit()]):
        __salt__["cmd.run_all"](["systemctl", *words], python_shell=False, ignore_retcode=True)


def _ports(role: str, since: Any) -> list[int]:
    """The client's port of each session that began since."""
    return [row["port"] for row in __salt__["slmdb_server.query"](_SESSIONS, (role, since))]


def _count() -> int:
    return __salt__["slmdb_server.query"](_COUNT)[0]["n"]


def _inode(port: int) -> str | None:
    """The socket at the client's end of a connection to the server; None if it is closed."""
    server = __salt__["slmdb_instance.facts"]()["port"]
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(path, encoding="ascii") as stream:
                rows = [line.split() for line in stream.readlines()[1:]]
        except OSError:
            continue  # a kernel without IPv6 has no such list
        for row in rows:
            ends = [int(end.rpartition(":")[2], 16) for end in row[1:3]]
            if ends == [port, server] and row[9] != "0":
                return row[9]
    return None


def _sockets() -> set[str]:
    """The sockets of every process of the backend's unit."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8") as stream:
                if f"/{_unit()}" not in stream.read():
                    continue
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue  # it has ended, or closed one meanwhile
        found |= {link[8:-1] for link in links if link.startswith("socket:[")}
    return found


def _is_there(role: str, since: Any, over_socket: bool) -> bool:
    """Whether a session that began since then is the backend's."""
    for port in _ports(role, since):
        if port == _SOCKET:
            if over_socket:
                return True
            continue
        inode = _inode(port)
        if inode and inode in _sockets():
            return True
    return False


def _said(since: Any) -> str | None:
    """What the server has said in the journal since then; None if it speaks elsewhere."""
    mark = secrets.token_hex(8)
    __salt__["slmdb_server.query"](_MARK, (mark,))
    unit = __salt__["slmdb_instance.facts"]()["unit"]
    moment = f"@{since.timestamp():.3f}"
    command = ["journalctl", "-q", "--no-pager", "-o", "cat", "-u", unit, "--since", moment]
    deadline = time.monotonic() + _LOG_PATIENCE
    while time.monotonic() < deadline:
        answer = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
        if answer["retcode"]:
            return None
        if mark in answer["stdout"]:
            return answer["stdout"]
        time.sleep(0.1)
    return None


def _nobody_refused(role: str, since: Any) -> bool:
    """Whether the server's log can be read, and has no refused password of the role since then."""
    said = _said(since)
    if said is None:
        return False
    language = __salt__["slmdb_server.query"](_LANGUAGE)
    if language and _ENGLISH.match(language[0]["setting"]):
        return f'authentication failed for user "{role}"' not in said
    return role not in said  # in whatever words


def _wait_for_session(role: str, since: Any, over_socket: bool, counted: int) -> None:
    """Wait for a session of the backend that began after the restart: it has the new password."""
    started = time.monotonic()
    looked = started
    while not _is_there(role, since, over_socket):
        now = time.monotonic()
        if now - looked > 0.5:
            looked = now
            if _state().get("ActiveState") in ("failed", "inactive"):
                raise CommandExecutionError(
                    f"{_unit()} did not stay up; see journalctl -u {_unit()}"
                )
        if now - started > _PATIENCE:
            # A session was too short to be told whose it was, and nobody was refused.
            if _count() > counted and _nobody_refused(role, since):
                return
            raise CommandExecutionError(
                f"{_unit()} made no connection within {_PATIENCE} s; if it connects on demand "
                "only, set slm_database:secret:rotate_backend: none"
            )
        time.sleep(_PAUSE)
