"""
Giving the running backend its new password, and seeing that it logs in with it.
"""

from __future__ import annotations

import time
from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_secret_backend"

_PATIENCE = 30
_PAUSE = 0.02
_RUNNING = ("active", "reloading", "activating")
_SESSIONS = """
SELECT count(*) FILTER (WHERE client_addr IS NOT NULL) AS remote, count(*) AS every
FROM pg_catalog.pg_stat_activity
WHERE usename = %s AND backend_start > %s AND state IS NOT NULL AND state <> 'starting'
  AND application_name NOT LIKE 'slmdb%%'
"""


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
    verb = want["rotate_backend"]
    began = __salt__["slmdb_server.query"]("SELECT clock_timestamp() AS now")[0]["now"]
    before = _sessions(want["role"], "-infinity")
    local_only = before["every"] > 0 and before["remote"] == 0
    command = ["systemctl", verb, _unit()]
    answer = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
    if answer["retcode"]:
        raise CommandExecutionError(
            f"systemctl {verb} {_unit()} failed; see journalctl -u {_unit()}"
        )
    _wait_for_session(want["role"], began, local_only)
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


def _sessions(role: str, since: Any) -> dict[str, int]:
    return __salt__["slmdb_server.query"](_SESSIONS, (role, since))[0]


def _wait_for_session(role: str, since: Any, local_only: bool) -> None:
    """Wait for a session that began after the restart: it can only have the new password."""
    started = time.monotonic()
    looked = started
    while True:
        seen = _sessions(role, since)
        if seen["every"] if local_only else seen["remote"]:
            return
        now = time.monotonic()
        if now - looked > 0.5:
            looked = now
            if _state().get("ActiveState") in ("failed", "inactive"):
                raise CommandExecutionError(
                    f"{_unit()} did not stay up; see journalctl -u {_unit()}"
                )
        if now - started > _PATIENCE:
            raise CommandExecutionError(
                f"{_unit()} made no connection within {_PATIENCE} s; if it connects on demand "
                "only, set slm_database:secret:rotate_backend: none"
            )
        time.sleep(_PAUSE)
