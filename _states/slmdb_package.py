"""
The packages are installed, and psycopg2 in Salt's own Python.
"""

from __future__ import annotations

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
