"""A second repository: it gets everything as well, and is in nobody's way when it is dead."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.functional.test_slm_database import begin_applied
from tests.functional.test_slmdb_backup_health import buried
from tests.functional.test_slmdb_restore import entries
from tests.support import backups, s3
from tests.support import world as worlds

FIRST, SECOND = Path("/var/lib/pgbackrest"), Path("/srv/second")
LOCK = Path("/var/lib/autobot-slm-database/pgbackrest/lock/autobot-slm-backup.lock")
KEYS = Path("/etc/pgbackrest/autobot-slm")
PILLAR = {"slm_database": {"backup": {"second": {"type": "path", "path": str(SECOND)}}}}
STATES = ("slmdb_config.applied", "slmdb_backup.configured", "slmdb_backup.present")
HELD = Path("/var/lib/autobot-slm-database/repositories.json")
CANARY = "wJalrXUtnFEMI-canary"


@pytest.fixture
def host(minions):
    """A host to which the formula was applied, and then a second directory."""
    if "with a second" not in worlds.STATE["snapshots"]:
        begin_applied(minions)
        minion = minions(PILLAR)
        minion.call("slmdb_service.start")
        for state in STATES:
            announced = minion.state(state, test=True)
            result = minion.state(state)
            assert result.result is True, result.comment
            assert result.changes == announced.changes
            assert minion.state(state).changes == {}
        backups.keep(minion, "with a second")
    with backups.woken(minions, PILLAR, "with a second") as minion:
        yield minion


def dead(directory):
    """Nobody but root comes in there."""
    return buried(directory, "0500")


def labels(minion):
    return {(row["repository"], row["label"]) for row in minion.call("slmdb_backup.list")}


def write(minion, entry):
    minion.call("slmdb_server.execute", "CREATE TABLE IF NOT EXISTS log (entry text)")
    minion.call("slmdb_server.execute", "INSERT INTO log VALUES (%s)", [entry])


def test_every_backup_goes_to_both_and_comes_back_from_either(host):
    """Each with a key of its own; a label is looked for in both, the second does alone, too."""
    assert host.call("slmdb_pgbackrest.repositories") == [1, 2]
    made = host.call("slmdb_backup.create")
    (other,) = made["others"]
    assert (made["repository"], other["repository"]) == (1, 2)
    assert labels(host) == {(1, made["label"]), (2, other["label"])}
    texts = [(KEYS / name).read_text() for name in ("key.conf", "key-2.conf")]
    assert "repo2-cipher-pass=" in texts[1] and len({text.split("=")[1] for text in texts}) == 2
    assert oct((KEYS / "key-2.conf").stat().st_mode)[-4:] == "0640"
    assert (KEYS / "key-2.conf").group() == "postgres"
    info = host.call("slmdb_backup.info")
    assert [info["where"], info["others"][0]["where"]] == [str(FIRST), str(SECOND)]
    assert info["others"][0]["encrypted"] is True and info["others"][0]["backups"] == 1
    assert host.call("slmdb_backup.verify")["right"] is True
    answer = host.call("slmdb.health", 15)
    assert answer["problems"] == []
    assert "only local" not in " | ".join(answer["warnings"])
    write(host, "here")
    assert host.call("slmdb_restore_plan.make")["repository"] == 1
    assert host.call("slmdb_restore_plan.make", label=other["label"])["repository"] == 2
    host.call("slmdb_backup.settle")
    with dead(FIRST):
        restored = host.call("slmdb_restore.beside")
        assert entries(host, restored["port"]) == ["here"]
        assert restored["label"] == other["label"]


@pytest.mark.once
def test_wal_that_one_repository_lacks_comes_from_the_other(host):
    """A gap is what none of them has, whichever has the backup."""
    host.call("slmdb_backup.create")
    write(host, "archived")
    host.call("slmdb_backup.settle")
    write(host, "lost")
    segment = host.call("slmdb_backup.settle")["wal"]
    write(host, "after")
    host.call("slmdb_backup.settle")
    for directory, gap, rows in (
        (FIRST, False, ["archived", "lost", "after"]),
        (SECOND, True, ["archived"]),
    ):
        (lost,) = (directory / "archive").rglob(f"{segment}-*")
        lost.unlink()
        answer = host.call("slmdb_backup.restore", instance=directory.name)
        assert entries(host, answer["port"]) == rows
        assert (f"has a gap at {segment}" in (answer["gap"] or "")) is gap
    with dead(FIRST):
        answer = host.call("slmdb_backup.restore", instance="third")
        assert f"has a gap at {segment}" in answer["gap"]
        with pytest.raises(CommandExecutionError, match=f"a gap at {segment}.*a time before it"):
            host.call("slmdb_backup.restore", in_place="15/main")


@pytest.mark.once
def test_a_dead_second_repository_stops_nothing(host):
    """WAL and backups reach the first, and who is dead is named; later all is well by itself."""
    host.call("slmdb_backup.create")
    with dead(SECOND):
        write(host, "meanwhile")
        host.call("slmdb_backup.settle")
        with pytest.raises(CommandExecutionError) as caught:
            host.call("slmdb_backup.create")
        assert str(caught.value).startswith(f"repository 2 ({SECOND}): ")
        assert "repository 1 has " in str(caught.value) and "\n" not in str(caught.value)
        assert len([one for one in labels(host) if one[0] == 1]) == 2
        assert "problem" in host.call("slmdb_backup.info")["others"][0]
        failed = host.state("slmdb_backup.present")
        assert failed.result is False and "pgbackrest stanza-create" in failed.comment
        answer = host.call("slmdb.health", 15)
        assert f"repository 2 ({SECOND}) is not there" in " | ".join(answer["problems"])
    host.call("slmdb_backup.create")
    assert host.call("slmdb.health", 15)["problems"] == []


@pytest.mark.once
def test_a_dead_first_repository_is_named_and_the_second_goes_on(host):
    """The other way round."""
    host.call("slmdb_backup.create")
    with dead(FIRST):
        with pytest.raises(CommandExecutionError, match=f"repository 1 \\({FIRST}\\)") as caught:
            host.call("slmdb_backup.create")
        assert "repository 2 has " in str(caught.value)


@pytest.mark.once
def test_who_is_reached_makes_a_stanza_though_the_other_is_dead(minions):
    """The first time, too."""
    begin_applied(minions)
    minion = minions(PILLAR)
    minion.call("slmdb_service.start")
    assert minion.state("slmdb_backup.configured").result is True
    HELD.unlink()
    shutil.rmtree(FIRST / "backup")
    shutil.rmtree(FIRST / "archive")
    with dead(SECOND):
        assert minion.state("slmdb_backup.present").result is False
    assert (FIRST / "backup/autobot-slm/backup.info").exists()
    assert minion.state("slmdb_backup.present").result is True
    minion.call("slmdb_server.forget")


@pytest.mark.once
def test_it_is_taken_away_and_its_key_is_kept(host, minions):
    """Without it everything is as before; with it again its backups are readable."""
    before = host.call("slmdb_backup.create")["others"][0]["label"]
    key = (KEYS / "key-2.conf").read_text()
    minions()
    assert host.state("slmdb_backup.configured").result is True
    assert not (KEYS / "key-2.conf").exists()
    assert (KEYS / "key-2.conf.kept").read_text() == key
    assert host.call("slmdb_backup.create")["others"] == []
    minions(PILLAR)
    assert host.state("slmdb_backup.configured").result is True
    assert (2, before) in labels(host)
    (KEYS / "key-2.conf").unlink()
    result = host.state("slmdb_backup.configured")
    assert result.result is False
    assert f"{SECOND} holds a repository but its key {KEYS}/key-2.conf is missing" in result.comment


@pytest.mark.once
def test_another_instance_s_repository_is_not_touched(host, minions):
    """A new instance does not mix its backups with those of the one before."""
    host.call("slmdb_backup.create")
    kept = sorted(str(path) for path in FIRST.rglob("*"))
    host.call("slmdb_server.forget")
    host.call("slmdb_service.stop")
    subprocess.run(["pg_dropcluster", "15", "main"], check=True)
    host.call("slmdb_instance.apply")
    for state in ("slmdb_config.applied", "slmdb_access.applied", "slmdb_service.running"):
        assert host.state(state).result is True
    result = host.state("slmdb_backup.present")
    assert result.result is False
    assert f"{FIRST} holds the backups of another instance" in result.comment
    assert "\n" not in result.comment
    time.sleep(1)
    assert sorted(str(path) for path in FIRST.rglob("*")) == kept
    for directory in (FIRST, SECOND):
        shutil.move(directory, directory.with_name("old"))
    for state in ("slmdb_backup.configured", "slmdb_backup.present"):
        result = host.state(state)
        assert result.result is True, result.comment
    assert host.state("slmdb_backup.present").changes == {}


@pytest.mark.parametrize(("directory", "key"), [(FIRST, "path"), (SECOND, "second:path")])
def test_a_mount_that_is_missing_is_not_begun_anew(host, directory, key):
    """What, where, what to do, in one line; the empty directory stays so; mounted, all is well."""
    states = ("slmdb_backup.configured", "slmdb_backup.present")
    with buried(directory):
        for state in states:
            for test in (True, False):
                refused = host.state(state, test=test)
                assert (refused.result, refused.changes) == (False, {})
                line = refused.comment
                assert line.startswith(f"slm_database:backup:{key}: {directory} held the backups")
                assert "is it mounted?" in line and "\n" not in line
                assert "slm_database:backup:allow_new: true for one run" in line
        write(host, "meanwhile")
        host.call("slmdb_backup.settle")
        assert list(directory.iterdir()) == []
        said = " | ".join(host.call("slmdb.health", 15)["problems"])
        assert f"({directory}) is not there; bring it back (is it mounted?)" in said
    for state in states:
        result = host.state(state)
        assert (result.result, result.changes) == (True, {})


def test_a_first_installation_waits_for_the_mount(minions):
    """The host's own table says that it is one; nothing is written below the mount point."""
    begin_applied(minions)
    table = Path("/etc/fstab")
    table.write_text("# a comment\n/dev/vda / ext4 defaults 0 1\ntmpfs /srv/second/ tmpfs ro 0 0\n")
    minion = minions(PILLAR)
    SECOND.mkdir(parents=True)
    minion.call("slmdb_service.start")
    for test in (True, False):
        refused = minion.state("slmdb_backup.configured", test=test)
        assert (refused.result, refused.changes) == (False, {})
        assert refused.comment == (
            f"slm_database:backup:second:path: {SECOND} is not mounted, /etc/fstab says that "
            f"{SECOND} is a mount point; mount it"
        )
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(SECOND)], check=True)
    try:
        for state in STATES:
            result = minion.state(state)
            assert result.result is True, result.comment
    finally:
        subprocess.run(["umount", "--lazy", str(SECOND)], check=True)
    minion.call("slmdb_server.forget")


