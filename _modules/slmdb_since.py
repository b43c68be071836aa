"""Since when each setting waits for a restart: remembered on the host between runs."""

from __future__ import annotations

import os
import time
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_since"

RECORD = "/var/lib/autobot-slm-database/pending.json"


def __virtual__() -> str:
    return __virtualname__


def remember(rows: list[dict[str, Any]]) -> None:
    """
    Keep since when each setting waits for a restart.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_since.remember '[]'

    rows
        What ``slmdb_config.pending`` returns.
    """
    kept = {row["name"]: {"new": row["new"], "since": row["since"]} for row in rows}
    if kept != _remembered():
        __salt__["slmdb_file.remember"](RECORD, kept)


def _remembered() -> dict[str, dict[str, str]]:
    return __salt__["slmdb_file.remembered"](RECORD) or {}


def when(name: str, new: str, path: str) -> str:
    """
    Return since when a value waits for a restart, in UTC.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_since.when shared_buffers 6GB /etc/postgresql/15/main/postgresql.conf

    name, new
        The setting and the value that waits.

    path
        The file that has the value: when it was written counts if nothing is remembered.
    """
    before = _remembered().get(name, {})
    if before.get("new") == new and before.get("since"):
        return before["since"]
    try:
        moment = time.gmtime(os.stat(path).st_mtime)
    except OSError:
        moment = time.gmtime()
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
