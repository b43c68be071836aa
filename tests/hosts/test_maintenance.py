"""A minor update on a booted host: nobody does it by accident, one command does it on purpose."""

from __future__ import annotations

import json

import pytest

from tests.support import host as hosts
from tests.support import host_database as database
from tests.support.host import FORMULA

PACKAGES = ("postgresql-15", "postgresql-client-15")
STATE = "slmdb_maintenance_|-What is parked is done_|-What is parked is done_|-done"
NO_CLUSTER = "/etc/postgresql-common/createcluster.d/test.conf"
APPROVAL = 'pillar={"slm_database": {"maintenance": {"approve": true}}}'


def versions(host):
    """Return the versions that the archives have, the newest first."""
    lines = host.run("apt-cache madison postgresql-15").stdout.splitlines()
    return list(dict.fromkeys(line.split("|")[1].strip() for line in lines))


def installed(host):
    return host.run("dpkg-query -W -f '${Version}' postgresql-15").stdout


def held(host):
    return set(host.run("apt-mark showhold").stdout.split())


def install(host, version, *options, check=True):
    wanted = [f"{name}={version}" for name in PACKAGES]
    environment = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    command = ["apt-get", "-qy", *options, "install", *wanted]
    return host.run(command, check=check, env=environment)


def maintain(host, *arguments):
    """Apply the maintenance as an operator does; return its state."""
    words = [f"{FORMULA}/bin/salt-call", "state.apply", "slm_database.maintenance", "--out=json"]
    answer = host.run([*words, *arguments], check=False)
    return json.loads(answer.stdout)["local"][STATE]


def pending(host):
    return json.loads(host.run(f"{FORMULA}/bin/salt-call --out=json slmdb.pending").stdout)["local"]


@pytest.fixture(scope="module")
def host(boot):
    """A host with the older of two versions, and the formula applied."""
    made = boot(hosts.prepared("bookworm"))
    made.push_formula()
    made.write(NO_CLUSTER, "create_main_cluster = false\n")
    made.run("apt-get -q update")
    install(made, versions(made)[-1])
    environment = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    made.run("apt-get -qy install unattended-upgrades needrestart", env=environment)
    database.apply(made)
    yield made
    made.close()


def test_a_first_apply_updates_no_server_that_is_there(host):
    """Though apt, asked for the contrib meta-package, would take the newest server along."""
    assert installed(host) == versions(host)[-1] != versions(host)[0]
    names = {name for name in PACKAGES if name in held(host)}
    assert names == set(PACKAGES)
    assert "Upgrade: postgresql" not in host.read("/var/log/apt/history.log")


def test_what_updates_by_itself_leaves_the_server_alone(host):
    """unattended-upgrades and needrestart run for real; without the drop-ins they would have."""
    new, old = versions(host)[0], versions(host)[-1]
    assert new != old, "the archives have only one version; this needs two"
    server = database.postmaster(host)
    assert installed(host) == old and held(host) >= set(PACKAGES)
    host.run("unattended-upgrade -v", timeout=600)
    assert installed(host) == old
    # A library that the server has open is replaced: needrestart sees a reason.
    host.run("apt-get -qy --reinstall install libzstd1", env={"NEEDRESTART_SUSPEND": "1"})
    host.run("needrestart -q -r a", check=False)
    assert database.postmaster(host) == server
    (warned,) = [one for one in database.health(host)[1]["warnings"] if "before an update" in one]
    rows = {row["name"]: row for row in pending(host)["restart"]}
    assert "libzstd.so.1" in warned and "libzstd.so.1" in rows["libraries"]["old"]

    host.run(f"apt-mark unhold {' '.join(PACKAGES)}")
    assert "postgresql-15" not in would_upgrade(host)
    host.run("rm /etc/apt/apt.conf.d/52autobot-slm-database")
    assert "postgresql-15" in would_upgrade(host)
    host.run("rm /etc/needrestart/conf.d/autobot-slm-database.conf")
    host.run("needrestart -q -r a", check=False)
    assert database.postmaster(host) != server
    assert "before an update" not in " ".join(database.health(host)[1]["warnings"])

    states = database.apply_states(host)
    changed = {states[name]["__id__"] for name in database.changed(states)}
    assert changed == {"PostgreSQL is updated and restarted only on purpose"}
    assert held(host) >= set(PACKAGES)


