"""Packages: which are needed, and what is said when the host's sources do not have one."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def host(bare, minions):
    return minions


def test_the_distribution_s_packages_are_wanted(host):
    """On Debian 12: server, client and contrib of PostgreSQL 15, and what makes backups."""
    wanted = ["postgresql-15", "postgresql-client-15", "postgresql-contrib"]
    assert host().call("slmdb_package.names") == [*wanted, "pgbackrest"]
    without = host({"slm_database": {"backup": {"enabled": False}}})
    assert without.call("slmdb_package.names") == wanted


def test_what_is_installed_is_left_alone(host):
    """The test machine has the packages."""
    result = host().state("slmdb_package.installed")
    assert (result.result, result.changes) == (True, {})


@pytest.mark.parametrize(
    "pillar", [{"version": "99"}, {"packages": ["no-such-package"]}], ids=["version", "package"]
)
def test_a_package_that_nobody_offers_is_one_line(host, pillar):
    """Nothing is installed, and no trace is left."""
    result = host({"slm_database": pillar}).state("slmdb_package.installed")
    assert result.result is False
    assert str(result.comment).startswith("slm_database:version: PostgreSQL ")
    assert "do not offer" in str(result.comment) and "\n" not in str(result.comment)
    assert not Path("/etc/postgresql-common/createcluster.d").exists()
