"""Backups by pgBackRest: configured, made, listed, described, verified, or refused."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.support import backend, backups
from tests.support import world as worlds
from tests.support.wait import until

APPROVED = {"maintenance": {"approve": True}}
KEY = Path("/etc/pgbackrest/autobot-slm/key.conf")
OFF = {"slm_database": {"backup": {"enabled": False}}}
STATES = ("slmdb_backup.configured", "slmdb_backup.present", "slmdb_backup.scheduled")
CRON = Path("/etc/cron.d/autobot-slm-backup")
FIRST = ("slmdb_config.applied", "slmdb_access.applied", "slmdb_service.running")


def run(minion, *states, **keywords):
    return {state: minion.state(state, **keywords) for state in states}


@pytest.fixture
def archiving(minions):
    """A running server that archives to a repository which does not know it yet."""
    if "archiving" not in worlds.STATE["snapshots"]:
        worlds.fresh()  # a snapshot has no other below it
        minion = minions(backups.PILLAR)
        minion.call("slmdb_instance.apply")
        assert all(result.result for result in run(minion, *FIRST).values())
        backups.keep(minion, "archiving")
    with backups.woken(minions, backups.PILLAR, "archiving") as minion:
        yield minion


@pytest.fixture
def ready(archiving):
    """The same, with everything applied."""
    assert all(result.result for result in run(archiving, *STATES).values())
    return archiving


def test_apply_apply_again_and_test_mode(archiving):
    """What is announced is what is done, once."""
    for state in STATES:
        announced = archiving.state(state, test=True)
        assert announced.result is None and announced.changes
        made = archiving.state(state)
        assert (made.result, made.changes) == (True, announced.changes)
        again = archiving.state(state)
        assert (again.result, again.changes) == (True, {})
        assert archiving.state(state, test=True).result is True


def test_nothing_happens_if_it_is_not_enabled(server, minions):
    """Neither the states nor the server's configuration know of backups then."""
    minions(OFF)
    for state in STATES:
        result = server.state(state)
        assert (result.result, result.changes) == (True, {})
    wanted = server.call("slmdb_config.wanted")
    assert "archive_mode" not in wanted and wanted["archive_command"] == "/bin/true"
    assert "pgbackrest" not in server.call("slmdb_package.names")
    with pytest.raises(SaltInvocationError, match="backup:enabled"):
        server.call("slmdb_backup.create")


@pytest.mark.once
def test_wal_does_not_pile_up_after_backups_were_switched_off(ready, minions):
    """The archiving itself ends with a restart only; until then there is nobody for its WAL."""
    off = minions(OFF)
    assert off.state("slmdb_config.applied").changes
    assert off.call("slmdb_server.query", "SHOW archive_mode") == [{"archive_mode": "on"}]
    waiting = Path("/var/lib/postgresql/15/main/pg_wal/archive_status")
    for _ in range(3):
        off.call("slmdb_server.execute", "SELECT pg_logical_emit_message(true, 'a', 'b')")
        off.call("slmdb_server.query", "SELECT pg_switch_wal()::text AS at")
    until(lambda: not list(waiting.glob("*.ready")))
    assert list(waiting.glob("*.done"))
    off.call("slmdb_server.forget")


@pytest.mark.once
def test_what_a_clean_leaves_says_that_wal_piles_up(ready):
    """The command is gone with our configuration, and archive_mode is not until a restart."""
    for state in ("slmdb_backup.absent", "slmdb_config.absent"):
        assert ready.state(state).result is True
    (line,) = [line for line in ready.call("slmdb_record.kept") if "pg_wal" in line]
    assert line.endswith("(pg_ctlcluster 15 main restart)")
    ready.call("slmdb_service.restart")
    assert [line for line in ready.call("slmdb_record.kept") if "pg_wal" in line] == []


@pytest.mark.once
def test_a_key_is_kept_before_it_is_removed(ready, minions):
    """No moment and no full disk may lose the only key of a repository."""
    text = KEY.read_bytes()
    kept = Path(f"{KEY}.kept")
    kept.touch()
    subprocess.run(["mount", "--bind", kept, kept], check=True)  # nothing is renamed onto it
    plain = minions({"slm_database": {"backup": {"path": "/srv/plain", "encryption": False}}})
    with pytest.raises(CommandExecutionError, match=str(kept)):
        plain.call("slmdb_pgbackrest.apply")
    assert KEY.read_bytes() == text


def test_the_key_is_made_once_and_stays_where_it_is(ready):
    """root and the server read it, nobody else; it is in no other file and no argument."""
    assert oct(KEY.stat().st_mode)[-4:] == "0640"
    assert (KEY.owner(), KEY.group()) == ("root", "postgres")
    text = KEY.read_text()
    secret = text.split("cipher-pass=")[1].strip()
    assert len(secret) >= 43
    ready.state(STATES[0])
    ready.call("slmdb_backup.create")
    assert KEY.read_text() == text
    for directory in ("/etc/pgbackrest", "/var/log/pgbackrest", "/var/log/postgresql"):
        for path in Path(directory).rglob("*"):
            if path.is_file() and path != KEY:
                assert secret not in path.read_text(errors="replace"), path
    assert secret not in ready.call("slmdb_config.content")


