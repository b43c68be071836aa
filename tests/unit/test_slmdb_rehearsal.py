"""The scratch instance: what needs no server to be seen."""

from __future__ import annotations

import subprocess

from _modules import slmdb_rehearsal as rehearsal


def test_a_scratch_server_that_is_stuck_is_ended(monkeypatch):
    """Nothing that a configuration does to a session can hold up a run for ever."""
    monkeypatch.setattr(rehearsal, "PATIENCE", 0.1)
    with subprocess.Popen(["sleep", "100"]) as server, rehearsal._watched(server) as late:
        server.wait(20)
    assert late.is_set()


def test_one_that_answers_is_left_alone(monkeypatch):
    monkeypatch.setattr(rehearsal, "PATIENCE", 30)
    with subprocess.Popen(["sleep", "0.1"]) as server:
        with rehearsal._watched(server) as late:
            pass
        assert server.wait(20) == 0
    assert not late.is_set()
