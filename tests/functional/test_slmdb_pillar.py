"""The pillar through the loader and through a whole run: refused in words, with nothing touched."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from tests.support import world as worlds

RECORD = Path("/var/lib/autobot-slm-database/settings.json")
RECORDING = """
include: [slm_database.check]
The settings are recorded:
  slmdb_record.present:
    - require: [{sls: slm_database.check}]
"""
BAD = {
    "a list": [1],
    "a text": "port: 5432",
    "an unknown key": {"prot": 5433},
    "a port": {"port": 70000},
    "a long name": {"role": "a" * 64},
    "remote": {"listen_addresses": ["0.0.0.0"]},
    "a method": {"hba": {"before": [{"type": "local", "method": "foo"}]}},
    "null": {"hba": None, "secret": None, "backup": None},
    "a password": {"roles": {"reader": {"password": "Hunter2-canary"}}},
}


def _host() -> dict[str, tuple]:
    """What was written to the host since it was fresh: owner, mode and content of each file."""
    found = {}
    for directory, _, names in os.walk(worlds.STATE["layer"]):
        for path in [Path(directory), *(Path(directory) / name for name in names)]:
            facts = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(facts.st_mode) else b""
            digest = hashlib.sha256(data).hexdigest()
            found[str(path)] = (facts.st_mode, facts.st_uid, facts.st_gid, digest)
    return found


def _apply(minion, **keywords) -> dict:
    run = minion.call("state.apply", "slm_database", **keywords)
    return {chunk["__id__"]: chunk for chunk in run.raw.values()}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("test", [True, False])
def test_a_wrong_pillar_stops_the_run_before_anything(bare, minions, bad, test):
    """The first state fails with the lines, nothing else runs, the host is as before."""
    minion = minions({"slm_database": BAD[bad]})
    lines = minion.call("slmdb_pillar.problems")
    before = _host()
    states = _apply(minion, test=test)
    assert _host() == before
    assert str(states["The pillar is valid"]["comment"]).splitlines() == lines != []
    assert states["The pillar is valid"]["result"] is False
    others = {name: one["result"] for name, one in states.items() if one["__sls__"].count(".") != 1}
    assert not any(one["changes"] for one in states.values())
    assert True not in others.values()
    assert "Hunter2-canary" not in repr(states)


@pytest.mark.parametrize("component", ["config", "secret", "access", "clean"])
def test_a_component_alone_checks_the_pillar_too(bare, minions, component):
    """Whichever part is applied, the whole pillar is looked at first."""
    minion = minions({"slm_database": {"clean": {"dta": True}}})
    before = _host()
    run = minion.call("state.apply", f"slm_database.{component}")
    assert _host() == before
    failed = [chunk for chunk in run.raw.values() if chunk["result"] is False]
    assert "did you mean data?" in str(failed[0]["comment"])


def test_settings_are_pillar_over_the_release_over_the_defaults(bare, minions):
    """Mappings are merged key by key, a list replaces the default list."""
    told = {"secret": {"length": 50, "url_keys": ["A"]}, "settings": {"jit": True}}
    minion = minions({"slm_database": told})
    assert minion.call("slmdb_pillar.problems") == []
    assert minion.call("slmdb_pillar.get", "secret", "length") == 50
    assert minion.call("slmdb_pillar.get", "secret", "url_keys") == ["A"]
    assert minion.call("slmdb_pillar.get", "secret", "key") == "SLM_DB_PASSWORD"
    assert minion.call("slmdb_pillar.get", "settings") == {"jit": True}
    release = minion.call("slmdb_pillar.get", "distribution", "version")
    assert release == {"12": "15", "13": "17"}[minion.call("grains.get", "osrelease").split(".")[0]]


@pytest.fixture(scope="module")
def recording(tmp_path_factory, minions):
    """Give a minion that has an SLS which only records what it is told, beside the formula."""
    directory = tmp_path_factory.mktemp("roots")
    (directory / "recording.sls").write_text(RECORDING)
    roots = {"base": [str(Path(__file__).resolve().parents[2]), str(directory)]}
    return lambda pillar=None: minions(pillar, file_roots=roots)


def _record(minion, told=None) -> dict:
    """What a run records, told something on its command line."""
    words = {"pillar": {"slm_database": told}} if told else {}
    run = minion.call("state.apply", "recording", **words)
    assert [one["comment"] for one in run.raw.values() if one["result"] is False] == []
    return json.loads(RECORD.read_text())


def test_what_one_run_is_told_no_other_hears(instance, recording):
    """In one process: neither a later run nor a report has the pillar of the command line."""
    minion = recording({"slm_database": {"port": 5440}})
    for told in ({"port": 5441, "role": "one"}, {"port": 5442, "database": "two"}, {}):
        assert minion.call("slmdb_pillar.get", "port") == 5440
        expected = {"port": 5440, "role": "autobot_slm", "database": "autobot_slm", **told}
        recorded = _record(minion, told)
        assert {key: recorded[key] for key in expected} == expected


def test_a_report_after_a_run_reads_the_record(instance, recording):
    """In the process of a run on a host whose pillar says nothing of us."""
    minion = recording()
    assert minion.call("slmdb_pillar.get", "port") == 5432
    for port in (5441, 5442):
        assert _record(minion, {"port": port})["port"] == port
        assert minion.call("slmdb_pillar.get", "port") == port
    assert _record(minion)["port"] == 5432
    assert minion.call("slmdb_pillar.get", "port") == 5432


def test_a_pillar_that_was_refreshed_counts_at_once(instance, minions, monkeypatch):
    """Salt puts another object in the old one's place; what was merged of that is not used."""
    minion = minions({"slm_database": {"port": 5440, "role": "one"}})
    assert minion.call("slmdb_pillar.get", "port") == 5440
    refreshed = {"slm_database": {"port": 5441}}
    monkeypatch.setitem(minion.modules.pack, "__pillar__", refreshed)
    assert minion.call("slmdb_pillar.get", "port") == 5441
    assert minion.call("slmdb_pillar.get", "role") == "autobot_slm"


@pytest.mark.parametrize("keys", [("nothing",), ("secret", "nothing"), ("port", "deeper")])
def test_a_setting_that_does_not_exist_is_one_line(bare, minions, keys):
    """Asked for by mistake in code or by hand."""
    with pytest.raises(Exception, match=f"slm_database:{':'.join(keys)}: there is no such setting"):
        minions().call("slmdb_pillar.get", *keys)


@pytest.mark.parametrize(
    "pillar",
    [
        {},
        {"port": 5433},
        {"secret": {"url_keys": []}, "tuning": {"memory": "8GB"}},
        {"roles": {"reporting": None}, "backup": {"schedule": {"full": None}}},
        {"hba": {"after": [{"type": "local", "database": "all", "user": "a", "method": "peer"}]}},
    ],
)
def test_a_record_tells_the_pillar_that_it_was_made_from(minions, pillar):
    """Neither a default nor what the distribution's release decides is in it."""
    recorded = minions({"slm_database": pillar}).call("slmdb_pillar.settings")
    assert minions().call("slmdb_pillar.beyond_defaults", recorded) == pillar


def test_a_mapping_whose_lines_are_all_comments_is_empty(minions):
    """Where it holds nothing by default, or nothing that would come by itself."""
    bare = dict.fromkeys(("adopt", "databases", "maintenance", "roles", "settings"))
    minion = minions()
    usual = minion.call("slmdb_pillar.settings")
    minion.tell({"slm_database": bare})
    assert minion.call("slmdb_pillar.problems") == []
    assert minion.call("slmdb_pillar.settings") == usual
