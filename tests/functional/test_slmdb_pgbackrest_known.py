"""Whether a repository knows the instance: asked when something changed, and never when not."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError
from salt.utils.dictupdate import merge_recurse

from tests.functional.test_slm_database import begin_applied
from tests.functional.test_slmdb_backup_health import buried, ready, write_wal
from tests.support import s3
from tests.support.wait import until

REPOSITORY = Path("/var/lib/pgbackrest")
CONFIG = Path("/etc/pgbackrest/autobot-slm.conf")
KEY = Path("/etc/pgbackrest/autobot-slm/key.conf")
INFO = ("archive/autobot-slm/archive.info", "backup/autobot-slm/backup.info")
GONE = "holds none now"
ALLOWED = {"slm_database": {"backup": {"allow_new": True}}}
MISSING = {"stanza autobot-slm": {"old": None, "new": "present"}}


def ask(minion):
    return minion.call("slmdb_pgbackrest.missing_stanza")


def asked(minion):
    """The answer, and whether a process was started for it, by the kernel's account of ours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    answer = ask(minion)
    return answer, resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt > before


@pytest.fixture
def host(minions):
    """A host to which the formula was applied, and that has been asked."""
    begin_applied(minions)
    minion = minions()
    minion.call("slmdb_service.start")
    assert ask(minion) == {}
    yield minion
    minion.tell(None)
    minion.call("slmdb_server.forget")


def move(source, target):
    """What mv does: an overlay has no rename for a directory from below."""
    subprocess.run(["mv", source, target], check=True)


def refused(minion):
    """Have the server fail to archive a segment."""

    def tried():
        if not ready():  # what went before the server had read its configuration was taken
            write_wal(minion)
        return failing(minion)

    until(tried)


def failing(minion):
    """Whether the last segment that the server tried was not archived."""
    query = """
        SELECT coalesce(last_failed_time >= coalesce(last_archived_time, '-infinity'), false)
               AS failing FROM pg_stat_archiver"""
    return minion.call("slmdb_server.query", query)[0]["failing"]


def begun_anew(minion, pillar, store):
    """See that what the store lost is noticed, and made again when that is permitted."""
    with pytest.raises(CommandExecutionError, match=GONE):
        ask(minion)
    store.objects.clear()
    minion.tell(merge_recurse(pillar, ALLOWED))
    assert ask(minion) == {"stanza autobot-slm in repository 2": {"old": None, "new": "present"}}
    assert minion.state("slmdb_backup.present").result is True
    minion.tell(pillar)
    quiet(minion)


def quiet(minion):
    """See that nothing is asked any more once WAL is archived again."""
    minion.call("slmdb_backup.settle")
    until(lambda: not failing(minion))
    assert ask(minion) == {}
    assert asked(minion) == ({}, False)


def test_a_repository_that_did_not_change_is_not_asked_again(host):
    """What pgBackRest would read is the same; a backup changes a part of it."""
    assert asked(host) == ({}, False)
    host.call("slmdb_backup.create")
    assert asked(host) == ({}, True)
    assert asked(host) == ({}, False)


@pytest.mark.parametrize("place", ["archive", "backup"])
def test_a_stanza_that_was_taken_away_is_noticed(host, place):
    """At once; and so is that it is back."""
    move(REPOSITORY / place / "autobot-slm", "/var/lib/kept")
    result = host.state("slmdb_backup.present", test=True)
    assert result.result in (None, False), result.comment
    move("/var/lib/kept", REPOSITORY / place / "autobot-slm")
    assert asked(host) == ({}, True)


def test_a_repository_that_was_emptied_is_made_again(host):
    """Its directory is there, what was in it is not; a new one has to be permitted."""
    for place in ("archive", "backup"):
        shutil.rmtree(REPOSITORY / place)
    with pytest.raises(CommandExecutionError, match=GONE):
        ask(host)
    host.tell(ALLOWED)
    assert ask(host) == MISSING
    assert host.state("slmdb_backup.present").result is True
    assert (REPOSITORY / INFO[1]).exists()
    assert ask(host) == {}


