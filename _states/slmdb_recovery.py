"""
A host that was lost: its data is back.
"""

from __future__ import annotations

__virtualname__ = "slmdb_recovery"


def __virtual__() -> str:
    return __virtualname__


def restored(name: str) -> dict:
    """
    The instance has the data of the repository, if it has none.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_recovery_data")
