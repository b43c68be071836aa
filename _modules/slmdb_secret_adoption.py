"""
Taking over the role and the databases of an older install under new names.

Under their old names nothing has to be done here: ``role``, ``database`` and ``databases`` name
them and ``adopt:credentials_file`` is where ``slmdb_secret`` finds the password.
"""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_secret_adoption"

_SESSIONS = """
SELECT count(*) AS sessions FROM pg_catalog.pg_stat_activity
WHERE backend_type = 'client backend' AND application_name NOT LIKE 'slmdb%%'
  AND pid <> pg_backend_pid() AND {} = %s
"""


def __virtual__() -> str:
    return __virtualname__


def differences() -> dict[str, dict[str, Any]]:
    """
    Say what would be renamed.

    Returns ``{what: {"old": …, "new": …}}``, empty if ``slm_database:adopt`` asks for nothing or
    all is done. Raises ``CommandExecutionError`` if it cannot be done without interrupting the
    backend, both names exist, the password would be lost, or an empty database would come to
    stand beside that of the last apply.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_adoption.differences
    """
    changes = _renamed()
    for line in beside(list(changes)):
        raise CommandExecutionError(line)
    return changes


def beside(renamed: list[str] | None = None) -> list[str]:
    """
    Say which of the role and the database of the last apply would get an empty one beside it.

    renamed
        What is about to be renamed, such as ``role slm_app``; none of that is said.

    Returns one line each; empty if pillar still names them, they are gone, or the new ones are
    there already. Raises ``CommandExecutionError`` if the server cannot be asked.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_adoption.beside
    """
    last, lines = __salt__["slmdb_pillar.recorded"]() or {}, []
    for kind in ("role", "database"):
        wanted, read = (__salt__[f"slmdb_{kind}.{verb}"] for verb in ("wanted", "read"))
        old, new = last.get(kind), __salt__["slmdb_pillar.get"](kind)
        if not old or old in wanted() or f"{kind} {old}" in (renamed or []):
            continue
        if list(read([old, new])) == [old]:
            lines.append(
                f"slm_database:{kind}: {kind} {old} of the last apply is here, and {new} would be "
                f"made empty beside it: rename it with slm_database:adopt, or name {old} in "
                f"slm_database:{kind}s if it is to stay"
            )
    return lines


def _renamed() -> dict[str, dict[str, Any]]:
    adopt = __salt__["slmdb_pillar.get"]("adopt")
    role = __salt__["slmdb_pillar.get"]("role")
    old = adopt.get("role")
    if not adopt.get("rename"):
        if old and old != role:
            raise CommandExecutionError(
                f"slm_database:adopt:role: {old} keeps its name unless adopt:rename is true: set "
                f"slm_database:role: {old} as well"
            )
        return {}
    changes = {}
    if old and _to_rename("role", "pg_roles", "rolname", old, role):
        _check_password(adopt, old)
        _check_idle("role", "usename", old)
        changes[f"role {old}"] = {"old": old, "new": role}
    for before, after in (adopt.get("databases") or {}).items():
        if _to_rename("database", "pg_database", "datname", before, after):
            _check_idle("database", "datname", before)
            changes[f"database {before}"] = {"old": before, "new": after}
    return changes


def apply() -> None:
    """
    Rename the role and the databases, all in one transaction.

    Returns nothing. Raises ``CommandExecutionError`` as ``differences`` does; nothing was renamed
    then.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_adoption.apply
    """
    from psycopg2 import sql

    statements = []
    for what, change in differences().items():
        kind = sql.SQL(what.split(" ", 1)[0].upper())
        names = sql.Identifier(change["old"]), sql.Identifier(change["new"])
        statements.append((sql.SQL("ALTER {} {} RENAME TO {}").format(kind, *names), None))
    __salt__["slmdb_server.forget"]()
    if statements:
        __salt__["slmdb_server.execute"](statements)


def _to_rename(kind: str, table: str, column: str, old: str, new: str) -> bool:
    from psycopg2 import sql

    if old == new:
        return False
    statement = sql.SQL("SELECT {0} AS name FROM pg_catalog.{1} WHERE {0} IN (%s, %s)")
    names = sql.Identifier(column), sql.Identifier(table)
    rows = __salt__["slmdb_server.query"](statement.format(*names), (old, new))
    found = {row["name"] for row in rows}
    if found == {old, new}:
        raise CommandExecutionError(
            f"slm_database:adopt: {kind} {old} cannot be renamed, {kind} {new} exists already: "
            "rename or drop one of them"
        )
    return old in found


def _check_password(adopt: dict[str, Any], role: str) -> None:
    """Refuse if nobody would know the password afterwards: renaming a role clears an MD5 one."""
    path = adopt.get("credentials_file")
    if __salt__["slmdb_verifier.kind"](role) == "md5" and not path:
        raise CommandExecutionError(
            f"slm_database:adopt:credentials_file: name the file with the password of {role}: "
            "it is stored as MD5, which a new name clears"
        )
    if not path:
        # What refuses to choose a password now would refuse after the renaming.
        want = {**__salt__["slmdb_secret_plan.wanted"](), "role": role}
        __salt__["slmdb_secret_plan.plan"](want)
    elif not __salt__["slmdb_secret_plan.adopted_in_step"](path, role):
        raise CommandExecutionError(
            f"slm_database:adopt:credentials_file: the password in {path} is not that of {role}"
        )


def _check_idle(kind: str, column: str, name: str) -> None:
    rows = __salt__["slmdb_server.query"](_SESSIONS.format(column), (name,))
    if rows[0]["sessions"]:
        raise CommandExecutionError(
            f"slm_database:adopt:rename: {kind} {name} has {rows[0]['sessions']} sessions, which a "
            "new name would cut off: stop the backend first, or keep the old names"
        )
