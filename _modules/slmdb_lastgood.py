"""
The last configuration under which logins were seen to work, and the way back to it when the server
does not start.
"""

from __future__ import annotations

import os
import time
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_lastgood"

DIRECTORY = "/var/lib/autobot-slm-database/last-good"
OVERCOMMIT = "/proc/sys/vm/overcommit_memory"


def __virtual__() -> str:
    return __virtualname__


def _files() -> dict[str, tuple[str, str]]:
    """Return copy to original and its mode."""
    found = __salt__["slmdb_instance.facts"]()
    return {
        f"{DIRECTORY}/conf": (found["conf_file"], "0644"),
        f"{DIRECTORY}/hba": (found["hba_file"], "0640"),
        f"{DIRECTORY}/ident": (found["ident_file"], "0640"),
    }


def exists() -> bool:
    """
    Tell whether there is a last good configuration: if not, this is a first install.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.exists
    """
    return os.path.isfile(f"{DIRECTORY}/conf")


def save() -> None:
    """
    Keep the present configuration as the last good one; of one that waits for a restart in part
    only the rules and maps, which never wait.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.save

    To be called when the running server has been seen to let people in.
    """
    files = _files()
    if __salt__["slmdb_config.pending"]():
        files = {copy: row for copy, row in files.items() if not copy.endswith("/conf")}
    for copy, (original, _) in sorted(files.items(), reverse=True):
        data = __salt__["slmdb_file.read"](original)
        if data is not None and data != __salt__["slmdb_file.read"](copy):
            __salt__["slmdb_file.write"](copy, data, "root", "root", "0600")


def restore() -> bool:
    """
    Put the last good configuration in place of the present one.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.restore

    Returns whether that changed anything; false if there is none, or it is the present one.
    """
    changed = False
    user = __salt__["slmdb_instance.facts"]()["user"]
    for copy, (original, mode) in _files().items():
        data = __salt__["slmdb_file.read"](copy)
        if data is not None and data != __salt__["slmdb_file.read"](original):
            __salt__["slmdb_file.write"](original, data, user, user, mode)
            changed = True
    return changed


def start() -> None:
    """
    Start the server; if it does not start, bring back the last good configuration and start that.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.start

    Raises CommandExecutionError if it did not start at the first try, also when it runs now.
    """
    _attempt("start")


def restart() -> None:
    """
    Restart the server; if it does not start, bring back the last good configuration and start that.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.restart

    Raises CommandExecutionError if it did not start at the first try, also when it runs now; and
    before anything is done if a scratch instance shows that it would not.
    """
    if __salt__["slmdb_instance.facts"]()["running"]:
        _refuse(_objections())
    _attempt("restart")


def _refuse(lines: list[str]) -> None:
    if lines:
        raise CommandExecutionError(
            f"not restarted, the server would not start: {'; '.join(lines)}"
        )


def _objections() -> list[str]:
    """Return why the server would not start with the files that are there, whoever wrote them."""
    conf = __salt__["slmdb_file.read"](__salt__["slmdb_instance.facts"]()["conf_file"]) or b""
    answer = __salt__["slmdb_rehearsal.check"](conf.decode(errors="replace"))
    if not answer:
        return []
    kept = __salt__["slmdb_limits.kept"](answer["settings"])
    lines = [f"{name}: {words}" for name, words in kept.items()]
    return lines + [words for words in answer["objections"] if not _only_cramped(words)]


def _only_cramped(words: str) -> bool:
    """Whether the memory that the running server gives back may be all that is in the way."""
    if "shared memory" not in words:
        return False
    # Before 15 a scratch instance asks for huge pages, too; a kernel may count memory strictly.
    strict = (__salt__["slmdb_file.read"](OVERCOMMIT) or b"").strip() == b"2"
    return strict or int(__salt__["slmdb_instance.facts"]()["version"]) < 15


def _attempt(verb: str) -> None:
    began = time.monotonic()
    # If systemd cannot be asked nothing is done: that is no fault of the configuration.
    __salt__["slmdb_service.parked"]()
    before = __salt__["slmdb_instance.facts"]()["pid"]
    try:
        __salt__[f"slmdb_service.{verb}"]()
        return
    except CommandExecutionError as err:
        words = str(err.strerror)
    # Nor is it one if the server of before goes on: nobody has tried the configuration yet.
    if before and __salt__["slmdb_instance.facts"]()["pid"] == before:
        raise CommandExecutionError(f"the server was not {verb}ed: {words}")
    if not restore():
        raise CommandExecutionError(f"the server did not start: {_placed(words)}")
    try:
        __salt__["slmdb_service.restart"]()
    except CommandExecutionError as err:
        raise CommandExecutionError(
            f"the server did not start: {words}; nor with the last good configuration: "
            f"{_placed(str(err.strerror))}"
        ) from None
    away = time.monotonic() - began
    raise CommandExecutionError(
        f"the server did not start: {words}; the last good configuration is in force again, "
        f"the server was away for {away:.0f} s; correct slm_database:settings"
    )


def _placed(words: str) -> str:
    """A server's last words, with the place of what somebody else wrote, if that is the reason."""
    place = __salt__["slmdb_config.culprit"](words)
    found = __salt__["slmdb_instance.facts"]()
    auto = f"{found['data_directory']}/postgresql.auto.conf"
    if os.path.basename(auto) in (place or words):
        return f"{words}; ALTER SYSTEM wrote that: take it out of {place or auto}, and start again"
    return f"{words}; take it out of {place}, and start again" if place else words


def port() -> int:
    """
    Return the server's port; in test mode the one it will have after the restart that comes first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.port

    Returns a number. Raises ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    found = __salt__["slmdb_instance.facts"]()
    moves = __opts__.get("test") and found["running"] and found["port"] != found["wanted_port"]
    return (
        found["wanted_port"]
        if moves and __salt__["slmdb_window.restart_permitted"]()
        else found["port"]
    )


def differences() -> dict[str, dict[str, Any]]:
    """
    Compare what is loaded with what would be after a restart, if one is permitted now.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.differences

    Returns setting to ``old`` and ``new``; empty if nothing waits, or a restart is not permitted.
    Raises CommandExecutionError if a restart is permitted and the server would not start.
    """
    if not __salt__["slmdb_server.available"]():
        return {}
    waiting = __salt__["slmdb_config.waiting"]()
    # Windows and systemd are looked at only if something waits. A server that runs outside our unit
    # is started anew by slmdb_service.running.
    if not waiting or not __salt__["slmdb_window.restart_permitted"]():
        return {}
    if not __salt__["slmdb_service.running"]():
        return {}
    # With what our file has or will have; by others there may be something new since it was parked.
    _refuse(__salt__["slmdb_config.problems"]())
    return {row["name"]: {"old": row["old"], "new": row["new"]} for row in waiting}


def apply() -> None:
    """
    Restart the server, so that what waits for it is in force.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_lastgood.apply

    Raises CommandExecutionError if it did not start; the last good configuration is in force then.
    """
    restart()
