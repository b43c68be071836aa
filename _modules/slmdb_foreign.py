"""
What is in the instance and neither the formula's nor PostgreSQL's own: no clean gives it up.
"""

from __future__ import annotations

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_foreign"

DATABASES = """
SELECT 'database ' || datname AS what FROM pg_database WHERE NOT datname = ANY(%s) ORDER BY 1
"""
# initdb makes one role, whose number is always 10; names with pg_ are reserved.
ROLES = """
SELECT 'role ' || rolname AS what FROM pg_roles
WHERE oid <> 10 AND rolname !~ '^pg_' AND NOT rolname = ANY(%s) ORDER BY 1
"""
# What belongs to an extension comes back with it; temporary objects are in schemas with pg_.
OBJECTS = """
WITH present AS (
  SELECT 'pg_namespace'::regclass AS class, oid, oid AS schema, 'schema ' || nspname AS what
    FROM pg_namespace WHERE nspname <> 'public'
  UNION ALL
  SELECT 'pg_class'::regclass, oid, relnamespace, 'relation ' || relname
    FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c')
  UNION ALL
  SELECT 'pg_proc'::regclass, oid, pronamespace, 'routine ' || proname FROM pg_proc
  UNION ALL
  SELECT 'pg_type'::regclass, oid, typnamespace, 'type ' || typname
    FROM pg_type WHERE typtype IN ('d', 'e', 'r')
)
SELECT what || ' in database postgres' AS what
FROM present JOIN pg_namespace n ON n.oid = schema
WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = class AND objid = present.oid
                  AND deptype = 'e')
UNION ALL
SELECT 'large object ' || oid || ' in database postgres' FROM pg_largeobject_metadata
ORDER BY 1
"""


def __virtual__() -> str:
    return __virtualname__


def found() -> list[str]:
    """
    Name the databases and roles that are not the settings', and what is in database ``postgres``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_foreign.found

    Returns one phrase per thing; empty if there is none. Raises ``CommandExecutionError`` if the
    server does not answer.
    """
    query = __salt__["slmdb_server.query"]
    databases = [*__salt__["slmdb_database.wanted"](), "postgres", "template0", "template1"]
    rows = query(DATABASES, [databases])
    rows += query(ROLES, [[*__salt__["slmdb_role.wanted"](), "postgres"]])
    rows += query(OBJECTS, database="postgres")
    return [row["what"] for row in rows]
