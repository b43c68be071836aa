"""The functional layer: the real loader and a real server in a private world without systemd."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import salt.config
from saltfactories.utils.functional import Loaders

from tests.support import world as worlds

CHECKOUT = Path(__file__).resolve().parents[2]


class Minion:
    """Salt in this process, with one pillar."""

    def __init__(self, pillar: dict | None, directory: Path, **options):
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "id": "slm.19",
            "file_client": "local",
            "root_dir": str(directory),
            "cachedir": str(directory / "cache"),
            "pki_dir": str(directory / "pki"),
            "log_file": str(directory / "minion.log"),
            "file_roots": {"base": [str(CHECKOUT)]},
            "pillar_roots": {"base": [str(directory / "pillar")]},
            **options,
        }
        path = directory / "minion"
        path.write_text(salt.utils.yaml.safe_dump(config))
        self.directory = directory
        opts = salt.config.minion_config(str(path), cache_minion_id=False)
        opts["pillar"] = copy.deepcopy(pillar or {})
        self.loaders = _PillarLoaders(opts)

    @property
    def modules(self):
        return self.loaders.modules

    @property
    def states(self):
        return self.loaders.states

    def call(self, function: str, *arguments, **keywords):
        """An execution module's function, as other modules call it."""
        return self.modules[function](*arguments, **keywords)

    def state(self, function: str, name: str = "it", test: bool = False, **keywords):
        """A single state's result."""
        return self.states[function](name=name, test=test, **keywords)


class _PillarLoaders(Loaders):
    """Loaders whose pillar is what the test says."""

    @property
    def pillar(self):
        return copy.deepcopy(self._original_opts["pillar"])


@pytest.fixture(scope="session", autouse=True)
def _private_world():
    worlds.enter()
    worlds.fresh()


@pytest.fixture(scope="module")
def minions(tmp_path_factory):
    """Make a Salt for a pillar: `minions({"slm_database": {...}})`."""
    made = []

    def make(pillar: dict | None = None, **options) -> Minion:
        directory = tmp_path_factory.mktemp("salt")
        made.append(directory)
        return Minion(pillar, directory, **options)

    yield make
    for directory in made:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def bare():
    """A host with PostgreSQL's packages and no instance."""
    worlds.fresh()


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
    minion.call("slmdb_service.start")
    yield minion
    minion.call("slmdb_server.forget")


@pytest.fixture(scope="module")
def shared_server(minions):
    """One running server for all tests of a module that leave no traces."""
    _instance(minions)
    minion = minions()
    minion.call("slmdb_service.start")
    yield minion
    minion.call("slmdb_server.forget")
