"""
How the backups are, from what lies on the host: pgBackRest is never started for it.

The list of a local repository is read from its directories, and what was done, refused or lost from
the logs that pgBackRest itself writes here. Only of a repository host it is remembered what it said
last, and when.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_health"

VERIFIED = "/var/lib/autobot-slm-database/verified.json"
ANSWERED = "/var/lib/autobot-slm-database/repository-2.json"
HELD = "/var/lib/autobot-slm-database/repositories.json"
# As much of a log as a week of backups, or a night of failures, writes.
TAIL = 256 * 1024
PATIENCE = 0.5  # seconds for a repository's disk, more if the report's own time is a long one
DISK_PROBLEM, DISK_WARNING = 3.0, 10.0  # per cent free, as for the data's disk
SECONDS = {"m": 60, "h": 3600, "d": 86400}
AHEAD = 3600  # seconds by which a moment of the past may seem to come
JOB = "autobot-slm-backup-"  # how the units of the schedule begin
LABEL = re.compile(r"\d{8}-\d{6}F(?:_\d{8}-\d{6}[DI])?")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d+ P\d+ +[A-Z]+: (.*)")
_DROPPED = re.compile(r"dropped WAL file '(?:.*/)?([0-9A-F]{24})")


def __virtual__() -> str:
    return __virtualname__


def facts(archiver: dict[str, Any] | None) -> dict[str, Any]:
    """
    Say how the backups are.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_health.facts None

    archiver
        The row of ``pg_stat_archiver`` that the report's query has; ``None``: not known.

    Returns ``enabled``, ``since`` (UTC; from then on the limits count), ``without`` (UTC; since
    when there is an instance, if no run of the whole formula was ever completed), ``repositories``
    (for each ``repository``, ``where``, ``local``, ``there``, ``held`` (whether it ever was, for an
    instance of this host), ``backups``, ``free_percent`` (of its disk),
    ``last``, ``failed``, ``lacks`` (a segment from before it came into use) and ``closed`` (what
    the server cannot use)), ``program`` (pgBackRest's, if it is missing), ``keys`` (what is wrong
    with them), ``stopped`` (a line for each unit that is), ``ended`` (the jobs that ended badly,
    and how), ``aside`` (the data that a restore left there), ``wal`` (``archived``,
    ``archived_at``, ``waiting_seconds``, ``failing``, ``reason``, ``gap``), ``verified``, ``drill``
    and ``copy`` (as their modules have them). Raises ``CommandExecutionError`` if the settings
    cannot be told.
    """
    if not __salt__["slmdb_pillar.get"]("backup", "enabled"):
        return {"enabled": False}
    runs, described = _runs(), __salt__["slmdb_backup_repository.described"]()
    encrypted = __salt__["slmdb_backup_repository.encrypted"]()
    logged = [row["repository"] for row in described if row["type"] != "host"]
    since = __salt__["slmdb_pgbackrest.since"]()
    return {
        "enabled": True,
        "since": _moment(since),
        "without": _moment(_without()) if since is None else None,
        "repositories": [_repository(row, runs) for row in described],
        "program": _missing_program(),
        "stopped": _stopped(),
        "ended": _ended(),
        "aside": __salt__["slmdb_instance.aside"](),
        "keys": [line for number in encrypted for line in _key(number)],
        "wal": _wal(archiver or {}, runs, logged),
        "verified": _kept(VERIFIED) or None,
        "drill": __salt__["slmdb_backup_drill.last"](),
        "copy": __salt__["slmdb_backup_copy.state"](),
    }


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _without() -> float | None:
    """Since when an instance is configured, if no run of the whole formula was ever completed."""
    if __salt__["slmdb_pillar.recorded"]():
        return None
    found = __salt__["slmdb_instance.facts"]()
    moments = []
    # As initdb wrote it; of an older install, as a run wrote it first, or since.
    for path in (os.path.join(found["data_directory"], "PG_VERSION"), found["conf_file"]):
        with contextlib.suppress(OSError):
            moments.append(os.stat(path).st_mtime)
    return max(moments, default=None)


def _kept(path: str) -> dict[str, Any]:
    """What was written down on this host."""
    return __salt__["slmdb_file.remembered"](path) or {}


def _missing_program() -> str | None:
    """Where pgBackRest is not, though the package should have brought it there."""
    program = __salt__["slmdb_pgbackrest.line"]("backup")[0]
    return None if os.access(program, os.X_OK) else program


def _jobs() -> Iterator[tuple[str, dict[str, list[str]]]]:
    """The jobs' units, as far as the report's one question to systemd was answered."""
    units = __context__.get("slmdb_units") or {}
    yield from ((name, told) for name, told in units.items() if name.startswith(JOB))


def _stopped() -> list[str]:
    """Jobs that systemd will not start."""
    lines = []
    for name, told in _jobs():
        load, state = (told.get(key, [""])[0] for key in ("LoadState", "ActiveState"))
        if load == "masked":
            lines.append(f"{name} is masked")
        elif name.endswith(".timer") and told and state != "active":
            lines.append(f"{name} is {state}")
    return lines


def _ended() -> dict[str, str]:
    """The jobs whose last run ended badly, and how, such as ``exit-code 203``."""
    return {
        name.removeprefix(JOB).removesuffix(".service"): " ".join(
            told.get(key, [""])[0] for key in ("Result", "ExecMainStatus")
        )
        for name, told in _jobs()
        if told.get("ActiveState") == ["failed"]
    }


def _tail(path: str) -> str:
    """The end of a log, and of the one before it: logrotate may have emptied it an hour ago."""
    text = b""
    for one in (f"{path}.1", path):
        with contextlib.suppress(OSError), open(one, "rb") as stream:
            stream.seek(max(os.fstat(stream.fileno()).st_size - TAIL, 0))
            text += stream.read()
    return text.decode(errors="replace")


def _runs() -> list[dict[str, Any]]:
    """Every backup that pgBackRest's log tells of, oldest first, complete or failed."""
    runs: list[dict[str, Any]] = []
    for line in _tail(f"{__salt__['slmdb_pgbackrest.logs']()}-backup.log").splitlines():
        match = _STAMP.match(line)
        if not match:
            if runs and runs[-1].get("reason", "").endswith(":"):
                runs[-1]["reason"] += f" {line.strip()}"
            continue
        stamp, words = match.groups()
        if words.startswith("backup command begin"):
            repository = re.search(r"--repo=(\d+)", words)
            process = re.search(r"--exec-id=(\d+)-", words)
            runs.append({"repository": int(repository[1]) if repository else 1, "done": False})
            if process and not _works(process[1]):
                # What was killed had no time to write that it ended.
                runs[-1]["at"] = datetime.fromisoformat(stamp).timestamp()
        if runs:
            _note(runs[-1], datetime.fromisoformat(stamp).timestamp(), words)
    return runs


