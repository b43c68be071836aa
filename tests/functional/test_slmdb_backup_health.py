"""What health says of backups: from what lies on the host, whatever happened behind its back."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

from tests.functional.test_slm_database import begin_applied
from tests.support import backups
from tests.support import world as worlds
from tests.support.wait import until

REPOSITORY = Path("/var/lib/pgbackrest")
BACKUPS = REPOSITORY / "backup/autobot-slm"
KEY = Path("/etc/pgbackrest/autobot-slm/key.conf")
SINCE = Path("/var/lib/autobot-slm-database/backups-since")
SETTINGS = SINCE.with_name("settings.json")
HELD = SINCE.with_name("repositories.json")
STATUS = Path("/var/lib/postgresql/15/main/pg_wal/archive_status")
ARCHIVING = Path("/var/log/pgbackrest/autobot-slm-archive-push.log")
BACKUP = ("slmdb_pgbackrest.line", "backup", "--repo=1")
QUEUE = {"slm_database": {"backup": {"queue_limit": "32MB"}}}


@pytest.fixture
def host(minions):
    """A host to which the formula was applied with an empty pillar, its server running."""
    begin_applied(minions)
    minion = minions()
    minion.call("slmdb_service.start")
    yield minion
    minion.call("slmdb_server.forget")


@pytest.fixture
def backed_up(host, minions):
    """The same with one backup; made once, and kept."""
    if "with a backup" not in worlds.STATE["snapshots"]:
        host.call("slmdb_backup.create")
        backups.keep(host, "with a backup")
    with backups.woken(minions, None, "with a backup") as minion:
        yield minion


@contextlib.contextmanager
def hanging(path):
    """A mount whose server never answers: whoever touches it waits."""
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
    words = ["mount", "-i", "-t", "fuse", "-o", options, "hangs", str(path)]
    try:
        subprocess.run(words, check=True, pass_fds=[server])
        yield
    finally:
        os.close(server)
        subprocess.run(["umount", "--lazy", str(path)], check=False)


def ask(minion):
    return minion.call("slmdb.health", 15)


def said(minion, kind="problems"):
    return " | ".join(ask(minion)[kind])


def earlier(path, hours):
    moment = path.stat().st_mtime - 3600 * hours
    os.utime(path, (moment, moment))


def long_ago(hours):
    SINCE.write_text(f"{int(time.time() - 3600 * hours)}\n")


@contextlib.contextmanager
def buried(directory, mode="0777"):
    """A disk that is full and knows nothing lies over a directory."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64k,mode={mode}", "tmpfs", str(directory)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def write_wal(minion):
    minion.call("slmdb_server.query", "SELECT pg_logical_emit_message(true, 'test', 'x')")
    minion.call("slmdb_server.query", "SELECT pg_switch_wal()")


def ready():
    return sorted(path.name for path in STATUS.glob("*.ready"))


def test_a_fresh_host_is_healthy_and_says_that_there_is_no_backup(host):
    """And that, when there is one, it is only here; the limits count from the first apply."""
    answer = ask(host)
    assert (answer["healthy"], answer["problems"]) == (True, [])
    warnings = " | ".join(answer["warnings"])
    assert "repository 1 (/var/lib/pgbackrest): no backup yet; slmdb_backup.create" in warnings
    assert "backups are only local" in warnings
    assert answer["backup"]["wal"]["mode"] == "on"
    long_ago(27)
    assert "no backup yet for 27 h, limit 26h" in said(host)
    long_ago(16 * 24)
    assert "no restore was proven for 16 d, limit 15d" in said(host)


