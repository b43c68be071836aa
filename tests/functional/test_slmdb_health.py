"""slmdb.health says how the database is, whatever state the server is in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psycopg2
import psycopg2.extras
import pytest
from salt.exceptions import CommandExecutionError

from tests.support.wait import until

SECRET = Path("/etc/autobot/slm-secrets.env")
KEYS = {
    "healthy",
    "problems",
    "warnings",
    "server",
    "access",
    "migration",
    "tables",
    "capacity",
    "secret",
    "pending",
}
EVERYTHING = ["SELECT", "INSERT", "UPDATE", "DELETE"]
# Far above the deadline of 2 s and far below what an unguarded wait takes: for ever.
PATIENCE = 60


@pytest.fixture(scope="module")
def applied(shared_server):
    """A running server with the role, database, secret and rules of an empty pillar."""
    for noun in ("slmdb_role", "slmdb_database", "slmdb_secret", "slmdb_config", "slmdb_access"):
        shared_server.call(f"{noun}.apply")
    shared_server.call("slmdb_service.restart")
    return shared_server


@pytest.fixture
def minion(applied):
    """That server, asked without what was remembered, and left as it was found."""
    applied.tell(None)
    yield applied
    applied.tell(None)


def ask(minion, timeout=12):
    """The report, its return code, and the proof that it came; unhurried unless it is told."""
    minion.loaders.context.pop("retcode", None)
    begun = time.monotonic()
    answer = minion.call("slmdb.health", timeout)
    assert time.monotonic() - begun < PATIENCE
    assert set(answer) >= KEYS
    assert answer["healthy"] is not bool(answer["problems"])
    assert minion.loaders.context.get("retcode", 0) == (0 if answer["healthy"] else 1)
    for line in answer["problems"] + answer["warnings"]:
        assert isinstance(line, str)
        assert "\n" not in line
    json.dumps(answer)
    return answer


def execute(minion, statement, database="postgres"):
    minion.call("slmdb_server.execute", statement, database=database)


def problems(minion):
    return " | ".join(ask(minion)["problems"])


@contextlib.contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def locked(minion, table, database="postgres"):
    """Somebody holds a catalogue, so that whatever reads it waits."""
    holder = minion.call("slmdb_server.connect", database)
    try:
        with holder.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
    finally:
        holder.rollback()
        holder.close()


def test_an_applied_host_is_healthy(minion):
    answer = ask(minion)
    assert answer["problems"] == []
    assert answer["server"]["pg_isready"] == {
        "retcode": 0,
        "line": "/var/run/postgresql:5432 - accepting connections",
    }
    assert answer["server"]["version"].startswith("15.")
    assert answer["server"]["unit"]["state"] == "skipped: no systemd"
    assert answer["access"]["addresses"][0] == "127.0.0.1"
    assert answer["access"]["rule_errors"] == []
    assert answer["access"]["matrix"]
    assert answer["secret"]["in_step"] is True
    assert answer["pending"] == []
    assert answer["capacity"]["connections"]["allowed"] == 100
    assert answer["capacity"]["database_bytes"] > 1_000_000
    assert answer["capacity"]["disk"]["data"]["free_bytes"] > 0
    assert answer["capacity"]["transaction_id_age"] > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PGHOSTADDR", "127.0.0.2"),
        ("PGSERVICE", "nowhere"),
        ("PGTARGETSESSIONATTRS", "standby"),
        ("PGREQUIREAUTH", "none"),
        ("PGOPTIONS", "-c search_path=nowhere"),
    ],
)
def test_the_environment_leads_nowhere_else(minion, monkeypatch, name, value):
    """What libpq obeys in a caller's environment is for that caller's own psql."""
    monkeypatch.setenv(name, value)
    minion.call("slmdb_server.forget")
    answer = ask(minion)
    assert answer["problems"] == []
    assert all(row["right"] for row in answer["access"]["matrix"])
    assert minion.call("slmdb_access.differences") == {}
    assert minion.call("slmdb_secret.differences") == {}


@pytest.mark.once
def test_nobody_waits_for_ever_behind_a_lock(minion):
    """A report that is asked for again and again would take connection after connection."""
    execute(minion, "CREATE TABLE public.kept (a int)", database="autobot_slm")
    words = "lock timeout: somebody has it locked"
    with locked(minion, "public.kept", "autobot_slm"):
        with pytest.raises(CommandExecutionError, match=words):
            minion.call("slmdb_server.query", "SELECT FROM public.kept", database="autobot_slm")
        with pytest.raises(CommandExecutionError, match=words):
            minion.call("slmdb.schema")
    execute(minion, "DROP TABLE public.kept", database="autobot_slm")


def test_a_backend_that_is_not_deployed_is_no_problem(minion):
    answer = ask(minion)
    assert answer["migration"]["state"] == "not deployed"
    assert not any("migration" in line for line in answer["warnings"])


def test_the_report_shows_no_password(minion):
    line = next(one for one in SECRET.read_text().splitlines() if one.startswith("SLM_DB_PASS"))
    password = line.partition("=")[2].strip("\"'")
    assert len(password) >= 32
    assert password not in json.dumps(ask(minion))


def test_missing_tables_are_a_warning(minion):
    answer = ask(minion)
    assert answer["tables"]["missing"] == answer["tables"]["expected"]
    assert any(line.startswith("tables are missing: nodes, ") for line in answer["warnings"])
    minion.tell({"slm_database": {"health": {"tables": ["pages", "audit.events", "gone"]}}})
    execute(minion, "CREATE TABLE pages (id int)", "autobot_slm")
    execute(minion, "CREATE SCHEMA audit CREATE TABLE events (id int)", "autobot_slm")
    try:
        assert ask(minion)["tables"] == {
            "expected": ["pages", "audit.events", "gone"],
            "missing": ["gone"],
            "forbidden": [
                {"name": name, "owner": "postgres", "lacking": EVERYTHING}
                for name in ("pages", "audit.events")
            ],
        }
    finally:
        execute(minion, "DROP SCHEMA audit CASCADE; DROP TABLE pages", "autobot_slm")


def test_a_table_of_somebody_else_is_a_warning_unless_the_role_may_use_it(minion):
    minion.tell({"slm_database": {"health": {"tables": ["pages"]}}})
    execute(minion, "CREATE TABLE pages (id int)", "autobot_slm")
    execute(minion, "GRANT SELECT, INSERT ON pages TO autobot_slm", "autobot_slm")
    try:
        line = "tables that role autobot_slm may not use: pages of postgres (no UPDATE, DELETE)"
        assert line in ask(minion)["warnings"]
        execute(minion, "GRANT UPDATE, DELETE ON pages TO autobot_slm", "autobot_slm")
        assert ask(minion)["tables"] == {"expected": ["pages"], "missing": [], "forbidden": []}
        execute(minion, "REVOKE ALL ON pages FROM autobot_slm", "autobot_slm")
        execute(minion, "ALTER TABLE pages OWNER TO autobot_slm", "autobot_slm")
        assert ask(minion)["tables"]["forbidden"] == []
    finally:
        execute(minion, "DROP TABLE pages", "autobot_slm")


@pytest.mark.once
def test_the_size_of_a_database_with_very_many_tables_is_left_out(minion):
    execute(minion, "CREATE DATABASE crowded OWNER autobot_slm")
    minion.tell({"slm_database": {"database": "crowded", "health": {"tables": []}}})
    assert ask(minion)["capacity"]["database_bytes"] > 1_000_000
    grow = "UPDATE pg_class SET relowner = relowner"
    execute(minion, f"DO $$ BEGIN FOR i IN 1..110 LOOP {grow}; END LOOP; END $$", "crowded")
    capacity = ask(minion)["capacity"]
    assert (capacity["database_bytes"], capacity["database_bytes_left_out"]) == (None, True)
    minion.tell(None)
    execute(minion, "DROP DATABASE crowded WITH (FORCE)")


def test_a_stopped_postmaster_is_reported_in_time(minion):
    with stopped(minion.call("slmdb_instance.facts")["pid"]):
        answer = ask(minion, None)
    assert answer["server"]["pg_isready"]["retcode"] == 2
    assert "no response" in " ".join(answer["problems"])


@pytest.mark.parametrize(
    "catalogue", ["pg_authid", "pg_class", "pg_database", "pg_db_role_setting"]
)
def test_a_server_that_hangs_in_a_query_is_reported_in_time(minion, catalogue):
    with locked(minion, catalogue, "autobot_slm"):
        answer = ask(minion, None)
    assert not answer["healthy"]
    assert ask(minion)["healthy"]


def ended_soon(minion):
    """The server has nothing left to do for a report that is over."""
    busy = "SELECT query FROM pg_stat_activity WHERE application_name = 'slmdb' "
    busy += "AND state = 'active' AND pid <> pg_backend_pid()"
    until(lambda: not minion.call("slmdb_server.query", busy), patience=PATIENCE)


def test_a_statement_that_hangs_costs_its_part_of_the_report_only(minion):
    with locked(minion, "pg_namespace", "autobot_slm"):
        answer = ask(minion)
        ended_soon(minion)
    assert "database: canceling statement due to statement timeout" in answer["problems"]
    assert answer["access"]["matrix"]
    assert answer["secret"]["in_step"] is True


def test_the_report_leaves_no_deadline_behind(minion):
    ask(minion)
    rows = minion.call("slmdb_server.query", "SHOW statement_timeout")
    assert rows == [{"statement_timeout": "0"}]
    assert psycopg2.extensions.get_wait_callback() is None


def test_a_role_that_is_changed_behind_our_back(minion):
    execute(minion, "ALTER ROLE autobot_slm NOLOGIN")
    try:
        assert "role autobot_slm may not log in" in problems(minion)
    finally:
        execute(minion, "ALTER ROLE autobot_slm LOGIN")


def test_a_role_that_expired(minion):
    execute(minion, "ALTER ROLE autobot_slm VALID UNTIL '2020-01-01'")
    try:
        assert "the password of role autobot_slm expired at 2020-01-01" in problems(minion)
        execute(minion, "ALTER ROLE autobot_slm VALID UNTIL '2999-01-01'")
        assert problems(minion) == ""
    finally:
        execute(minion, "ALTER ROLE autobot_slm VALID UNTIL 'infinity'")


OVERRIDES = [
    ("ALTER ROLE ALL", "work_mem", "8MB", "8MB"),
    ("ALTER DATABASE autobot_slm", "search_path", "nowhere", "nowhere"),
    ("ALTER ROLE autobot_slm", "app.key", "canary", "**********"),
    ("ALTER ROLE autobot_slm IN DATABASE autobot_slm", "work_mem", "9MB", "9MB"),
]


@pytest.mark.parametrize(
    ("drift", "words", "noun"),
    [
        ("ALTER ROLE {} CONNECTION LIMIT 0", "role {} lets nobody in", "slmdb_role"),
        ("ALTER DATABASE {} CONNECTION LIMIT 0", "database {} lets nobody in", "slmdb_database"),
        ("REVOKE CONNECT ON DATABASE {0} FROM {0}", "{0} may not connect", "slmdb_database"),
    ],
)
def test_an_application_that_is_not_let_in(minion, drift, words, noun):
    """Though its role may log in; the next run lets it in again."""
    execute(minion, drift.format("autobot_slm"))
    try:
        assert words.format("autobot_slm") in problems(minion)
    finally:
        minion.call(f"{noun}.apply")
    assert words.format("autobot_slm") not in problems(minion)


def test_a_further_role_that_is_not_let_in(minion):
    """Where pillar says that it may connect; and it is no longer said after the next run."""
    line = "database autobot_slm: connect is none, not guest; state.apply slm_database puts it"
    minion.tell({"slm_database": {"roles": {"guest": {"connect": ["autobot_slm"]}}}})
    try:
        minion.call("slmdb_role.apply")
        assert line in problems(minion)
        minion.call("slmdb_database.apply")
        assert line not in problems(minion)
    finally:
        execute(minion, "DROP OWNED BY guest")
        execute(minion, "DROP ROLE guest")


def test_a_rule_for_a_role_that_the_database_does_not_let_in(minion):
    """Only where a rule that admits names both; the key that lets it in ends it."""
    rule = {"type": "local", "database": ["autobot_slm"], "user": ["guest"], "method": "peer"}
    line = (
        "an access rule admits guest to autobot_slm, but it may not connect there: "
        "slm_database:roles:guest:connect"
    )

    def said(role=None, **changed):
        told = {"roles": {"guest": role}, "hba": {"after": [{**rule, **changed}]}}
        minion.tell({"slm_database": told})
        minion.call("slmdb_role.apply")
        return line in ask(minion)["warnings"]

    try:
        assert said()
        assert not said(method="reject")
        assert not said(database="all")
        assert not said(user=["+guest"])
        assert not said({"connect": ["autobot_slm"]})  # the run's business
        execute(minion, "GRANT CONNECT ON DATABASE autobot_slm TO guest")
        assert not said()
    finally:
        execute(minion, "DROP OWNED BY guest")
        execute(minion, "DROP ROLE guest")


def test_tables_of_its_own_that_the_role_may_not_use(minion):
    """Its owner may take them from itself, or a restored dump may."""
    minion.tell({"slm_database": {"health": {"tables": ["mine"]}}})
    execute(minion, "CREATE TABLE mine (id int)", "autobot_slm")
    try:
        execute(minion, "ALTER TABLE mine OWNER TO autobot_slm", "autobot_slm")
        assert ask(minion)["tables"]["forbidden"] == []
        execute(minion, "REVOKE UPDATE ON mine FROM autobot_slm", "autobot_slm")
        assert ask(minion)["tables"]["forbidden"][0]["lacking"] == ["UPDATE"]
    finally:
        execute(minion, "DROP TABLE mine", "autobot_slm")


def test_a_secret_file_without_the_password(minion):
    """Emptied by an editor, for instance: the backend has none."""
    kept = SECRET.read_bytes()
    SECRET.write_bytes(b"")
    try:
        assert f"{SECRET}: there is no SLM_DB_PASSWORD: bring the copy back" in problems(minion)
    finally:
        SECRET.write_bytes(kept)


def test_settings_for_the_application_alone_are_one_warning(minion):
    """With what takes each away; those for somebody else are none of it."""
    execute(minion, "ALTER ROLE postgres SET work_mem = '7MB'")
    execute(minion, "ALTER DATABASE postgres SET work_mem = '7MB'")
    for command, name, value, _ in OVERRIDES:
        execute(minion, f"{command} SET {name} = '{value}'")
    try:
        answer = ask(minion)
        assert answer["healthy"]
        assert "canary" not in json.dumps(answer)
        said = "; ".join(f"{n} = {v} ({c} RESET {n})" for c, n, _, v in OVERRIDES)
        assert [line for line in answer["warnings"] if line.endswith(f": {said}")]
    finally:
        for row in answer["server"]["overrides"]:
            execute(minion, row["reset"])
        execute(minion, "ALTER ROLE postgres RESET ALL")
        execute(minion, "ALTER DATABASE postgres RESET ALL")
    assert ask(minion)["server"]["overrides"] == []


@pytest.mark.parametrize("whom", ["ROLE autobot_slm", "DATABASE autobot_slm"])
def test_an_application_that_may_only_read_is_a_problem(minion, whom):
    execute(minion, f"ALTER {whom} SET default_transaction_read_only = on")
    try:
        said = problems(minion)
        assert "default_transaction_read_only is on for the application" in said
        assert f"ALTER {whom} RESET default_transaction_read_only" in said
    finally:
        execute(minion, f"ALTER {whom} RESET default_transaction_read_only")


def test_a_password_that_is_changed_behind_our_back(minion):
    execute(minion, "ALTER ROLE autobot_slm PASSWORD 'another one, set by hand'")
    try:
        answer = ask(minion)
        assert answer["secret"]["in_step"] is False
        assert "the password is not the server's" in " ".join(answer["problems"])
    finally:
        minion.call("slmdb_secret.apply")


def test_a_database_and_a_role_that_do_not_exist(minion):
    minion.tell({"slm_database": {"database": "nowhere", "role": "nobody_of_ours"}})
    said = problems(minion)
    assert "database nowhere does not exist" in said
    assert "role nobody_of_ours does not exist" in said


def test_other_names_in_pillar_make_no_empty_database_beside_the_full_one(minion):
    """A run is refused before it makes anything, until pillar says what becomes of the old ones."""
    minion.call("slmdb_record.apply")
    made = ("slmdb_secret.adopted", "slmdb_role.present", "slmdb_database.present")
    names = {"role": "other", "database": "others"}
    kept = {"roles": {"autobot_slm": None}, "databases": {"autobot_slm": {"owner": "autobot_slm"}}}
    try:
        minion.tell({"slm_database": names})
        said = problems(minion)
        for what, new in names.items():
            words = f"slm_database:{what}: {what} autobot_slm of the last apply is here, and {new} "
            assert words in said
        for test in (True, False):
            assert minion.state(made[0], test=test).result is False
        assert ask(minion)["server"]["others"] == {
            "databases": ["autobot_slm"],
            "roles": ["autobot_slm"],
        }
        minion.tell({"slm_database": {**names, **kept}})
        assert "of the last apply" not in problems(minion)
        assert minion.state(made[0]).result is True
        rename = {"role": "autobot_slm", "rename": True, "databases": {"autobot_slm": "others"}}
        minion.tell({"slm_database": {**names, "adopt": rename}})
        minion.call("slmdb_server.forget")
        assert minion.state(made[0]).result is True
        assert minion.state(made[0]).changes == {}
    finally:
        execute(minion, "ALTER DATABASE others RENAME TO autobot_slm")
        execute(minion, "ALTER ROLE other RENAME TO autobot_slm")
        minion.tell(None)
        minion.call("slmdb_record.remove")
    assert ask(minion)["server"]["others"] == {"databases": [], "roles": []}


@pytest.mark.parametrize(("mode", "grave"), [(0o644, True), (0o600, False)])
def test_the_mode_of_the_secret_file(minion, mode, grave):
    before = stat.S_IMODE(SECRET.stat().st_mode)
    SECRET.chmod(mode)
    try:
        answer = ask(minion)
        lines = answer["problems"] if grave else answer["warnings"]
        assert f"{SECRET}: mode is {mode:04o}, not 0640" in lines
        assert answer["healthy"] is not grave, answer["problems"]
    finally:
        SECRET.chmod(before)


def test_no_secret_file(minion):
    aside = SECRET.with_suffix(".aside")
    SECRET.rename(aside)
    try:
        assert f"there is no {SECRET}" in problems(minion)
    finally:
        aside.rename(SECRET)


READER = Path("/etc/autobot/reader.env")
FURTHER = {
    "roles": {"reader": {"secret": {"file": str(READER), "key": "READER_PASSWORD"}}},
    "databases": {"further": {"owner": "reader"}},
}


def test_further_roles_and_databases_are_looked_at(minion):
    """They are there, as a run makes them, and their secret files are kept as well."""
    minion.tell({"slm_database": FURTHER})
    said = problems(minion)
    assert "role reader does not exist; state.apply slm_database makes it" in said
    assert "database further does not exist; state.apply slm_database makes it" in said
    assert f"secret: there is no {READER}: bring the copy back" in said
    try:
        for noun in ("slmdb_role", "slmdb_secret", "slmdb_database"):
            minion.call(f"{noun}.apply")
        assert problems(minion) == ""
        execute(minion, "ALTER ROLE reader NOLOGIN CONNECTION LIMIT 5")
        execute(minion, "ALTER DATABASE further OWNER TO postgres")
        READER.chmod(0o666)
        answer = ask(minion)
        assert sorted(answer["problems"]) == [
            f"{READER}: mode is 0666, not 0640",
            "role reader: login is False, not True; state.apply slm_database puts it right",
        ]
        for what in ("role reader: connection_limit is 5, not -1", "owner is postgres, not reader"):
            assert [line for line in answer["warnings"] if what in line]
        READER.unlink()
        assert f"secret: there is no {READER}: bring the copy back" in problems(minion)
    finally:
        minion.tell(None)
        execute(minion, "DROP DATABASE IF EXISTS further")
        execute(minion, "DROP ROLE IF EXISTS reader")
        READER.unlink(missing_ok=True)


def test_the_encoding_of_further_databases_is_reported(minion):
    minion.tell({"slm_database": {"databases": {"further": {}, "latin": {"encoding": "LATIN1"}}}})
    for name in ("further", "latin"):
        made = "ENCODING SQL_ASCII LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        execute(minion, f"CREATE DATABASE {name} OWNER autobot_slm {made}")
    minion.call("slmdb_database.apply")
    try:
        said = [line for line in ask(minion)["fixed"] if "encoding" in line]
        end = "has SQL_ASCII; only a dump and a restore change it"
        assert said == [
            f"slm_database:encoding: UTF8 is wanted, database further {end}",
            f"slm_database:databases:latin:encoding: LATIN1 is wanted, database latin {end}",
        ]
    finally:
        minion.tell(None)
        execute(minion, "DROP DATABASE further")
        execute(minion, "DROP DATABASE latin")


@pytest.mark.parametrize("power", ["SUPERUSER", "CREATEROLE", "BYPASSRLS"])
def test_an_application_that_was_given_more_than_its_own_is_a_problem(minion, power):
    execute(minion, f"ALTER ROLE autobot_slm {power}")
    try:
        assert problems(minion) == (
            f"role autobot_slm: {power.lower()} is True, not False; "
            "state.apply slm_database puts it right"
        )
    finally:
        minion.call("slmdb_role.apply")
    assert problems(minion) == ""


def test_an_access_rule_that_the_server_would_refuse(minion):
    path = Path(minion.call("slmdb_instance.facts")["hba_file"])
    before = path.read_bytes()
    path.write_bytes(before + b"host everything everyone nowhere guess\n")
    try:
        answer = ask(minion)
        assert len(answer["access"]["rule_errors"]) == 1
        assert any(line.startswith("access rule: ") for line in answer["problems"])
    finally:
        path.write_bytes(before)


def test_a_socket_that_nobody_else_reaches(minion):
    """The report itself comes as root, who reaches everything."""
    directory = Path("/run/postgresql")
    directory.chmod(0o700)
    try:
        assert "/var/run/postgresql has mode 0700; chmod 2775 /var/run" in problems(minion)
    finally:
        directory.chmod(0o2775)
    assert problems(minion) == ""


def test_an_access_rule_that_lets_anybody_in(minion):
    path = Path(minion.call("slmdb_instance.facts")["hba_file"])
    before = path.read_bytes()
    path.write_bytes(b"host all all 127.0.0.1/32 trust\n" + before)
    try:
        assert "login matrix: postgres over 127.0.0.1 would be admitted" in problems(minion)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("work_mem = banana", "work_mem: setting could not be applied"),
        ("nosuch = 1", "nosuch: unrecognized configuration parameter"),
    ],
)
def test_a_configuration_file_that_the_server_would_refuse(minion, line, words):
    """Whoever wrote it: the next start would fail."""
    conf = Path(minion.call("slmdb_instance.facts")["conf_file"])
    other = conf.with_name("90-by-hand.conf")
    other.write_text(f"# by hand\n{line}\n")
    try:
        assert f"configuration: {other}, line 2: {words}" in problems(minion)
    finally:
        other.unlink()


AUTO = Path("/var/lib/postgresql/15/main/postgresql.auto.conf")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("fsync", "off", "a crash of the host would destroy the database"),
        ("full_page_writes", "false", "a crash of the host would destroy the database"),
        ("autovacuum", "off", "the transaction ids would run out"),
        ("password_encryption", "md5", "passwords are kept as SCRAM-SHA-256 verifiers"),
        ("default_transaction_read_only", "on", "the application may not write"),
        ("archive_mode", "off", "off would end the backups: no WAL would be archived"),
        ("archive_command", "/bin/true", "it would end the backups"),
    ],
)
def test_what_somebody_set_that_breaks_a_promise_is_a_problem(minion, name, value, why):
    """Wherever that was written; pillar may permit it."""
    conf = Path(minion.call("slmdb_instance.facts")["conf_file"])
    main, other = conf.parents[1] / "postgresql.conf", conf.with_name("90-by-hand.conf")
    before = main.read_bytes()
    execute(minion, f"ALTER SYSTEM SET {name} = '{value}'")
    try:
        said = f"{name} is {value} in {AUTO}, line 3: {why}"
        assert said in problems(minion)
        assert f"; ALTER SYSTEM RESET {name}, and reload" in problems(minion)
        execute(minion, f"ALTER SYSTEM RESET {name}")
        other.write_text(f"{name} = '{value}'\n")
        assert f"{name} is {value} in {other}, line 1: {why}" in problems(minion)
        other.unlink()
        if not name.startswith(("archive", "password")):  # ours come after Debian's file
            main.write_bytes(before + f"{name} = {value}\n".encode())
            assert f"{name} is {value} in {main}, line " in problems(minion)
            minion.tell({"slm_database": {"allow_unsafe": [name]}})
            assert problems(minion) == ""
    finally:
        main.write_bytes(before)
        execute(minion, f"ALTER SYSTEM RESET {name}")
    minion.tell(None)
    assert problems(minion) == ""


def test_what_somebody_set_beside_the_pillar_is_one_warning(minion):
    """Not what is as ours, what Debian's own file has, or a restore left; secrets are hidden."""
    given = {"statement_timeout": "1min", "port": "5432", "primary_conninfo": "password=canary"}
    given |= {"restore_command": "left by a restore", "recovery_target_timeline": "current"}
    try:
        for name, value in given.items():
            execute(minion, f"ALTER SYSTEM SET {name} = '{value}'")
        answer = ask(minion)
        assert answer["problems"] == []
        assert "canary" not in json.dumps(answer)
        (said,) = [line for line in answer["warnings"] if "set beside" in line or "overrid" in line]
        place = f"{AUTO}, line {{}}; ALTER SYSTEM RESET {{}}, and reload"
        assert said == "set beside the pillar: " + "; ".join(
            [
                f"primary_conninfo = ********** ({place.format(5, 'primary_conninfo')})",
                f"statement_timeout = 1min ({place.format(3, 'statement_timeout')})",
            ]
        )
    finally:
        for name in given:
            execute(minion, f"ALTER SYSTEM RESET {name}")
    assert ask(minion)["foreign"] == []


