"""The server's unit: what needs no server to be seen."""

from __future__ import annotations

import pytest

from _modules import slmdb_service as service

MAPS = """\
55d0c8a00000-55d0c8b00000 r--p 00000000 fe:00 1234   /usr/lib/postgresql/15/bin/postgres
7f0000000000-7f0000100000 r--p 00000000 fe:00 1235   {}
7f1000000000-7f1000100000 rw-s 00000000 00:01 1236   /dev/zero (deleted)
7f2000000000-7f2000100000 rw-s 00000000 00:01 1237   /dev/shm/PostgreSQL.1 (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0      [stack]
"""


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/lib/x86_64-linux-gnu/libcrypto.so.3 (deleted)", b"libcrypto.so.3"),
        ("/lib/x86_64-linux-gnu/libzstd.so.1.5.4 (deleted)", b"libzstd.so.1.5.4"),
        ("/usr/lib/x86_64-linux-gnu/libssl.so.3.dpkg-tmp (deleted)", b"libssl.so.3"),
        ("/usr/lib/postgresql/15/lib/auto_explain.so (deleted)", b"auto_explain.so"),
        ("/usr/lib/postgresql/15/bin/postgres (deleted)", b"postgres"),
    ],
)
def test_what_was_replaced_is_named(path, name):
    assert service._REPLACED.findall(MAPS.format(path).encode()) == [name]


@pytest.mark.parametrize(
    "path",
    [
        "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
        "/usr/lib/locale/locale-archive (deleted)",
        "/usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache (deleted)",
        "/var/lib/postgresql/15/main/x.so (deleted)",
    ],
)
def test_what_is_no_program_or_library_counts_for_nothing(path):
    """A locale that somebody made anew is no reason to restart."""
    assert service._REPLACED.findall(MAPS.format(path).encode()) == []
