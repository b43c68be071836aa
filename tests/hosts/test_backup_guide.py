"""What the guide to backups says to do when something happened is done, on a booted host."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import documents
from tests.support import host_database as database
from tests.support.host import FORMULA

GUIDE = documents.CHECKOUT / "docs/backup.md"
MOMENT, DUMP = "2026-11-23T20:15:00+00:00", "20261124T030000Z"
DATA, REPOSITORY = "/var/lib/postgresql/15", "/var/lib/pgbackrest"
SECRETS = "/etc/autobot/slm-secrets.env"
NOW = "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"')"
TABLE = """
CREATE TABLE nodes (id serial PRIMARY KEY, name text);
INSERT INTO nodes (name) SELECT 'node ' || n FROM generate_series(1, 9) n"""


@pytest.fixture(scope="module")
def pillar(tmp_path_factory):
    """With a recipient of the off-host copy, whose secret key never was on the host."""
    path = tmp_path_factory.mktemp("vault") / "identity.txt"
    subprocess.run(["age-keygen", "-o", str(path)], check=True, capture_output=True)
    words = ["age-keygen", "-y", str(path)]
    public = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    backup = {"copy": {"recipients": [public]}, "retention": {"full": 2}}
    return {"backup": backup, "health": {"timeout": 30}}


@pytest.fixture(scope="module")
def host(boot, applied_layers, pillar):
    """A host with its data and its repository on disks of their own, and a table."""
    made = boot(applied_layers("bookworm"))
    made.push_formula()
    made.write("/srv/pillar/top.sls", "base: {'*': [slm_database]}\n")
    tell(made, pillar)
    made.run(f"systemctl stop {database.UNIT}")
    for directory in (DATA, REPOSITORY):
        made.run(f"cp -a {directory} /srv/kept")
        options = "size=1g,uid=postgres,gid=postgres,mode=0750"
        made.run(f"mount -t tmpfs -o {options} disk {directory}")
        made.run(f"cp -a /srv/kept/. {directory} && rm -r /srv/kept")
    database.apply(made)
    sql(made, TABLE)
    call(made, "slmdb_backup.create", "full")
    yield made
    made.close()


def tell(host, pillar):
    host.write("/srv/pillar/slm_database.sls", json.dumps({"slm_database": pillar}))


def call(host, *words):
    answer = host.run([f"{FORMULA}/bin/salt-call", "--out=json", *words])
    return json.loads(answer.stdout)["local"]


def sql(host, statement, check=True):
    words = ["runuser", "-u", "postgres", "--", "psql", "-XAtqd", "autobot_slm", "-c", statement]
    answer = host.run([*words, "-v", "ON_ERROR_STOP=1"], check=check)
    return answer.stdout.strip() if check else answer


def typed(host, scene, moment=MOMENT, dump=DUMP):
    """Type what the guide has for a scene, with these values; each command ends well."""
    commands = documents.commands(GUIDE, scene)
    assert commands
    told = [one.replace(MOMENT, moment).replace(DUMP, dump) for one in commands]
    return [host.run(f"cd {FORMULA} && {one}", timeout=900).stdout for one in told]


def test_a_table_was_dropped(host):
    """It is back with its rows, its key and its sequence; the copy is gone."""
    moment = sql(host, NOW)
    sql(host, "DROP TABLE nodes")
    said = typed(host, "dropped", moment)
    assert " 9\n" in said[1]
    assert sql(host, "INSERT INTO nodes (name) VALUES ('new') RETURNING id") == "10"
    assert host.run("pg_lsclusters -h").stdout.count("\n") == 1


def test_one_table_comes_back_from_a_dump(host):
    """With the rows that it had last night."""
    made = call(host, "slmdb_backup.dump")
    sql(host, "DROP TABLE nodes")
    said = typed(host, "dump", dump=made["name"])
    assert made["name"] in said[0] and "TABLE DATA public nodes" in said[1]
    assert sql(host, "SELECT count(*), max(id) FROM nodes") == "10|10"


def test_a_target_that_is_not_there(host):
    """The server's own reason, though systemd starts it; nothing is left."""
    said = database.refusal(host, "slmdb_backup.restore", "restore_point=nope")
    assert "restore point nope: the archived WAL that follows backup" in said
    assert host.run("pg_lsclusters -h").stdout.count("\n") == 1


def test_a_server_that_was_started_while_it_is_replaced(host):
    """What the server did meanwhile does not count: it is stopped before its data is moved."""
    moment = sql(host, NOW)
    sql(host, "DELETE FROM nodes")
    call(host, "slmdb_backup.settle")
    host.run(f"systemctl stop {database.UNIT}")
    command = f"{FORMULA}/bin/salt-call slmdb_backup.restore time={moment} in_place=15/main"
    host.run(f"{command} >/root/said 2>&1 & echo $! >/root/pid")
    there = "test -d /var/lib/postgresql/15/main.restoring"
    host.run(f"until {there}; do sleep 0.02; done; systemctl start {database.UNIT}")
    host.until("! kill -0 $(cat /root/pid)", patience=200)
    assert "main.before-" in host.read("/root/said"), host.read("/root/said")
    assert database.active(host) == "active"
    assert sql(host, "SELECT count(*) FROM nodes") == "10"


