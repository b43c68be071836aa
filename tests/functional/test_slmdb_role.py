"""Roles: made, altered, repaired, and never more than what was asked for."""

from __future__ import annotations

import pytest

ROLES = {"autobot_slm": {"login": True}, "Reader; of ö": {"member_of": ["pg_monitor"]}}


def test_the_application_role_has_no_special_rights(server):
    """An empty pillar gives one role that may log in and nothing else."""
    result = server.state("slmdb_role.present")
    assert result.result is True
    role = server.call("slmdb_role.read", ["autobot_slm"])["autobot_slm"]
    assert role["login"] is True
    rights = ("superuser", "createdb", "createrole", "replication", "bypassrls")
    assert not any(role[what] for what in rights)


def test_a_second_apply_changes_nothing(server):
    """Apply, apply again, test mode: the changes are announced, made, and gone."""
    announced = server.state("slmdb_role.present", test=True, roles=ROLES)
    assert announced.result is None
    assert server.call("slmdb_role.read", list(ROLES)) == {}
    made = server.state("slmdb_role.present", roles=ROLES)
    assert made.result is True
    assert made.changes == announced.changes
    again = server.state("slmdb_role.present", roles=ROLES)
    assert (again.result, again.changes) == (True, {})


@pytest.mark.parametrize(
    "drift",
    [
        "ALTER ROLE autobot_slm SUPERUSER",
        "ALTER ROLE autobot_slm CREATEDB CREATEROLE",
        "ALTER ROLE autobot_slm NOLOGIN",
        "ALTER ROLE autobot_slm CONNECTION LIMIT 3",
        "ALTER ROLE autobot_slm VALID UNTIL '2020-01-01'",
        "GRANT postgres TO autobot_slm",
        "GRANT pg_monitor TO autobot_slm WITH ADMIN OPTION",
        "DROP ROLE autobot_slm",
    ],
)
def test_drift_is_repaired(server, drift):
    """Whatever somebody did to the role is undone, and test mode says so first."""
    server.state("slmdb_role.present")
    server.call("slmdb_server.execute", drift)
    announced = server.state("slmdb_role.present", test=True)
    assert announced.result is None and announced.changes
    repaired = server.state("slmdb_role.present")
    assert (repaired.result, repaired.changes) == (True, announced.changes)
    assert server.call("slmdb_role.differences") == {}


def test_for_ever_may_be_said_or_not(server):
    """No end and an end at infinity are the same to the server."""
    server.state("slmdb_role.present")
    server.call("slmdb_server.execute", "ALTER ROLE autobot_slm VALID UNTIL 'infinity'")
    assert server.call("slmdb_role.differences") == {}


def test_memberships_are_exactly_those_that_are_asked_for(server):
    """What pillar no longer says is taken away, what it says twice or in any order is one."""
    groups = ["pg_monitor", "pg_signal_backend", "pg_monitor"]
    server.state("slmdb_role.present", roles={"reporting": {"member_of": groups}})
    assert server.call("slmdb_role.differences", {"reporting": {"member_of": groups}}) == {}
    roles = {"reporting": {"member_of": ["pg_signal_backend"]}}
    announced = server.state("slmdb_role.present", test=True, roles=roles)
    assert announced.changes == {
        "role reporting: member_of": {
            "old": ["pg_monitor", "pg_signal_backend"],
            "new": ["pg_signal_backend"],
        }
    }
    assert len(server.call("slmdb_role.read", ["reporting"])["reporting"]["member_of"]) == 2
    assert server.state("slmdb_role.present", roles=roles).changes == announced.changes
    assert server.state("slmdb_role.present", roles=roles).changes == {}


def test_the_application_keeps_the_group_that_owns_its_tables(server):
    """It is no drift; a group that makes it a superuser is."""
    roles = {"autobot_slm": {"login": True}}
    server.state("slmdb_role.present", roles=roles)
    for statement in (
        "CREATE ROLE owners",
        "CREATE ROLE bosses CREATEROLE",
        "GRANT owners, bosses, pg_read_all_data TO autobot_slm",
    ):
        server.call("slmdb_server.execute", statement)
    announced = server.state("slmdb_role.present", test=True, roles=roles)
    repaired = server.state("slmdb_role.present", roles=roles)
    assert repaired.result is True and repaired.changes == announced.changes
    assert repaired.changes == {
        "role autobot_slm: member_of": {
            "old": ["bosses", "owners", "pg_read_all_data"],
            "new": ["owners"],
        }
    }
    assert server.state("slmdb_role.present", roles=roles).changes == {}


def test_a_membership_with_admin_option_becomes_a_plain_one(server):
    """And whoever had it from the role by that option, and is to have it, has it still."""
    roles = {"leader": {"member_of": ["pg_monitor"]}, "other": {"member_of": ["pg_monitor"]}}
    server.state("slmdb_role.present", roles={**roles, "other": {}})
    for statement in (
        "GRANT pg_monitor TO leader WITH ADMIN OPTION",
        "SET ROLE leader; GRANT pg_monitor TO other; RESET ROLE",
    ):
        server.call("slmdb_server.execute", statement)
    repaired = server.state("slmdb_role.present", roles=roles)
    assert (repaired.result, list(repaired.changes)) == (True, ["role leader: member_of"])
    assert server.call("slmdb_role.differences", roles) == {}


def test_names_like_labels(server):
    """A name may hold what stands between a role and what of it differs."""
    roles = {"a: b": {"login": True}, "a": {}, ": member_of": {}}
    announced = server.state("slmdb_role.present", test=True, roles=roles)
    made = server.state("slmdb_role.present", roles=roles)
    assert (made.result, made.changes) == (True, announced.changes)
    server.call("slmdb_server.execute", 'ALTER ROLE "a: b" CREATEDB')
    repaired = server.state("slmdb_role.present", roles=roles)
    assert (repaired.result, list(repaired.changes)) == (True, ["role a: b: createdb"])


def test_a_role_that_owns_something_is_not_dropped(server):
    """Dropping says why it cannot."""
    server.state("slmdb_role.present")
    server.state("slmdb_database.present")
    with pytest.raises(Exception, match=r"role autobot_slm: .*cannot be dropped"):
        server.call("slmdb_role.drop", "autobot_slm")
    server.call("slmdb_database.drop", "autobot_slm")
    server.call("slmdb_role.drop", "autobot_slm")
    assert server.call("slmdb_role.read", ["autobot_slm"]) == {}


def test_a_group_that_is_not_there_is_named_by_its_key(server):
    """With test=True and in earnest, and no role is made before."""
    roles = {"reader": {"member_of": ["pg_monitor", "archive"]}}
    line = (
        'slm_database:roles:reader:member_of:1: the server has no role "archive"; '
        "correct it, or add it to slm_database:roles"
    )
    server.tell({"slm_database": {"roles": roles}})
    for test in (True, False):
        result = server.state("slmdb_role.present", test=test)
        assert (result.result, result.comment) == (False, line)
    assert server.call("slmdb_role.read", ["reader", "autobot_slm"]) == {}
    server.tell({"slm_database": {"roles": {**roles, "archive": None}}})
    assert server.state("slmdb_role.present").result is True
