"""
The server runs under our unit and starts at boot.
"""

from __future__ import annotations

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
