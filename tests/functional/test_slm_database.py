"""The whole formula on a host without systemd: what one command makes true, and keeps true."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import world as worlds


def outcomes(run) -> dict:
    """State id to its result, of a whole run."""
    return {chunk["__id__"]: chunk for chunk in run.raw.values()}


def apply(minion, sls: str = "slm_database", **keywords):
    run = minion.call("state.apply", sls, **keywords)
    return outcomes(run)


@pytest.fixture
def host(minions):
    """A bare host and a Salt with an empty pillar."""
    worlds.fresh()
    return minions()


@pytest.fixture
def applied(minions):
    """A host to which the formula was applied, its server running."""
    if "applied" not in worlds.STATE["snapshots"]:
        worlds.fresh()
        minion = minions()
        assert failures(apply(minion)) == {}
        minion.call("slmdb_server.forget")
        minion.call("slmdb_service.stop")
        worlds.keep("applied")
    worlds.fresh("applied")
    minion = minions()
    minion.call("slmdb_service.start")
    return minion


def failures(states: dict) -> dict:
    return {name: one["comment"] for name, one in states.items() if one["result"] is False}


def changed(states: dict) -> set:
    return {name for name, one in states.items() if one["changes"]}


def test_what_test_mode_announces_is_what_changes(host):
    """On a bare host nothing fails, nothing is touched, and the announced set is what changes."""
    announced = apply(host, test=True)
    assert failures(announced) == {}
    assert not host.call("slmdb_instance.facts")["exists"]
    made = apply(host)
    assert failures(made) == {}
    assert changed(made) == changed(announced)
    assert changed(apply(host)) == set()
    assert changed(apply(host, test=True)) == set()


def test_the_socket_answers(applied):
    """The health check of the deployment, letter for letter."""
    command = ["pg_isready", "-U", "autobot_slm", "-d", "autobot_slm"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "/var/run/postgresql:5432 - accepting connections"


def test_health_is_good_after_an_apply(applied):
    """A fresh host without a backend is healthy."""
    report = applied.call("slmdb.health")
    assert (report["healthy"], report["problems"]) == (True, [])
    json.dumps(report)
