"""The first hour of a host, in the order in which an operator lives it."""

from __future__ import annotations

import pytest

from tests.hosts.conftest import RELEASES
from tests.support import host_database as database
from tests.support import image

EVERYTHING = ["/etc", "/usr", "/var", "/opt", "/root", "/home", "/boot"]


@pytest.fixture(scope="module", params=RELEASES)
def host(request, boot):
    """A bare Debian: no Salt, no Python, no compiler."""
    made = boot([image.bare(request.param)])
    made.push_formula()
    yield made
    made.close()


@pytest.fixture(scope="module")
def neighbour(switch):
    """Another host of the same network."""
    return switch.plug()


@pytest.fixture(scope="module")
def first(host):
    """Salt is installed, then test=True, then the earnest run: what each said and did."""
    assert host.run("command -v python3 salt-call", check=False).stdout == ""
    host.run("/srv/autobot-slm-database/bin/salt-call --version", timeout=900)
    before = host.snapshot(*EVERYTHING)
    announcement = database.apply_states(host, "test=True")
    after = host.snapshot(*EVERYTHING)
    return before, after, announcement, database.apply_states(host)


def test_a_dry_run_changes_nothing(first):
    """With test=True on a bare host nothing fails and nothing outside Salt's cache is touched."""
    before, after, announcement, _ = first
    assert database.failed(announcement) == {}
    assert before == after


def test_what_is_announced_is_what_changes(first):
    """The states that test=True names are those that then change something."""
    _, _, announcement, deeds = first
    assert database.failed(deeds) == {}
    assert database.changed(deeds) != set()
    assert database.announced(announcement) == database.changed(deeds)


def test_the_second_run_changes_nothing(first, host):
    """Applied again, in earnest or not, there is nothing to do, and the last line says: healthy."""
    assert database.changed(database.apply_states(host)) == set()
    assert database.changed(database.apply_states(host, "test=True")) == set()
    assert "The database is healthy." in database.apply(host).stdout


def test_it_is_healthy(first, host):
    status, report = database.health(host)
    assert (status, report["healthy"], report["problems"]) == (0, True, [])


def test_the_socket_accepts_connections(first, host):
    assert database.ready(host) == database.READY


def test_the_instance_is_as_specified(first, host):
    """UTF-8, C.UTF-8, data checksums, SCRAM, an owner without privileges."""
    settings = "select current_setting('server_encoding'), current_setting('data_checksums')"
    assert database.sql(host, settings) == "UTF8|on"
    locale = "select datcollate from pg_database where datname = 'autobot_slm'"
    assert database.sql(host, locale) == "C.UTF-8"
    role = "select rolsuper, rolcreatedb, rolcreaterole, left(rolpassword, 14) from pg_authid"
    assert database.sql(host, f"{role} where rolname = 'autobot_slm'") == "f|f|f|SCRAM-SHA-256$"


def test_the_secret_file_is_closed_and_the_password_works(first, host):
    path = "/etc/autobot/slm-secrets.env"
    assert host.run(f"stat -c '%a %U:%G' {path}").stdout == "640 root:autobot-slm-backend\n"
    password = database.environment_value(host, path, "SLM_DB_PASSWORD")
    assert len(password) >= 32
    login = "psql -XAt -h 127.0.0.1 -U autobot_slm -d autobot_slm -c 'select current_user'"
    assert host.run(login, env={"PGPASSWORD": password}).stdout == "autobot_slm\n"
    refused = host.run(login, env={"PGPASSWORD": "wrong"}, check=False)
    assert refused.returncode != 0 and "password authentication failed" in refused.stderr


def test_it_listens_on_loopback_only(first, host, neighbour):
    """The kernel says where it listens, and a second host cannot get in over IPv4 or IPv6."""
    assert {address for address, port in host.network.listening() if port == 5432} == {
        "127.0.0.1",
        "::1",
    }
    host.serve(5555)
    for address in (host.network.ipv4, host.network.ipv6):
        assert neighbour.reaches(address, 5555), "the way to the host itself must be open"
        assert not neighbour.reaches(address, 5432)


def test_the_unit_is_the_server(first, host):
    """Start, stop, restart, reload and enable act on the instance; is-active tells the truth."""
    assert host.run(f"systemctl is-enabled {database.UNIT}").stdout == "enabled\n"
    host.run(f"systemctl stop {database.UNIT}")
    assert database.active(host) == "inactive"
    assert database.ready(host) != database.READY
    host.run(f"systemctl start {database.UNIT}")
    assert (database.active(host), database.ready(host)) == ("active", database.READY)
    loaded = database.sql(host, "select pg_conf_load_time()")
    before = database.postmaster(host)
    host.run(f"systemctl reload {database.UNIT}")
    host.until(
        f'test "$(runuser -u postgres -- psql -XAtc "select pg_conf_load_time()")" != "{loaded}"'
    )
    assert database.postmaster(host) == before
    host.run(f"systemctl restart {database.UNIT}")
    assert database.postmaster(host) not in (0, before)


def test_restarting_postgresql_reaches_it(first, host):
    """Who restarts Debian's own unit restarts the server."""
    before = database.postmaster(host)
    host.run("systemctl restart postgresql")
    assert database.came_back(host, before)


def test_a_killed_server_comes_back(first, host):
    """After kill -9 the unit claims no server that does not answer; systemd starts it again."""
    before = database.postmaster(host)
    host.run(f"kill -9 {before}")
    assert database.came_back(host, before)
    assert database.health(host)[0] == 0


def test_a_wrong_pillar_touches_nothing(first, host):
    """One line names each key, all at once; the status tells; every byte is as before."""
    before = host.snapshot("/etc", "/var/lib")
    wrong = "{prot: 5433, port: 70000, listen_addresses: ['0.0.0.0'], role: \"x'y\"}"
    answer = database.apply(host, f"pillar={{slm_database: {wrong}}}", check=False)
    assert answer.returncode != 0
    assert "Traceback" not in answer.stdout + answer.stderr
    states = answer.stdout.partition("The database is ")[0]
    for key in ("prot:", "port: 70000", "listen_addresses:0: 0.0.0.0", "role: "):
        told = [line for line in states.splitlines() if f"slm_database:{key}" in line]
        assert len(told) == 1, states
    after = host.snapshot("/etc", "/var/lib")
    # a running server writes below its own directory, and archives
    theirs = ("/var/lib/postgresql/", "/var/lib/pgbackrest/archive/")
    differ = {name for name in before | after if before.get(name) != after.get(name)}
    assert {name for name in differ if not name.startswith(theirs)} == set()
    assert database.ready(host) == database.READY


def test_a_reboot_brings_it_back(first, host):
    before = database.system_identifier(host)
    host.reboot()
    assert database.active(host) == "active"
    assert database.ready(host) == database.READY
    assert database.health(host)[0] == 0
    assert database.system_identifier(host) == before