def test_a_disk_that_lies_over_the_repository_is_noticed(host):
    """Nothing below the mount changed."""
    with buried(REPOSITORY), pytest.raises(CommandExecutionError, match=GONE):
        ask(host)
    assert ask(host) == {}


@pytest.mark.parametrize("name", INFO)
def test_a_file_that_was_spoilt_is_noticed(host, name):
    """The same name, size and time of modification deceive nobody."""
    for path in (REPOSITORY / name, REPOSITORY / f"{name}.copy"):
        before = path.stat()
        path.write_bytes(bytes(reversed(path.read_bytes())))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CommandExecutionError, match="cannot be read"):
        ask(host)


def test_another_instance_s_stanza_in_its_place_is_noticed(host):
    """The same paths, key and version; only the system identifier is another's."""
    subprocess.run(["pg_createcluster", "15", "other"], check=True, capture_output=True)
    for place in ("archive", "backup"):
        shutil.rmtree(REPOSITORY / place)
    words = host.call("slmdb_pgbackrest.line", "stanza-create", "--no-online")
    words.insert(-1, "--pg1-path=/var/lib/postgresql/15/other")
    subprocess.run(host.call("slmdb_program.command", *words), check=True)
    with pytest.raises(CommandExecutionError, match="the backups of another instance"):
        ask(host)


def test_a_key_that_was_changed_is_noticed(host):
    """What one key opened another does not."""
    kind, _, secret = KEY.read_text().strip().rpartition("=")
    KEY.write_text(f"{kind}={secret[::-1]}\n")
    with pytest.raises(CommandExecutionError, match="is not the key"):
        ask(host)


def test_a_configuration_that_was_edited_is_noticed(host):
    """It names another directory now; the one before is as it was."""
    text = CONFIG.read_text()
    assert f"repo1-path={REPOSITORY}\n" in text
    CONFIG.write_text(text.replace(f"repo1-path={REPOSITORY}\n", "repo1-path=/srv/elsewhere\n"))
    assert ask(host) == MISSING
    CONFIG.write_text(text)
    assert asked(host) == ({}, True)


def test_while_wal_is_refused_nothing_that_is_kept_counts(host):
    """Whatever the reason is: the files look as ever."""
    host.call("slmdb_server.execute", "ALTER SYSTEM SET archive_command = 'false'")
    host.call("slmdb_server.query", "SELECT pg_reload_conf()")
    assert asked(host) == ({}, False)
    refused(host)
    assert asked(host) == ({}, True)
    assert asked(host) == ({}, True)


@pytest.mark.once
def test_a_store_elsewhere_is_asked_when_archiving_or_a_backup_says_so(minions):
    """Nothing here shows what is lost there: that WAL is refused does, and that a backup failed."""
    begin_applied(minions)
    directory = Path("/etc/ssl/s3")
    directory.mkdir()
    with s3.store(directory, "AKIA", "secret") as store:
        told = {"type": "s3", "path": "/slm", "bucket": s3.BUCKET, "endpoint": "localhost"}
        told |= {"region": s3.REGION, "uri_style": "path", "port": store.port}
        told |= {"ca_file": str(store.certificate), "key_pillar": "k", "secret_pillar": "s"}
        pillar = {"slm_database": {"backup": {"second": told}}, "k": "AKIA", "s": "secret"}
        minion = minions(pillar)
        minion.call("slmdb_service.start")
        for state in ("slmdb_config.applied", "slmdb_backup.configured", "slmdb_backup.present"):
            assert minion.state(state).result is True
        quiet(minion)
        for name in [name for name in store.objects if "/backup/" in name]:
            del store.objects[name]
        with pytest.raises(CommandExecutionError, match="repository 2 "):
            minion.call("slmdb_backup.create")
        begun_anew(minion, pillar, store)
        store.objects.clear()
        refused(minion)
        begun_anew(minion, pillar, store)
        minion.call("slmdb_server.forget")
