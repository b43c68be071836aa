"""The whole formula on a host without systemd: what one command makes true, and keeps true."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import psycopg2
import pytest
import yaml

from tests.support import documents
from tests.support import world as worlds
from tests.support.wait import until


def outcomes(run) -> dict:
    """State id to its result, of a whole run."""
    return {chunk["__id__"]: chunk for chunk in run.raw.values()}


def apply(minion, sls: str = "slm_database", **keywords):
    run = minion.call("state.apply", sls, **keywords)
    return outcomes(run)


@pytest.fixture
def host(minions):
    """A bare host and a Salt with an empty pillar."""
    worlds.fresh()
    return minions()


def begin_applied(minions) -> None:
    """Begin a world to which the formula was applied, its server stopped; applied only once."""
    if "applied" not in worlds.STATE["snapshots"]:
        worlds.fresh()
        minion = minions()
        assert failures(apply(minion)) == {}
        minion.call("slmdb_server.forget")
        minion.call("slmdb_service.stop")
        worlds.keep("applied")
    worlds.fresh("applied")


@pytest.fixture
def applied(minions):
    """A host to which the formula was applied, its server running."""
    begin_applied(minions)
    minion = minions()
    minion.call("slmdb_service.start")
    return minion


def failures(states: dict) -> dict:
    return {name: one["comment"] for name, one in states.items() if one["result"] is False}


def changed(states: dict) -> set:
    return {name for name, one in states.items() if one["changes"]}


def test_what_test_mode_announces_is_what_changes(host):
    """On a bare host nothing fails, nothing is touched, and the announced set is what changes."""
    announced = apply(host, test=True)
    assert failures(announced) == {}
    assert not host.call("slmdb_instance.facts")["exists"]
    made = apply(host)
    assert failures(made) == {}
    assert changed(made) == changed(announced)
    for unit in ("Our unit is what starts the instance", "The backend's unit knows its database"):
        assert made[unit]["comment"] == "Skipped: systemd does not run this host."
    assert changed(apply(host)) == set()
    assert changed(apply(host, test=True)) == set()


@pytest.mark.once
def test_an_application_that_is_locked_out_in_every_way_gets_in_again(applied):
    """One run repairs it all: nothing that comes before needs the database that is closed."""
    for drift in (
        "ALTER ROLE autobot_slm VALID UNTIL '2020-01-01'",
        "REVOKE ALL ON DATABASE autobot_slm FROM autobot_slm",
        "ALTER DATABASE autobot_slm ALLOW_CONNECTIONS false CONNECTION LIMIT 0",
    ):
        applied.call("slmdb_server.execute", drift)
    applied.tell(None)
    announced = apply(applied, test=True)
    assert failures(announced) == {}
    wanted = {"The roles are present", "The databases are present"}
    assert changed(announced) == wanted
    assert not applied.call("slmdb.health")["healthy"]
    made = apply(applied)
    assert (failures(made), changed(made)) == ({}, wanted)
    assert changed(apply(applied)) == set()
    assert applied.call("slmdb.health", timeout=15)["problems"] == []


def test_the_socket_answers(applied):
    """The health check of the deployment, letter for letter."""
    command = ["pg_isready", "-U", "autobot_slm", "-d", "autobot_slm"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "/var/run/postgresql:5432 - accepting connections"


def test_health_is_good_after_an_apply(applied):
    """A fresh host without a backend is healthy."""
    report = applied.call("slmdb.health", timeout=15)
    assert (report["healthy"], report["problems"]) == (True, [])
    json.dumps(report)


def test_clean_keeps_data_roles_and_secret_and_names_them(applied):
    """Without keys everything else is undone; a new apply takes up what was kept."""
    secret = Path("/etc/autobot/slm-secrets.env").read_bytes()
    announced = apply(applied, "slm_database.clean", test=True)
    cleaned = apply(applied, "slm_database.clean")
    assert failures(cleaned) == {}
    assert changed(cleaned) == changed(announced) != set()
    kept = cleaned["What was kept is named"]["comment"]
    for word in (
        "instance 15/main",
        "role autobot_slm",
        "/etc/autobot/slm-secrets.env",
        "packages",
    ):
        assert word in kept
    assert changed(apply(applied, "slm_database.clean")) == set()
    assert not Path("/etc/postgresql/15/main/conf.d/50-autobot-slm.conf").exists()
    assert not Path("/var/lib/autobot-slm-database/settings.json").exists()
    assert failures(apply(applied)) == {}
    assert Path("/etc/autobot/slm-secrets.env").read_bytes() == secret
    assert changed(apply(applied)) == set()


def test_clean_gives_up_what_pillar_names(applied, minions):
    """A key per thing: with all of them nothing of the database is left."""
    minion = minions({"slm_database": {"clean": {"data": True, "role": True, "secret": True}}})
    cleaned = apply(minion, "slm_database.clean")
    assert failures(cleaned) == {}
    assert not Path("/etc/postgresql/15/main").exists()
    assert not Path("/var/lib/postgresql/15/main").exists()
    assert not Path("/etc/autobot/slm-secrets.env").exists()


INSTANCE = "The instance is gone where pillar says so"


@pytest.mark.parametrize(
    "statement, name",
    [
        ("CREATE DATABASE precious", "database precious"),
        ("CREATE ROLE precious LOGIN", "role precious"),
        ("CREATE ROLE precious", "role precious"),
        ("CREATE SCHEMA precious", "schema precious in database postgres"),
        ("CREATE TABLE precious ()", "relation precious in database postgres"),
        ("CREATE TYPE precious AS ENUM ('a')", "type precious in database postgres"),
        ("SELECT lo_create(4711)", "large object 4711 in database postgres"),
        ("CREATE FUNCTION precious() RETURNS int LANGUAGE sql AS 'SELECT 1'", "routine precious"),
    ],
)
def test_clean_spares_an_instance_with_anything_of_somebody_else(applied, minions, statement, name):
    """With every key: ours goes, the instance stays, and one line says why and what to do."""
    applied.call("slmdb_server.execute", statement)
    minion = minions({"slm_database": {"clean": {"data": True, "role": True}}})
    announced = apply(minion, "slm_database.clean", test=True)
    cleaned = apply(minion, "slm_database.clean")
    assert failures(cleaned) == {}
    assert changed(cleaned) == changed(announced)
    comment = cleaned[INSTANCE]["comment"]
    assert comment == announced[INSTANCE]["comment"]
    assert f"instance 15/main stays: it holds {name}" in comment and "\n" not in comment
    assert minion.call("slmdb_foreign.found")[0].startswith(name)
    assert minion.call("slmdb_database.read", ["autobot_slm"]) == {}
    assert minion.call("slmdb_role.read", ["autobot_slm"]) == {}


def test_clean_of_the_data_alone_keeps_every_role(applied, minions):
    """Each by its own key: the instance would take the roles along."""
    minion = minions({"slm_database": {"clean": {"data": True}}})
    announced = apply(minion, "slm_database.clean", test=True)
    cleaned = apply(minion, "slm_database.clean")
    assert failures(cleaned) == {}
    assert changed(cleaned) == changed(announced)
    assert "slm_database:clean:role" in cleaned[INSTANCE]["comment"]
    assert minion.call("slmdb_database.read", ["autobot_slm"]) == {}
    assert list(minion.call("slmdb_role.read", ["autobot_slm"])) == ["autobot_slm"]


def test_an_extension_s_members_are_nobody_s_data(applied, minions):
    """pg_stat_statements in database postgres keeps no instance."""
    applied.call("slmdb_server.execute", "CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
    minion = minions({"slm_database": {"clean": {"data": True, "role": True}}})
    assert failures(apply(minion, "slm_database.clean")) == {}
    assert not Path("/var/lib/postgresql/15/main").exists()


EVERYTHING = {"data": True, "role": True, "secret": True, "packages": True}


def test_clean_of_everything_is_announced(applied, minions):
    """The instance that needs them goes in the same run; a booted host's packages go in earnest."""
    minion = minions({"slm_database": {"clean": EVERYTHING}})
    announced = apply(minion, "slm_database.clean", test=True)
    assert failures(announced) == {}
    packages = announced["The packages are as they were where pillar says so"]["changes"]
    assert packages["postgresql-15"] == {"old": "installed", "new": None}


