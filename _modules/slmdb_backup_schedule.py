"""
When backups are made: systemd timers, or cron where systemd does not run the host.

pgBackRest is run directly, the logical dump and the drill through a copy of our modules: neither
needs a Salt master, or a minion that is up.
"""

from __future__ import annotations

import os
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_schedule"

SYSTEM = "/etc/systemd/system"
CRON = "/etc/cron.d/autobot-slm-backup"
TYPES = {"full": "full", "differential": "diff"}
JOBS = {
    "full": "Full backup",
    "differential": "Differential backup",
    "dump": "Logical dump",
    "drill": "Trial restore",
}
# Longer than any of them takes; a job that hangs must not stand in the way of the next.
PATIENCE = {"full": "7d", "differential": "7d", "dump": "1d", "drill": "2d"}
DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")

SERVICE = """\
[Unit]
Description={what} of the AutoBot SLM's PostgreSQL
After={unit}.service
{mounts}
[Service]
Type=oneshot
User={user}
Group={user}
ExecStart={command}
TimeoutStartSec={patience}
{priority}"""
PRIORITY = """\
Nice=10
IOSchedulingClass=idle
CPUWeight=20
"""
LAST = """\
Nice=19
IOSchedulingClass=idle
CPUWeight=10
UMask=0077
"""
TIMER = """\
[Unit]
Description={what} of the AutoBot SLM's PostgreSQL, {when}

[Timer]
OnCalendar={calendar}
Persistent=true
RandomizedDelaySec=0

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


def _backup(kind: str) -> list[str]:
    """One backup for each repository; one that fails keeps no other from its own."""
    line, numbers = __salt__["slmdb_pgbackrest.line"], __salt__["slmdb_pgbackrest.repositories"]()
    options = [f"--type={TYPES[kind]}"]
    if len(numbers) == 1:
        return line("backup", *options)
    calls = [" ".join(line("backup", *options, f"--repo={number}")) for number in numbers]
    script = " ".join(f"{call} || failed=1;" for call in calls)
    return ["/bin/sh", "-c", f"'failed=0; {script} exit $failed'"]


def _jobs() -> dict[str, tuple[str, str, list[str]]]:
    """Return job to its time, its user and its command, for those that are wanted."""
    if not _get("enabled"):
        return {}
    user, jobs = __salt__["slmdb_instance.facts"]()["user"], {}
    for job in JOBS:
        when = _get("schedule", job)
        if when and job in TYPES:
            jobs[job] = (when, user, _backup(job))
        elif when:
            jobs[job] = (when, "root", __salt__["slmdb_runner.command"](f"slmdb_backup.{job}"))
    return jobs


def _service(job: str, user: str, command: list[str]) -> bytes:
    mounts, priority = "", PRIORITY if job in TYPES else LAST
    if __salt__["slmdb_pgbackrest.repositories"]() == [1]:
        # With another repository a disk that does not come up must not stop what goes there.
        mounts = f"RequiresMountsFor={_get('path')}\n"
        priority += "PrivateNetwork=true\n" if job == "drill" else ""
    words = {"what": JOBS[job], "user": user, "patience": PATIENCE[job], "priority": priority}
    words |= {"unit": __salt__["slmdb_instance.facts"]()["unit"], "mounts": mounts}
    return SERVICE.format(command=" ".join(command).replace("$", "$$"), **words).encode()


def _crontab(jobs: dict[str, tuple[str, str, list[str]]]) -> bytes:
    lines = ["# Written by the slm_database formula; changes are lost.", "SHELL=/bin/sh"]
    for job, (when, user, command) in jobs.items():
        nice = "nice" if job in TYPES else "nice -n 19 ionice -c idle"
        lines.append(f"{cron(when)} {user} {nice} {' '.join(command)}")
    return ("\n".join(lines) + "\n").encode()


def _files() -> dict[str, bytes | None]:
    """Return path to content; None: the file should not exist."""
    systemd, jobs = __salt__["slmdb_instance.facts"]()["systemd"], _jobs()
    files: dict[str, bytes | None] = {CRON: None}
    for job in JOBS:
        for kind in ("service", "timer"):
            files[f"{SYSTEM}/autobot-slm-backup-{job}.{kind}"] = None
    if jobs and not systemd:
        files[CRON] = _crontab(jobs)
    for job, (when, user, command) in jobs.items() if systemd else ():
        base = f"{SYSTEM}/autobot-slm-backup-{job}"
        words = {"what": JOBS[job], "when": when, "calendar": calendar(when)}
        files[f"{base}.service"] = _service(job, user, command)
        files[f"{base}.timer"] = TIMER.format(**words).encode()
    return files


def differences() -> dict[str, Any]:
    """
    Compare the host's timers with the schedule.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_schedule.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if a file cannot be read, or systemd cannot be asked.
    """
    changes: dict[str, Any] = {}
    files = _files()
    timers = [path for path, data in files.items() if data and path.endswith(".timer")]
    # What another state of this run was told just now, but only once.
    kept = __context__.pop("slmdb_jobs", None)
    shown = kept or __salt__["slmdb_service.units"]() if timers else {}
    for path, data in files.items():
        changes.update(__salt__["slmdb_file.differences"](path, data))
    for name, path in ((os.path.basename(path), path) for path in timers):
        state = shown[name].get("ActiveState", ["inactive"])[0]
        if not os.path.islink(_link(path)):
            changes[name] = {"old": "not enabled", "new": "enabled"}
        elif state != "active":
            changes[name] = {"old": state, "new": "active"}
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
        __salt__["slmdb_unit.reload_units"]()
        for path, data in timers.items():
            if data:
                _systemctl("enable", os.path.basename(path))
                _systemctl("restart", os.path.basename(path))


def _systemctl(*words: str) -> None:
    __salt__["slmdb_program.run"]("systemctl", *words)


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
        __salt__["slmdb_unit.reload_units"]()
