"""
Whether a repository knows this instance; pgBackRest is asked only when the answer may be another.

A yes is kept with what the kernel says of every file that it came from: the repository's own, those
of the configuration and pgBackRest itself. None of them can change unseen. While the server's last
WAL was refused, or the server does not answer, nothing that is kept counts.

A repository elsewhere has no files here. It is asked again after each backup, failed or not, for
that is when one notices what the archiving did not; a repository host after an hour as well, for
``slmdb.health`` lives on what it said last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_pgbackrest_known"

BOUND = 3600
PATIENCE = 60
CONFIGURATION = ("/etc/pgbackrest/autobot-slm.conf", "/etc/pgbackrest/autobot-slm")
PROGRAM = "/usr/bin/pgbackrest"
QUERY = """
SELECT system_identifier::text AS id,
       coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) AS refused
FROM pg_control_system(), pg_stat_archiver
"""


def __virtual__() -> str:
    return __virtualname__


def _place(number: int) -> str:
    return os.path.join(__opts__["cachedir"], "slmdb", f"repository-{number}.json")


def _seen(path: str, times: bool = True) -> list[Any]:
    """What changes with a file or directory whatever is done to it; without times: in its place."""
    try:
        seen = os.stat(path)
    except OSError:
        return [path, None]
    kept = [path, seen.st_dev, seen.st_ino, seen.st_mode, seen.st_uid, seen.st_gid]
    return [*kept, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns] if times else kept


def _above(path: str) -> list[str]:
    """The directories that a path leads through."""
    found = []
    while path != "/":
        path = os.path.dirname(path)
        found.append(path)
    return found


def _repository(row: dict[str, Any]) -> list[list[Any]]:
    """The repository's files, and every directory on the way to them."""
    if not row["local"]:
        return [_seen(f"{__salt__['slmdb_pgbackrest.logs']()}-backup.log")]
    path, found = row["path"].rstrip("/"), []
    for info in __salt__["slmdb_backup_repository.info_files"](path):
        found += [_seen(info), _seen(f"{info}.copy")]
        found += [_seen(one, len(one) >= len(path)) for one in _above(info)]
    return found


def _key(row: dict[str, Any], system: str) -> str:
    """A digest of everything that decides whether the repository knows this instance."""
    main, included = CONFIGURATION
    paths = [PROGRAM, main, included]
    with contextlib.suppress(OSError):
        paths += [os.path.join(included, name) for name in sorted(os.listdir(included))]
    told = [row, system, [_seen(path) for path in paths], _repository(row)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _system() -> str | None:
    """The instance's identifier; none while the server does not answer, or its WAL is refused."""
    try:
        (row,) = __salt__["slmdb_server.query"](QUERY)
    except CommandExecutionError:
        return None
    return None if row["refused"] else row["id"]


def _kept(row: dict[str, Any], key: str) -> bool:
    try:
        with open(_place(row["repository"]), encoding="utf-8") as stream:
            kept = json.load(stream)
        fresh = row["type"] != "host" or 0 <= time.time() - kept["at"] < BOUND
        return kept["key"] == key and fresh
    except (OSError, ValueError, KeyError, TypeError):
        return False


def known(number: int) -> bool:
    """
    Tell whether a repository knows this instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest_known.known 1

    number
        The repository's, as pgBackRest counts them.

    Returns a boolean. Raises ``CommandExecutionError`` if the first repository cannot be read, or
    one holds the backups of another instance.
    """
    row = __salt__["slmdb_backup_repository.described"]()[number - 1]
    system = _system()
    key = _key(row, system) if system else None  # before the question: a change in between shows
    if key and _kept(row, key):
        return True
    good = _asked(number)
    if good and key:
        text = json.dumps({"key": key, "at": time.time()})
        __salt__["slmdb_file.keep"](_place(number), text)
    return good


def _asked(number: int) -> bool:
    try:
        found = __salt__["slmdb_pgbackrest.info"](PATIENCE, number)
    except CommandExecutionError:
        if number == 1:
            raise
        return False  # to make it there fails with the reason, when the first was seen to
    __salt__["slmdb_backup_repository.refuse_another"](number, found["db"])
    codes = [one["status"]["code"] for one in found["repo"]]
    return bool(codes) and all(code in (0, 2) for code in codes)
