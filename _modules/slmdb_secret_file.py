"""
The secret file as a file: read without following links, locked, written so that it is always whole.

Values leave this module only inside a ``Store``, which is of no use outside the process: nothing
here returns a secret to whoever calls from a command line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import stat
import time
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_secret_file"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATIENCE = 30


def __virtual__() -> str:
    return __virtualname__


class Store(str):
    """One environment file; to whoever prints or sends it, a word without a secret."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls, "<sealed>")

    def __init__(self, path: str):
        self.path = path
        self.directory, self.name = os.path.split(path)
        self.temporary = f".{self.name}.slmdb-new"
        self.data = b""
        self.exists = False
        self.found: os.stat_result | None = None
        self.leftover = False
        self.load()

    def load(self) -> None:
        """Read the file again."""
        self.data, self.exists, self.found, self.leftover = b"", False, None, False
        with _parent(self.directory) as parent:
            if parent is None:
                return
            self.leftover = _lstat(parent, self.temporary) is not None
            self.found = _checked(self.path, _lstat(parent, self.name))
            if self.found is None:
                return
            self.exists, self.data = True, _content(self.path, parent, self.name)

    def values(self) -> dict[str, str]:
        """Return what systemd hands to the backend."""
        return __salt__["slmdb_envfile.values"](self.data)

    def check(self, keys: list[str]) -> None:
        """Raise CommandExecutionError if the file cannot be understood as far as these keys go."""
        problem = __salt__["slmdb_envfile.problem"](self.data, keys)
        if problem:
            raise CommandExecutionError(
                f"{self.path}: {problem}: correct the file; nothing was changed"
            )

    def ownership(self) -> dict[str, str]:
        """Return the names of the owner and the group, and the mode; empty if there is no file."""
        if self.found is None:
            return {}
        return {
            "owner": _name(self.found.st_uid, pwd.getpwuid),
            "group": _name(self.found.st_gid, grp.getgrgid),
            "mode": f"{stat.S_IMODE(self.found.st_mode):04o}",
        }

    def save(self, changes: dict[str, str | None], owner: str, group: str, mode: str) -> None:
        """Set (or with None remove) keys and write the file with these owners and this mode."""
        data = __salt__["slmdb_envfile.edit"](self.data, changes)
        self.exchange(data, owner, group, mode)

    def exchange(self, data: bytes | None, owner: str, group: str, mode: str) -> None:
        """Put other bytes in the place of the file in one step; None removes it."""
        identity = (pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid)
        try:
            with _parent(self.directory) as parent:
                if parent is None:
                    raise CommandExecutionError(f"{self.directory} does not exist")
                _checked(self.path, _lstat(parent, self.name))
                _discard(parent, self.temporary)
                if data is None:
                    _discard(parent, self.name)
                else:
                    _fill(parent, self.temporary, data, identity, int(mode, 8))
                    os.rename(self.temporary, self.name, src_dir_fd=parent, dst_dir_fd=parent)
                os.fsync(parent)
        except OSError as err:
            raise CommandExecutionError(f"{self.path} cannot be written: {err.strerror}") from err
        self.load()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file against other runs; its directory is made if it is missing."""
        _make_directory(self.directory)
        with _parent(self.directory) as parent:
            if parent is None:
                raise CommandExecutionError(f"{self.directory} has gone away")
            _lock(parent, self.path)
            self.load()
            yield


def store(path: str) -> Store:
    """
    Open an environment file for the other modules of this noun.

    path
        Absolute path of the file; it need not exist.

    Returns a ``Store``. Raises SaltInvocationError for a path that is not absolute,
    CommandExecutionError if a link is on the way, others may write to the directory, or the file
    cannot be read.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_file.store /etc/autobot/slm-secrets.env
    """
    return Store(path)


def _name(number: int, find: object) -> str:
    try:
        return find(number)[0]  # type: ignore[operator]
    except KeyError:
        return str(number)


def _lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _checked(path: str, found: os.stat_result | None) -> os.stat_result | None:
    if found is None:
        return None
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a directory"))
    for is_kind, words in kinds:
        if is_kind(found.st_mode):
            raise CommandExecutionError(
                f"{path} is {words}: slm_database:secret:file must be a plain file"
            )
    if not stat.S_ISREG(found.st_mode):
        raise CommandExecutionError(
            f"{path} is not a plain file, which slm_database:secret:file must be"
        )
    if found.st_nlink > 1:
        raise CommandExecutionError(
            f"{path} has a second name (a hard link): remove the other name"
        )
    return found


def _content(path: str, parent: int, name: str) -> bytes:
    try:
        handle = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent
        )
        with os.fdopen(handle, "rb") as stream:
            return stream.read()
    except OSError as err:
        raise CommandExecutionError(f"{path} cannot be read: {err.strerror}") from err


@contextlib.contextmanager
def _parent(directory: str) -> Iterator[int | None]:
    """Open a directory part by part, so that no link is followed; None if it does not exist."""
    if not directory.startswith("/") or os.path.normpath(directory) != directory:
        raise CommandExecutionError(
            f"slm_database:secret:file: the path must be absolute and plain, not in {directory!r}"
        )
    handle = os.open("/", _DIRECTORY)
    reached = ""
    try:
        for part in directory.split("/")[1:]:
            reached += f"/{part}"
            if not part:
                continue
            inner = _open_directory(handle, part, reached)
            if inner is None:
                yield None
                return
            os.close(handle)
            handle = inner
            _private(handle, reached, last=reached == directory)
        yield handle
    finally:
        os.close(handle)


def _open_directory(handle: int, part: str, reached: str) -> int | None:
    try:
        return os.open(part, _DIRECTORY, dir_fd=handle)
    except FileNotFoundError:
        return None
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.ENOTDIR):
            found = _lstat(handle, part)
            kind = "a symbolic link" if found and stat.S_ISLNK(found.st_mode) else "no directory"
            raise CommandExecutionError(
                f"{reached} is {kind}: slm_database:secret:file must not pass it"
            ) from err
        raise CommandExecutionError(f"{reached} cannot be opened: {err.strerror}") from err


def _private(handle: int, path: str, last: bool) -> None:
    """Refuse a directory in which others could put another file in the place of ours."""
    found = os.fstat(handle)
    if found.st_uid not in (0, os.geteuid()):
        owner = _name(found.st_uid, pwd.getpwuid)
        raise CommandExecutionError(
            f"{path} belongs to {owner}, who could replace the secret file: chown root {path}"
        )
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != 0)
    if others and (last or not found.st_mode & stat.S_ISVTX):
        raise CommandExecutionError(f"{path} can be written by others than root: chmod go-w {path}")


def _make_directory(directory: str) -> None:
    missing = []
    while directory != "/" and not os.path.lexists(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for path in reversed(missing):
        with _parent(os.path.dirname(path)) as parent:
            if parent is not None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(os.path.basename(path), 0o755, dir_fd=parent)
                os.chmod(os.path.basename(path), 0o755, dir_fd=parent, follow_symlinks=True)
                os.fsync(parent)


def _lock(parent: int, path: str) -> None:
    """Lock the directory itself: nothing is left behind, and a killed run lets go of it."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as err:
            if time.monotonic() > deadline:
                raise CommandExecutionError(
                    f"{path} is held by another run since {_PATIENCE} s: wait for it and run again"
                ) from err
            time.sleep(0.1)


def _discard(parent: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _fill(parent: int, name: str, data: bytes, identity: tuple[int, int], mode: int) -> None:
    """Make the new file: closed to others until it has its owners, durable before its name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchown(handle, *identity)
            os.fchmod(handle, mode)
            stream.write(data)
            stream.flush()
            os.fsync(handle)
    except BaseException:
        _discard(parent, name)
        raise
