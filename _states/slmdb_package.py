"""
The packages are installed, and psycopg2 in Salt's own Python.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_package"


def __virtual__() -> str:
    return __virtualname__


def installed(name: str) -> dict:
    """
    The packages are installed, and psycopg2 in Salt's own Python.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_package")


def absent(name: str) -> dict:
    """
    What kept the packages from making an instance is gone, and the packages where pillar says so.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_package", verbs=("leftovers", "remove"))


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
    return __states__["slmdb.again"]("slmdb_package", sfun, name, told)
