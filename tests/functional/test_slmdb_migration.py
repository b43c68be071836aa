"""A migration runs in the right order or not at all, and says where the database is afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.support import backend
from tests.support.backend import sql
from tests.support.wait import until

APPROVED = {"slm_database": {"maintenance": {"approve": True}}}
SLEEP = "SELECT pg_sleep(99)"
BEGUN = Path("/var/lib/autobot-slm-database/initialize.begun")
# A migration that lasts until the test has seen what it wants to see meanwhile.
SLOW = (
    "open('begun', 'w').close()",
    "while not os.path.exists('go-on'):",
    "    time.sleep(0.05)",
)


@pytest.fixture(scope="module")
def venv():
    """Made outside of the world, and before it is fresh."""
    return backend.venv()


@pytest.fixture(scope="module")
def applied(venv, shared_server):
    """A running server with the role, database, secret and rules of an empty pillar."""
    for noun in ("slmdb_role", "slmdb_database", "slmdb_secret", "slmdb_access"):
        shared_server.call(f"{noun}.apply")
    return shared_server


@pytest.fixture
def minion(applied, venv):
    """That server with an empty database, the backend deployed, an approval for this run."""
    applied.tell(APPROVED)
    BEGUN.unlink(missing_ok=True)
    empty(applied)
    backend.deploy(venv)
    yield applied
    backend.remove()
    applied.tell(None)


@pytest.fixture
def migrated(minion):
    """That server with the database at the head."""
    if not minion.call("slmdb_server.query", "SELECT 1 FROM pg_database WHERE datname = 'kept'"):
        assert apply(minion)["result"] is True
        copy(minion, "autobot_slm", "kept")
    copy(minion, "kept", "autobot_slm")
    return minion


def copy(minion, source, target):
    """Replace a database by a copy of another, whoever is connected to the two."""
    minion.call("slmdb_server.forget")
    for statement in (
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{source}'",
        f"DROP DATABASE IF EXISTS {target} WITH (FORCE)",
        f"CREATE DATABASE {target} TEMPLATE {source} OWNER autobot_slm",
    ):
        minion.call("slmdb_server.execute", statement)


def empty(minion):
    schema = "DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION autobot_slm"
    minion.call("slmdb_server.execute", schema, database="autobot_slm")


def execute(minion, statement):
    minion.call("slmdb_server.execute", statement, database="autobot_slm")


def query(minion, statement):
    return minion.call("slmdb_server.query", statement, database="autobot_slm")


def tables(minion):
    rows = query(minion, "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'")
    return {row["name"] for row in rows}


def current(minion):
    return minion.call("slmdb_migration.tracked")["current"]


def apply(minion, **keywords):
    return minion.state("slmdb_migration.applied", **keywords)


def refused(minion, **keywords):
    """The one line with which a migration is refused or fails."""
    answer = apply(minion, **keywords)
    assert answer["result"] is False
    assert "Traceback" not in answer["comment"]
    assert "\n" not in answer["comment"]
    return answer["comment"]


def test_an_empty_database_is_initialized_then_migrated(minion):
    answer = apply(minion)
    assert answer["result"] is True, answer["comment"]
    assert current(minion) == ["d1"]
    assert tables(minion) == {*backend.TABLES, "alembic_version", "heartbeats"}
    assert "Restore point: " in answer["comment"]
    assert "d1, as the backend's code wants" in answer["comment"]


def test_the_second_run_changes_nothing(migrated):
    answer = apply(migrated)
    assert (answer["result"], answer["changes"]) == (True, {})


def test_a_dry_run_names_the_revisions_in_order_and_changes_nothing(minion):
    announced = apply(minion, test=True)
    assert announced["result"] is None
    lines = announced["changes"]["revision"]["new"]
    assert [line.partition(": ")[0] for line in lines] in backend.ORDERS
    assert "a1: Nodes have a region" in lines
    assert announced["changes"]["tables"]["old"].startswith("missing: nodes, ")
    assert tables(minion) == set()
    assert apply(minion)["changes"] == announced["changes"]


def test_the_plan_gives_the_same_as_data(minion):
    plan = minion.call("slmdb_migration.plan")
    assert plan["refused"] is None
    assert plan["initialize"] == list(backend.TABLES)
    assert [one["revision"] for one in plan["steps"]] in backend.ORDERS
    assert plan["targets"] == ["d1"]
    assert [one["revision"] for one in minion.call("slmdb_migration.plan", "b1")["steps"]] == [
        "a1",
        "b1",
    ]


def test_the_sql_can_be_read_beforehand(minion):
    text = minion.call("slmdb_migration.sql")
    assert text.index("ALTER TABLE nodes ADD region") < text.index("CREATE TABLE heartbeats")
    assert tables(minion) == set()
    assert apply(minion)["result"] is True
    assert minion.call("slmdb_migration.sql") == ""


def test_alembic_before_initialize_is_impossible(minion):
    answer = None
    try:
        answer = minion.call("slmdb_alembic.alembic", ["upgrade", "head"], 60)
    except Exception as err:
        assert "Alembic does not run before the backend's initialize()" in str(err)
    assert answer is None
    assert tables(minion) == set()


@pytest.mark.parametrize("given", ["/bin/true", "/bin/false", "venv/bin/python -c pass"])
def test_an_initialize_that_makes_no_tables_ends_the_migration(minion, given):
    pillar = {"slm_database": {**APPROVED["slm_database"], "migration": {"initialize": given}}}
    minion.tell(pillar)
    assert "nothing was migrated" in refused(minion)
    assert tables(minion) == set()


@pytest.mark.once
def test_the_backend_gets_its_environment_and_is_not_root(minion):
    backend.add(
        "e1",
        "d1",
        "Who am I",
        "who = f\"{os.geteuid()} {os.environ['USER']} {os.getcwd()}\"",
        "op.execute(f\"COMMENT ON TABLE nodes IS '{who}'\")",
    )
    assert apply(minion)["result"] is True
    row = query(minion, "SELECT obj_description('nodes'::regclass) AS said")[0]
    identity, name, directory = row["said"].split()
    assert identity != "0"
    assert (name, directory) == (backend.USER, str(backend.DIRECTORY))


@pytest.mark.once
def test_a_target_that_is_not_the_head(minion):
    assert apply(minion, target="b1")["result"] is True
    assert current(minion) == ["b1"]
    assert apply(minion, target="b1")["changes"] == {}
    assert apply(minion)["result"] is True
    assert current(minion) == ["d1"]


@pytest.mark.once
def test_a_step_is_for_a_command_not_for_a_state(minion):
    assert "is a step, not a place" in refused(minion, target="+1")
    assert minion.call("slmdb_migration.apply", "+1")["to"] == ["a1"]
    assert minion.call("slmdb_migration.apply", "+1")["to"] == ["b1"]


@pytest.mark.once
def test_several_heads(minion):
    backend.add("e1", "d1", "One way", sql("SELECT 1"))
    backend.add("e2", "d1", "Another way", sql("SELECT 2"))
    line = refused(minion)
    assert "head is ambiguous, the history has 2 heads: e1, e2" in line
    assert tables(minion) == set()
    assert apply(minion, target="heads")["result"] is True
    assert current(minion) == ["e1", "e2"]


@pytest.mark.once
def test_one_of_the_heads_where_the_database_is_at_both(minion):
    """There is nothing to do, and nothing to go down to."""
    backend.add("e1", "d1", "One way", sql("SELECT 1"))
    backend.add("e2", "d1", "Another way", sql("SELECT 2"))
    assert apply(minion, target="heads")["result"] is True
    answer = apply(minion, target="e1")
    assert (answer["result"], answer["changes"]) == (True, {}), answer["comment"]


@pytest.mark.parametrize("verb", ["plan", "apply", "differences", "sql"])
@pytest.mark.parametrize("target", [1, 0, 1.5, ["head"]])
def test_a_target_that_is_no_text_is_refused(minion, verb, target):
    """A command line's +1 and 0002 are numbers to Salt, unless they are quoted twice."""
    with pytest.raises(SaltInvocationError) as caught:
        minion.modules[f"slmdb_migration.{verb}"](target)
    assert "\"'+1'\"" in str(caught.value)
    assert tables(minion) == set()


