"""
The instance exists.
"""

from __future__ import annotations

from typing import Any

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
    return __states__["slmdb.ask"](name, "slmdb_instance.port_problem", "The port is ours or free.")


def absent(name: str) -> dict:
    """
    The instance is gone where pillar says so; what keeps it is named.

    name
        A sentence for the state's id; nothing depends on it.
    """
    verbs, why = ("leftovers", "remove"), "slmdb_instance.why_kept"
    return __states__["slmdb.converge"](name, "slmdb_instance", verbs=verbs, why=why)


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
