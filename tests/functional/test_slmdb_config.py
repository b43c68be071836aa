"""The configuration's life: first install, reload, what waits for a restart, and the way back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import psycopg2
import pytest
from salt.exceptions import CommandExecutionError

from tests.support import world as worlds
from tests.support.wait import until

CONF = Path("/etc/postgresql/15/main/conf.d/50-autobot-slm.conf")
AUTO = Path("/var/lib/postgresql/15/main/postgresql.auto.conf")
NOUNS = (
    "slmdb_config",
    "slmdb_access",
    "slmdb_service",
    "slmdb_lastgood",
    "slmdb_role",
    "slmdb_secret",
    "slmdb_database",
)


def run(minion):
    """Converge as the states do, the login matrix last; return the nouns that changed something."""
    changed = set()
    for noun in NOUNS:
        if minion.call(f"{noun}.differences"):
            minion.call(f"{noun}.apply")
            changed.add(noun)
            assert minion.call(f"{noun}.differences") == {}, noun
    assert minion.call("slmdb_access.verify") == []
    return changed


def tell(minion, **settings):
    return minion.tell({"slm_database": settings})


def shown(minion, name):
    return minion.call("slmdb_server.query", f"SHOW {name}")[0][name]


def settle(minions):
    """A host on which the configuration was applied, started and seen to work; made once."""
    minion = minions()
    if "settled" in worlds.STATE["snapshots"]:
        worlds.fresh("settled")
        minion.call("slmdb_service.start")
    else:
        worlds.fresh()
        minion.call("slmdb_instance.apply")
        run(minion)
        minion.call("slmdb_service.stop")
        worlds.keep("settled")
        minion.call("slmdb_service.start")
    return minions()


@pytest.fixture
def settled(minions):
    return settle(minions)


def test_a_first_install_says_in_test_mode_what_it_then_does(instance, minions):
    """The server is not there yet; nothing needs it to be."""
    minion = minions()
    for state in ("slmdb_config.applied", "slmdb_access.applied"):
        announced = minion.state(state, test=True)
        assert announced.result is None
        assert minion.state(state, test=True).changes == announced.changes
        made = minion.state(state)
        assert (made.result, made.changes) == (True, announced.changes)
        again = minion.state(state)
        assert (again.result, again.changes) == (True, {})
    assert oct(CONF.stat().st_mode)[-4:] == "0644" and CONF.owner() == "postgres"
    for name in ("pg_hba.conf", "pg_ident.conf"):
        path = CONF.parents[1] / name
        assert oct(path.stat().st_mode)[-4:] == "0640" and path.owner() == "postgres"


def test_a_bare_host_is_told_what_would_come(bare, minions):
    """Without an instance test mode has an answer, and the promises are checked already."""
    minion = minions()
    assert minion.state("slmdb_config.applied", test=True).changes["port"]["new"] == "5432"
    tell(minion, settings={"fsync": False})
    assert minion.state("slmdb_config.applied", test=True).result is False


def test_a_second_run_changes_nothing_and_everything_is_in_force(settled):
    """What was written is what the server has."""
    assert run(settled) == set()
    assert shown(settled, "listen_addresses") == "127.0.0.1, ::1"
    assert shown(settled, "password_encryption") == "scram-sha-256"
    assert settled.call("slmdb_config.pending") == []
    assert settled.call("slmdb_config.foreign") == []
    assert settled.call("slmdb_access.rule_errors") == []


def test_what_a_reload_brings_is_in_force_at_once(settled):
    """A session of before sees it, too."""
    client = psycopg2.connect(host="/var/run/postgresql", user="autobot_slm", dbname="autobot_slm")
    tell(settled, settings={"work_mem": "9MB", "log_lock_waits": False})
    announced = settled.state("slmdb_config.applied", test=True).changes
    assert announced["work_mem"]["new"] == "9MB"
    assert announced["log_lock_waits"] == {"old": "on", "new": "off"}
    assert settled.state("slmdb_config.applied").changes == announced
    with contextlib.closing(client), client.cursor() as cursor:
        # The server tells its sessions one after the other.
        until(lambda: cursor.execute("SHOW work_mem") or cursor.fetchone() == ("9MB",))


@pytest.mark.parametrize("spelled", [str.lower, str])
def test_the_settings_that_the_server_spells_with_capitals(settled, spelled):
    """TimeZone, DateStyle and IntervalStyle, however pillar spells them."""
    given = {"TimeZone": "Europe/Berlin", "DateStyle": "ISO, DMY", "IntervalStyle": "iso_8601"}
    tell(settled, settings={spelled(name): value for name, value in given.items()})
    assert run(settled) == {"slmdb_config"}
    rows = settled.call("slmdb_server.query", "SELECT name, reset_val AS value FROM pg_settings")
    there = {row["name"]: row["value"] for row in rows}
    assert {name: there[name] for name in given} == given
    settled.call("slmdb_server.execute", "ALTER SYSTEM SET TimeZone = 'UTC'")
    assert [row["name"] for row in settled.call("slmdb_config.foreign")] == ["timezone"]


def test_timeouts_are_for_the_sessions_of_others(settled):
    """The formula's own sessions could not even correct them."""
    names = ["statement_timeout", "lock_timeout", "idle_session_timeout"]
    names += ["idle_in_transaction_session_timeout"]
    tell(settled, settings=dict.fromkeys(names, "20s"))
    assert run(settled) == {"slmdb_config"}
    settled.call("slmdb_server.execute", "ALTER ROLE postgres SET statement_timeout = 1")
    settled.call("slmdb_server.forget")
    for name in names:
        assert shown(settled, name) == ("10s" if name == "lock_timeout" else "0")
    client = psycopg2.connect(host="/var/run/postgresql", user="autobot_slm", dbname="autobot_slm")
    with contextlib.closing(client), client.cursor() as cursor:
        for name in names:
            cursor.execute(f"SHOW {name}")
            assert cursor.fetchone() == ("20s",)
    assert run(settled) == set()
    tell(settled)
    assert run(settled) == {"slmdb_config"}


