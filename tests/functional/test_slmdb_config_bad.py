"""Whatever somebody asks for, the database stays up with the last good configuration in force."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import psycopg2
import pytest
from salt.exceptions import CommandExecutionError

CONF = "/etc/postgresql/15/main/conf.d/50-autobot-slm.conf"
HBA = "/etc/postgresql/15/main/pg_hba.conf"
IDENT = "/etc/postgresql/15/main/pg_ident.conf"

SETTINGS = {
    "a size nobody has": ({"shared_buffers": "100TB"}, "shared_buffers: .*integer range"),
    "more than the memory": ({"shared_buffers": "900GB"}, "shared_buffers: "),
    "no number": ({"shared_buffers": "banana"}, "shared_buffers: .*invalid value"),
    "no unit": ({"work_mem": "10 parsecs"}, "work_mem: .*Valid units"),
    "a typing error": ({"shared_bufers": "1GB"}, "shared_bufers: .*did you mean shared_buffers"),
    "an extension's typing error": (
        {"pg_stat_statements.maks": 5000},
        "pg_stat_statements.maks: .*did you mean pg_stat_statements.max",
    ),
    "no connections": ({"max_connections": 0}, "max_connections: .*outside"),
    "absurdly many connections": (
        {"max_connections": 9000, "work_mem": "64MB"},
        "max_connections: 9000 sessions",
    ),
    "more for each session than the memory": (
        {"work_mem": "20GB"},
        "settings:work_mem: 100 sessions .*lower work_mem",
    ),
    "what only a session has": (
        {"transaction_isolation": "serializable"},
        "transaction_isolation: the server takes it from no file",
    ),
    "what the server was built without": ({"bonjour": True}, "bonjour: Bonjour is not supported"),
    "encryption with no certificate named": (
        {"ssl": True, "ssl_cert_file": ""},
        "settings:ssl: could not load server certificate",
    ),
    "only reserved connections": (
        {"superuser_reserved_connections": 100},
        "superuser_reserved_connections",
    ),
    "an unknown library at start": (
        {"shared_preload_libraries": "nosuch"},
        "could not access file",
    ),
    "an unknown library at login": ({"local_preload_libraries": "nosuch"}, "refuses logins"),
    "an unknown library in sessions": ({"session_preload_libraries": "nosuch"}, "refuses logins"),
    "an unknown word": ({"wal_level": "banana"}, "wal_level: .*Available values"),
    "WAL that no backup can use": (
        {"wal_level": "MINIMAL"},
        "wal_level: minimal would end the backups: .*slm_database:backup:enabled: false",
    ),
    "no archiving": ({"archive_mode": False}, "archive_mode: off would end .*backup:enabled"),
    "archiving elsewhere": ({"archive_command": "true"}, "archive_command: .*backup:enabled"),
    "huge pages without any": ({"huge_pages": "on"}, "huge_pages: .*the kernel has"),
    "no fsync": ({"fsync": False}, "fsync: .*allow_unsafe"),
    "no full pages": ({"full_page_writes": "off"}, "full_page_writes: .*allow_unsafe"),
    "another data directory": ({"data_directory": "/tmp"}, "data_directory: .*allow_unsafe"),
    "other rules": ({"hba_file": "/tmp/hba"}, "hba_file: .*slm_database:hba"),
    "another socket": ({"unix_socket_directories": "/nowhere"}, "unix_socket_directories: "),
    "a certificate that is not there": ({"ssl_cert_file": "/nowhere"}, "there is no file /nowhere"),
    "encryption without a certificate": (
        {"ssl": True, "ssl_cert_file": "/etc/passwd", "ssl_key_file": "/etc/passwd"},
        "could not load server certificate",
    ),
    "old passwords": ({"password_encryption": "MD5"}, "password_encryption: .*SCRAM"),
    "an unknown time zone": ({"timezone": "Mars/Olympus"}, "timezone: "),
    "an unknown language": ({"lc_messages": "xx_YY"}, "lc_messages: "),
    "an unknown destination": ({"log_destination": "moon"}, "log_destination: "),
    "nothing may be written": ({"default_transaction_read_only": True}, "read-only"),
    "too many workers": ({"max_worker_processes": 999999}, "max_worker_processes: .*outside"),
    "no boolean": ({"jit": "perhaps"}, "jit: .*Boolean"),
    "commits that wait for nobody": (
        {"synchronous_standby_names": "*"},
        "synchronous_standby_names: there is no standby.*allow_unsafe",
    ),
    "no autovacuum": ({"autovacuum": "off"}, "autovacuum: .*allow_unsafe"),
    "a log nobody may write": (
        {"logging_collector": True, "log_directory": "/proc/nowhere"},
        "could not open log file",
    ),
}
EVERYBODY = {"database": "all", "user": "all"}
RULES = {
    "everybody is rejected over the socket": (
        {"type": "local", **EVERYBODY, "method": "reject"},
        "before:0: root over the socket as postgres would be refused",
    ),
    "everybody is rejected over TCP": (
        {"type": "host", **EVERYBODY, "address": "all", "method": "reject"},
        "before:0: the application over 127.0.0.1 with the password would be refused",
    ),
    "everybody is trusted over TCP": (
        {"type": "host", **EVERYBODY, "address": "127.0.0.1/32", "method": "trust"},
        "with a wrong password would be admitted",
    ),
    "postgres gets in over TCP": (
        {
            "type": "host",
            "database": "all",
            "user": "postgres",
            "address": "127.0.0.1/32",
            "method": "trust",
        },
        "postgres over 127.0.0.1 would be admitted",
    ),
    "anybody is postgres over the socket": (
        {"type": "local", **EVERYBODY, "method": "trust"},
        "before:0: anybody as postgres would be admitted, must be refused",
    ),
    "anybody is postgres in a database over the socket": (
        {"type": "local", "database": "autobot_slm", "user": "all", "method": "trust"},
        "before:0: anybody as postgres would be admitted",
    ),
    "anybody of another host is postgres": (
        {"type": "host", **EVERYBODY, "address": "10.1.0.0/16", "method": "trust"},
        "before:0: anybody as postgres would be admitted",
    ),
    "anybody may copy the whole server": (
        {
            "type": "host",
            "database": "replication",
            "user": "all",
            "address": "all",
            "method": "trust",
        },
        "before:0: anybody as postgres would be admitted",
    ),
    "root needs a password": (
        {"type": "local", "database": "all", "user": "postgres", "method": "scram-sha-256"},
        "root over the socket as postgres would be refused",
    ),
    "root has no map": (
        {
            "type": "local",
            "database": "all",
            "user": "postgres",
            "method": "peer",
            "options": {"map": "nowhere"},
        },
        "root over the socket as postgres would be refused",
    ),
    "the application must be somebody else": (
        {
            "type": "local",
            "database": ["autobot_slm", "other"],
            "user": "autobot_slm",
            "method": "peer",
        },
        "the application over the socket would be refused",
    ),
    "the members of a role, of which the application is one": (
        {
            "type": "host",
            "database": "all",
            "user": "+autobot_slm",
            "address": "::1/128",
            "method": "reject",
        },
        "the application over ::1 with the password would be refused",
    ),
    "ldap without a server": (
        {"type": "host", **EVERYBODY, "address": "10.0.0.0/8", "method": "ldap"},
        "before:0: the server says: .*ldap",
    ),
    "cert without encryption": (
        {"type": "host", **EVERYBODY, "address": "10.0.0.0/8", "method": "cert"},
        "before:0: the server says: .*hostssl",
    ),
    "an option nobody knows": (
        {
            "type": "host",
            **EVERYBODY,
            "address": "10.0.0.0/8",
            "method": "md5",
            "options": {"colour": "red"},
        },
        "before:0: the server says: .*colour",
    ),
    "an option of another method": (
        {"type": "local", **EVERYBODY, "method": "trust", "options": {"map": "a"}},
        "before:0: the server says: .*map",
    ),
}


def _login():
    connection = psycopg2.connect(
        host="/var/run/postgresql", user="autobot_slm", dbname="autobot_slm"
    )
    connection.autocommit = True
    return connection


def _answers(connection) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone() == (1,)


def _files():
    return [(Path(path).read_bytes(), Path(path).stat().st_ino) for path in (CONF, HBA, IDENT)]


@pytest.fixture(scope="module")
def settled(shared_server):
    for state in (
        "slmdb_config.applied",
        "slmdb_access.applied",
        "slmdb_config.in_force",
        "slmdb_role.present",
        "slmdb_secret.present",
        "slmdb_database.present",
        "slmdb_access.verified",
    ):
        assert shared_server.state(state).result is True, state
    return shared_server


@pytest.fixture(scope="module")
def client(settled):
    """A session of the application that is there before, and still there after, every case."""
    connection = _login()
    yield connection
    connection.close()


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_setting_is_found_before_anything_is_written(settled, client, case):
    """One line with the pillar key and the server's words; nothing is touched."""
    given, words = SETTINGS[case]
    before = _files()
    settled.tell({"slm_database": {"settings": given}})
    with pytest.raises(CommandExecutionError, match=words) as refused:
        settled.call("slmdb_config.apply")
    assert refused.value.strerror.startswith("slm_database:settings")
    assert _files() == before
    assert _answers(client) and _answers(_login())
    assert settled.call("slmdb_config.pending") == []


