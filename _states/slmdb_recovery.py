"""
A host that was lost: its data is back.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_recovery"


def __virtual__() -> str:
    return __virtualname__


def restored(name: str) -> dict:
    """
    The instance has the data of the repository, if it has none.

    name
        A sentence for the state's id; nothing depends on it.

    Archived WAL that could not be replayed, because a segment is missing or damaged, is told in
    the comment and as a warning: the data is what can be had.
    """
    answer = __states__["slmdb.converge"](name, "slmdb_recovery_data")
    if answer["result"] and answer["changes"]:
        lacking = __salt__["slmdb_recovery_data.left_out"]()
        if lacking:
            answer["comment"] += f" {lacking}"
            answer["warnings"] = [lacking]
    return answer


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
    return __states__["slmdb.again"]("slmdb_recovery", sfun, name, told)
