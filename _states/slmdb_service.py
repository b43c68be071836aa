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
    """
    return __states__["slmdb.converge"](name, "slmdb_service")
