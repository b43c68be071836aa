"""The drill: what is sound is proven, what is not is found and named, and nothing is left."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.support import backups
from tests.support.wait import until

PILLAR = {"slm_database": {"backup": {"enabled": True, "drill": {"keep_free": "0%"}}}}
RECORD = Path("/var/lib/autobot-slm-database/drill.json")
LOCK = Path("/var/lib/autobot-slm-database/drill.lock")
DIRECTORY = Path("/var/lib/postgresql/15/.autobot-slm-drill")


TABLES = (
    "CREATE TABLE log (id serial PRIMARY KEY, entry text)",
    "INSERT INTO log (entry) SELECT repeat('x', n) FROM generate_series(1, 5000) n",
    "CREATE TABLE quiet AS SELECT n FROM generate_series(1, 1000) n",
)


@pytest.fixture(scope="module", autouse=True)
def _backed_up(minions):
    """A host with some data and a backup, kept for the tests of this module."""
    states = ("slmdb_runner.present", "slmdb_record.present")
    backups.make(minions, PILLAR, "drilled", TABLES, *states)


@pytest.fixture
def host(minions):
    """That host, running; whatever becomes of a drill, nothing of it is left."""
    with backups.woken(minions, PILLAR, "drilled") as minion:
        yield minion
    assert not DIRECTORY.exists() and not Path("/run/autobot-slm-drill").exists()
    assert minion.call("slmdb_backup_scratch.processes", str(DIRECTORY)) == []
    assert sorted(os.listdir("/var/lib/postgresql/15")) == ["main"]


def execute(minion, statement):
    minion.call("slmdb_server.execute", statement)


def test_a_sound_backup_is_proven(host):
    """Everything was read and compared, and the source has nothing new in it."""
    schemas = "SELECT nspname FROM pg_namespace ORDER BY 1"
    before = host.call("slmdb_server.query", schemas)
    answer = host.call("slmdb_backup.drill")
    assert answer["problems"] == [] and answer["proven"] is True
    assert answer["label"] == host.call("slmdb_backup.list")[-1]["label"]
    assert answer["repository"] == 1 and answer["network"] is False
    assert answer["rows"] > 6000 and answer["equal"] > 2 and answer["databases"] >= 2
    assert 0 < answer["rto_seconds"] <= answer["seconds"] and 0 <= answer["rpo_seconds"] < 120
    assert host.call("slmdb_server.query", schemas) == before
    assert oct(RECORD.stat().st_mode)[-4:] == "0640"
    last = host.call("slmdb_backup_drill.last")
    assert last["last"] == last["proven"] == json.loads(json.dumps(answer))


@pytest.mark.once
@pytest.mark.once
def test_what_a_database_sets_for_its_sessions_ends_no_reading(host):
    """It is restored with the data, and is meant for the application."""
    for setting in ("statement_timeout = 1", "default_transaction_read_only = on"):
        for name in ("postgres", "template1"):
            execute(host, f"ALTER DATABASE {name} SET {setting}")
    host.call("slmdb_server.forget")
    answer = host.call("slmdb_backup.drill")
    assert answer["problems"] == [] and answer["proven"] is True


def test_a_busy_source_raises_no_alarm(host):
    """Rows come, change and go all the time, by short and long transactions."""
    over = threading.Event()

    def work(statements):
        connection = host.call("slmdb_server.connect")
        with connection.cursor() as cursor:
            while not over.is_set():
                for statement in statements:
                    cursor.execute(statement)
                connection.commit()
        connection.close()

    insert = "INSERT INTO log (entry) VALUES ('more')"
    change = "UPDATE log SET entry = entry || 'y' WHERE id % 50 = 0"
    delete = "DELETE FROM log WHERE id IN (SELECT id FROM log ORDER BY random() LIMIT 3)"
    ddl = "CREATE TABLE passing (i int); DROP TABLE passing; TRUNCATE quiet"
    pause = "SELECT pg_sleep(0.01)"  # so that replaying it is the quicker
    jobs = (
        [insert, pause],
        [change, pause],
        [delete, "SELECT pg_sleep(0.3)"],
        [ddl, "SELECT pg_sleep(0.2)"],
    )
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        answer = host.call("slmdb_backup.drill")
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert answer["problems"] == []


@pytest.mark.once
def test_a_flipped_byte_is_found(host):
    """pgBackRest compares each file with its checksum; the last proof is remembered."""
    host.call("slmdb_backup.drill")
    proven = host.call("slmdb_backup_drill.last")["proven"]
    backups.flip(backups.largest_file())
    answer = host.call("slmdb_backup.drill")
    assert answer["proven"] is False
    assert len(answer["problems"]) == 1 and "pgbackrest restore" in answer["problems"][0]
    last = host.call("slmdb_backup_drill.last")
    assert last["proven"] == proven and last["last"]["proven"] is False


@pytest.mark.once
def test_a_missing_file_is_named(host):
    """And nothing else is blamed for it."""
    victim = backups.largest_file()
    victim.unlink()
    (problem,) = host.call("slmdb_backup.drill")["problems"]
    assert "pgbackrest restore: " in problem and victim.name in problem
    assert "is not the key" not in problem


@pytest.mark.once
def test_a_missing_segment_is_found(host):
    """The marker is not there, and what was written in between is not either."""
    execute(host, "INSERT INTO quiet VALUES (-1)")
    lost = host.call("slmdb_backup.settle")["wal"]
    execute(host, "INSERT INTO quiet VALUES (-2)")
    host.call("slmdb_backup.settle")
    (segment,) = (path for path in backups.REPOSITORY.rglob(f"{lost}-*") if path.is_file())
    segment.unlink()
    answer = host.call("slmdb_backup.drill")
    assert answer["proven"] is False
    assert any("the marker, transaction" in line for line in answer["problems"])
    assert any("public.quiet has 1000 rows in the copy, 1002" in one for one in answer["problems"])


@pytest.mark.once
def test_a_lost_table_a_lost_row_and_a_row_too_many_are_found(host):
    """In a copy that differs from its source by just that."""
    before = host.call("slmdb_backup_compare.source")
    marker = host.call("slmdb_backup.settle")["transaction"]
    copy = host.call("slmdb_backup.restore")
    where = {"port": copy["port"]}
    compare = "slmdb_backup_compare.problems"
    try:
        assert host.call(compare, before, marker, **where)[0] == []
        connection = host.call("slmdb_server.connect", **where)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM quiet WHERE n = 7")
            cursor.execute("DROP TABLE log")
        connection.close()
        lines, _ = host.call(compare, before, marker, **where)
        assert "table postgres.public.quiet has 999 rows in the copy, 1000 on the source" in lines
        assert "table postgres.public.log is not in the copy" in lines
        # What the server itself notes about a table is missing with it, and said after it.
        assert all(".pg_catalog." in line for line in lines[2:])
        lines, _ = host.call(compare, before, str(int(marker) + 10**6), **where)
        assert any("is not in the copy" in line and "transaction" in line for line in lines)
    finally:
        subprocess.run(copy["remove"].split(), check=True)


def test_what_works_at_that_path_in_a_container_is_left_alone(host, tmp_path):
    """The same program in the same working directory, of which there are two."""
    program = shutil.copy("/usr/bin/sleep", tmp_path / "postgres")
    work = f"mkdir -p {DIRECTORY}/data && cd {DIRECTORY}/data && exec {program} 600"
    away = f"mount -t tmpfs container {DIRECTORY.parent} && {work}"
    started = [
        subprocess.Popen(["unshare", "--mount", "sh", "-c", away]),
        subprocess.Popen(["sh", "-c", work]),
    ]
    try:
        for one in started:
            until(lambda comm=Path(f"/proc/{one.pid}/comm"): comm.read_text() == "postgres\n")
        found = host.call("slmdb_backup_scratch.processes", str(DIRECTORY))
        assert found == [started[1].pid]
        host.call("slmdb_backup_scratch.end", str(DIRECTORY))
        started[1].wait(60)
        assert started[0].poll() is None
    finally:
        for one in started:
            one.kill()
            one.wait()
        shutil.rmtree(DIRECTORY)


@pytest.mark.once
def test_a_damaged_page_is_found(host):
    """The copy's checksums, its tables and its indexes are read."""
    before = host.call("slmdb_backup_compare.source")
    marker = host.call("slmdb_backup.settle")["transaction"]
    copy = host.call("slmdb_backup.restore")
    where = {"host": "/run/postgresql", "port": copy["port"]}
    try:
        execute_in_copy(host, where, "CHECKPOINT")
        paths = {}
        for name in ("log", "log_pkey"):
            found = execute_in_copy(host, where, f"SELECT pg_relation_filepath('{name}')")
            paths[name] = Path(copy["data_directory"]) / found
        version, name = copy["instance"].split("/")
        subprocess.run(["pg_ctlcluster", version, name, "stop"], check=True)
        for path in paths.values():
            with path.open("r+b") as stream:
                stream.seek(8192 + 4000)
                stream.write(b"damage")
        subprocess.run(["pg_ctlcluster", version, name, "start"], check=True)
        lines, _ = host.call("slmdb_backup_compare.problems", before, marker, **where)
        assert any("public.log cannot be read: invalid page" in line for line in lines), lines
        assert any("checksum" in line for line in lines)
        checked = host.call("slmdb_backup_compare.check", **where)
        assert any("log_pkey" in line for line in checked), checked
    finally:
        subprocess.run(copy["remove"].split(), check=True)


