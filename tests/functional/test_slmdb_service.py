"""The server without systemd: started, stopped, restarted, and what is said when it cannot be."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError


@pytest.fixture
def host(instance, minions):
    return minions()


def test_apply_test_and_apply_again(host):
    """A stopped server is started; a running one is left alone."""
    announced = host.state("slmdb_service.running", test=True)
    assert announced.result is None and not host.call("slmdb_service.running")
    started = host.state("slmdb_service.running")
    assert (started.result, started.changes) == (True, announced.changes)
    pid = host.call("slmdb_instance.facts")["pid"]
    assert host.state("slmdb_service.running").changes == {}
    assert host.call("slmdb_instance.facts")["pid"] == pid


def test_a_killed_server_is_started_again(host):
    """kill -9 leaves a pid file behind; the next run is not fooled by it."""
    host.call("slmdb_service.start")
    pid = host.call("slmdb_instance.facts")["pid"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert host.state("slmdb_service.running").changes["server"]["new"] == "running"
    assert host.call("slmdb_server.query", "SELECT 1 AS one") == [{"one": 1}]


def test_restart_and_stop(host):
    """A kept connection does not outlive its server, and the next query has a new one."""
    host.call("slmdb_service.start")
    pid = host.call("slmdb_instance.facts")["pid"]
    host.call("slmdb_server.query", "SELECT 1")
    host.call("slmdb_service.restart")
    assert host.call("slmdb_instance.facts")["pid"] != pid
    assert host.call("slmdb_server.query", "SELECT 1 AS one") == [{"one": 1}]
    host.call("slmdb_service.stop")
    assert host.call("slmdb_server.available") is False


def test_a_server_that_does_not_start_says_why(host):
    """One line, with the server's own reason where it gives one."""
    Path("/etc/postgresql/15/main/conf.d/99-wrong.conf").write_text("shared_buffers = nonsense\n")
    with pytest.raises(CommandExecutionError) as caught:
        host.call("slmdb_service.start")
    assert "\n" not in str(caught.value) and str(caught.value)


def test_a_list_of_statements_is_one_transaction(server):
    """The second fails, the first is not there."""
    statements = [("CREATE TABLE first (n int)", None), ("SELECT 1/0", None)]
    with pytest.raises(CommandExecutionError, match=r"^division by zero$"):
        server.call("slmdb_server.execute", statements)
    rows = server.call("slmdb_server.query", "SELECT to_regclass('first') AS found")
    assert rows == [{"found": None}]


def test_an_error_does_not_quote_the_statement(server):
    """What a statement carries stays out of the message."""
    with pytest.raises(CommandExecutionError) as caught:
        server.call("slmdb_server.query", "SELECT 'hunter2' FROM nowhere")
    assert str(caught.value) == 'relation "nowhere" does not exist'