@pytest.fixture
def unit_files(minion, monkeypatch):
    """What systemd would say of the unit's EnvironmentFile=, beside the formula's own."""

    def told(*files):
        own = "/etc/autobot/slm-secrets.env (ignore_errors=no)"
        shown = {"EnvironmentFiles": [own, *files], "User": [backend.USER]}
        alembic = minion.modules["slmdb_alembic.environment"].__globals__
        monkeypatch.setitem(alembic, "_unit", lambda: shown)

    return told


def test_files_of_the_unit_belong_to_whom_they_like(minion, unit_files, tmp_path):
    """They are read as systemd does: by root, sorted where a pattern stands for several."""
    for name in ("b.env", "a.env"):
        (tmp_path / name).write_text(f"FROM_{name[0].upper()}=1\n")
        os.chown(tmp_path / name, 4711, 4711)
    os.chmod(tmp_path, 0o777)
    unit_files(f"{tmp_path}/*.env (ignore_errors=no)", "/nowhere.env (ignore_errors=yes)")
    names = minion.call("slmdb_alembic.environment")
    assert {"FROM_A", "FROM_B", "SLM_DATABASE_URL"}.issubset(names)


def test_a_file_of_the_unit_that_is_missing_is_named(minion, unit_files):
    unit_files("/nowhere.env (ignore_errors=no)")
    with pytest.raises(CommandExecutionError) as caught:
        minion.call("slmdb_alembic.environment")
    assert "/nowhere.env, an EnvironmentFile= of the backend's unit" in str(caught.value)