@pytest.mark.once
def test_a_check_that_a_signal_kills_is_called_that(host):
    """Nobody looks for a broken index where memory was short."""
    where = {"host": "/run/postgresql", "port": 5432}
    connection = host.call("slmdb_server.connect")
    connection.cursor().execute("LOCK TABLE log")
    script = f"until pid=$(pgrep -P {os.getpid()} -x pg_amcheck); do sleep 0.1; done; kill -9 $pid"
    try:
        with subprocess.Popen(["timeout", "60", "sh", "-c", script]):
            checked = host.call("slmdb_backup_compare.check", **where)
    finally:
        connection.close()
    killed = "pg_amcheck was killed by signal 9 (out of memory? journalctl -k tells)"
    assert checked == [killed]


def execute_in_copy(minion, where, statement):
    connection = minion.call("slmdb_server.connect", **where)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(statement)
        row = cursor.fetchone() if cursor.description else None
    connection.close()
    return row and row[0]


def begun(minion, there):
    """A drill as a timer starts it, as soon as something is there."""
    job = subprocess.Popen(
        minion.call("slmdb_runner.command", "slmdb_backup.drill"),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not there():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    return job


@pytest.mark.once
@pytest.mark.parametrize("moment", ["data", "data/postmaster.pid"])
def test_a_killed_drill_is_cleaned_up_by_the_next(host, moment):
    """kill -9 while files are restored, and while the copy runs; the server is never touched."""
    pid = host.call("slmdb_instance.facts")["pid"]
    job = begun(host, (DIRECTORY / moment).exists)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert DIRECTORY.exists()
    answer = host.call("slmdb_backup.drill")
    assert answer["problems"] == []
    assert host.call("slmdb_instance.facts")["pid"] == pid


def test_a_drill_that_fails_in_a_timer_says_why(host):
    """The status is 1 and the line that says what is in what it prints."""
    for path in (backups.REPOSITORY / "backup").rglob("backup.manifest*"):
        path.write_bytes(b"nothing")
    job = begun(host, lambda: True)
    said = job.communicate()[0]
    assert job.returncode == 1 and "pgbackrest restore" in said and len(said) <= 4100


@pytest.mark.once
def test_a_disk_that_would_be_filled_is_refused_and_watched(host, minions):
    """Before it begins, and while it works."""
    disk = Path("/srv/small")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)], check=True)
    try:
        for keep, words in (("390MB", "MiB free, the drill needs"), ("0%", None)):
            drill = {"directory": str(disk), "keep_free": keep}
            minions({"slm_database": {"backup": {"enabled": True, "drill": drill}}})
            answer = host.call("slmdb_backup.drill")
            if words:
                assert words in answer["problems"][0] and answer["proven"] is False
            else:
                assert answer["problems"] == []
            assert list(disk.iterdir()) == []
        filler = threading.Thread(target=fill, args=(disk,))
        drill = {"directory": str(disk), "keep_free": "100MB"}
        minions({"slm_database": {"backup": {"enabled": True, "drill": drill}}})
        filler.start()
        answer = host.call("slmdb_backup.drill")
        filler.join()
        assert "must stay free" in answer["problems"][0], answer
        assert [path.name for path in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk):
    """Take the space that was there when the drill began."""
    deadline = time.monotonic() + 60
    while not (disk / DIRECTORY.name / "data").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    seen = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(0, seen.f_bavail * seen.f_frsize - 60 * 1024**2)))


