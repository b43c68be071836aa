"""
Timers can call our functions: a copy of the modules of this run is theirs.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_runner"


def __virtual__() -> str:
    return __virtualname__


def present(name: str) -> dict:
    """
    Timers have a copy of the modules of this run.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_runner")


def absent(name: str) -> dict:
    """
    No copy of our modules is left.

    name
        A sentence for the state's id; nothing depends on it.
    """
    verbs = ("leftovers", "remove")
    return __states__["slmdb.converge"](name, "slmdb_runner", verbs=verbs)


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
    return __states__["slmdb.again"]("slmdb_runner", sfun, name, told)