def test_an_environment_that_cannot_be_read_is_said_before_the_gate(minion, tmp_path):
    """Also by a dry run; nobody gets an approval for what then fails."""
    os.chmod(tmp_path, 0o777)
    (tmp_path / "x.env").write_text("A=1\n")
    minion.tell({"slm_database": {"secret": {"file": f"{tmp_path}/x.env"}}})
    assert str(tmp_path) in refused(minion)
    assert str(tmp_path) in refused(minion, test=True)
    assert tables(minion) == set()


def test_a_revision_that_the_code_does_not_know(migrated):
    execute(migrated, "UPDATE alembic_version SET version_num = 'f00'")
    assert "revision f00, which the backend's code does not know" in refused(migrated)


@pytest.mark.once
def test_a_downgrade_is_refused(migrated):
    assert "a1 is behind d1" in refused(migrated, target="a1")
    assert current(migrated) == ["d1"]


@pytest.mark.once
def test_an_unknown_target_is_refused(minion):
    assert "slm_database:migration:target: nowhere" in refused(minion, target="nowhere")


@pytest.mark.once
def test_a_failing_migration_leaves_the_database_where_it_was(migrated):
    backend.add("e1", "d1", "Fails", sql("CREATE TABLE half (id int)"), sql("SELECT 1/0"))
    line = refused(migrated)
    assert "division by zero" in line
    assert "The database is where it was: d1." in line
    assert "half" not in tables(migrated)


def test_a_failing_migration_shows_no_secret(migrated):
    backend.add("e1", "d1", "Tells", 'raise ValueError(os.environ["SLM_DATABASE_URL"])')
    line = refused(migrated)
    assert "ValueError: " in line
    with open("/etc/autobot/slm-secrets.env", encoding="utf-8") as stream:
        password = stream.read().split("SLM_DB_PASSWORD=")[1].splitlines()[0].strip("\"'")
    assert password not in line
    assert "postgresql+asyncpg://autobot_slm:" + password not in line


