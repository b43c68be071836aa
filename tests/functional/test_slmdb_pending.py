"""What is parked: restarts, updates, and what time brings; asked of apt and of the server."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

from tests.support import world as worlds

LISTS = Path("/var/lib/apt/lists")


@pytest.fixture
def offered(server):
    """A host whose package lists have a newer PostgreSQL 15, from a security archive."""
    found = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "postgresql-15"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for path in LISTS.glob("*"):
        if path.is_file():
            path.unlink()
    release = "Origin: Debian\nSuite: stable-security\nCodename: bookworm-security\n"
    package = (
        "Package: {}\nVersion: 15.99-0+deb12u1\nArchitecture: amd64\nFilename: a.deb\nSize: 1\n"
    )
    names = ("postgresql-15", "postgresql-client-15")
    base = LISTS / "mirror.example_dists_bookworm-security"
    Path("/etc/apt/sources.list").write_text(
        "deb [trusted=yes] http://mirror.example bookworm-security main\n"
    )
    for path in Path("/etc/apt/sources.list.d").glob("*"):
        path.unlink()
    Path(f"{base}_InRelease").write_text(release)
    Path(f"{base}_main_binary-amd64_Packages").write_text(
        "\n".join(package.format(n) for n in names)
    )
    server.installed = found
    return server


def test_nothing_is_parked_on_a_fresh_host(shared_server):
    """No restart, no migration, no collation that changed."""
    report = shared_server.call("slmdb_pending.report", changelog=False)
    assert (report["restart"], report["migrations"], report["collations"]) == ([], [], [])


def test_updates_are_listed_held_or_not(offered):
    """Installed, candidate, and that it is a security update."""
    rows = offered.call("slmdb_update.available")
    assert {row["package"] for row in rows} == {"postgresql-15", "postgresql-client-15"}
    for row in rows:
        assert row["installed"] == offered.installed
        assert row["candidate"] == "15.99-0+deb12u1" and row["security"] is True
    offered.call("slmdb_hold.apply")
    assert offered.call("slmdb_update.available") == rows
    lines = offered.call("slmdb_pending.lines")
    wanted = f"security update of postgresql-15: {offered.installed} → 15.99-0+deb12u1"
    assert wanted in lines


def test_a_meta_package_never_leaves_the_major(offered):
    """Another repository's newest one is no update; one of our own major is."""
    path = Path(f"{LISTS}/mirror.example_dists_bookworm-security_main_binary-amd64_Packages")
    before = path.read_text()
    for version, listed in (("18+999.pgdg12+1", False), ("15+999", True)):
        path.write_text(
            before
            + f"\nPackage: postgresql-contrib\nVersion: {version}\nArchitecture: all\n"
            + "Filename: b.deb\nSize: 1\n"
        )
        rows = {row["package"]: row for row in offered.call("slmdb_update.available")}
        assert ("postgresql-contrib" in rows) is listed


def test_an_update_that_would_bring_another_major_is_refused(offered):
    """apt is asked before anything is downloaded."""
    path = Path(f"{LISTS}/mirror.example_dists_bookworm-security_main_binary-amd64_Packages")
    stanza = "Package: {}\nVersion: {}\nArchitecture: amd64\nFilename: {}.deb\nSize: 1\n"
    server = stanza.format("postgresql-15", "15.99-0+deb12u1", "a")
    server += "Provides: postgresql-contrib-15\nDepends: postgresql-18\n"
    path.write_text(server + "\n" + stanza.format("postgresql-18", "18.1-1", "b"))
    rows = offered.call("slmdb_update.available")
    with pytest.raises(CommandExecutionError, match="apt would install postgresql-18 along"):
        offered.call("slmdb_update.apply", rows)


POSTINST = Path("/var/lib/dpkg/info/postgresql-15.postinst")
LOCKED = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 42 (apt-get)"


@pytest.fixture
def interrupted(server):
    """A host whose server's package was left in the middle, with a postinst that fails at first."""
    worlds.forget_updates()
    status = Path("/var/lib/dpkg/status")
    before, found, after = status.read_text().partition("\nPackage: postgresql-15\n")
    after = after.replace("Status: install ok installed", "Status: install ok half-configured", 1)
    status.write_text(before + found + after)
    POSTINST.write_text("#!/bin/sh\nexit 1\n")
    return server


def test_an_interrupted_update_is_parked_and_completed(interrupted):
    """Also with no newer version; a failure names the package, and a repetition goes on."""
    (row,) = interrupted.call("slmdb_update.available")
    assert (row["package"], row["state"]) == ("postgresql-15", "interrupted")
    assert row["installed"] == f"{row['candidate']}, half-configured"
    (line,) = interrupted.call("slmdb_pending.lines")
    assert line.startswith("completion of postgresql-15: ")
    with pytest.raises(CommandExecutionError, match=r"postgresql-15 .*exit status 1") as caught:
        interrupted.call("slmdb_update.apply", [row])
    assert "\n" not in str(caught.value)
    assert interrupted.call("slmdb_update.available") == [row]
    POSTINST.write_text("#!/bin/sh\nexit 0\n")
    interrupted.call("slmdb_update.apply", [row])
    assert interrupted.call("slmdb_update.available") == []