def test_the_packages_stay_while_an_instance_needs_them(applied, minions):
    """A role of somebody keeps the instance. In test mode only: the machine's packages are real."""
    applied.call("slmdb_server.execute", "CREATE ROLE precious")
    minion = minions({"slm_database": {"clean": EVERYTHING}})
    announced = apply(minion, "slm_database.clean", test=True)
    assert "an instance is there and needs them" in str(failures(announced))


def test_a_wrong_pillar_touches_nothing(host, minions):
    """Every mistake is named at once, and the host is byte for byte as before."""
    before = fingerprint()
    minion = minions(
        {"slm_database": {"port": 70000, "rolle": "x", "hba": {"preset": "open"}, "version": []}}
    )
    states = apply(minion)
    comment = states["The pillar is valid"]["comment"]
    for key in ("slm_database:port", "slm_database:rolle", "slm_database:hba:preset", "version"):
        assert key in comment
    assert len(failures(states)) == len(states) - 1
    assert fingerprint() == before


def fingerprint() -> dict:
    """Path to content and owner of everything that the formula could touch."""
    found = {}
    for top in ("/etc", "/var/lib/postgresql", "/var/lib/autobot-slm-database"):
        for path in sorted(Path(top).rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


def test_each_component_can_be_applied_alone(applied):
    """On a host that is as it should be, no component changes anything."""
    names = "package policy instance config access service role secret database backend record"
    for sls in names.split():
        states = apply(applied, f"slm_database.{sls}")
        assert (sls, failures(states), changed(states)) == (sls, {}, set())


def test_settings_that_only_new_sessions_get(applied, minions):
    """log_connections stays what it was in an older session: the run must not judge by its own."""
    minion = minions({"slm_database": {"settings": {"log_connections": True}}})
    states = apply(minion)
    assert failures(states) == {}
    assert changed(states) == {"The configuration is applied", "The settings are recorded"}
    assert minion.call("slmdb_server.query", "SHOW log_connections")[0]["log_connections"] == "on"


def test_a_parked_port_is_no_problem_and_comes_with_a_permitted_restart(applied, minions):
    """Later a port waits for its restart; clients and health go by the one in force."""
    settings = {"port": 5544}
    minion = minions({"slm_database": settings})
    assert failures(apply(minion)) == {}
    report = minion.call("slmdb.health", timeout=15)
    assert report["problems"] == []
    assert [row["name"] for row in report["pending"]] == ["port"]
    assert b":5432/" in Path("/etc/autobot/slm-secrets.env").read_bytes()
    minion.tell({"slm_database": {**settings, "restart": "now"}})
    announced, made = apply(minion, test=True), apply(minion)
    assert failures(made) == {}
    assert changed(made) == changed(announced)
    assert minion.call("slmdb_instance.facts")["port"] == 5544
    assert b":5544/" in Path("/etc/autobot/slm-secrets.env").read_bytes()
    minion.tell({"slm_database": settings})
    assert changed(apply(minion)) <= {"The settings are recorded"}
    assert minion.call("slmdb.health", timeout=15)["healthy"] is True


SERVER_S = ("The roles are present", "The password is persisted", "The databases are present")


def test_a_stopped_server_hides_no_changes_that_are_none(applied):
    """What test mode announces of a host that was applied before is that the server starts."""
    applied.call("slmdb_server.forget")
    applied.call("slmdb_service.stop")
    announced = apply(applied, test=True)
    for name in SERVER_S:
        assert announced[name]["result"] is True
        assert announced[name]["comment"] == "Cannot be compared while the server is stopped."
    made = apply(applied)
    assert failures(made) == {}
    assert changed(made) == changed(announced) != set()


def test_a_stopped_server_and_another_pillar(applied, minions):
    """There is more to do than to start it; how much is known when it runs."""
    applied.call("slmdb_server.forget")
    applied.call("slmdb_service.stop")
    minion = minions({"slm_database": {"roles": {"reporting": {}}}})
    announced = apply(minion, test=True)
    for name in SERVER_S:
        assert announced[name]["result"] is None, announced[name]
    assert failures(apply(minion)) == {}


def test_a_server_that_does_not_let_us_in_is_not_called_stopped(applied):
    """It runs: to say that it does not would send the operator the wrong way."""
    rules = Path("/etc/postgresql/15/main/pg_hba.conf")
    rules.write_text("local all all reject\n")
    applied.call("slmdb_server.execute", "SELECT pg_reload_conf()")
    applied.call("slmdb_server.forget")
    until(lambda: applied.call("slmdb_server.refused"))
    answer = applied.state("slmdb_role.present", test=True)
    assert (answer.result, answer.changes) == (True, {})
    assert answer.comment == "Cannot be compared while the server runs but does not let us in."


def told_by(document: str) -> dict:
    """All that the manual's section on it, or the examples of pillar.example, say of a reader."""
    text = (documents.CHECKOUT / document).read_text()
    if document.endswith(".md"):
        section = text.partition("### A role that only reads\n")[2]
        return yaml.safe_load(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    told: dict = {"slm_database": {}, "vault": {"importer": {"password": "x" * 32}}}
    for block in re.findall(r"(?:^ *# \| .*\n)+", text, re.MULTILINE):
        for key, value in yaml.safe_load(re.sub(r"(?m)^ *# \| ", "", block)).items():
            if key in ("roles", "databases", "allow_remote", "listen_addresses"):
                told["slm_database"][key] = value
            if key == "hba":
                told["slm_database"].setdefault(key, {}).update(value)
    return told


def refusal(connection, statement: str) -> str:
    with pytest.raises(psycopg2.Error) as error, connection.cursor() as cursor:
        cursor.execute(statement)
    return error.value.diag.message_primary


@pytest.mark.once
@pytest.mark.parametrize("document", ["docs/configuration.md", "pillar.example"])
def test_a_role_that_only_reads_as_the_manual_has_it(host, document):
    """From another address, with the password that the host made, after the first run."""
    subprocess.run(["make-ssl-cert", "generate-default-snakeoil"], check=True)
    subprocess.run(["ip", "address", "add", "10.1.2.3/24", "dev", "lo"], check=True)
    try:
        told = told_by(document)
        assert failures(apply(host.tell(told))) == {}
        report = host.call("slmdb.health", timeout=15)
        assert report["problems"] == []
        host.call(
            "slmdb_server.execute", "CREATE TABLE t AS SELECT 42 AS n", database="autobot_slm"
        )
        secret = Path(told["slm_database"]["roles"]["reporting"]["secret"]["file"]).read_text()
        connection = psycopg2.connect(
            host="10.1.2.3",
            user="reporting",
            dbname="autobot_slm",
            sslmode="require",
            password=secret.strip().partition("=")[2],
        )
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT n, (SELECT count(rolpassword) FROM pg_authid) > 0 FROM t")
            assert cursor.fetchall() == [(42, True)]
        assert refusal(connection, "INSERT INTO t VALUES (1)") == "permission denied for table t"
        for what in ("TABLE u ()", "TEMPORARY TABLE u ()", "SCHEMA u"):
            assert refusal(connection, f"CREATE {what}").startswith("permission denied")
        connection.close()
    finally:
        subprocess.run(["ip", "address", "del", "10.1.2.3/24", "dev", "lo"], check=True)
