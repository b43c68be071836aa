"""Databases: made, repaired, and closed to PUBLIC."""

from __future__ import annotations

import pytest

from tests.support.wait import until

BASE = {"owner": "autobot_slm", "encoding": "UTF8", "locale": "C.UTF-8", "extensions": []}


@pytest.fixture
def host(server):
    """A server with the application's role, which the databases belong to."""
    server.call("slmdb_role.apply")
    return server


def test_the_database_belongs_to_its_role_and_not_to_public(host):
    """The catalog is asked, not the module."""
    announced = host.state("slmdb_database.present", test=True)
    made = host.state("slmdb_database.present")
    assert (announced.result, made.result) == (None, True)
    assert made.changes == announced.changes
    again = host.state("slmdb_database.present")
    assert (again.result, again.changes) == (True, {})
    facts = host.call(
        "slmdb_server.query",
        "SELECT pg_get_userbyid(datdba) AS owner, pg_encoding_to_char(encoding) AS encoding, "
        "datcollate AS locale, has_database_privilege('public', oid, 'CONNECT') AS connect "
        "FROM pg_database WHERE datname = 'autobot_slm'",
    )
    assert facts == [
        {"owner": "autobot_slm", "encoding": "UTF8", "locale": "C.UTF-8", "connect": False}
    ]
    inside = "SELECT has_schema_privilege('public', 'public', 'CREATE') AS creates"
    assert host.call("slmdb_server.query", inside, database="autobot_slm") == [{"creates": False}]


@pytest.mark.parametrize(
    "drift",
    [
        "GRANT CONNECT ON DATABASE autobot_slm TO PUBLIC",
        "GRANT TEMPORARY ON DATABASE autobot_slm TO PUBLIC",
        "ALTER DATABASE autobot_slm OWNER TO postgres",
        "REVOKE CONNECT ON DATABASE autobot_slm FROM autobot_slm",
        "REVOKE ALL ON DATABASE autobot_slm FROM autobot_slm",
        "ALTER DATABASE autobot_slm CONNECTION LIMIT 0",
        "ALTER DATABASE autobot_slm ALLOW_CONNECTIONS false",
        "DROP DATABASE autobot_slm",
    ],
)
def test_drift_outside_is_repaired(host, drift):
    """What somebody did to the database is announced, then undone."""
    host.call("slmdb_database.apply")
    host.call("slmdb_server.forget")
    host.call("slmdb_server.execute", drift)
    announced = host.state("slmdb_database.present", test=True)
    repaired = host.state("slmdb_database.present")
    assert announced.result is None and announced.changes
    assert (repaired.result, repaired.changes) == (True, announced.changes)
    assert host.call("slmdb_database.differences") == {}


@pytest.mark.parametrize(
    "drift",
    [
        "GRANT CREATE ON SCHEMA public TO PUBLIC",
        "ALTER SCHEMA public OWNER TO postgres",
        "REVOKE ALL ON SCHEMA public FROM autobot_slm",
        "REVOKE USAGE ON SCHEMA public FROM autobot_slm",
    ],
)
def test_drift_inside_is_repaired(host, drift):
    """The schema public is the owner's alone again."""
    host.call("slmdb_database.apply")
    host.call("slmdb_server.execute", drift, database="autobot_slm")
    announced = host.state("slmdb_database.present", test=True)
    repaired = host.state("slmdb_database.present")
    assert announced.result is None and announced.changes
    assert (repaired.result, repaired.changes) == (True, announced.changes)
    assert host.call("slmdb_database.differences") == {}