def test_what_needs_a_restart_waits_for_it_and_is_listed(settled):
    """Nothing restarts by surprise; the list says since when."""
    before, pid = shown(settled, "shared_buffers"), settled.call("slmdb_instance.facts")["pid"]
    tell(settled, settings={"shared_buffers": "200MB"})
    announced = settled.state("slmdb_config.applied", test=True).changes
    assert announced == {"shared_buffers": {"old": before, "new": "200MB: waits for a restart"}}
    assert run(settled) == {"slmdb_config"}
    (row,) = settled.call("slmdb_config.pending")
    assert (row["name"], row["old"], row["new"]) == ("shared_buffers", before, "200MB")
    tell(settled, settings={"shared_buffers": "200MB", "work_mem": "9MB"})
    os.utime("/var/lib/autobot-slm-database/pending.json", (0, 0))
    assert run(settled) == {"slmdb_config"}
    assert settled.call("slmdb_config.pending") == [row]
    assert settled.call("slmdb_instance.facts")["pid"] == pid


@pytest.mark.parametrize("leave", [{"restart": "now"}, {"maintenance": {"approve": True}}])
def test_a_permitted_restart_brings_it(settled, leave):
    """It is announced, done once, and then nothing waits."""
    before = shown(settled, "shared_buffers")
    tell(settled, settings={"shared_buffers": "200MB"}, **leave)
    announced = settled.state("slmdb_config.in_force", test=True)
    assert announced.changes == {"shared_buffers": {"old": before, "new": "200MB"}}
    assert run(settled) == {"slmdb_config", "slmdb_lastgood"}
    assert shown(settled, "shared_buffers") == "200MB"
    assert run(settled) == set()


def test_what_is_taken_out_and_waits_is_no_error(settled):
    """The server has a nameless one for it; only what waits is told."""
    tell(settled, settings={"max_wal_senders": 12}, restart="now")
    run(settled)
    settled.call("slmdb_service.restart")
    tell(settled)
    run(settled)
    assert settled.call("slmdb_config_file.lines") == []
    (waits,) = settled.call("slmdb_config.pending")
    assert (waits["name"], waits["new"]) == ("max_wal_senders", "the default")


