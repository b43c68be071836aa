"""
Schema changes: what the database has, what the backend's code wants, and how one becomes the other.
"""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError

try:
    from psycopg2 import sql
except ImportError:
    sql = None

__virtualname__ = "slmdb_migration"

TABLES = """
SELECT n.nspname AS schema, c.relname AS name
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
   AND ((n.nspname = %s AND c.relname = %s) OR c.relname = 'migrations_applied')
 ORDER BY 1, 2
"""
APPLIED = "SELECT name FROM {}.migrations_applied ORDER BY applied_at, name"


def __virtual__() -> str:
    return __virtualname__


def database() -> str:
    """
    Say which database the migrations are for.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.database

    Returns ``migration:database`` from pillar, else the application's database. Raises nothing but
    what the settings raise.
    """
    settings = __salt__["slmdb_pillar.settings"]()
    return settings["migration"]["database"] or settings["database"]


def _composed(text: str, *names: str) -> Any:
    if sql is None:
        raise CommandExecutionError("psycopg2 is missing in Salt's Python")
    return sql.SQL(text).format(*(sql.Identifier(name) for name in names))


def tracked() -> dict[str, Any]:
    """
    Read from the database how its schema is tracked, and which revisions it has.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.tracked

    Returns ``tracked_by`` (names of the tables that track, with their schema), ``alembic``
    (whether Alembic's is one of them), ``current`` (Alembic's revisions) and ``applied`` (names in
    ``migrations_applied``, oldest first). Raises ``CommandExecutionError`` if the database cannot
    be asked.
    """
    wanted = __salt__["slmdb_pillar.settings"]()["migration"]
    schema, table = wanted["version_schema"], wanted["version_table"]
    query, where = __salt__["slmdb_server.query"], database()
    answer: dict[str, Any] = {"tracked_by": [], "alembic": False, "current": [], "applied": []}
    for row in query(TABLES, [schema, table], database=where):
        answer["tracked_by"].append(f"{row['schema']}.{row['name']}")
        if (row["schema"], row["name"]) == (schema, table):
            rows = query(_composed("SELECT version_num FROM {}.{}", schema, table), database=where)
            answer["alembic"] = True
            answer["current"] = sorted(one["version_num"] for one in rows)
        else:
            rows = query(_composed(APPLIED, row["schema"]), database=where)
            answer["applied"] += [one["name"] for one in rows]
    return answer


def revision(timeout: float = 30) -> dict[str, Any]:
    """
    Compare the revisions the database has with those the backend's code wants.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.revision

    timeout
        Seconds that the backend's Alembic may take, when it has to be asked again.

    Returns ``state`` (``up to date``, ``behind``, ``unknown revision``, ``not tracked``,
    ``tracked by the backend``, ``not deployed`` or ``unknown``), ``comment`` (the same in one
    line), ``up_to_date`` (``None`` where that cannot be said), ``database``, ``tracked_by``,
    ``alembic``, ``current``, ``applied``, ``heads``, ``waiting`` (what is between the two, in
    order, each with ``revision`` and ``message``), ``unknown`` (what the code does not know) and
    ``branched``. Raises nothing: what cannot be asked is said in ``comment``.
    """
    answer: dict[str, Any] = {
        "state": "unknown",
        "comment": "",
        "up_to_date": None,
        "database": database(),
        "tracked_by": None,
        "alembic": None,
        "current": None,
        "applied": None,
        "heads": None,
        "waiting": [],
        "unknown": [],
        "branched": None,
    }
    troubles = []
    backend = __salt__["slmdb_alembic.facts"]()
    if not backend["deployed"]:
        answer["state"] = "not deployed"
        troubles.append(backend["problem"])
    try:
        answer.update(tracked())
    except CommandExecutionError as err:
        troubles.append(f"The database cannot be asked: {err}.")
    if backend["deployed"]:
        try:
            _compare(answer, __salt__["slmdb_alembic.graph"](timeout))
        except CommandExecutionError as err:
            troubles.append(str(err))
    answer["comment"] = " ".join(troubles + _remarks(answer)).strip()
    return answer


def _compare(answer: dict[str, Any], graph: dict[str, Any]) -> None:
    """Fill in what follows from the code's history and, where it is known, the database's place."""
    revisions = graph["revisions"]
    answer["heads"] = graph["heads"]
    parents = [down for one in revisions.values() for down in one["down"]]
    answer["branched"] = len(parents) != len(set(parents)) or len(graph["heads"]) > 1
    if answer["current"] is None:
        return
    reached = set(__salt__["slmdb_alembic.reached"](revisions, answer["current"]))
    wanted = __salt__["slmdb_alembic.reached"](revisions, graph["heads"])
    answer["unknown"] = [name for name in answer["current"] if name not in revisions]
    answer["waiting"] = [
        {"revision": name, "message": revisions[name]["message"]}
        for name in reversed(graph["order"])
        if name in wanted and name not in reached
    ]
    if answer["unknown"]:
        answer["state"], answer["up_to_date"] = "unknown revision", False
    elif not answer["tracked_by"]:
        answer["state"], answer["up_to_date"] = "not tracked", False if revisions else None
    elif not answer["alembic"]:
        answer["state"], answer["waiting"] = "tracked by the backend", []
    else:
        answer["up_to_date"] = not answer["waiting"]
        answer["state"] = "up to date" if answer["up_to_date"] else "behind"


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _remarks(answer: dict[str, Any]) -> list[str]:
    """The sentences that say what the structure says."""
    said = []
    if answer["state"] == "up to date":
        said.append(f"The database is at {_names(answer['current'])}, as the backend's code wants.")
    elif answer["state"] == "behind":
        names = _names([one["revision"] for one in answer["waiting"]])
        said.append(f"The database is at {_names(answer['current'])}; waiting: {names}.")
    elif answer["state"] == "unknown revision":
        names = _names(answer["unknown"])
        said.append(f"The code does not know revision {names}: it is older than the database.")
    elif answer["state"] == "not tracked":
        said.append("Nothing in the database tracks migrations.")
    if answer["applied"]:
        count, last = len(answer["applied"]), answer["applied"][-1]
        said.append(
            f"migrations_applied, which the backend keeps, has {count}, the last is {last}."
        )
    if answer["heads"] and len(answer["heads"]) > 1:
        said.append(f"The history has {len(answer['heads'])} heads: {_names(answer['heads'])}.")
    return said
