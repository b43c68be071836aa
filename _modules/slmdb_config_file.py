"""
What the running server says of its configuration files as they are, loaded or not.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_config_file"

# A setting that waits for a restart is listed there as one that could not be applied.
ERRORS = """
SELECT f.name, f.error, f.sourcefile AS file, f.sourceline AS line,
       s.context IS NOT NULL AS known
  FROM pg_file_settings f LEFT JOIN pg_settings s USING (name)
 WHERE f.error IS NOT NULL
   AND (s.context = 'postmaster' AND f.error = 'setting could not be applied') IS NOT TRUE
 ORDER BY f.seqno
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
    return __salt__["slmdb_server.query"](ERRORS)


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
        found.append(f"{row['file']}, line {row['line']}: {said}")
    return found
