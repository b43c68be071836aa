"""A host that was lost: the copy is opened, the data restored, or one line says why not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.support import backups, secrets
from tests.support import world as worlds

REPOSITORY = Path("/var/lib/pgbackrest")
KEY = Path("/etc/pgbackrest/autobot-slm/key.conf")
MARK = Path("/var/lib/autobot-slm-database/recovery.json")
DATA = Path("/var/lib/postgresql/15/main")
HAND_MADE = Path("/etc/postgresql/15/main/conf.d/10-mine.conf")


class Lost:
    """What is left of a host: a directory that holds the repository, the copy and its key."""

    def __init__(self, directory: Path, **told):
        self.directory = directory
        self.copy, self.identity = directory / "copy.age", directory / "identity.txt"
        subprocess.run(["age-keygen", "-o", str(self.identity)], check=True, capture_output=True)
        words = ["age-keygen", "-y", str(self.identity)]
        public = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        backup = {"copy": {"recipients": [public]}, **told}
        self.pillar = {"slm_database": {"port": 5444, "backup": backup}}
        self.password = self.identifier = None

    def bring_repository(self, place=REPOSITORY, name="repository"):
        """As rsync or a mount would, with the numbers of other accounts."""
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run(["cp", "-a", str(self.directory / name), place], check=True)
        subprocess.run(["chown", "-R", "4711:4711", str(place)], check=True)


@pytest.fixture(scope="module")
def lost(minions, tmp_path_factory):
    """A host is applied, backed up, written to, copied, and gone."""
    return lose(minions, Lost(tmp_path_factory.mktemp("lost")))


def lose(minions, told, kept=REPOSITORY, before=lambda: None, other=None):
    """Let a host live and die; of its repositories one is kept, or another one as well."""
    worlds.fresh()
    before()
    secrets.write(secrets.FOREIGN)
    minion = minions(told.pillar, id="lost.19")
    whole_formula(minion)
    HAND_MADE.write_text("log_min_duration_statement = 250\n")
    execute(minion, "CREATE TABLE log (entry text); INSERT INTO log VALUES ('before the backup')")
    minion.call("slmdb_backup.create", "full")
    execute(minion, "INSERT INTO log VALUES ('after the backup')")
    for _ in range(2):  # so that the last segment but one holds nothing of the backup
        minion.call("slmdb_backup.settle")
    minion.call("slmdb_backup.copy", str(told.copy))
    told.password = secrets.value("SLM_DB_PASSWORD")
    told.identifier = minion.call("slmdb_instance.system_identifier")
    minion.call("slmdb_server.forget")
    minion.call("slmdb_service.stop")
    shutil.copytree(kept, told.directory / "repository", symlinks=True)
    if other:
        shutil.copytree(other, told.directory / "other", symlinks=True)
    shutil.copytree(KEY.parent, told.directory / "key")
    return told


@pytest.fixture
def other(lost, minions):
    """Another host: bare but for the packages, with the repository and the pillar."""
    worlds.fresh()
    shutil.rmtree("/etc/pgbackrest/autobot-slm", ignore_errors=True)
    lost.bring_repository()
    minion = minions(lost.pillar, id="lost.19")
    yield minion
    minion.call("slmdb_server.forget")


def execute(minion, statements):
    for statement in statements.split("; "):
        minion.call("slmdb_server.execute", statement, database="autobot_slm")


def entries(minion):
    query = "SELECT entry FROM log ORDER BY 1"
    return [
        row["entry"] for row in minion.call("slmdb_server.query", query, database="autobot_slm")
    ]


def whole_formula(minion, sls="slm_database"):
    chunks = minion.call("state.apply", sls).raw.values()
    assert [one["comment"] for one in chunks if one["result"] is False] == []
    return {one["__id__"] for one in chunks if one["changes"]}


def failures(minion, sls="slm_database.recovery"):
    """The first failed state's line; the others waited for it."""
    chunks = minion.call("state.apply", sls).raw.values()
    lines = [one["comment"] for one in chunks if one["result"] is False]
    return [line for line in lines if "requisite" not in line]


def unpack(minion, lost):
    return minion.call("slmdb_recovery.unpack", str(lost.copy), str(lost.identity))


