"""
Backups: made, listed, verified, and described, by pgBackRest.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup"

log = logging.getLogger(__name__)

TYPES = {"full": "full", "diff": "differential", "incr": "incremental"}
PATIENCE = 120
RESTORING = "/var/lib/autobot-slm-database/restore.lock"
OTHERS = 3600  # seconds for a backup that is being made, before a change
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


def seconds(moment: str) -> float:
    """
    Return a moment, as the rows of ``list`` have it, in seconds since the epoch.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.seconds 2026-11-23T20:15:00Z

    moment
        UTC, with a ``Z`` at its end.
    """
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def complete(row: dict[str, Any]) -> float:
    """
    Return from when on a backup can be restored, in seconds since the epoch.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.complete '{"stopped": "2026-11-23T20:15:00Z"}'

    row
        The backup, as ``list`` has it. pgBackRest leaves the parts of a second out: only the next
        second is surely after its end.
    """
    return seconds(row["stopped"]) + 1


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """One backup of pgBackRest's list, in our words."""
    size = found["info"]
    return {
        "label": found["label"],
        "type": TYPES.get(found["type"], found["type"]),
        "repository": found["database"]["repo-key"],
        "started": _moment(found["timestamp"]["start"]),
        "stopped": _moment(found["timestamp"]["stop"]),
        "seconds": found["timestamp"]["stop"] - found["timestamp"]["start"],
        "database_bytes": size["size"],
        "repository_bytes": size["repository"]["delta"],
        "needs": found.get("reference") or [],
        "wal": [found["archive"]["start"], found["archive"]["stop"]],
        "lsn": found["lsn"]["stop"],
        "damaged": bool(found.get("error")),
    }


def rows(repository: int, timeout: float | None = None) -> list[dict[str, Any]]:
    """
    List the backups of one repository, oldest first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.rows 1

    repository
        Its number.
    timeout
        Seconds for pgBackRest to answer; ``None``: as long as it takes.

    Returns what ``list`` returns. Raises ``SaltInvocationError`` if there is no such repository,
    ``CommandExecutionError`` if it cannot be read.
    """
    __salt__["slmdb_pgbackrest.refuse_unknown"](repository)
    found = __salt__["slmdb_pgbackrest.info"](timeout, repository)["backup"]
    return sorted((_row(one) for one in found), key=lambda row: (row["stopped"], row["label"]))


def list_() -> list[dict[str, Any]]:
    """
    List the backups of every repository, oldest first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.list

    Returns for each ``label``, ``type`` (full, differential, incremental), ``repository``,
    ``started`` and ``stopped`` (UTC), ``seconds``, ``database_bytes``, ``repository_bytes`` (what
    it added), ``needs`` (labels), ``wal`` (first and last segment), ``lsn`` (where it was complete)
    and ``damaged`` (pages whose checksum was wrong). A second repository that cannot be read is
    named in the log, and by ``info``. Raises ``CommandExecutionError`` if none can be read.
    """
    _enabled()
    found, failures = [], []
    for number in __salt__["slmdb_pgbackrest.repositories"]():
        try:
            found += rows(number)
        except CommandExecutionError as err:
            failures.append(f"repository {number}: {err}")
    if failures and not found:
        raise CommandExecutionError("; ".join(failures))
    for line in failures:
        log.warning("slmdb_backup.list: %s", line)
    return sorted(found, key=lambda row: (row["stopped"], row["label"]))


def info(timeout: float | None = None) -> dict[str, Any]:
    """
    Describe the repositories, and what can be restored from them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.info

    timeout
        Seconds for pgBackRest to answer; ``None``: as long as it takes.

    Returns of the first repository ``repository``, ``where``, ``encrypted``, ``status``
    (pgBackRest's words), ``running`` (a backup, now), ``progress`` (per cent; ``None`` if it is not
    told), ``free_bytes``, ``backups`` (how many), ``newest`` (as ``list`` has it; ``None``),
    ``earliest`` (UTC; the first moment that can be restored), ``first_wal`` and ``last_wal``; and
    ``others``, the same of the second, or its ``problem``. Raises ``SaltInvocationError`` for a
    timeout that is none, ``CommandExecutionError`` if the first cannot be read.
    """
    if timeout is not None:
        __salt__["slmdb_kinds.refuse"]("timeout", "wait", timeout)
    _enabled()
    first, *more = __salt__["slmdb_backup_repository.described"]()
    others = []
    for row in more:
        try:
            others.append(_about(row, timeout))
        except CommandExecutionError as err:
            problem = {"repository": row["repository"], "where": row["where"], "problem": str(err)}
            others.append(problem)
    return {**_about(first, timeout), "others": others}


