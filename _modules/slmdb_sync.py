"""
Whether this host has the formula's modules as they are now, told without a sync.

A sync lists, copies and hashes every file at every run. Where the files are the host's own (no
master in between), looking at their inodes says the same: a file's time of change is the kernel's,
nobody sets it back. Anything that cannot be told so is answered with "no", and a sync follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_sync"

KINDS = ("modules", "states")
ENDINGS = (".py", ".pyx", ".so", ".zip")


def __virtual__() -> str:
    return __virtualname__


def _record() -> str:
    return os.path.join(__opts__["cachedir"], "slmdb", "synced")


def _local() -> bool:
    """Whether the formula's files are plain files of this host."""
    backends = set(__opts__.get("fileserver_backend") or ["roots"])
    return __opts__.get("file_client") == "local" and backends <= {"roots", "file"}


def _sources() -> Iterator[tuple[str, str]]:
    """Every file that a sync would copy, and where to; in the order of the roots."""
    roots = [root for several in __opts__["file_roots"].values() for root in several]
    for root in dict.fromkeys(roots):
        for kind in KINDS:
            top = os.path.join(root, f"_{kind}")
            for folder, folders, names in os.walk(top):
                folders.sort()
                for name in sorted(names):
                    path = os.path.join(folder, name)
                    if name.endswith(ENDINGS):
                        yield path, _copy(kind, os.path.relpath(path, top))


def _copy(kind: str, relative: str) -> str:
    return os.path.join(__opts__["extension_modules"], kind, relative)


def _state() -> str:
    """A digest that changes with any of the files, here or there."""
    return __salt__["slmdb_file.digest"](path for pair in _sources() for path in pair)


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return None


def _same() -> bool:
    """Whether every copy has the content of one of its sources."""
    wanted: dict[str, list[bytes | None]] = {}
    for source, copy in _sources():
        wanted.setdefault(copy, []).append(_read(source))
    return all(
        None not in contents and _read(copy) in contents for copy, contents in wanted.items()
    )


def current() -> bool:
    """
    Tell whether the modules and states of this host are the formula's, as far as a look can tell.

    CLI Example:

    .. code-block:: bash

        salt-call --local slmdb_sync.current

    Returns true only if no file changed, here or in the formula, since the two were seen to be the
    same; false always where a master has the files. Raises nothing.
    """
    # A sync that was interrupted may have left a slmdb_file of another version.
    if not _local() or "slmdb_file.digest" not in __salt__:
        return False
    known = _read(_record())
    return known is not None and known == _state().encode()


def remember() -> None:
    """
    Remember that this host has the formula's modules, if it has them.

    CLI Example:

    .. code-block:: bash

        salt-call --local slmdb_sync.remember

    Returns nothing, raises nothing: without the record the next run syncs.
    """
    if not _local() or current():
        return
    state, path = _state(), _record()  # looked at before the content: a change in between shows
    if _same():
        __salt__["slmdb_file.keep"](path, state)
