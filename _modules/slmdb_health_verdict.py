"""
What of a health report is a problem, and what only deserves a warning. Nothing is asked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_health_verdict"

APPLY = "state.apply slm_database"
OLD_TRANSACTION = 3600  # seconds; beyond it, vacuum has been kept from its work for too long
WAIT_PROBLEM = 300  # seconds for a lock; from a minute on the report has them, as a warning
AGE_WARNING = 1_000_000_000  # transactions; autovacuum acts at 200 million, the limit is 2^31
AGE_PROBLEM = 1_900_000_000
AGE_HELD = 200_000_000  # transactions; who needs none so old holds no vacuum back
SLOT_WARNING = 1024**3  # bytes of WAL that nobody fetches
MIB = 1024**2
DISK_PROBLEM, DISK_WARNING = 3.0, 10.0  # per cent free
BUSY = 0.9  # of the connections
# Of a role or database: what keeps it from its work or lets it do more than pillar gives.
GRAVE = {"login", "superuser", "createdb", "createrole", "replication", "bypassrls", "valid_until"}
GRAVE |= {"connections allowed", "connect"}
# What other lines say of the application's own.
TOLD = ("login", "valid_until", "owner")
SHUT = ("connection_limit", "connection limit", "owner's privileges")
PREPARED = "COMMIT PREPARED or ROLLBACK PREPARED ends it"
OUTSIDE = "the server runs outside its unit"


def __virtual__() -> str:
    return __virtualname__


def judge(report: dict[str, Any], settings: dict[str, Any]) -> dict[str, list[str]]:
    """
    Say what is wrong in a report, and what is only worth knowing.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_health_verdict.judge '{}' '{}'

    report
        As ``slmdb_health.report`` fills it; parts that could not be read are empty.
    settings
        As ``slmdb_pillar.settings`` gives them.

    Returns ``problems`` and ``warnings``, lists of one line each. Raises nothing for a report of
    that shape.
    """
    problems = [*_server(report, settings), *_inside(report, settings), *_access(report, settings)]
    warnings = [*_unit_warnings(report)]
    for grave, line in _unheard(report, settings):
        (problems if grave else warnings).append(line)
    warnings += _lost_secrets(report, settings)
    for grave, line in _drift(report, settings):
        (problems if grave else warnings).append(line)
    for part in (_secret, _upkeep, _capacity, _foreign):
        for grave, line in part(report):
            (problems if grave else warnings).append(line)
    warnings += [f"access rule: {line}" for line in report["access"]["shadowed"]]
    warnings += _shut_out(report)
    warnings += [*_tables(report), *_forbidden(report, settings), *_overrides(report)]
    warnings += [*_migration(report), *_waiting(report)]
    return {"problems": problems, "warnings": warnings}


def _server(report: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    server = report["server"]
    unit, ready = server["unit"], server["pg_isready"]
    trouble = server.get("trouble")
    if trouble:
        yield trouble
    if not server["exists"]:
        if not trouble:
            yield f"instance {server['instance']} does not exist; {APPLY} makes it"
        return
    if ready["retcode"] != 0:
        yield f"the server does not accept connections: {ready['line'] or 'no answer'}"
    elif not server["running"]:
        yield f"the instance does not run; another server answers at {ready['line']}"
    state = unit.get("state", "")
    # Of a systemd that gave no answer a line of its own says so.
    known = state not in ("", "unknown") and not state.startswith("skipped")
    if known and server["running"] and not unit["is_the_server"]:
        yield f"{OUTSIDE} {unit['name']}, which is {state}: a restart that is permitted moves it"
    elif known and state != "active":
        words = unit.get("last_words")
        yield f"the unit {unit['name']} is {state}{f': {words}' if words else ''}"
    parked = any(row["name"] == "port" for row in report["pending"])
    if server["port"] != settings["port"] and not parked:
        yield f"slm_database:port: {settings['port']} is wanted, the server has {server['port']}"


def _inside(report: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """What only a server that answered can say."""
    server = report["server"]
    if server["version"] is None:
        return
    if server["in_recovery"]:
        yield "the server is in recovery: it accepts no change"
    if server["database_owner"] is None:
        yield f"database {settings['database']} does not exist; {APPLY} makes it"
    elif server["database_owner"] != settings["role"]:
        owner = server["database_owner"]
        yield f"database {settings['database']} belongs to {owner}, not to {settings['role']}"
    yield from _let_in(server, settings)
    for row in _in_force(server["overrides"]):
        if row["name"] == "default_transaction_read_only" and _is_on(row["value"]):
            yield f"{row['name']} is on for the application, which may not write; {row['reset']}"


def _let_in(server: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """What keeps the application out of a server that answers."""
    if server["role_may_log_in"] is None:
        yield f"role {settings['role']} does not exist; {APPLY} makes it"
    elif not server["role_may_log_in"]:
        yield f"role {settings['role']} may not log in"
    if server["role_may_connect"] is False:
        database = settings["database"]
        yield f"role {settings['role']} may not connect to database {database}; {APPLY} grants it"
    for kind, limit in server["limits"].items():
        if limit == 0:
            yield f"{kind} {settings[kind]} lets nobody in: CONNECTION LIMIT 0; {APPLY} lifts it"
    if server["role_expired"]:
        expired = server["role_expired"]
        yield f"the password of role {settings['role']} expired at {expired}; {APPLY} renews it"


def _drift(report: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """What a run would put right of roles and databases, but for what has a line of its own."""
    own = (f"role {settings['role']}", f"database {settings['database']}")
    for what, change in (report.get("drift") or {}).items():
        subject, _, part = what.rpartition(": ")
        shut_out = change["old"] == 0 or report["server"]["role_may_connect"] is False
        if what in own or (subject in own and (part in TOLD or (part in SHUT and shut_out))):
            continue
        if change["new"] == "present":
            yield True, f"{what} does not exist; {APPLY} makes it"
        else:
            words = f"is {_plainly(change['old'])}, not {_plainly(change['new'])}"
            yield part in GRAVE, f"{what} {words}; {APPLY} puts it right"


def _plainly(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _in_force(overrides: list[dict[str, str]]) -> Iterable[dict[str, str]]:
    """Of what is set more than once, the last."""
    return {row["name"]: row for row in overrides}.values()


def _is_on(value: str) -> bool:
    """As PostgreSQL reads a boolean: any beginning of the words will do."""
    given = value.strip().lower()
    begun = given != "" and any(word.startswith(given) for word in ("true", "yes"))
    return begun or given in ("on", "1")


def _access(report: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    access = report["access"]
    loopback = __salt__["slmdb_instance.loopback"]
    outside = [one for one in access["addresses"] or [] if not loopback(one)]
    if outside and not settings["allow_remote"]:
        port = report["server"]["port"]
        yield (
            f"port {port} is listened on at {', '.join(outside)}, off loopback; "
            "slm_database:allow_remote is false"
        )
    socket = access.get("socket")
    if socket and not int(socket["mode"], 8) & 0o001:
        place, mode = socket["directory"], socket["mode"]
        yield f"nobody else reaches the socket: {place} has mode {mode}; chmod 2775 {place}"
    yield from (f"configuration: {line}" for line in report.get("configuration") or [])
    yield from (f"access rule: {line}" for line in access["rule_errors"] or [])
    for row in access["matrix"] or []:
        if not row["right"]:
            yield (
                f"login matrix: {row['login']} would be {row['judged']}, "
                f"not {row['expected']} ({row['key']})"
            )


def _shut_out(report: dict[str, Any]) -> Iterator[str]:
    for role, database in report["access"].get("shut_out") or []:
        yield (
            f"an access rule admits {role} to {database}, but it may not connect there: "
            f"slm_database:roles:{role}:connect"
        )


def _unit_warnings(report: dict[str, Any]) -> Iterator[str]:
    unit = report["server"]["unit"]
    if unit.get("state") == "active" and unit["enabled"] not in ("enabled", "enabled-runtime"):
        enabled = unit["enabled"] or "unknown"
        yield f"the unit {unit['name']} does not start at boot: it is {enabled}"
    for what in unit.get("unlike") or []:
        end = f"is not as a run would have it; {APPLY} puts it right"
        yield f"the unit {unit['name']}: {what} {end}"
    for path in unit.get("drop_ins") or []:
        yield f"the unit {unit['name']} is changed by {path}; the pillar says nothing of that"


def _unheard(report: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Of an address off loopback others depend, unless it only waits for a restart."""
    if report["server"]["pg_isready"]["retcode"] != 0:
        return
    listened = set(report["access"]["addresses"] or ())
    if "127.0.0.1" in listened:
        # A host may have no IPv6; ::1 only repeats what 127.0.0.1 gives.
        listened |= {"::1"}.intersection(report["access"].get("absent") or ())
    parked = any(row["name"] == "listen_addresses" for row in report["pending"] or [])
    remote = settings["allow_remote"] and not parked
    for address in settings["listen_addresses"]:
        whole = "::" if ":" in address else "0.0.0.0"
        if address not in ("*", "localhost") and not listened & {address, whole}:
            grave = remote and not __salt__["slmdb_instance.loopback"](address)
            yield grave, f"slm_database:listen_addresses: nothing listens on {address}"


