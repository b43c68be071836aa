"""
The server runs under our unit and starts at boot.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_service"


def __virtual__() -> str:
    return __virtualname__


def running(name: str) -> dict:
    """
    The server runs under our unit and starts at boot.

    name
        A sentence for the state's id; nothing depends on it.

    One that runs outside our unit is moved into it if a restart is permitted, else warned of.
    """
    answer = __states__["slmdb.converge"](name, "slmdb_service")
    if answer["result"] is not False:
        waiting = __salt__["slmdb_service.warnings"]()
        answer.update({"warnings": waiting} if waiting else {})
    return answer


def mod_watch(name: str, sfun: str, **told: Any) -> dict:
    """
    For ``watch`` and ``listen``: the server runs, and reads its files again.

    name
        A sentence for the state's id; nothing depends on it.
    sfun
        The state's function.
    told
        Its arguments.
    """
    answer = __states__["slmdb.again"]("slmdb_service", sfun, name, told)
    if answer["changes"] or answer["result"] is False:
        return answer
    answer["changes"] = {"configuration": {"old": "read", "new": "read again"}}
    if __opts__["test"]:
        return {**answer, "result": None, "comment": "Would be reloaded."}
    return __states__["slmdb.attempt"](name, _reload, answer)


def _reload(answer: dict) -> dict:
    __salt__["slmdb_service.reload"]()
    return {**answer, "comment": "Reloaded."}
