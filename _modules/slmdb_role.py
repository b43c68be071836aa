"""
The application's role and the extra ones: their attributes and memberships.

Passwords are not this noun's: ``slmdb_secret`` keeps them. Rows are read once for all roles, so
a thousand of them cost one query.
"""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

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
# From 16 on a membership is one of its grantor, of which there may be several, and is taken away
# by that name alone. Before, the grantor is a note that nothing depends on, of a role that may be
# gone.
READ = """
SELECT rolname, rolcanlogin, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls,
       rolinherit, rolconnlimit,
       CASE WHEN rolvaliduntil < 'infinity' THEN rolvaliduntil::text END AS valid_until,
       ARRAY(SELECT json_build_object('group', g.rolname, 'admin', m.admin_option,
                    'powerful', g.rolname ~ '^pg_' OR g.rolsuper OR g.rolcreaterole OR g.rolcreatedb
                                OR g.rolreplication OR g.rolbypassrls,
                    'grantor', CASE WHEN current_setting('server_version_num')::int >= 160000
                                    THEN pg_get_userbyid(m.grantor) END)
             FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
             WHERE m.member = r.oid) AS memberships
FROM pg_roles r WHERE rolname = ANY(%s)
"""
ADMIN = " with admin option"


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
            "member_of": list(options.get("member_of") or []),
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

    Returns those that exist, with the keys of ``wanted``, ``valid_until`` (``None``: for ever) and
    ``memberships`` (each with ``group``, ``admin``, ``powerful`` (whether the group is a predefined
    role or has an attribute beyond login) and, from PostgreSQL 16 on, ``grantor``). Raises
    ``CommandExecutionError`` if the server does not answer.
    """
    found = {}
    for row in __salt__["slmdb_server.query"](READ, [names]):
        role = {what: row[column] for what, (column, _, _) in ATTRIBUTES.items()}
        held = {one["group"] + (ADMIN if one["admin"] else "") for one in row["memberships"]}
        role["member_of"] = sorted(held)
        role["memberships"] = row["memberships"]
        role["connection_limit"] = row["rolconnlimit"]
        role["valid_until"] = row["valid_until"]
        found[row["rolname"]] = role
    return found


def _groups(options: dict[str, Any], found: dict[str, Any] | None) -> list[str]:
    """
    The wanted memberships. A role of which nothing is said, the application's, keeps those by which
    it may reach its tables, and none that makes it more than an application.
    """
    if "member_of" in options:
        return sorted(set(options["member_of"] or []))
    memberships = found["memberships"] if found else []
    return sorted({one["group"] for one in memberships if not one["powerful"]})


def _complete(options: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    """A wanted role with every attribute, and with no membership but those that are wanted."""
    base: dict[str, Any] = {what: what == "inherit" for what in ATTRIBUTES}
    groups = _groups(options, found)
    return {**base, "connection_limit": -1, **options, "valid_until": None, "member_of": groups}


def _unlike(options: dict[str, Any], found: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What of one role differs; a role that is missing does so as a whole, under no name."""
    if found is None:
        return {"": {"old": None, "new": "present"}}
    return {
        what: {"old": found[what], "new": value}
        for what, value in _complete(options, found).items()
        if found[what] != value
    }


def _told(roles: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The settings' roles, or those of a state's own words, by the same rules."""
    if roles is None:
        return wanted()
    __salt__["slmdb_schema.refuse"]("slmdb_role", roles=roles)
    return {name: options or {} for name, options in roles.items()}


def differences(roles: dict[str, dict[str, Any]] | None = None) -> dict:
    """
    Compare the roles of the server with the wanted ones.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_role.differences

    roles
        Role names with their attributes; default: those of the settings.

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if the server does not answer, or has no role that one is to be a
    member of, with the key that says so.
    """
    path = "slm_database:roles" if roles is None else "slmdb_role.present:roles"
    roles = _told(roles)
    present = read(list(roles))
    changes: dict = {}
    for name, options in roles.items():
        for what, change in _unlike(options, present.get(name)).items():
            changes[f"role {name}: {what}" if what else f"role {name}"] = change
    mistakes = _missing_groups(roles, path) if changes else []
    if mistakes:
        raise CommandExecutionError("\n".join(mistakes))
    return changes


def _missing_groups(roles: dict[str, dict[str, Any]], path: str) -> list[str]:
    """A line for each membership of a role that neither is there nor will be."""
    wanted_groups = {
        f"{path}:{name}:member_of:{position}": group
        for name, options in roles.items()
        for position, group in enumerate(options.get("member_of") or [])
        if group not in roles
    }
    there = read(sorted(set(wanted_groups.values()))) if wanted_groups else {}
    return [
        f'{key}: the server has no role "{group}"; correct it, or add it to slm_database:roles'
        for key, group in wanted_groups.items()
        if group not in there
    ]


def _attributes(name: str, options: dict[str, Any], exists: bool) -> tuple:
    """The statement that makes a role, or gives it the wanted attributes."""
    from psycopg2 import sql

    complete = _complete(options, None)
    words = [ATTRIBUTES[what][1 if complete[what] else 2] for what in ATTRIBUTES]
    # The connection limit is an integer by the pillar's check and is rendered as one.
    words.append(f"CONNECTION LIMIT {int(complete['connection_limit'])}")
    if exists:
        words.append("VALID UNTIL 'infinity'")
    verb = sql.SQL("ALTER ROLE {} " if exists else "CREATE ROLE {} ").format(sql.Identifier(name))
    return verb + sql.SQL(" ".join(words)), None


def _revokes(name: str, options: dict[str, Any], found: dict[str, Any] | None) -> list[tuple]:
    """The statements that take away memberships, with what the role handed on by them."""
    from psycopg2 import sql

    groups, statements = _groups(options, found), []
    for one in found["memberships"] if found else []:
        if one["group"] in groups and not one["admin"]:
            continue
        group, role = sql.Identifier(one["group"]), sql.Identifier(name)
        words = sql.SQL("REVOKE {} FROM {}").format(group, role)
        if one["grantor"]:
            words += sql.SQL(" GRANTED BY {}").format(sql.Identifier(one["grantor"]))
        statements.append((words + sql.SQL(" CASCADE"), None))
    return statements


def _grants(name: str, options: dict[str, Any], found: dict[str, Any] | None) -> list[tuple]:
    from psycopg2 import sql

    role, grant = sql.Identifier(name), sql.SQL("GRANT {} TO {}")
    groups = _groups(options, found)
    return [(grant.format(sql.Identifier(group), role), None) for group in groups]


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
    roles = _told(roles)
    present = read(list(roles))
    changed = [name for name in roles if _unlike(roles[name], present.get(name))]
    made, taken, given = [], [], []
    for name in changed:
        made.append(_attributes(name, roles[name], name in present))
        taken += _revokes(name, roles[name], present.get(name))
    # What is taken from one may have been handed on to another, who is to keep it.
    for name in roles if taken else changed:
        given += _grants(name, roles[name], present.get(name))
    __salt__["slmdb_server.execute"](made + taken + given)


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