def would_upgrade(host):
    """Return what unattended-upgrades says that it would upgrade."""
    said = host.run("unattended-upgrade -v --dry-run", timeout=600).stdout
    return " ".join(line for line in said.splitlines() if "will be upgraded" in line)


def test_without_an_approval_nothing_is_updated(host):
    """Neither by the maintenance nor by the default run; the update is listed."""
    server, old = database.postmaster(host), installed(host)
    refused = maintain(host)
    assert refused["result"] is False and "policy is manual" in refused["comment"]
    database.apply(host)
    assert (installed(host), database.postmaster(host)) == (old, server)
    rows = {row["package"]: row for row in pending(host)["packages"]}
    assert rows["postgresql-15"]["candidate"] == versions(host)[0]
    assert rows["postgresql-15"]["security"] is True


def test_one_command_updates_and_restarts_once(host):
    """The server is the new one, was away for a moment that is reported, and is held again."""
    server, new = database.postmaster(host), versions(host)[0]
    announced = maintain(host, APPROVAL, "test=True")
    assert announced["result"] is None
    done = maintain(host, APPROVAL)
    assert done["result"] is True, done["comment"]
    assert done["changes"] == announced["changes"]
    assert done["changes"]["postgresql-15"]["new"] == installed(host) == new
    assert "approved for this run" in done["comment"]
    assert "The server was away for" in done["comment"]
    assert database.postmaster(host) != server
    assert new in database.sql(host, "SELECT version()")
    assert held(host) >= set(PACKAGES)
    assert database.health(host)[0] == 0
    assert maintain(host, APPROVAL)["changes"] == {}
    assert database.changed(database.apply_states(host)) == set()


def test_an_install_on_purpose_works_and_is_noticed(host):
    """apt refuses without the word for it, does it with the word, and the next run says so."""
    old, new = versions(host)[-1], installed(host)
    assert install(host, old, "--allow-downgrades", check=False).returncode == 100
    server = database.postmaster(host)
    install(host, old, "--allow-downgrades", "--allow-change-held-packages")
    assert installed(host) == old and database.postmaster(host) == server
    states = database.apply_states(host)
    (name,) = [name for name in states if "only on purpose" in name]
    assert states[name]["changes"]["postgresql-15"] == {
        "old": new,
        "new": f"{old}, by somebody's hand",
    }
    assert held(host) >= set(PACKAGES) and database.postmaster(host) == server
    assert database.changed(database.apply_states(host)) == set()


def test_a_server_outside_its_unit_is_moved_there_on_purpose(host):
    """The default run leaves it alone and says so; with an approval it is the unit's again."""
    host.run("systemctl stop autobot-slm-database")
    host.run("pg_ctlcluster --skip-systemctl-redirect 15 main start")
    server = database.postmaster(host)
    words = [f"{FORMULA}/bin/salt-call", "state.apply", "slm_database.service", "--out=json"]
    states = json.loads(host.run(words, check=False).stdout)["local"]
    (name,) = [name for name in states if states[name].get("__id__") == "The server runs"]
    assert states[name]["result"] is True and states[name]["changes"] == {}
    assert "waits for a window or an approval" in str(states[name])
    assert database.postmaster(host) == server
    host.run([*words, APPROVAL])
    assert database.postmaster(host) != server
    assert host.run("systemctl is-active autobot-slm-database").stdout.strip() == "active"
    assert database.health(host)[0] == 0