def test_everything_is_back(other, lost):
    """Database, password, the backend's own secrets, configuration; and backups go on."""
    told = unpack(other, lost)
    assert (told["instance"], told["pillar"]) == ("15/main", None)
    assert told["settings"]["port"] == 5444
    changed = whole_formula(other, "slm_database.recovery")
    assert "The data is restored from the repository" in changed
    assert "The instance exists" not in changed
    assert entries(other) == ["after the backup", "before the backup"]
    assert secrets.value("SLM_DB_PASSWORD") == lost.password
    assert secrets.FOREIGN in secrets.FILE.read_bytes()
    assert secrets.log_in(lost.password, port=5444)
    assert HAND_MADE.read_text() == "log_min_duration_statement = 250\n"
    assert other.call("slmdb_instance.system_identifier") == lost.identifier
    health = other.call("slmdb.health", timeout=15)
    assert (health["healthy"], health["problems"]) == (True, [])
    assert not MARK.exists()
    assert other.call("slmdb_backup.create")["type"] == "incremental"
    assert other.call("slmdb_backup.verify")["right"] is True
    assert whole_formula(other, "slm_database.recovery") == set()
    assert unpack(other, lost)["files"] == []
    execute(other, "INSERT INTO log VALUES ('afterwards')")
    other.call("slmdb_backup.settle")


def test_what_is_announced(other, lost):
    """Without a change, that the data would be restored; again after that, nothing."""
    unpack(other, lost)
    announced = other.state("slmdb_recovery.restored", test=True)
    assert announced.result is None and not DATA.exists()
    made = other.state("slmdb_recovery.restored")
    assert (made.result, made.changes) == (True, announced.changes)
    assert made.comment == "Changed."
    assert other.state("slmdb_recovery.restored").changes == {}


@pytest.mark.once
@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_archived_wal_that_cannot_be_replayed_is_told(other, lost, how):
    """What can be had is there, and one line says from where on nothing is."""
    segments = sorted(REPOSITORY.glob("archive/*/*/*/0*.zst"))
    victim = segments[-1] if how == "damaged" else segments[-2]
    before = victim.read_bytes()
    if how == "damaged":
        backups.flip(victim)
    else:
        victim.unlink()
    unpack(other, lost)
    made = other.state("slmdb_recovery.restored")
    assert made.result is True
    (line,) = made.warnings
    assert line in made.comment and victim.name[:24] in line
    expected = "is damaged: " if how == "damaged" else "is missing; what was committed after"
    assert expected in line
    victim.write_bytes(before)
    whole_formula(other)
    assert entries(other)[-1] == "before the backup"


def test_all_wal_is_replayed_before_the_server_is_ours(other, lost):
    """Not only begun: the server is whole when it is stopped, and takes a write when it starts."""
    unpack(other, lost)
    assert other.state("slmdb_recovery.restored").result is True
    words = ["/usr/lib/postgresql/15/bin/pg_controldata", str(DATA)]
    said = subprocess.run(words, check=True, capture_output=True, text=True, env={"LC_ALL": "C"})
    state = next(line for line in said.stdout.splitlines() if "cluster state" in line)
    assert state.endswith(" shut down")
    assert not (DATA / "recovery.signal").exists()


@pytest.mark.once
def test_a_run_of_the_formula_makes_no_empty_instance_meanwhile(other, lost):
    """Between the two steps the ordinary run stops."""
    unpack(other, lost)
    (line,) = failures(other, "slm_database.instance")
    assert "holds no data; mount it if a mount is missing, or state.apply slm_database.rec" in line
    assert not DATA.exists()


@pytest.mark.once
def test_who_decides_for_an_empty_instance_gets_it(other, lost):
    """The recovery that was begun is forgotten, and does not overwrite it later."""
    unpack(other, lost)
    shutil.rmtree("/etc/postgresql/15")
    other.call("slmdb_instance.apply")
    assert not MARK.exists()
    assert other.state("slmdb_recovery.restored").changes == {}
    assert other.call("slmdb_instance.system_identifier") != lost.identifier


@pytest.mark.once
@pytest.mark.parametrize("progress", ["files", "replayed", "running"])
def test_what_was_interrupted_is_repeated(other, lost, progress):
    """In the middle of the files; after the WAL, before it was noted; with the server left over."""
    unpack(other, lost)
    mark = MARK.read_bytes()
    assert other.state("slmdb_recovery.restored").result is True
    MARK.write_bytes(mark)
    if progress == "files":
        (DATA / "global/pg_control").unlink()
        for path in (DATA / "base").rglob("1*"):
            if path.is_file():
                path.unlink()
    if progress == "running":
        log = "/var/log/postgresql/left.log"
        options = f"-c config_file=/etc/postgresql/15/main/postgresql.conf -k {DATA}"
        words = ["/usr/lib/postgresql/15/bin/pg_ctl", "start", "-w", "-D", str(DATA), "-l", log]
        command = ["runuser", "-u", "postgres", "--", *words, "-o", options]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)
    whole_formula(other, "slm_database.recovery")
    assert entries(other) == ["after the backup", "before the backup"]
    assert not MARK.exists()