def _works(process: str) -> bool:
    """Whether the process that began a backup is still at it."""
    try:
        with open(f"/proc/{process}/comm", encoding="utf-8") as stream:
            return stream.read() == "pgbackrest\n"
    except OSError:
        return False


def _note(run: dict[str, Any], at: float, words: str) -> None:
    """Add what one line of the log says of a backup."""
    for key, pattern in (
        ("label", r"new backup label = (\S+)"),
        ("wal", r"backup start archive = ([0-9A-F]{24})"),
        ("reason", r"\[\d+\]: (.*)"),
    ):
        found = re.match(pattern, words)
        if found:
            run[key] = found[1]
    if words.startswith("invalid page checksum"):
        run["damaged"] = True
    if words.startswith("backup command end"):
        run.update(at=at, done="completed successfully" in words)


def _repository(row: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A repository with its last backup, and the attempt that failed since."""
    number = row["repository"]
    ours = [run for run in runs if run["repository"] == number and "at" in run]
    made = [run for run in ours if run["done"] and "label" in run]
    known = ("there", "backups", "free_percent", "last", "failed", "closed")
    held = _kept(HELD).get(str(number), {}).get("where") == row["where"]
    answer = {**row, **dict.fromkeys(known), "held": held, "lacks": _lacks(row, runs)}
    if row["local"]:
        answer.update(_listed(row["path"], {run["label"]: run for run in made}, answer["lacks"]))
    elif row["type"] == "host":
        answer.update(_answered())
    elif made:
        answer["last"] = _last(made[-1]["label"], made[-1]["at"], made[-1])
    if ours and not ours[-1]["done"]:
        reason = ours[-1].get("reason", "it was ended")
        answer["failed"] = {"at": _moment(ours[-1]["at"]), "reason": reason}
    return answer


def _lacks(row: dict[str, Any], runs: list[dict[str, Any]]) -> str | None:
    """The last segment that was not archived there, if no later backup makes up for it."""
    kept, number = _kept(HELD).get(str(row["repository"]), {}), row["repository"]
    if not kept.get("lacks") or kept["where"] != row["where"]:
        return None
    begun = _kept(ANSWERED).get("wal") if row["type"] == "host" else _covered(runs).get(number)
    return kept["lacks"] if (begun or "") <= kept["lacks"] else None


def _covered(runs: list[dict[str, Any]]) -> dict[int, str]:
    """By repository the segment with which its newest backup begins."""
    covered: dict[int, str] = {}
    for run in runs:
        if run["done"] and "wal" in run:
            covered[run["repository"]] = max(run["wal"], covered.get(run["repository"], ""))
    return covered


def _key(number: int) -> Iterator[str]:
    """What is wrong with the file of a repository's key; its content is nobody's business."""
    path, user = (
        __salt__["slmdb_pgbackrest.key"](number),
        __salt__["slmdb_instance.facts"]()["user"],
    )
    data = __salt__["slmdb_file.read"](path)
    if data is None:
        yield f"{path}, the key of repository {number}, is missing; bring the copy of it back"
        return
    differences = __salt__["slmdb_file.differences"](path, data, "root", user, "0640")
    for what, told in differences.items():
        wrong = f"{what} is {told['old']}, not {told['new']}"
        yield f"{wrong}; state.apply slm_database.backup mends it"


def _answered() -> dict[str, Any]:
    """What a repository host said when it was asked last; it makes its backups itself."""
    told = _kept(ANSWERED)
    if not told:
        return {}
    return {
        "asked_seconds": max(int(time.time() - told["asked"]), 0),
        "last": _last(told["label"], told["at"], told) if told["label"] else None,
    }


def answered(backups: list[dict[str, Any]]) -> None:
    """
    Remember what a repository host says of its backups.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_health.answered '[]'

    backups
        pgBackRest's own rows.
    """
    last = max(backups, key=lambda row: row["timestamp"]["stop"], default=None)
    told = {
        "asked": time.time(),
        "label": last["label"] if last else None,
        "at": last["timestamp"]["stop"] if last else None,
        "wal": last["archive"]["start"] if last else None,
        "damaged": bool(last and last.get("error")),
    }
    __salt__["slmdb_file.remember"](ANSWERED, told, mode="0640")


def _last(label: str, at: float, run: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": label,
        "at": _moment(at),
        "age_seconds": max(int(time.time() - at), 0),
        "damaged": run.get("damaged", False),
    }


def _free_percent(directory: str) -> float:
    seen = os.statvfs(directory)
    return round(100 * seen.f_bavail / (seen.f_blocks or 1), 1)


def _look(
    path: str, directory: str, segment: str | None
) -> tuple[bool, float, dict[str, float], bool, list[str]]:
    """
    Read a directory of backups, complete once the manifest is there; look for a segment, and for
    what is closed to the server.
    """
    complete = {}
    for name in os.listdir(directory):
        if LABEL.fullmatch(name):
            with contextlib.suppress(OSError):
                complete[name] = os.stat(f"{directory}/{name}/backup.manifest").st_mtime
    found = bool(segment and glob.glob(segment))
    there, free = os.path.exists(f"{directory}/backup.info"), _free_percent(directory)
    return there, free, complete, found, __salt__["slmdb_backup_repository.barred"](path)


def _pattern(archive: str, segment: str) -> str:
    """Where a segment is, on whichever timeline."""
    return f"{glob.escape(archive)}/*/????????{segment[8:16]}/????????{segment[8:]}-*"


def _listed(path: str, runs: dict[str, dict[str, Any]], lacks: str | None) -> dict[str, Any]:
    """What the directories of a repository say; a mount that hangs is as good as none."""
    stanza = __salt__["slmdb_pgbackrest.stanza"]()
    segment = lacks and _pattern(f"{path}/archive/{stanza}", lacks)
    told = (path, f"{path}/backup/{stanza}", segment)
    within, patience = __salt__["slmdb_disk.within"], __context__.get("slmdb_patience", 0)
    try:
        there, free, complete, found, barred = within(max(PATIENCE, patience), path, _look, *told)
    except OSError:
        return {"there": False}
    last = max(complete, key=lambda name: complete[name], default=None)
    return {
        "there": there,
        "backups": len(complete),
        "free_percent": free,
        "last": _last(last, complete[last], runs.get(last, {})) if last else None,
        "lacks": None if found else lacks,
        "closed": barred,
    }


def _wal(
    archiver: dict[str, Any], runs: list[dict[str, Any]], numbers: list[int]
) -> dict[str, Any]:
    """What is archived, what waits, and why; ``gap`` is a segment that no later backup covers."""
    failed, archived = archiver.get("failed_at"), archiver.get("archived_at")
    failing = failed is not None and (archived is None or failed > archived)
    text = _tail(f"{__salt__['slmdb_pgbackrest.logs']()}-archive-push.log")
    dropped, waiting = _DROPPED.findall(text), _waiting()
    covered, gap = _covered(runs), max(dropped, default=None)
    bare = [number for number in numbers if covered.get(number, "") <= (gap or "")]
    return {
        "mode": archiver.get("mode"),
        "archived": archiver.get("archived"),
        "archived_at": _moment(archived),
        "waiting_seconds": waiting,
        "failing": {"wal": archiver["failed"], "since": _moment(_ready(archiver["failed"]))}
        if failing
        else None,
        "reason": _why(text) if failing or waiting is not None else None,
        "gap": gap if bare else None,
    }


def _why(text: str) -> str | None:
    """
    What was said last since a segment was archived: by pgBackRest, or by the shell that could not
    run it, which PostgreSQL does not count as a failure.
    """
    since = "\n" + text.rpartition("completed successfully")[2]
    _, shell, rest = since.rpartition("\nsh: ")
    reasons = __salt__["slmdb_pgbackrest.errors"](rest)
    if reasons:
        return reasons[-1]
    line, _, _ = rest.partition("\n")
    return f"sh: {line}" if shell else None


def _status() -> str:
    found = __salt__["slmdb_instance.facts"]()
    return os.path.join(found["data_directory"], "pg_wal", "archive_status")


def _ready(segment: str) -> float | None:
    """Since when a segment waits."""
    try:
        return os.stat(os.path.join(_status(), f"{segment}.ready")).st_mtime
    except OSError:
        return None


def _waiting() -> int | None:
    """For how long the oldest segment waits to be archived; an idle server has none."""
    try:
        with os.scandir(_status()) as entries:
            moments = [one.stat().st_mtime for one in entries if one.name.endswith(".ready")]
    except OSError:
        return None
    return max(int(time.time() - min(moments)), 0) if moments else None


def verified(problems: list[str]) -> None:
    """
    Remember what a verify found.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_health.verified '[]'

    problems
        One line each; empty if the repositories are right.
    """
    told = {"at": _moment(time.time()), "right": not problems, "problems": problems[:20]}
    __salt__["slmdb_file.remember"](VERIFIED, told, mode="0640")


def judge(found: dict[str, Any], settings: dict[str, Any], now: float) -> dict[str, list[str]]:
    """
    Say what is wrong with the backups, and what is only worth knowing.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_health.judge '{"enabled": false}' '{}' 0

    found
        As ``facts`` gives it; empty if it could not be read.
    settings
        ``backup`` from pillar.
    now
        Seconds since the epoch.

    Returns ``problems`` and ``warnings``, lists of one line each. Raises nothing.
    """
    problems: list[str] = []
    warnings: list[str] = []
    if not found:
        return {"problems": problems, "warnings": warnings}
    began = _seconds(found.get("since"))
    if not found["enabled"]:
        warnings.append("there are no backups: slm_database:backup:enabled is false")
    elif began is None:
        for grave, line in _never(found, settings["limits"]["backup"], now):
            (problems if grave else warnings).append(line)
    else:
        _judge(found, settings["limits"], now, began, problems, warnings)
    return {"problems": problems, "warnings": warnings}


def _judge(
    found: dict[str, Any],
    limits: dict[str, str],
    now: float,
    began: float,
    problems: list[str],
    warnings: list[str],
) -> None:
    if found["program"]:
        problems.append(
            f"pgBackRest is not installed ({found['program']}), so nothing is backed up or "
            "archived; state.apply slm_database.backup brings it"
        )
    problems += found["keys"]
    problems += [f"{line}; state.apply slm_database.backup mends it" for line in found["stopped"]]
    if found["aside"]:
        problems.append(
            f"a restore in place was interrupted, the data is in {found['aside']}: repeat the "
            "restore, or move it back to where it was and start the server"
        )
    warnings += _failed(found)
    for part in (
        *(_backup(row, limits, now - began) for row in found["repositories"]),
        _archive(found["wal"], limits),
        _proof(found, limits, now, began),
    ):
        for grave, line in part:
            (problems if grave else warnings).append(line)
    if found["copy"]["problem"]:
        warnings.append(found["copy"]["problem"])
    if len(found["repositories"]) == 1:
        warnings.append(
            "backups are only local: a lost host loses them; slm_database:backup:second names a "
            "second repository"
        )


def _never(found: dict[str, Any], limit: str, now: float) -> Iterator[tuple[bool, str]]:
    """
    Backups that pillar wants and no run set up. One that was killed comes to that; so does one of
    a part of the formula, on purpose: both are well for as long as a backup may be old.
    """
    without = _seconds(found["without"])
    if without is None:
        yield False, "backups are not set up yet; state.apply slm_database.backup does it"
        return
    age = now - without
    late = age > _limit(limit)
    since = f" for {_words(age)}, limit {limit}" if late else " yet"
    yield (
        late,
        f"backups are not set up{since}: no run of the whole formula was completed here; "
        "state.apply slm_database does it",
    )


def _seconds(moment: str | None) -> float | None:
    if not moment:
        return None
    text = moment.replace("Z", "+00:00")
    return datetime.fromisoformat(text).timestamp()


def _limit(text: str) -> int:
    return int(text[:-1]) * SECONDS[text[-1]]


def _words(seconds: float) -> str:
    """A length of time, as people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _backup(row: dict[str, Any], limits: dict[str, str], age: float) -> Iterator[tuple[bool, str]]:
    """One repository: whether it is there, and how old its last backup is."""
    name = f"repository {row['repository']} ({row['where']})"
    limit, last = limits["backup"], row["last"]
    if row["there"] is False:
        new = "not set up yet; state.apply slm_database.backup does it"
        lost = "not there; bring it back (is it mounted?)"
        yield True, f"{name} is {lost if row['held'] else new}"
    elif last is None:
        late = age > _limit(limit)
        since = f" for {_words(age)}, limit {limit}" if late else ""
        yield late, f"{name}: no backup yet{since}; slmdb_backup.create makes one"
    elif last["age_seconds"] > _limit(limit):
        old = _words(last["age_seconds"])
        yield True, f"{name}: the last backup, {last['label']}, is {old} old, limit {limit}"
    asked = row.get("asked_seconds")
    if asked is not None and asked > _limit(limit):
        yield False, f"{name} was asked {_words(asked)} ago; slmdb_backup.info asks it"
    for path in row["closed"] or ():
        yield (
            True,
            f"{name}: the server cannot use {path}; state.apply slm_database.backup mends it",
        )
    if row["lacks"]:
        yield (
            True,
            f"{name} lacks archived WAL up to {row['lacks']}, from when it was not in use; nothing "
            "after it can be restored from there until slmdb_backup.create",
        )
    if last and last["damaged"]:
        yield True, f"{name}: backup {last['label']} holds pages whose checksum is wrong"
    free = row.get("free_percent")
    if free is not None and free < DISK_WARNING:
        line = f"{name}: its disk has {free} % free; make room, or lower backup:retention"
        yield free < DISK_PROBLEM, line
    if row["failed"]:
        failed = row["failed"]
        yield False, f"{name}: the backup of {failed['at']} failed: {failed['reason']}"


def _failed(found: dict[str, Any]) -> Iterator[str]:
    """The jobs that ended badly, but for what a backup's or the drill's own line says."""
    last = found["drill"]["last"]
    told = {"drill"} if last and not last["proven"] else set()
    if any(row["failed"] for row in found["repositories"]):
        told |= {"full", "differential"}
    for job, how in found["ended"].items():
        if job not in told:
            unit = f"{JOB}{job}"
            yield (
                f"{unit} failed ({how}): journalctl -u {unit} says why, systemctl reset-failed "
                f"{unit} forgets it"
            )


def _archive(wal: dict[str, Any], limits: dict[str, str]) -> Iterator[tuple[bool, str]]:
    if wal["mode"] == "off":
        yield False, "the server does not archive its WAL yet: archive_mode waits for a restart"
    waits, limit = wal["waiting_seconds"], limits["wal"]
    late = waits is not None and waits > _limit(limit)
    why = f": {wal['reason']}" if wal["reason"] else ""
    if wal["failing"]:
        failing = wal["failing"]
        since = f" since {failing['since']}" if failing["since"] else ""
        yield late, f"WAL segment {failing['wal']} cannot be archived{since}{why}"
    elif late:
        yield True, f"WAL waits for {_words(waits)} to be archived, limit {limit}{why}"
    if wal["gap"]:
        yield (
            True,
            f"the archived WAL has a gap at {wal['gap']}: slm_database:backup:queue_limit was "
            "reached; nothing after it can be restored until slmdb_backup.create full",
        )


def _proof(
    found: dict[str, Any], limits: dict[str, str], now: float, began: float
) -> Iterator[tuple[bool, str]]:
    """What verify and the drill said."""
    verified, last = found["verified"], found["drill"]["last"]
    if verified and not verified["right"]:
        yield True, f"verify of {verified['at']} found: {'; '.join(verified['problems'][:3])}"
    if last and not last["proven"]:
        why = "; ".join(last["problems"][:3]) or "it did not end"
        yield True, f"the restore drill of {last['at']} failed: {why}"
    proven, limit = found["drill"]["proven"], limits["proven_restore"]
    age = now - ((proven and _seconds(proven["at"])) or began)
    if proven and age < -AHEAD:
        yield (
            False,
            f"the last proven restore is of {proven['at']}, which is still to come: the clock was "
            "set back, and its age means nothing; slmdb_backup.drill makes one",
        )
    elif age > _limit(limit):
        what = "the last proven restore is" if proven else "no restore was proven for"
        old = " old" if proven else ""
        yield True, f"{what} {_words(age)}{old}, limit {limit}; slmdb_backup.drill makes one"
