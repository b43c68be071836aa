"""
The backend's unit has our drop-in.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_backend"


def __virtual__() -> str:
    return __virtualname__


def present(name: str) -> dict:
    """
    The backend's unit has our drop-in.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_backend", systemd=True)


def absent(name: str) -> dict:
    """
    The backend's unit has no drop-in of ours.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_backend", verbs=("leftovers", "remove"))


def mod_watch(name: str, sfun: str, **told: Any) -> dict:
    """
    For ``watch`` and ``listen``: the state once more.

    name
        Its name.
    sfun
        The state's function.
    told
        Its arguments.
    """
    return __states__["slmdb.again"]("slmdb_backend", sfun, name, told)