@pytest.mark.parametrize("case", RULES)
def test_a_bad_rule_is_found_before_anything_is_written(settled, client, case):
    """Lock-outs, and rules that the server does not read, are refused with their pillar path."""
    rule, words = RULES[case]
    before = _files()
    settled.tell({"slm_database": {"hba": {"before": [rule]}}})
    with pytest.raises(CommandExecutionError, match=words):
        settled.call("slmdb_access.apply")
    assert _files() == before
    assert _answers(client) and _answers(_login())


@pytest.mark.parametrize("case", ["a typing error", "an unknown library at login", "no fsync"])
def test_test_mode_says_the_same(settled, case):
    """A dry run finds what a run would find."""
    settled.tell({"slm_database": {"settings": SETTINGS[case][0]}})
    result = settled.state("slmdb_config.applied", test=True)
    assert result.result is False
    assert re.search(SETTINGS[case][1], result.comment)


def test_after_all_that_everything_is_as_it_should_be(settled, client):
    """No case left a trace, and the session of before is still the same."""
    settled.tell(None)
    assert settled.call("slmdb_config.differences") == {}
    assert settled.call("slmdb_access.differences") == {}
    assert settled.call("slmdb_access.verify") == []
    assert _answers(client)


def test_a_port_that_somebody_else_has_is_refused(settled, client):
    """It is said before it is written, though the change would only wait for a restart."""
    before = _files()
    with socket.create_server(("127.0.0.1", 5499)):
        settled.tell({"slm_database": {"port": 5499}})
        result = settled.state("slmdb_config.applied")
    assert result.result is False
    assert "slm_database:port: 5499 is held by another program" in result.comment
    assert _files() == before and _answers(client)


