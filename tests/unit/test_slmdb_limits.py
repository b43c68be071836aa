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


def kernel(monkeypatch, tmp_path, held=(), **sizes):
    """A kernel with free and promised huge pages by their size, and what a server holds of them."""
    for size, numbers in sizes.items():
        directory = tmp_path / f"hugepages-{size[1:]}"
        directory.mkdir()
        for name, number in zip(("free_hugepages", "resv_hugepages"), numbers, strict=True):
            (directory / name).write_text(f"{number}\n")
    monkeypatch.setattr(limits, "HUGE_PAGES", str(tmp_path))
    monkeypatch.setattr(limits, "_usual_huge_page", lambda: 2048)
    known = {**limits.__salt__, "slmdb_server.available": lambda: bool(held)}
    rows = [dict(zip(("pages", "size"), held, strict=False))] if held else []
    monkeypatch.setattr(limits, "__salt__", {**known, "slmdb_server.query": lambda text: rows})


def asked(needed, size=0):
    return rows(shared_memory_size_in_huge_pages=needed, huge_page_size=size)


def test_huge_pages_are_counted(monkeypatch, tmp_path):
    kernel(monkeypatch, tmp_path, _2048kB=(10, 0))
    said = limits.huge_pages(asked(100), "on")
    assert "100 huge pages of 2048kB are needed, the kernel has 10 " in said
    assert limits.huge_pages(asked(10), "on") is None
    assert limits.huge_pages(asked(100), "try") is None
    assert limits.huge_pages(rows(), "on") is None


def test_promised_huge_pages_are_not_free(monkeypatch, tmp_path):
    kernel(monkeypatch, tmp_path, _2048kB=(100, 60))
    assert limits.huge_pages(asked(40), "on") is None
    assert "the kernel has 40 " in limits.huge_pages(asked(41), "on")


def test_huge_pages_of_each_size_are_counted_apart(monkeypatch, tmp_path):
    kernel(monkeypatch, tmp_path, _2048kB=(1000, 0), _1048576kB=(2, 0))
    assert limits.huge_pages(asked(2, 1048576), "on") is None
    assert "the kernel has 2 " in limits.huge_pages(asked(3, 1048576), "on")
    assert "the kernel has 0 " in limits.huge_pages(asked(1, 16384), "on")


@pytest.mark.parametrize(("size", "there"), [(0, 95), (2048, 95), (1048576, 5)])
def test_what_the_server_gives_back_counts_if_it_is_of_that_size(
    monkeypatch, tmp_path, size, there
):
    kernel(monkeypatch, tmp_path, held=(90, size), _2048kB=(5, 0))
    assert limits.huge_pages(asked(there), "on") is None
    assert f"the kernel has {there} " in limits.huge_pages(asked(there + 1), "on")
