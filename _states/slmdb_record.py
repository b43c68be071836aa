"""
The settings of this run are recorded for later reports.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_record"


def __virtual__() -> str:
    return __virtualname__


def present(name: str) -> dict:
    """
    The settings of this run are recorded for later reports.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_record")


def absent(name: str) -> dict:
    """
    Nothing is recorded of the last apply; dumps and files of others stay and are named.

    name
        A sentence for the state's id; nothing depends on it.
    """
    answer = __states__["slmdb.converge"](name, "slmdb_record", verbs=("leftovers", "remove"))
    answer["comment"] = "\n".join([answer["comment"], *__salt__["slmdb_record.spared"]()])
    return answer


def kept(name: str) -> dict:
    """
    Name what a clean left on the host, and the pillar keys that would give it up; never fails.

    name
        A sentence for the state's id; nothing depends on it.
    """
    fine = "Nothing of the formula is left."
    return {**__states__["slmdb.ask"](name, "slmdb_record.kept", fine), "result": True}


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
    return __states__["slmdb.again"]("slmdb_record", sfun, name, told)