def _about(repository: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    number = repository["repository"]
    found = __salt__["slmdb_pgbackrest.info"](timeout, number)
    backups = sorted((_row(one) for one in found["backup"]), key=lambda row: row["stopped"])
    lock = found["status"].get("lock", {}).get("backup", {})
    done, size = lock.get("size-cplt"), lock.get("size")
    archive = found["archive"][-1] if found["archive"] else {}
    free = __salt__["slmdb_disk.free"]
    return {
        "repository": number,
        "where": repository["where"],
        "encrypted": found.get("cipher", "none") != "none",
        "status": found["status"]["message"],
        "running": bool(lock.get("held")),
        "progress": round(100 * done / size, 1) if done is not None and size else None,
        "free_bytes": free(repository["path"]) if repository["local"] else None,
        "backups": len(backups),
        "newest": backups[-1] if backups else None,
        "earliest": _moment(complete(backups[0])) if backups else None,
        "first_wal": archive.get("min"),
        "last_wal": archive.get("max"),
    }


def parked() -> bool:
    """
    Tell whether there can be no backup yet, because ``archive_mode`` waits for a restart.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.parked

    Raises ``CommandExecutionError`` if the server does not answer.
    """
    return __salt__["slmdb_server.query"]("SHOW archive_mode")[0]["archive_mode"] == "off"


def refuse_parked() -> None:
    """
    Refuse what needs archived WAL while ``archive_mode`` waits for a restart.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.refuse_parked

    Raises ``CommandExecutionError`` then, or if the server does not answer.
    """
    if parked():
        raise CommandExecutionError(
            "the server does not archive its WAL: archive_mode waits for a restart, which "
            "slm_database:maintenance permits (a window, or approve: true)"
        )


def before_change() -> str | None:
    """
    Make a backup before a change that may go wrong, if there can be one.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.before_change

    One repository that has it is enough; another that failed is named in the log. A backup that is
    being made is waited for, up to an hour. Returns its label; ``None`` if ``backup:enabled`` is
    false or the server does not archive before its next restart. Raises what ``create`` raises.
    """
    if not __salt__["slmdb_pillar.get"]("backup", "enabled") or parked():
        return None
    create = __salt__["slmdb_backup_create.create"]
    return str(create("incremental", everywhere=False, wait=OTHERS)["label"])


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
    refuse_parked()
    if len(__salt__["slmdb_backup_repository.described"]()) == 1:
        __salt__["slmdb_backup_presence.refuse_hanging"]()
    transaction = query("SELECT pg_current_xact_id()::text AS id")[0]["id"]
    row = query(
        "SELECT pg_current_wal_insert_lsn()::text AS lsn, "
        "pg_walfile_name(pg_current_wal_insert_lsn()) AS wal"
    )[0]
    query("SELECT pg_switch_wal()")
    deadline = time.monotonic() + PATIENCE
    while not _archived(row["wal"]):
        if time.monotonic() > deadline:
            raise CommandExecutionError(
                f"WAL segment {row['wal']} was not archived within {PATIENCE} s; "
                f"{_archiver_words()}"
            )
        time.sleep(0.1)
    return {"transaction": transaction, **row}


def _archived(segment: str) -> bool:
    """In all repositories, or, if one of several is dead, in another."""
    if __salt__["slmdb_server.query"](ARCHIVED, [f"{segment}.done"])[0]["done"]:
        return True
    rows = __salt__["slmdb_backup_repository.described"]()
    return len(rows) > 1 and any(
        __salt__["slmdb_backup_repository.holds"](row, segment) for row in rows
    )


def _archiver_words() -> str:
    """pgBackRest's own reason, asked by a command that does the same work."""
    try:
        __salt__["slmdb_pgbackrest.run"]("check", "--no-archive-check")
    except CommandExecutionError as err:
        return str(err)
    return "see the server's log"


def create(type: str | None = None) -> dict[str, Any]:
    """
    Make a backup now, in every repository.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup.create full

    type
        ``full``, ``differential`` (since the last full) or ``incremental`` (since the last of
        any); ``None``: incremental. Without a full backup it is a full one.

    Returns the new backup as ``list`` has it, and ``others``: those of a second repository. Old
    ones beyond ``retention`` go then. Raises ``SaltInvocationError`` for another type;
    ``CommandExecutionError`` if the disk would not hold it, the server does not archive, or
    pgBackRest fails, which names the repository, and what was made in the other.
    """
    _enabled()
    return __salt__["slmdb_backup_create.create"](type or "incremental")


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
    answer = __salt__["slmdb_backup_create.verify"]()
    if not answer["right"]:
        __context__["retcode"] = 1
    return answer


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
    missing because archived WAL is, or is damaged; ``None``) and ``remove`` (the command that
    throws it away) or, in place, ``kept`` (the old data), ``kept_tablespaces`` (its tablespaces)
    and ``secret`` (what to do about a password that was changed since; ``None``). Raises
    ``SaltInvocationError`` for what cannot be reached, with the range that can, and
    ``CommandExecutionError`` if it fails, or another restore runs; what ran before runs then.
    """
    _enabled()
    target = {"time": time, "label": label, "restore_point": restore_point}
    with __salt__["slmdb_file.alone"](RESTORING, "restore"):
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
        Its number; ``None``: of those that have a backup the one whose last drill is the longest
        ago.

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


__func_alias__ = {"list_": "list"}
