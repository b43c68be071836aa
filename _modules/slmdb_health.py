"""
What a health report is made of: short questions to the host and the server, all by one deadline.

The server may be down, stopped in the middle of a query or not there at all: whatever cannot be
asked in time becomes a line of the report. Nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_health"

# Beyond this size of pg_class (some 5,000 relations) measuring the database means looking at so
# many files that the report would come late.
LARGE_CATALOGUE = 1024 * 1024
LATE = "the server did not answer in time"
# Shorter waits for a lock are a busy application's own affair, and so are those for an advisory
# one: a standby may wait for its turn for ever. Of very many who wait a report looks at those who
# waited longest.
IN_REPORT = {"longer": 60, "waiters": 100, "advisory": False}  # longer: seconds
IN_FULL = {"longer": 0, "waiters": None, "advisory": True}

STAMP = """AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'"""
# Who holds others up and waits for nobody, with all who wait behind; 0 is a prepared transaction.
BLOCKERS = f"""
WITH RECURSIVE waiting AS (
       SELECT pid, min(waitstart) AS since FROM pg_locks
        WHERE NOT granted AND (%(advisory)s OR locktype <> 'advisory') GROUP BY pid
     ), edges AS (
       SELECT pid, since, unnest(pg_blocking_pids(pid)) AS blocker
         FROM (SELECT * FROM waiting ORDER BY since LIMIT %(waiters)s) longest
        WHERE (SELECT min(since) FROM waiting)
              <= clock_timestamp() - make_interval(secs => %(longer)s)
     ), behind AS (
       SELECT blocker AS root, pid, since FROM edges
        WHERE blocker NOT IN (SELECT pid FROM waiting)
       UNION
       SELECT root, edges.pid, edges.since FROM behind JOIN edges ON edges.blocker = behind.pid
     )
SELECT root AS pid, pg_get_userbyid(usesysid) AS user,
       (SELECT datname FROM pg_database WHERE oid = datid) AS database,
       application_name, backend_type AS kind, state,
       extract(epoch FROM clock_timestamp() - xact_start)::bigint AS seconds,
       to_char(backend_start {STAMP}) AS started, waiting, longest_wait
  FROM (SELECT root, count(DISTINCT pid) AS waiting,
               extract(epoch FROM clock_timestamp() - min(since))::bigint AS longest_wait
          FROM behind GROUP BY root) roots
  LEFT JOIN pg_stat_get_activity(NULL) a ON a.pid = root
 ORDER BY longest_wait DESC, seconds DESC
"""
SERVER = f"""
SELECT current_setting('server_version') AS version,
       to_char(pg_postmaster_start_time() {STAMP}) AS started,
       pg_is_in_recovery() AS in_recovery,
       current_setting('max_connections')::int AS allowed,
       current_setting('superuser_reserved_connections')::int
       + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
       activity.used, activity.oldest_transaction, activity.waiting,
       (SELECT max(age(datfrozenxid)) FROM pg_database) AS transaction_id_age,
       (SELECT sum(checksum_failures)::bigint FROM pg_stat_database) AS checksum_failures,
       (SELECT json_build_object('name', gid, 'user', owner, 'database', database,
               'seconds', extract(epoch FROM clock_timestamp() - prepared)::bigint)
          FROM pg_prepared_xacts ORDER BY prepared LIMIT 1) AS oldest_prepared,
       (SELECT json_build_object('holder', holder, 'age', age)
          FROM (SELECT json_build_object('slot', slot_name) AS holder,
                       greatest(age(xmin), age(catalog_xmin)) AS age
                  FROM pg_get_replication_slots()
                UNION ALL
                SELECT json_build_object('prepared', gid), age(transaction) FROM pg_prepared_xact()
                UNION ALL
                SELECT json_build_object('pid', pid, 'started', to_char(backend_start {STAMP})),
                       greatest(age(backend_xmin), age(backend_xid))
                  FROM pg_stat_get_activity(NULL)
                 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()) held
         WHERE age IS NOT NULL ORDER BY age DESC LIMIT 1) AS oldest_snapshot,
       (SELECT json_agg(json_build_object('name', slot_name, 'status', wal_status,
               'bytes', pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                                             ELSE pg_current_wal_lsn() END, restart_lsn)::bigint)
               ORDER BY slot_name)
          FROM pg_get_replication_slots() WHERE NOT active) AS idle_slots,
       (SELECT json_build_object('mode', current_setting('archive_mode'),
               'archived', last_archived_wal, 'failed', last_failed_wal,
               'archived_at', extract(epoch FROM last_archived_time)::float,
               'failed_at', extract(epoch FROM last_failed_time)::float)
          FROM pg_stat_archiver) AS archiver,
       r.rolcanlogin AS role_may_log_in, r.rolconnlimit AS role_limit,
       CASE WHEN r.rolvaliduntil <= now() THEN r.rolvaliduntil::text END AS role_expired,
       d.datconnlimit AS database_limit, pg_get_userbyid(d.datdba) AS owner,
       has_database_privilege(r.oid, d.oid, 'CONNECT') AS role_may_connect,
       ARRAY(SELECT json_build_array(rolname, datname)
               FROM json_array_elements(%(admitted)s) a
               JOIN pg_roles ON rolname = a ->> 0 JOIN pg_database ON datname = a ->> 1
              WHERE NOT has_database_privilege(pg_roles.oid, pg_database.oid, 'CONNECT')
              ORDER BY rolname, datname) AS shut_out,
       -- As they come into force, each above those before it.
       (SELECT json_agg(json_build_array(s.setconfig, concat(
               CASE WHEN s.setrole <> 0 THEN 'ALTER ROLE ' || quote_ident(r.rolname)
                    WHEN s.setdatabase = 0 THEN 'ALTER ROLE ALL' END,
               CASE WHEN s.setdatabase = 0 THEN '' WHEN s.setrole = 0 THEN 'ALTER DATABASE '
                    ELSE ' IN DATABASE ' END, quote_ident(d.datname)))
               ORDER BY s.setrole <> 0, s.setdatabase <> 0)
          FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole
          LEFT JOIN pg_database d ON d.oid = s.setdatabase
         WHERE (s.setrole = 0 OR r.rolname = %(role)s)
           AND (s.setdatabase = 0 OR d.datname = %(database)s)) AS overrides,
       ARRAY(SELECT datname::text FROM pg_database
              WHERE NOT datistemplate AND datname <> 'postgres' AND NOT datname = ANY(%(databases)s)
              ORDER BY 1) AS other_databases,
       ARRAY(SELECT rolname::text FROM pg_roles
              WHERE oid <> 10 AND rolname !~ '^pg_' AND NOT rolname = ANY(%(roles)s)
              ORDER BY 1) AS other_roles
  FROM (SELECT count(*) AS used, count(*) FILTER (WHERE wait_event_type = 'Lock') AS waiting,
               (array_agg(json_build_object(
                       'pid', pid, 'user', pg_get_userbyid(usesysid),
                       'database', (SELECT datname FROM pg_database WHERE oid = datid),
                       'state', state,
                       'seconds', extract(epoch FROM clock_timestamp() - xact_start)::bigint,
                       'started', to_char(backend_start {STAMP}))
                   ORDER BY xact_start)
                FILTER (WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid())
               )[1] AS oldest_transaction
          FROM pg_stat_get_activity(NULL) -- read once, without the view's names
         WHERE backend_type = 'client backend') activity
  LEFT JOIN pg_roles r ON r.rolname = %(role)s
  LEFT JOIN pg_database d ON d.datname = %(database)s
"""
DATABASE = """
SELECT CASE WHEN pg_relation_size('pg_catalog.pg_class') < %(large)s
            THEN pg_database_size(current_database()) END AS bytes
"""
# Of several tables of a name the one that the role may use; a role that is missing lacks nothing.
TABLES = """
SELECT t AS name, found.owner, found.lacking
  FROM unnest(%(tables)s::text[]) WITH ORDINALITY AS wanted(t, place)
  LEFT JOIN LATERAL (
       SELECT ARRAY(SELECT p FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) p
                     WHERE NOT has_table_privilege(r.oid, c.oid, p)
              ) AS lacking, pg_get_userbyid(c.relowner) AS owner
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         LEFT JOIN pg_roles r ON r.rolname = %(role)s
        WHERE c.relname = split_part(t, '.', CASE position('.' IN t) WHEN 0 THEN 1 ELSE 2 END)
          AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
          AND n.nspname NOT IN ('pg_catalog', 'information_schema')
          AND (position('.' IN t) = 0 OR n.nspname = split_part(t, '.', 1))
        ORDER BY 1 LIMIT 1) found ON true
 WHERE found.owner IS NULL OR found.lacking <> '{}'
 ORDER BY place
"""


