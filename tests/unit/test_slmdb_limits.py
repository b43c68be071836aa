"""What a setting may not break without an explicit key."""

from __future__ import annotations

import pytest

from _modules import slmdb_conf
from _modules import slmdb_limits as limits

GB = 1024**3


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    known = {f"slmdb_conf.{name}": getattr(slmdb_conf, name) for name in ("text", "normal")}
    monkeypatch.setattr(limits, "__salt__", known, raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fsync", False),
        ("fsync", "OFF"),
        ("FSYNC", "no"),
        ("fsync", "0"),
        ("full_page_writes", "f"),
        ("data_directory", "/tmp"),
        ("hba_file", "x"),
        ("include_dir", "/etc"),
        ("password_encryption", "MD5"),
        ("ssl_ca_file", "/nowhere"),
        ("zero_damaged_pages", True),
        ("synchronous_standby_names", "*"),
    ],
)
def test_a_broken_promise_names_its_key_and_the_way_out(name, value):
    (line,) = limits.promises({name: value}, [], "/")
    assert line.startswith(f"slm_database:settings:{name}: ")
    assert f"add {name} to slm_database:allow_unsafe" in line
    assert limits.promises({name: value}, [name], "/") == []


@pytest.mark.parametrize(
    "setting",
    [
        {"fsync": True},
        {"ssl_ca_file": ""},
        {"ssl_ca_file": "/etc/passwd"},
        {"ssl_ca_file": "etc/passwd"},
        {"password_encryption": "scram-sha-256"},
        {"zero_damaged_pages": "off"},
        {"synchronous_standby_names": ""},
        {"work_mem": "1GB"},
    ],
)
def test_what_breaks_no_promise_is_free(setting):
    assert limits.promises(setting, [], "/") == []


def rows(**values):
    given = {"shared_buffers": 16384, "max_connections": 100, "work_mem": 4096, **values}
    return {name: {"setting": str(value)} for name, value in given.items()}


def test_what_fits_is_free():
    assert limits.memory(rows(), 4 * GB) == {}
    assert limits.memory({}, 0) == {}


def test_shared_memory_beyond_the_host_is_named():
    found = limits.memory(rows(shared_buffers=2 * GB // 8192), 2 * GB)
    assert found == {"shared_buffers": "the server would take 2048MB of the host's 2048MB memory"}
    assert set(limits.memory(rows(shared_memory_size=4000), 4 * GB)) == {"max_connections"}


def test_sessions_beyond_the_host_are_named():
    assert "9000 sessions" in limits.memory(rows(max_connections=9000), 4 * GB)["max_connections"]


def test_huge_pages_are_counted(monkeypatch):
    monkeypatch.setattr(limits, "_free_huge_pages", lambda: 10)
    loaded = rows(shared_memory_size_in_huge_pages=100)
    assert "100 huge pages are needed" in limits.huge_pages(loaded, "on", 0)
    assert limits.huge_pages(loaded, "on", 90) is None
    assert limits.huge_pages(loaded, "try", 0) is None
    assert limits.huge_pages(rows(), "on", 0) is None
