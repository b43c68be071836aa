"""
Starting and stopping the server: by systemd where it runs the host, by ``pg_ctlcluster`` elsewhere.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_service"

PATIENCE = 60
STATE = ("ActiveState", "UnitFileState", "NeedDaemonReload", "DropInPaths", "MainPID")
BACKEND = ("LoadState", "User", "Environment", "EnvironmentFiles")
JOB = ("Result", "ExecMainStatus")
# What a session was told, and not the server: Debian's prefix has its user and database.
_SESSION = re.compile(r"\S@\S+ +[A-Z]+:")
OUTSIDE = "running outside our unit"
PARKED = "which waits for a window or an approval"
# Seconds for systemd's answer: a report has a deadline, and this if its own is a short one; a run
# can wait as long as systemctl does.
ANSWER, ANSWER_IN_REPORT = 30, 1

# Lines of /proc/PID/maps: the program and its libraries, but for caches and locales, which others
# write anew at any time; dpkg's name for the old file may still be there.
_REPLACED = re.compile(
    rb"\s/(?:usr|lib)\S*/(postgres|[^/\s]+\.so(?:\.[\d.]+)?)(?:\.dpkg-\w+)? \(deleted\)$",
    re.MULTILINE,
)


def __virtual__() -> str:
    return __virtualname__


def _run(command: list[str]) -> None:
    answer = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
    if answer["retcode"]:
        raise _failed(command, answer)


def _failed(command: list[str], answer: dict) -> CommandExecutionError:
    line, killed = " ".join(command), __salt__["slmdb_program.fate"](answer["retcode"])
    return CommandExecutionError(f"{line} {killed}" if killed else f"{line}: {_why(answer)}")


def _why(answer: dict) -> str:
    """The server's own last error where it can be had, else what the command said."""
    found = __salt__["slmdb_instance.facts"]()
    text = said = answer["stderr"] or answer["stdout"]
    if found["systemd"]:
        # What the server said last may be on its way there.
        __salt__["cmd.run_all"](["journalctl", "--sync"], python_shell=False, ignore_retcode=True)
        command = _journal(found["unit"])
        text = __salt__["cmd.run_all"](command, python_shell=False)["stdout"] or text
    lines = _of_the_server(text) or said.strip().splitlines() or ["no output"]
    return _error(lines) or lines[-1]


def _journal(unit: str) -> list[str]:
    return ["journalctl", "-q", "--no-pager", "-o", "cat", "-n", "30", "-u", unit]


def _of_the_server(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if not _SESSION.search(line)]


def _error(lines: list[str]) -> str | None:
    """The last error that there is."""
    for number, line in reversed(list(enumerate(lines))):
        for word in ("FATAL:", "PANIC:", "ERROR:"):
            if word in line:
                said = line.partition(word)[2].strip()
                # Which errors a file contains is said before.
                before = lines[max(number - 5, 0) : number] if "contains errors" in said else []
                return "; ".join([*(_logged(one) for one in before if "LOG:" in one), said])
    return None


def last_words() -> str | None:
    """
    Say what the server said last where its unit does not bring it up.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.last_words

    Returns its last error in one line; ``None`` if there is none, systemd does not run this host,
    or the journal does not answer within a second. Raises nothing.
    """
    command = _journal(__salt__["slmdb_instance.facts"]()["unit"])
    try:
        _, said, _ = __salt__["slmdb_program.listen"](*command, timeout=ANSWER_IN_REPORT)
    except CommandExecutionError:
        return None
    return _error(_of_the_server(said))


def _logged(line: str) -> str:
    return line.partition("LOG:")[2].strip()


def _systemctl(verb: str, found: dict) -> None:
    """Fails only if the server did not do it, whatever became of systemctl."""
    command = ["systemctl", verb, found["unit"]]
    answer = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
    if not answer["retcode"]:
        return
    if __salt__["slmdb_program.fate"](answer["retcode"]):
        # The job is systemd's and goes on: who asks for the same once more waits for its end.
        again = ["systemctl", "stop" if verb == "stop" else "start", found["unit"]]
        joined = __salt__["cmd.run_all"](again, python_shell=False, ignore_retcode=True)
        if joined["retcode"]:
            command, answer = again, joined
    if not _did(verb, found):
        raise _failed(command, answer)


def _did(verb: str, before: dict) -> bool:
    """Whether the server was stopped, or answers and is another one than before."""
    found = __salt__["slmdb_instance.facts"]()
    if verb == "stop":
        return not found["running"]
    return found["pid"] != before["pid"] and __salt__["slmdb_server.available"]()


def _act(verb: str) -> None:
    found = __salt__["slmdb_instance.facts"]()
    __salt__["slmdb_server.forget"]()
    if found["systemd"]:
        _systemctl(verb, found)
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
    Raises ``CommandExecutionError`` if the instance's facts cannot be told, or systemd cannot be
    asked.
    """
    found = __salt__["slmdb_instance.facts"]()
    return found["running"] and not _outside(found, unit_state())


def _outside(found: dict, state: dict) -> bool:
    """Whether the server runs, but not as our unit's process."""
    return bool(found["running"] and state and state["MainPID"] != found["pid"])


