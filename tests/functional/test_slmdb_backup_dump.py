"""Logical dumps: complete, without passwords, kept as long as backups are, or refused."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.support import backups
from tests.support import world as worlds

DUMPS = Path("/var/lib/autobot-slm-database/dumps")
SECRET = Path("/etc/autobot/slm-secrets.env")
ODD = "a=b/c d"  # neither a file's name nor, as it is, a database's for libpq
TABLE = "CREATE TABLE nodes AS SELECT n, 'node ' || n AS name FROM generate_series(1, 9) n"
PILLAR = {"slm_database": {"backup": {"enabled": True}, "databases": {ODD: {}}}}


@pytest.fixture(scope="module", autouse=True)
def _applied(minions):
    """A host with the whole formula applied and a table in each database."""
    worlds.fresh()
    minion = minions(PILLAR)
    chunks = minion.call("state.apply", "slm_database").raw.values()
    assert [one["comment"] for one in chunks if one["result"] is False] == []
    for database in ("autobot_slm", ODD):
        minion.call("slmdb_server.execute", TABLE, database=database)
    backups.keep(minion, "dumpable")


@pytest.fixture
def host(minions):
    """That host, running."""
    with backups.woken(minions, PILLAR, "dumpable") as minion:
        yield minion


def postgres(*words: str) -> str:
    command = ["runuser", "-u", "postgres", "--", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout


def rows(host, statement, database="autobot_slm"):
    return host.call("slmdb_server.query", statement, database=database)


def rename(old: str, new: str) -> None:
    """An overlay cannot rename a directory of a layer below; these are of the upper one."""
    (DUMPS / old).rename(DUMPS / new)


def test_every_database_and_the_roles_are_in_it(host):
    """Each dump restores; what is told is what is there; root and the server read it."""
    made = host.call("slmdb_backup.dump")
    assert made["files"] == ["a%3Db%2Fc%20d.dump", "autobot_slm.dump", "globals.sql"]
    assert made["removed"] == [] and made["seconds"] >= 0
    directory = Path(made["path"])
    assert directory.parent == DUMPS
    assert sum(path.stat().st_size for path in directory.iterdir()) == made["bytes"]
    assert [row["name"] for row in host.call("slmdb_backup.dumps")] == [made["name"]]
    found = DUMPS.stat()
    assert (DUMPS.owner(), DUMPS.group()) == ("root", "postgres")
    assert stat.S_IMODE(found.st_mode) == 0o750
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0
    for name in made["files"][:2]:
        postgres("createdb", "copied")
        postgres("pg_restore", "--exit-on-error", "-d", "copied", str(directory / name))
        assert rows(host, "SELECT count(*) AS n FROM nodes", "copied") == [{"n": 9}]
        host.call("slmdb_server.forget")
        postgres("dropdb", "copied")


def test_no_password_is_in_it(host):
    """Neither the application's nor a verifier of it."""
    directory = Path(host.call("slmdb_backup.dump")["path"])
    text = (directory / "globals.sql").read_text()
    assert "CREATE ROLE autobot_slm;" in text
    assert "SCRAM-SHA-256" not in text and "PASSWORD" not in text
    line = next(one for one in SECRET.read_text().splitlines() if "SLM_DB_PASSWORD=" in one)
    password = line.partition("=")[2].strip("'\"")
    for path in directory.iterdir():
        assert password.encode() not in path.read_bytes()


@pytest.mark.once
def test_one_table_comes_back_into_the_running_database(host):
    """As the guide says: the other tables, and what was written since, stay."""
    directory = host.call("slmdb_backup.dump")["path"]
    host.call("slmdb_server.execute", "CREATE TABLE later (n int)", database="autobot_slm")
    host.call("slmdb_server.execute", "DROP TABLE nodes", database="autobot_slm")
    dump = f"{directory}/autobot_slm.dump"
    command = f"pg_restore -d autobot_slm --single-transaction -t nodes {dump}"
    guide = (Path(__file__).parents[2] / "docs/backup.md").read_text()
    generic = command.replace(directory, "/var/lib/autobot-slm-database/dumps/20261124T030000Z")
    assert f"runuser -u postgres -- {generic}\n" in guide
    postgres(*command.split())
    assert rows(host, "SELECT count(*) AS n, max(name) AS last FROM nodes") == [
        {"n": 9, "last": "node 9"}
    ]
    assert rows(host, "SELECT count(*) AS n FROM later") == [{"n": 0}]


