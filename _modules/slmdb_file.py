"""
Files, written so that a kill at any moment leaves the old one or the new one, whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import hashlib
import json
import os
import pwd
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_file"


def __virtual__() -> str:
    return __virtualname__


def read(path: str) -> bytes | None:
    """
    Return a file's content.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.read /etc/postgresql/15/main/pg_hba.conf

    path
        Absolute path.

    Returns its bytes, ``None`` if there is no such file. Raises ``CommandExecutionError`` if it
    cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise CommandExecutionError(f"{path}: cannot be read: {err.strerror}") from err


def _uid(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as err:
        raise CommandExecutionError(f"user {user} does not exist on this host") from err


def _gid(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as err:
        raise CommandExecutionError(f"group {group} does not exist on this host") from err


def _sync_directory(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def owners(seen: os.stat_result) -> tuple[str, str]:
    """
    Name the user and the group to whom a file belongs.

    For callers in Python.

    seen
        What ``os.stat`` returned.

    Returns both names; the number of one that this host does not know. Raises nothing.
    """
    return _named(seen.st_uid, pwd.getpwuid), _named(seen.st_gid, grp.getgrgid)


def _named(identity: int, lookup: Callable) -> str:
    try:
        return lookup(identity)[0]
    except KeyError:
        return str(identity)


def differences(
    path: str,
    data: bytes | None,
    user: str = "root",
    group: str = "root",
    mode: str = "0644",
) -> dict:
    """
    Compare a file with what it should be, without showing its content.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.differences /etc/motd data=None

    path
        Absolute path.
    data
        The wanted bytes; ``None``: the file should not exist.
    user, group
        Names of the wanted owners.
    mode
        The wanted mode in octal.

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if the file cannot be read.
    """
    present = read(path)
    if data is None:
        return {} if present is None else {path: {"old": "present", "new": "absent"}}
    if present is None:
        return {path: {"old": None, "new": "present"}}
    changes: dict = {}
    if present != data:
        changes[path] = {"old": "another content", "new": "the wanted content"}
    found = os.stat(path)
    present_user, present_group = owners(found)
    facts = {
        "user": (present_user, user),
        "group": (present_group, group),
        "mode": (f"{stat.S_IMODE(found.st_mode):04o}", f"{int(mode, 8):04o}"),
    }
    for what, (old, new) in facts.items():
        if old != new:
            changes[f"{path}: {what}"] = {"old": old, "new": new}
    return changes


def write(
    path: str,
    data: bytes,
    user: str = "root",
    group: str = "root",
    mode: str = "0644",
) -> None:
    """
    Write a file atomically and durably; its directory is made if it is missing.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.write /etc/motd 'Welcome'

    path
        Absolute path; a link is replaced, not followed.
    data
        The bytes (text is encoded as UTF-8).
    user, group
        Names of the owners.
    mode
        The mode in octal; the file is never wider than that, even for an instant.

    Returns nothing. Raises ``CommandExecutionError`` if an owner is unknown or the disk refuses.
    """
    data = data.encode() if isinstance(data, str) else data
    uid, gid = _uid(user), _gid(group)
    directory = os.path.dirname(path)
    temporary = None
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".slmdb-", dir=directory)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            os.fchown(stream.fileno(), uid, gid)
            os.fchmod(stream.fileno(), int(mode, 8))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync_directory(directory)
    except OSError as err:
        raise CommandExecutionError(f"{path}: cannot be written: {err.strerror}") from err
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def remember(path: str, what: Any, mode: str = "0644") -> None:
    """
    Write down something for a later run.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.remember /var/lib/autobot-slm-database/x.json '{"a": 1}'

    path
        Absolute path.
    what
        What JSON can hold; of anything else the text.
    mode
        The mode in octal.

    Returns nothing. Raises ``CommandExecutionError`` if the disk refuses.
    """
    text = json.dumps(what, indent=1, sort_keys=True, default=str) + "\n"
    write(path, text.encode(), mode=mode)


def remembered(path: str, kind: type = dict) -> Any:
    """
    Return what ``remember`` wrote down.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.remembered /var/lib/autobot-slm-database/x.json

    path
        Absolute path.
    kind
        The type that it must have.

    Returns it; ``None`` if there is no such file, or something else in it. Raises
    ``CommandExecutionError`` if it cannot be read.
    """
    try:
        kept = json.loads(read(path) or b"null")
    except ValueError:
        return None
    return kept if isinstance(kept, kind) else None


def keep(path: str, text: str) -> None:
    """
    Write a file of a cache: the old one or the new one is there, whole, but neither need be.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.keep /var/cache/salt/minion/slmdb/synced 'a digest'

    path
        Absolute path; its directory is made, for root alone, if it is missing.
    text
        The content.

    Returns nothing, raises nothing: a cache that cannot be written costs time, nothing else.
    """
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)


@contextlib.contextmanager
def alone(path: str, what: str, patience: float = 0) -> Iterator[TextIO]:
    """
    Hold a lock file: one at a time, whoever calls; who is killed lets go of it.

    For callers in Python.

    path
        Absolute path of the file; it is made, and stays.
    what
        What is done once at a time, in words. The other one's process is named if it wrote that
        into the file.
    patience
        Seconds to wait for another one.

    Gives the open file, with what the last one wrote. Raises ``CommandExecutionError`` if another
    one holds it.
    """
    deadline = time.monotonic() + patience
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8") as lock:
        while not _taken(lock):
            if time.monotonic() > deadline:
                told = lock.read().strip()
                process = f", process {told}" if told.isdigit() else ""
                raise CommandExecutionError(f"another {what} runs{process}; wait until it is over")
            time.sleep(0.1)
        yield lock


def _taken(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def permits(path: str, user: str, mode: int) -> bool:
    """
    Tell whether a file's owner and mode let a user do something with it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.permits /var/lib/pgbackrest postgres 3

    path
        Absolute path.
    user
        The user's name.
    mode
        What for, as in one digit of a mode: 4 to read, 2 to write, 1 to enter, or their sum.

    Returns a boolean; what cannot be looked at permits nothing. Raises nothing.
    """
    try:
        account, seen = pwd.getpwnam(user), os.stat(path)
    except (KeyError, OSError):
        return False
    owner, group, others = (seen.st_mode >> bits & mode == mode for bits in (6, 3, 0))
    if seen.st_uid == account.pw_uid:
        return owner
    if group == others:
        return group  # and nobody, a directory service for instance, is asked for the user's groups
    return group if seen.st_gid in os.getgrouplist(user, account.pw_gid) else others


def stamp(path: str) -> tuple[int, ...] | None:
    """
    Return what changes with a file whatever is done to it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.stamp /etc/postgresql/15/main/postgresql.conf

    path
        Absolute path; of a link its target counts.

    Returns device, inode, size, and the times of modification and of change, which is the kernel's:
    nobody sets it back. ``None`` if there is no such file. Raises nothing.
    """
    try:
        seen = os.stat(path)
    except OSError:
        return None
    return (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def digest(paths: Iterable[str]) -> str:
    """
    Return a digest that changes with any of several files, and with their being there.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.digest '["/etc/hosts", "/etc/motd"]'

    paths
        Absolute paths.

    Their content is not read. Raises nothing.
    """
    stamps = [(path, stamp(path)) for path in paths]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def remove(path: str) -> None:
    """
    Remove a file durably, if it is there.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_file.remove /etc/postgresql-common/createcluster.d/autobot-slm.conf

    path
        Absolute path.

    Returns nothing. Raises ``CommandExecutionError`` if it cannot be removed.
    """
    try:
        os.unlink(path)
        _sync_directory(os.path.dirname(path))
    except FileNotFoundError:
        return
    except OSError as err:
        raise CommandExecutionError(f"{path}: cannot be removed: {err.strerror}") from err