def test_a_migration_that_a_signal_kills_is_called_that(migrated):
    """Nobody looks in a migration for what the kernel did for want of memory."""
    backend.add("e1", "d1", "Dies", sql("CREATE TABLE half (id int)"), "os.kill(os.getpid(), 9)")
    assert (
        "alembic upgrade head was killed by signal 9 (out of memory? journalctl -k tells). "
        "The database is where it was: d1. Mend it"
    ) in refused(migrated)


@pytest.mark.once
@pytest.mark.parametrize("back", [True, False], ids=["for a moment", "for longer"])
def test_a_server_that_goes_away_in_a_migration(migrated, monkeypatch, back):
    """What failed is named, and where the database is, as soon as anybody can know."""
    patience = migrated.modules["slmdb_migration_run.ways_out"].func.__globals__
    monkeypatch.setitem(patience, "PATIENCE", 30 if back else 1)
    begun = backend.DIRECTORY / "begun"
    begun.write_text("")
    begun.chmod(0o666)
    told = f"open({str(begun)!r}, 'w').write('begun')"
    backend.add("e1", "d1", "Sleeps", sql("CREATE TABLE half (id int)"), told, sql(SLEEP))
    kill = f"kill -9 {migrated.call('slmdb_instance.facts')['pid']}"
    start = "sleep 1; until pg_ctlcluster 15 main start; do sleep 0.5; done"
    script = f"until [ -s {begun} ]; do sleep 0.1; done; {kill}; {start if back else ''}"
    with subprocess.Popen(["timeout", "90", "sh", "-c", script], stdout=-3, stderr=-3):
        line = refused(migrated)
    if not back:
        subprocess.run(["sh", "-c", start], check=True, capture_output=True, timeout=60)
    assert line.startswith("alembic upgrade head failed: ")
    where = (
        "The database is where it was: d1."
        if back
        else "The server is away; slmdb.revision tells where the database is when it is back."
    )
    assert f". {where} Mend it and run again; restore point " in line
    assert "half" not in tables(migrated)
    assert current(migrated) == ["d1"]


@pytest.mark.once
def test_a_migration_that_partly_committed(minion):
    backend.add("e1", "d1", "Works", sql("CREATE TABLE whole (id int)"))
    backend.add("f1", "e1", "Fails", sql("SELECT 1/0"))
    line = refused(minion)
    assert "It partly committed: the database went from no revision to e1, not to f1." in line
    assert current(minion) == ["e1"]


@pytest.mark.once
def test_a_failure_says_what_leads_back_and_what_is_in_force(migrated):
    backend.add("e1", "d1", "Works", sql("CREATE TABLE whole (id int)"))
    backend.add("f1", "e1", "Fails", sql("SELECT 1/0"))
    answer = apply(migrated)
    assert answer["result"] is False
    assert answer["changes"] == {"revision": {"old": "d1", "new": "e1"}}
    assert "Mend it and run again; restore point 2" in answer["comment"]
    assert "-before-f1" in answer["comment"]
    row = query(migrated, "SELECT count(*) AS n FROM alembic_version")[0]
    assert row["n"] == 1


def test_a_restore_is_named_where_there_is_a_backup(minion):
    """The sentence names the command, the restore point and the backup that it begins with."""
    words = minion.modules["slmdb_migration_run.ways_out"]("before-f1", "20261126-010203F")
    assert "slmdb_backup.restore restore_point=before-f1" in words
    assert "20261126-010203F" in words


@pytest.mark.once
def test_a_part_that_was_committed_outside_the_transaction(migrated):
    backend.add(
        "e1",
        "d1",
        "Escapes",
        "with op.get_context().autocommit_block():",
        "    op.execute('CREATE TABLE escaped (id int)')",
        sql("SELECT 1/0"),
    )
    line = refused(migrated)
    assert "The database is at d1 as before, but its tables changed" in line


