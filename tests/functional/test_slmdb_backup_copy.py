"""The off-host copy: complete, closed to all but its recipients, and known to be old when it is."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.support import secrets
from tests.support import world as worlds

COPY = Path("/srv/slm-copy.age")
KEY = Path("/etc/pgbackrest/autobot-slm/key.conf")
RECORD = Path("/var/lib/autobot-slm-database/settings.json")
OTHER = Path("/etc/autobot/reporting.env")
HAND_MADE = Path("/etc/postgresql/15/main/conf.d/10-mine.conf")


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """A key pair, as age-keygen makes it: the file of the secret one, and the public one."""
    path = tmp_path_factory.mktemp("identity") / "identity.txt"
    subprocess.run(["age-keygen", "-o", str(path)], check=True, capture_output=True)
    public = subprocess.run(["age-keygen", "-y", str(path)], check=True, capture_output=True)
    return path, public.stdout.decode().strip()


def pillar(recipients):
    role = {"secret": {"file": str(OTHER), "key": "REPORTING_DB_PASSWORD"}}
    backup = {"enabled": True, "copy": {"recipients": recipients}}
    return {"slm_database": {"backup": backup, "roles": {"reporting": role}}}


@pytest.fixture(scope="module", autouse=True)
def _applied(minions, identity):
    """A host with the whole formula applied, and secrets that are the backend's own."""
    worlds.fresh()
    secrets.write(secrets.FOREIGN)
    minion = minions(pillar([identity[1]]))
    chunks = minion.call("state.apply", "slm_database").raw.values()
    assert [one["comment"] for one in chunks if one["result"] is False] == []
    minion.call("slmdb_server.forget")
    minion.call("slmdb_service.stop")
    HAND_MADE.write_text("log_min_duration_statement = 250\n")
    worlds.keep("to copy")


@pytest.fixture
def host(minions, identity):
    worlds.fresh("to copy")
    yield minions(pillar([identity[1]]))


def opened(identity, path=COPY):
    """What is in the copy, by name, read with the tools that anybody has."""
    words = ["age", "-d", "-i", str(identity[0]), str(path)]
    data = subprocess.run(words, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive.getmembers()}


def test_all_that_a_new_host_needs_is_in_it(host, identity):
    """Both secret files whole, the repository's key, the settings, what was made by hand."""
    answer = host.call("slmdb_backup.copy", str(COPY))
    assert (answer["path"], answer["recipients"]) == (str(COPY), 1)
    found = opened(identity)
    for path in (secrets.FILE, OTHER, KEY, RECORD, HAND_MADE):
        assert found[str(path).lstrip("/")] == path.read_bytes()
        assert str(path) in answer["holds"]
    assert secrets.FOREIGN in found["etc/autobot/slm-secrets.env"]
    told = json.loads(found["manifest.json"])["instance"]
    assert (told["version"], told["name"], told["port"]) == ("15", "main", 5432)
    said = host.call("slmdb_instance.system_identifier")
    assert told["system_identifier"] == str(said) and said > 2**32


@pytest.mark.parametrize("kind", ["host", "sftp"])
def test_what_opens_a_second_repository_over_ssh_is_in_it(host, minions, identity, kind):
    """The usual case: the first repository is lost with the host."""
    own, named = Path("/var/lib/postgresql/.ssh/known_hosts"), Path("/etc/ssl/private/backup-key")
    own.parent.mkdir(mode=0o700)
    for path in (own, named):
        path.write_text(f"{path}\n")
    second = {"type": kind, "host": "store", "user": "keeper"}
    if kind == "sftp":
        second |= {"path": "/slm", "private_key_file": str(named), "host_key_hash_type": "sha256"}
    told = pillar([identity[1]])
    told["slm_database"]["backup"]["second"] = second
    minions(told).call("slmdb_backup.copy", str(COPY))
    found = opened(identity)
    assert found[str(own).lstrip("/")] == own.read_bytes()
    assert (str(named).lstrip("/") in found) is (kind == "sftp")


def test_nobody_else_can_read_it(host):
    """root's, and no secret is in it, in what is remembered of it, or in the answer."""
    answer = host.call("slmdb_backup.copy", str(COPY))
    assert oct(COPY.stat().st_mode)[-4:] == "0600" and COPY.owner() == "root"
    assert COPY.stat().st_size == answer["bytes"]
    remembered = Path("/var/lib/autobot-slm-database/copy.json")
    assert oct(remembered.stat().st_mode)[-4:] == "0600"
    hidden = [secrets.value("SLM_DB_PASSWORD"), KEY.read_text().split("cipher-pass=")[1].strip()]
    hidden.append(OTHER.read_text().partition("=")[2].strip())
    for text in (COPY.read_bytes().decode("latin-1"), remembered.read_text(), repr(answer)):
        assert not any(one in text for one in hidden)


