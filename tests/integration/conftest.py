"""The integration layer: a real master, real minions and salt-ssh in a private world."""

from __future__ import annotations

from pathlib import Path

import pytest
import salt.version

from tests.support import world as worlds
from tests.support.salt_daemons import Master, Minion, copy_formula
from tests.support.ssh_host import SaltSsh, SshHost

# The machine that runs the tests is busy with others: the reports may take their time.
PATIENT = {"slm_database": {"health": {"timeout": 30}}}
OLD_SALT = salt.version.__version__.startswith("3006")


@pytest.fixture(scope="session", autouse=True)
def _private_world():
    worlds.enter()


class Site:
    """A bare host in a fresh world, and the places of the daemons in it."""

    def __init__(self):
        worlds.fresh()
        self.base = Path("/srv/site")
        self.base.mkdir()
        self.formula = copy_formula(self.base / "formula")

    def master(self, *minions: str, pillar: dict = PATIENT) -> Master:
        """Start a master and minions, and wait until it can use them."""
        master = Master(self.base / "master", self.formula, pillar)
        started = [
            Minion(self.base / f"minion{number}", name) for number, name in enumerate(minions)
        ]
        for minion in started:
            minion.wait()
        return master

    def salt_ssh(self, name: str) -> SaltSsh:
        """Start an SSH server and return a salt-ssh whose roster has it under a name."""
        host = SshHost(self.base / "ssh")
        return SaltSsh(self.base / "salt-ssh", name, host, self.formula, PATIENT)


@pytest.fixture
def site():
    """A bare host with PostgreSQL's packages, no instance and no Salt running."""
    return Site()
