"""
Whether a repository knows this instance; pgBackRest is asked only when the answer may be another.

What it says of a repository in a directory of this host comes from files: the answer is kept with
what the kernel says of them and of everything else that decides, and none of that can change
unseen. A repository elsewhere is asked again after an hour, for nothing here shows what happens to
it; that its archiving fails shows at once, in ``slmdb.health``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_pgbackrest_known"

BOUND = 3600
STANZA = "autobot-slm"
PROGRAM = "/usr/bin/pgbackrest"
CONFIGURATION = ("/etc/pgbackrest/autobot-slm.conf", "/etc/pgbackrest/autobot-slm")
INFO = ("archive/{}/archive.info", "backup/{}/backup.info")


def __virtual__() -> str:
    return __virtualname__


def _place(number: int) -> str:
    return os.path.join(__opts__["cachedir"], "slmdb", f"repository-{number}.json")


def _file(path: str) -> list[Any]:
    """What changes with a file whatever is done to it."""
    try:
        seen = os.stat(path)
    except OSError:
        return [path, None]
    kept = [seen.st_dev, seen.st_ino, seen.st_mode, seen.st_uid, seen.st_gid]
    if not os.path.isdir(path):
        kept += [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]
    return [path, *kept]


def _files(row: dict[str, Any]) -> list[str]:
    main, included = CONFIGURATION
    paths = [PROGRAM, main, included]
    with contextlib.suppress(OSError):
        paths += [os.path.join(included, name) for name in sorted(os.listdir(included))]
    if row["local"]:
        for template in INFO:
            path = os.path.join(row["path"], template.format(STANZA))
            paths += [path, f"{path}.copy"]
            while len(path) > len(row["path"].rstrip("/")):
                path = os.path.dirname(path)
                paths.append(path)
    return paths


def _key(row: dict[str, Any], system: str) -> str:
    """A digest of everything that decides whether the repository knows this instance."""
    told = [row, system, [_file(path) for path in _files(row)]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _system() -> str | None:
    """The instance's identifier; none, and so nothing is kept, while the server is down."""
    if not __salt__["slmdb_server.available"]():
        return None
    query = "SELECT system_identifier::text AS id FROM pg_control_system()"
    return __salt__["slmdb_server.query"](query)[0]["id"]


def _kept(row: dict[str, Any], system: str) -> bool:
    try:
        with open(_place(row["repository"]), encoding="utf-8") as stream:
            kept = json.load(stream)
        age = time.time() - kept["at"]
        return kept["key"] == _key(row, system) and (row["local"] or 0 <= age < BOUND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _keep(row: dict[str, Any], key: str) -> None:
    path = _place(row["repository"])
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):  # an answer that cannot be kept is asked for again
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump({"key": key, "at": time.time()}, stream)
        os.replace(temporary, path)


def known(number: int, patience: float | None = None) -> bool:
    """
    Tell whether a repository knows this instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest_known.known 1

    number
        The repository's, as pgBackRest counts them.
    patience
        Seconds that pgBackRest may take; ``None``: as long as it takes.

    Returns a boolean. Raises ``CommandExecutionError`` if the first repository cannot be read, or
    one holds the backups of another instance.
    """
    row = __salt__["slmdb_backup_repository.described"]()[number - 1]
    system = _system()
    if system and _kept(row, system):
        return True
    key = _key(row, system) if system else None  # before the question: a change in between shows
    try:
        found = __salt__["slmdb_pgbackrest.info"](patience, number)
    except CommandExecutionError:
        if number == 1:
            raise
        return False  # to make it there fails with the reason, when the first was seen to
    __salt__["slmdb_backup_repository.refuse_another"](number, found["db"])
    codes = [one["status"]["code"] for one in found["repo"]]
    good = bool(codes) and all(code in (0, 2) for code in codes)
    if good and key:
        _keep(row, key)
    return good