def __virtual__() -> str:
    return __virtualname__


def _wait(moment: float, owner: int, connection: Any) -> None:
    """Wait for the server as psycopg2 asks, but in this thread no longer than until the moment."""
    from psycopg2 import extensions

    while True:
        wanted = connection.poll()
        if wanted == extensions.POLL_OK:
            return
        left = moment - time.monotonic() if threading.get_ident() == owner else None
        if left is not None and left <= 0:
            raise CommandExecutionError(LATE)
        poller = select.poll()
        events = select.POLLIN if wanted == extensions.POLL_READ else select.POLLOUT
        poller.register(connection.fileno(), events)
        poller.poll(None if left is None else int(left * 1000) + 1)


@contextlib.contextmanager
def _deadline(moment: float) -> Iterator[Callable[[float], None]]:
    """
    Let every wait for the server inside the block end by a moment of the monotonic clock; what is
    yielded sets another one.
    """
    try:
        from psycopg2 import extensions
    except ImportError:
        yield lambda moment: None
        return

    def until(moment: float) -> None:
        extensions.set_wait_callback(functools.partial(_wait, moment, threading.get_ident()))

    before = extensions.get_wait_callback()
    until(moment)
    __salt__["slmdb_server.forget"]()  # a connection of before would keep its own settings
    try:
        yield until
    finally:
        extensions.set_wait_callback(before)
        __salt__["slmdb_server.forget"]()


