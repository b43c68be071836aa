"""Programs that are run beside Salt: as whom, with what, and what is said if they fail."""

from __future__ import annotations

import pytest
from salt.exceptions import CommandExecutionError

RUN = "slmdb_program.run"


@pytest.fixture
def host(bare, minions):
    """A host with PostgreSQL's packages, and so with the server's user."""
    return minions()


def test_a_program_has_an_environment_of_its_own(host, monkeypatch):
    """Whatever libpq or a locale is told where Salt runs."""
    monkeypatch.setenv("PGHOST", "elsewhere.example")
    monkeypatch.setenv("LC_ALL", "C")
    said = host.call(RUN, "env", environment={"PGPORT": "5444"})
    assert "PGHOST" not in said
    assert {"LC_ALL=C.UTF-8", "PGPORT=5444"} <= set(said.splitlines())


def test_it_runs_as_the_server_if_told(host):
    """With its groups and no other, and what it makes is for those alone who may see it."""
    assert host.call(RUN, "id", "-un") == "root"
    assert host.call(RUN, "id", "-un", as_server=True) == "postgres"
    assert "ssl-cert" in host.call(RUN, "id", "-Gn", as_server=True).split()
    assert host.call(RUN, "sh", "-c", "umask", as_server=True, umask=0o027) == "0027"
    nice = host.call(RUN, "nice", before=["nice", "-n", "15"], as_server=True)
    assert nice == "15"


@pytest.mark.parametrize(
    "script, line",
    [
        ("echo 'x: error: first' >&2; echo 'x: error: second' >&2; exit 1", "sh: first"),
        ("echo 'x: error: query failed: ERROR:  its words' >&2; exit 1", "sh: its words"),
        ("echo 'one' >&2; echo 'the last' >&2; exit 2", "sh: the last"),
        ("echo 'only here'; exit 2", "sh: only here"),
        ("exit 3", "sh: ended with 3"),
        ("echo begun; kill -TERM $$", "sh was killed by signal 15"),
        ("kill -9 $$", "sh was killed by signal 9 (out of memory? journalctl -k tells)"),
    ],
)
def test_what_fails_is_one_line(host, script, line):
    """The server's words before the program's, the first before the last."""
    with pytest.raises(CommandExecutionError) as caught:
        host.call(RUN, "sh", "-c", script)
    assert str(caught.value) == line


def test_what_cannot_be_run_is_named(host):
    with pytest.raises(CommandExecutionError, match=r"^/nowhere/pg_dump cannot be run: No such"):
        host.call(RUN, "/nowhere/pg_dump")


def test_one_that_may_fail_is_listened_to(host):
    """Its status is told, and both of its outputs."""
    heard = host.call("slmdb_program.listen", "sh", "-c", "echo out; echo err >&2; exit 4")
    assert heard == (4, "out\n", "err\n")


def test_a_program_that_takes_too_long_is_killed(host):
    """And that is called what it is."""
    with pytest.raises(CommandExecutionError, match=r"^/usr/bin/sleep did not end within 0\.1 s$"):
        host.call("slmdb_program.listen", "/usr/bin/sleep", "100", timeout=0.1)
