"""Who gets in, and who does not: on the real server, with real logins."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import psycopg2
import pytest

from tests.functional.test_slmdb_config import run, settle, tell
from tests.support.wait import until

LOG = Path("/var/log/postgresql/postgresql-15-main.log")
HBA = Path("/etc/postgresql/15/main/pg_hba.conf")
IDENT = HBA.with_name("pg_ident.conf")


@pytest.fixture
def settled(minions):
    return settle(minions)


def refused(**login):
    try:
        psycopg2.connect(connect_timeout=60, **login).close()
    except psycopg2.OperationalError:
        return True
    return False


def failures():
    return LOG.read_text().count("FATAL")


def test_the_matrix_is_what_the_deployment_asks_for(settled):
    """Seen from outside, without the formula's own eyes."""
    app = {"user": "autobot_slm", "dbname": "autobot_slm"}
    assert not refused(host="/var/run/postgresql", **app)
    assert refused(host="127.0.0.1", password="wrong", **app)
    assert refused(host="127.0.0.1", user="postgres", password="x")
    assert refused(host="/var/run/postgresql", user="nobody_here")
    assert refused(host="/var/run/postgresql", user="autobot_slm", dbname="postgres")
    assert all(row["right"] for row in settled.call("slmdb_access.matrix"))


def test_a_quiet_run_makes_no_failing_login(settled):
    """They fill the server's log; they are made only after something changed."""
    assert settled.state("slmdb_access.verified").result is True
    before = failures()
    assert settled.state("slmdb_access.verified").result is True
    assert failures() == before
    settled.call("slmdb_server.execute", "ALTER ROLE autobot_slm CONNECTION LIMIT 50")
    settled.call("slmdb_service.restart")
    before = failures()
    assert settled.state("slmdb_access.verified").result is True
    assert failures() > before


def test_test_mode_logs_nobody_in_and_changes_nothing(settled):
    """What would be tried is said."""
    result = settled.state("slmdb_access.verified", test=True)
    assert (result.result, result.changes) == (True, {})


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("ALTER ROLE autobot_slm NOLOGIN", "the application over the socket: refused"),
        ("ALTER ROLE autobot_slm PASSWORD NULL", "with the password: refused"),
        ("REVOKE CONNECT ON DATABASE autobot_slm FROM autobot_slm, PUBLIC", "refused"),
    ],
)
def test_a_wrong_matrix_fails_the_run(settled, statement, words):
    """The rules are right, but the login does not work: only trying tells."""
    if "REVOKE" in statement:
        settled.call("slmdb_server.execute", "ALTER DATABASE autobot_slm OWNER TO postgres")
    settled.call("slmdb_server.execute", statement)
    result = settled.state("slmdb_access.verified")
    assert result.result is False and words in result.comment


def test_a_rule_by_hand_is_seen_by_the_matrix_and_undone(settled):
    """Health judges what the server reads; a run puts it right."""
    HBA.write_text("host all postgres 127.0.0.1/32 trust\n" + HBA.read_text())
    wrong = [row for row in settled.call("slmdb_access.matrix") if not row["right"]]
    assert [row["login"] for row in wrong] == ["postgres over 127.0.0.1"]
    assert wrong[0]["key"] == "line 1"
    assert run(settled) == {"slmdb_access"}
    assert all(row["right"] for row in settled.call("slmdb_access.matrix"))


def test_a_rule_by_hand_that_gives_the_superuser_away(settled):
    """To whoever is on the host, or on another one; trust for somebody else is not that."""
    before = HBA.read_text()
    for rule in ("local all all trust", "host all all 10.0.0.0/8 trust"):
        HBA.write_text(f"{rule}\n{before}")
        (wrong,) = [row for row in settled.call("slmdb_access.matrix") if not row["right"]]
        assert (wrong["login"], wrong["key"]) == ("anybody as postgres", "line 1")
    HBA.write_text(f"{before}local all all trust\nlocal all autobot_slm trust\n")
    assert all(row["right"] for row in settled.call("slmdb_access.matrix"))


def test_debian_s_own_rules_are_judged_too(settled):
    """Before the formula: root comes in as postgres by no rule, whoever it is."""
    HBA.write_text("local all postgres peer\nlocal all all peer\n")
    rows = {row["login"]: row for row in settled.call("slmdb_access.matrix")}
    assert rows["root over the socket as postgres"]["judged"] == "refused"
    assert rows["the application over the socket"]["judged"] == "refused"
    assert rows["postgres over 127.0.0.1"]["right"] is True


@pytest.mark.parametrize("put_back", [False, True])
@pytest.mark.parametrize(
    "rules",
    [
        "host all all 127.0.0.1/32 scram-sha-256\n",
        "local all all scram-sha-256\n",
        "local all all reject\n",
    ],
)
def test_who_is_locked_out_by_hand_gets_in_again_in_one_run(settled, rules, put_back):
    """Whether the file is still the wrong one, or only what the server has read of it."""
    good = HBA.read_text()
    HBA.write_text(rules)
    settled.call("slmdb_service.reload")
    settled.call("slmdb_server.forget")
    until(lambda: settled.call("slmdb_server.refused"))
    if put_back:
        HBA.write_text(good)
    announced = settled.state("slmdb_access.applied", test=True)
    assert announced.result is None and settled.call("slmdb_server.refused")
    done = settled.state("slmdb_access.applied")
    assert done.result is True and done.changes == announced.changes
    assert HBA.read_text() == good and settled.call("slmdb_server.refused") is None
    assert settled.state("slmdb_access.applied").changes == {}


