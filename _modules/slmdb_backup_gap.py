"""
Gaps in the archived WAL: a restore to its end stops at the first one, without a word.

A segment may be missing, which its name tells, or damaged, which only replaying it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_backup_gap"

ENDS = "what can be read of the archived WAL ends at"
ADVICE = (
    "a segment behind that is damaged, slmdb_backup.verify names it; what was committed from there "
    "on is in no restore until slmdb_backup.create full has made a new beginning"
)
LOG = 1 << 32  # bytes of WAL that share the middle eight digits of a segment's name
# A position is told behind the header of a page, replayed is what ends before it.
REACHED = """
SELECT pg_last_wal_replay_lsn()::text AS lsn,
       pg_wal_lsn_diff(%s, pg_last_wal_replay_lsn()) > 64 AS short
"""
_SEGMENT = re.compile(r"^.*/([0-9A-F]{24})-([0-9a-f]{40})", re.MULTILINE)
SIZE = "SELECT setting::bigint AS bytes FROM pg_settings WHERE name = 'wal_segment_size'"


def __virtual__() -> str:
    return __virtualname__


def _archived() -> list[tuple[str, str]]:
    """Every archived segment with its checksum, wherever it is; a dead repository has none."""
    stanza, found = __salt__["slmdb_pgbackrest.stanza"](), []
    for number in __salt__["slmdb_pgbackrest.repositories"]():
        words = ("repo-ls", f"--repo={number}", "--recurse", f"archive/{stanza}")
        with contextlib.suppress(CommandExecutionError):
            found += _SEGMENT.findall(__salt__["slmdb_pgbackrest.run"](*words))
    return sorted(found)


def first(begin: str, end: str) -> str | None:
    """
    Name the first segment of archived WAL that no repository has.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_gap.first 00000001000000000000000A 00000001000000000000000F

    begin, end
        The first and the last segment that should be there.

    Returns its name; ``None`` if there is no gap. Raises ``CommandExecutionError`` if the server,
    which knows how large a segment is, does not answer.
    """
    each = LOG // __salt__["slmdb_server.query"](SIZE)[0]["bytes"]
    held, timeline = {segment for segment, _ in _archived()}, end[:8]
    if begin[:8] != timeline:
        # Which timeline a segment belongs to only its history tells; one of that place will do.
        held = {timeline + name[8:] for name in held}
    start, stop = (int(name[8:16], 16) * each + int(name[16:], 16) for name in (begin, end))
    for number in range(start, stop + 1):
        name = f"{timeline}{number // each:08X}{number % each:08X}"
        if name not in held:
            return name
    return None


def _has_target(chosen: dict[str, Any]) -> bool:
    """Tell whether a restore ends before the WAL does; it fails then if its target is missed."""
    return len(chosen["options"]) > 1


def words(chosen: dict[str, Any], archived: dict[str, str] | None) -> str | None:
    """
    Say what a restore to the end of the archived WAL will lack.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.plan

    chosen
        As ``slmdb_restore.plan`` returns it.
    archived
        As ``slmdb_backup.settle`` returned it just now; ``None``: the server does not run, so
        nobody knows how far the WAL should reach.

    Returns one line, ``None`` if nothing lacks. Raises what ``first`` raises.
    """
    if archived is None or _has_target(chosen):
        return None
    found = first(chosen["wal"], archived["wal"])
    return found and (
        f"the archived WAL has a gap at {found}: what was committed from there on is in no restore "
        "until slmdb_backup.create full has made a new beginning"
    )


def short(chosen: dict[str, Any], archived: dict[str, str] | None, **where: Any) -> str | None:
    """
    Say that a server on restored files did not reach the end of the archived WAL.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.plan

    chosen, archived
        As for ``words``.
    where
        Parameters of libpq, of the server that has replayed what it could.

    Returns one line, ``None`` if it did, or nobody knows how far it should. Raises
    ``CommandExecutionError`` if that server does not answer.
    """
    if archived is None or _has_target(chosen):
        return None
    connection = __salt__["slmdb_server.connect"](**where)
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute(REACHED, [archived["lsn"]])
        reached, found = cursor.fetchone()
    return f"{ENDS} {reached}, not at {archived['lsn']}: {ADVICE}" if found else None


def damaged(chosen: dict[str, Any], scratch: str) -> str | None:
    """
    Name the first segment of archived WAL that a restore cannot read as it was written.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.plan

    chosen
        As for ``words``; with a target nothing is read, because the target is missed then.
    scratch
        A path that the server's user can write; each segment is there for a moment.

    Returns one line, ``None`` if all are sound. Raises ``CommandExecutionError`` if a segment
    cannot be removed.
    """
    if _has_target(chosen):
        return None
    for segment, digest in _behind(chosen):
        try:
            if _fetched(segment, scratch) == digest:
                continue
            why = "its checksum is wrong"
        except CommandExecutionError as err:
            why = str(err)
        return f"archived WAL segment {segment} is damaged: {why}"
    return None


def _behind(chosen: dict[str, Any]) -> list[tuple[str, str]]:
    """Segments from the start of a backup on, with their checksums; of each place the newest."""
    newest = {segment[8:]: (segment, digest) for segment, digest in _archived()}
    return [newest[place] for place in sorted(newest) if place >= chosen["wal"][8:]]


def _fetched(segment: str, scratch: str) -> str:
    """The checksum of a segment as a server that asks for it gets it."""
    try:
        __salt__["slmdb_pgbackrest.run"]("archive-get", segment, scratch)
        data = __salt__["slmdb_file.read"](scratch) or b""
    finally:
        __salt__["slmdb_file.remove"](scratch)
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
