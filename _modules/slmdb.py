"""
How the SLM database is: the reports that an operator types. None of them changes anything.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb"

# Values of such PostgreSQL settings hold, or may hold, a password.
SENSITIVE = re.compile(
    r"passw(?!ord_encryption)|passphrase|conninfo|secret|token|credential", re.IGNORECASE
)
HIDDEN = "**********"

TABLES = """
SELECT n.nspname AS schema, c.relname AS name, pg_get_userbyid(c.relowner) AS owner,
       greatest(c.reltuples, 0)::bigint AS rows_estimated, pg_total_relation_size(c.oid) AS bytes
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
 ORDER BY 1, 2
"""


def __virtual__() -> str:
    return __virtualname__


def health(timeout: float | None = None) -> dict[str, Any]:
    """
    Report how the database is, in one structure.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb.health
        salt-call --retcode-passthrough slmdb.health

    timeout
        Seconds within which the report is there, even if the server hangs; ``None``:
        ``health:timeout`` from pillar (2).

    Returns ``healthy``; ``problems`` and ``warnings`` (one line each; only problems make it
    unhealthy); ``server``, ``access``, ``migration``, ``tables``, ``capacity``, ``secret``,
    ``backup`` and ``pending``. The return code is 1 if it is unhealthy. Raises
    ``SaltInvocationError`` for a timeout that is none.
    """
    if timeout is not None:
        __salt__["slmdb_kinds.refuse"]("timeout", "wait", timeout)
    answer = __salt__["slmdb_health.report"](timeout)
    if not answer["healthy"]:
        __context__["retcode"] = 1
    return answer


def pg_isready(timeout: int = 1) -> dict[str, Any]:
    """
    Ask ``pg_isready`` for the application's role and database over the socket.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb.pg_isready

    timeout
        Whole seconds to wait for an answer.

    Returns ``retcode`` and ``line`` as ``pg_isready`` gives them, and has that return code. Raises
    ``SaltInvocationError`` for a timeout that is none.
    """
    __salt__["slmdb_kinds.refuse"]("timeout", "integer", timeout, 1, 3600)
    try:
        answer = __salt__["slmdb_health.ready"](timeout)
    except CommandExecutionError as err:
        answer = {"retcode": 3, "line": str(err)}
    if answer["retcode"]:
        __context__["retcode"] = answer["retcode"]
    return answer


def revision(timeout: float = 30) -> dict[str, Any]:
    """
    Compare the migrations the database has with those the backend's code brings.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb.revision

    timeout
        Seconds that the backend's Alembic may take; it is asked only when its files changed.

    Returns what ``slmdb_migration.revision`` does: ``state``, ``comment``, ``up_to_date``,
    ``tracked_by`` (the tables that track), ``current``, ``heads``, ``waiting`` and more. Raises
    nothing but what wrong settings raise, and ``SaltInvocationError`` for a timeout that is none.
    """
    __salt__["slmdb_kinds.refuse"]("timeout", "wait", timeout)
    return __salt__["slmdb_migration.revision"](timeout)


def schema() -> dict[str, Any]:
    """
    List the tables of the application's database.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb.schema

    Returns ``database``, ``tables`` (``schema.name`` to ``owner``, ``rows_estimated`` and ``bytes``
    with indexes), ``expected`` and ``missing`` (names). Raises ``CommandExecutionError`` if the
    database cannot be asked.
    """
    settings = __salt__["slmdb_pillar.settings"]()
    where, expected = settings["database"], list(settings["health"]["tables"])
    tables, found = {}, set()
    for row in __salt__["slmdb_server.query"](TABLES, database=where):
        name = f"{row.pop('schema')}.{row['name']}"
        found |= {name, row.pop("name")}
        tables[name] = row
    missing = [name for name in expected if name not in found]
    return {"database": where, "tables": tables, "expected": expected, "missing": missing}


def holds_secret(name: str, value: Any) -> bool:
    """
    Tell whether a PostgreSQL setting may hold a password, so that its value is not shown.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb.holds_secret primary_conninfo host=a

    name
        Name of the setting.
    value
        Its value.

    Returns a boolean. Raises nothing.
    """
    return bool(SENSITIVE.search(str(name))) or "password" in str(value).lower()


def _without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    shown = copy.deepcopy(settings)
    for name, value in shown["settings"].items():
        if holds_secret(name, value):
            shown["settings"][name] = HIDDEN
    return shown


def settings() -> dict[str, Any]:
    """
    Show what the formula will use: pillar over the distribution's map over the defaults.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb.settings

    Returns a dictionary of the shape of ``slm_database/defaults.yaml``. It holds no secret: those
    are in no pillar of ours, and PostgreSQL settings that could hold one are masked. Raises
    ``CommandExecutionError`` if the formula cannot be read.
    """
    return _without_secrets(__salt__["slmdb_pillar.settings"]())


def pending() -> dict[str, Any]:
    """
    List everything that waits for somebody to mean it, and what will have to be done one day.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb.pending

    Returns what ``slmdb_pending.report`` does: ``restart`` (each with ``name``, ``old``, ``new``
    and ``since``), ``packages``, ``migrations`` (each with ``revision`` and ``message``),
    ``collations`` and ``end_of_life``. Raises ``CommandExecutionError`` if the server cannot be
    asked.
    """
    return __salt__["slmdb_pending.report"]()