@pytest.fixture
def key(settled):
    """The private key of a certificate below the data directory, which root brought there."""
    directory = Path(settled.call("slmdb_instance.facts")["data_directory"], "certificates")
    directory.mkdir(mode=0o755)
    made = directory / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=here"]
    files = ["-keyout", str(made), "-out", str(directory / "server.crt")]
    subprocess.run([*command, *files], check=True, capture_output=True)
    yield made
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("group", "mode", "words"),
    [("root", 0o600, "could not load private key"), ("postgres", 0o644, "group or world access")],
)
def test_a_private_key_is_judged_with_its_own_owner_and_mode(settled, key, group, mode, words):
    """As the server will find it: one that root alone reads is none, one for its group is."""
    files = {"ssl_cert_file": "certificates/server.crt", "ssl_key_file": "certificates/server.key"}
    settled.tell({"slm_database": {"settings": {"ssl": True, **files}}})
    for owner, bits, said in ((group, mode, [words]), ("postgres", 0o640, [])):
        shutil.chown(key, "root", owner)
        key.chmod(bits)
        settled.loaders.context.clear()
        found = settled.call("slmdb_config.problems")
        assert len(found) == len(said) and all(word in " ".join(found) for word in said)


def test_rules_are_judged_with_the_configuration_that_will_be(settled, key):
    """Not with the one that is: hostssl needs ssl, and is cut off without it."""
    shutil.chown(key, "postgres", "postgres")
    key.chmod(0o600)
    files = {"ssl_cert_file": str(key.with_suffix(".crt")), "ssl_key_file": str(key)}
    rule = {"type": "hostssl", "database": "all", "user": "alice", "address": "10.0.0.0/8"}
    hba = {"before": [{**rule, "method": "scram-sha-256"}]}
    settled.tell({"slm_database": {"settings": {**files, "ssl": True}, "hba": hba}})
    assert settled.call("slmdb_config.problems") == []
    assert settled.state("slmdb_access.applied", test=True).result is None
    settled.tell({"slm_database": {"settings": {**files, "ssl": False}, "hba": hba}})
    refused = settled.state("slmdb_config.applied", test=True)
    assert refused.result is False
    assert "slm_database:hba:before:0: the server says: hostssl" in refused.comment