@pytest.mark.once
def test_one_drill_at_a_time(host):
    """The second is told so, and leaves the first one's instance alone."""
    DIRECTORY.mkdir()
    try:
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(CommandExecutionError, match="another drill runs"):
                host.call("slmdb_backup.drill")
            assert DIRECTORY.exists() and not RECORD.exists()
    finally:
        DIRECTORY.rmdir()


def test_what_cannot_be_is_refused(host):
    """In one line, and what is not ours is not touched."""
    with pytest.raises(SaltInvocationError, match="there is no repository 7; allowed: 1"):
        host.call("slmdb_backup.drill", 7)
    elsewhere = Path("/srv/elsewhere")
    elsewhere.mkdir()
    (elsewhere / "file").write_text("dear")
    DIRECTORY.symlink_to(elsewhere)
    try:
        with pytest.raises(CommandExecutionError, match="is not what a drill made"):
            host.call("slmdb_backup.drill")
        assert (elsewhere / "file").read_text() == "dear"
    finally:
        DIRECTORY.unlink()


@pytest.mark.once
def test_a_repository_that_fails_keeps_no_other_from_its_backup(host, minions):
    """The scheduled line goes on after a failure, and ends with it."""
    second = {"type": "path", "path": "/srv/second"}
    minions({"slm_database": {"backup": {"enabled": True, "second": second}}})
    assert host.state("slmdb_backup.scheduled").result is True
    lines = Path("/etc/cron.d/autobot-slm-backup").read_text().splitlines()
    (full,) = (line.split(" postgres ", 1)[1] for line in lines if "--type=full" in line)
    assert "--repo=1" in full and "--repo=2" in full
    minions(PILLAR)
    before = len(host.call("slmdb_backup.list"))
    # Only the first is configured here; it comes after one that cannot be reached.
    broken = full.replace("--repo=1", "--repo=9").replace("--repo=2", "--repo=1")
    words = ["runuser", "-u", "postgres", "--", "sh", "-c", broken]
    assert subprocess.run(words, capture_output=True, check=False, cwd="/").returncode == 1
    rows = host.call("slmdb_backup.list")
    assert len(rows) == before + 1 and rows[-1]["type"] == "full"
