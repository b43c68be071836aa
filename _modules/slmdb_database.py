"""
The application's database and the extra ones: owner, extensions, what the owner may do and PUBLIC
may not, which roles may connect, and that connections are let in.
"""

from __future__ import annotations

import codecs
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_database"

READ = """
SELECT d.datname AS name, pg_get_userbyid(d.datdba) AS owner,
       pg_encoding_to_char(d.encoding) AS encoding, d.datcollate AS locale,
       EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
               WHERE a.grantee = 0 AND a.privilege_type IN ('CONNECT', 'TEMPORARY')) AS public,
       ARRAY(SELECT DISTINCT a.privilege_type
               FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
              WHERE a.grantee = d.datdba ORDER BY 1) AS privileges,
       ARRAY(SELECT pg_get_userbyid(a.grantee)::text FROM aclexplode(d.datacl) a
              WHERE a.grantor = d.datdba AND a.grantee NOT IN (0, d.datdba)
                AND a.privilege_type = 'CONNECT' ORDER BY 1) AS connect,
       d.datallowconn AS allow_connections, d.datconnlimit AS connection_limit,
       current_setting('data_checksums') AS checksums
FROM pg_database d WHERE d.datname = ANY(%s) ORDER BY d.datname
"""
INSIDE = """
SELECT has_schema_privilege('public', s.oid, 'CREATE') AS public_creates,
       pg_get_userbyid(s.nspowner) AS schema_owner,
       ARRAY(SELECT DISTINCT a.privilege_type
               FROM aclexplode(coalesce(s.nspacl, acldefault('n', s.nspowner))) a
              WHERE a.grantee = s.nspowner ORDER BY 1) AS schema_privileges,
       ARRAY(SELECT extname::text FROM pg_extension) AS extensions
FROM (SELECT 1) one LEFT JOIN pg_namespace s ON s.nspname = 'public'
"""
# What every database of ours is, by the names that READ gives it, and in a report's words.
OUTSIDE = {
    "allow_connections": ("connections allowed", True),
    "connection_limit": ("connection limit", -1),
    "privileges": ("owner's privileges", ["CONNECT", "CREATE", "TEMPORARY"]),
}

EXTENSIONS = "SELECT name::text FROM pg_available_extensions"


def __virtual__() -> str:
    return __virtualname__


def wanted() -> dict[str, dict[str, Any]]:
    """
    Return the databases that the settings ask for.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.wanted

    Returns names with ``owner``, ``encoding``, ``locale``, ``extensions`` and ``connect`` (of each
    role that says where it connects, whether that is here). Raises as ``slmdb_pillar.get`` does.
    """
    get = __salt__["slmdb_pillar.get"]
    ours = {get("database"): {"extensions": list(get("extensions"))}}
    found = _complete({**ours, **get("databases")})
    for role, told in get("roles").items():
        names = (told or {}).get("connect")
        if names is None:
            continue
        for name, options in found.items():
            if role != options["owner"]:
                options["connect"][role] = name in names
    return found