def test_the_whole_database_goes_back(host):
    """To before the mistake; what it was is kept beside."""
    moment = sql(host, NOW)
    sql(host, "DELETE FROM nodes")
    typed(host, "back", moment)
    assert sql(host, "SELECT count(*) FROM nodes") == "10"
    assert "main.before-" in host.run(f"ls {DATA}").stdout
    assert database.active(host) == "active"


def test_the_repository_s_disk_is_full(host, pillar):
    """A backup is refused before it begins; with fewer of them kept there is room."""
    for _ in range(2):
        call(host, "slmdb_backup.create", "full")
    database.shrink(host, REPOSITORY, 1024)
    refused = host.run(f"{FORMULA}/bin/salt-call slmdb_backup.create full", check=False)
    assert refused.returncode != 0
    assert "MiB free, the next full backup needs about" in refused.stderr
    _, health = database.health(host)
    lines = health["problems"] + health["warnings"]
    assert any("repository 1 (/var/lib/pgbackrest): its disk has" in line for line in lines)
    tell(host, {**pillar, "backup": {**pillar["backup"], "retention": {"full": 1}}})
    typed(host, "repository")
    rows = call(host, "slmdb_backup.list")
    assert [row["type"] for row in rows].count("full") == 1
    tell(host, pillar)
    host.run(f"mount -o remount,size=1g {REPOSITORY}")


def test_the_data_s_disk_is_full(host):
    """What was not acknowledged is not there, what was is; and everything goes on."""
    call(host, "slmdb_backup.restore")
    dump = call(host, "slmdb_backup.dump")["name"]
    before = sql(host, "INSERT INTO nodes VALUES (11, 'the last') RETURNING id")
    database.shrink(host, DATA, 4096)
    fill = "CREATE TABLE filler AS SELECT repeat('x', 900) FROM generate_series(1, 99999)"
    assert "No space left on device" in sql(host, fill, check=False).stderr
    typed(host, "data", dump=dump)
    assert sql(host, "SELECT max(id), to_regclass('filler') FROM nodes") == f"{before}|"
    assert host.run(f"ls {DATA}").stdout.split() == ["main"]
    assert database.active(host) == "active"
    assert database.health(host)[1]["problems"] == []
    host.run(f"mount -o remount,size=1g {DATA}")


def test_a_copy_is_made(host):
    """Of all that a new host needs beside the repository."""
    typed(host, "copy")
    assert call(host, "slmdb_backup_copy.state")["problem"] is None


def test_the_repository_is_gone(host):
    """It is not begun anew behind anybody's back, but when that is allowed."""
    host.run(f"rm -r {REPOSITORY}/archive {REPOSITORY}/backup")
    refused = host.run(f"{FORMULA}/bin/apply", check=False)
    assert refused.returncode != 0
    assert "held the backups of this instance and holds none now" in refused.stdout + refused.stderr
    assert host.run(f"ls {REPOSITORY}").stdout == ""
    typed(host, "gone")
    assert [row["type"] for row in call(host, "slmdb_backup.list")] == ["full"]
    assert database.health(host)[1]["problems"] == []


def test_the_program_of_the_backups_is_gone(host):
    """As after an apt that took it away: told at once, with the job that failed, and brought."""
    host.run("apt-get remove -qq -y pgbackrest")
    unit = "autobot-slm-backup-differential"
    host.run(f"systemctl start {unit}", check=False)
    report = database.health(host)[1]
    assert [line for line in report["problems"] if "pgBackRest is not installed" in line]
    assert f"{unit} failed (exit-code 203)" in " | ".join(report["warnings"])
    host.run(f"{FORMULA}/bin/apply slm_database.backup", timeout=900)
    assert database.health(host)[1]["problems"] == []
    host.run(f"systemctl start {unit}")
    assert f"{unit} failed" not in " | ".join(database.health(host)[1]["warnings"])


def test_an_instance_that_is_lost_alone(host):
    """What the host has of its own is all that it takes."""
    before, secret = sql(host, "SELECT count(*) FROM nodes"), host.read(SECRETS)
    call(host, "slmdb_backup.settle")
    host.run(f"systemctl stop {database.UNIT} && pg_dropcluster 15 main")
    (problem,) = database.health(host)[1]["problems"]
    assert "state.apply slm_database.recovery brings it back" in problem
    said = typed(host, "lost instance")
    assert "The database is healthy." in said[0]
    assert (sql(host, "SELECT count(*) FROM nodes"), host.read(SECRETS)) == (before, secret)


def test_a_host_whose_secrets_are_lost(host):
    """The repository and its key bring the data back, and a new password is allowed."""
    before = host.read(SECRETS)
    call(host, "slmdb_backup.settle")
    host.run(f"systemctl stop {database.UNIT} && pg_dropcluster 15 main")
    host.run("rm -r /etc/autobot /var/lib/autobot-slm-database")
    said = typed(host, "lost without the copy")
    assert "The database is healthy." in said[0]
    assert sql(host, "SELECT max(name) FROM nodes") == "the last"
    key = "SLM_DB_PASSWORD"
    after = database.environment_value(host, SECRETS, key)
    assert after and after not in before
