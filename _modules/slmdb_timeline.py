"""
Timelines: every restore in place begins another, and a backup from behind that branch is not on it.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_timeline"

_HISTORY = re.compile(r"(?:.*/)?\d+-(\d+)/([0-9A-F]{8})\.history")


def __virtual__() -> str:
    return __virtualname__


def position(lsn: str) -> int:
    """
    Return a place in the WAL as a number.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_timeline.position 0/3000060

    lsn
        As PostgreSQL writes it.
    """
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def parents(text: str) -> dict[int, int]:
    """
    Return what a history file says: each earlier timeline, and where it was left.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_timeline.parents '1 0/3000060 no recovery target specified'

    text
        Of the file.

    Returns the number of a timeline to a place in the WAL, oldest first.
    """
    lines = (line.split() for line in text.splitlines())
    return {int(words[0]): position(words[1]) for words in lines if len(words) > 1}


def _archived(number: int) -> dict[int, dict[str, Any]]:
    """Each timeline of the newest archive in a repository: when it began, and its file."""
    stanza = __salt__["slmdb_pgbackrest.stanza"]()
    words = [f"--repo={number}", "--recurse", "--filter=\\.history$", "--output=json"]
    text = __salt__["slmdb_pgbackrest.run"]("repo-ls", *words, f"archive/{stanza}")
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for path, told in json.loads(text or "{}").items():
        match = _HISTORY.fullmatch(path)
        if match:
            row = {"began": told["time"], "repository": number, "path": f"archive/{stanza}/{path}"}
            found.setdefault(int(match[1]), {})[int(match[2], 16)] = row
    return found[max(found)] if found else {}


def _parents(row: dict[str, Any]) -> dict[int, int]:
    options = (f"--repo={row['repository']}", row["path"])
    return parents(__salt__["slmdb_pgbackrest.run"]("repo-get", *options))


def own(row: dict[str, Any]) -> int:
    """
    Return the timeline on which a backup was made.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_timeline.own '{"wal": ["000000010000000000000003"]}'

    row
        The backup, as ``slmdb_backup.list`` has it.
    """
    return int(row["wal"][0][:8], 16)


def _not_after(known: dict[int, dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """A repository that was copied says when; its backups say more."""
    for row in rows:
        timeline = known.get(own(row))
        if timeline:
            started = __salt__["slmdb_backup.seconds"](row["started"])
            timeline["began"] = min(timeline["began"], started)


def branch(moment: float | None = None, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """
    Say on which timeline the server was at a moment.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_timeline.branch

    moment
        Seconds since the epoch; ``None``: now.
    rows
        The backups, as ``slmdb_backup.list`` has them: a timeline is no younger than its own.

    Returns ``timeline`` (its number; ``None`` if there never was another), ``parents`` (each
    earlier timeline that leads to it, to the place in the WAL where it was left) and ``latest``
    (whether it is the newest). Raises ``CommandExecutionError`` if a history that a repository has
    cannot be read.
    """
    known: dict[int, dict[str, Any]] = {}
    for number in __salt__["slmdb_pgbackrest.repositories"]():
        with contextlib.suppress(CommandExecutionError):
            known = {**_archived(number), **known}
    _not_after(known, rows or [])
    if not known:
        return {"timeline": None, "parents": {}, "latest": True}
    newest = max(known)
    begun = [one for one in known if moment is None or known[one]["began"] <= moment]
    if begun:
        now = max(begun)
        return {"timeline": now, "parents": _parents(known[now]), "latest": now == newest}
    first = min(_parents(known[newest]), default=1)
    return {"timeline": first, "parents": {}, "latest": False}


def leading(
    rows: list[dict[str, Any]], way: dict[str, Any], where: str = ""
) -> list[dict[str, Any]]:
    """
    Return the backups whose restore can get to a timeline.

    For callers in Python.

    rows
        Backups, as ``slmdb_backup.list`` has them.
    way
        The timeline, as ``branch`` has it.
    where
        Which backups these are, in words that begin with a space.

    Raises ``CommandExecutionError`` if there is none.
    """
    found = [row for row in rows if _leads(row, way)]
    if not found:
        raise CommandExecutionError(
            f"no backup{where} leads to what was restored in place; slmdb_backup.create makes one"
        )
    return found


def _leads(row: dict[str, Any], way: dict[str, Any]) -> bool:
    if way["timeline"] in (None, own(row)):
        return True
    left = way["parents"].get(own(row))
    return left is not None and position(row["lsn"]) <= left


def options(timeline: int | None, latest: bool) -> list[str]:
    """
    Return pgBackRest's options for a timeline; it takes the newest by itself.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_timeline.options 1 False

    timeline
        Its number.
    latest
        Whether it is the newest.
    """
    return [] if latest or timeline is None else [f"--target-timeline={timeline}"]
