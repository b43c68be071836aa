"""The server without systemd: started, stopped, restarted, and what is said when it cannot be."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

from tests.support.wait import until


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
    until(lambda: not Path(f"/proc/{pid}").exists())
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


SYSTEMCTL = """#!/bin/sh
echo "$*" >>{0}/asked
if [ "$1" = restart ]; then
  [ -e {0}/killed-at-once ] && kill -9 $$
  [ -e {0}/failed ] && exit 1
  # The server's job is systemd's: it goes on while systemctl is gone.
  pg_ctlcluster --skip-systemctl-redirect 15 main restart >/dev/null 2>&1
  head -n 1 /var/lib/postgresql/15/main/postmaster.pid >{0}/pid
  [ -e {0}/killed ] && kill -9 $$
fi
[ "$1" = show ] || exit 0
[ -e {0}/slow ] && exec sleep 60
[ -e {0}/failing ] && {{ echo "Failed to connect to bus" >&2; exit 1; }}
printf 'ActiveState=active\\nUnitFileState=enabled\\nMainPID=%s\\n' "$(cat {0}/pid)"
cat {0}/drop-ins 2>/dev/null
printf '\\nLoadState=loaded\\n'
"""


@pytest.fixture
def systemd(server, tmp_path, monkeypatch):
    """A running server on a host that systemd seems to run, with what it says in a directory."""
    Path("/run/systemd/system").mkdir(parents=True)
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL.format(tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "pid").write_text(str(server.call("slmdb_instance.facts")["pid"]))
    Path("/var/lib/autobot-slm-database/last-good").mkdir(parents=True)
    Path("/var/lib/autobot-slm-database/last-good/conf").write_text("")
    return tmp_path


UNANSWERED = "systemd cannot be asked for autobot-slm-database"


def test_systemd_that_cannot_be_asked_is_no_reason_to_touch_the_server(server, systemd):
    """The run fails with one line, in test mode too, and the server goes on."""
    (systemd / "failing").touch()
    pid = server.call("slmdb_instance.facts")["pid"]
    for test in (True, False):
        result = server.state("slmdb_service.running", test=test)
        assert (result.result, result.changes) == (False, {})
        assert result.comment == f"{UNANSWERED}: Failed to connect to bus"
    assert server.call("slmdb_instance.facts")["pid"] == pid


def test_systemd_that_is_slow_is_no_reason_either(server, systemd, monkeypatch):
    """A run waits longer than a report, but not for ever."""
    (systemd / "slow").touch()
    patient = server.modules["slmdb_service.units"].func.__globals__
    monkeypatch.setitem(patient, "ANSWER", 1)
    for function in ("differences", "running", "start", "restart"):
        with pytest.raises(CommandExecutionError, match=f"{UNANSWERED}: no answer within 1 s"):
            server.call(f"slmdb_service.{function}")


def test_systemd_that_cannot_be_asked_takes_no_configuration_back(server, systemd):
    """A restart that was not tried says nothing about the settings."""
    (systemd / "failing").touch()
    ours = Path("/etc/postgresql/15/main/conf.d/50-autobot-slm.conf")
    ours.write_text("max_connections = 50\n")
    with pytest.raises(CommandExecutionError, match=f"^{UNANSWERED}"):
        server.call("slmdb_lastgood.restart")
    assert ours.read_text() == "max_connections = 50\n"


OURS = Path("/etc/postgresql/15/main/conf.d/50-autobot-slm.conf")


def test_a_restart_whose_systemctl_was_killed_is_done_if_the_server_did_start(server, systemd):
    """Its settings are in force, and stay."""
    (systemd / "killed").touch()
    OURS.write_text("max_connections = 50\n")
    before = server.call("slmdb_instance.facts")["pid"]
    server.call("slmdb_lastgood.restart")
    assert server.call("slmdb_instance.facts")["pid"] != before
    assert server.call("slmdb_server.query", "SHOW max_connections") == [{"max_connections": "50"}]
    assert OURS.read_text() == "max_connections = 50\n"


def test_a_restart_that_was_not_begun_takes_no_configuration_back(server, systemd):
    """The server that runs is the one of before: what waits for it goes on waiting."""
    (systemd / "killed-at-once").touch()
    OURS.write_text("max_connections = 50\n")
    before = server.call("slmdb_instance.facts")["pid"]
    with pytest.raises(CommandExecutionError) as caught:
        server.call("slmdb_lastgood.restart")
    assert str(caught.value) == (
        "the server was not restarted: systemctl restart autobot-slm-database was killed by signal "
        "9 (out of memory? journalctl -k tells)"
    )
    assert server.call("slmdb_instance.facts")["pid"] == before
    assert OURS.read_text() == "max_connections = 50\n"


JOURNAL = """#!/bin/sh
[ "$1" = --sync ] && exit
cat <<'END'
2026-11-26 12:00:01.000 UTC [11] FATAL:  could not map anonymous shared memory
2026-11-26 12:00:01.100 UTC [12] root@root FATAL:  no pg_hba.conf entry for host "[local]"
2026-11-26 12:00:01.200 UTC [13] a@b ERROR:  division by zero
END
"""


def test_the_words_of_a_failed_start_are_the_servers_own(server, systemd, tmp_path):
    """Not what a session was told."""
    program = tmp_path / "journalctl"
    program.write_text(JOURNAL)
    program.chmod(0o755)
    (systemd / "failed").touch()
    with pytest.raises(CommandExecutionError, match=r"could not map anonymous shared memory$"):
        server.call("slmdb_service.restart")


@pytest.mark.parametrize("how", ["failing", "slow"])
def test_a_report_says_once_that_systemd_cannot_be_asked(server, systemd, how):
    """Within its deadline, and with everything else in it."""
    (systemd / how).touch()
    report = server.call("slmdb_health.report", 15)
    words = [line for line in report["problems"] if "systemd cannot be asked" in line]
    assert len(words) == 1 and words[0].startswith("unit: ")
    assert not any("outside" in line for line in report["problems"])
    assert report["server"]["version"] and report["migration"]
    assert len((systemd / "asked").read_text().splitlines()) == 1


def test_a_server_outside_our_unit_is_moved_only_if_a_restart_is_permitted(
    server, systemd, minions
):
    """Else it is parked: a warning, listed, and no failure."""
    (systemd / "pid").write_text("0")
    for test in (True, False):
        result = server.state("slmdb_service.running", test=test)
        assert (result.result, result.changes) == (True, {})
        assert "waits for a window or an approval" in result.warnings[0]
    (row,) = server.call("slmdb_pending.restart")
    assert row["name"] == "unit"
    assert not any("stop" in line for line in (systemd / "asked").read_text().splitlines())
    approved = minions({"slm_database": {"maintenance": {"approve": True}}})
    announced = approved.state("slmdb_service.running", test=True)
    assert announced.changes["server"]["old"] == "running outside our unit"
    assert not getattr(announced, "warnings", None)


def test_each_thread_has_a_connection_of_its_own(server):
    """A minion without processes of its own for jobs runs several at once; and it closes them."""
    asked = "SELECT pg_backend_pid() AS pid FROM pg_sleep(0.3)"

    def ask(_):
        return server.call("slmdb_server.query", asked)[0]["pid"]

    with ThreadPoolExecutor(3) as pool:
        pids = list(pool.map(ask, range(3)))
    assert len(set(pids)) == 3
    left = "SELECT count(*) AS n FROM pg_stat_activity WHERE pid = ANY(%s)"
    until(lambda: server.call("slmdb_server.query", left, [pids])[0]["n"] == 0)


def test_a_unit_that_somebody_changed_is_in_the_report(server, systemd):
    """As our file, by a file beside it, or by Debian's unit that is not kept off any more."""
    server.call("slmdb_unit.apply")
    unit = Path("/etc/systemd/system/autobot-slm-database.service")
    mask = unit.with_name("postgresql@15-main.service")

    def said():
        lines = server.call("slmdb_health.report", 15)["warnings"]
        return [line for line in lines if "unit" in line]

    assert said() == []
    good = unit.read_bytes()
    unit.write_bytes(good.replace(b"Restart=on-failure", b"Restart=no"))
    mask.unlink()
    others = "/run/systemd/system/service.d/10-all.conf"
    ours = f"{unit}.d/override.conf"
    (systemd / "drop-ins").write_text(f"DropInPaths={others} {ours}\n")
    end = "is not as a run would have it; state.apply slm_database puts it right"
    assert said() == [
        f"the unit autobot-slm-database: {unit} {end}",
        f"the unit autobot-slm-database: {mask.name} {end}",
        f"the unit autobot-slm-database is changed by {ours}; the pillar says nothing of that",
    ]
    server.call("slmdb_unit.apply")
    (systemd / "drop-ins").unlink()
    assert said() == []
