"""
The server's configuration is what the settings say, and in force as far as it may be.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_config"


def __virtual__() -> str:
    return __virtualname__


def applied(name: str) -> dict:
    """
    Our configuration file is written, judged by the server, and read by it.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_config")


def in_force(name: str) -> dict:
    """
    What waits for a restart is in force, if a restart is permitted now; else it goes on waiting.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_lastgood")


def absent(name: str) -> dict:
    """
    Our configuration file is gone; what the server took from it stays until it is restarted.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_original", {"part": "config"})


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
    return __states__["slmdb.again"]("slmdb_config", sfun, name, told)
