"""
Logical dumps: every database of ours in pg_dump's own format, and the roles without passwords.

They are the portable copy, which another major or another machine reads. Their directory belongs
to root, so that the server's user, who reads them, cannot put links in our way.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from typing import Any
from urllib.parse import quote

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_dump"

NAME = re.compile(r"\d{8}T\d{6}Z")
LOCK = "/var/lib/autobot-slm-database/dump.lock"
UNFINISHED = ".unfinished-"
GLOBALS = "globals.sql"
LOW_PRIORITY = ["nice", "-n", "15", "ionice", "-c", "3"]
# A dump that waits for a lock holds back vacuum, and makes others wait behind it.
LOCK_TIMEOUT = "600s"
MARGIN = 1.2


def __virtual__() -> str:
    return __virtualname__


def _path() -> str:
    return __salt__["slmdb_pillar.get"]("backup", "dump", "path")


def list_() -> list[dict[str, Any]]:
    """
    List the dumps, oldest first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_dump.list

    Returns for each ``name``, ``path``, ``made`` (UTC), ``files`` and ``bytes``. Raises
    ``CommandExecutionError`` if the directory cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(_path()) if NAME.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as err:
        raise CommandExecutionError(f"{_path()}: cannot be read: {err.strerror}") from err
    return [_row(name) for name in names]


def holds(path: str) -> bool:
    """
    Tell whether a directory is a dump or holds some, wherever pillar has them now.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_dump.holds /var/lib/autobot-slm-database/dumps

    path
        The directory; of anything else the answer is no.

    Returns a boolean. Raises nothing.
    """
    places = (os.path.basename(where) for where, _, _ in os.walk(path))
    return any(NAME.fullmatch(name) for name in places)


def _row(name: str) -> dict[str, Any]:
    path = os.path.join(_path(), name)
    moment = time.strptime(name, "%Y%m%dT%H%M%SZ")
    with os.scandir(path) as found:
        sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in found}
    return {
        "name": name,
        "path": path,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
        "files": sorted(sizes),
        "bytes": sum(sizes.values()),
    }


def create() -> dict[str, Any]:
    """
    Dump every database of the settings, and the roles without their passwords.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_dump.create

    Returns ``name``, ``path``, ``made`` (UTC), ``files``, ``bytes``, ``seconds`` and ``removed``
    (names of dumps that are older than every backup that is kept). Each dump was read back whole.
    Raises ``CommandExecutionError`` if another dump runs, the disk would not hold it, or a program
    fails; what was begun is gone then, and the older dumps are as they were.
    """
    begun = time.monotonic()
    databases = _databases()
    _make_directory()
    with __salt__["slmdb_file.alone"](LOCK, "dump"):
        _sweep()
        _refuse_without_room(databases)
        name = _free_name()
        unfinished = os.path.join(_path(), f"{UNFINISHED}{name}")
        try:
            _fill(unfinished, databases)
            os.rename(unfinished, os.path.join(_path(), name))
            _sync(_path())
        except OSError as err:
            raise CommandExecutionError(
                f"slm_database:backup:dump:path: {_path()}: {err.strerror}"
            ) from err
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        removed = _remove_old()
    return {**_row(name), "seconds": round(time.monotonic() - begun, 1), "removed": removed}


def _databases() -> list[str]:
    """The databases of the settings; one that is missing is an error, not a smaller dump."""
    wanted = list(__salt__["slmdb_database.wanted"]())
    present = __salt__["slmdb_database.read"](wanted)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise CommandExecutionError(f"database {missing[0]} does not exist; apply the formula")
    return wanted


def _make_directory() -> None:
    user = __salt__["slmdb_instance.facts"]()["user"]
    try:
        os.makedirs(_path(), mode=0o755, exist_ok=True)
        shutil.chown(_path(), "root", user)
        os.chmod(_path(), 0o750)
    except OSError as err:
        raise CommandExecutionError(
            f"slm_database:backup:dump:path: {_path()} cannot be made: {err.strerror}"
        ) from err


def _sweep() -> None:
    """Remove what an interrupted run left."""
    for name in os.listdir(_path()):
        if name.startswith(UNFINISHED):
            shutil.rmtree(os.path.join(_path(), name), ignore_errors=True)


def _refuse_without_room(databases: list[str]) -> None:
    """Compare the free space with the last dump, else with half of the data."""
    before = list_()
    if before:
        needed = int(before[-1]["bytes"] * MARGIN)
    else:
        rows = __salt__["slmdb_server.query"](
            "SELECT sum(pg_database_size(datname))::bigint AS bytes FROM pg_database "
            "WHERE datname = ANY(%s)",
            [databases],
        )
        # Compressed and without indexes it is smaller, but that is known only afterwards.
        needed = rows[0]["bytes"] // 2
    __salt__["slmdb_disk.refuse"](
        _path(),
        "the next dump",
        needed,
        advice="make room, or lower backup:retention",
        key="slm_database:backup:dump:path",
    )


def _free_name() -> str:
    while True:
        name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        if not os.path.exists(os.path.join(_path(), name)):
            return name
        time.sleep(0.2)


def _fill(directory: str, databases: list[str]) -> None:
    user = __salt__["slmdb_instance.facts"]()["user"]
    os.mkdir(directory, 0o700)
    shutil.chown(directory, user, user)
    os.chmod(directory, 0o750)
    target = os.path.join(directory, GLOBALS)
    _run("pg_dumpall", "--globals-only", "--no-role-passwords", f"--file={target}")
    for database in databases:
        target = os.path.join(directory, f"{quote(database, safe='')}.dump")
        options = ["--format=custom", f"--lock-wait-timeout={LOCK_TIMEOUT}", f"--file={target}"]
        # A name alone could be taken for connection parameters; quotes cannot be in it.
        _run("pg_dump", *options, f"--dbname=dbname='{database}'")
        # The table of contents is at the beginning: only the whole shows that nothing is missing.
        _run("pg_restore", "--file=/dev/null", target)
    for name in os.listdir(directory):
        _sync(os.path.join(directory, name))
    _sync(directory)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _run(program: str, *options: str) -> None:
    """Run a program of the server's major as the server's user, at low priority."""
    found = __salt__["slmdb_instance.facts"]()
    libpq = {
        "PGHOST": found["socket_directory"],
        "PGPORT": str(found["port"]),
        "PGUSER": found["user"],
        "PGPASSFILE": "/nonexistent",
        "PGAPPNAME": "slmdb",
    }
    how = {"as_server": True, "before": LOW_PRIORITY, "umask": 0o027, "environment": libpq}
    __salt__["slmdb_program.run"](os.path.join(found["bin_directory"], program), *options, **how)


def _remove_old() -> list[str]:
    """Remove the dumps that are older than every full backup; the newest dump stays."""
    try:
        rows = __salt__["slmdb_backup.list"]()
    except CommandExecutionError:
        return []  # what is not known to be old is kept
    full = [row["started"] for row in rows if row["type"] == "full"]
    old = [row for row in list_()[:-1] if full and row["made"] < min(full)]
    for row in old:
        shutil.rmtree(row["path"])
    return [row["name"] for row in old]


__func_alias__ = {"list_": "list"}