def test_a_main_file_that_does_not_include_ours_any_more(minion):
    """The one cause is said, by a run as well, and nothing that would follow from it."""
    conf = Path(minion.call("slmdb_instance.facts")["conf_file"])
    main = conf.parents[1] / "postgresql.conf"
    before = main.read_bytes()
    main.write_bytes(before.replace(b"include_dir", b"#include_dir"))
    minion.call("slmdb_service.reload")
    words = f"{main} does not include {conf.parent}, so that nothing in {conf} counts; add the line"
    try:
        archiving = "SELECT pending_restart FROM pg_settings WHERE name = 'archive_mode'"
        # The server takes its time to read.
        until(lambda: minion.call("slmdb_server.query", archiving)[0]["pending_restart"])
        answer = ask(minion)
        assert [line for line in answer["problems"] if not line.startswith("tables")] == [
            f"configuration: {words} include_dir = 'conf.d' to it, and reload"
        ]
        assert (answer["pending"], answer["foreign"]) == ([], [])
        for test in (True, False):
            refused = minion.state("slmdb_config.applied", test=test)
            assert (refused.result, refused.changes) == (False, {})
            assert words in refused.comment
        assert minion.call("slmdb_config.waiting") == []
    finally:
        main.write_bytes(before)
        minion.call("slmdb_service.reload")
    minion.tell(None)
    assert minion.state("slmdb_config.applied").changes == {}
    assert problems(minion) == ""