@pytest.mark.once
def test_a_run_that_never_came_to_an_end_is_not_well_for_ever(host):
    """Backups are wanted and none will be made: well for as long as a backup may be old."""
    SINCE.unlink()
    version = STATUS.parents[1] / "PG_VERSION"
    conf = Path("/etc/postgresql/15/main/conf.d/50-autobot-slm.conf")
    for path in (version, conf):
        earlier(path, 30)
    # A run was completed, without them: they were switched on since.
    assert "backups are not set up yet; state.apply slm_database.b" in said(host, "warnings")
    assert said(host) == ""
    SETTINGS.unlink()
    assert said(host).startswith(
        "backups are not set up for 30 h, limit 26h: no run of the whole formula was completed"
    )
    # An instance that was just made, and an older one to which the formula has just come.
    for path in (version, conf):
        os.utime(path)
        assert said(host) == ""
        assert "backups are not set up yet: no run of the whole" in said(host, "warnings")
        earlier(path, 30)


@pytest.mark.once
def test_a_repository_that_was_never_there_is_no_lost_one(host):
    """As a run leaves it that ended before it was made."""
    HELD.unlink()
    shutil.rmtree(BACKUPS)
    assert said(host) == (
        "repository 1 (/var/lib/pgbackrest) is not set up yet; state.apply slm_database.backup "
        "does it"
    )
    shutil.rmtree(REPOSITORY / "archive")
    assert host.state("slmdb_backup.present").result is True
    assert said(host) == ""


def test_the_last_backup_is_told_without_asking_the_engine(backed_up):
    """Even when nobody could: the key is away, which is a problem."""
    (made,) = backed_up.call("slmdb_backup.list")
    KEY.rename("/etc/kept-key")
    (row,) = ask(backed_up)["backup"]["repositories"]
    assert (row["backups"], row["last"]["label"]) == (1, made["label"])
    assert row["last"]["at"] >= made["stopped"] and row["last"]["age_seconds"] < 3600
    assert "no backup yet" not in said(backed_up, "warnings")
    assert said(backed_up) == (
        f"{KEY}, the key of repository 1, is missing; bring the copy of it back"
    )
    with pytest.raises(CommandExecutionError, match=f"{KEY} is missing, which is its key"):
        backed_up.call("slmdb_backup.create")


def test_a_key_that_others_can_read_or_the_server_cannot_is_a_problem(backed_up):
    """Before anything fails for it; an apply mends it."""
    for mode, user, group in ((0o644, "root", "postgres"), (0o640, "root", "root")):
        KEY.chmod(mode)
        shutil.chown(KEY, user, group)
        assert said(backed_up).startswith(f"{KEY}: ")
        assert said(backed_up).endswith("state.apply slm_database.backup mends it")
        assert backed_up.state("slmdb_backup.configured").result is True
        assert said(backed_up) == ""


@pytest.mark.once
def test_a_repository_that_the_server_cannot_use_is_a_problem(backed_up):
    """As after a copy by root; an apply gives back what is ours, and nothing else there."""
    subprocess.run(["mv", str(REPOSITORY), "/srv/kept"], check=True)
    REPOSITORY.symlink_to("/srv/kept")
    foreign = REPOSITORY / "foreign"
    foreign.write_text("somebody's")
    subprocess.run(["chown", "-hR", "root:root", "/srv/kept"], check=True)
    REPOSITORY.chmod(0o700)
    lines = ask(backed_up)["problems"]
    assert all(line.endswith("state.apply slm_database.backup mends it") for line in lines)
    assert any(f"the server cannot use {BACKUPS};" in line for line in lines)
    announced = backed_up.state("slmdb_backup.configured", test=True)
    made = backed_up.state("slmdb_backup.configured")
    assert (made.result, made.changes) == (True, announced.changes)
    assert backed_up.state("slmdb_backup.configured").changes == {}
    assert said(backed_up) == ""
    backed_up.call("slmdb_backup.create")
    assert backed_up.call("slmdb_backup.verify")["right"] is True
    assert foreign.owner() == "root"


@pytest.mark.once
def test_an_old_backup_is_a_problem(backed_up):
    """Beyond the limit of pillar; the default is a day and a little."""
    for path in BACKUPS.glob("2*/backup.manifest"):
        earlier(path, 25)
    assert said(backed_up) == ""
    for path in BACKUPS.glob("2*/backup.manifest"):
        earlier(path, 2)
    assert "is 27 h old, limit 26h" in said(backed_up)
    backed_up.tell({"slm_database": {"backup": {"limits": {"backup": "2d"}}}})
    assert said(backed_up) == ""


