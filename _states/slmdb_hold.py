"""
PostgreSQL's packages are updated only when somebody means it.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_hold"


def __virtual__() -> str:
    return __virtualname__


def present(name: str) -> dict:
    """
    All packages of the server's major are held, and what updates by itself leaves them alone.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_hold")


def absent(name: str) -> dict:
    """
    What the formula held is not held any more, and its drop-ins are gone.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_hold", verbs=("leftovers", "remove"))


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
    return __states__["slmdb.again"]("slmdb_hold", sfun, name, told)
