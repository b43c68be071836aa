"""
Backups: the engine is configured, the repository knows the instance, timers run.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_backup"


def __virtual__() -> str:
    return __virtualname__


def configured(name: str) -> dict:
    """
    pgBackRest has our configuration, its directories, and a key that is made once.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_pgbackrest")


def present(name: str) -> dict:
    """
    The repository knows the instance.

    name
        A sentence for the state's id; nothing depends on it.
    """
    verbs = ("missing_stanza", "create_stanza")
    return __states__["slmdb.converge"](name, "slmdb_pgbackrest", verbs=verbs)


def scheduled(name: str) -> dict:
    """
    Backups are made when the schedule says so.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.converge"](name, "slmdb_backup_schedule")


def unscheduled(name: str) -> dict:
    """
    No timer makes backups.

    name
        A sentence for the state's id; nothing depends on it.
    """
    verbs = ("leftovers", "remove")
    return __states__["slmdb.converge"](name, "slmdb_backup_schedule", verbs=verbs)


def absent(name: str) -> dict:
    """
    Our configuration of pgBackRest is gone; the repository and its key stay.

    name
        A sentence for the state's id; nothing depends on it.
    """
    verbs = ("leftovers", "remove")
    return __states__["slmdb.converge"](name, "slmdb_pgbackrest", verbs=verbs)


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
    return __states__["slmdb.again"]("slmdb_backup", sfun, name, told)
