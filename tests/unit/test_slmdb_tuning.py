"""Settings that fit the host: bounded, explained, and steady."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from _modules import slmdb_conf as conf
from _modules import slmdb_tuning as tuning

MB = 1024**2
PROFILES = ("colocated", "dedicated", "small")
HOSTS = st.fixed_dictionaries(
    {
        "memory": st.integers(256, 4 * 1024**2).map(lambda size: size * MB),
        "cores": st.integers(1, 256),
        "rotational": st.booleans(),
        "disk": st.integers(1024, 100 * 1024**2).map(lambda size: size * MB),
    }
)


def size(row):
    return int(conf.normal(row["value"], "integer", "B"))


@given(HOSTS, st.sampled_from(PROFILES), st.integers(14, 18), st.integers(1, 5000))
def test_the_host_is_never_asked_for_more_than_it_has(host, profile, major, connections):
    rows = tuning.recommend(profile, host, major, connections)
    memory = host["memory"]
    assert 32 * MB <= size(rows["shared_buffers"]) <= max(memory * 0.25, 32 * MB)
    assert size(rows["shared_buffers"]) <= size(rows["effective_cache_size"]) <= memory
    assert 2 * MB <= size(rows["work_mem"]) <= 64 * MB
    assert (
        size(rows["min_wal_size"]) <= size(rows["max_wal_size"]) <= max(host["disk"] / 10, 256 * MB)
    )
    assert int(rows["max_parallel_workers_per_gather"]["value"]) <= max(host["cores"] // 2, 0)


@given(HOSTS, st.sampled_from(PROFILES))
def test_every_value_is_explained_in_one_line_and_has_a_source(host, profile):
    for name, row in tuning.recommend(profile, host, 15).items():
        assert row["value"] and row["why"] and "\n" not in row["why"], name
        assert row["source"].startswith("PostgreSQL documentation, "), name


def test_off_leaves_everything_to_debian():
    assert tuning.recommend("off", {}, 15) == {}


@pytest.mark.parametrize("profile", PROFILES)
def test_no_bind_value_is_logged(profile):
    host = {"memory": 4096 * MB, "cores": 2, "rotational": False, "disk": 50 * 1024 * MB}
    rows = tuning.recommend(profile, host, 17)
    assert rows["log_parameter_max_length"]["value"] == "0"
    assert rows["log_parameter_max_length_on_error"]["value"] == "0"
    assert rows["pg_stat_statements.track_utility"]["value"] == "off"


def test_more_connections_mean_less_work_mem():
    host = {"memory": 16384 * MB, "cores": 4, "rotational": False, "disk": 50 * 1024 * MB}
    few, many = (tuning.recommend("colocated", host, 15, count) for count in (50, 1000))
    assert size(many["work_mem"]) < size(few["work_mem"])


@pytest.fixture
def told(monkeypatch):
    def tell(memory, pillar=None):
        get = {"slmdb_pillar.get": lambda *keys: pillar}
        monkeypatch.setattr(tuning, "__salt__", get, raising=False)
        monkeypatch.setattr(tuning, "_memory", lambda: memory * MB)

    return tell


@pytest.mark.parametrize(
    ("now", "used"),
    [(16000, 16000), (15500, 16000), (16600, 16000), (14000, 14000), (32000, 32000)],
)
def test_a_few_per_cent_of_memory_change_nothing(told, now, used):
    told(now)
    assert tuning.host("/", 16000)["memory"] == used * MB


def test_memory_from_pillar_is_taken_as_it_is(told):
    told(16000, pillar="8 GB")
    found = tuning.host("/nowhere/yet", 16000)
    assert (found["memory"], found["real"]) == (8192 * MB, 16000 * MB)
