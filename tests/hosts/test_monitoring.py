"""The guide to monitoring: somebody is told, every file is named, and a new major is reached."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.support import documents
from tests.support import host_database as database
from tests.support.host import FORMULA
from tests.support.host_database import call, sql

GUIDE = documents.CHECKOUT / "docs/monitoring.md"
DUMP = "20261124T030000Z"
JOBS = ("-full", "-differential", "-dump", "-drill")
DUMPS = "/var/lib/autobot-slm-database/dumps"
SECRETS = "/etc/autobot/slm-secrets.env"


def typed(host, scene, dump=DUMP):
    """Type what the guide has for a scene; each command ends well."""
    told = [one.replace(DUMP, dump) for one in documents.commands(GUIDE, scene)]
    assert told
    return [host.run(f"cd {FORMULA} && {one}", timeout=900).stdout for one in told]


@pytest.fixture(scope="module")
def made(boot, applied_layers):
    """Start a host of a release to which the formula was applied, patient with a busy machine."""
    hosts = []

    def start(release):
        host = boot(applied_layers(release))
        hosts.append(host)
        host.push_formula()
        host.write("/srv/pillar/top.sls", "base: {'*': [slm_database]}\n")
        host.write("/srv/pillar/slm_database.sls", "slm_database: {health: {timeout: 30}}\n")
        host.until("pg_isready -q")
        return host

    yield start
    for host in hosts:
        host.close()


@pytest.fixture(scope="module")
def old(made):
    return made("bookworm")


def test_every_file_of_ours_is_named(old):
    """Whatever has our name on the host is in the guide's table, or below what is."""
    rows = re.findall(r"^\| (`/.*?) \| ", GUIDE.read_text(), re.MULTILINE)
    named = [path.replace("MAJOR", "15") for row in rows for path in re.findall(r"`(/[^`]+)`", row)]
    jobs = [f"/etc/systemd/system/autobot-slm-backup{job}." for job in JOBS]
    words = r"\( -name '*autobot*' -o -name '*slmdb*' \)"
    there = old.run(f"find /etc /opt /run /srv /var -xdev {words} -not -path '{FORMULA}*'").stdout
    # The directory of the secret file; and what systemd makes of a unit has its name.
    links = re.compile(r"/etc/autobot|/etc/systemd/.*\.wants/.*|/(run|var/lib)/systemd/.*")
    assert [
        path
        for path in there.splitlines()
        if not path.startswith((*named, *jobs)) and not links.fullmatch(path)
    ] == []
    for path in (f"{jobs[0]}timer", "/etc/apt/apt.conf.d/52autobot-slm-database"):
        assert path in there


def test_somebody_is_told(old):
    """By the timer's service, as soon as the database is not healthy; before that nobody is."""
    for fence, text in documents.blocks(GUIDE):
        if fence == "ini":
            old.write(text.splitlines()[0].removeprefix("# "), text)
    assert "slm-health.service" in typed(old, "watched")[-1]
    told = "journalctl --no-pager -p alert -u slm-health-told | grep -q unhealthy"
    assert old.run(told, check=False).returncode != 0
    # One that the timer has started already saw the server, and would be the one waited for.
    old.run("systemctl stop slm-health.timer")
    old.until("systemctl show -P ActiveState slm-health.service | grep -qx inactive")
    old.run("systemctl stop autobot-slm-database")
    assert old.run("systemctl start slm-health.service", check=False).returncode != 0
    old.until(told)
    old.run("systemctl disable --now slm-health.timer")
    old.run("systemctl start autobot-slm-database")
    old.until("pg_isready -q")


def test_a_new_major_is_another_host(old, made):
    """Tables, rows, owners and the password come along; the next apply changes nothing more."""
    login = "psql -XAt -h 127.0.0.1 -U autobot_slm -d autobot_slm -c"
    password = database.environment_value(old, SECRETS, "SLM_DB_PASSWORD")
    environment = {"PGPASSWORD": password}
    table = "create table nodes (id serial primary key, name text not null)"
    rows = "insert into nodes (name) select 'node ' || n from generate_series(1, 9) n"
    for statement in (table, rows):
        old.run(f"{login} {shlex.quote(statement)}", env=environment)
    typed(old, "leave")
    dump = call(old, "slmdb_backup.dumps")[-1]["name"]
    new = made("trixie")
    new.write(SECRETS, old.read(SECRETS))
    new.run(f"mkdir -p {DUMPS}")
    packed = old.run(f"tar -C {DUMPS} -cz {dump} | base64").stdout
    new.run(f"base64 -d | tar -C {DUMPS} -xz", stdin=packed)
    typed(new, "arrive", dump)
    count = f"{login} 'select count(*) from nodes'"
    assert new.run(count, env=environment).stdout.strip() == "9"
    assert sql(new, "show server_version").startswith("17")
    new.run(f"{login} \"insert into nodes (name) values ('new')\"", env=environment)
    assert database.changed(database.apply_states(new)) == set()
