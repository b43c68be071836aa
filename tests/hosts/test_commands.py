"""bin/apply and bin/salt-call: what they pass on, what they use, what they leave alone."""

from __future__ import annotations

import json

import pytest

from tests.support import host as hosts
from tests.support.host import FORMULA

OTHER = """
def told():
    return "another formula"
"""
FAILS = """
{%- if pillar.get("until") %}
{%- set file = pillar["until"] %}
{%- set wait = "echo $PPID >" ~ file ~ ".pid; until [ -e " ~ file ~ " ]; do sleep 0.1; done" %}
{%- do salt["cmd.shell"](wait, timeout=120) %}
{%- endif %}
This fails:
  test.{{ "succeed" if pillar.get("fine") else "fail" }}_without_changes: []
"""


@pytest.fixture(scope="module")
def host(boot):
    """A host with our Salt at hand, and a formula of somebody else's."""
    made = boot(hosts.prepared("trixie"))
    made.push_formula()
    made.write("/srv/other/_modules/other.py", OTHER)
    made.write("/srv/other/slm_database/init.sls", FAILS)
    yield made
    made.close()


def salt_call(host, *words):
    """What a function returns, called through bin/salt-call."""
    answer = host.run([f"{FORMULA}/bin/salt-call", "--out=json", *words])
    return json.loads(answer.stdout)["local"]


def test_the_callers_root_wins(host):
    """Modules and states come from the caller's --file-root, in both spellings."""
    assert salt_call(host, "--file-root=/srv/other", "other.told") == "another formula"
    assert salt_call(host, "--file-root", "/srv/other", "other.told") == "another formula"
    assert salt_call(host, "slmdb_pillar.get", "port") == 5432


def test_options_and_arguments_are_passed_on(host):
    """Salt's log level, output and the arguments of state.apply are the caller's."""
    command = f"{FORMULA}/bin/apply --file-root=/srv/other test=True"
    talk = host.run(f"{command} -l debug --out json", check=False)
    assert "[DEBUG" in talk.stderr
    (state,) = json.loads(talk.stdout)["local"].values()
    assert state["__id__"] == "This fails"
    host.run(f"{command} pillar='{{fine: true}}'")


def test_a_failed_state_is_a_failed_command(host):
    """The exit status tells, with test=True as well; the state is named while it runs."""
    for arguments in ("", "test=True"):
        answer = host.run(f"{FORMULA}/bin/apply --file-root=/srv/other {arguments}", check=False)
        assert answer.returncode != 0
        assert "    This fails" in answer.stderr.splitlines()


def test_two_at_the_same_time(host):
    """The second waits for the first, and both end."""
    command = f"timeout 200 {FORMULA}/bin/apply --file-root=/srv/other test=True"
    both = f"""
        set -e
        until_said() {{ timeout 100 sh -c 'until grep -qs "$1" "$2"; do sleep 0.1; done' - "$@"; }}
        {command} pillar='{{fine: true, until: /root/waits}}' >/root/one 2>&1 & one=$!
        until_said Applying /root/one
        {command} pillar='{{fine: true}}' >/root/two 2>&1 & two=$!
        until_said "Waiting for another bin/apply to end" /root/two
        touch /root/waits
        wait $one
        wait $two
    """
    host.run(both, timeout=500)
    said = [host.read(f"/root/{name}") for name in ("one", "two")]
    assert all("    This fails" in one and "Succeeded: 1" in one for one in said)


def test_a_full_disk_keeps_nobody_from_asking(host):
    """What is written already is not written again; what cannot be written is named."""
    full = "/var/lib/autobot-slm-database"
    salt_call(host, "test.ping")
    host.run(f"cp -a {full} /root/kept; mount -t tmpfs -o size=64k tmpfs {full}")
    host.run(f"cp -a /root/kept/. {full}")
    try:
        host.run(f"cat /dev/zero >{full}/zeros", check=False)
        before = host.run(f"find {full}").stdout
        assert salt_call(host, "test.ping") is True
        assert host.run(f"find {full}").stdout == before
        host.run(
            f"rm {full}/salt/minion; truncate -s -1K {full}/zeros; cat /dev/zero >>{full}/zeros",
            check=False,
        )
        answer = host.run(f"{FORMULA}/bin/salt-call test.ping", check=False)
        assert answer.returncode != 0
        assert f"{full}/salt/minion cannot be written" in answer.stderr
    finally:
        host.run(f"umount {full}")