def test_a_setting_that_waits_for_a_restart_is_a_warning(minion):
    minion.tell({"slm_database": {"settings": {"max_connections": 120}}})
    minion.call("slmdb_config.apply")
    try:
        answer = ask(minion)
        assert answer["healthy"]
        assert [row["name"] for row in answer["pending"]] == ["max_connections"]
        assert minion.call("slmdb.pending")["restart"] == answer["pending"]
        assert any("max_connections 100 → 120 waits" in line for line in answer["warnings"])
    finally:
        minion.tell(None)
        minion.call("slmdb_config.apply")


def test_until_a_new_port_is_in_force_debian_s_programs_need_the_old_one(minion):
    """They take it from the file, as far as that is from what the server has."""
    minion.tell({"slm_database": {"port": 5433}})
    minion.call("slmdb_config.apply")
    try:
        answer = ask(minion)
        assert answer["healthy"], answer["problems"]
        end = "psql and pg_isready need -p 5432 until then"
        assert [line for line in answer["warnings"] if line.endswith(end)]
        asked = [subprocess.run(["pg_isready", *port]) for port in ([], ["-p", "5432"])]
        assert [done.returncode for done in asked] == [2, 0]
    finally:
        minion.tell(None)
        minion.call("slmdb_config.apply")


def test_an_application_that_gets_no_connection(minion):
    """The report itself comes in by those that are kept for superusers."""
    login = {"user": "autobot_slm", "dbname": "autobot_slm", "host": "/var/run/postgresql"}
    with contextlib.ExitStack() as held:

        def nobody_gets_in():
            # A session that is ending makes room for one more.
            with contextlib.suppress(psycopg2.OperationalError):
                while True:
                    held.callback(psycopg2.connect(**login).close)
            return "that all may use are used: nobody else gets in" in problems(minion)

        until(nobody_gets_in)