@pytest.mark.once
def test_a_backup_that_goes_behind_its_back_is_not_told_any_more(backed_up):
    """The newest one, then all, then the repository itself."""
    first = ask(backed_up)["backup"]["repositories"][0]["last"]["label"]
    second = backed_up.call("slmdb_backup.create")["label"]
    assert ask(backed_up)["backup"]["repositories"][0]["last"]["label"] == second
    shutil.rmtree(BACKUPS / second)
    assert ask(backed_up)["backup"]["repositories"][0]["last"]["label"] == first
    shutil.rmtree(BACKUPS / first)
    assert "no backup yet" in said(backed_up, "warnings")
    with buried(REPOSITORY):
        assert "repository 1 (/var/lib/pgbackrest) is not there" in said(backed_up)
    assert said(backed_up) == ""


@pytest.mark.once
def test_a_backup_that_failed_is_said_with_its_reason(backed_up):
    """Until one is made."""
    line = backed_up.call("slmdb_pgbackrest.line", "backup")
    command = backed_up.call("slmdb_program.command", *line)
    with buried(REPOSITORY):
        assert subprocess.run(command, check=False, capture_output=True).returncode
    assert "the backup of 20" in said(backed_up, "warnings")
    assert "failed: unable to" in said(backed_up, "warnings")
    backed_up.call("slmdb_backup.create")
    assert "failed" not in said(backed_up, "warnings")


@pytest.mark.once
def test_a_backup_that_was_killed_is_said(backed_up):
    """Not while it works, though the log has only its beginning; until one is made."""
    log = Path("/var/log/pgbackrest/autobot-slm-backup.log")
    before = log.read_text()
    command = backed_up.call("slmdb_program.command", *backed_up.call(*BACKUP))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        until(lambda: "backup command begin" in log.read_text().removeprefix(before))
        written = log.read_text().removeprefix(before)
        process = int(re.search(r"--exec-id=(\d+)-", written)[1])
        os.kill(process, signal.SIGSTOP)
        assert "failed" not in said(backed_up, "warnings")
        os.kill(process, signal.SIGKILL)
        child.wait(30)
    assert "failed: it was ended" in said(backed_up, "warnings")
    backed_up.call("slmdb_backup.create")
    assert "failed" not in said(backed_up, "warnings")


@pytest.mark.once
def test_a_failing_archiver_is_said_with_the_engine_s_reason(backed_up):
    """At once as a warning, beyond the limit as a problem; an idle server waits for nothing."""
    assert ask(backed_up)["backup"]["wal"]["waiting_seconds"] is None
    with buried(REPOSITORY / "archive"):
        write_wal(backed_up)
        until(lambda: "cannot be archived" in said(backed_up, "warnings"))
        assert "archive.info" in said(backed_up, "warnings")
        assert said(backed_up) == ""
        for name in ready():
            earlier(STATUS / name, 2)
        assert "cannot be archived since" in said(backed_up)
    write_wal(backed_up)
    until(lambda: not ready())
    assert "archived" not in said(backed_up) + said(backed_up, "warnings")


@pytest.mark.once
def test_a_program_that_is_gone_is_said_at_once(backed_up):
    """Though the server counts no failure; WAL that waits too long has the shell's reason."""
    Path("/run/nothing").touch(mode=0o644)
    subprocess.run(["mount", "--bind", "/run/nothing", "/usr/bin/pgbackrest"], check=True)
    try:
        assert said(backed_up) == (
            "pgBackRest is not installed (/usr/bin/pgbackrest), so nothing is backed up or "
            "archived; state.apply slm_database.backup brings it"
        )
        write_wal(backed_up)
        until(lambda: "sh: " in ARCHIVING.read_text())
        assert ask(backed_up)["backup"]["wal"]["failing"] is None
        for name in ready():
            earlier(STATUS / name, 3)
        assert "to be archived, limit 1h: sh: " in said(backed_up)
        assert "pgbackrest: " in said(backed_up)
        SINCE.unlink()
        assert "pgBackRest" not in said(backed_up)
    finally:
        subprocess.run(["umount", "--lazy", "/usr/bin/pgbackrest"], check=True)
    long_ago(0)
    until(lambda: not ready())
    assert said(backed_up) == ""