@pytest.mark.once
def test_a_repository_without_its_key_is_not_given_another(ready):
    """A new key could not read what is there."""
    KEY.rename("/etc/kept-key")
    result = ready.state(STATES[0])
    assert result.result is False
    assert "bring the copy of the key back" in str(result.comment)
    assert not KEY.exists()


def test_backups_are_made_and_listed(ready):
    """The first is a full one whatever is asked for; the next builds on it."""
    first = ready.call("slmdb_backup.create", "differential")
    assert first["type"] == "full" and first["damaged"] is False
    second = ready.call("slmdb_backup.create")
    assert second["type"] == "incremental" and second["needs"] == [first["label"]]
    assert [row["label"] for row in ready.call("slmdb_backup.list")] == [
        first["label"],
        second["label"],
    ]
    info = ready.call("slmdb_backup.info")
    assert info["encrypted"] is True and info["running"] is False
    assert info["backups"] == 2 and info["newest"]["label"] == second["label"]
    assert info["earliest"] > first["stopped"]
    assert ready.call("slmdb_restore_plan.make", time=info["earliest"])["label"] == first["label"]
    assert info["last_wal"] >= second["wal"][1]


def test_a_moment_right_after_a_backup_can_be_restored(ready):
    """Each kind, made at whatever part of a second."""
    for kind in ("full", "incremental", "differential"):
        made = ready.call("slmdb_backup.create", kind)
        moment = datetime.now(timezone.utc).isoformat()
        assert ready.call("slmdb_restore_plan.make", time=moment)["label"] == made["label"]


@pytest.mark.once
def test_retention_is_kept(ready, minions):
    """With room for one full backup the older one goes, and what needs it."""
    backup = {"enabled": True, "retention": {"full": 1}}
    minions({"slm_database": {"backup": backup}})
    assert ready.state(STATES[0]).result is True
    ready.call("slmdb_backup.create", "full")
    ready.call("slmdb_backup.create")
    last = ready.call("slmdb_backup.create", "full")
    assert [row["label"] for row in ready.call("slmdb_backup.list")] == [last["label"]]


@pytest.mark.once
def test_verify_finds_a_flipped_byte(ready):
    """A sound repository is right; one byte less and it is not."""
    ready.call("slmdb_backup.create")
    assert ready.call("slmdb_backup.verify")["right"] is True
    backups.flip(backups.largest_file())
    found = ready.call("slmdb_backup.verify")
    assert found["right"] is False and found["problems"]


def test_what_cannot_be_is_refused_in_one_line(ready):
    """Before anything is touched."""
    with pytest.raises(SaltInvocationError, match="allowed: full, differential, incremental"):
        ready.call("slmdb_backup.create", "weekly")
    KEY.write_text("[global]\nrepo1-cipher-pass=another\n")
    with pytest.raises(CommandExecutionError, match="is not the key") as caught:
        ready.call("slmdb_backup.list")
    assert "\n" not in str(caught.value) and "another" not in str(caught.value)


def test_the_schedule_is_cron_s_where_systemd_does_not_run(ready, minions):
    """Backups run as the server's user, what needs Salt as root; a time of null takes one away."""
    lines = CRON.read_text().splitlines()[2:]
    assert [line.split(" nice ")[0] for line in lines] == [
        "30 1 * * 0 postgres",
        "30 1 * * 1,2,3,4,5,6 postgres",
        "0 3 * * * root",
        "0 4 * * 0 root",
    ]
    for line, job in zip(lines[2:], ("dump", "drill"), strict=True):
        assert line.endswith(" ".join(ready.call("slmdb_runner.command", f"slmdb_backup.{job}")))
    subprocess.run(
        ["runuser", "-u", "postgres", "--", "sh", "-c", lines[0].split("postgres ", 1)[1]],
        check=True,
        cwd="/",
    )
    assert [row["type"] for row in ready.call("slmdb_backup.list")] == ["full"]
    backup = {"enabled": True, "schedule": dict.fromkeys(("full", "differential", "dump", "drill"))}
    minions({"slm_database": {"backup": backup}})
    result = ready.state("slmdb_backup.scheduled")
    assert (result.result, list(result.changes)) == (True, [str(CRON)])
    assert not CRON.exists()


@pytest.mark.parametrize(
    "when, calendar, cron",
    [
        ("daily 02:30", "*-*-* 02:30:00", "30 2 * * *"),
        ("Sun 01:05", "Sun *-*-* 01:05:00", "5 1 * * 0"),
        ("Fri-Mon 23:00", "Fri..Mon *-*-* 23:00:00", "0 23 * * 0,1,5,6"),
        ("Mon,Wed-Thu 00:00", "Mon,Wed..Thu *-*-* 00:00:00", "0 0 * * 1,3,4"),
    ],
)
def test_a_time_of_the_week_is_said_in_both_languages(shared_server, when, calendar, cron):
    """systemd's and cron's."""
    assert shared_server.call("slmdb_backup_schedule.calendar", when) == calendar
    assert shared_server.call("slmdb_backup_schedule.cron", when) == cron


