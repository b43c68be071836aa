"""
Backups: made, listed, verified, and described, by pgBackRest.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "slmdb_backup"

TYPES = {"full": "full", "differential": "diff", "incremental": "incr"}
PATIENCE = 120
# A backup is seldom larger than the last one of its kind, but it may be.
MARGIN = 1.2
ARCHIVED = "SELECT EXISTS (SELECT FROM pg_ls_archive_statusdir() WHERE name = %s) AS done"


def __virtual__() -> str:
    return __virtualname__


def _enabled() -> None:
    if not __salt__["slmdb_pillar.get"]("backup", "enabled"):
        raise SaltInvocationError("slm_database:backup:enabled: is false; set it, and apply")


def _moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """One backup of pgBackRest's list, in our words."""
    names = {short: name for name, short in TYPES.items()}
    size = found["info"]
    return {
        "label": found["label"],
        "type": names.get(found["type"], found["type"]),
        "repository": found["database"]["repo-key"],
        "started": _moment(found["timestamp"]["start"]),
        "stopped": _moment(found["timestamp"]["stop"]),
        "seconds": found["timestamp"]["stop"] - found["timestamp"]["start"],
        "database_bytes": size["size"],
        "repository_bytes": size["repository"]["delta"],
        "needs": found.get("reference") or [],
        "wal": [found["archive"]["start"], found["archive"]["stop"]],
        "damaged": bool(found.get("error")),
    }


def list_() -> list[dict[str, Any]]:
    """
    List the backups, oldest first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.list

    Returns for each ``label``, ``type`` (full, differential, incremental), ``repository``,
    ``started`` and ``stopped`` (UTC), ``seconds``, ``database_bytes``, ``repository_bytes`` (what
    it added), ``needs`` (labels), ``wal`` (first and last segment) and ``damaged`` (pages whose
    checksum was wrong). Raises ``CommandExecutionError`` if the repository cannot be read.
    """
    _enabled()
    rows = [_row(found) for found in __salt__["slmdb_pgbackrest.info"]()["backup"]]
    return sorted(rows, key=lambda row: (row["stopped"], row["label"]))


def info(timeout: float | None = None) -> dict[str, Any]:
    """
    Describe the repository, and what can be restored from it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.info

    timeout
        Seconds for pgBackRest to answer; ``None``: as long as it takes.

    Returns ``path``, ``encrypted``, ``status`` (pgBackRest's words), ``running`` (a backup, now),
    ``progress`` (per cent; ``None`` if it is not told), ``free_bytes``, ``backups`` (how many),
    ``newest`` (as ``list`` has it; ``None``), ``earliest`` (UTC; the first moment that can be
    restored), ``first_wal`` and ``last_wal``. Raises ``CommandExecutionError`` if the repository
    cannot be read.
    """
    _enabled()
    found = __salt__["slmdb_pgbackrest.info"](timeout)
    rows = sorted((_row(one) for one in found["backup"]), key=lambda row: row["stopped"])
    lock = found["status"].get("lock", {}).get("backup", {})
    done, size = lock.get("size-cplt"), lock.get("size")
    archive = found["archive"][-1] if found["archive"] else {}
    return {
        "path": __salt__["slmdb_pillar.get"]("backup", "path"),
        "encrypted": found.get("cipher", "none") != "none",
        "status": found["status"]["message"],
        "running": bool(lock.get("held")),
        "progress": round(100 * done / size, 1) if done is not None and size else None,
        "free_bytes": _free(),
        "backups": len(rows),
        "newest": rows[-1] if rows else None,
        "earliest": rows[0]["stopped"] if rows else None,
        "first_wal": archive.get("min"),
        "last_wal": archive.get("max"),
    }


def _free() -> int | None:
    try:
        seen = os.statvfs(__salt__["slmdb_pillar.get"]("backup", "path"))
    except OSError:
        return None
    return seen.f_bavail * seen.f_frsize


