"""
Roles of the server.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_role"


def __virtual__() -> str:
    return __virtualname__


def present(name: str, roles: dict | None = None) -> dict:
    """
    The roles exist with exactly the wanted attributes and memberships, and do not expire.

    name
        A sentence for the state's id; nothing depends on it.
    roles
        Role names with ``login``, ``member_of`` (all there are: others are taken away; without
        the key those of predefined roles and of such as may more than log in),
        ``connection_limit``; default: the settings'.
    """
    wanted = {} if roles is None else {"roles": roles}
    return __states__["slmdb.converge"](name, "slmdb_role", wanted, server=True)


def absent(name: str) -> dict:
    """
    What the settings name is dropped where ``slm_database:clean:role`` says so.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_role", verbs=("leftovers", "remove"))


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
    return __states__["slmdb.again"]("slmdb_role", sfun, name, told)
