"""slmdb.revision gives a plain answer, whatever the database and the backend are like."""

from __future__ import annotations

import os

import pytest

from tests.support import backend
from tests.support.backend import sql


@pytest.fixture(scope="module")
def venv():
    """Made outside of the world, and before it is fresh."""
    return backend.venv()


@pytest.fixture(scope="module")
def applied(venv, shared_server):
    """A running server with the role and the database."""
    for noun in ("slmdb_role", "slmdb_database"):
        shared_server.call(f"{noun}.apply")
    return shared_server


@pytest.fixture
def minion(applied, venv):
    """That server with an empty database, and a deployed backend."""
    applied.tell(None)
    execute(applied, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    backend.deploy(venv)
    yield applied
    backend.remove()
    applied.tell(None)


def execute(minion, statement):
    minion.call("slmdb_server.execute", statement, database="autobot_slm")


def at(minion, *revisions, table="alembic_version"):
    execute(minion, f"CREATE TABLE {table} (version_num text)")
    for revision in revisions:
        execute(minion, f"INSERT INTO {table} VALUES ('{revision}')")


def tracks_itself(minion):
    execute(minion, "CREATE TABLE migrations_applied (name text, applied_at timestamptz)")
    execute(minion, "INSERT INTO migrations_applied VALUES ('0001_first', '2026-01-01')")
    execute(minion, "INSERT INTO migrations_applied VALUES ('0002_next', '2026-01-02')")


def ask(minion):
    answer = minion.call("slmdb.revision")
    assert "\n" not in answer["comment"]
    return answer


def waiting(answer):
    return [one["revision"] for one in answer["waiting"]]


def test_up_to_date(minion):
    at(minion, "d1")
    answer = ask(minion)
    assert (answer["state"], answer["up_to_date"]) == ("up to date", True)
    assert (answer["current"], answer["heads"]) == (["d1"], ["d1"])
    assert answer["tracked_by"] == ["public.alembic_version"]
    assert answer["branched"] is True


def test_behind(minion):
    at(minion, "b1")
    answer = ask(minion)
    assert (answer["state"], answer["up_to_date"]) == ("behind", False)
    assert waiting(answer) in (["c1", "c2", "d1"], ["c2", "c1", "d1"])
    assert answer["waiting"][-1]["message"] == "Traces and rules come together"


def test_on_one_arm_of_a_branch(minion):
    at(minion, "c2")
    assert waiting(ask(minion)) == ["c1", "d1"]


def test_on_both_arms_of_a_branch(minion):
    at(minion, "c1", "c2")
    answer = ask(minion)
    assert answer["current"] == ["c1", "c2"]
    assert waiting(answer) == ["d1"]


def test_an_empty_table_of_alembics(minion):
    at(minion)
    answer = ask(minion)
    assert (answer["state"], answer["current"]) == ("behind", [])
    assert waiting(answer)[:2] == ["a1", "b1"]


def test_several_heads(minion):
    backend.add("e1", "d1", "One way", sql("SELECT 1"))
    backend.add("e2", "d1", "Another way", sql("SELECT 2"))
    at(minion, "e1")
    answer = ask(minion)
    assert answer["heads"] == ["e1", "e2"]
    assert (answer["state"], waiting(answer)) == ("behind", ["e2"])
    assert "The history has 2 heads: e1, e2." in answer["comment"]
    execute(minion, "INSERT INTO alembic_version VALUES ('e2')")
    assert ask(minion)["up_to_date"] is True


def test_code_that_is_older_than_the_database(minion):
    at(minion, "f00")
    answer = ask(minion)
    assert (answer["state"], answer["unknown"]) == ("unknown revision", ["f00"])
    assert "it is older than the database" in answer["comment"]


def test_code_that_is_older_lists_nothing_as_waiting(minion):
    """What is in force cannot be told from what is not."""
    at(minion, "f00")
    assert waiting(ask(minion)) == []
    assert minion.call("slmdb_pending.migrations") == []


def test_what_is_pending_ends_at_the_target(minion):
    at(minion, "a1")
    minion.tell({"slm_database": {"migration": {"target": "b1"}}})
    assert [one["revision"] for one in minion.call("slmdb_pending.migrations")] == ["b1"]
    assert waiting(ask(minion))[-1] == "d1"


def test_migrations_applied_without_an_alembic_project(minion):
    """Nobody has to have Alembic who tracks the schema without it."""
    tracks_itself(minion)
    (backend.DIRECTORY / "alembic.ini").unlink()
    answer = ask(minion)
    assert (answer["state"], answer["up_to_date"]) == ("tracked by the backend", None)
    assert "Alembic" not in answer["comment"]


def test_migrations_applied(minion):
    tracks_itself(minion)
    answer = ask(minion)
    assert (answer["state"], answer["up_to_date"]) == ("tracked by the backend", None)
    assert answer["tracked_by"] == ["public.migrations_applied"]
    assert answer["applied"] == ["0001_first", "0002_next"]
    assert "has 2, the last is 0002_next" in answer["comment"]


def test_both(minion):
    at(minion, "d1")
    tracks_itself(minion)
    answer = ask(minion)
    assert answer["tracked_by"] == ["public.alembic_version", "public.migrations_applied"]
    assert (answer["state"], answer["up_to_date"]) == ("up to date", True)
    assert "the last is 0002_next" in answer["comment"]


def test_neither(minion):
    answer = ask(minion)
    assert (answer["state"], answer["up_to_date"]) == ("not tracked", False)
    assert answer["tracked_by"] == []
    assert "Nothing in the database tracks migrations." in answer["comment"]


def test_another_table_in_another_schema(minion):
    told = {"version_schema": "audit trail", "version_table": 'Alembic "x"'}
    minion.tell({"slm_database": {"migration": told}})
    execute(minion, 'DROP SCHEMA IF EXISTS "audit trail" CASCADE; CREATE SCHEMA "audit trail"')
    at(minion, "d1", table='"audit trail"."Alembic ""x"""')
    try:
        assert ask(minion)["current"] == ["d1"]
    finally:
        execute(minion, 'DROP SCHEMA "audit trail" CASCADE')


def test_no_backend(minion):
    at(minion, "d1")
    backend.remove()
    answer = ask(minion)
    assert (answer["state"], answer["up_to_date"], answer["heads"]) == ("not deployed", None, None)
    assert answer["current"] == ["d1"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no venv", "has no virtual environment"),
        ("no python", "The virtual environment is broken"),
        ("a python that is no program", "cannot be run as"),
        ("no alembic", "Alembic is not installed in it"),
        ("no ini", "has no Alembic project"),
        ("a revision that is no Python", "SyntaxError"),
        ("a revision that leads nowhere", "KeyError"),
        ("a revision that exits", "Alembic cannot be asked with"),
        ("a revision that kills itself", "it was killed by signal 9"),
    ],
)
def test_what_is_in_the_way_is_a_plain_answer(minion, what, words):
    at(minion, "d1")
    venv, versions = backend.DIRECTORY / "venv", backend.DIRECTORY / "migrations/versions"
    if what in ("no venv", "no python", "a python that is no program", "no alembic"):
        venv.unlink()
    if what in ("no python", "a python that is no program", "no alembic"):
        (venv / "bin").mkdir(parents=True)
    python = venv / "bin/python"
    if what == "a python that is no program":
        python.write_text("not a program")
    elif what == "no alembic":
        python.symlink_to("/usr/bin/python3")
    elif what == "no ini":
        (backend.DIRECTORY / "alembic.ini").unlink()
    elif what == "a revision that is no Python":
        (versions / "x.py").write_text("def :")
    elif what == "a revision that leads nowhere":
        backend.add("x1", "nowhere", "Lost")
    elif what == "a revision that exits":
        (versions / "x.py").write_text("import sys; sys.exit('enough')")
    elif what == "a revision that kills itself":
        (versions / "x.py").write_text("import os; os.kill(os.getpid(), 9)")
    answer = ask(minion)
    assert words in answer["comment"]
    assert (answer["state"], answer["up_to_date"]) == ("unknown", None)
    assert answer["current"] == ["d1"]