def test_what_is_taken_back_before_the_restart_does_not_wait_any_more(settled):
    """The server goes on calling it so; a maintenance would restart it for nothing."""
    for settings in ({"max_wal_senders": 12, "shared_buffers": "200MB"}, {}):
        tell(settled, settings=settings)
        assert run(settled) == {"slmdb_config"}
        names = [row["name"] for row in settled.call("slmdb_config.pending")]
        assert names == sorted(settings)
    assert settled.call("slmdb_pending.restart") == []
    tell(settled, restart="now")
    assert settled.state("slmdb_config.in_force").changes == {}


def test_what_the_server_keeps_over_a_restart_must_find_room(settled):
    """An empty scratch instance has no prepared transaction and no replication slot."""
    room = {"max_prepared_transactions": 5, "wal_level": "logical"}
    tell(settled, settings=room, restart="now")
    run(settled)
    ask = "SELECT pg_create_logical_replication_slot('held', 'pgoutput')"
    settled.call("slmdb_server.query", ask)
    held = "BEGIN; CREATE TABLE held (); PREPARE TRANSACTION 'held'"
    settled.call("slmdb_server.execute", held)
    before = CONF.read_bytes()
    tell(settled, settings={"max_replication_slots": 0})
    assert [line.partition(";")[0] for line in settled.call("slmdb_config.problems")] == [
        "slm_database:settings:max_prepared_transactions: prepared transactions that are open: 1",
        "slm_database:settings:max_replication_slots: replication slots there are: 1",
        "slm_database:settings:wal_level: logical replication slots there are: 1",
    ]
    assert settled.state("slmdb_config.applied").result is False
    assert CONF.read_bytes() == before
    settled.call("slmdb_server.execute", "ROLLBACK PREPARED 'held'")
    settled.call("slmdb_server.query", "SELECT pg_drop_replication_slot('held')")
    settled.loaders.context.clear()
    assert settled.call("slmdb_config.problems") == []


def test_a_hand_edit_of_our_file_is_undone(settled):
    """Our file is ours; the server is told."""
    CONF.write_text(CONF.read_text().replace("log_lock_waits = 'on'", "log_lock_waits = 'off'"))
    settled.call("slmdb_service.reload")
    assert run(settled) == {"slmdb_config"}
    assert shown(settled, "log_lock_waits") == "on"


def test_a_file_that_the_server_has_not_read_is_loaded(settled):
    """A run that was killed before the reload is finished by the next one."""
    later = time.time() - 0.01
    os.utime(CONF, (later, later))
    assert settled.state("slmdb_config.applied").changes == {
        "reload": {"old": "not read by the server", "new": "read"}
    }
    assert run(settled) == set()


def test_a_file_of_before_the_clock_was_set_back_is_read_once(settled):
    """It looks unread until the clock is there again."""
    later = time.time() + 3600
    os.utime(CONF, (later, later))
    assert settled.state("slmdb_config.applied").changes.keys() == {"reload"}
    assert CONF.stat().st_mtime < later - 3000
    assert run(settled) == set()


def test_what_is_written_after_the_clock_was_set_back_is_read(settled, monkeypatch):
    """The file is older than what the server read last, by the clock."""
    replace = os.replace

    def long_ago(source, target):
        replace(source, target)
        os.utime(target, (1, 1))

    rule = {"type": "local", "database": "all", "user": "alice", "method": "reject"}
    tell(settled, settings={"work_mem": "9MB"}, hba={"before": [rule]})
    monkeypatch.setattr(os, "replace", long_ago)
    assert run(settled) == {"slmdb_config", "slmdb_access"}
    assert shown(settled, "work_mem") == "9MB"
    with pytest.raises(psycopg2.OperationalError, match="rejects connection"):
        psycopg2.connect(host="/var/run/postgresql", user="alice", dbname="postgres")


def test_what_overrides_ours_is_reported_with_file_and_line_and_left_alone(settled):
    """Another file of conf.d, and ALTER SYSTEM."""
    other = CONF.parent / "90-by-hand.conf"
    other.write_text("# by hand\nlog_lock_waits = off\n")
    settled.call("slmdb_server.execute", "ALTER SYSTEM SET work_mem = '5MB'")
    found = {row["name"]: row for row in settled.call("slmdb_config.foreign")}
    assert set(found) == {"log_lock_waits", "work_mem"}
    assert (found["log_lock_waits"]["file"], found["log_lock_waits"]["line"]) == (str(other), 2)
    assert found["work_mem"]["file"] == str(AUTO) and found["work_mem"]["value"] == "5MB"
    tell(settled, settings={"jit": True})
    assert run(settled) == {"slmdb_config"}
    assert other.read_text().endswith("off\n") and "5MB" in AUTO.read_text()


