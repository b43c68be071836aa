"""
Schema changes: what the database has, what the backend's code wants, and how one becomes the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

try:
    from psycopg2 import sql
except ImportError:
    sql = None

__virtualname__ = "slmdb_migration"
__func_alias__ = {"script": "sql"}

TABLES = """
SELECT n.nspname AS schema, c.relname AS name
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relname IN (%(table)s, 'migrations_applied')  -- an index finds it among many tables
   AND c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
   AND (c.relname = 'migrations_applied' OR n.nspname = %(schema)s)
 ORDER BY 1, 2
"""
# What an extension brings is none of the application's.
EMPTY = """
SELECT NOT EXISTS (
  SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
   WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
     AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
     AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass
                        AND d.objid = c.oid AND d.deptype = 'e')) AS empty
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


def tracked(query: Callable | None = None) -> dict[str, Any]:
    """
    Read from the database how its schema is tracked, and which revisions it has.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.tracked

    query
        For callers in Python: who asks another server, as ``slmdb_server.query`` asks ours.

    Returns ``tracked_by`` (names of the tables that track, with their schema), ``alembic``
    (whether Alembic's is one of them), ``current`` (Alembic's revisions) and ``applied`` (names in
    ``migrations_applied``, oldest first). Raises ``CommandExecutionError`` if the database cannot
    be asked.
    """
    wanted = __salt__["slmdb_pillar.settings"]()["migration"]
    schema, table = wanted["version_schema"], wanted["version_table"]
    query, where = query or __salt__["slmdb_server.query"], database()
    answer: dict[str, Any] = {"tracked_by": [], "alembic": False, "current": [], "applied": []}
    for row in query(TABLES, {"schema": schema, "table": table}, database=where):
        answer["tracked_by"].append(f"{row['schema']}.{row['name']}")
        if (row["schema"], row["name"]) == (schema, table):
            rows = query(_composed("SELECT version_num FROM {}.{}", schema, table), database=where)
            answer["alembic"] = True
            answer["current"] = sorted(one["version_num"] for one in rows)
        else:
            rows = query(_composed(APPLIED, row["schema"]), database=where)
            answer["applied"] += [one["name"] for one in rows]
    return answer


def empty() -> bool:
    """
    Tell whether the migrations' database holds nothing: no table, view or sequence.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.empty

    Returns a boolean; what belongs to an extension does not count. Raises
    ``CommandExecutionError`` if the database cannot be asked.
    """
    return __salt__["slmdb_server.query"](EMPTY, database=database())[0]["empty"]


def _own_table_only(found: dict[str, Any]) -> bool:
    """Whether the backend tracks its schema itself, and Alembic does not."""
    return bool(found["tracked_by"]) and not found["alembic"]


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
    if backend["deployed"] and _own_table_only(answer):
        answer["state"] = "tracked by the backend"
    elif backend["deployed"]:
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
    if answer["unknown"]:
        # What the database has of the code's revisions cannot be told from one that it lacks.
        answer["state"], answer["up_to_date"] = "unknown revision", False
        return
    answer["waiting"] = [
        {"revision": name, "message": revisions[name]["message"]}
        for name in reversed(graph["order"])
        if name in wanted and name not in reached
    ]
    if not answer["tracked_by"]:
        answer["state"], answer["up_to_date"] = "not tracked", False if revisions else None
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


def _target(given: str | None) -> str:
    """The target that is meant: a shell's ``+1`` or ``0002`` reaches us as a number."""
    if given in (None, ""):
        return __salt__["slmdb_pillar.get"]("migration", "target")
    if not isinstance(given, str):
        raise SaltInvocationError(
            f"target: {given!r} is no text; quote it for Salt as well, as in \"'+1'\" or \"'0002'\""
        )
    return given


