"""
Starting and stopping the server: by systemd where it runs the host, by ``pg_ctlcluster`` elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_service"

PATIENCE = 60
STATE = ("ActiveState", "UnitFileState", "NeedDaemonReload", "MainPID")
BACKEND = ("LoadState", "User", "Environment", "EnvironmentFiles")


def __virtual__() -> str:
    return __virtualname__


def _run(command: list[str]) -> None:
    answer = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
    if answer["retcode"]:
        raise CommandExecutionError(f"{' '.join(command)}: {_why(answer)}")


def _why(answer: dict) -> str:
    """The server's own last error where it can be had, else what the command said."""
    found = __salt__["slmdb_instance.facts"]()
    text = answer["stderr"] or answer["stdout"]
    if found["systemd"]:
        journal = ["journalctl", "-q", "--no-pager", "-o", "cat", "-n", "30", "-u", found["unit"]]
        text = __salt__["cmd.run_all"](journal, python_shell=False)["stdout"] or text
    lines = text.strip().splitlines() or ["no output"]
    for line in reversed(lines):
        for word in ("FATAL:", "PANIC:", "ERROR:"):
            if word in line:
                return line.partition(word)[2].strip()
    return lines[-1]


def _act(verb: str) -> None:
    found = __salt__["slmdb_instance.facts"]()
    __salt__["slmdb_server.forget"]()
    if found["systemd"]:
        _run(["systemctl", verb, found["unit"]])
        return
    command = ["pg_ctlcluster", found["version"], found["name"], verb]
    if verb in ("stop", "restart"):
        command += ["-m", "fast"]
    _run(command)


def running() -> bool:
    """
    Tell whether the server runs under the unit that it should run under.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.running

    Returns a boolean; a server that systemd runs under another unit counts as not running.
    Raises ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    found = __salt__["slmdb_instance.facts"]()
    return found["running"] and (not found["systemd"] or unit_state()["MainPID"] == found["pid"])


def unit_state() -> dict:
    """
    Return what systemd says of our unit, in one call.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.unit_state

    Returns ``ActiveState``, ``UnitFileState``, ``NeedDaemonReload`` as text and ``MainPID`` as a
    number; an empty dictionary without systemd. Raises nothing.
    """
    found = __salt__["slmdb_instance.facts"]()
    if not found["systemd"]:
        return {}
    shown = (__context__.get("slmdb_units") or units())[found["unit"]]
    state: dict = {name: (shown.get(name) or [""])[0] for name in STATE}
    state["MainPID"] = int(state["MainPID"] or 0)
    return state


def units() -> dict[str, dict[str, list[str]]]:
    """
    Return what systemd says of our unit and the backend's, in one call.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.units

    Returns each unit's properties, each a list of its lines; empty ones if systemd cannot be
    asked within two seconds. Raises what wrong settings raise. A health report keeps them in
    ``__context__["slmdb_units"]`` while it is made.
    """
    names = [__salt__["slmdb_instance.facts"]()["unit"]]
    names.append(__salt__["slmdb_pillar.get"]("backend", "unit"))
    found: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    command = ["systemctl", "show", "-p", ",".join((*STATE, *BACKEND)), "--", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.SubprocessError):
        return found
    for name, block in zip(names, done.stdout.split("\n\n"), strict=False):
        for line in block.splitlines():
            key, _, value = line.partition("=")
            if value:
                found[name].setdefault(key, []).append(value)
    return found


def _foreign() -> None:
    """End a server that runs outside our unit, so that ours can have its place."""
    found = __salt__["slmdb_instance.facts"]()
    if not found["running"] or not found["systemd"] or running():
        return
    __salt__["slmdb_server.forget"]()
    _run(["systemctl", "stop", f"postgresql@{found['version']}-{found['name']}"])
    if __salt__["slmdb_instance.facts"]()["running"]:
        _run(["pg_ctlcluster", found["version"], found["name"], "stop", "-m", "fast", "--force"])


def start() -> None:
    """
    Start the server and wait until it answers.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.start

    Returns nothing. Raises ``CommandExecutionError`` with the server's words if it does not start.
    """
    _foreign()
    _act("start")
    _wait()


def stop() -> None:
    """
    Stop the server, ending its sessions (mode ``fast``).

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.stop

    Returns nothing. Raises ``CommandExecutionError`` if it does not stop.
    """
    _act("stop")


def restart() -> None:
    """
    Restart the server and wait until it answers.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.restart

    Returns nothing. Raises ``CommandExecutionError`` with the server's words if it does not start.
    """
    _foreign()
    _act("restart")
    _wait()


def reload() -> None:
    """
    Let the server read its configuration again.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.reload

    A server whose rules keep us out is told by a signal. Returns nothing. Raises
    ``CommandExecutionError`` if the server does not answer.
    """
    if __salt__["slmdb_server.refused"]():
        os.kill(__salt__["slmdb_instance.facts"]()["pid"], signal.SIGHUP)
    else:
        __salt__["slmdb_server.query"]("SELECT pg_reload_conf()")


def _wait() -> None:
    deadline = time.monotonic() + PATIENCE
    while not __salt__["slmdb_server.available"]():
        if time.monotonic() > deadline:
            raise CommandExecutionError(
                f"the server did not answer within {PATIENCE} s of its start"
            )
        time.sleep(0.1)


def differences() -> dict:
    """
    Compare the host with "the server runs under our unit and starts at boot".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    found = __salt__["slmdb_instance.facts"]()
    changes: dict = {}
    state = unit_state()
    alive = found["running"] and (not state or state["MainPID"] == found["pid"])
    if not alive:
        old = "running outside our unit" if found["running"] else "stopped"
        changes["server"] = {"old": old, "new": "running"}
    if state and state.get("UnitFileState") != "enabled":
        changes["start at boot"] = {"old": state.get("UnitFileState") or None, "new": "enabled"}
    return changes


def apply() -> None:
    """
    Start the server under our unit, and have it started at boot.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.apply

    Returns nothing. Raises ``CommandExecutionError`` with the server's words if it does not start.
    """
    changes = differences()
    if "start at boot" in changes:
        _run(["systemctl", "enable", __salt__["slmdb_instance.facts"]()["unit"]])
    if "server" in changes:
        __salt__["slmdb_lastgood.start"]()
