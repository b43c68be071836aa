"""A maintenance's steps: what needs no server to be seen."""

from __future__ import annotations

import pytest
from salt.exceptions import CommandExecutionError

from _modules import slmdb_maintenance as maintenance

FULL = OSError(28, "No space left on device", "/var/lib/somewhere")


@pytest.mark.parametrize("error", [FULL, CommandExecutionError("no room")])
def test_whatever_ends_a_step_the_server_is_looked_after(monkeypatch, error):
    """An error of the system is one of a step like every other."""

    def fails(job):
        raise error

    told = []
    functions = {
        "slmdb_event.tell": lambda *what: told.append(what[2]),
        "slmdb_server.available": lambda: True,
    }
    monkeypatch.setattr(maintenance, "__salt__", functions, raising=False)
    monkeypatch.setattr(maintenance, "STEPS", {"backup": fails})
    job = {"done": {}, "failed": None}
    assert maintenance._do(job, "backup") is False
    assert job["failed"]["server"] == "the server is up"
    assert str(error) == job["failed"]["comment"]
    assert told == ["begun", "failed"]
