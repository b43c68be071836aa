"""
The instance exists.
"""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_instance"


def __virtual__() -> str:
    return __virtualname__


def present(name: str) -> dict:
    """
    The instance exists.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_instance")


def port_available(name: str) -> dict:
    """
    Fail, before anything is changed, if another program holds the wanted port.

    name
        A sentence for the state's id; nothing depends on it.
    """
    try:
        problem = __salt__["slmdb_instance.port_problem"]()
    except CommandExecutionError as err:
        problem = str(err)
    comment = problem or "The port is ours or free."
    return {"name": name, "changes": {}, "result": problem is None, "comment": comment}


def absent(name: str) -> dict:
    """
    The instance is gone where pillar says so; what keeps it is named.

    name
        A sentence for the state's id; nothing depends on it.
    """
    answer = __states__["slmdb.converge"](name, "slmdb_instance", verbs=("leftovers", "remove"))
    if answer["result"] and not answer["changes"]:
        answer["comment"] = __salt__["slmdb_instance.why_kept"]() or answer["comment"]
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
    return __states__["slmdb.again"]("slmdb_instance", sfun, name, told)