@pytest.mark.once
def test_a_full_disk_is_refused_before_the_backup(ready):
    """The repository's disk is asked first."""
    ready.call("slmdb_backup.create")
    subprocess.run(["cp", "-a", str(backups.REPOSITORY), "/var/lib/kept"], check=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "tmpfs", str(backups.REPOSITORY)]
    subprocess.run(mount, check=True)
    try:
        subprocess.run(["cp", "-a", "/var/lib/kept/.", str(backups.REPOSITORY)], check=True)
        free = os.statvfs(backups.REPOSITORY)
        filler = bytes(free.f_bavail * free.f_frsize - 1024**2)
        (backups.REPOSITORY / "filler").write_bytes(filler)
        with pytest.raises(CommandExecutionError, match="MiB free"):
            ready.call("slmdb_backup.create", "full")
        assert len(ready.call("slmdb_backup.list")) == 1
        assert ready.call("slmdb_server.available") is True
    finally:
        subprocess.run(["umount", "--lazy", str(backups.REPOSITORY)], check=True)


def test_a_server_that_does_not_archive_yet_says_why(server, minions):
    """archive_mode waits for a restart, as every such setting does."""
    minions(backups.PILLAR)
    assert all(result.result for result in run(server, *FIRST[:2], *STATES).values())
    with pytest.raises(CommandExecutionError, match="archive_mode waits for a restart"):
        server.call("slmdb_backup.create")
    waiting = [row["name"] for row in server.call("slmdb_config.pending")]
    assert waiting == ["archive_mode"] or "archive_mode" in waiting


def test_clean_keeps_the_repository_and_its_key(ready):
    """Our configuration goes, what was saved stays."""
    ready.call("slmdb_backup.create")
    assert ready.state("slmdb_backup.unscheduled").result is True
    assert ready.state("slmdb_backup.unscheduled").changes == {} and not CRON.exists()
    assert ready.state("slmdb_backup.absent").result is True
    assert ready.state("slmdb_backup.absent").changes == {}
    assert not Path("/etc/pgbackrest/autobot-slm.conf").exists()
    assert KEY.exists() and (backups.REPOSITORY / "backup").is_dir()


def test_the_whole_formula_with_backups(bare, minions):
    """From a bare host: announced, made, and nothing left to do; then a backup."""
    minion = minions()

    def changed(**keywords):
        chunks = minion.call("state.apply", "slm_database", **keywords).raw.values()
        assert [one["comment"] for one in chunks if one["result"] is False] == []
        return {one["__id__"] for one in chunks if one["changes"]}

    announced = changed(test=True)
    assert changed() == announced
    assert "Backups are made when the schedule says so" in announced
    assert changed() == set()
    assert minion.call("slmdb_backup.create")["type"] == "full"


def test_a_maintenance_makes_a_backup_first(bare, minions):
    """Before what is parked is done there is a backup of the moment."""
    minion = minions(backups.PILLAR)
    worlds.forget_updates()
    assert all(one["result"] for one in minion.call("state.apply", "slm_database").raw.values())
    settings = {**backups.PILLAR["slm_database"], "settings": {"max_connections": 37}}
    minion.tell({"slm_database": {**settings, "maintenance": {"approve": True}}})
    assert minion.state("slmdb_config.applied").result is True
    done = minion.state("slmdb_maintenance.done")
    assert done.result is True, done.comment
    (made,) = minion.call("slmdb_backup.list")
    assert done.comment.index(f"backup: {made['label']}") < done.comment.index("restart: ")


@pytest.fixture
def venv():
    """Made before the world is fresh."""
    return backend.venv()


@pytest.mark.once
def test_a_migration_s_restore_point_brings_back_what_was_before(venv, bare, minions):
    """It comes after the backup that the migration makes; a later backup is not in its way."""
    minion = minions(backups.PILLAR)
    assert all(one["result"] for one in minion.call("state.apply", "slm_database").raw.values())
    minion.tell({"slm_database": {**backups.PILLAR["slm_database"], **APPROVED}})
    backend.deploy(venv)
    try:
        done = minion.state("slmdb_migration.applied")
        assert done.result is True, done.comment
        point = re.search(r"Restore point: ([\w-]+)", done.comment)[1]
        minion.call("slmdb_backup.create")
        copied = minion.call("slmdb_backup.restore", restore_point=point)
    finally:
        backend.remove()
    connection = minion.call("slmdb_server.connect", "autobot_slm", port=copied["port"])
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('nodes'), to_regclass('alembic_version')")
        before, after = cursor.fetchone()
    assert (before, after) == ("nodes", None)
    subprocess.run(copied["remove"], shell=True, check=True)
