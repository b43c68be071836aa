"""A host is lost altogether, the repository on it as well: another one, bare, takes its place."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import documents, image
from tests.support import host as hosts
from tests.support import host_database as database
from tests.support.host import FORMULA

REPOSITORY = "/srv/second"
SECRETS = "/etc/autobot/slm-secrets.env"
SALT = f"{FORMULA}/bin/salt-call"
LOGIN = "psql -XAt -h 127.0.0.1 -p 5444 -U autobot_slm -d autobot_slm -c"
MARK = "/var/lib/autobot-slm-database/recovery.json"
# A bare host has no pgrep; this has to be as quick, or what it looks for is over.
RESTORING = (
    r"grep -qaP '^(/usr/bin/pgbackrest\x00.*\x00restore|[^\x00 ]*/pg_ctl\x00start)\x00' "
    "/proc/[0-9]*/cmdline 2>/dev/null"
)
GUIDE = documents.CHECKOUT / "docs/backup.md"
COMMAND = "bin/recover /root/slm-copy.age /root/identity.txt"


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def release(request):
    return request.param


@pytest.fixture(scope="module")
def key_pair(tmp_path_factory):
    """The secret key that never was on the host, and the public one."""
    path = tmp_path_factory.mktemp("vault") / "identity.txt"
    subprocess.run(["age-keygen", "-o", str(path)], check=True, capture_output=True)
    words = ["age-keygen", "-y", str(path)]
    return path, subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def lost(boot, key_pair, tmp_path_factory, release):
    """A host in use: backed up, copied, written to until the plug is pulled; what is left of it."""
    kept = tmp_path_factory.mktemp("kept")
    second = {"type": "path", "path": REPOSITORY}
    backup = {"copy": {"recipients": [key_pair[1]]}, "second": second}
    settings = {"port": 5444, "backup": backup, "health": {"timeout": 15}}
    host = boot(hosts.prepared(release))
    try:
        host.push_formula()
        host.write("/srv/pillar/top.sls", "base: {'*': [slm_database]}\n")
        host.write("/srv/pillar/slm_database.sls", json.dumps({"slm_database": settings}))
        host.write(SECRETS, "SLM_ENCRYPTION_KEY=the backend's own\n")
        database.apply(host)
        told = {"password": database.environment_value(host, SECRETS, "SLM_DB_PASSWORD")}
        told["identifier"] = database.system_identifier(host)
        database.sql(host, "create table log (entry text)", port=5444)
        host.run([SALT, "slmdb_backup.create", "full"])
        database.sql(host, "insert into log values ('after the backup')", port=5444)
        host.run([SALT, "slmdb_backup.copy", "path=/root/slm-copy.age"])
        host.run([SALT, "slmdb_backup.settle"])
        told["secrets"] = host.read(SECRETS)
        subprocess.run(["cp", "-a", str(host.path(REPOSITORY)), str(kept)], check=True)
        subprocess.run(["cp", str(host.path("/root/slm-copy.age")), str(kept)], check=True)
        host.kill()
    finally:
        host.close()
    return {**told, "kept": kept}


@pytest.fixture(scope="module")
def host(boot, lost, key_pair, release):
    """A bare Debian that got the repository, the copy and the secret key; no Salt, no pillar."""
    made = boot([image.bare(release)])
    made.push_formula()
    made.run(f"mkdir -p {REPOSITORY}")
    kept = lost["kept"]
    subprocess.run(["cp", "-a", f"{kept}/second/.", str(made.path(REPOSITORY))], check=True)
    subprocess.run(["cp", f"{kept}/slm-copy.age", str(made.path("/root"))], check=True)
    subprocess.run(["cp", str(key_pair[0]), str(made.path("/root/identity.txt"))], check=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def recovered(host):
    """The one command, as the guide has it; it is interrupted once, then repeated."""
    assert documents.commands(GUIDE, "lost") == [COMMAND]
    command = f"cd {FORMULA} && {COMMAND}"
    host.run(f"setsid bash -c '{command}' >/root/first.log 2>&1 & echo $! >/root/first", timeout=30)
    there = f"{RESTORING} || ! kill -0 $(cat /root/first)"
    salt = "$(grep -la 'state[.]apply' /proc/[0-9]*/cmdline | cut -d/ -f3)"
    end = f"kill -KILL {salt}; kill -KILL -- -$(cat /root/first)"
    host.run(f"until {there}; do sleep 0.02; done; {end}", check=False, timeout=600)
    assert "The database is" not in host.read("/root/first.log")
    assert host.run(f"test -e {MARK}").returncode == 0
    answer = host.run(command, timeout=900)
    assert host.run(f"test -e {MARK}", check=False).returncode == 1
    return answer


def test_the_database_is_back(recovered, host, lost):
    """What was committed and archived is there, in the same instance."""
    assert "The database is healthy." in recovered.stdout
    assert database.sql(host, "select entry from log", port=5444) == "after the backup"
    assert database.system_identifier(host) == lost["identifier"]


def test_the_application_logs_in_as_before(recovered, host, lost):
    """The secret file is the same byte for byte, and the password is the server's."""
    assert host.read(SECRETS) == lost["secrets"]
    answer = host.run(f"{LOGIN} 'select current_user'", env={"PGPASSWORD": lost["password"]})
    assert answer.stdout == "autobot_slm\n"


def test_it_is_healthy(recovered, host):
    status, report = database.health(host)
    assert (status, report["healthy"], report["problems"]) == (0, True, [])


def test_the_configuration_is_back_without_the_pillar(recovered, host):
    """The next run, with what is in /srv/pillar now, changes nothing."""
    assert database.changed(database.apply_states(host)) == set()
    assert database.active(host) == "active"
    host.run("systemctl is-enabled autobot-slm-backup-full.timer")


def test_backups_go_on(recovered, host):
    """In the repository that is left, on top of what was there; in the first one from the start."""
    made = host.run([SALT, "--out=json", "slmdb_backup.create"], timeout=300)
    first = json.loads(made.stdout)["local"]
    assert (first["type"], first["others"][0]["type"]) == ("full", "incremental")
    verified = host.run([SALT, "--out=json", "slmdb_backup.verify"], timeout=300)
    assert json.loads(verified.stdout)["local"]["right"] is True


def test_the_command_again_changes_nothing(recovered, host, lost):
    host.run(f"cd {FORMULA} && {COMMAND}", timeout=900)
    assert host.read(SECRETS) == lost["secrets"]
    assert database.sql(host, "select count(*) from log", port=5444) == "1"


def test_a_wrong_key_is_one_line(recovered, host):
    """And touches nothing."""
    host.run("age-keygen -o /root/stranger.txt")
    answer = host.run(f"{FORMULA}/bin/recover /root/slm-copy.age /root/stranger.txt", check=False)
    assert answer.returncode != 0
    assert "cannot be opened with /root/stranger.txt" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert database.active(host) == "active"