@pytest.mark.once
def test_another_instance_is_not_covered(other, lost):
    """A host that has data of its own keeps it, and no file is written."""
    other.call("slmdb_instance.apply")
    before = other.call("slmdb_instance.system_identifier")
    with pytest.raises(CommandExecutionError, match="an instance 15/main with other data"):
        unpack(other, lost)
    assert not secrets.FILE.exists() and not KEY.exists() and not MARK.exists()
    assert other.state("slmdb_recovery.restored").changes == {}
    assert other.call("slmdb_instance.system_identifier") == before


@pytest.mark.once
def test_another_secret_file_is_not_covered(other, lost):
    secrets.write(b"SLM_DB_PASSWORD=another\n")
    with pytest.raises(CommandExecutionError, match="is not as in the copy"):
        unpack(other, lost)
    assert secrets.FILE.read_bytes() == b"SLM_DB_PASSWORD=another\n"
    assert not KEY.exists() and not MARK.exists()


@pytest.mark.once
def test_a_copy_that_cannot_be_opened(other, lost, tmp_path):
    """Another key, another file, no file: one line, and nothing is written."""
    stranger = tmp_path / "stranger.txt"
    subprocess.run(["age-keygen", "-o", str(stranger)], check=True, capture_output=True)
    call = other.call
    with pytest.raises(CommandExecutionError, match="cannot be opened with") as caught:
        call("slmdb_recovery.unpack", str(lost.copy), str(stranger))
    assert "\n" not in str(caught.value)
    with pytest.raises(SaltInvocationError, match="identity: there is no file"):
        call("slmdb_recovery.unpack", str(lost.copy), "/srv/none")
    public = other.call("slmdb_pillar.get", "backup", "copy", "recipients")[0]
    foreign = tmp_path / "foreign.age"
    subprocess.run(["age", "-r", public, "-o", str(foreign)], input=b"no tar", check=True)
    with pytest.raises(CommandExecutionError, match="is no copy that slmdb_backup"):
        call("slmdb_recovery.unpack", str(foreign), str(lost.identity))
    assert not secrets.FILE.exists() and not MARK.exists()


@pytest.mark.once
def test_a_repository_whose_key_is_lost(other):
    """One line that says so; no key is made, no instance either."""
    (line,) = failures(other)
    assert "is encrypted and its key" in line and str(KEY) in line
    assert not KEY.exists() and not DATA.exists()


@pytest.mark.once
def test_a_repository_with_another_key(other, lost):
    unpack(other, lost)
    KEY.write_text("[global]\nrepo1-cipher-pass=another\n")
    (line,) = failures(other)
    assert "is not the key that it was made with" in line
    assert not DATA.exists()


@pytest.mark.once
def test_no_repository(other, lost):
    unpack(other, lost)
    shutil.rmtree(REPOSITORY)
    (line,) = failures(other)
    assert f"no repository of ours in {REPOSITORY}; bring" in line
    assert not DATA.exists() and not REPOSITORY.exists()


@pytest.mark.once
def test_without_a_copy_a_new_password_is_made_only_if_pillar_says_so(other, lost):
    """The repository and its key bring the data; the password, and no more, is made anew."""
    shutil.copytree(lost.directory / "key", KEY.parent)
    (line,) = failures(other)
    assert "slm_database:secret:allow_new" in line
    assert not secrets.FILE.exists()
    settings = lost.pillar["slm_database"]
    other.tell({"slm_database": {**settings, "secret": {"allow_new": True}}})
    whole_formula(other, "slm_database.recovery")
    assert entries(other) == ["after the backup", "before the backup"]
    password = secrets.value("SLM_DB_PASSWORD")
    assert secrets.log_in(password, port=5444) and password != lost.password
    warnings = other.call("slmdb.health", timeout=15)["warnings"]
    assert any("SLM_ENCRYPTION_KEY" in line and "lost" in line for line in warnings)
    assert whole_formula(other, "slm_database.recovery") == set()


@pytest.mark.once
def test_settings_have_to_come_from_somewhere(other, lost, minions):
    """Pillar that says nothing of us, and a top file that is the operator's: no guess is made."""
    minion = minions(id="lost.19")
    with pytest.raises(CommandExecutionError, match="the lost one had backup, port: "):
        unpack(minion, lost)
    assert not secrets.FILE.exists()