@pytest.mark.once
def test_a_dead_repository_does_not_fill_the_disk(host, minions):
    """WAL stops at the limit, the server goes on, health names the gap until a full backup."""
    minions(QUEUE)
    assert host.state("slmdb_backup.configured").result is True
    host.call("slmdb_backup.create")
    with buried(REPOSITORY):
        for _ in range(6):
            write_wal(host)
            time.sleep(0.2)
        # What waits is within the limit: two segments of 16 MB.
        until(lambda: len(ready()) <= 2)
        until(lambda: "cannot be archived" in said(host, "warnings"))
    assert host.call("slmdb_server.available") is True
    assert "the archived WAL has a gap at 0000000100000000" in said(host)
    assert "slmdb_backup.create full" in said(host)
    host.call("slmdb_backup.create", "full")
    assert said(host) == ""


def test_a_repository_s_disk_that_fills_up_is_said(backed_up):
    """First as a warning, then as a problem; its backups are told as before."""
    subprocess.run(["cp", "-a", str(REPOSITORY), "/var/lib/kept"], check=True)
    options = "size=64m,mode=0750,uid=postgres,gid=postgres"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(REPOSITORY)]
    subprocess.run(mount, check=True)
    try:
        subprocess.run(["cp", "-a", "/var/lib/kept/.", str(REPOSITORY)], check=True)
        for left, kind in ((0.06, "warnings"), (0.01, "problems")):
            disk = os.statvfs(REPOSITORY)
            free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
            (REPOSITORY / kind).write_bytes(bytes(int(free - left * size)))
            assert "repository 1 (/var/lib/pgbackrest): its disk has" in said(backed_up, kind)
            assert "no backup yet" not in said(backed_up, "warnings")
    finally:
        subprocess.run(["umount", "--lazy", str(REPOSITORY)], check=True)
    assert "its disk" not in said(backed_up) + said(backed_up, "warnings")


@pytest.mark.once
def test_what_verify_found_stays_said_until_it_is_right(backed_up):
    """A flipped byte, and the byte put back."""
    victim = backups.largest_file()
    kept = backups.flip(victim)
    backed_up.call("slmdb_backup.verify")
    assert "verify of 20" in said(backed_up)
    victim.write_bytes(kept)
    assert backed_up.call("slmdb_backup.verify")["right"] is True
    assert said(backed_up) == ""


def test_switched_off_is_one_warning(host, minions):
    """And the limits begin anew when it is switched on again."""
    minions({"slm_database": {"backup": {"enabled": False}}})
    assert ask(host)["backup"] == {"enabled": False}
    assert said(host, "warnings").count("backup") == 2  # the line and its key
    result = host.state("slmdb_backup.configured")
    assert (result.result, list(result.changes)) == (True, [str(SINCE)])
    assert host.state("slmdb_backup.configured").changes == {}


@pytest.mark.once
def test_a_host_that_was_installed_without_it_is_parked_then_backed_up(minions):
    """archive_mode waits; the maintenance restarts first and does not insist on a backup."""
    worlds.fresh()
    off = {"backup": {"enabled": False}}
    minion = minions({"slm_database": off})
    worlds.forget_updates()
    assert all(one["result"] for one in minion.call("state.apply", "slm_database").raw.values())
    started = minion.call("slmdb_instance.facts")["started"]
    minion.tell(None)
    states = minion.call("state.apply", "slm_database").raw.values()
    assert [one["comment"] for one in states if one["result"] is False] == []
    assert minion.call("slmdb_instance.facts")["started"] == started
    answer = ask(minion)
    assert answer["problems"] == []
    assert "archive_mode off → on waits for a restart" in " | ".join(answer["warnings"])
    assert "does not archive its WAL yet" in " | ".join(answer["warnings"])
    with pytest.raises(CommandExecutionError, match="archive_mode waits for a restart"):
        minion.call("slmdb_backup.create")
    minion.tell({"slm_database": {"maintenance": {"approve": True}}})
    done = minion.state("slmdb_maintenance.done")
    assert done.result is True, done.comment
    assert minion.call("slmdb_backup.create")["type"] == "full"
    minion.call("slmdb_server.forget")


