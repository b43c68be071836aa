"""Debian hosts that are booted for a test, and gone after it."""

from __future__ import annotations

import shutil

import pytest

from tests.support import host as hosts
from tests.support.network import Switch

RELEASES = ["bookworm", "trixie"]


@pytest.fixture(scope="session")
def switch():
    """Everything that is booted, and its neighbours, are plugged into one switch."""
    made = Switch()
    yield made
    made.close()


@pytest.fixture(scope="session")
def boot(switch):
    """Start a host from layers; whoever calls closes it."""

    def start(layers):
        made = hosts.Host(layers, switch)
        try:
            return made.start()
        except BaseException:
            made.close()
            raise

    return start


@pytest.fixture(scope="session")
def applied_layers(boot):
    """Apply the formula once per release: the layer that other hosts start from."""
    kept = []
    layers = {}

    def made(release):
        if release not in layers:
            below = hosts.prepared(release)
            host = boot(below)
            try:
                host.run(f"{host.push_formula()}/bin/apply", timeout=600)
                host.stop()
                upper = hosts.workspace() / f"{host.name}-applied"
                (host.directory / "upper").rename(upper)
                # Without these no host makes up at boot for a time that passed since.
                shutil.rmtree(upper / "var/lib/systemd/timers", ignore_errors=True)
                kept.append((upper, hosts.hold(upper)))
            finally:
                host.close()
            layers[release] = [upper, *below]
        return layers[release]

    yield made
    for upper, lock in kept:
        shutil.rmtree(upper, ignore_errors=True)
        lock.close()


@pytest.fixture(params=RELEASES)
def release(request):
    return request.param


@pytest.fixture
def prepared_host(release, boot):
    """A host with Salt and the packages at hand, no database yet."""
    host = boot(hosts.prepared(release))
    host.push_formula()
    yield host
    host.close()


@pytest.fixture
def applied_host(release, boot, applied_layers):
    """A host on which the formula was applied and that was booted since."""
    host = boot(applied_layers(release))
    yield host
    host.close()