UNKNOWN = "shared_preload_libraries = 'nosuch'"
# A scratch instance does without huge pages, for the running server may hold those there are.
UNSEEN = "huge_pages = 'on'"


def break_the_start(line=UNKNOWN):
    """A line by hand in our file, with which the server does not start."""
    CONF.write_text(f"{CONF.read_text()}{line}\n")


@pytest.mark.parametrize(
    ("verb", "line", "words"),
    [("restart", UNSEEN, "shared memory"), ("start", UNKNOWN, "nosuch")],
)
def test_a_server_that_does_not_start_goes_back_to_the_last_good_configuration(
    settled, verb, line, words
):
    """It is up again at once, the error has the server's words, and the next run is quiet."""
    good = CONF.read_text()
    break_the_start(line)
    if verb == "start":
        settled.call("slmdb_service.stop")
    began = time.monotonic()
    said = f"{words}.*last good configuration is in force"
    with pytest.raises(CommandExecutionError, match=said):
        settled.call(f"slmdb_lastgood.{verb}")
    assert time.monotonic() - began < 90  # not the minutes of a start that hangs
    assert CONF.read_text() == good
    assert settled.call("slmdb_server.available")
    assert run(settled) == set()


def test_a_restart_that_would_fail_is_not_tried(settled):
    """Our files are the last good ones: with what others wrote there is nothing to go back to."""
    pid = settled.call("slmdb_instance.facts")["pid"]
    settled.call("slmdb_server.execute", f"ALTER SYSTEM SET {UNKNOWN}")
    settled.call("slmdb_service.reload")
    until(lambda: settled.call("slmdb_config.pending"))
    tell(settled, restart="now")
    for test in (True, False):
        refused = settled.state("slmdb_config.in_force", test=test)
        assert (refused.result, refused.changes) == (False, {})
        words = "not restarted, the server would not start: "
        assert f'{words}{AUTO}, line 3: could not access file "nosuch"' in refused.comment
    with pytest.raises(CommandExecutionError, match=f"{words}could not access file"):
        settled.call("slmdb_lastgood.restart")
    assert settled.call("slmdb_instance.facts")["pid"] == pid
    assert settled.call("slmdb_server.available")


@pytest.mark.parametrize(
    ("line", "words", "place"),
    [
        (UNKNOWN, 'could not access file "nosuch"', f"{AUTO}, line 4"),
        ("wal_level = 'minimal'", "wal_level", f"{AUTO}, line 4"),
        ("work_mem = 'banana'", "banana", f"{AUTO}, line 4"),
        ("nonsense", "line 4", str(AUTO)),
    ],
)
def test_what_alter_system_keeps_from_starting_is_named_with_the_way_out(
    settled, line, words, place
):
    """No session can take it back, and our last good configuration does not help."""
    settled.call("slmdb_service.stop")
    before = AUTO.read_text()
    AUTO.write_text(f"{before}jit = 'on'\n{line}\n")
    failed = settled.state("slmdb_service.running")
    assert failed.result is False and words in failed.comment
    way_out = f"; ALTER SYSTEM wrote that: take it out of {place}, and start again"
    assert failed.comment.endswith(way_out)
    answer = settled.call("slmdb.health", timeout=15)
    said = " | ".join(answer["problems"] + answer["warnings"])
    if line != "nonsense":
        name = line.partition(" ")[0]
        assert f"{name} = " in said or f"{name} is " in said
        assert f"{AUTO}, line 4" in said and "take the line out" in said
        assert "ALTER SYSTEM RESET" not in said
    AUTO.write_text(before)
    assert settled.state("slmdb_service.running").result is True