@pytest.mark.once
def test_a_repository_whose_mount_hangs_holds_nobody_up(backed_up):
    """Health, a run and every command say it in one line; the server goes on."""
    begun = time.monotonic()
    with hanging(REPOSITORY):
        assert "is not there" in said(backed_up)
        for test in (False, True):
            chunks = backed_up.call("state.apply", "slm_database", test=test).raw.values()
            comments = [one["comment"] for one in chunks if one["result"] is False]
            (line,) = [one for one in comments if "requisite" not in one]
            assert line.startswith(f"slm_database:backup:path: {REPOSITORY} does not answer within")
        for command in ("create", "list", "info", "verify", "restore", "drill"):
            try:
                found = backed_up.call(f"slmdb_backup.{command}")
                words = str(found["problems"])
            except CommandExecutionError as err:
                words = str(err)
            assert "does not answer within" in words, command
        assert backed_up.call("slmdb_server.available") is True
    print(f"it took {time.monotonic() - begun:.0f} s")
    assert backed_up.call("slmdb_backup.verify")["right"] is True


@pytest.mark.once
@pytest.mark.parametrize("lost", ["data", "configuration", "both"])
def test_a_lost_instance_is_not_answered_with_an_empty_one(host, lost):
    """A mount may be missing: the application would take the new one for its own."""
    host.call("slmdb_server.forget")
    host.call("slmdb_service.stop")
    data, configuration = Path("/var/lib/postgresql/15"), Path("/etc/postgresql/15")
    for what, path in (("configuration", configuration), ("data", data)):
        if lost in (what, "both"):
            shutil.rmtree(path)
            path.mkdir(mode=0o755)
    words = {
        "data": "holds no data; mount it if a mount is missing, or state.apply "
        "slm_database.recovery brings the data back from the repository",
        "configuration": f"holds data but {configuration}/main is missing",
        "both": f"{REPOSITORY} holds the backups of an instance that is not here; mount it if a "
        "mount is missing, or state.apply slm_database.recovery brings it back from there",
    }
    result = host.state("slmdb_instance.present")
    assert result.result is False and words[lost] in result.comment
    assert "pg_dropcluster" not in result.comment
    (line,) = [line for line in ask(host)["problems"] if words[lost] in line]
    assert line in result.comment
    assert not list(configuration.glob("main/*.conf")) or lost == "data"


@pytest.mark.once
@pytest.mark.parametrize("lost", ["data", "both"])
def test_a_lost_instance_comes_back_from_the_repository_of_the_same_host(backed_up, lost):
    """By the command that health names, with nothing more in pillar."""
    backed_up.call("slmdb_server.execute", "CREATE TABLE kept (n int)", database="autobot_slm")
    backed_up.call("slmdb_backup.settle")
    backed_up.call("slmdb_server.forget")
    backed_up.call("slmdb_service.stop")
    shutil.rmtree("/var/lib/postgresql/15/main")
    if lost == "both":
        shutil.rmtree("/etc/postgresql/15/main")
    assert "state.apply slm_database.recovery" in said(backed_up)
    states = backed_up.call("state.apply", "slm_database.recovery").raw.values()
    assert [one["comment"] for one in states if one["result"] is False] == []
    assert said(backed_up) == ""
    assert backed_up.call("slmdb_health.missing_tables", ["kept"], "autobot_slm") == []
