"""A maintenance shows on the master's bus, step by step, while it runs."""

from __future__ import annotations

import subprocess

import pytest

from tests.integration.conftest import PATIENT
from tests.integration.test_slm_database import succeeded
from tests.support import world as worlds
from tests.support.salt_daemons import BIN, ENVIRONMENT
from tests.support.wait import until

pytestmark = pytest.mark.once
APPROVED = '{"slm_database": {"maintenance": {"approve": true}}}'


@pytest.fixture
def bus(site):
    """Follow the events of the formula; the answer is what was seen so far."""
    worlds.forget_updates()
    master = site.master("slm.19", pillar=PATIENT)
    path = site.base / "events"
    with path.open("wb") as output:
        events = subprocess.Popen(
            [BIN / "salt-run", "-c", master.directory / "etc", "state.event", "slmdb/*"],
            env=ENVIRONMENT,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
        yield master, path
        events.terminate()
        events.wait()


def seen(path, tag: str) -> str:
    """What is on the bus, once the tag is: the listener is a process of its own."""
    until(lambda: tag in path.read_text())
    return path.read_text()


def test_every_step_is_an_event(bus):
    """What was parked is done, and a master sees each step begin and end."""
    master, path = bus
    succeeded(master.salt("slm.19", "state.apply", "slm_database"), "slm.19")
    settings = master.directory / "pillar" / "settings.sls"
    parked = settings.read_text().replace(
        '"health"', '"settings": {"max_connections": 37}, "health"'
    )
    settings.write_text(parked)
    succeeded(master.salt("slm.19", "state.apply", "slm_database"), "slm.19")
    assert "slmdb/maintenance" not in path.read_text()
    words = ("state.apply", "slm_database.maintenance", f"pillar={APPROVED}")
    assert succeeded(master.salt("slm.19", *words), "slm.19")
    events = seen(path, "slmdb/maintenance/maintenance/done")
    for step in ("restart/begun", "restart/done", "maintenance/done"):
        assert f"slmdb/maintenance/{step}" in events
