"""What of a report is a problem, what a warning, and that nothing else is said."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
FILE = "/etc/autobot/slm-secrets.env"
WELL = {
    "server": {
        "instance": "15/main",
        "exists": True,
        "running": True,
        "port": 5432,
        "pg_isready": {"retcode": 0, "line": "accepting connections"},
        "version": "15.18",
        "in_recovery": False,
        "database_owner": "autobot_slm",
        "role_may_log_in": True,
        "role_expired": None,
        "role_may_connect": True,
        "limits": {"role": -1, "database": 20},
        "overrides": [],
        "unit": {
            "name": "autobot-slm-database",
            "state": "active",
            "enabled": "enabled",
            "is_the_server": True,
        },
    },
    "access": {"addresses": ["127.0.0.1", "::1"], "rule_errors": [], "shadowed": [], "matrix": []},
    "migration": {"state": "up to date", "heads": ["a1"], "comment": "well"},
    "tables": {"expected": ["nodes"], "missing": [], "forbidden": []},
    "capacity": {
        "connections": {"used": 5, "allowed": 100, "reserved": 3},
        "waiting": 3,
        "disk": {"data": {"path": "/data", "free_bytes": 1, "free_percent": 50.0}, "wal": None},
        "oldest_transaction": None,
        "oldest_prepared": None,
        "transaction_id_age": 1000,
        "checksum_failures": 0,
    },
    "secret": {
        "file": FILE,
        "exists": True,
        "owner": "root",
        "group": "slm",
        "mode": "0640",
        "wanted": {"owner": "root", "group": "slm", "mode": "0640"},
        "problem": None,
        "missing_keys": [],
        "url_stale": [],
        "rotation": None,
        "age_days": 1,
        "overdue": None,
        "in_step": True,
        "left_behind": None,
    },
    "pending": [],
    "foreign": [],
    "fixed": [],
}
MATRIX = {"login": "postgres over ::1", "expected": "refused", "judged": "admitted"}
HOURS = {"pid": 7, "user": "u", "database": "d", "state": "idle", "seconds": 4000, "started": "T"}
SLOT = {"name": "s", "status": "extended", "bytes": None}
HOLDER = {**HOURS, "kind": "client backend", "waiting": 3, "longest_wait": 299}
ELSEWHERE = {"name": "n", "value": "1", "ours": None, "danger": None, "file": "/f", "line": 3}
OTHER_FILE = {**WELL["secret"], "file": "/r.env", "mode": "0666"}
OTHER_FILE["wanted"] = {**OTHER_FILE["wanted"], "mode": "0600"}
DISK = {"path": "/data", "free_bytes": 1}


def _load(name):
    path = CHECKOUT / "_modules" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def judge():
    module = _load("slmdb_health_verdict")
    module.__salt__ = {"slmdb_instance.loopback": _load("slmdb_instance").loopback}
    settings = yaml.safe_load((CHECKOUT / "slm_database/defaults.yaml").read_text())

    def judged(path=None, value=None, **changed):
        report = copy.deepcopy(WELL)
        if path:
            *parents, last = path.split(".")
            part = report
            for name in parents:
                part = part[name]
            part[last] = value
        return module.judge(report, {**settings, **changed})

    return judged


def test_a_well_host_has_nothing_said_of_it(judge):
    assert judge() == {"problems": [], "warnings": []}


def test_a_host_without_ipv6_is_no_worse_for_it(judge):
    """Another address that it does not have is missed."""
    access = {**WELL["access"], "addresses": ["127.0.0.1"], "absent": ["::1"]}
    assert judge("access", access) == {"problems": [], "warnings": []}
    said = judge("access", {**access, "absent": ["::1", "10.1.2.3"]}, listen_addresses=["10.1.2.3"])
    assert said["warnings"] == ["slm_database:listen_addresses: nothing listens on 10.1.2.3"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("server.exists", False, "instance 15/main does not exist"),
        ("server.pg_isready", {"retcode": 1, "line": "rejecting"}, "not accept connections: rej"),
        ("server.running", False, "the instance does not run; another server answers"),
        (
            "capacity.connections",
            {"used": 18, "allowed": 20, "reserved": 3},
            "17 of the 17 connections that all may use are used: nobody else gets in",
        ),
        ("server.unit.state", "failed", "the unit autobot-slm-database is failed"),
        (
            "server.unit",
            {"name": "u", "state": "failed", "is_the_server": True, "last_words": "no room"},
            "the unit u is failed: no room",
        ),
        ("server.unit.is_the_server", False, "runs outside its unit"),
        ("server.port", 5433, "slm_database:port: 5432 is wanted, the server has 5433"),
        ("server.in_recovery", True, "in recovery"),
        ("server.database_owner", None, "database autobot_slm does not exist"),
        ("server.database_owner", "other", "belongs to other, not to autobot_slm"),
        ("server.role_may_log_in", None, "role autobot_slm does not exist"),
        ("server.role_may_log_in", False, "may not log in"),
        ("server.role_expired", "2020-01-01 00:00:00+00", "expired at 2020-01-01 00:00:00+00"),
        ("server.role_may_connect", False, "may not connect to database autobot_slm"),
        ("server.limits.role", 0, "role autobot_slm lets nobody in: CONNECTION LIMIT 0"),
        ("server.limits.database", 0, "database autobot_slm lets nobody in: CONNECTION LIMIT 0"),
        ("access.addresses", ["0.0.0.0", "127.0.0.1", "::1"], "at 0.0.0.0, off loopback"),
        ("access.socket", {"directory": "/r", "mode": "0700"}, "socket: /r has mode 0700; chmod"),
        ("configuration", ["file, line 2: bad"], "configuration: file, line 2: bad"),
        ("access.rule_errors", ["file, line 3: bad"], "access rule: file, line 3: bad"),
        ("access.matrix", [{**MATRIX, "right": False, "key": "line 1"}], "would be admitted"),
        ("foreign", [{**ELSEWHERE, "danger": "why"}], "n is 1 in /f, line 3: why; take the line"),
        ("secret.problem", "the key is there twice", "secret: the key is there twice"),
        ("secrets", [OTHER_FILE], "/r.env: mode is 0666, not 0600"),
        (
            "drift",
            {"role autobot_slm: superuser": {"old": True, "new": False}},
            "role autobot_slm: superuser is True, not False; state.apply slm_database puts it",
        ),
        (
            "drift",
            {"database reports": {"old": None, "new": "present"}},
            "database reports does not exist; state.apply slm_database makes it",
        ),
        (
            "drift",
            {"database reports: connect": {"old": [], "new": ["reader"]}},
            "database reports: connect is none, not reader; state.apply slm_database puts it right",
        ),
        ("secret.in_step", False, "the password is not the server's"),
        ("secret.mode", "0644", "mode is 0644, not 0640"),
        ("capacity.disk.data", {**DISK, "free_percent": 2.9}, "the disk of data (/data) has 2.9"),
        ("capacity.transaction_id_age", 1_950_000_000, "vacuum does not keep up"),
        ("capacity.blockers", [{**HOLDER, "longest_wait": 300}], "the longest for 300 s, held by"),
        ("capacity.checksum_failures", 2, "checksums failed 2 times"),
    ],
)
def test_a_problem(judge, path, value, words):
    said = judge(path, value)
    assert any(words in line for line in said["problems"]), said
    assert said["warnings"] == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("server.unit.enabled", "disabled", "does not start at boot: it is disabled"),
        ("access.addresses", ["127.0.0.1"], "nothing listens on ::1"),
        ("access.shadowed", ["line 2 never counts"], "access rule: line 2 never counts"),
        (
            "access.shut_out",
            [["reader", "reports"]],
            "an access rule admits reader to reports, but it may not connect there: "
            "slm_database:roles:reader:connect",
        ),
        ("secret.mode", "0600", "mode is 0600"),
        (
            "drift",
            {"role reporter: member_of": {"old": ["a", "b"], "new": []}},
            "role reporter: member_of is a, b, not none; state.apply slm_database puts it right",
        ),
        ("secret.in_step", None, "could not be compared with the server's"),
        ("secret.owner", "backend", "owner is backend"),
        ("secret.missing_keys", ["SLM_SECRET_KEY"], "own keys are missing: SLM_SECRET_KEY"),
        ("secret.url_stale", ["DATABASE_URL"], "DATABASE_URL holds another password"),
        ("secret.url_unclear", ["DATABASE_URL"], "DATABASE_URL cannot be read as a URL"),
        (
            "secret.url_elsewhere",
            {"DATABASE_URL": "is for sqlite, not PostgreSQL"},
            f"{FILE}: DATABASE_URL is for sqlite, not PostgreSQL; left alone",
        ),
        ("secret.rotation", "interrupted", "was interrupted"),
        ("secret.overdue", True, "is overdue"),
        ("secret.left_behind", "/etc/autobot/db-credentials.env", "still holds another password"),
        ("capacity.disk.data", {**DISK, "free_percent": 9.0}, "has 9.0 % free"),
        (
            "capacity.connections",
            {"used": 90, "allowed": 100, "reserved": 3},
            "89 of the 97 connections that all may use",
        ),
        ("capacity.oldest_transaction", HOURS, "open for 4000 s: pid 7, user u, database d"),
        ("capacity.oldest_transaction", HOURS, "; slmdb_session.end pid=7 started='T' ends it"),
        (
            "capacity.blockers",
            [HOLDER, {**HOLDER, "pid": 8}],
            "3 sessions wait for a lock, the longest for 299 s, held by pid 7, user u, database d, "
            "idle, in a transaction for 4000 s; slmdb_session.end pid=7 started='T' ends it",
        ),
        (
            "capacity.idle_slots",
            [{**SLOT, "bytes": 1}, {**SLOT, "bytes": 2**30}],
            "replication slot s, which nobody uses, keeps 1024 MiB of WAL on the disk; "
            "SELECT pg_drop_replication_slot('s') drops it",
        ),
        ("capacity.idle_slots", [{**SLOT, "status": "lost"}], "has lost WAL that its client needs"),
        ("capacity.blockers", [{**HOLDER, "pid": 0}], "299 s, held by a prepared transaction; "),
        ("capacity.blockers", [{**HOLDER, "seconds": None}], "database d, idle; slmdb_session.end"),
        ("capacity.blockers", [{**HOLDER, "kind": "walsender"}], "held by pid 7, walsender"),
        ("capacity.oldest_prepared", {"name": "x", "seconds": 4000}, "prepared transaction x"),
        ("capacity.transaction_id_age", 1_100_000_000, "vacuum does not keep up"),
        ("tables.missing", ["nodes", "deployments"], "tables are missing: nodes, deployments"),
        (
            "tables.forbidden",
            [{"name": "nodes", "owner": "postgres", "lacking": ["UPDATE", "DELETE"]}],
            "role autobot_slm may not use: nodes of postgres (no UPDATE, DELETE)",
        ),
        (
            "server.overrides",
            [{"name": "work_mem", "value": "1\nMB", "reset": "ALTER ROLE a RESET work_mem"}],
            "work_mem = 1 MB (ALTER ROLE a RESET work_mem)",
        ),
        ("migration", {"state": "behind", "heads": ["b"], "comment": "waiting: b"}, "waiting: b"),
        ("migration", {"state": "unknown", "heads": None, "comment": "broken"}, "broken"),
        ("migration", {"state": "up to date", "heads": ["a", "b"], "comment": "two"}, "two"),
        ("pending", [{"name": "n", "old": "1", "new": "2", "since": "now"}], "n 1 → 2 waits"),
        (
            "foreign",
            [{**ELSEWHERE, "ours": "2"}],
            "n is 1 in /f, line 3, which overrides ours (2); take the line out, and reload",
        ),
        (
            "foreign",
            [ELSEWHERE, {**ELSEWHERE, "name": "m", "file": "/postgresql.auto.conf"}],
            "set beside the pillar: n = 1 (/f, line 3; take the line out, and reload); "
            "m = 1 (/postgresql.auto.conf, line 3; ALTER SYSTEM RESET m, and reload)",
        ),
        ("fixed", ["data checksums are off"], "data checksums are off"),
    ],
)
def test_a_warning(judge, path, value, words):
    said = judge(path, value)
    assert said["problems"] == []
    assert any(words in line for line in said["warnings"]), said


@pytest.mark.parametrize(
    ("holder", "words"),
    [
        ({"slot": "s"}, "replication slot s; SELECT pg_drop_replication_slot('s') drops it"),
        ({"prepared": "x"}, "prepared transaction x; COMMIT PREPARED or ROLLBACK PREPARED ends it"),
        ({"pid": 7, "started": "T"}, "pid 7; slmdb_session.end pid=7 started='T' ends it"),
    ],
)
def test_who_keeps_vacuum_from_its_work_is_named(judge, holder, words):
    """If it is why ids are old; a short transaction is not."""
    for age, more in ((900_000_000, f", held back at 900000000 by {words}"), (5, "")):
        capacity = {"transaction_id_age": 1_100_000_000}
        capacity["oldest_snapshot"] = {"holder": holder, "age": age}
        (line,) = judge("capacity", capacity)["warnings"]
        assert line.endswith(f"1100000000 old; vacuum does not keep up{more}")


@pytest.mark.parametrize(
    ("values", "grave"),
    [
        (["on"], True),
        (["TR"], True),
        (["1"], True),
        (["of"], False),
        ([""], False),
        (["on", "off"], False),
        (["off", "yes"], True),
    ],
)
def test_the_last_word_on_reading_only_counts(judge, values, grave):
    name = "default_transaction_read_only"
    rows = [{"name": name, "value": value, "reset": f"RESET {name}"} for value in values]
    said = judge("server.overrides", rows)
    assert bool(said["problems"]) is grave
    assert len(said["warnings"]) == 1


@pytest.mark.parametrize(
    "migration",
    [
        {"state": "not deployed", "heads": None, "comment": "there is no /opt"},
        {"state": "not tracked", "heads": ["a"], "comment": "nothing tracks"},
        {"state": "tracked by the backend", "heads": ["a"], "comment": "left to it"},
    ],
)
def test_what_is_no_fault_of_the_host_is_not_even_a_warning(judge, migration):
    assert judge("migration", migration) == {"problems": [], "warnings": []}


def test_listening_off_loopback_is_fine_when_it_is_allowed(judge):
    addresses = ["127.0.0.1", "192.0.2.19", "::1"]
    assert judge("access.addresses", addresses, allow_remote=True)["problems"] == []


def test_an_address_that_others_need_and_nothing_listens_on_is_a_problem(judge):
    """Not while it waits for a restart, and not one of loopback."""
    told = {"allow_remote": True, "listen_addresses": ["127.0.0.1", "::1", "192.0.2.19"]}
    line = "slm_database:listen_addresses: nothing listens on 192.0.2.19"
    assert judge(**told) == {"problems": [line], "warnings": []}
    row = {"name": "listen_addresses", "old": "a", "new": "b", "since": "c"}
    said = judge("pending", [row], **told)
    assert said["problems"] == [] and line in said["warnings"]
    told["listen_addresses"].append("127.0.0.2")
    said = judge("access.addresses", ["127.0.0.1", "::1", "192.0.2.19"], **told)
    assert said["problems"] == [] and len(said["warnings"]) == 1


def test_a_new_password_on_a_new_host_does_not_bring_the_backend_s_secrets(judge):
    """Said only where pillar allows a new password, and only while they are missing."""
    secret = {**yaml.safe_load((CHECKOUT / "slm_database/defaults.yaml").read_text())["secret"]}
    secret["allow_new"] = True
    assert judge(secret=secret) == {"problems": [], "warnings": []}
    said = judge("secret.missing_keys", ["SLM_ENCRYPTION_KEY"], secret=secret)["warnings"]
    assert any("SLM_ENCRYPTION_KEY came with no copy" in line for line in said)


def test_a_server_that_did_not_answer_is_said_once(judge):
    said = judge("server.version", None)
    assert said == {"problems": [], "warnings": []}


@pytest.mark.parametrize(
    ("what", "old"),
    [
        ("role autobot_slm", None),
        ("role autobot_slm: login", False),
        ("role autobot_slm: connection_limit", 0),
        ("database autobot_slm: owner", "other"),
        ("database autobot_slm: connection limit", 0),
    ],
)
def test_what_has_a_line_of_its_own_is_no_drift_as_well(judge, what, old):
    assert judge("drift", {what: {"old": old, "new": 1}}) == {"problems": [], "warnings": []}


def test_all_addresses_of_a_kind_are_each_of_them(judge):
    """The server has no other socket then; the other kind is not among them."""
    wanted = ["0.0.0.0", "127.0.0.1", "::1"]
    access = {**WELL["access"], "addresses": ["0.0.0.0"]}
    said = judge("access", access, allow_remote=True, listen_addresses=wanted)
    assert said["warnings"] == ["slm_database:listen_addresses: nothing listens on ::1"]
    said = judge("access.addresses", ["::1", "127.0.0.1"], listen_addresses=wanted)
    assert said["warnings"] == ["slm_database:listen_addresses: nothing listens on 0.0.0.0"]
