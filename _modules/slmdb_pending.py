"""
What waits for somebody to mean it: restarts, package updates, migrations, and what time brings.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

from salt.exceptions import SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_pending"

# When the community's support of a major ends: https://www.postgresql.org/support/versioning/
END_OF_LIFE = {
    "14": date(2026, 11, 12),
    "15": date(2027, 11, 11),
    "16": date(2028, 11, 9),
    "17": date(2029, 11, 8),
    "18": date(2030, 11, 14),
}
SOON = timedelta(days=183)

# Databases keep the version of their collation since 15; of other collations only those count
# that something uses, since every server lists hundreds.
DATABASES = """
SELECT 'database ' || datname AS what, datcollversion AS recorded,
       pg_database_collation_actual_version(oid) AS actual
  FROM pg_database
 WHERE datallowconn AND datcollversion <> pg_database_collation_actual_version(oid)
 ORDER BY 1
"""
COLLATIONS = """
SELECT 'collation ' || collname || ' in database ' || current_database() AS what,
       collversion AS recorded, pg_collation_actual_version(c.oid) AS actual
  FROM pg_collation c
 WHERE collversion <> pg_collation_actual_version(c.oid)
   AND EXISTS (SELECT FROM pg_attribute a WHERE a.attcollation = c.oid AND a.attrelid >= 16384)
 ORDER BY 1
"""


def __virtual__() -> str:
    return __virtualname__


def server_version() -> dict[str, Any] | None:
    """
    Compare the running server with the one that is installed.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pending.server_version

    Returns ``name``, ``old`` (what runs) and ``new`` (what a restart brings); ``None`` if they are
    the same, or no server runs. Raises ``CommandExecutionError`` if the server cannot be asked.
    """
    if not __salt__["slmdb_server.available"]():
        return None
    rows = __salt__["slmdb_server.query"]("SELECT current_setting('server_version') AS version")
    program = f"{__salt__['slmdb_instance.facts']()['bin_directory']}/postgres"
    answer = __salt__["cmd.run_all"]([program, "-V"], python_shell=False, ignore_retcode=True)
    installed = answer["stdout"].strip().removeprefix("postgres (PostgreSQL) ")
    if answer["retcode"] or installed == rows[0]["version"]:
        return None
    return {"name": "server", "old": rows[0]["version"], "new": installed}


def restart() -> list[dict[str, Any]]:
    """
    List what a restart of the server would bring.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pending.restart

    Returns rows with ``name``, ``old`` and ``new``: settings, with ``since`` when they wait,
    ``server`` if another version is installed than runs, ``libraries`` if some of it was replaced
    on disk since it started, and ``unit`` if the server runs outside ours. Raises
    ``CommandExecutionError`` if the server or systemd cannot be asked.
    """
    version = server_version()
    rows = [*__salt__["slmdb_config.pending"](), *([version] if version else [])]
    replaced = ", ".join(__salt__["slmdb_service.replaced"]())
    if replaced:
        rows.append({"name": "libraries", "old": f"{replaced} of before", "new": "as on disk"})
    return rows + __salt__["slmdb_service.parked"]()


def migrations() -> list[dict[str, Any]]:
    """
    List the migrations that the backend's code brings and the database does not have.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pending.migrations

    Returns rows with ``revision`` and ``message``, in the order in which they would be applied,
    up to ``migration:target``, or to the heads where a migration to that is refused; empty without
    a backend. Raises nothing but what wrong settings raise.
    """
    planned = __salt__["slmdb_migration.plan"]()
    if planned["refused"]:
        return __salt__["slmdb_migration.revision"]()["waiting"]
    return planned["steps"]


def collations() -> list[dict[str, Any]]:
    """
    List what was sorted by another version of its collation than the host has now.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pending.collations

    Returns rows with ``what``, ``recorded`` and ``actual``; its indexes need a REINDEX before
    ``ALTER … REFRESH COLLATION VERSION``. Raises ``CommandExecutionError`` if the server cannot be
    asked.
    """
    if not __salt__["slmdb_server.available"]():
        return []
    query = __salt__["slmdb_server.query"]
    major = int(__salt__["slmdb_instance.version"]())
    rows = query(DATABASES) if major >= 15 else []
    database = __salt__["slmdb_pillar.get"]("database")
    if query("SELECT 1 FROM pg_database WHERE datname = %s", [database]):
        rows += query(COLLATIONS, database=database)
    return rows


def end_of_life(today: str | None = None) -> dict[str, str] | None:
    """
    Tell whether the server's major is past the end of its life, or within six months of it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pending.end_of_life

    today
        A date as ``2027-06-01``; ``None``: today.

    Returns ``major``, ``ends`` (a date) and ``comment``; ``None`` if it has more time, or no date
    is known. Raises ``SaltInvocationError`` for what is no date, else what
    ``slmdb_instance.version`` raises.
    """
    major = __salt__["slmdb_instance.version"]()
    try:
        moment = date.fromisoformat(str(today)) if today else date.today()
    except ValueError:
        raise SaltInvocationError(f"today: {today!r} is no date such as 2027-06-01") from None
    ends = END_OF_LIFE.get(major)
    if ends is None or moment < ends - SOON:
        return None
    when = "ended" if moment > ends else "ends"
    comment = f"the community's support of PostgreSQL {major} {when} on {ends}"
    return {"major": major, "ends": str(ends), "comment": comment}


def report(changelog: bool = True) -> dict[str, Any]:
    """
    List everything that is parked, and what will have to be done one day.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pending.report

    changelog
        Whether to look for the updates' changelog, which may take 5 s where there is no network.

    Returns ``restart`` (``name``, ``old``, ``new``, ``since``), ``packages`` (``package``,
    ``installed``, ``candidate``, ``security``, ``state``, ``changelog``), ``migrations``
    (``revision``, ``message``), ``collations`` (``what``, ``recorded``, ``actual``) and
    ``end_of_life`` (``major``, ``ends``, ``comment``, or ``None``). Raises
    ``CommandExecutionError`` if the server cannot be asked.
    """
    packages = __salt__["slmdb_update.available"]()
    for row in packages if changelog else []:
        row["changelog"] = __salt__["slmdb_update.heading"](row["package"], row["candidate"])
    return {
        "restart": restart(),
        "packages": packages,
        "migrations": migrations(),
        "collations": collations(),
        "end_of_life": end_of_life(),
    }


def lines() -> list[str]:
    """
    Say in one line each what is parked: what a maintenance would do.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pending.lines

    Returns lines, empty if nothing is parked. Raises ``CommandExecutionError`` if the server
    cannot be asked.
    """
    said = []
    for row in __salt__["slmdb_update.available"]():
        kind = "security update" if row["security"] else "update"
        kind = "completion" if row["state"] == "interrupted" else kind
        said.append(f"{kind} of {row['package']}: {row['installed']} → {row['candidate']}")
    said += [f"restart for {row['name']}: {row['old']} → {row['new']}" for row in restart()]
    said += [f"migration {row['revision']}: {row['message']}" for row in migrations()]
    return said
