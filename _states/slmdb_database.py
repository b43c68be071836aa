"""
Databases of the server.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_database"


def __virtual__() -> str:
    return __virtualname__


def present(name: str, databases: dict | None = None) -> dict:
    """
    The databases exist with their owners and extensions, let connections in, give their owners
    every right and PUBLIC none, and let in the roles of the settings that name them.

    name
        A sentence for the state's id; nothing depends on it.
    databases
        Names with ``owner``, ``encoding``, ``locale``, ``extensions``; default: the settings'.
    """
    wanted = {} if databases is None else {"databases": databases}
    return __states__["slmdb.converge"](name, "slmdb_database", wanted, server=True)


def absent(name: str) -> dict:
    """
    What the settings name is dropped where ``slm_database:clean:data`` says so.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_database", verbs=("leftovers", "remove"))


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
    return __states__["slmdb.again"]("slmdb_database", sfun, name, told)
