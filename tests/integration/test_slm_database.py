"""What an operator types on a master works at the first try, whatever the minion is called."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.integration.conftest import OLD_SALT, PATIENT
from tests.support.salt_daemons import BIN, Answer, run


def succeeded(answer: Answer, minion: str) -> set[str]:
    """The states that changed something, in a run without failures."""
    states = answer.states(minion)
    failed = {one["__id__"]: one["comment"] for one in states if one["result"] is False}
    assert failed == {}
    assert answer.status == 0, answer.text
    return {one["__id__"] for one in states if one["changes"]}


def walk(salt, target: tuple[str, ...], minion: str) -> None:
    """Announce, apply, apply again, announce again, ask for the health."""
    sls = ("state.apply", "slm_database")
    announced = succeeded(salt(*target, *sls, "test=True"), minion)
    assert announced
    assert not Path("/etc/autobot").exists()
    assert succeeded(salt(*target, *sls), minion) == announced
    assert succeeded(salt(*target, *sls), minion) == set()
    assert succeeded(salt(*target, *sls, "test=True"), minion) == set()
    health = salt(*target, "slmdb.health")
    assert health.of(minion)["problems"] == []
    assert health.status == 0


def kill_server() -> None:
    """SIGKILL the postmaster."""
    (pid_file,) = Path("/var/lib/postgresql").glob("*/main/postmaster.pid")
    run("kill", f"-{signal.SIGKILL:d}", pid_file.read_text().split()[0]).check_returncode()


def test_a_minion_that_never_saw_the_formula(site):
    """`salt '*.19'` does everything at the first try; an unhealthy answer has an exit status."""
    master = site.master("slm.19")
    walk(master.salt, ("*.19",), "slm.19")
    kill_server()
    health = master.salt("*.19", "slmdb.health")
    assert health.of("slm.19")["healthy"] is False
    assert health.status != 0


def test_a_minion_whose_id_is_a_dot_and_a_number(site):
    """`salt -L '.19'` reaches it on 3008; on 3006 nothing does, but the minion can apply."""
    master = site.master(".19")
    assert "No minions matched" in master.salt(".19", "test.ping").text
    if not OLD_SALT:
        walk(master.salt, ("-L", ".19"), ".19")
        return
    assert "No minions matched" in master.salt("-L", ".19", "test.ping").text
    config = site.base / "minion0" / "etc"
    options = ("--config-dir", config, "--out=json", "--retcode-passthrough")

    def salt_call(*words: str) -> Answer:
        return Answer(run(BIN / "salt-call", *options, *words))

    walk(salt_call, (), "local")


@pytest.mark.parametrize("target", [("*.19",), ("-L", ".19")])
def test_salt_ssh_reaches_that_name(site, target):
    """A roster's `.19` is found by list and by glob."""
    assert site.salt_ssh(".19")(*target, "test.ping").of(".19") is True


def test_salt_ssh_applies_at_the_first_try(site):
    """Nothing of Salt is on the host before; after it a window can be looked at as well."""
    salt_ssh = site.salt_ssh(".19")
    walk(salt_ssh, ("-L", ".19"), ".19")
    window = salt_ssh("-L", ".19", "slmdb_window.spans", "['Sun 02:00-04:00']", "1767225600")
    assert window.of(".19")["next"] > 1767225600, window.text


def test_a_mistake_in_the_masters_pillar_touches_nothing(site):
    """Every mistake is told in one line with its path, the run fails, the host stays as it is."""
    pillar = {"slm_database": {"port": 70000, "hbaa": {}}}
    answer = site.master("slm.19", pillar=pillar).salt("*.19", "state.apply", "slm_database")
    assert answer.status != 0
    states = answer.states("slm.19")
    assert not any(one["changes"] for one in states)
    comments = "\n".join(one["comment"] for one in states)
    assert "slm_database:port" in comments
    assert "slm_database:hbaa" in comments
    assert not Path("/etc/autobot").exists()


def test_a_report_after_a_run_judges_by_the_pillar_of_that_run(site):
    """A minion keeps a pillar in memory, and a run gets the newer one; nobody has to refresh it."""
    master = site.master("slm.19")

    def write(settings):
        pillar = {"slm_database": {**PATIENT["slm_database"], **settings}}
        (master.directory / "pillar" / "settings.sls").write_text(json.dumps(pillar))

    def work_mem():
        return master.salt("*.19", "slmdb_pillar.get", "settings", "work_mem").of("slm.19")

    succeeded(master.salt("*.19", "state.apply", "slm_database"), "slm.19")
    write({"settings": {"work_mem": "5MB"}})
    master.salt("*.19", "state.apply", "slm_database", "test=True")
    succeeded(master.salt("*.19", "state.apply", "slm_database"), "slm.19")
    limit = time.monotonic() + 90
    while work_mem() != "5MB" and time.monotonic() < limit:
        time.sleep(1)
    assert work_mem() == "5MB"
    report = master.salt("*.19", "slmdb.health", "timeout=30").of("slm.19")
    assert report["healthy"], report["problems"]
