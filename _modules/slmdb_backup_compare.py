"""
A restored copy held against its source: is everything there, and can it be read?

A source that is written meanwhile raises no false alarm. What is compared are the rows that were
committed before the drill began: those that the source still has must be in the copy.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

try:
    import psycopg2
    from psycopg2 import sql
    from psycopg2.extras import RealDictCursor
except ImportError:
    psycopg2 = None

__virtualname__ = "slmdb_backup_compare"

# Sessions tell what they wrote at the latest after 10 s without work (PostgreSQL 15 and later).
GRACE = 12
SHOWN = 10
DATABASES = "SELECT datname AS name FROM pg_database WHERE datallowconn AND datconnlimit <> -2"
BEGINNING = """
SELECT mod(pg_snapshot_xmin(pg_current_snapshot())::text::numeric, 4294967296)::text AS xid,
       current_setting('shared_preload_libraries') AS preload,
       current_setting('track_counts')::boolean
       AND current_setting('server_version_num')::int >= 150000 AS counts
"""
TABLES = """
SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, c.relkind AS kind,
       c.relpersistence = 'p' AS lasting, pg_relation_filenode(c.oid)::bigint AS file,
       coalesce(s.n_tup_ins + s.n_tup_upd + s.n_tup_del, 0)::bigint AS writes
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
 WHERE c.relkind IN ('r', 'm') AND c.relispopulated AND c.relpersistence <> 't'
 ORDER BY c.relpages DESC, c.oid
"""
OLD = "SELECT count(*) FILTER (WHERE age(xmin) > (SELECT age({}::xid))) AS rows FROM ONLY {}.{}"


def __virtual__() -> str:
    return __virtualname__


class _Server:
    """One server, asked database by database."""

    def __init__(self, gentle: bool = False, **where: Any) -> None:
        self.gentle, self.where = gentle, where
        self.name: str | None = None
        self.kept: Any = None

    def connection(self, database: str) -> Any:
        if self.name != database or self.kept.closed:
            self.close()
            self.kept = __salt__["slmdb_server.connect"](database, **self.where)
            self.kept.autocommit, self.name = True, database
            if self.gentle:
                self._yield()
        return self.kept

    def _yield(self) -> None:
        """Count rows of the source only while nobody else needs its processor or waits for us."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.kept.info.backend_pid, 19)
        with self.kept.cursor() as cursor:
            cursor.execute("SET lock_timeout = '2s'; SET max_parallel_workers_per_gather = 0")

    def ask(self, statement: Any, values: Any = None, database: str = "postgres") -> list[dict]:
        try:
            with self.connection(database).cursor(cursor_factory=RealDictCursor) as cursor:
                cursor.execute(statement, values)
                return [dict(row) for row in cursor.fetchall()]
        except psycopg2.Error as err:
            raise CommandExecutionError(_words(err)) from None

    def close(self) -> None:
        if self.kept is not None:
            self.kept.close()
        self.name = None


def _words(err: Exception) -> str:
    found = getattr(getattr(err, "diag", None), "message_primary", None)
    return found or (str(err).strip().splitlines() or [type(err).__name__])[0]


def _tables(server: _Server, database: str) -> dict[int, dict[str, Any]]:
    return {row["oid"]: row for row in server.ask(TABLES, database=database)}


def _revision(server: _Server) -> Any:
    """Which migrations a server's database has; None if it has no such database."""
    try:
        found = __salt__["slmdb_migration.tracked"](server.ask)
    except CommandExecutionError:
        return None
    return {key: found[key] for key in ("tracked_by", "current", "applied")}


def source() -> dict[str, Any]:
    """
    Remember what there is on the source, before the marker is set.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_compare.source

    Returns ``xid`` (what is older was committed or undone by now), ``preload``, ``counts``
    (whether the source counts writes), ``databases`` (to their tables) and ``revision``. Raises
    ``CommandExecutionError`` if the server cannot be asked.
    """
    with contextlib.closing(_Server(gentle=True)) as server:
        begun = server.ask(BEGINNING)[0]
        names = [row["name"] for row in server.ask(DATABASES)]
        databases = {name: _tables(server, name) for name in names}
        return {**begun, "databases": databases, "revision": _revision(server)}


def problems(
    before: dict[str, Any], transaction: str, **where: Any
) -> tuple[list[str], dict[str, int]]:
    """
    Compare a copy with its source, and read every table of it.

    For callers in Python.

    before
        What ``source`` returned.
    transaction
        The id of the marker.
    where
        How libpq reaches the copy.

    Returns lines, and how many ``databases``, ``tables`` and ``rows`` were read, how many tables
    were ``equal``, ``written`` since or ``locked`` on the source, and ``checksums`` (whether the
    copy's pages have any). Raises ``CommandExecutionError`` if the source
    cannot be asked.
    """
    seen = dict.fromkeys(("databases", "tables", "rows", "equal", "written", "locked"), 0)
    lines: list[str] = []
    with (
        contextlib.closing(_Server(gentle=True)) as ours,
        contextlib.closing(_Server(**where)) as copy,
    ):
        lines += _marker(copy, transaction)
        there = {row["name"] for row in copy.ask(DATABASES)}
        here = {row["name"] for row in ours.ask(DATABASES)}
        for name in sorted(there):
            seen["databases"] += 1
            lines += _readable(copy, name, seen)
        for name in sorted(here & before["databases"].keys()):
            if name in there:
                lines += _rows(ours, copy, name, before, seen)
            else:
                lines.append(f"database {name} is not in the copy")
        lines += _same_revision(ours, copy, before["revision"])
        damaged = (
            "SELECT coalesce(sum(checksum_failures), 0)::bigint AS pages FROM pg_stat_database"
        )
        pages = copy.ask(damaged)[0]["pages"]
        lines += [f"{pages} pages of the copy have a wrong checksum"] if pages else []
    # The catalogs lack a lost table's rows as well; the table itself says more.
    return sorted(lines, key=lambda line: ".pg_catalog." in line), seen


