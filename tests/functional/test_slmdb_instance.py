"""The instance: made once, used if it is there, refused if something is in the way."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

from tests.functional.conftest import start_server

DATA = "/var/lib/postgresql/15/main"
CONFIGURATION = "/etc/postgresql/15/main"
REPOSITORY_OF_OURS = Path("/var/lib/pgbackrest/backup/autobot-slm/backup.info")


def create(*options: str) -> None:
    subprocess.run(["pg_createcluster", *options, "15", "main"], check=True, capture_output=True)


@pytest.fixture
def host(bare, minions):
    return minions()


def test_a_new_instance_has_checksums_and_the_wanted_locale(server):
    """The server is asked."""
    rows = server.call(
        "slmdb_server.query",
        "SELECT current_setting('data_checksums') AS checksums, datcollate AS locale, "
        "pg_encoding_to_char(encoding) AS encoding FROM pg_database WHERE datname = 'template1'",
    )
    assert rows == [{"checksums": "on", "locale": "C.UTF-8", "encoding": "UTF8"}]


def test_apply_test_and_apply_again(host):
    """The same changes in test mode and in earnest, none afterwards."""
    announced = host.state("slmdb_instance.present", test=True)
    assert announced.result is None and not Path(CONFIGURATION).exists()
    made = host.state("slmdb_instance.present")
    assert (made.result, made.changes) == (True, announced.changes)
    assert host.state("slmdb_instance.present").changes == {}


def test_pillar_chooses_locale_encoding_and_checksums(host, minions):
    """What an operator asks for at the first apply is what the cluster is made with."""
    minion = minions(
        {"slm_database": {"locale": "C", "encoding": "LATIN1", "data_checksums": False}}
    )
    minion.call("slmdb_instance.apply")
    start_server(minion)
    rows = minion.call(
        "slmdb_server.query",
        "SELECT current_setting('data_checksums') AS checksums, datcollate AS locale, "
        "pg_encoding_to_char(encoding) AS encoding FROM pg_database WHERE datname = 'template1'",
    )
    assert rows == [{"checksums": "off", "locale": "C", "encoding": "LATIN1"}]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"locale": "xx_XX.UTF-8"}, "this host has no locale xx_XX.UTF-8"),
        ({"encoding": "LATIN1"}, "C.UTF-8 is a locale for UTF-8, but the encoding is LATIN1"),
    ],
)
def test_a_locale_that_cannot_be_had_is_named_by_its_key(host, minions, told, words):
    """With test=True and in earnest, and nothing is made."""
    minion = minions({"slm_database": told})
    for test in (True, False):
        result = minion.state("slmdb_instance.present", test=test)
        assert result.result is False
        assert str(result.comment).startswith(f"slm_database:locale: {words}")
    assert not Path(CONFIGURATION).exists()


def test_an_instance_that_exists_is_used(host):
    """apt's own cluster, on another port and without checksums, keeps its data."""
    create("--port", "5433")
    before = Path(DATA, "global/pg_control").read_bytes()
    assert host.state("slmdb_instance.present").changes == {}
    assert Path(DATA, "global/pg_control").read_bytes() == before
    facts = host.call("slmdb_instance.facts")
    assert (facts["exists"], facts["port"], facts["wanted_port"]) == (True, 5433, 5432)


def test_data_without_configuration_is_not_touched(host):
    """One line, and the data is where it was."""
    create()
    Path(CONFIGURATION).rename("/etc/postgresql-of-15")
    result = host.state("slmdb_instance.present")
    assert result.result is False
    assert "holds data but /etc/postgresql/15/main is missing" in str(result.comment)
    assert Path(DATA, "PG_VERSION").exists()


def test_configuration_without_data_is_refused(host):
    """A lost data directory is not answered with an empty new one."""
    create()
    Path(DATA).rename("/var/lib/postgresql/elsewhere")
    result = host.state("slmdb_instance.present")
    assert result.result is False and "holds no data" in str(result.comment)


def test_a_locale_that_does_not_exist_leaves_nothing(host, minions):
    """pg_createcluster's own words; the next run starts from nothing."""
    minion = minions({"slm_database": {"locale": "xx_XX.UTF-8"}})
    words = 'pg_createcluster: invalid locale name "xx_XX.UTF-8"'
    with pytest.raises(CommandExecutionError, match=f"^{words}$"):
        minion.call("slmdb_instance.apply")
    assert not Path(CONFIGURATION).exists() and not Path(DATA).exists()


