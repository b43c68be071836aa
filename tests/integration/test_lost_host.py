"""A host behind a master is lost, and the commands of the guide bring it back."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import PATIENT
from tests.integration.test_slm_database import succeeded
from tests.support import documents

pytestmark = pytest.mark.once
GUIDE = documents.CHECKOUT / "docs/backup.md"
LOST = ("/etc/autobot", "/etc/pgbackrest/autobot-slm", "/var/lib/autobot-slm-database")
SECRETS = Path("/etc/autobot/slm-secrets.env")
QUERY = "SELECT entry FROM log ORDER BY 1"


@pytest.fixture
def home():
    """A home directory of this test, with the secret key in it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "tmpfs", "/root"], check=True)
    words = ["age-keygen", "-o", "/root/identity.txt"]
    subprocess.run(words, check=True, capture_output=True)
    yield
    subprocess.run(["umount", "--lazy", "/root"], check=True)


@pytest.fixture
def master(site, home):
    """A master, and a minion that is backed up; the copy is where the guide has it."""
    words = ["age-keygen", "-y", "/root/identity.txt"]
    public = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    settings = {**PATIENT["slm_database"], "backup": {"copy": {"recipients": [public]}}}
    made = site.master("slm.19", pillar={"slm_database": settings})
    succeeded(made.salt("slm.19", "state.apply", "slm_database"), "slm.19")
    for words in (
        ("slmdb_server.execute", "CREATE TABLE log (entry text)"),
        ("slmdb_backup.create", "full"),
        ("slmdb_server.execute", "INSERT INTO log VALUES ('after the backup')"),
        ("slmdb_backup.copy", "/root/slm-copy.age"),
        ("slmdb_backup.settle",),
    ):
        answer = made.salt("slm.19", *words)
        assert answer.status == 0, answer.text
    return made


def test_a_lost_host_comes_back(master):
    """Data, secrets and settings are there again; a run after it changes nothing."""
    secrets = SECRETS.read_bytes()
    subprocess.run(["pg_ctlcluster", "15", "main", "stop", "-m", "immediate"], check=True)
    subprocess.run(["pg_dropcluster", "15", "main"], check=True)
    for path in LOST:
        shutil.rmtree(path)
    typed = documents.commands(GUIDE, "lost behind a master")
    assert len(typed) == 3
    for command in typed:
        answer = master.salt(*shlex.split(command)[1:], output="nested")
        assert answer.status == 0, answer.text
    assert SECRETS.read_bytes() == secrets
    rows = master.salt("slm.19", "slmdb_server.query", QUERY).of("slm.19")
    assert rows == [{"entry": "after the backup"}]
    assert succeeded(master.salt("slm.19", "state.apply", "slm_database"), "slm.19") == set()
    assert master.salt("slm.19", "slmdb.health").of("slm.19")["problems"] == []