@pytest.mark.once
def test_a_lock_held_by_somebody_names_him_and_leaves_him_alone(minion):
    minion.tell({"slm_database": {**APPROVED["slm_database"], "migration": {"lock_timeout": 3}}})
    assert apply(minion, target="b1")["result"] is True
    holder = minion.call("slmdb_server.connect", "autobot_slm", application_name="somebody")
    with holder.cursor() as cursor:
        cursor.execute("LOCK TABLE trace_spans; SELECT pg_backend_pid()")
        pid = cursor.fetchone()[0]
        line = refused(minion)
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)
    holder.close()
    assert "lock timeout" in line
    assert f"It waited for process {pid} of user postgres" in line
    assert "somebody" in line
    assert apply(minion)["result"] is True


@pytest.mark.once
def test_a_migration_that_takes_too_long_is_ended(migrated):
    migrated.tell({"slm_database": {**APPROVED["slm_database"], "migration": {"timeout": 3}}})
    backend.add("e1", "d1", "Sleeps", sql("CREATE TABLE late (id int)"), sql("SELECT pg_sleep(99)"))
    line = refused(migrated)
    assert "took longer than 3 s" in line
    assert "The database is where it was: d1." in line
    rows = query(
        migrated,
        "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(99)%' "
        "AND pid <> pg_backend_pid()",
    )
    assert rows == []


