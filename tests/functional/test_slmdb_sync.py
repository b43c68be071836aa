"""A run without a master has the formula's modules as they are now, though it seldom syncs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import probe
from tests.support import world as worlds

CHECKOUT = Path(__file__).resolve().parents[2]
SALT_CALL = Path(sys.executable).parent / "salt-call"


class Minion:
    """salt-call without a master, on a copy of the formula."""

    def __init__(self, directory: Path):
        worlds.fresh()
        self.formula, self.directory = directory / "formula", directory
        for name in ("_modules", "_states", "slm_database"):
            shutil.copytree(CHECKOUT / name, self.formula / name)
        config = {
            "id": "slm.19",
            "root_dir": str(directory),
            "cachedir": str(directory / "cache"),
            "extension_modules": str(directory / "extmods"),
            "file_client": "local",
            "fileserver_list_cache_time": 0,
            "file_roots": {"base": [str(self.formula)]},
            "pillar_roots": {"base": []},
        }
        (directory / "minion").write_text(json.dumps(config))

    def publish(self, version):
        """Another version that looks no newer: the same names and sizes, an older time."""
        for path in probe.publish(self.formula, version):
            os.utime(path, (1_700_000_000 - version, 1_700_000_000 - version))

    def call(self, *words):
        command = [SALT_CALL, "-c", self.directory, "--local", "--out=json", "-l", "error", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)["local"]

    def told(self, *words):
        states = self.call("state.apply", "slm_database.probe", *words)
        return {one["__id__"]: one["comment"] for one in states.values()}["The probe is told"]


@pytest.fixture
def minion(tmp_path):
    return Minion(tmp_path)


@pytest.mark.parametrize("words", [(), ("test=True",)], ids=["in earnest", "test"])
def test_a_changed_formula_is_used_at_once(minion, words):
    """At the first run of all and after every change, also one that only the kernel noticed."""
    minion.publish(1)
    assert minion.told(*words) == "state 1, module 1"
    assert minion.call("slmdb_sync.current") is True
    minion.publish(2)
    assert minion.call("slmdb_sync.current") is False
    assert minion.told(*words) == "state 2, module 2"
    assert minion.told(*words) == "state 2, module 2"


def test_a_copy_that_somebody_changed_is_brought_back(minion):
    """Drift in Salt's own copy of the modules is seen, and so is a copy that is missing."""
    minion.publish(1)
    minion.told()
    copy = minion.directory / "extmods" / "modules" / "slmdb_probe.py"
    copy.write_text(probe.MODULE % {"version": 7})
    assert minion.told() == "state 1, module 1"
    copy.unlink()
    assert minion.told() == "state 1, module 1"


def test_a_sync_that_was_interrupted_is_made_up_for(minion):
    """Half of the modules are of another version, which lacks what the new ones call."""
    minion.publish(1)
    minion.told()
    copy = minion.directory / "extmods" / "modules" / "slmdb_file.py"
    copy.write_text('def __virtual__():\n    return "slmdb_file"\n')
    assert minion.call("slmdb_sync.current") is False
    assert minion.told() == "state 1, module 1"
    assert copy.read_text() == (minion.formula / "_modules" / "slmdb_file.py").read_text()


def test_what_the_formula_dropped_is_gone(minion):
    """A module that is no longer in the formula is no longer on the host."""
    minion.publish(1)
    minion.told()
    extra = minion.formula / "_modules" / "slmdb_extra.py"
    extra.write_text(probe.MODULE % {"version": 1})
    minion.told()
    copy = minion.directory / "extmods" / "modules" / "slmdb_extra.py"
    assert copy.exists()
    extra.unlink()
    minion.told()
    assert not copy.exists()


def test_a_quiet_run_does_not_sync(minion):
    """The copies of a sync are left alone, the file server's included, when nothing changed."""
    minion.publish(1)
    minion.told()
    synced = minion.directory / "cache" / "files" / "base" / "_modules"
    shutil.rmtree(synced, ignore_errors=True)
    minion.told()
    assert not synced.exists()
