"""
The throw-away instance of a drill: made from a backup, without a network, and removed.

Nothing of it is where PostgreSQL's or Debian's tools look for instances; all its files are below
one directory, its socket in a directory that only root and the server's user can enter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_scratch"

NAME = ".autobot-slm-drill"
SOCKETS = "/run/autobot-slm-drill"
PORT = 5432
PROGRAMS = ("postgres", "pgbackrest")
# Besides what no server on restored files may do.
OWN = {
    "port": str(PORT),
    "archive_mode": "off",
    "default_transaction_read_only": "off",
    "shared_buffers": "64MB",
    "cluster_name": "drill",
}


def __virtual__() -> str:
    return __virtualname__


def place() -> str:
    """
    Return the directory of the throw-away instance; beside the data unless pillar says otherwise.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_scratch.place

    Raises ``CommandExecutionError`` if what it would be in is no directory.
    """
    parent = __salt__["slmdb_pillar.get"]("backup", "drill", "directory")
    if not parent:
        parent = os.path.dirname(__salt__["slmdb_instance.facts"]()["data_directory"])
    if not os.path.isdir(parent):
        raise CommandExecutionError(
            f"slm_database:backup:drill:directory: {parent} is no directory; make it, or name "
            "another"
        )
    return os.path.join(parent, NAME)


def where() -> dict[str, Any]:
    """
    Return how libpq reaches the throw-away instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_scratch.where
    """
    return {"host": SOCKETS, "port": PORT}


def processes(directory: str) -> list[int]:
    """
    Return the processes that work in the throw-away instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_scratch.processes /var/lib/postgresql/15/.autobot-slm-drill

    directory
        Its directory.

    Returns process ids. Raises nothing.
    """
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _ours(name, directory)]


def _ours(pid: str, directory: str) -> bool:
    """
    A server whose working directory is there, or an engine that was told to work there.

    One of a container on this host may have the same path and mean another directory.
    """
    above = os.path.dirname(directory)
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8") as stream:
            if stream.read().strip() not in PROGRAMS:
                return False
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            told = f"={directory}/data".encode() in stream.read()
        there = told or os.readlink(f"/proc/{pid}/cwd").startswith(f"{directory}/")
        return there and os.path.samefile(f"/proc/{pid}/root{above}", above)
    except OSError:
        return False


def end(directory: str, patience: float = 10) -> None:
    """
    End every process of the throw-away instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_scratch.end /var/lib/postgresql/15/.autobot-slm-drill

    directory
        Its directory.
    patience
        Seconds until the signal that cannot be refused.

    Raises ``CommandExecutionError`` if one stays.
    """
    deadline = time.monotonic() + patience
    kind = signal.SIGQUIT
    while left := processes(directory):
        if time.monotonic() > deadline + patience:
            raise CommandExecutionError(f"{directory}: process {left[0]} of a drill does not end")
        if time.monotonic() > deadline:
            kind = signal.SIGKILL
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, kind)
        time.sleep(0.1)


def discard(directory: str) -> None:
    """
    Throw an instance away that a drill made, this one or one that was killed.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_scratch.discard /var/lib/postgresql/15/.autobot-slm-drill

    directory
        Its directory; nothing happens if there is none.

    Raises ``CommandExecutionError`` if it is not a drill's, or cannot be removed.
    """
    if os.path.islink(directory) or os.path.basename(directory) != NAME:
        raise CommandExecutionError(f"{directory}: is not what a drill made; move it away")
    end(directory)
    for path in (directory, SOCKETS):
        if os.path.isdir(path):
            try:
                shutil.rmtree(path)
            except OSError as err:
                words = f"{path}: cannot be removed: {err.strerror}"
                raise CommandExecutionError(words) from err


def make(directory: str, chosen: dict[str, Any]) -> None:
    """
    Restore a backup's files into the directory.

    For callers in Python.

    directory
        It does not exist yet.
    chosen
        ``label``, ``repository``, ``options`` and ``bytes``, as ``slmdb_restore_plan.make`` has
        them.

    Raises ``CommandExecutionError`` if pgBackRest or the disk refuses.
    """
    user = __salt__["slmdb_instance.facts"]()["user"]
    try:
        for path in (directory, SOCKETS, f"{directory}/lock"):
            os.mkdir(path, 0o700)
            shutil.chown(path, user, user)
    except OSError as err:
        raise CommandExecutionError(f"{directory}: cannot be made: {err.strerror}") from err
    # With a lock of its own it keeps nobody from restoring in earnest.
    options = [*chosen["options"], f"--lock-path={directory}/lock"]
    __salt__["slmdb_restore.files"](f"{directory}/data", {**chosen, "options": options}, False)


def isolation(repository: int) -> list[str]:
    """
    Return the words that start a program without any network.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_scratch.isolation 1

    repository
        Where the WAL comes from.

    Returns an empty list if the repository is not on this host, or root may not do it here.
    """
    second = __salt__["slmdb_pillar.get"]("backup").get("second") or {}
    if repository > 1 and second.get("type") != "path":
        return []
    words = ["unshare", "--net", "--"]
    tried = subprocess.run([*words, "true"], capture_output=True, check=False)
    return [] if tried.returncode else words


def start(directory: str, chosen: dict[str, Any], preload: str) -> subprocess.Popen:
    """
    Start the server of the throw-away instance; it dies with whoever started it.

    For callers in Python.

    directory
        The directory, with restored files in it.
    chosen
        What ``make`` was told.
    preload
        The source's ``shared_preload_libraries``: its tables may need them.

    Returns the process. Raises ``CommandExecutionError`` if it cannot be started.
    """
    settings = {
        **__salt__["slmdb_replay.isolated"](directory, SOCKETS),
        **_settings(directory, chosen, preload),
    }
    before = isolation(chosen["repository"])
    return __salt__["slmdb_replay.start"](f"{directory}/data", f"{directory}/log", settings, before)


def _settings(directory: str, chosen: dict[str, Any], preload: str) -> dict[str, str]:
    line, data = __salt__["slmdb_pgbackrest.line"], f"{directory}/data"
    fetch = ["--log-level-file=off", f"--pg1-path={data}", f"--repo={chosen['repository']}"]
    settings = {**OWN, **__salt__["slmdb_restore.limits"](data)}
    settings["shared_preload_libraries"] = preload
    settings["restore_command"] = " ".join([*line("archive-get", *fetch), "%f", '"%p"'])
    if int(__salt__["slmdb_instance.facts"]()["version"]) >= 17:
        settings["event_triggers"] = "off"
    return settings


def wait(directory: str, server: subprocess.Popen) -> None:
    """
    Wait until the throw-away server has replayed all WAL there is, and takes a write.

    For callers in Python.

    directory
        Its directory.
    server
        What ``start`` returned.

    Raises ``CommandExecutionError`` with the server's words if it ends.
    """
    alive = lambda: server.poll() is None  # noqa: E731
    __salt__["slmdb_restore.until_recovered"](f"{directory}/log", alive, **where())
    connection = __salt__["slmdb_server.connect"](**where())
    with contextlib.closing(connection):
        connection.autocommit = True
        __salt__["slmdb_server.ask"](connection, f'CREATE SCHEMA "{NAME}"')