ADDRESSES = {
    "an address of another host": (["127.0.0.1", "10.9.9.9"], ":1: this host has no address 10.9"),
    "none that the host has": (["10.9.9.9"], ":0: this host has no address 10.9.9.9"),
    "none for the application": (["127.0.0.2"], ": the application connects to 127.0.0.1; add it"),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_an_address_that_would_be_missed_is_refused(settled, client, case):
    """It would only be tried at the next start, which may be a reboot."""
    addresses, words = ADDRESSES[case]
    before = _files()
    settled.tell({"slm_database": {"listen_addresses": addresses, "allow_remote": True}})
    for test in (True, False):
        result = settled.state("slmdb_config.applied", test=test)
        assert result.result is False
        assert f"slm_database:listen_addresses{words}" in result.comment
    assert _files() == before and _answers(client)


@pytest.mark.parametrize("addresses", [["*"], ["0.0.0.0"], ["localhost"], ["127.0.0.1", "::1"]])
def test_an_address_that_the_host_has_is_none_to_refuse(settled, addresses):
    """Every host has these."""
    settled.tell({"slm_database": {"listen_addresses": addresses, "allow_remote": True}})
    assert settled.call("slmdb_config.problems") == []


def test_a_host_without_ipv6_needs_none(settled):
    """The default addresses count as given where only 127.0.0.1 is there."""
    switch = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
    before = switch.read_text()
    settled.tell(None)
    switch.write_text("1")
    try:
        assert settled.call("slmdb_instance.address_problems") == []
    finally:
        switch.write_text(before)


def test_a_memory_in_pillar_makes_no_more_of_it(settled):
    """A typing error there would let anything pass."""
    settings = {"max_connections": 9000, "work_mem": "64MB"}
    tuning = {"profile": "off", "memory": "9000GB"}
    settled.tell({"slm_database": {"settings": settings, "tuning": tuning}})
    assert "max_connections: 9000 sessions" in " ".join(settled.call("slmdb_config.problems"))


def test_a_memory_in_pillar_is_to_blame_for_what_follows_from_it(settled):
    """Not the profile, which is right for any memory that there is."""
    for memory in ("9000TB", "1MB"):
        settled.tell({"slm_database": {"tuning": {"memory": memory}}})
        lines = settled.call("slmdb_config.problems")
        assert lines and all(line.startswith("slm_database:tuning:memory: ") for line in lines)


def test_all_broken_promises_are_named_at_once(settled):
    """Nobody has to run again to hear the next mistake."""
    settled.tell({"slm_database": {"settings": {"fsync": False, "autovacuum": False}}})
    lines = settled.state("slmdb_config.applied").comment.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "slm_database:settings:autovacuum",
        "slm_database:settings:fsync",
    ]


@pytest.mark.parametrize("setting", [{"fsync": False}, {"synchronous_standby_names": "*"}])
def test_an_explicit_key_permits_what_is_unsafe(settled, setting):
    """The operator decides, by name."""
    settled.tell({"slm_database": {"settings": setting, "allow_unsafe": list(setting)}})
    assert settled.call("slmdb_config.problems") == []
    settled.tell(None)
