"""
The schema of the application's database is what the backend's code wants.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_migration"


def __virtual__() -> str:
    return __virtualname__


def applied(name: str, target: str | None = None) -> dict:
    """
    The backend's migrations have run, after its tables were made. A backend that is not deployed
    has none.

    name
        The state's name.
    target
        As for ``alembic upgrade``; ``None``: ``migration:target`` from pillar.

    Example:

    .. code-block:: yaml

        The schema is what the backend's code wants:
          slmdb_migration.applied
    """
    wanted = {} if target is None else {"target": target}
    __salt__["slmdb_migration.achieved"]()  # an earlier run's is not this one's
    answer = __states__["slmdb.converge"](name, "slmdb_migration", wanted, server=True)
    if answer["result"]:
        answer["comment"] = __salt__["slmdb_migration.summary"]()
    elif answer["result"] is False and not __opts__["test"]:
        answer["changes"] = __salt__["slmdb_migration.achieved"]()
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
    return __states__["slmdb.again"]("slmdb_migration", sfun, name, told)