def settle() -> dict[str, str]:
    """
    Commit a transaction, and wait until the WAL that holds it is in the repository.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.settle

    Returns ``transaction`` (its id), ``wal`` (the segment that holds its commit) and ``lsn``.
    Raises ``CommandExecutionError`` if the server does not archive, or not within 120 s.
    """
    query = __salt__["slmdb_server.query"]
    if query("SHOW archive_mode")[0]["archive_mode"] == "off":
        raise CommandExecutionError(
            "the server does not archive its WAL: archive_mode waits for a restart, which "
            "slm_database:maintenance permits (a window, or approve: true)"
        )
    transaction = query("SELECT pg_current_xact_id()::text AS id")[0]["id"]
    row = query(
        "SELECT pg_current_wal_insert_lsn()::text AS lsn, "
        "pg_walfile_name(pg_current_wal_insert_lsn()) AS wal"
    )[0]
    query("SELECT pg_switch_wal()")
    deadline = time.monotonic() + PATIENCE
    while not query(ARCHIVED, [f"{row['wal']}.done"])[0]["done"]:
        if time.monotonic() > deadline:
            raise CommandExecutionError(
                f"WAL segment {row['wal']} was not archived within {PATIENCE} s; "
                f"{_archiver_words()}"
            )
        time.sleep(0.1)
    return {"transaction": transaction, **row}


def _archiver_words() -> str:
    """pgBackRest's own reason, asked by a command that does the same work."""
    try:
        __salt__["slmdb_pgbackrest.run"]("check", "--no-archive-check")
    except CommandExecutionError as err:
        return str(err)
    return "see the server's log"


def create(type: str | None = None) -> dict[str, Any]:
    """
    Make a backup now.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.create full

    type
        ``full``, ``differential`` (since the last full) or ``incremental`` (since the last of
        any); ``None``: incremental. Without a full backup it is a full one.

    Returns the new backup as ``list`` has it. Old ones beyond ``backup:retention`` go then.
    Raises ``SaltInvocationError`` for another type, ``CommandExecutionError`` if the disk would
    not hold it, the server does not archive, or pgBackRest fails.
    """
    wanted = type or "incremental"
    if wanted not in TYPES:
        raise SaltInvocationError(
            f"type: {wanted!r} is not a type of backup; allowed: {', '.join(TYPES)}"
        )
    before = list_()
    full = [row for row in before if row["type"] == "full"]
    _refuse_without_room(wanted if full else "full", before)
    settle()
    __salt__["slmdb_pgbackrest.run"]("backup", f"--type={TYPES[wanted]}")
    labels = {row["label"] for row in before}
    made = [row for row in list_() if row["label"] not in labels]
    if not made:
        raise CommandExecutionError("pgbackrest backup: it said yes but no new backup is listed")
    return made[-1]


def _refuse_without_room(wanted: str, before: list[dict[str, Any]]) -> None:
    """Compare the free space with the last backup of the kind, else with all of the data."""
    free = _free()
    same = [row["repository_bytes"] for row in before if row["type"] == wanted]
    if same:
        needed = int(same[-1] * MARGIN)
    else:
        rows = __salt__["slmdb_server.query"](
            "SELECT sum(pg_database_size(oid))::bigint AS bytes FROM pg_database"
        )
        # Compressed it is smaller, but that is known only afterwards.
        needed = rows[0]["bytes"] // 2 if wanted == "full" else 0
    if free is not None and free < needed:
        path = __salt__["slmdb_pillar.get"]("backup", "path")
        raise CommandExecutionError(
            f"slm_database:backup:path: {path} has {free // 1024**2} MiB free, the next {wanted} "
            f"backup needs about {needed // 1024**2} MiB; make room, or lower backup:retention"
        )


def verify() -> dict[str, Any]:
    """
    Read every file of the repository and compare it with its checksum.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.verify

    Returns ``right`` (a boolean), ``problems`` (one line each) and ``report`` (pgBackRest's own
    text). The return code is 1 if anything is wrong. Raises ``CommandExecutionError`` if the
    repository cannot be read.
    """
    _enabled()
    try:
        text = __salt__["slmdb_pgbackrest.run"]("verify", "--output=text", "--verbose")
        problems = _wrong(text)
    except CommandExecutionError as err:
        text, problems = "", [str(err)]
    if problems:
        __context__["retcode"] = 1
    return {"right": not problems, "problems": problems, "report": text.strip()}


