"""
Which repositories held our backups: one that holds nothing any more is not silently begun anew.

A mount that is missing leaves an empty directory, which looks like a first installation. What was
there is remembered on the host, so that the difference is seen; at a first installation the host's
table of mounts says at least which are missing. Remembered is also since when each gets the WAL,
and what it lacks from before.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_presence"

RECORD = "/var/lib/autobot-slm-database/repositories.json"
KEPT = ".kept"
MOUNTS = "/etc/fstab"
PATIENCE = 60
MOUNT_PATIENCE = 5


def __virtual__() -> str:
    return __virtualname__


def _remembered() -> dict[str, Any]:
    return __salt__["slmdb_file.remembered"](RECORD) or {}


def _own(row: dict[str, Any]) -> dict[str, Any]:
    """A repository in another place, or of another instance, is another one."""
    system = __salt__["slmdb_instance.system_identifier"]()
    return {"where": row["where"], "system": str(system)}


def _held(row: dict[str, Any]) -> bool:
    kept = _remembered().get(str(row["repository"]), {})
    return kept.items() >= _own(row).items()


def _served(row: dict[str, Any]) -> bool:
    """Whether it was in pillar ever since backups are on: only then it got all WAL."""
    kept = _remembered().get(str(row["repository"]), {})
    return _held(row) and kept.get("since") == __salt__["slmdb_pgbackrest.since"]()


def there(row: dict[str, Any]) -> bool:
    """
    Tell whether a repository knows our stanza, of whichever instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_presence.there '{…}'

    row
        The repository, as ``slmdb_backup_repository.described`` has it.

    One of this host is looked at, any other is asked; one that does not answer knows nothing.
    Raises nothing.
    """
    if row["local"]:
        paths = __salt__["slmdb_backup_repository.info_files"](row["path"])
        return any(os.path.exists(path + end) for path in paths for end in ("", ".copy"))
    try:
        return bool(__salt__["slmdb_pgbackrest.info"](PATIENCE, row["repository"])["db"])
    except CommandExecutionError:
        return False


def orphan() -> str | None:
    """
    Say that a repository of this host holds the backups of an instance that is not here.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_presence.orphan

    An empty instance in its place would be taken for it by the application. Returns one line with
    what to do; ``None`` if there is no such repository, or backups are off. Raises nothing.
    """
    if not __salt__["slmdb_pillar.get"]("backup", "enabled"):
        return None
    for row in __salt__["slmdb_backup_repository.described"]():
        if row["local"] and there(row):
            return (
                f"{_key(row)}: {row['path']} holds the backups of an instance that is not here; "
                "mount it if a mount is missing, or state.apply slm_database.recovery brings it "
                "back from there (docs/backup.md); for an empty one, move that repository away"
            )
    return None


def refuse_hanging(number: int | None = None) -> None:
    """
    Refuse a repository of this host whose mount does not answer: whoever touches it waits for ever.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_presence.refuse_hanging

    number
        The repository; ``None``: any.

    Raises ``CommandExecutionError`` with one line that says what to do.
    """
    for row in __salt__["slmdb_backup_repository.described"]():
        if not row["local"] or number not in (None, row["repository"]):
            continue
        try:
            __salt__["slmdb_disk.within"](MOUNT_PATIENCE, row["path"], os.path.exists, row["path"])
        except TimeoutError:
            raise CommandExecutionError(
                f"{_key(row)}: {row['path']} does not answer within {MOUNT_PATIENCE} s; see to "
                "what is mounted there"
            ) from None


def refuse_lost() -> None:
    """
    Refuse a repository of this host that hangs or is gone, or whose key is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_presence.refuse_lost

    Raises ``CommandExecutionError`` with one line that says what to do.
    """
    refuse_hanging()
    encrypted = __salt__["slmdb_backup_repository.encrypted"]()
    for row in __salt__["slmdb_backup_repository.described"]():
        if not row["local"]:
            continue
        _refuse_unmounted(row)
        if row["repository"] in encrypted:
            _refuse_lost_key(row)
        refuse_gone(row["repository"])


def _key(row: dict[str, Any]) -> str:
    """The pillar path of where a repository is."""
    name = "path" if row["repository"] == 1 else "second:path" if row["local"] else "second"
    return f"slm_database:backup:{name}"


def _refuse_unmounted(row: dict[str, Any]) -> None:
    """What would be written below a mount point without its mount is hidden by it later."""
    mounted = set(__salt__["slmdb_disk.mount_points"]())
    for point in __salt__["slmdb_disk.column"](MOUNTS, 1):
        below = point and f"{row['path']}/".startswith(f"{point}/")
        if below and not {point, os.path.realpath(point)} & mounted:
            raise CommandExecutionError(
                f"{_key(row)}: {row['path']} is not mounted, {MOUNTS} says that {point} is a mount "
                "point; mount it"
            )


def _refuse_lost_key(row: dict[str, Any]) -> None:
    """A repository that was made with a key that is gone cannot be given another."""
    key = __salt__["slmdb_pgbackrest.key"](row["repository"])
    stanza = __salt__["slmdb_pgbackrest.stanza"]()
    if any(os.path.exists(key + end) for end in ("", KEPT)):
        return
    if os.path.isdir(os.path.join(row["path"], "archive", stanza)):
        raise CommandExecutionError(
            f"slm_database:backup: {row['path']} holds a repository but its key {key} is missing; "
            "bring the copy of the key back, or move the repository away"
        )


def refuse_gone(number: int) -> None:
    """
    Refuse a repository without our stanza that held it before, unless pillar permits a new one.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_presence.refuse_gone 1

    number
        The repository. One that is not of this host was seen not to know our stanza; one that is
        is looked at, for pgBackRest may have been asked with a configuration that is not ours.

    Raises ``CommandExecutionError`` with one line that says what to do.
    """
    row = __salt__["slmdb_backup_repository.described"]()[number - 1]
    if __salt__["slmdb_pillar.get"]("backup", "allow_new") or not _held(row):
        return
    if row["local"] and there(row):
        return
    raise CommandExecutionError(
        f"{_key(row)}: {row['where']} held the backups of this instance and holds "
        "none now; bring it back (is it mounted?), or, if it is lost for good, begin a new one by "
        "slm_database:backup:allow_new: true for one run"
    )


def differences() -> dict[str, Any]:
    """
    Compare what is remembered with the configured repositories.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_presence.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if the settings cannot be told.
    """
    rows, since = _rows(), __salt__["slmdb_pgbackrest.since"]()
    served = [one["where"] for one in _remembered().values() if since and one.get("since") == since]
    if all(_served(row) for row in rows) and len(served) == len(rows):
        return {}
    new = ", ".join(row["where"] for row in rows)
    return {RECORD: {"old": ", ".join(sorted(served)) or None, "new": new}}


def _rows() -> list[dict[str, Any]]:
    return __salt__["slmdb_backup_repository.described"]()


def remember() -> None:
    """
    Remember the repositories that know our stanza now, and what those that are back lack.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_presence.remember

    Raises ``CommandExecutionError`` if it cannot be written.
    """
    before, rows = _remembered(), _rows()
    since = __salt__["slmdb_pgbackrest.since"]()
    found = {number: {**kept, "since": None} for number, kept in before.items()}
    for row in rows:
        number = str(row["repository"])
        if _served(row):
            found[number] = before[number]
        elif there(row):
            with contextlib.suppress(CommandExecutionError):  # else the next run does it
                lacks = __salt__["slmdb_backup_gap.before"](row["repository"])
                found[number] = {**_own(row), "since": since, "lacks": lacks}
    if found != before:
        __salt__["slmdb_file.remember"](RECORD, found, mode="0640")