def _line(err: Exception) -> str:
    """One line of an error: ours in full, of any other only its kind, which holds no value."""
    if isinstance(err, (CommandExecutionError, SaltInvocationError)):
        return (str(err).strip().splitlines() or ["no reason was given"])[0]
    return f"this part of the report failed with {type(err).__name__}"


class _Parts:
    """Collects the parts of a report; a part that fails leaves a line instead of a value."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def get(self, what: str, function: Callable, *arguments: Any, default: Any = None) -> Any:
        try:
            return function(*arguments)
        except Exception as err:  # a report comes whatever happens
            line = _line(err)
            if line != LATE or not any(LATE in one for one in self.failures):
                self.failures.append(f"{what}: {line}")
            return default


def ready(timeout: int = 1) -> dict[str, Any]:
    """
    Ask whether the server accepts connections, with ``pg_isready``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_health.ready

    timeout
        Seconds to wait for an answer.

    Returns ``retcode`` (0 accepting, 1 rejecting, 2 no answer, 3 not tried) and ``line``, as
    ``pg_isready`` gives them. Raises ``CommandExecutionError`` if the instance's facts cannot be
    told.
    """
    found = __salt__["slmdb_instance.facts"]()
    settings = __salt__["slmdb_pillar.settings"]()
    where = ["-h", found["socket_directory"], "-p", str(found["port"])]
    who = ["-U", settings["role"], "-d", settings["database"], "-t", str(timeout)]
    program = os.path.join(found["bin_directory"], "pg_isready")
    try:
        done = subprocess.run(
            [program, *where, *who],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", "")},
        )
    except FileNotFoundError:
        return {"retcode": 3, "line": f"there is no {program}"}
    except subprocess.TimeoutExpired:
        # libpq before 17 takes one second for two; these are the words it would have found.
        return {"retcode": 2, "line": f"{found['socket_directory']}:{found['port']} - no response"}
    except OSError as err:
        return {"retcode": 3, "line": f"{program} cannot be run: {err.strerror}"}
    return {"retcode": done.returncode, "line": (done.stdout or done.stderr).strip()}


def _unit(found: dict[str, Any]) -> dict[str, Any]:
    if not found["systemd"]:
        return {"name": found["unit"], "state": "skipped: no systemd"}
    state = __salt__["slmdb_service.unit_state"]()
    ours = f"/{found['unit']}.service.d/"
    broken = not found["running"] and state.get("ActiveState") in ("failed", "activating")
    return {
        "name": found["unit"],
        "state": state.get("ActiveState", "unknown"),
        "last_words": __salt__["slmdb_service.last_words"]() if broken else None,
        "enabled": state.get("UnitFileState", ""),
        "is_the_server": bool(found["pid"]) and state.get("MainPID") == found["pid"],
        "drop_ins": [one for one in state.get("DropInPaths", "").split() if ours in one],
    }


def _disk(path: str) -> dict[str, Any] | None:
    try:
        there = os.path.realpath(path)
        seen = os.statvfs(there)
    except OSError:
        return None
    size = seen.f_blocks * seen.f_frsize
    free = seen.f_bavail * seen.f_frsize
    return {"path": there, "free_bytes": free, "free_percent": round(100 * free / (size or 1), 1)}


def _socket(found: dict[str, Any]) -> dict[str, Any] | None:
    """Where the server's socket is, and who gets there."""
    try:
        mode = os.stat(found["socket_directory"]).st_mode
    except FileNotFoundError:
        return None
    return {"directory": found["socket_directory"], "mode": f"{mode & 0o7777:04o}"}