def test_an_interrupted_update_is_nobody_s_hand(interrupted):
    """Neither removed nor installed by somebody: the record has what is there."""
    interrupted.call("slmdb_hold.apply")
    assert interrupted.call("slmdb_hold.differences") == {}
    assert interrupted.call("slmdb_package.differences") == {
        "postgresql-15": {"old": None, "new": "installed"}
    }
    POSTINST.write_text("#!/bin/sh\nexit 0\n")
    interrupted.call("slmdb_package.apply")
    assert interrupted.call("slmdb_package.differences") == {}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"{LOCKED}\nN: Be aware\nE: Unable to acquire the dpkg frontend lock", LOCKED),
        (
            "dpkg: warning: old\ndpkg: error processing package a (--configure):\n it failed\n"
            "E: Sub-process /usr/bin/dpkg returned an error code (1)",
            "dpkg: error processing package a (--configure): it failed",
        ),
        ("E: Sub-process http received signal 9.\nx", "E: Sub-process http received signal 9."),
        ("Reading\nnothing", "nothing"),
        ("", "no output"),
    ],
)
def test_the_first_error_that_says_something_is_the_reason(shared_server, said, reason):
    """apt's last words are the same whatever failed."""
    assert shared_server.call("slmdb_update.why", said) == reason


def test_the_changelog_of_a_downloaded_update_is_quoted(offered, tmp_path):
    """Its heading and first item; without a downloaded package and a network there is none."""
    report = offered.call("slmdb_pending.report")
    assert {row["changelog"] for row in report["packages"]} == {None}
    build = tmp_path / "package"
    (build / "DEBIAN").mkdir(parents=True)
    (build / "DEBIAN/control").write_text(
        "Package: postgresql-15\nVersion: 15.99-0+deb12u1\nArchitecture: amd64\n"
        "Maintainer: test <test@example.org>\nDescription: test\n"
    )
    place = build / "usr/share/doc/postgresql-15"
    place.mkdir(parents=True)
    text = (
        "postgresql-15 (15.99-0+deb12u1) bookworm-security; urgency=medium\n\n  * New upstream.\n"
    )
    (place / "changelog.Debian.gz").write_bytes(gzip.compress(text.encode()))
    archives = Path("/var/cache/apt/archives/postgresql-15_15.99-0+deb12u1_amd64.deb")
    subprocess.run(
        ["dpkg-deb", "--build", str(build), str(archives)], check=True, capture_output=True
    )
    report = offered.call("slmdb_pending.report")
    wanted = "postgresql-15 (15.99-0+deb12u1) bookworm-security; urgency=medium: New upstream."
    assert {row["changelog"] for row in report["packages"]} == {wanted}


def test_a_setting_that_waits_is_listed_with_its_age(server):
    """Old and new value, and since when."""
    server.call("slmdb_server.execute", "ALTER SYSTEM SET max_connections = 37")
    server.call("slmdb_service.reload")
    rows = []
    while not rows:
        rows = server.call("slmdb_pending.restart")
    (row,) = rows
    assert (row["name"], row["old"], row["new"]) == ("max_connections", "100", "37")
    assert row["since"]


def test_another_server_than_the_installed_one_waits_for_a_restart(server):
    """What runs is compared with the program, not with what apt believes."""
    assert server.call("slmdb_pending.server_version") is None
    program = Path("/etc/fake/postgres")
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 15.99 (Debian 15.99-1)'\n")
    program.chmod(0o755)
    real = "/usr/lib/postgresql/15/bin/postgres"
    subprocess.run(["mount", "--bind", str(program), real], check=True)
    try:
        row = server.call("slmdb_pending.server_version")
    finally:
        subprocess.run(["umount", real], check=True)
    assert row["name"] == "server" and row["new"] == "15.99 (Debian 15.99-1)"
    assert row["old"].startswith("15.")


def test_a_collation_that_changed_under_its_database_is_named(server):
    """As it is after an upgrade of the library that sorts."""
    execute = server.call
    execute(
        "slmdb_server.execute",
        "CREATE DATABASE sorted TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'",
    )
    execute("slmdb_server.execute", "CREATE DATABASE autobot_slm")
    assert server.call("slmdb_pending.collations") == []
    execute(
        "slmdb_server.execute",
        "UPDATE pg_database SET datcollversion = '1.0' WHERE datname = 'sorted'",
    )
    inside = {"database": "autobot_slm"}
    execute("slmdb_server.execute", 'CREATE TABLE names (name text COLLATE "de-x-icu")', **inside)
    execute("slmdb_server.execute", "UPDATE pg_collation SET collversion = '1.0'", **inside)
    rows = server.call("slmdb_pending.collations")
    assert [row["what"] for row in rows] == [
        "database sorted",
        "collation de-x-icu in database autobot_slm",
    ]
    assert {row["recorded"] for row in rows} == {"1.0"} and all(row["actual"] for row in rows)


@pytest.mark.parametrize(
    ("today", "words"),
    [("2027-05-01", None), ("2027-05-15", "15 ends on"), ("2027-11-12", "15 ended on")],
)
def test_the_end_of_a_major_is_announced_half_a_year_ahead(shared_server, today, words):
    """PostgreSQL 15 is supported until 11 November 2027."""
    found = shared_server.call("slmdb_pending.end_of_life", today)
    assert (found is None) == (words is None)
    if words:
        assert found["ends"] == "2027-11-11" and words in found["comment"]