def _complete(databases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is not said of a database is as the application's."""
    get = __salt__["slmdb_pillar.get"]
    base = {"encoding": get("encoding"), "locale": get("locale"), "owner": get("role")}
    found = {}
    for name, told in databases.items():
        given = {key: value for key, value in (told or {}).items() if value is not None}
        found[name] = {**base, "extensions": [], "connect": {}, **given}
    return found


def _told(databases: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The settings' databases, or those of a state's own words, by the same rules."""
    if databases is None:
        return wanted()
    __salt__["slmdb_schema.refuse"]("slmdb_database", databases=databases)
    return _complete(databases)


def read(names: list[str]) -> dict[str, dict[str, Any]]:
    """
    Return databases as the server has them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.read '[autobot_slm]'

    names
        Names of databases.

    Returns those that exist, with ``owner``, ``encoding``, ``locale``, ``public`` (whether PUBLIC
    may connect), ``privileges`` (the owner's), ``connect`` (whom the owner lets connect),
    ``allow_connections``, ``connection_limit`` and ``checksums`` (``on`` or ``off``, the same for
    all).
    Raises ``CommandExecutionError`` if the server does not answer.
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
    database that exists cannot be changed and are not among them (``slmdb_instance.report``), nor
    is what is inside of one that lets nobody in. Raises ``CommandExecutionError`` if the server
    does not answer or would refuse, with the key that asks for it.
    """
    of_settings, databases = databases is None, _told(databases)
    present = read(list(databases))
    ours = __salt__["slmdb_pillar.get"]("database")
    changes: dict = {}
    for name, options in databases.items():
        label = f"database {name}"
        if name not in present:
            changes[label] = {"old": None, "new": "present"}
            continue
        found = _outside(present[name], options)
        if present[name]["allow_connections"]:
            found.update(_inside(name, options))
        changes.update({f"{label}: {what}": change for what, change in found.items()})
        if name != ours:  # hundreds of databases would take all the connections that there are
            __salt__["slmdb_server.forget"](name)
    mistakes = _mistakes(databases, of_settings, changes) if changes else []
    if mistakes:
        raise CommandExecutionError("\n".join(mistakes))
    return changes


def _mistakes(databases: dict[str, dict[str, Any]], ours: bool, changes: dict) -> list[str]:
    """A line for each thing that the server would refuse, of what is to be made."""
    available = {row["name"] for row in __salt__["slmdb_server.query"](EXTENSIONS)}
    lines = []
    for name, options in databases.items():
        made = f"database {name}" in changes
        if made:
            path = _path(name, "locale", ours)
            lines += locale_problems(options["locale"], options["encoding"], path)
        for position, one in enumerate(options["extensions"]):
            if not made and f"database {name}: extension {one}" not in changes:
                continue
            path = f"{_path(name, 'extensions', ours)}:{position}"
            if one not in available:
                lines.append(
                    f'{path}: the server has no extension "{one}"; correct it, or add the package '
                    "that brings it to slm_database:packages"
                )
    return lines


def _path(name: str, key: str, ours: bool) -> str:
    """Where a database of the settings, or of a state's own words, has something from."""
    if not ours:
        return f"slmdb_database.present:databases:{name}:{key}"
    own = __salt__["slmdb_pillar.get"]("databases").get(name) or {}
    return f"slm_database:databases:{name}:{key}" if key in own else f"slm_database:{key}"


def locale_problems(locale: str, encoding: str, path: str) -> list[str]:
    """
    Say why no database can have a locale and an encoding together on this host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.locale_problems de_DE.UTF-8 UTF8 slm_database:locale

    locale
        Name of the locale.
    encoding
        Name of the encoding, as the server writes it.
    path
        The key that asks for the locale.

    Returns lines, none if they fit. Raises nothing.
    """
    answer = __salt__["cmd.run_all"](
        ["locale", "charmap"], python_shell=False, env={"LC_ALL": locale}, ignore_retcode=True
    )
    if answer["stderr"]:
        return [f"{path}: this host has no locale {locale}; locale -a lists those that it has"]
    if locale in ("C", "POSIX") or _codec(encoding) in (None, _codec(answer["stdout"])):
        return []
    return [
        f"{path}: {locale} is a locale for {answer['stdout']}, but the encoding is {encoding}; "
        "choose another of the two, or the locale C, which fits every encoding"
    ]


def _codec(name: str) -> str | None:
    """The same name for all names of an encoding; ``None`` for one that only PostgreSQL knows."""
    try:
        return codecs.lookup(name).name
    except LookupError:
        return None


def outside(present: dict[str, dict[str, Any]]) -> dict:
    """
    Compare the wanted databases with those of the server, as far as that takes no connection.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_database.outside '{}'

    present
        As ``read`` gives them.

    Returns what ``differences`` does, without what is inside of them.
    """
    changes: dict = {}
    for name, options in wanted().items():
        if name not in present:
            changes[f"database {name}"] = {"old": None, "new": "present"}
            continue
        for what, change in _outside(present[name], options).items():
            changes[f"database {name}: {what}"] = change
    return changes


def _outside(found: dict[str, Any], options: dict[str, Any]) -> dict:
    """What differs of a database that can be seen from any other."""
    changes: dict = {}
    if found["owner"] != options["owner"]:
        changes["owner"] = {"old": found["owner"], "new": options["owner"]}
    if found["public"]:
        changes["PUBLIC"] = {"old": "may connect", "new": "may not connect"}
    for name, (what, value) in OUTSIDE.items():
        if found[name] != value:
            changes[what] = {"old": found[name], "new": value}
    had = [role for role in found["connect"] if role in options["connect"]]
    let_in = sorted(role for role, may in options["connect"].items() if may)
    if sorted(had) != let_in:
        changes["connect"] = {"old": sorted(had), "new": let_in}
    return changes


def _inside(name: str, options: dict[str, Any]) -> dict:
    """What differs within a database; asking takes a connection to it."""
    row = __salt__["slmdb_server.query"](INSIDE, database=name)[0]
    changes: dict = {}
    if row["public_creates"]:
        changes["schema public"] = {"old": "PUBLIC may create", "new": "PUBLIC may not create"}
    if row["schema_owner"] not in (None, options["owner"]):
        changes["owner of schema public"] = {"old": row["schema_owner"], "new": options["owner"]}
    privileges = ["CREATE", "USAGE"]
    if row["schema_owner"] and row["schema_privileges"] != privileges:
        what = "owner's privileges in schema public"
        changes[what] = {"old": row["schema_privileges"], "new": privileges}
    for extension in options["extensions"]:
        if extension not in row["extensions"]:
            changes[f"extension {extension}"] = {"old": None, "new": "present"}
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
    databases = _told(databases)
    present = read(list(databases))
    for name, options in databases.items():
        if name not in present:
            _create(name, options)
        # First of all it must let in whoever looks at the rest.
        __salt__["slmdb_server.execute"](_repairs_outside(name, options))
        inside = _inside(name, options)
        if inside:
            repairs = _repairs_inside(inside, options)
            __salt__["slmdb_server.execute"](repairs, database=name)
        if name != __salt__["slmdb_pillar.get"]("database"):
            __salt__["slmdb_server.forget"](name)


def _repairs_outside(name: str, options: dict[str, Any]) -> list[tuple]:
    from psycopg2 import sql

    owner, database = sql.Identifier(options["owner"]), sql.Identifier(name)
    statements = [
        sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true CONNECTION LIMIT -1").format(database),
        sql.SQL("ALTER DATABASE {} OWNER TO {}").format(database, owner),
        sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database),
        sql.SQL("GRANT ALL ON DATABASE {} TO {}").format(database, owner),
    ]
    for role, may in options["connect"].items():
        words = "GRANT CONNECT ON DATABASE {} TO {}"
        if not may:
            words = "REVOKE CONNECT ON DATABASE {} FROM {} CASCADE"
        statements.append(sql.SQL(words).format(database, sql.Identifier(role)))
    return [(statement, None) for statement in statements]


def _repairs_inside(inside: dict, options: dict[str, Any]) -> list[tuple]:
    from psycopg2 import sql

    owner = sql.Identifier(options["owner"])
    statements = [
        sql.SQL("CREATE EXTENSION IF NOT EXISTS {} CASCADE").format(sql.Identifier(extension))
        for extension in options["extensions"]
    ]
    if any(what.endswith("schema public") for what in inside):
        statements.append(sql.SQL("ALTER SCHEMA public OWNER TO {}").format(owner))
        statements.append(sql.SQL("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
        statements.append(sql.SQL("GRANT ALL ON SCHEMA public TO {}").format(owner))
    return [(statement, None) for statement in statements]


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
