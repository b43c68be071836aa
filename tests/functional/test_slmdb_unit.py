"""What our unit says; that systemd obeys it is seen on booted hosts."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

UNIT = Path("/etc/systemd/system/autobot-slm-database.service")


@pytest.mark.parametrize(
    ("addresses", "waits"),
    [
        (["127.0.0.1", "::1", "localhost", "127.0.0.2"], False),
        (["*"], False),
        (["0.0.0.0", "::"], False),
        (["127.0.0.1", "192.0.2.19"], True),
        (["2001:db8::19", "localhost"], True),
    ],
)
def test_a_server_that_needs_an_address_waits_for_it_at_boot(instance, minions, addresses, waits):
    """As PostgreSQL's documentation has it; loopback, and all there will be, are always there."""
    Path("/run/systemd/system").mkdir(parents=True)
    pillar = {"listen_addresses": addresses, "allow_remote": True}
    minion = minions({"slm_database": pillar})
    # No systemd is there to read it.
    with contextlib.suppress(CommandExecutionError):
        minion.call("slmdb_unit.apply")
    lines = UNIT.read_text().splitlines()
    assert "After=network.target" in lines
    assert ("After=network-online.target" in lines) is waits
    assert ("Wants=network-online.target" in lines) is waits