def test_another_major_than_the_one_that_exists_is_refused(host, minions):
    """A state does not upgrade across majors."""
    create()
    result = minions({"slm_database": {"version": "17"}}).state("slmdb_instance.present")
    assert result.result is False
    assert "slm_database:version: 17 is asked for, but instance 15/main exists" in str(
        result.comment
    )


UNIT = "/etc/systemd/system/autobot-slm-database.service"
KEPT = "/var/lib/autobot-slm-database"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (UNIT, "[Service]\nExecStart=/usr/lib/postgresql/15/bin/postgres -D /x\n"),
        (f"{KEPT}/settings.json", '{"version": "15"}'),
        (f"{KEPT}/packages.json", '{"postgresql-15": "15.1-1", "postgresql-client-15": "15.1-1"}'),
        (None, None),
    ],
    ids=["unit", "settings", "packages", "nothing"],
)
def test_a_newer_instance_that_a_package_made_is_not_ours(host, path, text):
    """What says which one is: the unit, or what was recorded; else it is the highest."""
    create()
    shutil.copytree(CONFIGURATION, "/etc/postgresql/18/main")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    assert host.call("slmdb_instance.version") == ("15" if path else "18")


def test_of_several_instances_the_one_at_the_wanted_port_is_ours(server):
    """Where nothing was recorded a server that runs there says it."""
    shutil.copytree(CONFIGURATION, "/etc/postgresql/18/main")
    path = Path("/etc/postgresql/18/main/postgresql.conf")
    path.write_text(path.read_text().replace(DATA, "/var/lib/postgresql/18/main"))
    assert server.call("slmdb_instance.version") == "15"


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_held_by_another_program_is_named(host, address):
    """Found in the kernel's tables, whatever address it is held on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as holder:
        # Connections of an earlier test's server may linger.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, 5432))
        holder.listen()
        result = host.state("slmdb_instance.port_available")
    assert result.result is False
    assert "slm_database:port: 5432 is held by another program" in str(result.comment)
    assert host.state("slmdb_instance.port_available").result is True


@pytest.mark.once
def test_an_instance_that_was_renamed_is_named_as_what_it_is(host):
    """By a run and by health, whose backups are here or not; nobody is told only to end it."""
    create("--port", "5432")
    subprocess.run(["pg_ctlcluster", "15", "main", "start"], check=True)
    subprocess.run(["pg_renamecluster", "15", "main", "old"], check=True)
    data = "/var/lib/postgresql/15/old"
    line = (
        f"slm_database:port: 5432 is held by PostgreSQL's cluster 15/old ({data}); if it is ours, "
        "pg_renamecluster 15 old main, and apply again; if not, pg_ctlcluster 15 old stop, or "
        "choose another port"
    )
    try:
        REPOSITORY_OF_OURS.parent.mkdir(parents=True)
        for prepare in (lambda: None, REPOSITORY_OF_OURS.touch):
            prepare()
            for state in ("slmdb_instance.port_available", "slmdb_instance.present"):
                result = host.state(state)
                assert (result.result, result.comment) == (False, line)
            assert host.call("slmdb.health", 15)["problems"][0] == line
        subprocess.run(["pg_renamecluster", "15", "old", "main"], check=True)
        assert host.state("slmdb_instance.port_available").result is True
        assert host.state("slmdb_instance.present").changes == {}
    finally:
        for name in {"main", "old"} & set(os.listdir("/etc/postgresql/15")):
            subprocess.run(["pg_dropcluster", "--stop", "15", name], check=True)


@pytest.mark.once
def test_another_cluster_at_the_port_is_named_though_ours_is_there(host):
    """Then there is nothing to rename."""
    create("--port", "5433")
    subprocess.run(["pg_createcluster", "--port", "5432", "15", "other"], check=True)
    subprocess.run(["pg_ctlcluster", "15", "other", "start"], check=True)
    try:
        result = host.state("slmdb_instance.port_available")
        assert (result.result, result.comment) == (
            False,
            "slm_database:port: 5432 is held by PostgreSQL's cluster 15/other "
            "(/var/lib/postgresql/15/other); pg_ctlcluster 15 other stop, or choose another port",
        )
    finally:
        subprocess.run(["pg_dropcluster", "--stop", "15", "other"], check=True)


@pytest.mark.parametrize("sock_diag", [True, False])
def test_the_kernel_says_who_listens(host, monkeypatch, sock_diag):
    """Listeners at that port alone, no connections; the same of a kernel without sock_diag."""
    with contextlib.ExitStack() as held:
        for address, port in (("127.0.0.1", 5432), ("127.0.0.2", 5432), ("127.0.0.1", 5433)):
            held.enter_context(socket.create_server((address, port)))
        held.enter_context(socket.create_server(("::", 5432), family=socket.AF_INET6))
        held.enter_context(socket.create_connection(("127.0.0.1", 5432)))
        if not sock_diag:
            monkeypatch.setattr(socket, "AF_NETLINK", -1)
        assert host.call("slmdb_instance.listens") == ["127.0.0.1", "127.0.0.2", "::"]


def test_our_own_server_does_not_hold_its_port_against_us(server):
    """The instance's listener is not another program."""
    assert server.state("slmdb_instance.port_available").result is True