def _lost_secrets(report: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    missing = (report["secret"] or {}).get("missing_keys")
    if settings["secret"]["allow_new"] and missing:
        yield (
            f"slm_database:secret:allow_new: only the password is made anew; {', '.join(missing)} "
            "came with no copy, and what they encrypted is lost: take the key out of pillar"
        )


def _secret(report: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    for secret in (report["secret"], *(report.get("secrets") or [])):
        if not secret:
            continue
        file = secret["file"]
        if secret["problem"]:
            yield True, f"secret: {secret['problem']}"
        if secret.get("in_step") is False:
            yield True, f"{file}: the password is not the server's; {APPLY}.secret sets it there"
        for name, wanted in secret["wanted"].items():
            seen = secret[name]
            if seen not in (None, wanted):
                yield _wider(name, seen, wanted), f"{file}: {name} is {seen}, not {wanted}"


def _upkeep(report: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """What of the secret asks for a hand, but works."""
    secret = report["secret"]
    if not secret:
        return
    file = secret["file"]
    if secret["exists"] and secret["in_step"] is None and report["server"]["role_may_log_in"]:
        yield False, f"{file}: the password could not be compared with the server's"
    for name in secret["url_stale"]:
        yield False, f"{file}: {name} holds another password than the one in force"
    for name in secret.get("url_unclear") or []:
        yield (
            False,
            f"{file}: {name} cannot be read as a URL; white space and a comment behind it are part "
            "of what the backend gets",
        )
    for name, words in (secret.get("url_elsewhere") or {}).items():
        keys = "slm_database:secret:url_keys"
        yield False, f"{file}: {name} {words}; left alone: correct it, or take it out of {keys}"
    if secret["exists"] and secret["missing_keys"]:
        names = ", ".join(secret["missing_keys"])
        yield False, f"{file}: the backend's own keys are missing: {names}"
    if secret["rotation"]:
        yield False, f"a rotation of the password was interrupted; {APPLY}.secret settles it"
    if secret["overdue"]:
        age = secret["age_days"]
        yield False, f"the password is {age} days old: slmdb_secret.rotate is overdue"
    if secret.get("left_behind"):
        yield False, f"{secret['left_behind']} still holds another password"


def _wider(name: str, found: str, wanted: str) -> bool:
    """A mode that lets more people in is grave; another owner or a narrower mode is not."""
    return name == "mode" and bool(int(found, 8) & ~int(wanted, 8))


def _capacity(report: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    capacity = report["capacity"]
    for what, disk in (capacity.get("disk") or {}).items():
        if disk and disk["free_percent"] < DISK_WARNING:
            grave = disk["free_percent"] < DISK_PROBLEM
            yield grave, f"the disk of {what} ({disk['path']}) has {disk['free_percent']} % free"
    yield from _connections(capacity.get("connections") or {})
    oldest = capacity.get("oldest_transaction")
    if oldest and oldest["seconds"] > OLD_TRANSACTION:
        yield (
            False,
            f"a transaction is open for {oldest['seconds']} s: pid {oldest['pid']}, "
            f"user {oldest['user']}, database {oldest['database']}; {_end(oldest)}",
        )
    yield from _blocked(capacity)
    prepared = capacity.get("oldest_prepared")
    if prepared and prepared["seconds"] > OLD_TRANSACTION:
        yield False, f"prepared transaction {prepared['name']} waits for {prepared['seconds']} s"
    age = capacity.get("transaction_id_age") or 0
    if age > AGE_WARNING:
        words = f"the oldest transaction id is {age} old; vacuum does not keep up"
        yield age > AGE_PROBLEM, f"{words}{_held_back(capacity.get('oldest_snapshot'))}"
    yield from _slots(capacity.get("idle_slots") or [])
    if capacity.get("checksum_failures"):
        yield True, f"data checksums failed {capacity['checksum_failures']} times"


def _end(session: dict[str, Any]) -> str:
    return f"slmdb_session.end pid={session['pid']} started='{session['started']}' ends it"


def _held_back(oldest: dict[str, Any] | None) -> str:
    """Who keeps vacuum from its work, with what ends that."""
    if not oldest or oldest["age"] < AGE_HELD:
        return ""
    holder = oldest["holder"]
    if "slot" in holder:
        who = f"replication slot {holder['slot']}; {_drop(holder['slot'])}"
    elif "prepared" in holder:
        who = f"prepared transaction {holder['prepared']}; {PREPARED}"
    else:
        who = f"pid {holder['pid']}; {_end(holder)}"
    return f", held back at {oldest['age']} by {who}"


def _drop(slot: str) -> str:
    return f"SELECT pg_drop_replication_slot('{slot}') drops it"


def _slots(idle: list[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    for slot in idle:
        name, status = slot["name"], slot["status"]
        if status in ("unreserved", "lost"):
            words = f"has lost WAL that its client needs, or is about to ({status})"
        elif (slot["bytes"] or 0) >= SLOT_WARNING:
            words = f"keeps {slot['bytes'] // MIB} MiB of WAL on the disk"
        else:
            continue
        yield False, f"replication slot {name}, which nobody uses, {words}; {_drop(name)}"


def _blocked(capacity: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Who waits for a lock, and who is at the root of the longest wait."""
    for row in (capacity.get("blockers") or [])[:1]:
        count, longest = capacity["waiting"], row["longest_wait"]
        words = f"{count} sessions wait for a lock, the longest for"
        if count == 1:
            words = "1 session waits for a lock, for"
        yield longest >= WAIT_PROBLEM, f"{words} {longest} s, held by {_holder(row)}"


def _holder(row: dict[str, Any]) -> str:
    if not row["pid"]:
        return f"a prepared transaction; {PREPARED}"
    if row["kind"] != "client backend":
        return f"pid {row['pid']}, {row['kind'] or 'which is gone'}"
    words = f"pid {row['pid']}, user {row['user']}, database {row['database']}, {row['state']}"
    if row["seconds"] is not None:  # a lock by pg_advisory_lock needs no transaction
        words += f", in a transaction for {row['seconds']} s"
    return f"{words}; {_end(row)}"


def _connections(seen: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Those that are kept for superusers are none for the application; one is the report's own."""
    if seen.get("used") is None:
        return
    others, open_to_all = seen["used"] - 1, seen["allowed"] - seen["reserved"]
    words = f"{others} of the {open_to_all} connections that all may use are used"
    if others >= open_to_all:
        yield True, f"{words}: nobody else gets in; see pg_stat_activity for who holds them"
    elif others > BUSY * open_to_all:
        yield False, words


def _tables(report: dict[str, Any]) -> Iterator[str]:
    missing = report["tables"]["missing"]
    if missing:
        yield f"tables are missing: {', '.join(missing)}"


def _forbidden(report: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    forbidden = [
        f"{row['name']} of {row['owner']} (no {', '.join(row['lacking'])})"
        for row in report["tables"]["forbidden"] or []
    ]
    if forbidden:
        yield f"tables that role {settings['role']} may not use: {', '.join(forbidden)}"


def _overrides(report: dict[str, Any]) -> Iterator[str]:
    said = [
        " ".join(f"{row['name']} = {row['value']} ({row['reset']})".split())
        for row in report["server"]["overrides"]
    ]
    if said:
        yield f"set above the configuration, by ALTER ROLE or ALTER DATABASE: {'; '.join(said)}"


def _migration(report: dict[str, Any]) -> Iterator[str]:
    migration = report["migration"]
    state = migration.get("state")
    # "Not tracked" is how a new install looks; a backend that is not there has nothing to migrate.
    quiet = ("up to date", "not deployed", "not tracked", "tracked by the backend", None)
    many = len(migration.get("heads") or []) > 1
    known = state != "unknown" or report["server"]["version"]
    if known and (many or state not in quiet):
        yield f"migrations: {migration['comment']}"


def _waiting(report: dict[str, Any]) -> Iterator[str]:
    for row in report["pending"] or []:
        old, new = row["old"], row["new"]
        # Debian's programs take it from the file.
        more = f"; psql and pg_isready need -p {old} until then" if row["name"] == "port" else ""
        yield f"{row['name']} {old} → {new} waits for a restart since {row['since']}{more}"
    replaced = report["server"].get("replaced")
    if replaced:
        yield (
            f"the server runs with {', '.join(replaced)} of before an update: a restart, with "
            f"{APPLY}.maintenance, takes the new one"
        )
    yield from report.get("fixed") or []


def _foreign(report: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """What others set, each with its place and what takes it away."""
    beside = []
    undo = _undo if report["server"]["running"] else lambda row: "take the line out"
    for row in report.get("foreign") or []:
        place = f"{row['file']}, line {row['line']}"
        value = " ".join(row["value"].split())
        if row["danger"]:
            yield True, f"{row['name']} is {value} in {place}: {row['danger']}; {undo(row)}"
        elif row["ours"] is not None:
            words = f"which overrides ours ({row['ours']}); {undo(row)}"
            yield False, f"{row['name']} is {value} in {place}, {words}"
        else:
            beside.append(f"{row['name']} = {value} ({place}; {undo(row)})")
    if beside:
        yield False, f"set beside the pillar: {'; '.join(beside)}"


def _undo(row: dict[str, Any]) -> str:
    if row["file"].endswith("/postgresql.auto.conf"):
        return f"ALTER SYSTEM RESET {row['name']}, and reload"
    return "take the line out, and reload"