def test_sessions_that_wait_for_a_lock(minion, monkeypatch):
    """A warning from a minute on, with who holds them up and what ends that; then a problem."""
    execute(minion, "CREATE TABLE held (id int)", "autobot_slm")
    login = {"user": "autobot_slm", "dbname": "autobot_slm", "host": "/var/run/postgresql"}
    holder, waiter = psycopg2.connect(**login), psycopg2.connect(**login, async_=True)
    execute(minion, "GRANT ALL ON held TO autobot_slm", "autobot_slm")
    health = minion.modules["slmdb_health.report"].func.__globals__
    verdict = minion.modules["slmdb_health_verdict.judge"].func.__globals__
    try:
        holder.cursor().execute("SELECT 'canary' FROM held; LOCK TABLE held")
        psycopg2.extras.wait_select(waiter)
        waiter.cursor().execute("SELECT 1 FROM held")
        time.sleep(1.1)
        answer = ask(minion)
        assert answer["capacity"]["waiting"] == 1 and answer["capacity"]["blockers"] == []
        assert "lock" not in " | ".join(answer["problems"] + answer["warnings"])
        monkeypatch.setitem(health["IN_REPORT"], "longer", 1)
        answer = ask(minion)
        (row,) = answer["capacity"]["blockers"]
        assert row["pid"] == holder.info.backend_pid and "canary" not in json.dumps(answer)
        (line,) = [one for one in answer["warnings"] if "lock" in one]
        assert (
            answer["healthy"] and f"1 session waits for a lock, for {row['longest_wait']} s" in line
        )
        end = f"slmdb_session.end pid={row['pid']} started='{row['started']}' ends it"
        assert line.endswith(end)
        monkeypatch.setitem(verdict, "WAIT_PROBLEM", 1)
        assert f"held by pid {row['pid']}, user autobot_slm" in problems(minion)
    finally:
        holder.close()
        waiter.close()
        execute(minion, "DROP TABLE held", "autobot_slm")
    assert ask(minion)["capacity"]["waiting"] == 0


