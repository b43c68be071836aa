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
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__
from salt.utils.files import normalize_mode

__virtualname__ = "slmdb_secret_file"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATIENCE = 30
_ACL = "system.posix_acl_access"
_ACL_HEAD, _ACL_ENTRY = 4, struct.Struct("<HHI")
# The entries of an ACL that are the nine bits of the mode: its owner, its mask, all others.
_ACL_SHIFTS = {0x01: 6, 0x10: 3, 0x20: 0}
# What signs or empowers the bytes of one file is wrong for others, and the kernel's to set.
_NOT_COPIED = ("security.capability", "security.evm", "security.ima")
_ADVICE = {
    errno.EPERM: ": see lsattr for it and its directory; chattr -i (or -a) lets it be written",
    errno.EBUSY: ": it is a mount point (a bind mount); mount its directory in its place",
}


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
        try:
            with _parent(self.directory) as parent:
                if parent is not None:
                    self._load(parent)
        except OSError as err:
            raise CommandExecutionError(f"{self.path} cannot be read: {err.strerror}") from err

    def _load(self, parent: int) -> None:
        self.leftover = _lstat(parent, self.temporary) is not None
        self.found = _checked(self.path, _lstat(parent, self.name))
        if self.found is not None:
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
        owner, group = __salt__["slmdb_file.owners"](self.found)
        return {
            "owner": owner,
            "group": group,
            "mode": f"{stat.S_IMODE(self.found.st_mode):04o}",
        }

    def save(self, changes: dict[str, str | None], owner: str, group: str, mode: str) -> None:
        """Set (or with None remove) keys and write the file with these owners and this mode."""
        data = __salt__["slmdb_envfile.edit"](self.data, changes)
        self.exchange(data, owner, group, mode)

    def exchange(self, data: bytes | None, owner: str, group: str, mode: str) -> None:
        """Put other bytes in the place of the file in one step; None removes it."""
        identity = (_number(owner, pwd.getpwnam, "user"), _number(group, grp.getgrnam, "group"))
        bits = int(octal(mode), 8)
        try:
            with _parent(self.directory) as parent:
                if parent is None:
                    raise CommandExecutionError(f"{self.directory} does not exist")
                self._exchange(parent, data, identity, bits)
        except OSError as err:
            why = f"{err.strerror}{_ADVICE.get(err.errno or 0, '')}"
            raise CommandExecutionError(f"{self.path} cannot be written: {why}") from err
        self.load()

    def _exchange(
        self, parent: int, data: bytes | None, identity: tuple[int, int], mode: int
    ) -> None:
        _checked(self.path, _lstat(parent, self.name))
        _discard(parent, self.temporary)
        try:
            if data is None:
                _discard(parent, self.name)
            else:
                kept = _attributes(parent, self.name)
                _fill(parent, self.temporary, data, identity, mode, kept)
                os.rename(self.temporary, self.name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        except BaseException:
            with contextlib.suppress(OSError):
                _discard(parent, self.temporary)
            raise

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


def octal(mode: str | int) -> str:
    """
    Write a mode as four octal digits.

    mode
        Octal digits, as text or as the number that YAML makes of them (``640``).

    Returns for instance ``0640``. Raises SaltInvocationError for what is no mode, and for a number
    that would let everybody in: it may be the decimal one (``416``) of the mode that was meant.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_file.octal 640
    """
    text = normalize_mode(mode) if mode and isinstance(mode, str | int) else ""
    number = isinstance(mode, int)
    if not re.fullmatch("0[0-7]{3}", text) or (number and int(text, 8) & stat.S_IRWXO):
        raise SaltInvocationError(f'mode: {mode!r} must be octal digits in quotes, such as "0640"')
    return text


def _number(name: str, find: Callable, what: str) -> int:
    """The number of a user or a group; one whose account is gone is its number."""
    try:
        return find(name)[2]
    except KeyError as err:
        if name.isdecimal():
            return int(name)
        raise CommandExecutionError(f"{what} {name} does not exist on this host") from err


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
            raise CommandExecutionError(f"{path} is {words}: it must be a plain file")
    if not stat.S_ISREG(found.st_mode):
        raise CommandExecutionError(f"{path} is not a plain file, which it must be")
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
            f"the path of a secret file must be absolute and plain, not in {directory!r}"
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
                f"{reached} is {kind}: the path of a secret file must not pass it"
            ) from err
        raise CommandExecutionError(f"{reached} cannot be opened: {err.strerror}") from err


def _private(handle: int, path: str, last: bool) -> None:
    """Refuse a directory in which others could put another file in the place of ours."""
    found = os.fstat(handle)
    if found.st_uid not in (0, os.geteuid()):
        owner, _ = __salt__["slmdb_file.owners"](found)
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
        try:
            _make_one(path)
        except OSError as err:
            raise CommandExecutionError(f"{path} cannot be made: {err.strerror}") from err


def _make_one(path: str) -> None:
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


def _attributes(parent: int, name: str) -> dict[str, bytes] | None:
    """The ACL and the other extended attributes of a file; None if there is no file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        return None
    try:
        return {one: os.getxattr(handle, one) for one in os.listxattr(handle) if _copied(one)}
    except OSError as err:
        if err.errno != errno.ENOTSUP:
            raise
        return {}
    finally:
        os.close(handle)


def _copied(attribute: str) -> bool:
    ours = attribute == _ACL or attribute.startswith(("user.", "security."))
    return ours and attribute not in _NOT_COPIED


def _dress(handle: int, kept: dict[str, bytes], mode: int) -> None:
    """Give a file the attributes of the one before it, and no ACL but that one's."""
    if _ACL not in kept:
        with _tolerating(errno.ENODATA, errno.ENOTSUP):
            os.removexattr(handle, _ACL)  # it has the default one of its directory
    for name, value in kept.items():
        if name == _ACL:
            os.setxattr(handle, name, _with_mode(value, mode))
            continue
        with _tolerating(errno.EPERM, errno.EACCES, errno.ENOTSUP):
            os.setxattr(handle, name, value)


@contextlib.contextmanager
def _tolerating(*numbers: int) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno not in numbers:
            raise


def _with_mode(acl: bytes, mode: int) -> bytes:
    """Put a mode into an ACL, as chmod does: what are the group's bits limits all who are named."""
    entries = []
    for tag, allowed, number in _ACL_ENTRY.iter_unpack(acl[_ACL_HEAD:]):
        if tag in _ACL_SHIFTS:
            allowed = mode >> _ACL_SHIFTS[tag] & 0o7
        entries.append(_ACL_ENTRY.pack(tag, allowed, number))
    return acl[:_ACL_HEAD] + b"".join(entries)


def _fill(
    parent: int,
    name: str,
    data: bytes,
    identity: tuple[int, int],
    mode: int,
    kept: dict[str, bytes] | None,
) -> None:
    """Make the new file: closed to others until it has its owners, durable before its name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(name, flags, 0o600, dir_fd=parent)
    with os.fdopen(handle, "wb") as stream:
        os.fchown(handle, *identity)
        if kept is not None:
            _dress(handle, kept, mode)
        os.fchmod(handle, mode)
        stream.write(data)
        stream.flush()
        os.fsync(handle)