def test_a_further_database_that_lets_nobody_in(host):
    """It is let in again before anybody looks inside, and all the rest is repaired in that run."""
    databases = {"reports": {**BASE, "extensions": ["pg_trgm"]}}
    host.state("slmdb_database.present", databases=databases)
    host.call("slmdb_server.execute", "DROP EXTENSION pg_trgm", database="reports")
    host.call("slmdb_server.forget")
    host.call("slmdb_server.execute", "ALTER DATABASE reports ALLOW_CONNECTIONS false")
    change = {"database reports: connections allowed": {"old": False, "new": True}}
    assert host.state("slmdb_database.present", test=True, databases=databases).changes == change
    repaired = host.state("slmdb_database.present", databases=databases)
    assert (repaired.result, repaired.changes) == (True, change)
    assert host.call("slmdb_database.differences", databases) == {}


def test_a_database_without_schema_public_is_left_so(host):
    """Who dropped the schema meant it."""
    host.call("slmdb_database.apply")
    host.call("slmdb_server.execute", "DROP SCHEMA public", database="autobot_slm")
    assert host.call("slmdb_database.differences") == {}


def test_extensions_and_further_databases(host):
    """Pillar's databases have names that need quoting, owners and extensions of their own."""
    name = "Reports; 2026 ö"
    databases = {name: {**BASE, "extensions": ["pg_trgm"], "encoding": "LATIN1", "locale": "C"}}
    made = host.state("slmdb_database.present", databases=databases)
    assert made.result is True
    assert host.state("slmdb_database.present", databases=databases).changes == {}
    databases[name]["extensions"] = ["pg_trgm", "hstore"]
    added = host.state("slmdb_database.present", databases=databases)
    assert list(added.changes) == [f"database {name}: extension hstore"]


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (
            {"extensions": ["pg_trgm", "no_such"]},
            'extensions:1: the server has no extension "no_such"; correct it, or add the package '
            "that brings it to slm_database:packages",
        ),
        (
            {"locale": "xx_XX.UTF-8"},
            "locale: this host has no locale xx_XX.UTF-8; locale -a lists those that it has",
        ),
        (
            {"locale": "C.UTF-8", "encoding": "LATIN1"},
            "locale: C.UTF-8 is a locale for UTF-8, but the encoding is LATIN1; choose another of "
            "the two, or the locale C, which fits every encoding",
        ),
    ],
)
@pytest.mark.parametrize("place", ["", "databases:extra:"])
def test_what_the_server_would_refuse_is_named_by_its_key(host, told, line, place):
    """With test=True and in earnest, and no database is made before."""
    host.tell({"slm_database": {"databases": {"extra": told}} if place else told})
    for test in (True, False):
        result = host.state("slmdb_database.present", test=test)
        assert (result.result, result.comment) == (False, f"slm_database:{place}{line}")
    assert host.call("slmdb_database.read", ["autobot_slm", "extra"]) == {}


def test_an_extension_brings_what_it_stands_on(host):
    """Who asks for one need not know which others it requires."""
    host.tell({"slm_database": {"extensions": ["earthdistance"]}})
    assert host.state("slmdb_database.present").result is True
    assert host.call("slmdb_database.differences") == {}


def test_encoding_and_locale_that_cannot_be_changed_are_reported(host):
    """A database that exists is never made again; the report says what only a restore changes."""
    databases = {"autobot_slm": {**BASE, "encoding": "LATIN1", "locale": "C"}}
    host.state("slmdb_database.present", databases=databases)
    assert host.state("slmdb_database.present").changes == {}
    lines = host.call("slmdb_instance.report")
    assert [line.partition(":")[2].partition(":")[0] for line in lines] == ["encoding", "locale"]


def test_many_databases_take_no_connection_each(host):
    """Hundreds of them are looked at with the two connections that a run has anyway."""
    host.tell({"slm_database": {"databases": {f"part{number}": {} for number in range(5)}}})
    host.call("slmdb_database.apply")
    assert host.call("slmdb_database.differences") == {}
    asked = "SELECT datname FROM pg_stat_activity WHERE application_name = 'slmdb' ORDER BY 1"
    there = [{"datname": "autobot_slm"}, {"datname": "postgres"}]
    # A session that was ended is listed for a moment.
    until(lambda: host.call("slmdb_server.query", asked) == there)


