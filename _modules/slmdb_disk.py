"""
Disks: what is free, the refusal of what would not fit, and patience with one that does not answer.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import select
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_disk"

MIB = 1024**2
MOUNTED = "/proc/self/mountinfo"
_OCTAL = re.compile(r"\\([0-7]{3})")


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


def mount_points() -> list[str]:
    """
    Return where something is mounted now.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_disk.mount_points
    """
    return column(MOUNTED, 4)


def column(path: str, number: int) -> list[str]:
    """
    Return a column of paths from a table of mounts.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_disk.column /etc/fstab 1

    path
        The table: ``/etc/fstab`` or one of the kernel's.
    number
        The column's, from 0.

    Returns the paths without a slash at their end; in the table a space is written in octal.
    """
    text = (__salt__["slmdb_file.read"](path) or b"").decode(errors="replace")
    fields = (line.split("#")[0].split() for line in text.splitlines())
    found = (words[number] for words in fields if len(words) > number + 1)
    return [_OCTAL.sub(lambda code: chr(int(code[1], 8)), one).rstrip("/") for one in found]


def within(seconds: float, path: str, function: Callable, *arguments: Any) -> Any:
    """
    Call what looks at a path, and do not wait longer than that: a mount may hang for ever.

    For callers in Python.

    seconds
        How long to wait.
    path
        What is looked at.
    function, arguments
        What is called; in a process of its own if the path is on another mount than the server's
        data (without which there is nothing to wait for), for a thread that hangs would hold up
        whoever changes the user of all of them.

    Returns what it returns. Raises ``TimeoutError`` if it is not there by then, and ``OSError`` as
    the function does.
    """
    if _mount(path) == _mount(__salt__["slmdb_instance.facts"]()["data_directory"]):
        return function(*arguments)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _tell(writer, function, *arguments)
    os.close(writer)
    try:
        with open(reader, "rb") as stream:
            if not select.select([stream], [], [], seconds)[0]:
                raise TimeoutError
            good, answer = pickle.loads(stream.read())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        threading.Thread(target=os.waitpid, args=(child, 0), daemon=True).start()
    if not good:
        raise answer
    return answer


def _mount(path: str) -> str:
    """Where what a path is on is mounted, told from the paths alone: none of them is touched."""
    return max(
        (at for at in mount_points() if f"{path}/".startswith(f"{at}/")), key=len, default=""
    )


def _tell(writer: int, function: Callable, *arguments: Any) -> NoReturn:
    """In the child: the answer, and an end without anything that the parent has begun."""
    try:
        try:
            answer = (True, function(*arguments))
        except OSError as err:
            answer = (False, err)
        with open(writer, "wb") as stream:
            stream.write(pickle.dumps(answer))
    finally:
        os._exit(0)


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