@pytest.mark.once
def test_a_dump_is_kept_as_long_as_a_backup_of_its_age(host):
    """Older than every full backup it goes, unless it is the newest."""
    first = host.call("slmdb_backup.dump")["name"]
    assert host.call("slmdb_backup.dump")["removed"] == []  # there is no backup yet
    rename(first, "20010101T000000Z")
    host.call("slmdb_backup.create", "full")
    newest = host.call("slmdb_backup.dump")
    assert "20010101T000000Z" in newest["removed"]
    left = [row["name"] for row in host.call("slmdb_backup.dumps")]
    assert left[-1] == newest["name"] and "20010101T000000Z" not in left


@pytest.mark.once
def test_nothing_goes_while_the_repository_cannot_be_read(host):
    """What is not known to be old is kept."""
    rename(host.call("slmdb_backup.dump")["name"], "20010101T000000Z")
    host.call("slmdb_backup.create", "full")
    key = Path("/etc/pgbackrest/autobot-slm/key.conf")
    key.write_text("[global]\nrepo1-cipher-pass=another\n")
    assert host.call("slmdb_backup.dump")["removed"] == []
    assert host.call("slmdb_backup.dumps")[0]["name"] == "20010101T000000Z"


@pytest.mark.once
def test_an_interrupted_one_is_rubbish(host):
    """It is in no list, and the next run takes it away."""
    host.call("slmdb_backup.dump")
    rubbish = DUMPS / ".unfinished-20261124T030000Z"
    rubbish.mkdir()
    (rubbish / "autobot_slm.dump").write_text("half")
    assert len(host.call("slmdb_backup.dumps")) == 1
    host.call("slmdb_backup.dump")
    assert not rubbish.exists() and len(host.call("slmdb_backup.dumps")) == 2


@pytest.mark.once
def test_two_at_once_are_refused(host):
    host.call("slmdb_backup.dump")
    with open("/var/lib/autobot-slm-database/dump.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CommandExecutionError, match="another dump runs"):
            host.call("slmdb_backup.dump")
    assert len(host.call("slmdb_backup.dumps")) == 1


@pytest.mark.once
def test_a_damaged_page_is_told_and_the_older_dumps_stay(host):
    """The server's words in one line; nothing of the new one is left."""
    host.call("slmdb_backup.dump")
    path = rows(host, "SELECT pg_relation_filepath('nodes') AS path")[0]["path"]
    host.call("slmdb_server.execute", "CHECKPOINT")
    host.call("slmdb_service.stop")
    table = Path(host.call("slmdb_instance.facts")["data_directory"]) / path
    data = bytearray(table.read_bytes())
    data[8000] ^= 1
    table.write_bytes(bytes(data))
    host.call("slmdb_service.start")
    with pytest.raises(CommandExecutionError, match=r"^pg_dump: invalid page") as caught:
        host.call("slmdb_backup.dump")
    assert "\n" not in str(caught.value)
    assert len(host.call("slmdb_backup.dumps")) == 1 and len(os.listdir(DUMPS)) == 1


@pytest.mark.once
def test_a_full_disk_is_refused_before_it_begins(host):
    host.call("slmdb_backup.dump")
    (made,) = DUMPS.iterdir()
    shutil.copytree(made, "/var/lib/kept")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", "tmpfs", str(DUMPS)]
    subprocess.run(mount, check=True)
    try:
        shutil.copytree("/var/lib/kept", DUMPS / made.name)
        free = os.statvfs(DUMPS)
        (DUMPS / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize))
        with pytest.raises(CommandExecutionError, match="MiB free, the next dump needs"):
            host.call("slmdb_backup.dump")
        assert len(host.call("slmdb_backup.dumps")) == 1
    finally:
        subprocess.run(["umount", "--lazy", str(DUMPS)], check=True)


@pytest.mark.once
def test_a_database_that_is_missing_is_an_error(host):
    """A smaller dump would look like a whole one."""
    host.call("slmdb_server.forget")
    postgres("dropdb", ODD)
    with pytest.raises(CommandExecutionError, match=f"database {ODD} does not exist"):
        host.call("slmdb_backup.dump")
    assert not DUMPS.exists()


def test_without_backups_there_are_no_dumps(server, minions):
    minions({"slm_database": {"backup": {"enabled": False}}})
    with pytest.raises(SaltInvocationError, match="backup:enabled"):
        server.call("slmdb_backup.dump")
    assert server.call("slmdb_backup.dumps") == []


def test_a_clean_leaves_the_dumps_and_names_them(host):
    host.call("slmdb_backup.dump")
    assert host.state("slmdb_record.absent").result is True
    assert len(host.call("slmdb_backup.dumps")) == 1
    assert any("dumps" in line for line in host.call("slmdb_record.kept"))
