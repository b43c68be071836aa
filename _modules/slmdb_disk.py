"""
Room on a disk: what is free, and the refusal of what would not fit.
"""

from __future__ import annotations

import os

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_disk"

MIB = 1024**2


def __virtual__() -> str:
    return __virtualname__


def free(path: str) -> int | None:
    """
    Return the bytes that are free at a path.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_disk.free /var/lib/pgbackrest

    path
        A directory.

    Returns ``None`` if it cannot be told. Raises nothing.
    """
    try:
        seen = os.statvfs(path)
    except OSError:
        return None
    return seen.f_bavail * seen.f_frsize


def refuse(
    path: str, what: str, needed: float, advice: str = "make room", key: str = "", keep: float = 0
) -> None:
    """
    Refuse what the disk would not hold, before it begins.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_disk.refuse /var/lib/pgbackrest 'the next full backup' 1000000

    path
        The directory that it goes to.
    what
        What needs the room, in words.
    needed
        Bytes, as far as that is known before.
    advice
        What to do.
    key
        Where in pillar the path comes from.
    keep
        Bytes that have to stay free.

    Raises ``CommandExecutionError`` if less is free; nothing if that cannot be told.
    """
    left = free(path)
    if left is None or left >= needed + keep:
        return
    where = f"{key}: {path}" if key else path
    more = f" and leaves {int(keep) // MIB} MiB" if keep else ""
    raise CommandExecutionError(
        f"{where} has {left // MIB} MiB free, {what} needs about {int(needed) // MIB} MiB{more}; "
        f"{advice}"
    )