def test_a_map_that_keeps_everybody_out_is_undone(settled):
    """Without its line neither root nor postgres is the superuser."""
    IDENT.write_text("")
    settled.call("slmdb_service.reload")
    settled.call("slmdb_server.forget")
    until(lambda: settled.call("slmdb_server.refused"))
    assert settled.state("slmdb_access.applied").result is True
    assert settled.call("slmdb_server.available")
    assert settled.state("slmdb_access.verified").result is True


def test_an_error_in_the_file_is_named_with_its_line(settled):
    """As the server puts it."""
    HBA.write_text(HBA.read_text() + "host all all nonsense\n")
    (line,) = settled.call("slmdb_access.rule_errors")
    assert line.startswith(f"{HBA}, line 7: ")


def test_hardened_lets_the_backend_s_user_in_and_nobody_else(settled):
    """Peer instead of trust: who connects decides."""
    hba = {"preset": "hardened", "backend_user": "www-data"}
    tell(settled, hba=hba)
    assert run(settled) == {"slmdb_access"}
    assert refused(host="/var/run/postgresql", user="autobot_slm", dbname="autobot_slm")
    assert run(settled) == set()
    # The other way round: the map admits somebody else, and the run says so.
    ident = HBA.with_name("pg_ident.conf")
    os.chown(ident, pwd.getpwnam("postgres").pw_uid, -1)
    ident.write_text(ident.read_text().replace("www-data", "daemon"))
    settled.call("slmdb_service.reload")
    assert any("the application over the socket" in x for x in settled.call("slmdb_access.verify"))


def test_a_rule_about_the_members_of_a_group(settled):
    """It is nothing to who is no member, and is judged for who is."""
    settled.call("slmdb_server.execute", 'CREATE ROLE "my dba"')
    rule = {"type": "local", "database": "all", "user": "+my dba", "method": "reject"}
    tell(settled, hba={"before": [rule]})
    assert run(settled) == {"slmdb_access"}
    rows = settled.call("slmdb_server.query", "SELECT user_name FROM pg_hba_file_rules")
    assert rows[0]["user_name"] == ["+my dba"]
    settled.call("slmdb_server.execute", 'CREATE ROLE alice LOGIN IN ROLE "my dba"')
    assert refused(host="/var/run/postgresql", user="alice", dbname="autobot_slm")
    assert all(row["right"] for row in settled.call("slmdb_access.matrix"))
    settled.call("slmdb_server.execute", 'GRANT "my dba" TO autobot_slm')
    wrong = [row["login"] for row in settled.call("slmdb_access.matrix") if not row["right"]]
    assert wrong == ["the application over the socket"]


def test_a_hardened_role_with_a_blank_in_its_name(settled):
    """Its line in the map is quoted."""
    tell(settled, role="slm app", hba={"preset": "hardened", "backend_user": "daemon"})
    assert "slmdb_access" in run(settled)
    assert all(row["right"] for row in settled.call("slmdb_access.matrix"))
    assert run(settled) == set()


def test_extra_rules_come_where_they_should_and_shadowed_ones_are_named(settled):
    """Before and after ours, in their order."""
    rule = {"type": "host", "database": "reports", "user": "reader", "method": "scram-sha-256"}
    late = {**rule, "database": "autobot_slm", "user": "autobot_slm"}
    tell(
        settled,
        hba={
            "before": [{**rule, "address": "10.1.0.0/16"}],
            "after": [{**rule, "address": "10.2.0.0/16"}, {**late, "address": "127.0.0.1/32"}],
        },
    )
    assert run(settled) == {"slmdb_access"}
    lines = [line for line in HBA.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "host reports reader 10.1.0.0/16 scram-sha-256"
    assert lines[6] == "host reports reader 10.2.0.0/16 scram-sha-256"
    (line,) = settled.call("slmdb_access.shadowed")
    assert line.startswith("slm_database:hba:after:1: ") and "slm_database:hba:preset" in line


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (
            lambda lines: ["local all alice reject", *lines],
            {"old": ["local all alice reject"], "new": []},
        ),
        (
            lambda lines: lines[::-1],
            {"old": "another content", "new": "in another order"},
        ),
        (
            lambda lines: ["# by hand", *lines],
            {"old": "another content", "new": "the wanted content"},
        ),
    ],
)
def test_what_becomes_of_the_rules_is_told_as_it_is(settled, edit, change):
    """Lines that go are not called lines in another order."""
    HBA.write_text("\n".join(edit(HBA.read_text().splitlines())) + "\n")
    assert settled.state("slmdb_access.applied", test=True).changes[str(HBA)] == change
    assert settled.state("slmdb_access.applied").changes[str(HBA)] == change
