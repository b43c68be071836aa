"""
The application's role and the extra ones: their attributes and memberships.

Passwords are not this noun's: ``slmdb_secret`` keeps them. Rows are read once for all roles, so
a thousand of them cost one query.
"""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_role"

# What pillar calls it: (column of pg_roles, words for ALTER ROLE when on and when off).
ATTRIBUTES = {
    "login": ("rolcanlogin", "LOGIN", "NOLOGIN"),
    "superuser": ("rolsuper", "SUPERUSER", "NOSUPERUSER"),
    "createdb": ("rolcreatedb", "CREATEDB", "NOCREATEDB"),
    "createrole": ("rolcreaterole", "CREATEROLE", "NOCREATEROLE"),
    "replication": ("rolreplication", "REPLICATION", "NOREPLICATION"),
    "bypassrls": ("rolbypassrls", "BYPASSRLS", "NOBYPASSRLS"),
    "inherit": ("rolinherit", "INHERIT", "NOINHERIT"),
}
READ = """
SELECT rolname, rolcanlogin, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls,
       rolinherit, rolconnlimit,
       ARRAY(SELECT g.rolname::text FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
             WHERE m.member = r.oid ORDER BY 1) AS member_of
FROM pg_roles r WHERE rolname = ANY(%s)
"""


def __virtual__() -> str:
    return __virtualname__


def wanted() -> dict[str, dict[str, Any]]:
    """
    Return the roles that the settings ask for.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.wanted

    Returns role names with ``login``, ``member_of``, ``connection_limit``; a role may log in if
    it is the application's or has a source for a password. Raises as ``slmdb_pillar.get`` does.
    """
    get = __salt__["slmdb_pillar.get"]
    roles: dict[str, dict[str, Any]] = {get("role"): {"login": True}}
    for name, options in get("roles").items():
        options = options or {}
        roles[name] = {
            "login": bool(options.get("secret") or options.get("password_pillar")),
            "member_of": sorted(options.get("member_of") or []),
            "connection_limit": options.get("connection_limit", -1),
        }
    return roles


def read(names: list[str]) -> dict[str, dict[str, Any]]:
    """
    Return roles as the server has them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.read '[autobot_slm]'

    names
        Names of roles.

    Returns those that exist, with the keys of ``wanted``. Raises ``CommandExecutionError`` if the
    server does not answer.
    """
    found = {}
    for row in __salt__["slmdb_server.query"](READ, [names]):
        role = {what: row[column] for what, (column, _, _) in ATTRIBUTES.items()}
        role["member_of"] = row["member_of"]
        role["connection_limit"] = row["rolconnlimit"]
        found[row["rolname"]] = role
    return found


def _complete(options: dict[str, Any]) -> dict[str, Any]:
    """A wanted role with every attribute; memberships only where they are said."""
    base: dict[str, Any] = {what: what == "inherit" for what in ATTRIBUTES}
    return {**base, "connection_limit": -1, **options}


def differences(roles: dict[str, dict[str, Any]] | None = None) -> dict:
    """
    Compare the roles of the server with the wanted ones.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.differences

    roles
        Role names with their attributes; default: those of the settings.

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if the server does not answer.
    """
    roles = wanted() if roles is None else roles
    present = read(list(roles))
    changes: dict = {}
    for name, options in roles.items():
        if name not in present:
            changes[f"role {name}"] = {"old": None, "new": "present"}
            continue
        for what, value in _complete(options).items():
            old = present[name][what]
            if what == "member_of" and not set(value) - set(old):
                continue
            if old != value:
                changes[f"role {name}: {what}"] = {"old": old, "new": value}
    return changes


def _statements(name: str, options: dict[str, Any], exists: bool) -> list:
    from psycopg2 import sql

    role = sql.Identifier(name)
    complete = _complete(options)
    words = [ATTRIBUTES[what][1 if complete[what] else 2] for what in ATTRIBUTES]
    # The connection limit is an integer by the pillar's check and is rendered as one.
    words.append(f"CONNECTION LIMIT {int(complete['connection_limit'])}")
    verb = sql.SQL("ALTER ROLE {} " if exists else "CREATE ROLE {} ").format(role)
    statements = [(verb + sql.SQL(" ".join(words)), None)]
    for group in complete.get("member_of", []):
        statements.append((sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), role), None))
    return statements


def apply(roles: dict[str, dict[str, Any]] | None = None) -> None:
    """
    Create or alter the roles, all in one transaction.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.apply

    roles
        Role names with their attributes; default: those of the settings.

    Returns nothing. Raises ``CommandExecutionError`` with the server's words; nothing is changed
    then.
    """
    roles = wanted() if roles is None else roles
    changed = {key.split(" ", 1)[1].rsplit(": ", 1)[0] for key in differences(roles)}
    present = read(list(roles))
    created: list = []
    altered: list = []
    for name in changed:
        statements = _statements(name, roles[name], name in present)
        created.append(statements[0])
        altered += statements[1:]
    __salt__["slmdb_server.execute"](created + altered)


def drop(name: str) -> None:
    """
    Drop a role that owns nothing any more.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.drop autobot_old

    name
        Name of the role.

    Returns nothing. Raises ``CommandExecutionError`` with the server's words, for instance if it
    still owns something.
    """
    from psycopg2 import sql

    if not read([name]):
        return
    try:
        statement = sql.SQL("DROP ROLE {}").format(sql.Identifier(name))
        __salt__["slmdb_server.execute"](statement)
    except CommandExecutionError as err:
        raise CommandExecutionError(f"role {name}: {err}") from err


def leftovers() -> dict:
    """
    Name the roles of the settings that exist and that ``slm_database:clean:role`` gives up.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty without that key or without a server. Raises
    ``CommandExecutionError`` if the server does not answer.
    """
    if not __salt__["slmdb_pillar.get"]("clean", "role"):
        return {}
    if not __salt__["slmdb_server.available"]():
        return {}
    present = read(list(wanted()))
    return {f"role {name}": {"old": "present", "new": "absent"} for name in sorted(present)}


def remove() -> None:
    """
    Drop the roles that ``leftovers`` names; what they own goes to ``postgres`` first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.remove

    Returns nothing. Raises ``CommandExecutionError`` with the server's words.
    """
    from psycopg2 import sql

    names = [label.partition(" ")[2] for label in leftovers()]
    rows = __salt__["slmdb_server.query"]("SELECT datname FROM pg_database WHERE datallowconn")
    for row in rows:
        for name in names:
            role = sql.Identifier(name)
            statements = [
                (sql.SQL("REASSIGN OWNED BY {} TO postgres").format(role), None),
                (sql.SQL("DROP OWNED BY {}").format(role), None),
            ]
            __salt__["slmdb_server.execute"](statements, database=row["datname"])
    for name in names:
        drop(name)