@pytest.mark.parametrize(
    ("line", "words", "place"),
    [
        (
            "shared_buffers = 12ZB",
            'invalid value for parameter "shared_buffers": "12ZB"',
            "take it out of {}, line {}",
        ),
        ("shared_buffers = ", "invalid line", "line {1} in {0}"),
        ("nosuch = 1", 'unrecognized configuration parameter "nosuch"', 'in file "{}" line {}'),
    ],
)
def test_what_a_hand_in_the_main_file_keeps_from_starting_is_named(settled, line, words, place):
    """What is wrong, and in which line: not only that the file contains errors."""
    settled.call("slmdb_service.stop")
    main = CONF.parents[1] / "postgresql.conf"
    before = main.read_text()
    main.write_text(f"{before}{line}\n")
    number = len(before.splitlines()) + 1
    failed = settled.state("slmdb_service.running")
    assert failed.result is False and words in failed.comment
    assert place.format(main, number) in failed.comment
    main.write_text(before)
    assert settled.state("slmdb_service.running").result is True


def test_a_mistake_of_somebody_else_is_named_with_its_file_and_line(settled):
    """Before ours is written beside it, which would not be loaded either."""
    CONF.with_name("90-by-hand.conf").write_text("# by hand\nnosuch = 1\n")
    tell(settled, settings={"work_mem": "9MB"})
    words = 'unrecognized configuration parameter "nosuch" (90-by-hand.conf, line 2)'
    assert words in settled.state("slmdb_config.applied", test=True).comment


def test_without_a_last_good_configuration_the_failure_is_told(instance, minions):
    """A first install has nothing to go back to."""
    minion = minions()
    minion.state("slmdb_config.applied")
    break_the_start()
    with pytest.raises(CommandExecutionError, match=r"did not start: .*nosuch"):
        minion.call("slmdb_lastgood.start")


def test_what_waits_for_a_restart_is_not_called_good(settled):
    """The last good configuration is one that was in force when logins were seen to work."""
    rule = {"type": "local", "database": "all", "user": "alice", "method": "reject"}
    tell(settled, settings={"shared_buffers": "200MB"}, hba={"before": [rule]})
    run(settled)
    good = Path("/var/lib/autobot-slm-database/last-good")
    assert "200MB" not in (good / "conf").read_text()
    # Rules are in force at once: a restart that fails must not bring back those of before.
    assert "alice" in (good / "hba").read_text()


def test_the_server_s_own_objection_brings_back_what_was_there(settled):
    """Should a rehearsal have let something through, the running server has the last word."""
    before = CONF.read_bytes()
    tell(settled, settings={"work_mem": "1"})
    rehearsed = settled.call("slmdb_rehearsal.with_rules", settled.call("slmdb_config.content"))
    rehearsed.update(settled.call("slmdb_rehearsal.with_rules", "work_mem = '4MB'"))
    words = "slm_database:settings:work_mem: the server says: "
    with pytest.raises(CommandExecutionError, match=words):
        settled.call("slmdb_config.apply")
    assert CONF.read_bytes() == before
    assert shown(settled, "work_mem") != "1kB"


def test_everything_is_explained(settled):
    """Value, reason and source of every line of the file."""
    tell(settled, settings={"work_mem": "9MB"})
    explained = settled.call("slmdb_config.explain")
    assert set(explained) == set(settled.call("slmdb_config.wanted"))
    assert explained["work_mem"]["why"].startswith("the operator's choice (the profile would say")
    assert explained["port"]["source"] == "slm_database:port"
    assert all(row["why"] and row["source"] for row in explained.values())


def test_a_clean_brings_back_what_was_there(settled):
    """Our file goes, Debian's rules come back, and a second clean changes nothing."""
    for state in ("slmdb_config.absent", "slmdb_access.absent"):
        announced = settled.state(state, test=True)
        assert announced.result is None and announced.changes
        assert settled.state(state).changes == announced.changes
        assert settled.state(state).changes == {}
    assert not CONF.exists()
    assert "local   all             all" in (CONF.parents[1] / "pg_hba.conf").read_text()
    assert settled.call("slmdb_server.available")


def test_a_disk_without_room_for_a_scratch_instance_is_called_that(minions):
    """Not what initdb says last, which is that it tidies up."""
    worlds.fresh()
    minion = minions()
    small = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/var/lib/postgresql"]
    subprocess.run(small, check=True)
    try:
        with pytest.raises(CommandExecutionError, match=r"scratch instance: .*No space left"):
            minion.call("slmdb_rehearsal.check", "work_mem = '9MB'")
    finally:
        subprocess.run(["umount", "/var/lib/postgresql"], check=True)
