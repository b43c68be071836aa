"""A second repository on another host, by SFTP and by a pgBackRest of its own there."""

from __future__ import annotations

import json
import re

import pytest

from tests.support import host as hosts
from tests.support import host_database as database
from tests.support.host import FORMULA

SALT = f"{FORMULA}/bin/salt-call"
HOME = "/var/lib/postgresql/.ssh"
KEY = f"{HOME}/id_ed25519"
INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get -qy install"
# The repository host calls the repository by the number that the database's host has for it.
STORE = """\
[global]
repo2-path=/srv/slm
repo2-retention-full=2
log-path=/srv/log
lock-path=/srv/lock

[autobot-slm]
pg1-host={database}
pg1-host-user=postgres
pg1-host-config=/etc/pgbackrest/autobot-slm.conf
pg1-host-config-include-path=/etc/pgbackrest/autobot-slm
pg1-path=/var/lib/postgresql/17/main
pg1-socket-path=/var/run/postgresql
"""


@pytest.fixture(scope="module")
def store(boot):
    """A host with an SSH server, pgBackRest, and a user who keeps backups."""
    made = boot(hosts.prepared("trixie"))
    made.run(f"{INSTALL} openssh-server pgbackrest", timeout=300)
    made.run("useradd --create-home --shell /bin/bash keeper && install -d -o keeper /srv/slm")
    made.run("install -d -o keeper /srv/log /srv/lock /srv/sftp")
    made.run("install -d -m 0700 -o keeper /home/keeper/.ssh")
    made.run("runuser -u keeper -- ssh-keygen -qt ed25519 -N '' -f /home/keeper/.ssh/id_ed25519")
    yield made
    made.close()


@pytest.fixture(scope="module")
def host(boot, applied_layers, store):
    """The database's host; each of the two lets the other in, and knows who it is."""
    made = boot(applied_layers("trixie"))
    made.push_formula()
    made.run(f"{INSTALL} openssh-server", timeout=300)
    made.run(f"install -d -m 0700 -o postgres -g postgres {HOME}")
    made.run(f"runuser -u postgres -- ssh-keygen -qt ed25519 -N '' -f {KEY}")
    for one, other, user, home in (
        (made, store, "postgres", HOME),
        (store, made, "keeper", "/home/keeper/.ssh"),
    ):
        theirs = "/home/keeper/.ssh" if one is made else HOME
        public = other.read(f"{theirs}/id_ed25519.pub")
        # All of its keys: libssh2 asks for another kind than the one that is known.
        keys = other.run("cut -d' ' -f1,2 /etc/ssh/ssh_host_*_key.pub").stdout.splitlines()
        known = "".join(f"{other.network.ipv4} {key}\n" for key in keys)
        lines = {"authorized_keys": public, "known_hosts": known}
        for name, text in lines.items():
            one.write(f"{home}/{name}", text)
            one.run(f"chown {user}: {home}/{name} && chmod 0600 {home}/{name}")
    yield made
    made.close()


def ask(host, *words, check=True):
    answer = host.run([SALT, "--out=json", *words], check=check, timeout=900)
    return json.loads(answer.stdout)["local"]


def configure(host, second):
    told = {"slm_database": {"backup": {"second": second}, "health": {"timeout": 15}}}
    host.write("/srv/pillar/top.sls", "base: {'*': [slm_database]}\n")
    host.write("/srv/pillar/slm_database.sls", json.dumps(told))
    states = database.apply_states(host)
    assert database.failed(states) == {}
    return states


def proven(host, store, where):
    """A backup goes there, all is well, and it alone brings the data back."""
    (other,) = ask(host, "slmdb_backup.create")["others"]
    assert other["repository"] == 2 and other["type"] == "full"
    assert ask(host, "slmdb_backup.verify")["right"] is True
    database.sql(host, "create table if not exists log (entry text)")
    database.sql(host, f"insert into log values ('{where}')")
    answer = ask(host, "slmdb_backup.drill", "repository=2")
    assert (answer["problems"], answer["repository"]) == ([], 2)
    status, report = database.health(host)
    assert (status, report["problems"]) == (0, [])
    assert "only local" not in " | ".join(report["warnings"])
    assert database.changed(database.apply_states(host)) == set()


def test_a_pgbackrest_host(host, store):
    """It makes its backups itself, over SSH, and takes the WAL."""
    store.write("/etc/pgbackrest/pgbackrest.conf", STORE.format(database=host.network.ipv4))
    configure(host, {"type": "host", "host": store.network.ipv4, "user": "keeper"})
    proven(host, store, "host")
    assert store.run("ls /srv/slm/backup/autobot-slm").stdout.count("F") >= 1


def test_sftp(host, store):
    """Encrypted by the database's host; the other one only keeps files."""
    second = {"type": "sftp", "path": "/srv/sftp", "host": store.network.ipv4, "user": "keeper"}
    second |= {"private_key_file": KEY, "host_key_hash_type": "sha256"}
    configure(host, second)
    proven(host, store, "sftp")
    text = store.run("cat /srv/sftp/backup/autobot-slm/backup.info").stdout
    assert re.match("Salted__", text)