def test_a_killed_run_leaves_no_pillar_for_long(host):
    """A pillar may hold secrets: it is in memory only, and the next run takes it away."""
    command = f"{FORMULA}/bin/apply --file-root=/srv/other"
    places = "/run /tmp /var/tmp /var/lib/autobot-slm-database"
    killed = f"{command} pillar='{{fine: true, word: canary-1}}' >/dev/null 2>&1 & "
    found = f"grep -rls --include='*.yaml' canary-1 {places}"
    killed += f"until found=$({found}); do sleep 0.02; done; "
    left = host.run(f"{killed} kill -9 $!; echo $found").stdout.split()
    assert left and all(path.startswith("/run/") for path in left)
    host.run(f"{command} test=True pillar='{{fine: true}}'", timeout=200)
    assert host.run(f"grep -rls canary-1 {places}", check=False).stdout == ""


@pytest.mark.parametrize(
    ("kill", "status", "line"),
    [
        ("-TERM $apply", 143, "==> Interrupted by SIGTERM; run it again"),
        ("-INT -- -$apply", 130, "==> Interrupted by SIGINT; run it again"),
        ("-HUP $apply", 129, "==> Interrupted by SIGHUP; run it again"),
        ("-TERM $(cat /root/until.pid)", 1, "==> Salt ended without a result; run it again"),
        ("-INT $(cat /root/until.pid)", 1, "==> Salt ended without a result; run it again"),
        ("-KILL $(cat /root/until.pid)", 137, "==> Salt ended without a result; run it again"),
    ],
)
def test_an_interrupted_run_is_no_success(host, kill, status, line):
    """It says so, asks no health, and ends after what it started."""
    host.run("rm -f /root/until*")
    command = f"{FORMULA}/bin/apply --file-root=/srv/other"
    answer = host.run(
        f"""
        set -m
        {command} pillar='{{fine: true, until: /root/until}}' >/root/said 2>&1 & apply=$!
        timeout 100 sh -c 'until [ -s /root/until.pid ]; do sleep 0.1; done'
        kill {kill}
        sleep 1
        ! kill -0 $apply 2>/dev/null || echo waits
        touch /root/until
        wait $apply
        echo ended with $?
        ls -d /run/autobot-slm-database-apply
        ps -o pid=,args= -p $(cat /root/until.pid)
        pgrep -af 'tail -n [+]1 --follow'
        """,
        check=False,
    )
    told = answer.stdout.splitlines()
    assert told[-1] == f"ended with {status}"
    assert told[0] == "waits" or "$apply" not in kill
    said = host.read("/root/said")
    assert any(one.startswith(line) for one in said.splitlines())
    assert "health" not in said


def test_an_interrupted_run_ends_where_nobody_reaps(host):
    """In a container whose first process is no init what has ended stays in the list."""
    host.run("rm -f /root/until* /root/said")
    host.write(
        "/root/contained",
        f"""
        {FORMULA}/bin/apply --file-root=/srv/other \\
          pillar='{{fine: true, until: /root/until}}' >/root/said 2>&1 & apply=$!
        (
          until [ -s /root/until.pid ]; do sleep 0.1; done
          kill $apply; sleep 1; touch /root/until
        ) &
        exec sleep 1000
        """,
    )
    host.run(
        """
        unshare --pid --fork --kill-child --mount-proc bash /root/contained >/dev/null 2>&1 &
        contained=$!
        timeout 60 sh -c 'until grep -qs "Interrupted by SIGTERM" /root/said; do sleep 0.2; done'
        ended=$?
        kill $contained
        cat /root/said
        exit $ended
        """
    )


def test_a_full_disk_of_logs_holds_nobody_up(host):
    """The run ends, with its result."""
    logs = "/var/log/autobot-slm-database"
    host.run(f"mount -t tmpfs -o size=64k tmpfs {logs}; cat /dev/zero >{logs}/zeros", check=False)
    try:
        command = f"{FORMULA}/bin/apply --file-root=/srv/other test=True pillar='{{fine: true}}'"
        assert "Succeeded: 1" in host.run(command, timeout=100).stdout
    finally:
        host.run(f"umount --lazy {logs}")