def test_who_waits_for_an_advisory_lock_may_do_so_for_ever(minion, monkeypatch):
    """As a standby of an application does; whoever asks for it sees it."""
    health = minion.modules["slmdb_health.report"].func.__globals__
    monkeypatch.setitem(health["IN_REPORT"], "longer", 1)
    login = {"user": "autobot_slm", "dbname": "autobot_slm", "host": "/var/run/postgresql"}
    leader, standby = psycopg2.connect(**login), psycopg2.connect(**login, async_=True)
    try:
        leader.cursor().execute("SELECT pg_advisory_lock(1)")
        psycopg2.extras.wait_select(standby)
        standby.cursor().execute("SELECT pg_advisory_lock(1)")
        until(lambda: ask(minion)["capacity"]["waiting"] == 1)
        time.sleep(1.1)
        answer = ask(minion)
        assert answer["capacity"]["blockers"] == []
        assert "lock" not in " | ".join(answer["problems"] + answer["warnings"])
        (row,) = minion.call("slmdb_session.blocking")
        assert row["pid"] == leader.info.backend_pid
    finally:
        leader.close()
        standby.close()


def test_a_replication_slot_that_nobody_uses(minion, monkeypatch):
    """It keeps WAL for ever; the line has what drops it."""
    execute(minion, "SELECT pg_create_physical_replication_slot('abandoned', true)")
    try:
        for _ in range(2):
            execute(minion, "SELECT pg_logical_emit_message(false, '', 'x'), pg_switch_wal()")
        assert "abandoned" not in " ".join(ask(minion)["warnings"])
        where = minion.modules["slmdb_health_verdict.judge"].func.__globals__
        monkeypatch.setitem(where, "SLOT_WARNING", 2**20)
        answer = ask(minion)
        (line,) = [line for line in answer["warnings"] if "slot abandoned" in line]
        assert answer["healthy"] and "MiB of WAL on the disk" in line
    finally:
        drop = "SELECT pg_drop_replication_slot('abandoned')"
        execute(minion, drop)
    assert line.endswith(f"; {drop} drops it")
    assert ask(minion)["capacity"]["idle_slots"] == []