def _marker(copy: _Server, transaction: str) -> list[str]:
    try:
        found = copy.ask("SELECT pg_xact_status(%s::text::xid8) AS status", [transaction])
    except CommandExecutionError as err:
        found = [{"status": str(err)}]
    if found[0]["status"] == "committed":
        return []
    end = copy.ask("SELECT pg_walfile_name(pg_current_wal_lsn()) AS wal")[0]["wal"]
    return [
        f"the marker, transaction {transaction}, is not in the copy "
        f"({found[0]['status']}): the WAL that could be replayed ends before {end}"
    ]


def _readable(copy: _Server, database: str, seen: dict[str, int]) -> list[str]:
    """Read every value of every table, without carrying it anywhere."""
    lines = []
    for row in _tables(copy, database).values():
        name = sql.Identifier(row["schema"], row["name"])
        what = sql.SQL("(SELECT * FROM {})").format(name) if row["kind"] == "m" else name
        statement = sql.SQL("COPY {} TO '/dev/null'").format(what)
        try:
            with copy.connection(database).cursor() as cursor:
                cursor.execute(statement)
                seen["rows"] += cursor.rowcount
                seen["tables"] += 1
        except psycopg2.Error as err:
            lines.append(f"table {database}.{_name(row)} cannot be read: {_words(err)}")
    return lines


def _name(row: dict[str, Any]) -> str:
    return f"{row['schema']}.{row['name']}"


def _rows(
    ours: _Server, copy: _Server, database: str, before: dict[str, Any], seen: dict[str, int]
) -> list[str]:
    """Compare rows; what looks wrong is looked at once more, when all writes are counted."""
    known = {oid: row for oid, row in before["databases"][database].items() if row["lasting"]}
    doubts = _doubts(ours, copy, database, known, before, seen)
    if not doubts:
        return []
    time.sleep(GRACE)
    again = {oid: known[oid] for oid in doubts}
    return list(_doubts(ours, copy, database, again, before, dict(seen)).values())


def _doubts(
    ours: _Server,
    copy: _Server,
    database: str,
    known: dict[int, dict[str, Any]],
    before: dict[str, Any],
    seen: dict[str, int],
) -> dict[int, str]:
    there, found = _tables(copy, database), {}
    counts = {oid: _old_rows(ours, database, row, before["xid"]) for oid, row in known.items()}
    # Read last: what was written until then counts as written.
    now = _tables(ours, database)
    for oid, row in known.items():
        name, count = f"table {database}.{_name(row)}", counts[oid]
        if oid not in now:
            continue
        if oid not in there:
            found[oid] = f"{name} is not in the copy"
            continue
        rows = _old_rows(copy, database, there[oid], before["xid"])
        if count is None or rows is None:  # what cannot be read is named elsewhere
            seen["locked"] += count is None
            continue
        written = now[oid]["writes"] != row["writes"] or now[oid]["file"] != there[oid]["file"]
        seen["equal" if rows == count else "written"] += 1
        # Rows that only the copy has were deleted since: then the source has counted a write.
        if rows < count or (rows > count and before["counts"] and not written):
            found[oid] = f"{name} has {rows} rows in the copy, {count} on the source"
    return found


def _old_rows(server: _Server, database: str, row: dict[str, Any], xid: str) -> int | None:
    """Count the rows that are older than the drill; None if the table is gone, locked or broken."""
    names = (sql.Identifier(row["schema"]), sql.Identifier(row["name"]))
    statement = sql.SQL(OLD).format(sql.Literal(xid), *names)
    try:
        return server.ask(statement, database=database)[0]["rows"]
    except CommandExecutionError:
        return None


def _same_revision(ours: _Server, copy: _Server, before: Any) -> list[str]:
    found = _revision(copy)
    if found in (before, _revision(ours)):
        return []
    return [f"the copy is at revision {_short(found)}, the source at {_short(before)}"]


def _short(found: Any) -> str:
    if not found:
        return "none"
    return ", ".join([*found["current"], *found["applied"][-1:]]) or "none"


def check(**where: Any) -> list[str]:
    """
    Let pg_amcheck look at every table and index of the copy.

    For callers in Python.

    where
        How libpq reaches the copy; its extension is installed there.

    Every row must be found in every index, and the levels of an index must agree: the locks that
    this takes disturb nobody in a copy. Returns lines, at most ten. Raises nothing.
    """
    found = __salt__["slmdb_instance.facts"]()
    words = [f"{found['bin_directory']}/pg_amcheck", "--all", "--install-missing"]
    words += ["--heapallindexed", "--parent-check", "--no-password", "-U", found["user"]]
    words += ["-h", str(where["host"]), "-p", str(where["port"])]
    environment = {"PGOPTIONS": __salt__["slmdb_server.options"]()}
    listen = __salt__["slmdb_program.listen"]
    status, output, errors = listen(*words, as_server=True, environment=environment)
    if not status:
        return []
    killed = __salt__["slmdb_program.fate"](status)
    if killed:
        return [f"pg_amcheck {killed}"]
    lines = [line.strip() for line in (output + errors).splitlines() if line.strip()]
    return [f"pg_amcheck: {line}" for line in lines[:SHOWN] or ["failed without a word"]]