@pytest.mark.once
def test_an_ssh_key_opens_it_as_well(host, minions, identity, tmp_path):
    """Each recipient alone can."""
    key = tmp_path / "id"
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "the vault", "-f", str(key)]
    subprocess.run(words, check=True)
    public = key.with_suffix(".pub").read_text().strip()
    minion = minions(pillar([identity[1], public]))
    assert minion.call("slmdb_pillar.problems") == []
    assert minion.call("slmdb_backup.copy", str(COPY))["recipients"] == 2
    assert opened((key, None)) == opened(identity)


def test_it_is_known_whether_there_is_one_and_whether_it_is_old(host):
    """None yet, then well, then older than what changed; and what the formula renders is not it."""
    state = host.call("slmdb_backup_copy.state")
    assert state["made"] is None and "no off-host copy yet" in state["problem"]
    made = host.call("slmdb_backup.copy", str(COPY))["made"]
    state = host.call("slmdb_backup_copy.state")
    assert state == {"made": made, "path": str(COPY), "changed": [], "problem": None}
    Path("/etc/postgresql/15/main/conf.d/50-autobot-slm.conf").write_text("")
    assert host.call("slmdb_backup_copy.state")["problem"] is None
    with secrets.FILE.open("a") as stream:
        stream.write("SLM_ENCRYPTION_KEY=new\n")
    HAND_MADE.unlink()
    state = host.call("slmdb_backup_copy.state")
    assert state["changed"] == [str(secrets.FILE), str(HAND_MADE)]
    assert state["problem"].startswith(f"the off-host copy is older than {secrets.FILE} and 1 more")
    host.call("slmdb_backup.copy", str(COPY))
    assert host.call("slmdb_backup_copy.state")["problem"] is None
    Path("/var/lib/autobot-slm-database/copy.json").write_text("[1")
    assert "cannot be read" in host.call("slmdb_backup_copy.state")["problem"]


def test_without_backups_nothing_is_missed(server, minions):
    minions({"slm_database": {"backup": {"enabled": False}}})
    assert server.call("slmdb_backup_copy.state")["problem"] is None


@pytest.mark.parametrize(
    "path, words",
    [
        ("slm-copy.age", "absolute path"),
        ("/srv", "is a directory"),
        ("/srv/none/slm-copy.age", "/srv/none does not exist"),
    ],
)
def test_a_path_that_cannot_be_used(host, path, words):
    with pytest.raises(SaltInvocationError, match=words):
        host.call("slmdb_backup.copy", path)


def test_without_recipients_nothing_is_written(host, minions):
    minion = minions(pillar([]))
    with pytest.raises(SaltInvocationError, match="backup:copy:recipients: is empty"):
        minion.call("slmdb_backup.copy", str(COPY))
    assert not COPY.exists()
    assert "name who can open it" in minion.call("slmdb_backup_copy.state")["problem"]
    assert "age" not in minion.call("slmdb_package.names")


@pytest.mark.once
def test_a_key_that_age_refuses_keeps_the_old_copy(host, minions):
    """A letter that is wrong passes for a key until its checksum is looked at."""
    host.call("slmdb_backup.copy", str(COPY))
    before = COPY.read_bytes()
    minion = minions(pillar(["age1" + "q" * 58]))
    assert minion.call("slmdb_pillar.problems") == []
    with pytest.raises(CommandExecutionError, match="copy:recipients: ") as caught:
        minion.call("slmdb_backup.copy", str(COPY))
    assert "\n" not in str(caught.value)
    assert COPY.read_bytes() == before and list(COPY.parent.glob(".slmdb-*")) == []


def test_a_secret_key_in_pillar_is_refused_and_not_repeated(host, minions):
    secret = "AGE-SECRET-KEY-1" + "Q" * 58
    (line,) = minions(pillar([secret])).call("slmdb_pillar.problems")
    assert "slm_database:backup:copy:recipients:0" in line and "QQQ" not in line


@pytest.mark.once
def test_what_belongs_into_it_must_be_there(host):
    RECORD.unlink()
    with pytest.raises(CommandExecutionError, match=r"settings\.json does not exist; apply"):
        host.call("slmdb_backup.copy", str(COPY))
    assert not COPY.exists()
