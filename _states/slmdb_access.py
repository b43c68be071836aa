"""
Who may log in: the rules are in place, and seen to work.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_access"


def __virtual__() -> str:
    return __virtualname__


def applied(name: str) -> dict:
    """
    The access rules and user maps are written, judged by the server, and read by it.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_access")


def absent(name: str) -> dict:
    """
    The access rules and user maps are what they were before the formula.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_original", {"part": "access"})


def verified(name: str) -> dict:
    """
    Logins that must succeed do, and those that must fail are refused; nothing is changed.

    name
        A sentence for the state's id; nothing depends on it.

    In test mode nobody logs in: what is not right yet may be what the run would make right.
    """
    if __opts__["test"]:
        comment = "The login matrix would be tried."
        return {"name": name, "changes": {}, "result": True, "comment": comment}
    return __states__["slmdb.ask"](name, "slmdb_access.verify", "The login matrix is right.")


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
    return __states__["slmdb.again"]("slmdb_access", sfun, name, told)