@pytest.mark.once
def test_a_second_migration_at_the_same_time_is_refused(migrated):
    backend.add("e1", "d1", "Slow", *SLOW)
    command = [os.path.join(os.path.dirname(sys.executable), "salt-call"), "--local"]
    command += ["-c", str(migrated.directory), "--log-level=quiet", "slmdb_migration.apply"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until((backend.DIRECTORY / "begun").exists)
    assert "Another migration of this database runs" in refused(migrated)
    (backend.DIRECTORY / "go-on").touch()
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    assert current(migrated) == ["e1"]


@pytest.mark.once
def test_a_run_that_was_killed_can_be_repeated(migrated):
    backend.add("e1", "d1", "Slow", sql("CREATE TABLE late (id int)"), *SLOW)
    command = [os.path.join(os.path.dirname(sys.executable), "salt-call"), "--local"]
    command += ["-c", str(migrated.directory), "--log-level=quiet", "slmdb_migration.apply"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until((backend.DIRECTORY / "begun").exists)
    first.kill()
    first.wait()
    # What the killed run had started still works: that is said, and waited for.
    assert "Another migration of this database runs" in refused(migrated)
    (backend.DIRECTORY / "go-on").touch()
    seen = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'slmdb_migration'"
    until(lambda: not query(migrated, seen))
    assert apply(migrated)["result"] is True
    assert current(migrated) == ["e1"]


def test_without_a_window_or_an_approval_nothing_changes(minion):
    assert apply(minion, target="a1")["result"] is True
    minion.tell(None)
    line = refused(minion)
    assert "A schema change needs a window or an approval" in line
    assert "slm_database:maintenance:approve" in line
    assert current(minion) == ["a1"]
    assert apply(minion, test=True)["result"] is None


def test_the_first_tables_of_an_empty_database_need_no_window(minion):
    minion.tell(None)
    answer = apply(minion)
    assert answer["result"] is True, answer["comment"]
    assert "Permitted: the database is empty." in answer["comment"]


def test_the_first_tables_are_made_again_after_a_kill(minion):
    """What was half made of an empty database disturbs nobody either."""
    minion.tell({"slm_database": {"migration": {"initialize": "/bin/false"}}})
    assert "initialize() failed" in refused(minion)
    execute(minion, "CREATE SEQUENCE half_made")
    minion.tell(None)
    answer = apply(minion)
    assert answer["result"] is True, answer["comment"]
    assert "Permitted: the database is empty." in answer["comment"]
    assert apply(minion)["changes"] == {} and not BEGUN.exists()


def test_an_empty_database_with_nothing_to_come_stays_so(minion):
    """Nothing is expected and no revision is there: initialize() would be planned for ever."""
    minion.tell({"slm_database": {"health": {"tables": []}}})
    for path in backend.DIRECTORY.glob("**/versions/*.py"):
        path.unlink()
    answer = apply(minion)
    assert (answer["result"], answer["changes"]) == (True, {}), answer["comment"]


def test_migrations_that_the_backend_tracks_itself_are_left_to_it(minion):
    for name in backend.TABLES:
        execute(minion, f"CREATE TABLE {name} (id int)")
    execute(minion, "CREATE TABLE migrations_applied (name text, applied_at timestamptz)")
    execute(minion, "INSERT INTO migrations_applied VALUES ('0007_slo', now())")
    answer = apply(minion)
    assert (answer["result"], answer["changes"]) == (True, {})
    assert (
        "migrations_applied, which the backend keeps, has 1, the last is 0007_slo"
        in answer["comment"]
    )
    assert "alembic_version" not in tables(minion)


def test_a_backend_without_an_alembic_project_that_tracks_itself(minion):
    for name in backend.TABLES:
        execute(minion, f"CREATE TABLE {name} (id int)")
    execute(minion, "CREATE TABLE migrations_applied (name text, applied_at timestamptz)")
    (backend.DIRECTORY / "alembic.ini").unlink()
    answer = apply(minion)
    assert (answer["result"], answer["changes"]) == (True, {}), answer["comment"]
    plan = minion.call("slmdb_migration.plan")
    assert (plan["left_to_the_backend"], plan["refused"]) == (True, None)


def test_a_new_expected_table_does_not_make_a_database_empty(minion):
    """initialize() on a database with tables needs the gate, as any change of the schema."""
    execute(minion, "CREATE TABLE customers (id int)")
    minion.tell({"slm_database": {"health": {"tables": ["nodes"]}}})
    assert "A schema change needs a window or an approval" in refused(minion)
    assert tables(minion) == {"customers"}


def test_an_empty_database_is_initialized_whatever_is_expected(minion):
    minion.tell({"slm_database": {"health": {"tables": []}}})
    answer = apply(minion)
    assert answer["result"] is True, answer["comment"]
    assert set(answer["changes"]) == {"tables", "revision"}
    assert tables(minion).issuperset(backend.TABLES)


def test_a_restore_point_comes_before_initialize_on_a_database_with_data(minion):
    execute(minion, "CREATE TABLE customers (id int)")
    given = {"initialize": "/bin/false"}
    minion.tell({"slm_database": {**APPROVED["slm_database"], "migration": given}})
    line = refused(minion)
    assert "initialize() failed" in line and "restore point 2" in line


def test_what_is_in_the_way_is_named(minion):
    venv = backend.DIRECTORY / "venv"
    venv.unlink()
    assert "has no virtual environment" in refused(minion)
    (venv / "bin").mkdir(parents=True)
    assert "The virtual environment is broken" in refused(minion)
    (venv / "bin/python").symlink_to("/usr/bin/python3")
    assert "Alembic is not installed in it" in refused(minion)
    (backend.DIRECTORY / "alembic.ini").unlink()
    assert "has no Alembic project" in refused(minion)
    assert tables(minion) == set()


def test_a_backend_that_is_not_deployed_has_nothing_to_migrate(minion):
    backend.remove()
    answer = apply(minion)
    assert (answer["result"], answer["changes"]) == (True, {})
    assert answer["comment"].startswith("The backend is not deployed: there is no ")
    assert "not deployed" in minion.call("slmdb_migration.plan")["refused"]


def test_a_stopped_server_is_a_plain_answer(minion):
    minion.call("slmdb_service.stop")
    try:
        assert minion.call("slmdb_migration.plan")["refused"]
        assert apply(minion)["result"] is False
    finally:
        minion.call("slmdb_service.start")


@pytest.mark.once
def test_no_thread_is_left(minion):
    before = threading.active_count()
    assert minion.call("slmdb_migration.apply", "a1")["to"] == ["a1"]
    assert threading.active_count() == before
