"""
When backups are made: systemd timers, or cron where systemd does not run the host.

pgBackRest is run directly, so a backup needs neither a Salt master nor a minion that is up.
"""

from __future__ import annotations

import os
from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_backup_schedule"

SYSTEM = "/etc/systemd/system"
CRON = "/etc/cron.d/autobot-slm-backup"
JOBS = {"full": "full", "differential": "diff"}
DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")

SERVICE = """\
[Unit]
Description={what} backup of the AutoBot SLM's PostgreSQL
After={unit}.service
RequiresMountsFor={path}

[Service]
Type=oneshot
User={user}
Group={user}
ExecStart={command}
Nice=10
IOSchedulingClass=idle
"""
TIMER = """\
[Unit]
Description={what} backup of the AutoBot SLM's PostgreSQL, {when}

[Timer]
OnCalendar={calendar}
Persistent=true

[Install]
WantedBy=timers.target
"""


def __virtual__() -> str:
    return __virtualname__


def _get(*keys: str) -> Any:
    return __salt__["slmdb_pillar.get"]("backup", *keys)


def calendar(when: str) -> str:
    """
    Write a time of the week as systemd's ``OnCalendar`` has it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_schedule.calendar 'Mon-Sat 01:30'

    when
        Days (or ``daily``) and a time.
    """
    days, _, clock = when.partition(" ")
    prefix = "" if days == "daily" else days.replace("-", "..") + " "
    return f"{prefix}*-*-* {clock}:00"


def cron(when: str) -> str:
    """
    Write a time of the week as the first five fields of a line of cron.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_schedule.cron 'Mon-Sat 01:30'

    when
        Days (or ``daily``) and a time.
    """
    days, _, clock = when.partition(" ")
    hour, minute = (int(part) for part in clock.split(":"))
    numbers: set[int] = set()
    for part in [] if days == "daily" else days.split(","):
        first, *chain = (DAYS.index(day) for day in part.split("-"))
        numbers.add(first)
        for last in chain:
            while first != last:
                first = (first + 1) % 7
                numbers.add(first)
    return f"{minute} {hour} * * {','.join(str(day) for day in sorted(numbers)) or '*'}"


def _jobs() -> dict[str, tuple[str, str]]:
    """Return job to its time and its command, for those that are wanted."""
    if not _get("enabled"):
        return {}
    line = __salt__["slmdb_pgbackrest.line"]
    wanted = {job: _get("schedule", job) for job in JOBS}
    return {
        job: (when, " ".join(line("backup", f"--type={JOBS[job]}")))
        for job, when in wanted.items()
        if when
    }


def _files() -> dict[str, bytes | None]:
    """Return path to content; None: the file should not exist."""
    found, jobs = __salt__["slmdb_instance.facts"](), _jobs()
    files: dict[str, bytes | None] = {CRON: None}
    for job in JOBS:
        for kind in ("service", "timer"):
            files[f"{SYSTEM}/autobot-slm-backup-{job}.{kind}"] = None
    lines = ["# Written by the slm_database formula; changes are lost.", "SHELL=/bin/sh"]
    for job, (when, command) in jobs.items():
        words = {"what": job.capitalize(), "when": when, "calendar": calendar(when)}
        words |= {"command": command, "user": found["user"], "unit": found["unit"]}
        words["path"] = _get("path")
        if found["systemd"]:
            base = f"{SYSTEM}/autobot-slm-backup-{job}"
            files[f"{base}.service"] = SERVICE.format(**words).encode()
            files[f"{base}.timer"] = TIMER.format(**words).encode()
        lines.append(f"{cron(when)} {found['user']} nice {command}")
    if jobs and not found["systemd"]:
        files[CRON] = ("\n".join(lines) + "\n").encode()
    return files


def differences() -> dict[str, Any]:
    """
    Compare the host's timers with the schedule.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_schedule.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if a file cannot be read.
    """
    changes: dict[str, Any] = {}
    for path, data in _files().items():
        changes.update(__salt__["slmdb_file.differences"](path, data))
        if data and path.endswith(".timer") and not os.path.islink(_link(path)):
            changes[os.path.basename(path)] = {"old": "not enabled", "new": "enabled"}
    return changes


def _link(timer: str) -> str:
    return f"{SYSTEM}/timers.target.wants/{os.path.basename(timer)}"


def apply() -> None:
    """
    Write the timers of the schedule, start them, and remove those that are no longer wanted.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_schedule.apply

    Raises ``CommandExecutionError`` if a file cannot be written or systemd refuses.
    """
    systemd = __salt__["slmdb_instance.facts"]()["systemd"]
    files = _files()
    timers = {path: data for path, data in files.items() if path.endswith(".timer")}
    for path, data in timers.items():
        if systemd and data is None and os.path.exists(path):
            _systemctl("disable", "--now", os.path.basename(path))
    for path, data in files.items():
        if data is None:
            __salt__["slmdb_file.remove"](path)
        else:
            __salt__["slmdb_file.write"](path, data)
    if systemd:
        _systemctl("daemon-reload")
        for path, data in timers.items():
            if data:
                _systemctl("enable", os.path.basename(path))
                _systemctl("restart", os.path.basename(path))


def _systemctl(*words: str) -> None:
    answer = __salt__["cmd.run_all"](["systemctl", *words], python_shell=False)
    if answer["retcode"]:
        raise CommandExecutionError(f"systemctl {' '.join(words)}: {answer['stderr'].strip()}")


def leftovers() -> dict[str, Any]:
    """
    Name the timers that are on the host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_schedule.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty if there is none. Raises
    ``CommandExecutionError`` if a file cannot be read.
    """
    changes: dict[str, Any] = {}
    for path in _files():
        changes.update(__salt__["slmdb_file.differences"](path, None))
    return changes


def remove() -> None:
    """
    Stop and remove the timers.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_schedule.remove

    Raises ``CommandExecutionError`` if a file cannot be removed or systemd refuses.
    """
    systemd = __salt__["slmdb_instance.facts"]()["systemd"]
    for path in leftovers():
        if systemd and path.endswith(".timer"):
            _systemctl("disable", "--now", os.path.basename(path))
        __salt__["slmdb_file.remove"](path)
    if systemd:
        _systemctl("daemon-reload")