def unit_state() -> dict:
    """
    Return what systemd says of our unit, in one call.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.unit_state

    Returns ``ActiveState``, ``UnitFileState``, ``NeedDaemonReload``, ``DropInPaths`` as text and
    ``MainPID`` as a number; an empty dictionary without systemd. Raises ``CommandExecutionError``
    if systemd cannot be asked.
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
    Return what systemd says of our unit, the backend's and the backups', in one call.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.units

    Returns each unit's properties, each a list of its lines. Raises ``CommandExecutionError`` if
    systemd cannot be asked within 30 seconds; a health report waits for a quarter of its time, at
    least for one, hears of it once and goes on with empty ones. It keeps them in
    ``__context__["slmdb_units"]`` while it is made; a run keeps the backups' for whoever asks next
    in ``__context__["slmdb_jobs"]``.
    """
    names = [__salt__["slmdb_instance.facts"]()["unit"]]
    names.append(__salt__["slmdb_pillar.get"]("backend", "unit"))
    jobs = _jobs()
    names += jobs
    found: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    report = __context__.get("slmdb_facts")
    if report is not None and __context__.get("slmdb_unanswered") is report:
        return found
    text = _shown(names, ANSWER if report is None else _patience())
    for name, block in zip(names, text.split("\n\n"), strict=False):
        for line in block.splitlines():
            key, _, value = line.partition("=")
            if value:
                found[name].setdefault(key, []).append(value)
    if "MainPID" not in found[names[0]]:
        raise CommandExecutionError(_unanswered("it says nothing of the unit"))
    if report is None:
        __context__["slmdb_jobs"] = {name: found[name] for name in jobs}
    return found


def _jobs() -> list[str]:
    """The units of the backups that pillar wants."""
    get = __salt__["slmdb_pillar.get"]
    wanted = get("backup", "schedule") if get("backup", "enabled") else {}
    jobs = [f"autobot-slm-backup-{job}" for job, when in wanted.items() if when]
    return [f"{job}.{kind}" for job in jobs for kind in ("timer", "service")]


def _patience() -> int:
    return max(ANSWER_IN_REPORT, int(__context__.get("slmdb_patience", 0)))


def _shown(names: list[str], seconds: int) -> str:
    command = ["systemctl", "show", "-p", ",".join((*STATE, *BACKEND, *JOB)), "--", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise CommandExecutionError(_unanswered(f"no answer within {seconds} s")) from None
    except OSError as err:
        raise CommandExecutionError(_unanswered(str(err.strerror))) from err
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CommandExecutionError(_unanswered(lines[-1]))
    return done.stdout


def _unanswered(why: str) -> str:
    """What is not known is no reason to touch a server: the line that says so."""
    __context__["slmdb_unanswered"] = __context__.get("slmdb_facts")
    return f"systemd cannot be asked for {__salt__['slmdb_instance.facts']()['unit']}: {why}"


def _foreign() -> None:
    """End a server that runs outside our unit, so that ours can have its place."""
    found = __salt__["slmdb_instance.facts"]()
    if not found["running"] or not _outside(found, unit_state()):
        return
    __salt__["slmdb_server.forget"]()
    _run(["systemctl", "stop", f"postgresql@{found['version']}-{found['name']}"])
    if __salt__["slmdb_instance.facts"]()["running"]:
        _run(["pg_ctlcluster", found["version"], found["name"], "stop", "-m", "fast", "--force"])


def replaced() -> list[str]:
    """
    Name what of the server's program and libraries was replaced on disk since it started.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.replaced

    Returns names of files, sorted, as after an update of OpenSSL; empty if the server does not run.
    Raises nothing.
    """
    try:
        with open(f"/proc/{__salt__['slmdb_instance.facts']()['pid']}/maps", "rb") as stream:
            found = set(_REPLACED.findall(stream.read()))
    except OSError:
        return []
    return sorted(name.decode(errors="replace") for name in found)


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


def parked() -> list[dict]:
    """
    List what of the server's unit only a restart brings.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.parked

    Returns one row with ``name``, ``old`` and ``new`` for a server that runs outside our unit, else
    none. Raises ``CommandExecutionError`` if systemd cannot be asked.
    """
    found = __salt__["slmdb_instance.facts"]()
    if not found["running"] or not _outside(found, unit_state()):
        return []
    return [{"name": "unit", "old": OUTSIDE, "new": found["unit"]}]


def warnings() -> list[str]:
    """
    Say what the last comparison left as it is, because a restart was not permitted.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.warnings

    Returns lines, empty if nothing was left. Raises nothing.
    """
    return __context__.get("slmdb_service_left") or []


def differences() -> dict:
    """
    Compare the host with "the server runs under our unit and starts at boot".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_service.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. A server that runs outside
    our unit is moved into it, which takes a restart, only if one is permitted; else ``warnings``
    has it. Raises ``CommandExecutionError`` if the instance's facts cannot be told, or systemd
    cannot be asked.
    """
    found, state = __salt__["slmdb_instance.facts"](), unit_state()
    changes: dict = {}
    __context__["slmdb_service_left"] = []
    if not found["running"]:
        changes["server"] = {"old": "stopped", "new": "running"}
    elif _outside(found, state) and __salt__["slmdb_window.restart_permitted"]():
        changes["server"] = {"old": OUTSIDE, "new": "running"}
    elif _outside(found, state):
        line = f"the server is {OUTSIDE} {found['unit']}; it is moved there by a restart, {PARKED}"
        __context__["slmdb_service_left"] = [line]
    if state and state.get("UnitFileState") != "enabled" and not _will_be_enabled(found):
        changes["start at boot"] = {"old": state.get("UnitFileState") or None, "new": "enabled"}
    return changes


def _will_be_enabled(found: dict) -> bool:
    """Whether in earnest the run puts back, before this, a unit that is only gone or masked."""
    system, unit = "/etc/systemd/system", f"{found['unit']}.service"
    if not __opts__["test"] or not os.path.islink(f"{system}/multi-user.target.wants/{unit}"):
        return False
    return f"{system}/{unit}" in __salt__["slmdb_unit.differences"]()


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