def test_the_oldest_snapshot_is_known(minion):
    """Of a session that reads as of long ago."""
    with psycopg2.connect(host="/var/run/postgresql", user="postgres", dbname="postgres") as reader:
        reader.set_session(isolation_level="REPEATABLE READ")
        reader.cursor().execute("SELECT 1")
        for _ in range(3):
            execute(minion, "SELECT pg_current_xact_id()")
        oldest = ask(minion)["capacity"]["oldest_snapshot"]
        assert oldest["holder"]["pid"] == reader.info.backend_pid and oldest["age"] >= 3
    reader.close()


def test_another_server_at_our_socket(minion):
    """It answers pg_isready as well as ours would."""
    minion.call("slmdb_service.stop")
    subprocess.run(["pg_createcluster", "-p", "5432", "15", "other"], check=True)
    subprocess.run(["pg_ctlcluster", "15", "other", "start"], check=True)
    try:
        assert "the instance does not run; another server answers at" in problems(minion)
    finally:
        subprocess.run(["pg_dropcluster", "--stop", "15", "other"], check=True)
        minion.call("slmdb_service.start")


def test_a_stopped_server(minion):
    minion.call("slmdb_service.stop")
    try:
        answer = ask(minion)
        assert answer["server"]["running"] is False
        assert answer["secret"]["in_step"] is None
        assert answer["tables"]["missing"] is None
        assert problems(minion).startswith("the server does not accept connections: ")
        assert minion.call("slmdb.pg_isready") == {
            "retcode": 2,
            "line": "/var/run/postgresql:5432 - no response",
        }
        assert minion.loaders.context["retcode"] == 2
        assert "The database cannot be asked" in minion.call("slmdb.revision")["comment"]
    finally:
        minion.call("slmdb_service.start")


