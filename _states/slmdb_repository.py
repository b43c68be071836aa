"""
PGDG's package repository, where pillar asks for it.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_repository"


def __virtual__() -> str:
    return __virtualname__


def present(name: str, shipped: str = "", **wanted) -> dict:
    """
    Make apt use the repository that is wanted, trusted by nothing but the pinned key.

    name
        A sentence for the state's id; nothing depends on it.
    shipped
        The key that comes with the formula, named so that salt-ssh carries it to the host.
    wanted
        ``repository`` (``pgdg`` or ``distribution``), ``uri``, ``suite``, ``component``, ``key``,
        ``fingerprint``; default: as the formula's settings say.

    Example:

    .. code-block:: yaml

        PostgreSQL comes from the repository that pillar names:
          slmdb_repository.present
    """
    given = {key: value for key, value in wanted.items() if not key.startswith("__")}
    return __states__["slmdb.converge"](name, "slmdb_repository", given)


def absent(name: str) -> dict:
    """
    Take the repository away; the packages that came from it stay.

    name
        A sentence for the state's id; nothing depends on it.

    Example:

    .. code-block:: yaml

        PGDG's repository is gone:
          slmdb_repository.absent
    """
    given = {"repository": "distribution"}
    return __states__["slmdb.converge"](name, "slmdb_repository", given)


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
    return __states__["slmdb.again"]("slmdb_repository", sfun, name, told)
