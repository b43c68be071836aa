"""On a booted host no setting and no rule takes the database away from whoever is connected."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from tests.functional.test_slmdb_config import UNKNOWN, UNSEEN
from tests.functional.test_slmdb_config_bad import RULES, SETTINGS
from tests.support import host_database as database
from tests.support.host import FORMULA

# What needs no server to be refused is left to the functional layer, which has them all.
CASES = {
    name: ({"settings": given}, words)
    for name, (given, words) in SETTINGS.items()
    if not re.search("allow_unsafe|backup:enabled", words)
}
CASES |= {
    name: ({"hba": {"before": [rule]}}, words)
    for name, (rule, words) in RULES.items()
    if "would be" in words
}
WITNESS = "psql -h /var/run/postgresql -U autobot_slm autobot_slm -c 'select pg_sleep(86400)'"
SEEN = "select pid, backend_start from pg_stat_activity where application_name = 'witness'"
FILES = "cd /etc/postgresql/*/main && ls -i conf.d/* pg_*.conf && cat conf.d/* pg_*.conf"


@pytest.fixture(scope="module")
def host(boot, applied_layers):
    made = boot(applied_layers("trixie"))
    made.push_formula()
    made.run("systemctl start autobot-slm-database && until pg_isready -q; do sleep 0.1; done")
    made.run(f"PGAPPNAME=witness setsid {WITNESS} > /dev/null 2>&1 < /dev/null &")
    there = "count(*) = 1 FROM pg_stat_activity WHERE application_name = 'witness'"
    database.until(made, there)
    yield made
    made.close()


def told(host, pillar, sls="slm_database.access"):
    """Apply the components up to the access rules, and return what each state said."""
    words = [f"{FORMULA}/bin/salt-call", "--out=json", "state.apply", sls]
    words.append("pillar=" + json.dumps({"slm_database": pillar}))
    return json.loads(host.run(words, check=False).stdout)["local"]


@pytest.mark.parametrize("case", CASES)
def test_a_bad_case_leaves_everything_as_it_was(host, case):
    """One line with the pillar key; the session of before is the same, and others can log in."""
    pillar, words = CASES[case]
    before = (host.run(FILES).stdout, database.sql(host, SEEN), database.postmaster(host))
    assert before[1] != ""
    comments = "\n".join(str(line) for line in database.failed(told(host, pillar)).values())
    assert re.search(words, comments), comments
    after = (host.run(FILES).stdout, database.sql(host, SEEN), database.postmaster(host))
    assert after == before
    assert database.ready(host) == database.READY


def test_after_all_that_the_host_is_healthy_and_a_run_changes_nothing(host):
    """The last good configuration is in force, and no attempt left anything behind."""
    assert database.changed(told(host, {}, "slm_database")) == set()
    status, report = database.health(host)
    assert (status, report["problems"], report["pending"]) == (0, [], [])
    assert host.run("ls -A /var/lib/postgresql").stdout.split() == ["17"]


@pytest.mark.parametrize(
    ("verb", "line", "words"),
    [("restart", UNSEEN, "shared memory"), ("start", UNKNOWN, "nosuch")],
)
def test_a_start_that_fails_all_the_same_goes_back_to_the_last_good_configuration(
    host, verb, line, words
):
    """Somebody broke our file by hand: the server is up again soon after the failure."""
    conf = "/etc/postgresql/17/main/conf.d/50-autobot-slm.conf"
    good = host.read(conf)
    host.write(conf, f"{good}{line}\n")
    if verb == "start":
        host.run("systemctl stop autobot-slm-database")
    command = [f"{FORMULA}/bin/salt-call", "--out=json", f"slmdb_lastgood.{verb}"]
    answer = host.run(command, check=False, timeout=300)
    assert answer.returncode != 0
    said = re.search(rf"{words}.*in force again, the server was away for (\d+) s", answer.stderr)
    assert said, answer.stderr
    assert int(said[1]) < 90  # not the minutes of a start that hangs
    assert host.read(conf) == good
    assert database.active(host) == "active" and database.ready(host) == database.READY


KILLED = """#!/bin/sh
[ "$1" = restart ] || exec /usr/bin/systemctl "$@"
/usr/bin/systemctl "$@" & sleep 0.05
kill -9 $! $$
"""


def test_a_restart_whose_systemctl_is_killed_goes_on(host):
    """The new settings are in force; nothing is taken back and nothing has failed."""
    before = database.postmaster(host)
    host.write("/usr/local/sbin/systemctl", KILLED)
    host.run("chmod 755 /usr/local/sbin/systemctl")
    settings = {"settings": {"shared_buffers": "208MB"}, "restart": "now"}
    try:
        assert database.failed(told(host, settings, "slm_database.service")) == {}
    finally:
        host.run("rm /usr/local/sbin/systemctl")
    assert database.postmaster(host) != before
    assert database.sql(host, "show shared_buffers") == "208MB"


def test_a_report_of_a_server_that_does_not_start_says_why(host):
    """In the server's own last words, before anybody looks into a log."""
    auto = host.run("echo /var/lib/postgresql/*/main/postgresql.auto.conf").stdout.strip()
    host.run(f"cp -a {auto} /root/auto.conf; echo {shlex.quote(UNKNOWN)} >>{auto}")
    try:
        host.run("systemctl restart autobot-slm-database", check=False)
        status, report = database.health(host)
    finally:
        host.run(f"cp -a /root/auto.conf {auto}; systemctl reset-failed autobot-slm-database")
        host.run("systemctl restart autobot-slm-database")
    (line,) = [line for line in report["problems"] if line.startswith("the unit ")]
    assert status != 0 and 'could not access file "nosuch"' in line
    assert database.health(host)[1]["server"]["unit"]["last_words"] is None


def test_what_waits_for_a_restart_waits_until_it_is_permitted(host):
    """A run parks it; restart: now carries it out, once."""
    settings = {"settings": {"shared_buffers": "200MB"}}
    before = database.postmaster(host)
    assert database.failed(told(host, settings, "slm_database.service")) == {}
    assert database.postmaster(host) == before
    _, report = database.health(host)
    (row,) = report["pending"]
    assert (row["name"], row["new"]) == ("shared_buffers", "200MB")
    settings["restart"] = "now"
    assert database.failed(told(host, settings, "slm_database.service")) == {}
    assert database.postmaster(host) != before
    assert database.sql(host, "show shared_buffers") == "200MB"
    assert database.changed(told(host, settings, "slm_database.service")) == set()


UNIT = "/etc/systemd/system/autobot-slm-database.service"


@pytest.mark.parametrize("harm", [f"rm {UNIT}", f"ln -sf /dev/null {UNIT}"])
def test_a_unit_that_somebody_took_away(host, harm):
    """It is put back, still starts at boot, and test=True announces no more than that."""
    words = f"{FORMULA}/bin/salt-call --out=json state.apply slm_database.service"
    host.run(words)  # without what other tests told it
    before = database.postmaster(host)
    host.run(f"{harm} && systemctl daemon-reload")
    changed = []
    for test in ("test=True", ""):
        states = json.loads(host.run(f"{words} {test}", check=False).stdout)["local"].values()
        assert database.failed({one["__id__"]: one for one in states}) == {}
        changed.append({one["__id__"] for one in states if one["changes"]})
    assert changed == [{"Our unit is what starts the instance"}] * 2
    assert host.run("systemctl is-enabled autobot-slm-database").stdout.strip() == "enabled"
    assert database.postmaster(host) == before