def restore(
    time: str | None = None,
    label: str | None = None,
    restore_point: str | None = None,
    instance: str = "restored",
    port: int | None = None,
    in_place: str | None = None,
) -> dict[str, Any]:
    """
    Restore into a new instance beside the present one; in its place only if that is typed out.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.restore
        salt-call slmdb_backup.restore time=2026-11-23T20:15:00+00:00
        salt-call slmdb_backup.restore in_place=15/main

    time
        The last moment that shall be there; without an offset it is UTC.
    label
        The backup to begin with; alone: the moment at which it was complete.
    restore_point
        A name given by ``pg_create_restore_point``.
    instance, port
        Name and TCP port of the new instance; ``None``: the next free port.
    in_place
        The present instance's name, such as ``15/main``: it gets the restored data, and its old
        data is kept aside.

    Without ``time``, ``label`` and ``restore_point`` the end of the archived WAL is restored.
    Returns ``instance``, ``port``, ``target``, ``label``, ``seconds`` and, beside, ``gap`` (what is
    missing because archived WAL is; ``None``) and ``remove`` (the command that throws it away) or,
    in place, ``kept`` (the old data). Raises
    ``SaltInvocationError`` for what cannot be reached, with the range that can, and
    ``CommandExecutionError`` if it fails; what ran before runs then.
    """
    _enabled()
    target = {"time": time, "label": label, "restore_point": restore_point}
    if in_place is not None:
        return __salt__["slmdb_restore.in_place"](in_place, **target)
    return __salt__["slmdb_restore.beside"](instance, port, **target)


def dump() -> dict[str, Any]:
    """
    Dump the databases by pg_dump, and the roles without passwords, for another machine or major.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.dump

    Returns ``name``, ``path``, ``made``, ``files``, ``bytes``, ``seconds`` and ``removed`` (dumps
    older than every backup that is kept). Raises ``CommandExecutionError`` if the disk would not
    hold it, another dump runs, or a program fails; nothing is left of it then.
    """
    _enabled()
    return __salt__["slmdb_backup_dump.create"]()


def dumps() -> list[dict[str, Any]]:
    """
    List the dumps, oldest first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.dumps

    Returns for each ``name``, ``path``, ``made`` (UTC), ``files`` and ``bytes``. Raises
    ``CommandExecutionError`` if their directory cannot be read.
    """
    return __salt__["slmdb_backup_dump.list"]()


def copy(path: str) -> dict[str, Any]:
    """
    Make one encrypted file of all that a new host needs besides the repository.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.copy path=/root/slm-copy.age

    path
        The file to write; take it off the host then.

    Returns ``path``, ``bytes``, ``made``, ``recipients`` (how many can open it) and ``holds``
    (names of files: secrets, the repository's key, settings, the instance's configuration).
    Raises ``SaltInvocationError`` if ``backup:copy:recipients`` is empty or the path cannot be
    used, ``CommandExecutionError`` if something is missing or age fails.
    """
    _enabled()
    return __salt__["slmdb_backup_copy.make"](path)


def drill(repository: int | None = None) -> dict[str, Any]:
    """
    Prove a backup: restore the latest and its WAL into a throw-away instance, and look.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.drill

    repository
        Its number; ``None``: the one whose last drill is the longest ago.

    Returns ``proven``, ``problems`` (lines), ``label``, ``repository``, ``at`` (UTC),
    ``rpo_seconds``, ``rto_seconds`` and more, and remembers it. The return code is 1 if it is not
    proven. Raises ``SaltInvocationError`` for another number, ``CommandExecutionError`` while
    another drill runs.
    """
    _enabled()
    answer = __salt__["slmdb_backup_drill.run"](repository)
    if not answer["proven"]:
        __context__["retcode"] = 1
    return answer


def _wrong(text: str) -> list[str]:
    """The lines of a report that count something missing or invalid."""
    found, part = [], ""
    for line in text.splitlines():
        heading = re.match(r"\s*(archiveId|backup): ([^,]+)", line)
        if heading:
            part = f"{heading[1]} {heading[2]}"
        trouble = re.findall(r"((?:missing|checksum invalid|size invalid|other): [1-9]\d*)", line)
        if trouble or re.search(r"status: (?:invalid|in-progress)|ERROR", line):
            found.append(f"{part}: {line.strip()}".lstrip(": "))
    return found


__func_alias__ = {"list_": "list"}
