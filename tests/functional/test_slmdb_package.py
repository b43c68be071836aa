"""Packages: which are needed, and what is said when the host's sources do not have one."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import world as worlds


@pytest.fixture
def host(bare, minions):
    return minions


def test_the_distribution_s_packages_are_wanted(host):
    """On Debian 12: server, client and contrib of PostgreSQL 15, and what makes backups."""
    wanted = ["postgresql-15", "postgresql-client-15", "postgresql-contrib"]
    assert host().call("slmdb_package.names") == [*wanted, "pgbackrest"]
    without = host({"slm_database": {"backup": {"enabled": False}}})
    assert without.call("slmdb_package.names") == wanted


def test_the_distribution_s_python_gets_what_salt_needs_of_it(host, monkeypatch):
    """A Salt that came over SSH has neither the driver nor what looks at a window."""
    monkeypatch.setattr("sys.prefix", sys.base_prefix)
    monkeypatch.setattr("sys.executable", "/usr/bin/python3")
    names = host().call("slmdb_package.names")
    assert {"python3-psycopg2", "python3-dateutil"} <= set(names)


def test_what_is_installed_is_left_alone(host):
    """The test machine has the packages."""
    result = host().state("slmdb_package.installed")
    assert (result.result, result.changes) == (True, {})


def test_a_package_that_nobody_offers_is_one_line_for_each_key(host):
    """The key is the one that wants it. Nothing is installed, and no trace is left."""
    # Nothing is installed here, and nobody offers anything.
    Path("/var/lib/dpkg/status").write_text("")
    for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").iterdir()):
        path.unlink(missing_ok=True)
    backup = {"copy": {"recipients": ["age1"]}, "second": {"type": "host"}}
    pillar = {"version": "17", "packages": ["no-such-package", "age"], "backup": backup}
    result = host({"slm_database": pillar}).state("slmdb_package.installed")
    assert result.result is False
    offered = "the package sources of this host do not offer"
    do = "correct it, or add a source that does"
    assert str(result.comment).splitlines() == [
        f"slm_database:version: {offered} postgresql-17, postgresql-client-17, "
        "postgresql-contrib; choose another version, or repository: pgdg",
        f"slm_database:backup:enabled: {offered} pgbackrest; {do}",
        f"slm_database:backup:copy:recipients: {offered} age; {do}",
        f"slm_database:backup:second:type: {offered} openssh-client; {do}",
        f"slm_database:packages: {offered} no-such-package; {do}",
    ]
    assert not Path("/etc/postgresql-common/createcluster.d").exists()


def offer(root, name, version, *fields):
    """Build a package and return its entry in a repository's list."""
    build = root / f"{name}-{version}"
    (build / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: test\n"
    control += "".join(f"{field}\n" for field in (*fields, "Description: test"))
    (build / "DEBIAN/control").write_text(control)
    path = root / f"{name}_{version}.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(build), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{control}Filename: ./{path.name}\nSize: {path.stat().st_size}\nSHA256: {digest}\n"


def test_contrib_brings_no_other_major_along(host):
    """Though another repository among the sources has a newer one, which would."""
    worlds.forget_updates()
    root = Path("/srv/offered")
    root.mkdir()
    entries = [
        offer(root, "postgresql-contrib", "18+999", "Depends: postgresql-18"),
        offer(root, "postgresql-contrib", "15+999", "Depends: postgresql-15"),
        offer(root, "postgresql-18", "18.1-1"),
    ]
    (root / "Packages").write_text("\n".join(entries))
    Path("/etc/apt/sources.list").write_text("deb [trusted=yes] file:/srv/offered ./\n")
    subprocess.run(["apt-get", "-q", "update"], check=True, capture_output=True)
    status = Path("/var/lib/dpkg/status")
    contrib = re.compile(r"^Package: postgresql-contrib\n(.+\n)+\n", re.MULTILINE)
    status.write_text(contrib.sub("", status.read_text()))
    result = host().state("slmdb_package.installed")
    assert result.result is True, result.comment
    found = host().call("slmdb_package.known", "postgresql-contrib|postgresql-18")
    assert {name: row["version"] for name, row in found.items()} == {"postgresql-contrib": "15+999"}