def plan(target: str | None = None) -> dict[str, Any]:
    """
    Say what a migration would do, without doing any of it.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_migration.plan

    target
        As for ``alembic upgrade``; ``None``: ``migration:target`` from pillar.

    Returns ``target``, ``current`` (revisions), ``empty`` (whether the database is) and
    ``initialize`` (tables that are missing; the backend's ``initialize()`` runs first then, and
    before the first step on an empty database), ``steps`` (revisions in order, each with
    ``revision`` and ``message``), ``targets`` (revisions the database has afterwards),
    ``left_to_the_backend`` (it tracks its migrations itself) and ``refused`` (why none of it can be
    done, or ``None``). Raises ``SaltInvocationError`` for a target that is no text, and what wrong
    settings raise.
    """
    target = _target(target)
    answer: dict[str, Any] = {
        "target": target,
        "current": None,
        "empty": False,
        "initialize": [],
        "steps": [],
        "targets": [],
        "left_to_the_backend": False,
        "refused": None,
    }
    try:
        _plan(answer, target)
    except CommandExecutionError as err:
        answer["refused"] = str(err)
    return answer


def _plan(answer: dict[str, Any], target: str) -> None:
    backend = __salt__["slmdb_alembic.facts"]()
    if not backend["deployed"]:
        raise CommandExecutionError(backend["problem"])
    found = tracked()
    answer["left_to_the_backend"] = _own_table_only(found)
    if backend["problem"] and not answer["left_to_the_backend"]:
        raise CommandExecutionError(backend["problem"])
    answer["current"], answer["empty"] = found["current"], empty()
    answer["initialize"] = __salt__["slmdb_alembic.missing_tables"]()
    if not answer["left_to_the_backend"]:
        _plan_steps(answer, target, found["current"])
    if answer["initialize"] or answer["steps"]:
        __salt__["slmdb_alembic.environment"]()


def _plan_steps(answer: dict[str, Any], target: str, current: list[str]) -> None:
    graph = __salt__["slmdb_alembic.graph"]()
    unknown = [name for name in current if name not in graph["revisions"]]
    if unknown:
        raise CommandExecutionError(
            f"The database is at revision {_names(unknown)}, which the backend's code does not "
            "know: the code is older than the database; deploy the code that has it"
        )
    if len(graph["heads"]) > 1 and target == "head":
        raise CommandExecutionError(
            f"slm_database:migration:target: head is ambiguous, the history has "
            f"{len(graph['heads'])} heads: {_names(graph['heads'])}; set heads, or one of them"
        )
    if target in current:  # Alembic refuses it where the database is at another arm as well
        answer["targets"] = [target]
        return
    reached = set(__salt__["slmdb_alembic.reached"](graph["revisions"], current))
    try:
        answer.update(__salt__["slmdb_alembic.steps"](target, current))
    except CommandExecutionError as err:
        _explain_target(target, current, reached, err)
    behind = reached.issuperset(answer["targets"]) and not set(current).issuperset(
        answer["targets"]
    )
    if behind and target not in ("head", "heads"):
        _refuse_downgrade(target, current)


def _explain_target(target: str, current: list[str], reached: set, err: Exception) -> None:
    if any(name.startswith(target) for name in reached):
        _refuse_downgrade(target, current)
    raise CommandExecutionError(f"slm_database:migration:target: {target}: {err}") from err


def _refuse_downgrade(target: str, current: list[str]) -> None:
    raise CommandExecutionError(
        f"slm_database:migration:target: {target} is behind {_names(current)}, where the database "
        "is; a downgrade is not done: name a later revision, or restore a backup"
    )


def differences(target: str | None = None) -> dict[str, Any]:
    """
    Say what a migration would change.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_migration.differences

    target
        As for ``alembic upgrade``; ``None``: ``migration:target`` from pillar.

    Returns ``{what: {"old": …, "new": …}}``: ``tables`` if ``initialize()`` runs first,
    ``revision`` with every revision in order and its message; empty if nothing is to be done, if
    the backend tracks its migrations itself, or if it is not deployed. Raises
    ``CommandExecutionError`` if it cannot be done, ``SaltInvocationError`` for a target that is no
    text.
    """
    target = _target(target)
    if target.startswith("+"):
        raise CommandExecutionError(
            f"slm_database:migration:target: {target} is a step, not a place, and a state applied "
            "twice would go twice; name a revision, or call slmdb_migration.apply"
        )
    if not __salt__["slmdb_alembic.facts"]()["deployed"]:
        return {}
    found = plan(target)
    if found["refused"]:
        raise CommandExecutionError(found["refused"])
    changes: dict[str, Any] = {}
    if found["initialize"] or (found["empty"] and found["steps"]):
        missing = f"missing: {_names(found['initialize'])}" if found["initialize"] else "none"
        changes["tables"] = {"old": missing, "new": "made by the backend's initialize()"}
    if found["steps"]:
        lines = [f"{one['revision']}: {one['message'] or '-'}" for one in found["steps"]]
        changes["revision"] = {"old": _names(found["current"]), "new": lines}
    return changes


