"""
The instance exists.
"""

from __future__ import annotations

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
