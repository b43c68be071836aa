"""
The one way in which a state of this formula makes something true, the one in which it asks, and the
one in which an error becomes its comment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "slmdb"

EXPECTED = (CommandExecutionError, SaltInvocationError, OSError)


def __virtual__() -> str:
    return __virtualname__


def _answer(name: str, result: bool | None, comment: str, changes: dict | None = None) -> dict:
    return {"name": name, "result": result, "comment": comment, "changes": changes or {}}


def _line(err: Exception) -> str:
    if isinstance(err, OSError) and err.strerror:
        where = err.filename2 or err.filename
        return f"{where}: {err.strerror}" if where else err.strerror
    return str(err)


def _unknown(name: str) -> dict:
    """The answer of test mode where the server cannot be asked."""
    found = __salt__["slmdb_instance.facts"]()
    # With other settings than at the last apply there may be more to do than to start it.
    same = __salt__["slmdb_lastgood.exists"]() and not __salt__["slmdb_record.differences"]()
    if found["exists"] and same:
        why = "runs but does not let us in" if found["running"] else "is stopped"
        return _answer(name, True, f"Cannot be compared while the server {why}.")
    why = "runs but does not let us in" if found["running"] else "does not run yet"
    changes = {name: {"old": None, "new": "decided when the server runs"}}
    return _answer(name, None, f"The server {why}.", changes)


def again(noun: str, function: str, name: str, told: dict[str, Any]) -> dict:
    """
    Make true once more what a state makes true, because another one that it watches changed
    something.

    noun
        The state's module, e.g. ``slmdb_role``.
    function
        Its function, e.g. ``present``.
    name
        The state's name.
    told
        Its arguments, and what Salt adds to them.

    Returns what the function returns.
    """
    own = {key: value for key, value in told.items() if not key.startswith("__")}
    return __states__[f"{noun}.{function}"](name, **own)


def attempt(name: str, work: Callable[..., dict], *told: Any) -> dict:
    """
    Do a state's work; an error that is to be expected becomes a failed result with its one line.

    name
        The state's name.
    work
        What is done.
    told
        Its arguments.

    Returns what it returns, a state's result dictionary.
    """
    try:
        return work(*told)
    except EXPECTED as err:
        return _answer(name, False, _line(err))


def converge(
    name: str,
    noun: str,
    wanted: dict[str, Any] | None = None,
    server: bool = False,
    systemd: bool = False,
    verbs: tuple[str, str] = ("differences", "apply"),
    why: str = "",
) -> dict:
    """
    Make a noun what it should be: read, compare, return if equal, write, read again.

    name
        The state's name.
    noun
        The execution module, e.g. ``slmdb_role``; it offers the two verbs.
    wanted
        Keyword arguments for both; empty: as the formula's settings say.
    server
        Whether a running server is needed: in test mode a host that has none yet is told that the
        change waits for it, one that was applied before that nothing can be compared.
    systemd
        Whether it is only for a host that systemd runs.
    verbs
        The functions that compare and write; ``("leftovers", "remove")`` undoes the noun.
    why
        A function that says in one line why nothing is to be done, or returns nothing.

    Returns a state's result dictionary. An error becomes a failed result with its one line.
    """
    if systemd and not __salt__["slmdb_instance.systemd"]():
        return _answer(name, True, "Skipped: systemd does not run this host.")
    return attempt(name, _converge, name, noun, wanted or {}, server, verbs, why)


def _converge(
    name: str, noun: str, wanted: dict[str, Any], server: bool, verbs: tuple[str, str], why: str
) -> dict:
    compare, write = (f"{noun}.{verb}" for verb in verbs)
    if server and __opts__["test"] and not __salt__["slmdb_server.available"]():
        return _unknown(name)
    changes = __salt__[compare](**wanted)
    if not changes:
        said = __salt__[why]() if why else None
        return _answer(name, True, said or "Already as it should be.")
    if __opts__["test"]:
        return _answer(name, None, "Would be changed.", changes)
    __salt__[write](**wanted)
    left = __salt__[compare](**wanted)
    if left:
        return _answer(name, False, f"Did not converge: {', '.join(sorted(left))}.", changes)
    return _answer(name, True, "Changed.", changes)


def ask(name: str, function: str, right: str) -> dict:
    """
    Ask what is wrong, and change nothing.

    name
        The state's name.
    function
        An execution function that returns one line or several, or nothing where all is right.
    right
        The comment where all is right.

    Returns a state's result dictionary: failed, with these lines or an error's one line, or true.
    """
    return attempt(name, _ask, name, function, right)


def _ask(name: str, function: str, right: str) -> dict:
    wrong = __salt__[function]() or []
    lines = [wrong] if isinstance(wrong, str) else wrong
    return _answer(name, not lines, "\n".join(lines) or right)
