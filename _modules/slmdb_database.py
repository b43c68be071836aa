"""
The application's database and the extra ones: owner, extensions, and what PUBLIC may not do.
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_database"

READ = """
SELECT d.datname AS name, pg_get_userbyid(d.datdba) AS owner,
       pg_encoding_to_char(d.encoding) AS encoding, d.datcollate AS locale,
       EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
               WHERE a.grantee = 0 AND a.privilege_type IN ('CONNECT', 'TEMPORARY')) AS public
FROM pg_database d WHERE d.datname = ANY(%s)
"""
INSIDE = """
SELECT has_schema_privilege('public', s.oid, 'CREATE') AS public_creates,
       pg_get_userbyid(s.nspowner) AS schema_owner,
       ARRAY(SELECT extname::text FROM pg_extension) AS extensions
FROM (SELECT 1) one LEFT JOIN pg_namespace s ON s.nspname = 'public'
"""


def __virtual__() -> str:
    return __virtualname__


def wanted() -> dict[str, dict[str, Any]]:
    """
    Return the databases that the settings ask for.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.wanted

    Returns names with ``owner``, ``encoding``, ``locale``, ``extensions``. Raises as
    ``slmdb_pillar.get`` does.
    """
    get = __salt__["slmdb_pillar.get"]
    base = {"encoding": get("encoding"), "locale": get("locale"), "owner": get("role")}
    databases = {get("database"): {**base, "extensions": list(get("extensions"))}}
    for name, options in get("databases").items():
        given = {key: value for key, value in (options or {}).items() if value is not None}
        databases[name] = {**base, "extensions": [], **given}
    return databases


def read(names: list[str]) -> dict[str, dict[str, Any]]:
    """
    Return databases as the server has them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.read '[autobot_slm]'

    names
        Names of databases.

    Returns those that exist, with ``owner``, ``encoding``, ``locale``, ``public`` (whether PUBLIC
    may connect). Raises ``CommandExecutionError`` if the server does not answer.
    """
    rows = __salt__["slmdb_server.query"](READ, [names])
    return {row.pop("name"): row for row in rows}


def differences(databases: dict[str, dict[str, Any]] | None = None) -> dict:
    """
    Compare the databases of the server with the wanted ones.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.differences

    databases
        Names with their options; default: those of the settings.

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Encoding and locale of a
    database that exists cannot be changed and are not among them (``slmdb_instance.report``).
    Raises ``CommandExecutionError`` if the server does not answer.
    """
    databases = wanted() if databases is None else databases
    present = read(list(databases))
    ours = __salt__["slmdb_pillar.get"]("database")
    changes: dict = {}
    for name, options in databases.items():
        label = f"database {name}"
        if name not in present:
            changes[label] = {"old": None, "new": "present"}
            continue
        if present[name]["owner"] != options["owner"]:
            changes[f"{label}: owner"] = {"old": present[name]["owner"], "new": options["owner"]}
        if present[name]["public"]:
            changes[f"{label}: PUBLIC"] = {"old": "may connect", "new": "may not connect"}
        changes.update(_inside(name, options))
        if name != ours:  # hundreds of databases would take all the connections that there are
            __salt__["slmdb_server.forget"](name)
    return changes


def _inside(name: str, options: dict[str, Any]) -> dict:
    """What differs within a database; asking takes a connection to it."""
    row = __salt__["slmdb_server.query"](INSIDE, database=name)[0]
    changes: dict = {}
    if row["public_creates"]:
        changes[f"database {name}: schema public"] = {
            "old": "PUBLIC may create",
            "new": "PUBLIC may not create",
        }
    if row["schema_owner"] not in (None, options["owner"]):
        changes[f"database {name}: owner of schema public"] = {
            "old": row["schema_owner"],
            "new": options["owner"],
        }
    for extension in options["extensions"]:
        if extension not in row["extensions"]:
            changes[f"database {name}: extension {extension}"] = {"old": None, "new": "present"}
    return changes


def _create(name: str, options: dict[str, Any]) -> None:
    from psycopg2 import sql

    statement = sql.SQL(
        "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}"
    ).format(
        sql.Identifier(name),
        sql.Identifier(options["owner"]),
        sql.Literal(options["encoding"]),
        sql.Literal(options["locale"]),
        sql.Literal(options["locale"]),
    )
    __salt__["slmdb_server.execute"](statement)


def apply(databases: dict[str, dict[str, Any]] | None = None) -> None:
    """
    Create the databases that are missing and repair the others.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.apply

    databases
        Names with their options; default: those of the settings.

    Returns nothing. Raises ``CommandExecutionError`` with the server's words.
    """
    from psycopg2 import sql

    databases = wanted() if databases is None else databases
    present = read(list(databases))
    for name, options in databases.items():
        if name not in present:
            _create(name, options)
        owner, database = sql.Identifier(options["owner"]), sql.Identifier(name)
        outside = [
            sql.SQL("ALTER DATABASE {} OWNER TO {}").format(database, owner),
            sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database),
        ]
        __salt__["slmdb_server.execute"]([(statement, None) for statement in outside])
        inside = _inside(name, options)
        statements = [
            sql.SQL("CREATE EXTENSION IF NOT EXISTS {}").format(sql.Identifier(extension))
            for extension in options["extensions"]
        ]
        if any(key.endswith("schema public") for key in inside):
            statements.append(sql.SQL("ALTER SCHEMA public OWNER TO {}").format(owner))
            statements.append(sql.SQL("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
        if inside:
            __salt__["slmdb_server.execute"]([(one, None) for one in statements], database=name)
        if name != __salt__["slmdb_pillar.get"]("database"):
            __salt__["slmdb_server.forget"](name)


def drop(name: str) -> None:
    """
    Drop a database with all its data, ending the sessions in it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.drop autobot_old

    name
        Name of the database.

    Returns nothing. Raises ``CommandExecutionError`` with the server's words.
    """
    from psycopg2 import sql

    __salt__["slmdb_server.forget"]()
    statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    __salt__["slmdb_server.execute"](statement)


def leftovers() -> dict:
    """
    Name the databases of the settings that exist and that ``slm_database:clean:data`` gives up.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty without that key or without a server. Raises
    ``CommandExecutionError`` if the server does not answer.
    """
    if not __salt__["slmdb_pillar.get"]("clean", "data"):
        return {}
    if not __salt__["slmdb_server.available"]():
        return {}
    present = read(list(wanted()))
    return {f"database {name}": {"old": "present", "new": "absent"} for name in sorted(present)}


def remove() -> None:
    """
    Drop the databases that ``leftovers`` names, with all their data.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.remove

    Returns nothing. Raises ``CommandExecutionError`` with the server's words.
    """
    for label in leftovers():
        drop(label.partition(" ")[2])
