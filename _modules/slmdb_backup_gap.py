"""
Gaps in the archived WAL: a restore to its end stops at the first one, without a word.

A segment may be missing, which its name tells, or damaged, which only replaying it does.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import secrets
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

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
USUAL = 1 << 24  # bytes of a segment, unless initdb was told otherwise
_SEGMENT = re.compile(r"^.*/([0-9A-F]{24})-([0-9a-f]{40})", re.MULTILINE)
SIZE = "SELECT setting::bigint AS bytes FROM pg_settings WHERE name = 'wal_segment_size'"
# What is written next, and what waits; while archiving is on, all before is archived or waits.
WRITTEN = """
SELECT pg_walfile_name(pg_current_wal_flush_lsn() + 1) AS wal,
       current_setting('archive_mode') = 'off' AS off,
       ARRAY(SELECT left(name, 24) FROM pg_ls_archive_statusdir()
              WHERE name ~ '^[0-9A-F]{24}[.]ready$') AS waiting
"""


def __virtual__() -> str:
    return __virtualname__


def _archived() -> list[tuple[str, str]]:
    """Every archived segment with its checksum, wherever it is; a dead repository has none."""
    found = []
    for number in __salt__["slmdb_pgbackrest.repositories"]():
        with contextlib.suppress(CommandExecutionError):
            found += _archived_in(number)
    return sorted(found)


def _archived_in(number: int) -> list[tuple[str, str]]:
    stanza = __salt__["slmdb_pgbackrest.stanza"]()
    words = ("repo-ls", f"--repo={number}", "--recurse", f"archive/{stanza}")
    return _SEGMENT.findall(__salt__["slmdb_pgbackrest.run"](*words))


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
    return next(_missing(begin, end, _each(), _archived()), None)


def _each() -> int:
    """How many segments share the middle eight digits of their names."""
    return LOG // __salt__["slmdb_server.query"](SIZE)[0]["bytes"]


def _missing(begin: str, end: str, each: int, archived: list[tuple[str, str]]) -> Iterator[str]:
    held, timeline = {segment for segment, _ in archived}, end[:8]
    if begin[:8] != timeline:
        # Which timeline a segment belongs to only its history tells; one of that place will do.
        held = {timeline + name[8:] for name in held}
    for number in range(_number(begin, each), _number(end, each) + 1):
        name = _named(timeline, number, each)
        if name not in held:
            yield name


def before(number: int) -> str | None:
    """
    Name the last segment that a repository lacks between its newest backup and what it gets next.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_gap.before 1

    number
        The repository: one that WAL comes to again, or that was copied before.

    Returns its name; ``None`` if none lacks, or there is no backup. Raises
    ``CommandExecutionError`` if the server or the repository does not answer.
    """
    rows = __salt__["slmdb_backup.rows"](number)
    if not rows:
        return None
    each, written = _each(), __salt__["slmdb_server.query"](WRITTEN)[0]
    end = _named(written["wal"][:8], max(_number(written["wal"], each) - 1, 0), each)
    missing = set(_missing(rows[-1]["wal"][0], end, each, _archived_in(number)))
    missing -= set(written["waiting"])
    # While archive_mode waits for a restart not even the next one is sure to be archived.
    return max(missing, default=written["wal"] if written["off"] else None)


def _named(timeline: str, number: int, each: int) -> str:
    """The name of a segment, counted from the beginning of the WAL."""
    return f"{timeline}{number // each:08X}{number % each:08X}"


def words(chosen: dict[str, Any], archived: dict[str, str] | None) -> str | None:
    """
    Say what a restore to the end of the archived WAL will lack.

    For callers in Python.

    chosen
        As ``slmdb_restore_plan.make`` returns it.
    archived
        As ``slmdb_backup.settle`` returned it just now; ``None``: the server does not run, so
        nobody knows how far the WAL should reach.

    Returns one line, ``None`` if nothing lacks. Raises what ``first`` raises.
    """
    if archived is None or chosen["ends"]:
        return None
    found = first(chosen["wal"], archived["wal"])
    return found and (
        f"the archived WAL has a gap at {found}: what was committed from there on is in no restore "
        "until slmdb_backup.create full has made a new beginning"
    )


def short(chosen: dict[str, Any], archived: dict[str, str] | None, **where: Any) -> str | None:
    """
    Say that a server on restored files did not reach the end of the archived WAL.

    For callers in Python.

    chosen, archived
        As for ``words``.
    where
        Parameters of libpq, of the server that has replayed what it could.

    Returns one line, ``None`` if it did, or nobody knows how far it should. Raises
    ``CommandExecutionError`` if that server does not answer.
    """
    if archived is None or chosen["ends"]:
        return None
    connection = __salt__["slmdb_server.connect"](**where)
    with contextlib.closing(connection):
        (row,) = __salt__["slmdb_server.ask"](connection, REACHED, [archived["lsn"]])
    ends = f"{ENDS} {row['lsn']}, not at {archived['lsn']}: {ADVICE}"
    return ends if row["short"] else None


def damaged(chosen: dict[str, Any]) -> str | None:
    """
    Name the first segment of archived WAL that is missing, or cannot be read as it was written.

    For callers in Python.

    chosen
        As for ``words``; with a target nothing is read, because the target is missed then.

    Returns one line, ``None`` if all are sound. Raises ``CommandExecutionError`` if a segment
    cannot be removed.
    """
    if chosen["ends"]:
        return None
    each = LOG // _segment_size()
    before: int | None = None
    for segment, digest in _behind(chosen, each):
        number = _number(segment, each)
        if before is not None and number != before + 1:
            return f"archived WAL segment {_named(segment[:8], before + 1, each)} is missing"
        found = _damage(segment, digest)
        if found:
            return found
        before = number
    return None


def _number(segment: str, each: int) -> int:
    """Which segment it is, counted from the beginning of the WAL."""
    return int(segment[8:16], 16) * each + int(segment[16:], 16)


def _damage(segment: str, digest: str) -> str | None:
    try:
        if _fetched(segment) == digest:
            return None
        why = "its checksum is wrong"
    except CommandExecutionError as err:
        why = str(err)
    return f"archived WAL segment {segment} is damaged: {why}"


def left_out(directory: str) -> str | None:
    """
    Say which archived WAL was not replayed by a server that replayed all it could.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_gap.left_out /var/lib/postgresql/15/main

    directory
        The data directory of that server, which is stopped.

    Returns one line, ``None`` if no segment follows. Raises ``CommandExecutionError`` if the
    repositories or the control file cannot be read.
    """
    histories = sorted(glob.glob(f"{directory}/pg_wal/*.history"))
    if not histories:
        return None
    # Where the new timeline left its parent.
    text = (__salt__["slmdb_file.read"](histories[-1]) or b"").decode()
    timeline, place = list(__salt__["slmdb_timeline.parents"](text).items())[-1]
    size = _segment_size()
    last = (place - 1) // size
    reached, following = (
        _named(f"{timeline:08X}", number, LOG // size) for number in (last, last + 1)
    )
    behind = {
        segment: digest
        for segment, digest in _archived()
        if segment[:8] == reached[:8] and segment > reached
    }
    if not behind:
        return None
    if following not in behind:
        why: str | None = f"{following} is missing"
    else:
        why = _damage(following, behind[following])
    if not why and max(behind) == following:
        return None  # it begins with the end of a record that nothing completes
    return (
        f"the archived WAL goes on to {max(behind)} but could be replayed to {reached} only: "
        f"{why or f'{following} does not fit'}; "
        "what was committed after that is not in this database"
    )


def _segment_size() -> int:
    """As the control file has it; a server that does not start may not have one."""
    found = __salt__["slmdb_instance.facts"]()
    program = f"{found['bin_directory']}/pg_controldata"
    try:
        told = __salt__["slmdb_program.run"](program, found["data_directory"])
    except CommandExecutionError:
        return USUAL
    return int(re.findall(r"Bytes per WAL segment: +(\d+)", told)[0])


def _behind(chosen: dict[str, Any], each: int) -> list[tuple[str, str]]:
    """
    Segments from the start of a backup on, with their checksums; of each place the newest.

    What an earlier timeline has behind the place where it was left is on nobody's way.
    """
    way = __salt__["slmdb_timeline.branch"]()
    left = {tli: (place - 1) * each // LOG for tli, place in way["parents"].items()}
    newest = {}
    for segment, digest in _archived():
        timeline = int(segment[:8], 16)
        own = way["timeline"] in (None, timeline)
        if own or _number(segment, each) <= left.get(timeline, -1):
            newest[segment[8:]] = (segment, digest)
    return [newest[place] for place in sorted(newest) if place >= chosen["wal"][8:]]


def _fetched(segment: str) -> str:
    """The checksum of a segment as a server that asks for it gets it."""
    # A name of its own: another restore may read the same one.
    scratch = f"{__salt__['slmdb_pgbackrest.work']()}/segment-{secrets.token_hex(8)}"
    try:
        __salt__["slmdb_pgbackrest.run"]("archive-get", segment, scratch)
        data = __salt__["slmdb_file.read"](scratch) or b""
    finally:
        __salt__["slmdb_file.remove"](scratch)
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
