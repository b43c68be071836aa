"""
What is parked is done, in a window or with an approval.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_maintenance"


def __virtual__() -> str:
    return __virtualname__


def done(name: str, long_transaction: int = 60) -> dict:
    """
    Updates, restarts and migrations that are parked are done, in this order, each step gated.

    name
        A sentence for the state's id; nothing depends on it.
    long_transaction
        Seconds from which on an open transaction stops the maintenance.

    Outside a window and without an approval nothing is changed, with ``test=True`` too; the state
    fails if anything is parked then, and says when the next window is.
    """
    return {"name": name, **__states__["slmdb.attempt"](name, _done, long_transaction)}


def _done(long_transaction: int) -> dict:
    why = __salt__["slmdb_window.reason"]()
    stale = __salt__["slmdb_update.refresh"]() if why and not __opts__["test"] else None
    note = f"\nThe package lists could not be fetched: {stale}" if stale else ""
    plan = __salt__["slmdb_maintenance.plan"]()
    if not plan["changes"]:
        # What cannot be migrated is no reason for a backup and a look at everything.
        warning = f"\nWarning: migrations: {plan['refused']}" if plan["refused"] else ""
        return {"result": True, "changes": {}, "comment": f"Nothing is parked.{warning}{note}"}
    if not why:
        words = __salt__["slmdb_window.refusal"]()
        parked = ", ".join(plan["changes"])
        comment = f"Nothing was done: {words}. Parked: {parked}."
        return {"result": False, "changes": {}, "comment": comment}
    if __opts__["test"]:
        comment = f"Would be done; permitted: {why}."
        return {"result": None, "changes": plan["changes"], "comment": comment}
    report = __salt__["slmdb_maintenance.run"](long_transaction)
    comment = "\n".join(__salt__["slmdb_maintenance.sentences"](report)) + note
    return {"result": not report["failed"], "changes": report["changes"], "comment": comment}


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
    return __states__["slmdb.again"]("slmdb_maintenance", sfun, name, told)
