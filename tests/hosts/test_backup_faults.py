"""What is killed, full, spoilt or wrong about the time, and what the backups are worth after it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import backups, writer
from tests.support import host_database as database

REPOSITORY = "/srv/repository"
DATA = "/var/lib/postgresql/15"
KEY = "/etc/pgbackrest/autobot-slm/key.conf"
QUEUE = 32  # MiB, as the pillar below has it
WAL = 64  # MiB, max_wal_size
PILLAR = {
    "health": {"timeout": 30},
    "restart": "now",
    "settings": {"max_wal_size": f"{WAL}MB", "min_wal_size": "32MB"},
    "backup": {
        "path": REPOSITORY,
        "queue_limit": f"{QUEUE}MB",
        "drill": {"keep_free": "0%"},
        "schedule": {"full": None, "differential": None},
    },
}
# Random, so that it is as large in the repository: a backup of it takes a while.
BALLAST = """
CREATE TABLE ballast AS SELECT string_agg(gen_random_uuid()::text, '') AS filler
  FROM generate_series(1, 400000) AS n GROUP BY n / 50"""
ARCHIVED = "SELECT last_archived_wal FROM pg_stat_archiver"
FILL = "SELECT pg_logical_emit_message(false, '', string_agg(filler, '')) FROM ballast"
SWITCH = "SELECT pg_walfile_name(pg_switch_wal())"
WAITS = "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'"
TMP = f"{REPOSITORY}/archive/*/*/*/*.pgbackrest.tmp"


@pytest.fixture(scope="module")
def host(boot, applied_layers):
    """A host with its data and its repository in small file systems, and an application on it."""
    made = boot(applied_layers("bookworm"))
    made.push_formula()
    made.write("/srv/pillar/top.sls", "base: {'*': [slm_database]}\n")
    made.write("/srv/pillar/slm_database.sls", json.dumps({"slm_database": PILLAR}))
    made.run(f"systemctl stop {database.UNIT} && cp -a {DATA} /srv/data && mkdir {REPOSITORY}")
    for directory in (DATA, REPOSITORY):
        options = "size=2g,uid=postgres,gid=postgres,mode=0750"
        made.run(f"mount -t tmpfs -o {options} small {directory}")
    made.run(f"cp -a /srv/data/. {DATA} && rm -r /srv/data")
    database.apply(made)
    database.sql(made, BALLAST)
    writer.start(made)
    database.call(made, "slmdb_backup.create", "full")
    yield made
    made.close()


@pytest.fixture
def beside():
    """Run something beside the test."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def caught(host, words, midway, patience=60):
    """Stop the first process with these words in the middle of what it does."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        for process in host.processes(words):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                if midway():
                    return process
                os.kill(process, signal.SIGCONT)
    raise AssertionError(f"no process {words!r} was in the middle of it")


def matching(host, pattern):
    """Return the files of the host that match."""
    return sorted(host.path("/").glob(pattern[1:]))


def begun(host):
    """Tell whether a backup is there that has files and is not complete."""
    found = matching(host, f"{REPOSITORY}/backup/*/2*/pg_data/base")
    return any(not (base.parents[1] / "backup.manifest").exists() for base in found)


def kill(*processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def right(host, before, kind="differential"):
    """The next backup works, the repository is right, and a restore lacks nothing."""
    made = database.call(host, "slmdb_backup.create", kind)
    assert made["damaged"] is False
    found = database.call(host, "slmdb_backup.verify")
    assert found["right"] is True, found["problems"]
    assert writer.restored(host, before) == set()


def test_kill_9_of_the_server(host):
    """In mid-write: what was acknowledged is in the server again, and in the next restore."""
    for _ in range(3):
        before = database.postmaster(host)
        writer.goes_on(host)
        host.run(f"kill -9 {before}")
        commits = writer.logged(host)
        assert database.came_back(host, before)
        assert writer.count("server killed, in it again", commits, writer.present(host)) == set()
    writer.goes_on(host)
    right(host, "server killed, restored")


@pytest.mark.parametrize("victim", ["main process", "worker", "server"])
def test_kill_9_during_a_backup(host, beside, victim):
    """The backup fails in one line; nothing of it stands in the way of the next one."""
    server = database.postmaster(host)
    backup = beside(database.refusal, host, "slmdb_backup.create", "full")
    worker = caught(host, " backup:local", lambda: begun(host))
    (main,) = host.processes("--type=full")
    if victim == "server":
        host.run(f"kill -9 {server}")
    else:
        kill(main if victim == "main process" else worker)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    line = backup.result()
    print(victim, "killed:", line)
    assert "is not the key" not in line
    assert host.processes(" backup:local") + host.processes("--type=full") == []
    assert database.call(host, "slmdb_backup.verify")["problems"] == []
    if victim == "server":
        assert database.came_back(host, server)
    writer.goes_on(host)
    right(host, f"{victim} killed during a backup")


def test_kill_9_of_the_archiver(host, beside):
    """In the middle of a segment: it is archived again, whole."""
    server = database.postmaster(host)
    switched = beside(database.sql, host, f"{FILL}; {SWITCH}")
    push = caught(host, "archive-push pg_wal/", lambda: matching(host, TMP))
    segment = switched.result().splitlines()[-1]
    assert (database.sql(host, ARCHIVED) or "") < segment
    kill(*host.processes("archiver"), push, *host.processes("archive-push"))
    commits = writer.logged(host)
    host.until("pg_isready -q")
    writer.goes_on(host)
    assert database.postmaster(host) == server
    assert writer.count("archiver killed, in it", commits, writer.present(host)) == set()
    right(host, "archiver killed, restored")
    assert database.sql(host, ARCHIVED) >= segment


def room(host, directory, mebibytes=None):
    """Leave a small file system so much free; None: as much as it had at first."""
    if mebibytes is None:
        host.run(f"mount -o remount,size=2g {directory}")
    else:
        database.shrink(host, directory, mebibytes * 1024)


def write_wal(host, mebibytes):
    """
    Make so much WAL, no faster than the archiver deals with it: the machine decides nothing.

    Returns the size in MiB that pg_wal has after the next checkpoint.
    """
    for _ in range(mebibytes // 16):
        database.sql(host, f"{FILL}; {SWITCH}")
        database.until(host, f"({WAITS}) <= {QUEUE // 16 + 2}")
    database.sql(host, "CHECKPOINT")
    return float(database.sql(host, "SELECT sum(size) / 1024 ^ 2 FROM pg_ls_waldir()"))


@contextlib.contextmanager
def unusable(host, how):
    """A repository that takes no more WAL: its disk is full, or it is away."""
    if how == "full":
        room(host, REPOSITORY, 4)
    else:
        host.run(f"mount -t tmpfs -o size=1m,mode=0755 nothing {REPOSITORY}")
    try:
        yield
    finally:
        if how == "full":
            room(host, REPOSITORY)
        else:
            host.run(f"umount {REPOSITORY}")


def queue_problems(host):
    """Return what health says of WAL that is not archived; the last drill is another matter."""
    problems = database.health(host)[1]["problems"]
    return [line for line in problems if "WAL" in line and "restore drill" not in line]


@pytest.mark.parametrize("how", ["full", "away"])
def test_a_repository_that_takes_no_wal(host, how):
    """The queue ends at its limit, the application goes on; a full backup makes it right again."""
    server = database.postmaster(host)
    with unusable(host, how):
        kept = write_wal(host, 8 * QUEUE)
        print(how, "repository: pg_wal has", kept, "MiB")
        assert kept < QUEUE + 2 * WAL
        writer.goes_on(host)
        assert (database.postmaster(host), database.ready(host)) == (server, database.READY)
        assert any("queue_limit was reached" in line for line in queue_problems(host))
        print(how, "repository:", database.refusal(host, "slmdb_backup.create", "full"))
    with database.restored(host) as copy:
        assert "the archived WAL has a gap at" in copy["gap"]
    right(host, f"repository {how}", "full")
    assert queue_problems(host) == []


@contextlib.contextmanager
def flipped(path):
    """Change one bit in the middle of a file of the repository, and back."""
    backups.flip(path)
    try:
        yield
    finally:
        backups.flip(path)


def largest(host):
    """Make a full backup; return its largest file, which a restore needs, and its label."""
    label = database.call(host, "slmdb_backup.create", "full")["label"]
    files = matching(host, f"{REPOSITORY}/backup/*/{label}/pg_data/base/*/*")
    return max(files, key=lambda path: path.stat().st_size), label


def newest(host):
    """Return the file of a segment that no backup needs, and whose commits only it has."""
    writer.goes_on(host)
    segment = database.call(host, "slmdb_backup.settle")["wal"]
    writer.goes_on(host)
    (path,) = matching(host, f"{REPOSITORY}/archive/*/*/*/{segment}-*")
    return path, segment


@pytest.mark.parametrize("victim", [largest, newest])
def test_a_flipped_byte(host, victim):
    """Found and named by verify, found by the drill; the server never notices."""
    server = database.postmaster(host)
    path, name = victim(host)
    with flipped(path):
        found = database.call(host, "slmdb_backup.verify")
        drilled = database.call(host, "slmdb_backup.drill")
        print(name, found["problems"], drilled["problems"])
        assert found["right"] is False
        named = name if victim is largest else "15-1"
        assert any(named in line for line in found["problems"])
        assert drilled["proven"] is False and drilled["problems"]
        assert database.postmaster(host) == server
    assert database.call(host, "slmdb_backup.verify")["problems"] == []


@contextlib.contextmanager
def another_key(host):
    kept = host.read(KEY)
    host.write(KEY, kept[:-9] + kept[-9:].swapcase())
    try:
        yield f"{KEY} is not the key"
    finally:
        host.write(KEY, kept)


@contextlib.contextmanager
def missing_wal(host):
    path, segment = newest(host)
    path.rename(path.with_name("aside"))
    try:
        yield f"the archived WAL has a gap at {segment}"
    finally:
        path.with_name("aside").rename(path)


@contextlib.contextmanager
def damaged_wal(host):
    path, segment = newest(host)
    with flipped(path):
        yield f"archived WAL segment {segment} is damaged: "


@contextlib.contextmanager
def damaged_backup(host):
    path, _ = largest(host)
    with flipped(path):
        yield path.name.split(".")[0]


@contextlib.contextmanager
def full_disk(host):
    room(host, DATA, 40)  # the server goes on: more than a segment of WAL
    try:
        yield "MiB free, the restore needs"
    finally:
        room(host, DATA)


BESIDE, IN_PLACE = ["slmdb_backup.restore"], ["slmdb_backup.restore", "in_place=15/main"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (another_key, BESIDE),
        (missing_wal, IN_PLACE),
        (damaged_wal, IN_PLACE),
        (damaged_backup, IN_PLACE),
        (full_disk, BESIDE),
    ],
)
def test_a_restore_that_cannot_be(host, fault, words):
    """One line says why; what runs and the repository are as they were, nothing is left."""
    server, there = database.postmaster(host), os.listdir(host.path(DATA))
    with fault(host) as expected:
        files = [path for path in matching(host, f"{REPOSITORY}/**/*") if path.is_file()]
        files = [path for path in files if not path.name.endswith(".pgbackrest.tmp")]
        before = {path: hashed(path) for path in files}
        line = database.refusal(host, *words)
        print(fault.__name__, line)
        assert expected in line
        assert {path: hashed(path) for path in files} == before
    assert os.listdir(host.path(DATA)) == there
    assert (database.postmaster(host), database.ready(host)) == (server, database.READY)


def hashed(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_damaged_wal_is_told_beside(host):
    """What can be had is there, and the line says from where on nothing is."""
    commits = writer.logged(host)
    with damaged_wal(host), database.restored(host) as copy:
        print(copy["gap"])
        assert "what can be read of the archived WAL ends at" in copy["gap"]
        reached = writer.position(copy["gap"].split("ends at ")[1].split(",")[0])
        due = {entry: lsn for entry, lsn in commits.items() if lsn and lsn <= reached}
        assert writer.count("damaged WAL", due, writer.present(host, copy["port"])) == set()


def test_a_disk_that_fills_during_a_restore(host, beside):
    """In mid-write: one line, nothing is left, and the server goes on."""
    server, there = database.postmaster(host), os.listdir(host.path(DATA))
    restore = beside(database.refusal, host, *BESIDE)
    worker = caught(host, "restore:local", lambda: matching(host, f"{DATA}/restored/base/*/*"))
    host.run(f"systemctl kill -s STOP {writer.UNIT}")
    room(host, DATA, 1)
    os.kill(worker, signal.SIGCONT)
    try:
        line = restore.result()
    finally:
        room(host, DATA)
        host.run(f"systemctl kill -s CONT {writer.UNIT}")
    print(line)
    assert "No space left" in line or "[28]" in line
    assert os.listdir(host.path(DATA)) == there
    writer.goes_on(host)
    assert database.postmaster(host) == server


def test_a_crash_between_an_alter_and_the_backup(host):
    """ALTER TABLE is in the WAL and comes back with any backup, ALTER SYSTEM with the next one."""
    before = database.postmaster(host)
    change = "ALTER TABLE written ADD COLUMN altered text DEFAULT 'yes'"
    host.run(f'psql -XAt -h /var/run/postgresql -U autobot_slm -d autobot_slm -c "{change}"')
    database.sql(host, "ALTER SYSTEM SET log_min_duration_statement = 4711")
    host.run(f"kill -9 {before}")
    assert database.came_back(host, before)
    writer.goes_on(host)
    altered = "psql -XAt -h /var/run/postgresql -U autobot_slm -d autobot_slm -p {port} -c "
    altered += "'SELECT DISTINCT altered FROM written'"
    setting = "SHOW log_min_duration_statement"
    for made, expected in ((0, "-1"), (1, "4711ms")):
        if made:
            database.call(host, "slmdb_backup.create")
        with database.restored(host) as copy:
            assert host.run(altered.format(port=copy["port"])).stdout.strip() == "yes"
            assert database.sql(host, setting, copy["port"]) == expected
    database.sql(host, "ALTER SYSTEM RESET log_min_duration_statement")


def test_a_lost_server_loses_what_was_not_archived_and_nothing_else(host):
    """The server cannot be asked any more: the repository alone decides."""
    host.run(f"systemctl kill -s KILL {database.UNIT}; systemctl stop {database.UNIT}")
    commits = writer.logged(host)
    archived = database.call(host, "slmdb_backup.info")["last_wal"]
    try:
        with database.restored(host) as copy:
            found = writer.present(host, copy["port"])
    finally:
        host.run(f"systemctl start {database.UNIT}")
    assert writer.count("server lost, up to the last WAL", commits, found, archived) == set()
    unarchived = writer.count("server lost, all", commits, found)
    assert all(commits[one] is None or commits[one] > writer.end(archived) for one in unarchived)
    writer.goes_on(host)


def twice(host):
    """Commit two transactions; return a moment between them, and what the first wrote."""
    now = "SELECT clock_timestamp()"
    database.sql(host, "CREATE TABLE IF NOT EXISTS log (entry text)")
    first = f"first {time.time()}"
    database.sql(host, f"INSERT INTO log VALUES ('{first}')")
    moment = database.sql(host, now).replace(" ", "T")
    database.sql(host, "INSERT INTO log VALUES ('second')")
    return moment, first


LAST = "SELECT entry FROM log ORDER BY ctid DESC LIMIT 1"


def test_a_moment_between_two_transactions(host):
    """Exactly the first is there; so is every commit of the application before it."""
    moment, first = twice(host)
    with database.restored(host, time=moment) as copy:
        assert database.sql(host, LAST, copy["port"]) == first


def test_in_place_under_the_unit(host, beside):
    """The unit tells the truth on the way, the old data is kept, and backups go on afterwards."""
    writer.goes_on(host)
    moment, first = twice(host)
    writer.stop(host)
    before = database.postmaster(host)
    words = ("slmdb_backup.restore", f"time={moment}", "in_place=15/main")
    restore = beside(database.call, host, *words)
    assert database.came_back(host, before)
    answer = restore.result()
    assert database.sql(host, LAST) == first
    assert database.active(host) == "active"
    assert host.path(f"{answer['kept']}/PG_VERSION").exists()
    assert queue_problems(host) == []
    writer.start(host)
    right(host, "restored in place")
    host.run(["rm", "-r", answer["kept"]])


DAYS = f"SELECT extract(epoch FROM clock_timestamp()) / 86400 - {time.time() / 86400}"
PRELOADED = {
    "LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "FAKETIME_TIMESTAMP_FILE": "/srv/clock",
    "FAKETIME_NO_CACHE": "1",
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
}


@pytest.fixture
def clock(host):
    """Let the clock of the server and of pgBackRest jump."""
    host.run("apt-get -qq update && apt-get -qqy install libfaketime", timeout=600)
    words = " ".join(f"{name}={value}" for name, value in PRELOADED.items())
    unit = f"/run/systemd/system/{database.UNIT}.service.d/clock.conf"
    host.write(unit, f"[Service]\nEnvironment={words}\n")
    host.run("mv /usr/bin/pgbackrest /usr/bin/pgbackrest.real")
    host.write("/usr/bin/pgbackrest", f'#!/bin/sh\n{words} exec /usr/bin/pgbackrest.real "$@"\n')
    host.run("chmod 755 /usr/bin/pgbackrest")

    def jump(offset):
        host.write("/srv/clock", f"{offset}\n")

    jump("+0")
    restart = f"systemctl daemon-reload && systemctl restart {database.UNIT}"
    host.run(restart)
    yield jump
    host.run(f"rm {unit} && mv /usr/bin/pgbackrest.real /usr/bin/pgbackrest && {restart}")


def test_the_clock_jumps(host, clock):
    """Nothing is lost; a backup that would sort before the newest is refused in one line."""
    database.call(host, "slmdb_backup.create")
    moment, first = twice(host)
    for offset, word in (("-1d", "refused"), ("+1d", "made"), ("+0", "refused")):
        clock(offset)
        assert abs(float(database.sql(host, DAYS)) - int(offset.rstrip("d"))) < 0.1
        writer.goes_on(host)
        if word == "made":
            database.call(host, "slmdb_backup.create")
        else:
            line = database.refusal(host, "slmdb_backup.create")
            assert "is not later than latest backup label" in line and "set the clock" in line
    assert writer.restored(host, "clock jumped") == set()
    with database.restored(host, time=moment) as copy:
        assert database.sql(host, LAST, copy["port"]) == first
    right(host, "clock right again", "full")