def test_a_pillar_with_mistakes_is_named_and_does_not_stop_the_report(minion):
    minion.tell({"slm_database": {"health": {"timeout": "long", "tables": 5}, "prot": 1}})
    said = problems(minion)
    assert "slm_database:health:timeout" in said
    assert "slm_database:prot" in said


def test_the_return_code_reaches_the_shell(minion):
    command = [str(Path(sys.executable).with_name("salt-call")), "-c", str(minion.directory)]
    command += ["--local", "--log-level=quiet", "--retcode-passthrough", "--out=json"]
    healthy = subprocess.run([*command, "slmdb.health", "timeout=15"], capture_output=True)
    assert json.loads(healthy.stdout)["local"]["healthy"] is True
    assert healthy.returncode == 0
    with stopped(minion.call("slmdb_instance.facts")["pid"]):
        ill = subprocess.run([*command, "slmdb.health"], capture_output=True, check=False)
    assert json.loads(ill.stdout)["local"]["healthy"] is False
    assert ill.returncode == 1


def test_schema_lists_the_tables(minion):
    execute(minion, "CREATE TABLE nodes (id int PRIMARY KEY)", "autobot_slm")
    try:
        answer = minion.call("slmdb.schema")
        assert answer["database"] == "autobot_slm"
        assert answer["tables"]["public.nodes"]["owner"] == "postgres"
        assert answer["tables"]["public.nodes"]["bytes"] == 8192
        assert "nodes" not in answer["missing"]
        assert "alert_rules" in answer["missing"]
    finally:
        execute(minion, "DROP TABLE nodes", "autobot_slm")


def test_settings_are_what_the_formula_uses_without_secrets(minion):
    given = {"primary_conninfo": "host=a password=canary", "work_mem": "8MB"}
    minion.tell({"slm_database": {"port": 5999, "settings": given}})
    shown = minion.call("slmdb.settings")
    assert shown["port"] == 5999
    assert shown["database"] == "autobot_slm"
    assert shown["settings"]["work_mem"] == "8MB"
    assert "canary" not in json.dumps(shown)


def test_a_host_without_an_instance(bare, minions):
    minion = minions()
    answer = ask(minion)
    assert (
        "instance 15/main does not exist; state.apply slm_database makes it" in answer["problems"]
    )
    assert minion.call("slmdb.pg_isready")["retcode"] == 2
    assert minion.call("slmdb.pending")["restart"] == []
    assert minion.call("slmdb.pending")["migrations"] == []