def test_a_stale_postmaster_pid_is_not_a_server(instance, minions):
    """A pid file that names a process which is no PostgreSQL is not believed."""
    Path(DATA, "postmaster.pid").write_text(f"1\n{DATA}\n1700000000\n5432\n/run/postgresql\n")
    assert minions().call("slmdb_instance.facts")["running"] is False


def test_a_run_keeps_the_major_of_an_instance_that_it_drops(host):
    """An adopted one of another major: its mask is still undone when it is gone."""
    configuration = Path("/etc/postgresql/14/main")
    mask = Path("/etc/systemd/system/postgresql@14-main.service")
    configuration.mkdir(parents=True)
    (configuration / "postgresql.conf").write_text("")
    mask.symlink_to("/dev/null")
    host.call("slmdb_pillar.begin_run")
    assert host.call("slmdb_instance.version") == "14"
    (configuration / "postgresql.conf").unlink()
    assert host.call("slmdb_package.names")[0] == "postgresql-14"
    assert mask.name in host.call("slmdb_unit.leftovers")
    host.call("slmdb_pillar.begin_run")
    assert host.call("slmdb_instance.version") == "15"


@contextlib.contextmanager
def _nobody():
    """As a minion with `user:` would be: without root's rights, and without a way to get them."""
    nobody = pwd.getpwnam("nobody").pw_uid
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_whoever_is_not_root_is_told_so(server):
    """No report says of what it may not see that it does not run, or that nothing waits."""
    words = f"{DATA} cannot be read by this user: run as root"
    questions = ("slmdb.pending", "slmdb_pending.restart", "slmdb_instance.facts")
    for question in ("slmdb.health", *questions):
        server.call(question)  # the tests' own files are root's: what is loaded stays loaded
    with _nobody():
        report = server.call("slmdb.health")
        for question in questions:
            with pytest.raises(CommandExecutionError, match=f"^{words}$"):
                server.call(question)
    assert report["problems"] == [f"instance: {words}"]


def test_a_server_that_ends_after_a_login_is_an_error_of_one_line(shared_server):
    """Whoever waits for a recovery logs in again and again, and some recoveries fail."""
    connect, ask = (shared_server.modules[f"slmdb_server.{name}"] for name in ("connect", "ask"))
    with contextlib.closing(connect()) as connection:
        (row,) = ask(connection, "SELECT pg_backend_pid() AS pid")
        shared_server.call("slmdb_server.execute", f"SELECT pg_terminate_backend({row['pid']})")
        with pytest.raises(CommandExecutionError, match=r"terminating|closed the connection"):
            ask(connection, "SELECT 1")


def test_a_major_that_is_not_supported_is_refused_before_anything_is_touched(host):
    """What the formula needs of a server is not in it; one of a supported major is not minded."""
    old = Path("/etc/postgresql/13/main/postgresql.conf")
    old.parent.mkdir(parents=True)
    old.touch()
    for function in ("slmdb_secret.applicable", "slmdb_instance.port_available"):
        result = host.state(function)
        assert (result.result, result.changes) == (False, {})
        assert result.comment == (
            "slm_database:version: instance 13/main exists; 14 to 18 are supported: "
            "upgrade it first, or move it away"
        )
    create()
    assert host.call("slmdb_instance.version") == "15"
