"""
Our systemd unit is the one that starts the instance.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_unit"


def __virtual__() -> str:
    return __virtualname__


def present(name: str) -> dict:
    """
    Our systemd unit is the one that starts the instance.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_unit", systemd=True)


def absent(name: str) -> dict:
    """
    Debian's own unit has the instance back.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_unit", verbs=("leftovers", "remove"))


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
    return __states__["slmdb.again"]("slmdb_unit", sfun, name, told)