@pytest.mark.once
def test_a_mount_of_any_kind_is_one(minions):
    """One directory bound to another on the same file system; and a new disk is root's at first."""
    begin_applied(minions)
    Path("/etc/fstab").write_text("/srv/disk /srv/second none bind 0 0\n")
    minion = minions(PILLAR)
    for path in (Path("/srv/disk/lost+found"), SECOND):
        path.mkdir(parents=True)
    subprocess.run(["mount", "--bind", "/srv/disk", str(SECOND)], check=True)
    try:
        minion.call("slmdb_service.start")
        announced = minion.state("slmdb_backup.configured", test=True)
        for state in STATES:
            result = minion.state(state)
            assert result.result is True, result.comment
            assert minion.state(state).changes == {}
        assert announced.changes[f"{SECOND}: user"] == {"old": "root", "new": "postgres"}
        assert SECOND.owner() == "postgres"
    finally:
        subprocess.run(["umount", "--lazy", str(SECOND)], check=True)
    minion.call("slmdb_server.forget")


@pytest.mark.once
def test_before_a_change_one_repository_is_enough(host):
    """The dead one is in the log; without any the change has to wait."""
    with dead(SECOND):
        label = host.call("slmdb_backup.before_change")
        assert host.call("slmdb_backup.list")[-1]["label"] == label
        with pytest.raises(CommandExecutionError, match=r"repository 2 .*; repository 1 has"):
            host.call("slmdb_backup.create")
        with dead(FIRST), pytest.raises(CommandExecutionError, match="repository 1 "):
            host.call("slmdb_backup.before_change")


