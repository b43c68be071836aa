"""Files of a cache, what is remembered, and how it is known that a file is still the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest


@pytest.fixture
def minion(minions):
    return minions()


def test_a_kept_file_is_whole_or_not_there(minion, tmp_path):
    """Its directory is root's alone, the older one is replaced, nothing else is left."""
    path = tmp_path / "cache" / "known"
    for text in ("first", "secönd"):
        minion.call("slmdb_file.keep", str(path), text)
        assert path.read_text() == text
        assert os.listdir(path.parent) == ["known"]
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_cache_that_cannot_be_written_is_nobody_s_error(minion, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert minion.call("slmdb_file.keep", str(tmp_path / "file" / "known"), "text") is None
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_is_remembered_is_that_or_nothing(minion, tmp_path):
    """A file that was cut off, or holds something else, is as none."""
    path = tmp_path / "known"
    assert minion.call("slmdb_file.remembered", str(path)) is None
    minion.call("slmdb_file.remember", str(path), {"a": [1]}, mode="0640")
    assert path.stat().st_mode & 0o777 == 0o640
    assert minion.call("slmdb_file.remembered", str(path)) == {"a": [1]}
    assert minion.call("slmdb_file.remembered", str(path), list) is None
    path.write_text(path.read_text()[:-3])
    assert minion.call("slmdb_file.remembered", str(path)) is None


def _rewrite(path):
    path.write_text("two")


def _replace(path):
    other = path.with_name("other")
    other.write_text("one")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def _set_back(path):
    seen = path.stat()
    path.write_text("two")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def _remove(path):
    path.unlink()


@pytest.mark.parametrize("change", [_rewrite, _replace, _set_back, _remove])
def test_no_change_goes_unseen(minion, tmp_path, change):
    """Neither by the stamp nor by the digest of several; who only reads changes nothing."""
    path, beside = tmp_path / "file", tmp_path / "beside"
    path.write_text("one")
    paths = [str(beside), str(path)]
    before = minion.call("slmdb_file.stamp", str(path)), minion.call("slmdb_file.digest", paths)
    path.read_text()
    after = minion.call("slmdb_file.stamp", str(path)), minion.call("slmdb_file.digest", paths)
    assert after == before
    time.sleep(0.02)  # the kernel's clock of changes ticks every few milliseconds
    change(path)
    assert minion.call("slmdb_file.stamp", str(path)) != before[0]
    assert minion.call("slmdb_file.digest", paths) != before[1]


def test_a_file_that_comes_changes_the_digest(minion, tmp_path):
    path = tmp_path / "file"
    before = minion.call("slmdb_file.digest", [str(path)])
    assert minion.call("slmdb_file.stamp", str(path)) is None
    path.write_text("")
    assert minion.call("slmdb_file.digest", [str(path)]) != before


def _can(user, path, letter):
    """What the kernel says."""
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
    return subprocess.run([*as_user, "test", f"-{letter}", path], check=False).returncode == 0


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o707, 0o755, 0o570, 0o077, 0o006])
@pytest.mark.parametrize("group", ["root", "postgres", "ssl-cert"])
@pytest.mark.parametrize("owner", ["root", "postgres"])
def test_what_a_mode_permits_is_what_the_kernel_permits(minion, owner, group, mode):
    """To the owner, to one of the group, which may be another than the first, and to others."""
    path = Path("/srv/permitted")
    path.mkdir(exist_ok=True)
    shutil.chown(path, owner, group)
    path.chmod(mode)
    for letter, wanted in (("r", 4), ("w", 2), ("x", 1)):
        permitted = minion.call("slmdb_file.permits", str(path), "postgres", wanted)
        assert permitted == _can("postgres", path, letter), letter