def test_an_alembic_that_takes_too_long_is_ended(minion):
    said = backend.DIRECTORY / "said"
    said.write_text("")
    os.chmod(said, 0o666)
    path = backend.DIRECTORY / "migrations/versions/x.py"
    write = f"open({str(said)!r}, 'w').write(str(os.getpid()))"
    path.write_text(f"import os, time\n{write}\ntime.sleep(99)\n")
    answer = minion.call("slmdb.revision", 15)
    assert "Alembic did not answer within 15.0 s" in answer["comment"]
    assert said.read_text()
    assert not os.path.exists(f"/proc/{said.read_text()}")


def test_alembic_is_asked_again_only_when_its_files_changed(minion):
    at(minion, "d1")
    asked = backend.DIRECTORY / "asked"
    asked.write_text("")
    os.chmod(asked, 0o666)
    count = f"open({str(asked)!r}, 'a').write('x')\n"
    path = backend.add("e1", "d1", "Counts")
    path.write_text(count + path.read_text())
    for _ in range(3):
        assert ask(minion)["heads"] == ["e1"]
    assert asked.read_text() == "x"
    backend.add("f1", "e1", "Another")
    assert ask(minion)["heads"] == ["f1"]
    assert asked.read_text() == "xx"
    assert ask(minion)["heads"] == ["f1"]
    assert asked.read_text() == "xx"


def test_alembic_is_not_asked_as_root(minion):
    said = backend.DIRECTORY / "said"
    said.write_text("")
    os.chmod(said, 0o666)
    path = backend.add("e1", "d1", "Says")
    line = f"import os\nopen({str(said)!r}, 'w').write(f'{{os.geteuid()}} {{os.getgroups()}}')\n"
    path.write_text(line + path.read_text())
    assert ask(minion)["heads"] == ["e1"]
    identity = said.read_text()
    assert identity
    assert not identity.startswith("0 ")
    assert "[0" not in identity


def test_the_database_does_not_exist(minion):
    minion.tell({"slm_database": {"migration": {"database": "nowhere"}}})
    answer = ask(minion)
    assert (answer["current"], answer["heads"]) == (None, ["d1"])
    assert 'database "nowhere" does not exist' in answer["comment"]