def _ask(statement: str, values: dict, database: str, moment: float) -> dict[str, Any]:
    """One row. A statement may take half of what is left, so that one cannot cost the rest."""
    query = __salt__["slmdb_server.query"]
    patience = f"{max(int((moment - time.monotonic()) * 500), 50)}ms"
    query("SET statement_timeout TO %s", [patience], database=database)  # needs no catalogue
    return query(statement, values, database=database)[0]


def _about_server(settings: dict[str, Any], admitted: list, moment: float) -> dict[str, Any]:
    """Ask in the application's database, where the rest will be asked, too, if there is one."""
    values = {what: settings[what] for what in ("role", "database")}
    values["admitted"] = json.dumps(admitted)
    for what in ("role", "database"):
        values[f"{what}s"] = [settings[what], *(settings[f"{what}s"] or ())]
    try:
        return _ask(SERVER, values, settings["database"], moment)
    except CommandExecutionError as err:
        if LATE in str(err):
            raise
    return _ask(SERVER, values, "postgres", moment)


def _knock(
    parts: _Parts, settings: dict[str, Any], found: dict[str, Any], moment: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Return what ``pg_isready`` says and what the server says of itself. Who is let in need not ask
    whether anybody would be, and who gets no answer has it: only a refusal is looked into.
    """
    failures, row = list(parts.failures), {}
    where = f"{found['socket_directory']}:{found['port']}"
    if found["running"]:
        admitted = parts.get("access rules", __salt__["slmdb_hba.admitted"], settings, default=[])
        row = parts.get("server", _about_server, settings, admitted, moment, default={})
    if row:
        return {"retcode": 0, "line": f"{where} - accepting connections"}, row
    if any(LATE in line for line in parts.failures):
        answer = {"retcode": 2, "line": f"{where} - no response"}
    else:
        answer = parts.get("pg_isready", ready, 1, default={"retcode": 3, "line": ""})
    if answer["retcode"]:
        # The verdict says this in its own words.
        parts.failures[:] = failures + [one for one in parts.failures if "pg_isready:" in one]
    return answer, row


def _about_database(settings: dict[str, Any], moment: float) -> dict[str, Any]:
    where, tables = settings["database"], list(settings["health"]["tables"])
    row = _ask(DATABASE, {"large": LARGE_CATALOGUE}, where, moment)
    rows = _tables(tables, where)
    return {
        **row,
        "missing": [row["name"] for row in rows if row["owner"] is None],
        "forbidden": [row for row in rows if row["owner"] is not None],
    }


def _tables(tables: list[str], database: str) -> list[dict[str, Any]]:
    """The tables that are missing, without an owner, and those that the role may not use."""
    values = {"tables": list(tables), "role": __salt__["slmdb_pillar.get"]("role")}
    return __salt__["slmdb_server.query"](TABLES, values, database=database)


def missing_tables(tables: list[str], database: str) -> list[str]:
    """
    Name the tables that a database does not have.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_health.missing_tables '["nodes"]' autobot_slm

    tables
        Names, with or without a schema; without, a table of any schema will do.
    database
        Name of the database.

    Returns those that are missing. Raises ``CommandExecutionError`` if it cannot be asked.
    """
    return [row["name"] for row in _tables(tables, database) if row["owner"] is None]


def _blockers() -> list[dict[str, Any]]:
    return __salt__["slmdb_server.query"](BLOCKERS, IN_REPORT)


def blockers() -> list[dict[str, Any]]:
    """
    Name the sessions that hold others up by a lock and wait for nobody themselves.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_health.blockers

    Returns what ``slmdb_session.blocking`` does. Raises ``CommandExecutionError`` if the server
    cannot be asked.
    """
    return __salt__["slmdb_server.query"](BLOCKERS, IN_FULL)


def _beside(settings: dict[str, Any]) -> list[str]:
    last = __salt__["slmdb_pillar.recorded"]() or {}
    names = ("role", "database")
    if all(last.get(what, settings[what]) == settings[what] for what in names):
        return []
    return __salt__["slmdb_secret_adoption.beside"]()


def _overrides(row: dict[str, Any]) -> list[dict[str, str]]:
    """What ALTER ROLE and ALTER DATABASE set for the application, each with what undoes it."""
    found = []
    for settings, command in row.get("overrides") or []:
        for name, _, value in (one.partition("=") for one in settings):
            shown = _shown(name, value)
            found.append({"name": name, "value": shown, "reset": f"{command} RESET {name}"})
    return found


def _shown(name: str, value: str) -> str:
    # Whoever invents a setting, which has a dot, may keep anything in it.
    hidden = "." in name or __salt__["slmdb.holds_secret"](name, value)
    return "**********" if hidden else value


def _foreign() -> list[dict[str, Any]]:
    rows = __salt__["slmdb_config.foreign"]()
    return [{**row, "value": _shown(row["name"], row["value"])} for row in rows]


def _capacity(found: dict[str, Any], server: dict[str, Any], inside: dict[str, Any]) -> dict:
    data = found["data_directory"]
    return {
        "connections": {name: server.get(name) for name in ("used", "allowed", "reserved")},
        "database_bytes": inside.get("bytes"),
        "database_bytes_left_out": bool(inside) and inside.get("bytes") is None,
        "disk": {"data": _disk(data), "wal": _disk(os.path.join(data, "pg_wal"))},
        "oldest_transaction": server.get("oldest_transaction"),
        "oldest_prepared": server.get("oldest_prepared"),
        "oldest_snapshot": server.get("oldest_snapshot"),
        "idle_slots": server.get("idle_slots") or [],
        "waiting": server.get("waiting"),
        "blockers": server.get("blockers") or [],
        "transaction_id_age": server.get("transaction_id_age"),
        "checksum_failures": server.get("checksum_failures"),
    }


def _server(found: dict[str, Any], answer: dict[str, Any], unit: dict, row: dict) -> dict[str, Any]:
    return {
        "instance": f"{found['version']}/{found['name']}",
        "exists": found["exists"],
        "trouble": None,
        "running": found["running"],
        "port": found["port"],
        "pg_isready": answer,
        "version": row.get("version"),
        "replaced": __salt__["slmdb_service.replaced"](),
        "started": row.get("started"),
        "in_recovery": row.get("in_recovery"),
        "database_owner": row.get("owner"),
        "role_may_log_in": row.get("role_may_log_in"),
        "role_expired": row.get("role_expired"),
        "role_may_connect": row.get("role_may_connect"),
        "limits": {"role": row.get("role_limit"), "database": row.get("database_limit")},
        "overrides": _overrides(row),
        "others": {what: row.get(f"other_{what}") for what in ("databases", "roles")},
        "unit": unit,
    }


def empty() -> dict[str, Any]:
    """
    Return a report that knows nothing yet: every key, no answer.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_health.empty

    Returns a dictionary with the keys of a report. Raises nothing.
    """
    return {
        "healthy": False,
        "problems": [],
        "warnings": [],
        "server": {},
        "access": {
            "addresses": [],
            "absent": [],
            "rule_errors": [],
            "shadowed": [],
            "shut_out": [],
            "matrix": [],
        },
        "migration": {},
        "tables": {"expected": [], "missing": None, "forbidden": None},
        "capacity": {},
        "secret": {},
        "secrets": [],
        "drift": {},
        "backup": {},
        "configuration": [],
        "pending": [],
        "foreign": [],
        "fixed": [],
    }


def _seconds(timeout: float | None, settings: dict[str, Any]) -> float:
    """What the questions may take: Salt needs the rest to end the children and print."""
    given = settings["health"]["timeout"] if timeout is None else timeout
    seconds = float(given) if isinstance(given, (int, float)) else 2.0
    return max(seconds - 0.3, seconds / 2)


def report(timeout: float | None = None) -> dict[str, Any]:
    """
    Ask the host and the server everything a health report says.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_health.report

    timeout
        Seconds within which the report is there; ``None``: ``health:timeout`` from pillar.

    Returns ``healthy``, ``problems``, ``warnings``, ``server``, ``access``, ``migration``,
    ``tables``, ``capacity``, ``secret``, ``backup`` and ``pending``; further ``secrets`` (files of
    further roles), ``drift`` (what a run would change of roles and databases), ``foreign`` (what
    others set in the server's files), ``configuration`` (errors in them) and ``fixed`` (what only a
    rebuild changes). Raises nothing.
    """
    begun = time.monotonic()
    answer, parts = empty(), _Parts()
    answer["problems"] += parts.get("pillar", __salt__["slmdb_pillar.problems"], default=[])
    settings = parts.get("settings", __salt__["slmdb_pillar.settings"])
    found = parts.get("instance", __salt__["slmdb_instance.facts"]) if settings else None
    if settings and found:
        moment = begun + _seconds(timeout, settings)
        __context__["slmdb_facts"] = found
        # What each of those may take who wait without the server.
        __context__["slmdb_patience"] = (moment - begun) / 4
        parts.get("report", _fill, answer, parts, settings, found, moment)
        for kept in ("slmdb_facts", "slmdb_patience", "slmdb_units"):
            __context__.pop(kept, None)
        for judge, *told in (
            ("slmdb_health_verdict.judge", answer, settings),
            ("slmdb_backup_health.judge", answer["backup"], settings["backup"], time.time()),
        ):
            verdict = parts.get("verdict", __salt__[judge], *told, default={})
            answer["problems"] += verdict.get("problems", [])
            answer["warnings"] += verdict.get("warnings", [])
    answer["problems"] += parts.failures
    answer["healthy"] = not answer["problems"]
    return answer


def _fill(
    answer: dict[str, Any], parts: _Parts, settings: dict, found: dict, moment: float
) -> None:
    """Fill the report, part by part, with what can be asked by the moment."""
    if found["systemd"]:
        __context__["slmdb_units"] = parts.get("unit", __salt__["slmdb_service.units"])
    unit = parts.get("unit", _unit, found, default={})
    if found["exists"]:
        unit["unlike"] = list(parts.get("unit", __salt__["slmdb_unit.differences"], default={}))
    inside: dict[str, Any] = {}
    answer["tables"]["expected"] = list(settings["health"]["tables"])
    access = answer["access"]
    access["addresses"] = parts.get("access", __salt__["slmdb_instance.listens"])
    access["socket"] = parts.get("access", _socket, found)
    access["absent"] = parts.get("access", __salt__["slmdb_instance.absent"], default=[])
    # Who hangs is left when half of the time is over; the rest goes to what needs no server.
    first = time.monotonic() + (moment - time.monotonic()) / 2
    with _deadline(first) as until:
        isready, row = _knock(parts, settings, found, first)
        until(moment if row else time.monotonic())
        if row.get("waiting"):  # mostly nobody does, and planning it takes milliseconds
            row["blockers"] = parts.get("locks", _blockers)
        if row.get("owner"):
            inside = parts.get("database", _about_database, settings, moment, default={})
            for what in ("missing", "forbidden"):
                answer["tables"][what] = inside.get(what)
        if row:
            answer["problems"] += parts.get("adoption", _beside, settings, default=[])
            access["shut_out"] = row["shut_out"]
            _fill_from_server(answer, parts)
        elif found["exists"] and not found["running"]:
            answer["foreign"] = parts.get("foreign", _foreign, default=[])
        answer["secret"] = parts.get(
            "secret", __salt__["slmdb_secret.facts"], bool(row), default={}
        )
        answer["secrets"] = parts.get("secret", __salt__["slmdb_secret.others"], default=[])
        left = max(moment - time.monotonic(), 0.1)
        answer["migration"] = parts.get(
            "migration", __salt__["slmdb_migration.revision"], left, default={}
        )
    answer["server"] = _server(found, isready, unit, row)
    if not row:
        trouble = parts.get("instance", __salt__["slmdb_instance.trouble"])
        answer["server"]["trouble"] = trouble
    answer["capacity"] = _capacity(found, row, inside)
    backup = __salt__["slmdb_backup_health.facts"]
    answer["backup"] = parts.get("backup", backup, row.get("archiver"), default={})


def _fill_from_server(answer: dict[str, Any], parts: _Parts) -> None:
    access = answer["access"]
    access["rule_errors"] = parts.get("access", __salt__["slmdb_access.rule_errors"], default=[])
    access["matrix"] = parts.get("access", __salt__["slmdb_access.matrix"], default=[])
    access["shadowed"] = parts.get("access", __salt__["slmdb_access.shadowed"], default=[])
    errors = __salt__["slmdb_config_file.lines"]
    answer["configuration"] = parts.get("configuration", errors, default=[])
    answer["pending"] = parts.get("pending", __salt__["slmdb_config.pending"], default=[])
    answer["foreign"] = parts.get("foreign", _foreign, default=[])
    answer["drift"] = parts.get("roles", __salt__["slmdb_role.differences"], default={})
    wanted = __salt__["slmdb_database.wanted"]
    there = parts.get("databases", lambda: __salt__["slmdb_database.read"](list(wanted())))
    if there is not None:
        outside, fixed = __salt__["slmdb_database.outside"], __salt__["slmdb_instance.report"]
        answer["drift"].update(parts.get("databases", outside, there, default={}))
        answer["fixed"] = parts.get("instance", fixed, there, default=[])
