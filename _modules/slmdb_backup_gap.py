"""
Gaps in the archived WAL: a restore to its end stops at the first one, without a word.
"""

from __future__ import annotations

import os
import re
from typing import Any

__virtualname__ = "slmdb_backup_gap"

LOG = 1 << 32  # bytes of WAL that share the middle eight digits of a segment's name
SIZE = "SELECT setting::bigint AS bytes FROM pg_settings WHERE name = 'wal_segment_size'"


def __virtual__() -> str:
    return __virtualname__


def _held() -> set[str]:
    """The names of the segments that lie in the repository of this host."""
    path = __salt__["slmdb_pillar.get"]("backup", "path")
    found = os.walk(os.path.join(path, "archive"))
    names = (name for _, _, files in found for name in files)
    return {name[:24] for name in names if re.match(r"[0-9A-F]{24}-", name)}


def first(begin: str, end: str) -> str | None:
    """
    Name the first segment of archived WAL that the repository of this host lacks.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_gap.first 00000001000000000000000A 00000001000000000000000F

    begin, end
        The first and the last segment that should be there.

    Returns its name; ``None`` if there is no gap. Raises ``CommandExecutionError`` if the server,
    which knows how large a segment is, does not answer.
    """
    each = LOG // __salt__["slmdb_server.query"](SIZE)[0]["bytes"]
    held, timeline = _held(), end[:8]
    if begin[:8] != timeline:
        # Which timeline a segment belongs to only its history tells; one of that place will do.
        held = {timeline + name[8:] for name in held}
    start, stop = (int(name[8:16], 16) * each + int(name[16:], 16) for name in (begin, end))
    for number in range(start, stop + 1):
        name = f"{timeline}{number // each:08X}{number % each:08X}"
        if name not in held:
            return name
    return None


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
    if archived is None or chosen["options"][1:] or chosen.get("repository", 1) != 1:
        return None
    found = first(chosen["wal"], archived["wal"])
    return found and (
        f"the archived WAL has a gap at {found}: what was committed from there on is in no restore "
        "until slmdb_backup.create full has made a new beginning"
    )
