"""
The pillar, checked as a whole before any of it is used.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_pillar"


def __virtual__() -> str:
    return __virtualname__


def valid(name: str) -> dict:
    """
    Fail, with one line per mistake, unless everything below ``slm_database`` in pillar is right.

    name
        A sentence for the state's id; nothing depends on it.

    Example:

    .. code-block:: yaml

        The pillar is valid:
          slmdb_pillar.valid
    """
    __salt__["slmdb_pillar.begin_run"]()
    return __states__["slmdb.ask"](name, "slmdb_pillar.problems", "The pillar is valid.")


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
    return __states__["slmdb.again"]("slmdb_pillar", sfun, name, told)