READER = {"member_of": ["pg_read_all_data"], "connect": ["autobot_slm", "metrics"]}
MAY = (
    "SELECT datname FROM pg_database WHERE has_database_privilege(%s, oid, 'CONNECT') "
    "AND datname IN ('autobot_slm', 'metrics', 'attic') ORDER BY 1"
)


def reaches(host, role):
    return [row["datname"] for row in host.call("slmdb_server.query", MAY, [role])]


def tell(host, **roles):
    host.tell({"slm_database": {"databases": {"metrics": {}, "attic": {}}, "roles": roles}})
    assert host.state("slmdb_role.present").result is True


def test_a_role_reaches_the_databases_that_pillar_says(host):
    """From the first run on; the rest of the databases stays closed to it."""
    tell(host, **{"reader": READER, "an; other ö": {"connect": ["attic"]}})
    announced = host.state("slmdb_database.present", test=True)
    made = host.state("slmdb_database.present")
    assert (made.result, made.changes) == (True, announced.changes)
    assert reaches(host, "reader") == ["autobot_slm", "metrics"]
    assert reaches(host, "an; other ö") == ["attic"]
    assert host.state("slmdb_database.present").changes == {}


def test_what_somebody_revoked_is_granted_again(host):
    """And a role that comes later is let into databases that are there."""
    tell(host)
    host.state("slmdb_database.present")
    tell(host, reader=READER)
    change = {"old": [], "new": ["reader"]}
    wanted = {f"database {name}: connect": change for name in ("autobot_slm", "metrics")}
    assert host.state("slmdb_database.present", test=True).changes == wanted
    assert reaches(host, "reader") == []
    assert host.state("slmdb_database.present").changes == wanted
    host.call("slmdb_server.execute", "REVOKE CONNECT ON DATABASE metrics FROM reader")
    assert host.call("slmdb_database.differences") == {"database metrics: connect": change}
    assert host.state("slmdb_database.present").result is True
    assert reaches(host, "reader") == ["autobot_slm", "metrics"]


def test_the_list_is_complete_for_the_role_that_has_one(host):
    """What is not in it is revoked, with what was handed on; without the key all stays."""
    tell(host, reader=READER, friend=None, plain=None)
    host.state("slmdb_database.present")
    for statement in (
        "GRANT CONNECT ON DATABASE attic TO plain",
        "GRANT CONNECT ON DATABASE attic TO reader WITH GRANT OPTION",
        "SET ROLE reader; GRANT CONNECT ON DATABASE attic TO friend; RESET ROLE",
    ):
        host.call("slmdb_server.execute", statement)
    change = {"database attic: connect": {"old": ["reader"], "new": []}}
    assert host.state("slmdb_database.present", test=True).changes == change
    repaired = host.state("slmdb_database.present")
    assert (repaired.result, repaired.changes) == (True, change)
    assert [reaches(host, name) for name in ("plain", "friend")] == [["attic"], []]
    tell(host, reader={"connect": ["metrics"]}, friend=None, plain=None)
    assert list(host.state("slmdb_database.present").changes) == ["database autobot_slm: connect"]
    assert reaches(host, "reader") == ["metrics"]
    tell(host, reader=None, friend=None, plain=None)
    assert host.state("slmdb_database.present").changes == {}
    assert reaches(host, "reader") == ["metrics"]


def test_an_owner_needs_no_grant_and_loses_none(host):
    """Its own database is its own, whatever the list says."""
    told = {"roles": {"keeper": {"connect": ["autobot_slm"]}}}
    host.tell({"slm_database": {"databases": {"attic": {"owner": "keeper"}}, **told}})
    for noun in ("slmdb_role", "slmdb_database"):
        assert host.state(f"{noun}.present").result is True
    assert host.call("slmdb_database.differences") == {}
    assert reaches(host, "keeper") == ["attic", "autobot_slm"]