@pytest.mark.once
def test_before_a_change_a_backup_that_runs_is_waited_for(host):
    """A timer's, for instance; by hand it is refused at once."""
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.touch()
    for path in (LOCK, LOCK.parent):
        shutil.chown(path, "postgres", "postgres")
    with LOCK.open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CommandExecutionError, match="acquire lock"):
            host.call("slmdb_backup.create")
        threading.Timer(3, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        label = host.call("slmdb_backup.before_change")
    assert label in [row["label"] for row in host.call("slmdb_backup.list")]


@pytest.mark.parametrize("directory", [FIRST, SECOND])
def test_what_is_lost_for_good_is_begun_anew_if_pillar_says_so(host, minions, directory):
    """For one run; what the other repository has is still there."""
    before = host.call("slmdb_backup.create")
    shutil.rmtree(directory)
    assert "allow_new" in host.state("slmdb_backup.configured").comment
    second = PILLAR["slm_database"]["backup"]["second"]
    minions({"slm_database": {"backup": {"second": second, "allow_new": True}}})
    for state in ("slmdb_backup.configured", "slmdb_backup.present", "slmdb_record.present"):
        announced = host.state(state, test=True)
        made = host.state(state)
        assert made.result is True and made.changes == announced.changes != {}
    recorded = Path("/var/lib/autobot-slm-database/settings.json").read_text()
    assert json.loads(recorded)["backup"]["allow_new"] is False
    minions(PILLAR)
    for state in ("slmdb_backup.configured", "slmdb_backup.present"):
        assert host.state(state).changes == {}
    kept = {(1, before["label"]), (2, before["others"][0]["label"])}
    left = {one for one in kept if one[0] != (1 if directory == FIRST else 2)}
    assert labels(host) == left
    host.call("slmdb_backup.create")
    assert {number for number, _ in labels(host)} == {1, 2}


def test_a_host_from_before_learns_what_its_repositories_held(host):
    """With one change, once."""
    HELD.unlink()
    announced = host.state("slmdb_backup.present", test=True)
    assert set(announced.changes) == {str(HELD)} and not HELD.exists()
    made = host.state("slmdb_backup.present")
    assert (made.result, made.changes) == (True, announced.changes)
    assert host.state("slmdb_backup.present").changes == {}


def test_the_drill_proves_each_repository_in_its_turn(host, minions):
    """Or the one that it is told; one that is new, or dead, is in nobody's way."""
    second = PILLAR["slm_database"]["backup"]["second"]
    told = {"drill": {"keep_free": "0%"}}
    minions({"slm_database": {"backup": told}})
    host.call("slmdb_backup.create")
    minions({"slm_database": {"backup": {**told, "second": second}}})
    drill = "slmdb_backup.drill"
    for _ in range(2):
        answer = host.call(drill)
        assert (answer["repository"], answer["problems"]) == (1, [])
    host.call("slmdb_backup.create")
    assert [host.call(drill)["repository"] for _ in range(3)] == [2, 1, 2]
    assert host.call(drill, repository=2)["repository"] == 2
    with dead(FIRST):
        for repository in (None, 2):
            answer = host.call(drill, repository)
            assert (answer["repository"], answer["problems"]) == (2, [])


@pytest.mark.once
def test_sftp_is_refused_where_the_engine_is_too_old(host, minions):
    """Debian 12's; nothing was changed."""
    sftp = {
        "type": "sftp",
        "path": "/slm",
        "host": "h",
        "user": "u",
        "host_key_hash_type": "sha256",
    }
    minions({"slm_database": {"backup": {"second": {**sftp, "private_key_file": "/k"}}}})
    before = Path("/etc/pgbackrest/autobot-slm.conf").read_bytes()
    result = host.state("slmdb_backup.configured")
    assert result.result is False
    assert "slm_database:backup:second:type: sftp needs pgBackRest 2.46, 2.45" in result.comment
    assert Path("/etc/pgbackrest/autobot-slm.conf").read_bytes() == before


def test_a_key_that_pillar_does_not_have_is_named(host, minions):
    """By its reference; and what is there is written to one closed file and shown nowhere."""
    told = {"type": "s3", "path": "/slm", "bucket": "slm", "endpoint": "127.0.0.1", "region": "r"}
    told |= {"key_pillar": "vault:key", "secret_pillar": "vault:secret"}
    pillar = {"slm_database": {"backup": {"second": told}}, "vault": {"key": "AKIA"}}
    minions(pillar)
    result = host.state("slmdb_backup.configured")
    assert result.result is False
    assert "backup:second:secret_pillar: pillar has no key vault:secret" in result.comment
    minions({**pillar, "vault": {"key": "AKIA", "secret": CANARY}})
    result = host.state("slmdb_backup.configured")
    assert result.result is True
    assert CANARY not in str(result.changes) + str(result.comment)
    assert CANARY not in json.dumps(host.call("slmdb_backup_repository.credentials"))
    file = KEYS / "repository-2.conf"
    assert f"repo2-s3-key-secret={CANARY}" in file.read_text()
    assert oct(file.stat().st_mode)[-4:] == "0640" and file.group() == "postgres"
    for path in [*Path("/etc").rglob("*.conf"), *Path("/var/lib/autobot-slm-database").rglob("*")]:
        if path.is_file() and path != file:
            assert CANARY not in path.read_text(errors="replace"), path
    assert host.state("slmdb_backup.absent").result is True
    assert not file.exists() and (KEYS / "key-2.conf").exists()


@pytest.mark.once
def test_an_s3_store_over_tls(minions):
    """Backup, restore and verify; a wrong secret is one line, and shown nowhere."""
    begin_applied(minions)
    directory = Path("/etc/ssl/s3")
    directory.mkdir()
    with s3.store(directory, "AKIA", CANARY) as store:
        told = {"type": "s3", "path": "/slm", "bucket": s3.BUCKET, "endpoint": "localhost"}
        told |= {"region": s3.REGION, "uri_style": "path", "port": store.port}
        told |= {"ca_file": str(store.certificate), "key_pillar": "k", "secret_pillar": "vault:s"}
        pillar = {"slm_database": {"backup": {"second": told}}, "k": "AKIA"}
        minion = minions({**pillar, "vault": {"s": CANARY}})
        minion.call("slmdb_service.start")
        for state in STATES:
            result = minion.state(state)
            assert result.result is True, result.comment
        (other,) = minion.call("slmdb_backup.create")["others"]
        assert any(name.startswith("slm/backup/") for name in store.objects)
        assert minion.call("slmdb_backup.verify")["right"] is True
        write(minion, "far away")
        minion.call("slmdb_backup.settle")
        with dead(FIRST):
            restored = minion.call("slmdb_restore.beside")
            assert restored["label"] == other["label"]
            assert entries(minion, restored["port"]) == ["far away"]
        row = minion.call("slmdb.health", 15)["backup"]["repositories"][1]
        assert row["where"] == "s3:slm-backups:/slm" and row["last"]["label"] == other["label"]
        minion.tell({**pillar, "vault": {"s": "wrong-canary"}})
        assert minion.state("slmdb_backup.configured").result is True
        with pytest.raises(CommandExecutionError, match="repository 2 ") as caught:
            minion.call("slmdb_backup.create")
        assert "\n" not in str(caught.value) and "canary" not in str(caught.value)
        for place in ("/var/log/pgbackrest", "/var/lib/autobot-slm-database"):
            for path in Path(place).rglob("*"):
                assert not path.is_file() or CANARY not in path.read_text(errors="replace"), path
        minion.call("slmdb_server.forget")


@pytest.mark.once
def test_a_label_that_no_repository_has(host):
    """All that there are are named."""
    host.call("slmdb_backup.create")
    with pytest.raises(SaltInvocationError, match=r"there are 20.*, 20"):
        host.call("slmdb_restore_plan.make", label="20200101-000000F")
