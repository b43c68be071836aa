"""
The configuration's files and the running server: whether it has read them, what it says of them.
"""

from __future__ import annotations

import os
import time
from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_config_file"

PATIENCE = 15
AUTO = "postgresql.auto.conf"  # what ALTER SYSTEM writes

# A setting that waits for a restart is listed there as one that could not be applied, and one that
# was taken out, and waits, as an error without a name, a file and a line.
ERRORS = """
SELECT f.name, f.error, f.sourcefile AS file, f.sourceline AS line,
       s.context IS NOT NULL AS known, f.seqno
  FROM pg_file_settings f LEFT JOIN pg_settings s USING (name)
 WHERE f.error IS NOT NULL
   AND (s.context = 'postmaster' AND f.error = 'setting could not be applied') IS NOT TRUE
   AND NOT (f.name IS NULL AND f.sourcefile IS NULL AND EXISTS (
       SELECT FROM pg_settings waits
        WHERE waits.pending_restart AND position(waits.name IN f.error) > 0))
 UNION ALL SELECT NULL, left_out, NULL, NULL, false, 0 FROM ({left_out}) one
 ORDER BY seqno
"""
# A main file from elsewhere, or an edit, may lack Debian's include_dir.
LEFT_OUT = """
SELECT %(words)s AS left_out WHERE %(ours)s <> '' AND NOT EXISTS (
       SELECT FROM pg_file_settings
        WHERE sourcefile = %(ours)s OR position(%(ours)s IN error) > 0)
"""


def __virtual__() -> str:
    return __virtualname__


def errors() -> list[dict[str, Any]]:
    """
    Return the errors that the server finds in its files, whoever wrote them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config_file.errors

    Returns ``name``, ``error``, ``file``, ``line`` and ``known`` (whether the server has such a
    setting) for each; empty if there is none. Raises CommandExecutionError if the server does not
    answer.
    """
    rows = __salt__["slmdb_server.query"](ERRORS.replace("{left_out}", LEFT_OUT), _ours())
    return [{key: row[key] for key in row if key != "seqno"} for row in rows]


def _ours() -> dict[str, str]:
    found = __salt__["slmdb_instance.facts"]()
    ours = found["conf_file"]
    words = (
        f"{found['config_file']} does not include {os.path.dirname(ours)}, so that nothing in "
        f"{ours} counts; add the line include_dir = 'conf.d' to it, and reload"
    )
    return {"ours": ours if os.path.exists(ours) else "", "words": words}


def paths() -> list[str]:
    """
    Return the files of the configuration, in the order in which a server reads them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config_file.paths
    """
    found = __salt__["slmdb_instance.facts"]()
    directory = f"{found['config_directory']}/conf.d"
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    files = [f"{directory}/{name}" for name in names if name.endswith(".conf")]
    return [found["config_file"], *files, f"{found['data_directory']}/{AUTO}"]


def left_out() -> str | None:
    """
    Say that the running server does not read our file, because its main file does not include it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config_file.left_out

    Returns one line with what to do; None if it reads it, there is none, or no server runs.
    """
    if not __salt__["slmdb_server.available"]():
        return None
    rows = __salt__["slmdb_server.query"](LEFT_OUT, _ours())
    return rows[0]["left_out"] if rows else None


def lines() -> list[str]:
    """
    Say what the server has against its files, one line each with file and line.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config_file.lines

    Returns lines; empty if there is nothing. Raises as ``errors`` does.
    """
    found = []
    for row in errors():
        said = f"{row['name']}: {row['error']}" if row["name"] else row["error"]
        where = f"{row['file']}, line {row['line']}: " if row["file"] else ""
        found.append(f"{where}{said}")
    return found


def unread(paths: list[str]) -> bool:
    """
    Tell whether a running server has not read its configuration since a file of it was written.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config_file.unread '[/etc/postgresql/15/main/pg_hba.conf]'

    paths
        The files.

    Returns false if no server runs.
    """
    if not __salt__["slmdb_server.available"]():
        return False
    newest = max((os.stat(path).st_mtime for path in paths if os.path.exists(path)), default=0)
    return _load_time() < newest


def _load_time() -> float:
    rows = __salt__["slmdb_server.query"](
        "SELECT extract(epoch FROM pg_conf_load_time())::float AS at"
    )
    return rows[0]["at"]


def load(paths: list[str], written: bool = False) -> None:
    """
    Let the running server read its configuration again, and wait until it has.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config_file.load '[/etc/postgresql/15/main/pg_hba.conf]'

    paths
        Files whose present content must have been read.
    written
        Whether they were written just now: then they are read, whatever the clock says.

    A server that keeps us out has to read them, too. Raises CommandExecutionError if it does not
    within 15 s.
    """
    _not_later(paths)
    refused = __salt__["slmdb_server.refused"]
    before = _load_time() if written and not refused() else None
    deadline = time.monotonic() + PATIENCE
    again = 0.0
    while (words := refused()) or unread(paths) or (before and _load_time() == before):
        if time.monotonic() > deadline:
            reason = f": it does not let us in: {words}" if words else ""
            raise CommandExecutionError(f"the server did not read its configuration again{reason}")
        if time.monotonic() >= again:
            __salt__["slmdb_service.reload"]()
            again = time.monotonic() + 2
        time.sleep(0.05)
    # A session that is older than the reload keeps some settings (log_connections, say) for life.
    __salt__["slmdb_server.forget"]()


def _not_later(paths: list[str]) -> None:
    """A file of before the clock was set back would look unread for as long."""
    for path in paths:
        if os.path.exists(path) and os.stat(path).st_mtime > time.time():
            os.utime(path)