def test_an_interrupted_call_is_no_success(host):
    """Whoever calls bin/salt-call from cron or a script learns that nothing was done."""
    for number in ("TERM", "INT"):
        call = f"timeout --preserve-status -s {number} 8 {FORMULA}/bin/salt-call test.sleep 60"
        assert host.run(call, check=False).returncode != 0


def test_a_minion_that_only_tests_by_itself_does_not_count(host):
    """Who calls bin/apply without test=True wants it applied."""
    host.write("/etc/salt/minion.d/test.conf", "test: true\n")
    try:
        assert salt_call(host, "config.get", "test") is False
    finally:
        host.run("rm /etc/salt/minion.d/test.conf")


def test_the_health_is_asked_with_the_pillar_of_the_run(host):
    """Above the host's own, which may come from somewhere else too."""
    health = (
        'return {"healthy": True, "problems": [], "warnings": [str(sorted(__pillar__.items()))]}'
    )
    host.write("/srv/other/_modules/slmdb.py", f"def health(timeout):\n    {health}\n")
    theirs = """ext_pillar: [{cmd_yaml: "echo '{theirs: 1, both: 1}'"}]\n"""
    host.write("/etc/salt/minion.d/theirs.conf", theirs)
    command = f"{FORMULA}/bin/apply --file-root=/srv/other pillar='{{fine: true, both: 2}}'"
    try:
        answer = host.run(command)
    finally:
        host.run("rm /srv/other/_modules/slmdb.py /etc/salt/minion.d/theirs.conf")
    assert "[('both', 2), ('fine', True), ('theirs', 1)]" in answer.stdout + answer.stderr


def test_the_environment_does_not_matter(host):
    """No HOME, no locale, an ignored SIGHUP, another directory, a link: the same."""
    host.run(f"ln -sf {FORMULA}/bin/salt-call /usr/local/sbin/formula")
    bare = "cd /tmp && trap '' HUP && env -i /usr/local/sbin/formula --out=json test.echo 'ü x'"
    assert json.loads(host.run(bare).stdout) == {"local": "ü x"}


def test_only_root_may(host):
    """One line says what to do."""
    answer = host.run(f"setpriv --reuid=65534 {FORMULA}/bin/apply", check=False)
    assert answer.returncode != 0
    assert answer.stderr.strip() == f"apply: must run as root: sudo {FORMULA}/bin/apply"


def test_an_installed_salt_is_used_and_left_alone(host):
    """Its version, id, grains and pillar count; its cache and configuration are not touched."""
    host.run("cp -a /opt/autobot-slm-database/salt-* /opt/theirs && rm -rf /opt/theirs/.complete")
    host.write(
        "/usr/local/bin/salt-call",
        '#!/bin/sh\nexec /opt/theirs/bin/python3 /opt/theirs/bin/salt-call "$@"\n',
    )
    host.run("chmod 755 /usr/local/bin/salt-call && mkdir -p /var/cache/salt/minion/extmods")
    host.write("/etc/salt/minion", "id: somebody\npillar_roots: {base: [/srv/theirs]}\n")
    host.write("/etc/salt/minion.d/own.conf", "file_client: remote\ngrains: {site: north}\n")
    host.write("/etc/salt/grains", "rack: 4\n")
    host.write("/srv/theirs/top.sls", "base: {somebody: [settings]}\n")
    host.write("/srv/theirs/settings.sls", "slm_database: {port: 5499}\n")
    before = host.snapshot("/etc/salt", "/var/cache/salt")
    try:
        grains = salt_call(host, "grains.item", "id", "site", "rack", "pythonexecutable")
        assert grains.pop("pythonexecutable").startswith("/opt/theirs/")
        assert grains == {"id": "somebody", "site": "north", "rack": 4}
        assert salt_call(host, "slmdb_pillar.get", "port") == 5499
        host.run(f"{FORMULA}/bin/apply test=True")
        assert host.snapshot("/etc/salt", "/var/cache/salt") == before
    finally:
        host.run("rm -rf /usr/local/bin/salt-call /etc/salt /opt/theirs")
