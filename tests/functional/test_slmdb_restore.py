"""Restores: exactly what was there, beside the instance or in its place, or a refusal."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from concurrent import futures
from pathlib import Path

import psycopg2
import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.functional.test_slm_database import begin_applied
from tests.support import backups

TABLE = ("CREATE TABLE log (entry text)", "INSERT INTO log VALUES ('before the backup')")


@pytest.fixture(scope="module", autouse=True)
def _backed_up(minions):
    """A host with a table of one row and a backup, kept for the tests of this module."""
    backups.make(minions, backups.PILLAR, "backed up", TABLE)


@pytest.fixture
def host(minions):
    """That host, running."""
    with backups.woken(minions, backups.PILLAR, "backed up") as minion:
        yield minion


def movable(minion):
    """An overlay cannot rename a directory that lies in a layer below."""
    minion.call("slmdb_server.forget")
    minion.call("slmdb_service.stop")
    data = "/var/lib/postgresql/15/main"
    subprocess.run(["cp", "-a", data, f"{data}.copy"], check=True)
    subprocess.run(["rm", "-r", data], check=True)
    subprocess.run(["mv", f"{data}.copy", data], check=True)
    minion.call("slmdb_service.start")


def write(minion, entry):
    minion.call("slmdb_server.execute", "INSERT INTO log VALUES (%s)", [entry])


def entries(minion, port=5432):
    connection = minion.call("slmdb_server.connect", port=port)
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT entry FROM log ORDER BY ctid")
        rows = [row[0] for row in cursor.fetchall()]
    connection.close()
    return rows


def moment(minion):
    return minion.call("slmdb_server.query", "SELECT clock_timestamp()::text AS at")[0]["at"]


def test_the_latest_is_restored_beside_and_the_instance_goes_on(host):
    """Every commit is there, the copy archives nothing, and goes by the command it names."""
    write(host, "after the backup")
    answer = host.call("slmdb_backup.restore")
    assert answer["instance"] == "15/restored" and answer["port"] != 5432
    assert entries(host, answer["port"]) == ["before the backup", "after the backup"]
    write(host, "meanwhile")
    assert entries(host)[-1] == "meanwhile"
    copy = host.call("slmdb_server.connect", port=answer["port"])
    with copy.cursor() as cursor:
        cursor.execute("SHOW archive_mode")
        assert cursor.fetchone() == ("off",)
    copy.close()
    with pytest.raises(SaltInvocationError, match="15/restored exists"):
        host.call("slmdb_backup.restore")
    subprocess.run(answer["remove"].split(), check=True)
    assert not os.path.exists(answer["data_directory"])


@pytest.mark.once
def test_a_moment_between_two_transactions_brings_exactly_the_first(host):
    """Also when it is the moment of a dropped table."""
    write(host, "first")
    between = moment(host)
    write(host, "second")
    host.call("slmdb_server.execute", "DROP TABLE log")
    answer = host.call("slmdb_backup.restore", time=between)
    assert entries(host, answer["port"]) == ["before the backup", "first"]


@pytest.mark.once
def test_a_restore_point_and_a_label(host):
    """A name, and the moment at which a backup was complete."""
    write(host, "first")
    host.call("slmdb_server.query", "SELECT pg_create_restore_point('before the migration')")
    write(host, "second")
    named = host.call("slmdb_backup.restore", restore_point="before the migration")
    assert entries(host, named["port"]) == ["before the backup", "first"]
    label = host.call("slmdb_backup.list")[0]["label"]
    whole = host.call("slmdb_backup.restore", label=label, instance="whole")
    assert entries(host, whole["port"]) == ["before the backup"]


@pytest.mark.once
def test_in_place_keeps_the_old_data_aside(host):
    """The server has the old state, the newer one is in a directory of its own, backups go on."""
    movable(host)
    between = moment(host)
    write(host, "a mistake")
    answer = host.call("slmdb_backup.restore", time=between, in_place="15/main")
    assert entries(host) == ["before the backup"]
    assert (Path(answer["kept"]) / "PG_VERSION").exists()
    write(host, "later")
    host.call("slmdb_backup.create")
    again = host.call("slmdb_backup.restore")
    assert entries(host, again["port"]) == ["before the backup", "later"]


def test_what_cannot_be_reached_is_refused_with_the_range(host):
    """Before anything is stopped or made."""
    pid = host.call("slmdb_instance.facts")["pid"]
    for wrong, words in (
        ({"time": "2020-01-01"}, "cannot be reached; from 20.* to 20.* can"),
        ({"time": "2999-01-01"}, "cannot be reached; from 20.* to 20.* can"),
        ({"time": "yesterday"}, "is no moment"),
        ({"time": "Thu Nov 26 08:04:42 CET 2026"}, "is no moment"),
        ({"time": "Wed Nov 26 08:04:42 UTC 2026"}, "is no moment"),
        ({"time": "2026-11-26 08:04:42 CET"}, "is no moment"),
        ({"time": "2026-11-26 08:04:42+02:00 UTC"}, "is no moment"),
        ({"time": "11/12/2026 08:04:42"}, "is no moment"),
        ({"label": "20200101-000000F"}, "there is no backup"),
        ({"time": "2026-01-01", "restore_point": "x"}, "choose one"),
        ({"in_place": "main"}, "type 15/main"),
        ({"instance": "main"}, "cannot be used"),
        ({"instance": "../x"}, "cannot be used"),
        ({"port": 5432}, "is free; name another"),
    ):
        with pytest.raises(SaltInvocationError, match=words):
            host.call("slmdb_backup.restore", **wrong)
    assert host.call("slmdb_instance.facts")["pid"] == pid
    assert not Path("/var/lib/postgresql/15/restored").exists()


def test_a_moment_as_date_prints_it(host):
    """Or with UTC behind it; the same as in ISO 8601."""
    (row,) = host.call("slmdb_backup.list")
    at = host.call("slmdb_backup.complete", row)
    expected = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(at))
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
    date = subprocess.run(["date", "-d", f"@{at}"], env=environment, capture_output=True, text=True)
    for text in (
        date.stdout,
        time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)),
        time.strftime("%a %d %b %Y %I:%M:%S %p UTC", time.gmtime(at)),
        time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)),
    ):
        assert host.call("slmdb_restore_plan.make", time=text)["target"] == expected, text


@pytest.mark.once
def test_a_restore_point_that_does_not_exist_leaves_nothing_behind(host):
    """In place the old data is back; beside, nothing was made."""
    with pytest.raises(CommandExecutionError, match="ends before it"):
        host.call("slmdb_backup.restore", restore_point="never set")
    assert not Path("/etc/postgresql/15/restored").exists()
    movable(host)
    with pytest.raises(CommandExecutionError, match="ends before it"):
        host.call("slmdb_backup.restore", restore_point="never set", in_place="15/main")
    assert entries(host) == ["before the backup"]
    assert sorted(os.listdir("/var/lib/postgresql/15")) == ["main"]


@pytest.mark.once
def test_a_gap_in_the_archived_wal_is_told(host):
    """Beside, what can be had is shown and the gap named; in place, what runs stays."""
    write(host, "archived")
    host.call("slmdb_backup.settle")
    write(host, "lost from the repository")
    segment = host.call("slmdb_backup.settle")["wal"]
    write(host, "after the gap")
    (lost,) = Path("/var/lib/pgbackrest/archive").rglob(f"{segment}-*")
    lost.unlink()
    answer = host.call("slmdb_backup.restore")
    assert entries(host, answer["port"]) == ["before the backup", "archived"]
    assert f"has a gap at {segment}" in answer["gap"]
    pid, before = host.call("slmdb_instance.facts")["pid"], entries(host)
    with pytest.raises(CommandExecutionError, match=f"a gap at {segment}.*a time before it"):
        host.call("slmdb_backup.restore", in_place="15/main")
    assert host.call("slmdb_instance.facts")["pid"] == pid
    assert entries(host) == before and before[-1] == "after the gap"
    host.call("slmdb_backup.create", "full")
    assert host.call("slmdb_backup.restore", instance="whole")["gap"] is None


@pytest.mark.once
def test_a_data_directory_that_is_a_mount_is_refused_at_once(host):
    """Its server is not stopped to find that out, and nothing is restored."""
    data = "/var/lib/postgresql/15/main"
    pid = host.call("slmdb_instance.facts")["pid"]
    subprocess.run(["mount", "--bind", data, data], check=True)
    try:
        with pytest.raises(CommandExecutionError, match=f"{data} is a mount of its own.*beside it"):
            host.call("slmdb_backup.restore", in_place="15/main")
        assert host.call("slmdb_instance.facts")["pid"] == pid
        assert os.listdir("/var/lib/postgresql/15") == ["main"]
    finally:
        subprocess.run(["umount", "--lazy", data], check=True)


@pytest.mark.once
def test_data_that_cannot_be_moved_aside_stays(host):
    """For whatever reason the file system has: the server is back with what it had."""
    with pytest.raises(CommandExecutionError, match="cross-device"):
        host.call("slmdb_backup.restore", in_place="15/main")
    assert entries(host) == ["before the backup"]
    assert sorted(os.listdir("/var/lib/postgresql/15")) == ["main"]


@pytest.mark.once
def test_a_corrupt_repository_stops_nothing(host):
    """The files are restored before the server is."""
    backups.flip(backups.largest_file())
    pid = host.call("slmdb_instance.facts")["pid"]
    with pytest.raises(CommandExecutionError, match="pgbackrest restore"):
        host.call("slmdb_backup.restore", in_place="15/main")
    assert host.call("slmdb_instance.facts")["pid"] == pid
    assert sorted(os.listdir("/var/lib/postgresql/15")) == ["main"]


@pytest.mark.once
def test_the_application_s_rules_hold_in_the_copy(host):
    """Who may not log in to the instance may not log in to its copy."""
    answer = host.call("slmdb_backup.restore")
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(host="127.0.0.1", port=answer["port"], user="postgres", dbname="postgres")


@pytest.mark.once
def test_what_was_before_and_after_a_restore_in_place(host):
    """Each moment is what the server was then; the newest backup from behind the branch is not."""
    movable(host)
    write(host, "right")
    between = moment(host)
    write(host, "wrong")
    host.call("slmdb_backup.create")
    write(host, "wrong again")
    behind = moment(host)
    host.call("slmdb_backup.settle")
    host.call("slmdb_backup.restore", time=between, in_place="15/main")
    first, newest = (row["label"] for row in host.call("slmdb_backup.list"))
    write(host, "afterwards")
    now = ["before the backup", "right", "afterwards"]
    wrong = ["before the backup", "right", "wrong"]
    for instance, target, expected, label in (
        ("latest", {}, now, first),
        ("now", {"time": moment(host)}, now, first),
        ("then", {"time": behind}, [*wrong, "wrong again"], newest),
        ("at", {"label": newest}, wrong, newest),
        ("earlier", {"time": between}, now[:2], first),
    ):
        answer = host.call("slmdb_backup.restore", instance=instance, **target)
        assert entries(host, answer["port"]) == expected, instance
        assert (answer["label"], answer["gap"]) == (label, None)
        subprocess.run(answer["remove"], shell=True, check=True)
    proven = host.call("slmdb_backup.drill")
    assert (proven["problems"], proven["label"]) == ([], first)
    host.call("slmdb_backup.restore", in_place="15/main")
    assert entries(host) == now
    made = host.call("slmdb_backup.create")
    assert host.call("slmdb_restore_plan.make")["label"] == made["label"]


@pytest.mark.once
def test_a_restore_point_of_any_name(host):
    """Quotes, backslashes; one that begins with its moment is found behind a later backup, too."""
    odd = 'it\'s \\ "before"'
    stamped = time.strftime("%Y%m%dT%H%M%SZ-before-", time.gmtime(time.time() + 1)) + "abc"
    time.sleep(1.1)
    for name in (odd, stamped):
        host.call("slmdb_server.query", "SELECT pg_create_restore_point(%s)", [name])
    write(host, "behind")
    answer = host.call("slmdb_backup.restore", restore_point=odd)
    assert entries(host, answer["port"]) == ["before the backup"]
    time.sleep(1.1)
    host.call("slmdb_backup.create")
    answer = host.call("slmdb_backup.restore", restore_point=stamped, instance="stamped")
    assert entries(host, answer["port"]) == ["before the backup"]
    with pytest.raises(CommandExecutionError, match="name an older backup by label"):
        host.call("slmdb_backup.restore", restore_point=odd, instance="odd")


@pytest.mark.once
def test_a_target_that_is_missed_in_place_stops_nothing(host):
    """It is replayed before: the server that runs is the same, and nothing is left."""
    write(host, "kept")
    pid = host.call("slmdb_instance.facts")["pid"]
    for target in ({"restore_point": "a typo"}, {"restore_point": "x' = y"}):
        with pytest.raises(CommandExecutionError, match="ends before it"):
            host.call("slmdb_backup.restore", in_place="15/main", **target)
    for empty in ("time", "label", "restore_point"):
        with pytest.raises(SaltInvocationError, match=empty):
            host.call("slmdb_backup.restore", in_place="15/main", **{empty: ""})
    assert host.call("slmdb_instance.facts")["pid"] == pid
    assert entries(host) == ["before the backup", "kept"]
    assert sorted(os.listdir("/var/lib/postgresql/15")) == ["main"]
    assert not list(Path("/run").glob("autobot-slm-replay-*"))


@pytest.mark.once
def test_a_restore_that_was_killed_in_the_middle_is_repeated(host):
    """Between the old data's leaving and the new one's coming: the next one begins with the old."""
    movable(host)
    write(host, "kept")
    host.call("slmdb_server.forget")
    host.call("slmdb_service.stop")
    os.rename("/var/lib/postgresql/15/main", "/var/lib/postgresql/15/main.before-1")
    (line,) = [line for line in host.call("slmdb.health", 15)["problems"] if "restore" in line]
    assert "the data is in /var/lib/postgresql/15/main.before-1: repeat the restore" in line
    with pytest.raises(CommandExecutionError, match=r"no data; mv /.*/main.before-1 /.*/main$"):
        host.call("slmdb_instance.differences")
    host.call("slmdb_backup.restore", in_place="15/main")
    assert entries(host) == ["before the backup", "kept"]
    assert not [line for line in host.call("slmdb.health", 15)["problems"] if "restore" in line]


@pytest.mark.once
def test_what_a_restore_beside_left_that_was_killed(host):
    """The refusal has the command that takes it away, whatever there is of it."""
    Path("/srv/fast").mkdir()
    shutil.chown("/srv/fast", "postgres", "postgres")
    host.call("slmdb_server.execute", "CREATE TABLESPACE fast LOCATION '/srv/fast'")
    host.call("slmdb_server.execute", "ALTER TABLE log SET TABLESPACE fast")
    host.call("slmdb_backup.create")
    place = Path("/var/lib/postgresql/15")
    chosen = host.call("slmdb_restore_plan.make")
    host.call("slmdb_restore.files", f"{place}/restored", chosen, False)
    with pytest.raises(SaltInvocationError, match="15/restored exists; name another, or: ") as err:
        host.call("slmdb_backup.restore")
    command = str(err.value).split("or: ")[1]
    assert "pg_dropcluster" not in command
    subprocess.run(command, shell=True, check=True)
    assert not list(place.glob("restored*"))
    answer = host.call("slmdb_backup.restore")
    with pytest.raises(SaltInvocationError, match="exists") as err:
        host.call("slmdb_backup.restore")
    assert str(err.value).endswith(f"or: {answer['remove']}")
    subprocess.run(answer["remove"], shell=True, check=True)
    assert not list(place.glob("restored*"))


@pytest.mark.once
def test_two_restores_at_once(host):
    """The second is refused; two that read the same WAL find no damage in it."""
    with open("/var/lib/autobot-slm-database/restore.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for how in ({}, {"in_place": "15/main"}):
            with pytest.raises(CommandExecutionError, match="another restore runs; wait until"):
                host.call("slmdb_backup.restore", **how)
    for entry in ("one", "two", "three", "four"):
        write(host, entry)
        host.call("slmdb_backup.settle")
    chosen = host.call("slmdb_restore_plan.make")
    with futures.ThreadPoolExecutor(3) as pool:
        found = [pool.submit(host.call, "slmdb_backup_gap.damaged", chosen) for _ in range(3)]
        assert [one.result() for one in found] == [None] * 3
    assert not list(Path("/var/lib/autobot-slm-database/pgbackrest").glob("segment*"))


@pytest.mark.once
def test_missing_wal_is_told_while_the_server_is_down(host):
    """Nobody can say how far it should reach, but between two segments there is none missing."""
    lost = None
    for entry in ("one", "two", "three"):
        write(host, entry)
        segment = host.call("slmdb_backup.settle")["wal"]
        lost = segment if entry == "two" else lost
    host.call("slmdb_server.forget")
    host.call("slmdb_service.stop")
    (path,) = Path("/var/lib/pgbackrest/archive").rglob(f"{lost}-*")
    path.unlink()
    with pytest.raises(CommandExecutionError, match=f"segment {lost} is missing"):
        host.call("slmdb_backup.restore", in_place="15/main")
    assert sorted(os.listdir("/var/lib/postgresql/15")) == ["main"]


@pytest.mark.once
def test_tablespaces_come_back_more_than_once(host):
    """Each restore has them in a place of its own."""
    Path("/srv/fast").mkdir()
    shutil.chown("/srv/fast", "postgres", "postgres")
    movable(host)
    host.call("slmdb_server.execute", "CREATE TABLESPACE fast LOCATION '/srv/fast'")
    host.call("slmdb_server.execute", "ALTER TABLE log SET TABLESPACE fast")
    host.call("slmdb_backup.create")
    beside = host.call("slmdb_backup.restore")
    assert entries(host, beside["port"]) == ["before the backup"]
    subprocess.run(beside["remove"], shell=True, check=True)
    before = ["/srv/fast"]
    for entry in ("once", "twice"):
        write(host, entry)
        answer = host.call("slmdb_backup.restore", in_place="15/main")
        assert answer["kept_tablespaces"] == before
        (link,) = Path("/var/lib/postgresql/15/main/pg_tblspc").iterdir()
        before = [str(link.resolve())]
        assert before[0].startswith("/var/lib/postgresql/15/main.tablespaces-")
        assert entries(host)[-1] == entry
        host.call("slmdb_backup.create")
    assert not list(Path("/var/lib/postgresql/15").glob("restor*"))
    killed = host.call("slmdb_restore_plan.make")
    new = "/var/lib/postgresql/15/main.restoring"
    host.call("slmdb_restore.files", new, killed, True, new.replace(".restoring", ""))
    assert host.call("slmdb_backup.restore", in_place="15/main")["kept_tablespaces"] == before
    assert entries(host)[-1] == "twice"
    assert len(list(Path("/var/lib/postgresql/15").glob("main.tablespaces-*"))) == 3


@pytest.mark.once
def test_a_setting_that_was_lowered_since_the_backup(host, minions):
    """Recovery would need what the server had then; in place all that was archived comes back."""
    movable(host)
    for connections in (137, 37):
        minions({"slm_database": {"settings": {"max_connections": connections}}})
        assert host.state("slmdb_config.applied").result is True
        host.call("slmdb_server.forget")
        host.call("slmdb_service.stop")
        host.call("slmdb_service.start")
        if connections == 137:
            host.call("slmdb_backup.create")
    write(host, "with fewer connections")
    answer = host.call("slmdb_backup.restore", in_place="15/main")
    assert entries(host) == ["before the backup", "with fewer connections"]
    assert host.call("slmdb_server.query", "SHOW max_connections")[0]["max_connections"] == "37"
    assert host.call("slmdb_backup.restore")["gap"] is None
    assert not Path(f"{answer['kept']}/recovery.signal").exists()


@pytest.mark.once
def test_a_password_that_was_changed_since_is_told(minions):
    """The server has the old one again; the answer says what puts it right."""
    begin_applied(minions)
    host = minions()
    host.call("slmdb_service.start")
    movable(host)
    host.call("slmdb_backup.create")
    before = moment(host)
    assert host.call("slmdb_secret.rotate")["rotated"] is True
    assert host.call("slmdb_secret.facts")["in_step"] is True
    host.call("slmdb_backup.settle")
    line = host.call("slmdb_backup.restore", time=before, in_place="15/main")["secret"]
    assert line.startswith("verifier of autobot_slm: another password than the secret file's")
    assert "state.apply slm_database.secret puts it right" in line and "\n" not in line
    assert host.state("slmdb_secret.present").result is True
    assert host.call("slmdb_secret.facts")["in_step"] is True
    assert host.call("slmdb_backup.restore", in_place="15/main")["secret"] is None
    host.call("slmdb_server.forget")


@pytest.mark.once
def test_where_root_owns_what_the_data_lies_in(host):
    """Reading the archived WAL needs no room beside the data."""
    movable(host)
    shutil.chown("/var/lib/postgresql/15", "root", "root")
    write(host, "here")
    host.call("slmdb_backup.restore", in_place="15/main")
    assert entries(host) == ["before the backup", "here"]