def script(target: str | None = None) -> str:
    """
    Return the SQL that a migration would run, to be read beforehand.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_migration.sql

    target
        As for ``alembic upgrade``; ``None``: ``migration:target`` from pillar.

    Returns text, empty if nothing is to be done. Raises ``CommandExecutionError`` if it cannot be
    told, for instance because a migration reads the database while it runs.
    """
    found = plan(target)
    if found["refused"]:
        raise CommandExecutionError(found["refused"])
    if not found["steps"]:
        return ""
    if len(found["current"]) > 1:
        raise CommandExecutionError(
            f"Alembic writes SQL from one revision only; the database is at "
            f"{_names(found['current'])}"
        )
    between = f"{(found['current'] or ['base'])[0]}:{found['target']}"
    seconds = __salt__["slmdb_pillar.get"]("migration", "timeout")
    done = __salt__["slmdb_alembic.alembic"](["upgrade", between, "--sql"], seconds)
    if done["retcode"] != 0:
        why = __salt__["slmdb_program.fate"](done["retcode"]) or last_line(done["stderr"])
        raise CommandExecutionError(f"alembic upgrade --sql: {why}")
    return done["stdout"]


def last_line(text: str) -> str:
    """
    Pick the line of a failed command's output that says what went wrong.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.last_line 'ValueError: no'

    text
        What the command wrote to stderr.

    Returns the last line that names an exception, else the last line, shortened. Raises nothing.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*: \S", line)]
    return ((named or lines or ["it said nothing"])[-1])[:300]


def apply(target: str | None = None) -> dict[str, Any]:
    """
    Migrate the database: initialize, restore point, upgrade, read back.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_migration.apply

    target
        As for ``alembic upgrade``; ``None``: ``migration:target`` from pillar.

    Returns what was done: ``permitted`` (why it may), ``initialized``, ``restore_point``, ``from``
    and ``to`` (revisions), ``backup`` (its label). Raises ``CommandExecutionError`` with one line
    if it may not or could not be done; the line says where the database is then, and what leads
    back. Raises ``SaltInvocationError`` for a target that is no text.
    """
    return __salt__["slmdb_migration_run.run"](target)


def summary() -> str:
    """
    Say in one line what this run's migration did, and where the database is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.summary

    Returns text: why it was permitted, the restore point if one was made, and the revision. Raises
    nothing but what wrong settings raise.
    """
    done = __context__.pop("slmdb_migration", None) or {}
    said = [f"Permitted: {done['permitted']}."] if done.get("permitted") else []
    if done.get("restore_point"):
        said.append(f"Restore point: {done['restore_point']}.")
    return " ".join([*said, revision()["comment"]])


def achieved() -> dict[str, Any]:
    """
    Say what is in force of the migration of this run that failed.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_migration.achieved

    Returns ``{what: {"old": …, "new": …}}`` as ``differences`` does: ``tables`` if ``initialize()``
    ran, ``revision`` if revisions were committed; empty if nothing is. Raises nothing.
    """
    done = __context__.pop("slmdb_migration", None) or {}
    changes: dict[str, Any] = {}
    if done.get("initialized"):
        changes["tables"] = {"old": None, "new": "made by the backend's initialize()"}
    if done and done["from"] != done["to"]:
        changes["revision"] = {"old": _names(done["from"]), "new": _names(done["to"])}
    return changes
