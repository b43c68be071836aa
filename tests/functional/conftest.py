"""The functional layer: the real loader and a real server in a private world without systemd."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest
import salt.config
from saltfactories.utils.functional import Loaders

from tests.support import world as worlds

CHECKOUT = Path(__file__).resolve().parents[2]


class Minion:
    """Salt in this process; making one is slow, giving it another pillar is not."""

    def __init__(self, directory: Path, **options):
        self.directory = directory
        self._pillar = directory / "pillar"
        self._pillar.mkdir(parents=True)
        self._write(None)
        config = {
            "id": "slm.19",
            "file_client": "local",
            "root_dir": str(directory),
            "cachedir": str(directory / "cache"),
            "pki_dir": str(directory / "pki"),
            "log_file": str(directory / "minion.log"),
            "file_roots": {"base": [str(CHECKOUT)]},
            "pillar_roots": {"base": [str(self._pillar)]},
            **options,
        }
        path = directory / "minion"
        path.write_text(json.dumps(config))
        opts = salt.config.minion_config(str(path), cache_minion_id=False)
        self.loaders = Loaders(opts)
        self.modules, self.states = self.loaders.modules, self.loaders.states

    def _write(self, pillar: dict | None) -> None:
        (self._pillar / "top.sls").write_text(json.dumps({"base": {"*": ["slm"]}}))
        (self._pillar / "slm.sls").write_text(json.dumps(pillar or {}))

    def tell(self, pillar: dict | None) -> Minion:
        """Give another pillar, and forget what was cached of the last run."""
        # Salt takes an empty pillar for one that is missing, and goes on with the one before.
        pillar = pillar or {"another_formula": {}}
        self._write(pillar)
        self.modules["slmdb_server.forget"]()
        self.loaders.context.clear()
        for told in (self.loaders.opts["pillar"], self.modules.pack["__pillar__"]):
            for key in list(told):  # Salt's proxy of a dictionary does not clear()
                del told[key]
            told.update(copy.deepcopy(pillar or {}))
        return self

    def call(self, function: str, *arguments, **keywords):
        """An execution module's function, as other modules call it."""
        return self.modules[function](*arguments, **keywords)

    def state(self, function: str, name: str = "it", test: bool = False, **keywords):
        """A single state's result."""
        return self.states[function](name=name, test=test, **keywords)


MADE: dict[str, Minion] = {}


@pytest.fixture(scope="session", autouse=True)
def _private_world():
    worlds.enter()
    worlds.fresh()


@pytest.fixture(scope="session")
def minions(tmp_path_factory):
    """Give a Salt with a pillar, as `minions({"slm_database": {…}})`; one per set of options."""

    def give(pillar: dict | None = None, **options) -> Minion:
        key = json.dumps(options, sort_keys=True)
        if key not in MADE:
            MADE[key] = Minion(tmp_path_factory.mktemp("salt"), **options)
        return MADE[key].tell(pillar)

    return give


@pytest.fixture
def bare():
    """A host with PostgreSQL's packages and no instance."""
    worlds.fresh()


def start_server(minion: Minion) -> None:
    """What `pg_ctlcluster start` does, without its two seconds of patience."""
    found = minion.call("slmdb_instance.facts")
    program = [f"{found['bin_directory']}/pg_ctl", "-D", found["data_directory"], "-w", "-s"]
    program += [
        "-o",
        f"-c config_file={found['config_file']}",
        "-l",
        "/var/log/postgresql/test.log",
    ]
    subprocess.run(["runuser", "-u", "postgres", "--", *program, "start"], check=True, cwd="/")


def _instance(minions) -> None:
    """A world with an instance that was made but never started, kept for all modules."""
    if "instance" not in worlds.STATE["snapshots"]:
        worlds.fresh()
        minions().call("slmdb_instance.apply")
        worlds.keep("instance")
    worlds.fresh("instance")


@pytest.fixture
def instance(minions):
    """A host with a new instance, stopped."""
    _instance(minions)


@pytest.fixture
def server(minions):
    """A host with a new instance, running, and a Salt with an empty pillar to ask it with."""
    _instance(minions)
    minion = minions()
    start_server(minion)
    yield minion
    minion.call("slmdb_server.forget")


@pytest.fixture(scope="module")
def shared_server(minions):
    """One running server for all tests of a module that leave no traces."""
    _instance(minions)
    minion = minions()
    start_server(minion)
    yield minion
    minion.call("slmdb_server.forget")
