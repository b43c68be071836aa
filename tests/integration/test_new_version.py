"""A changed formula on the master is used throughout the next run."""

from __future__ import annotations

import pytest

from tests.support.probe import publish


def told(salt, target, minion, *arguments):
    """What the probe says in a run."""
    answer = salt(*target, "state.apply", "slm_database.probe", *arguments)
    return answer.states(minion)[-1]["comment"]


@pytest.mark.parametrize("first", [(), ("test=True",)], ids=["in earnest", "test"])
def test_a_minion_uses_the_new_modules(site, first):
    """The first run of a version has its modules, states included, in test mode as well."""
    publish(site.formula, 1)
    master = site.master("slm.19")
    assert told(master.salt, ("*.19",), "slm.19", *first) == "state 1, module 1"
    publish(site.formula, 2)
    assert told(master.salt, ("*.19",), "slm.19", *first) == "state 2, module 2"
    assert told(master.salt, ("*.19",), "slm.19") == "state 2, module 2"
    assert master.salt("*.19", "slmdb_probe.version").of("slm.19") == "2"


def test_salt_ssh_uses_the_new_modules(site):
    """What was shipped before is replaced."""
    publish(site.formula, 1)
    salt_ssh = site.salt_ssh("slm.19")
    assert told(salt_ssh, ("*.19",), "slm.19", "test=True") == "state 1, module 1"
    publish(site.formula, 2)
    assert told(salt_ssh, ("*.19",), "slm.19") == "state 2, module 2"


def test_a_report_stands_by_what_the_last_run_was_told(site):
    """It does not ask the master for the defaults, unless the modules are others since."""
    publish(site.formula, 1)
    master = site.master("slm.19")
    told(master.salt, ("*.19",), "slm.19")
    path = site.formula / "slm_database" / "defaults.yaml"
    path.write_text(path.read_text().replace("length: 43", "length: 44"))
    assert "length: 44" in path.read_text()

    def length():
        return master.salt("*.19", "slmdb_pillar.get", "secret", "length").of("slm.19")

    assert length() == 43
    told(master.salt, ("*.19",), "slm.19", "test=True")
    assert length() == 44
    path.write_text(path.read_text().replace("length: 44", "length: 45"))
    publish(site.formula, "two")
    master.salt("*.19", "saltutil.sync_modules")
    assert length() == 45
