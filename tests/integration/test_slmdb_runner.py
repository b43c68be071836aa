"""What timers call works on a host whose master, minion and salt-ssh are gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.test_slm_database import succeeded
from tests.support.salt_daemons import run, write_pillar

RUN = "/var/lib/autobot-slm-database/formula/current/run"
PILLAR = {"slm_database": {"backup": {"enabled": True}, "health": {"timeout": 30}}}


@pytest.mark.parametrize("way", ["master", "salt-ssh"])
def test_a_job_needs_nothing_of_who_applied(site, way):
    """The copy of the modules, and with salt-ssh that of its Salt, are enough for a backup."""
    if way == "master":
        salt = site.master("slm.19", pillar=PILLAR).salt
        target, name = ("*.19",), "slm.19"
    else:
        salt = site.salt_ssh("slm.19")
        shutil.rmtree(salt.directory / "pillar")
        write_pillar(salt.directory / "pillar", PILLAR)
        target, name = ("*.19",), "slm.19"
    assert "Timers have a copy of the modules" in succeeded(
        salt(*target, "state.apply", "slm_database"), name
    )
    assert succeeded(salt(*target, "state.apply", "slm_database"), name) == set()
    shutil.rmtree(site.base, ignore_errors=True)
    answer = run("sh", RUN, "slmdb_backup.create", "--out=json", "--out-file=/opt/made")
    assert (answer.returncode, answer.stdout) == (0, ""), answer.stderr
    assert json.loads(Path("/opt/made").read_text())["local"]["type"] == "full"
    health = run("sh", RUN, "slmdb.health")
    assert health.returncode == 0, health.stderr
