"""Timers on a booted host: they need no checkout, and what fails is seen where one looks."""

from __future__ import annotations

import json

import pytest

from tests.support import host as hosts
from tests.support.host import FORMULA

PILLAR = "slm_database: {backup: {enabled: true, drill: {keep_free: 0%}}, health: {timeout: 30}}\n"
UNIT = "autobot-slm-backup-drill"
DUMPS = "/var/lib/autobot-slm-database/dumps"
RECORD = "/var/lib/autobot-slm-database/drill.json"


@pytest.fixture(scope="module")
def host(boot):
    """A host that was applied, has a backup, and has lost the checkout since."""
    made = boot(hosts.prepared("bookworm"))
    made.push_formula()
    made.write("/srv/pillar/top.sls", "base: {'*': [slm_database]}\n")
    made.write("/srv/pillar/slm_database.sls", PILLAR)
    made.run(f"{FORMULA}/bin/apply", timeout=600)
    made.run(f"{FORMULA}/bin/salt-call slmdb_backup.create")
    made.run(f"rm -r {FORMULA} /srv/pillar")
    yield made
    made.close()


def test_the_timers_wait(host):
    """For the next time that their calendar names; nothing ran meanwhile."""
    listed = host.run("systemctl list-timers --no-legend 'autobot-slm-backup-*'").stdout
    for job in ("full", "differential", "dump", "drill"):
        assert f"autobot-slm-backup-{job}.timer" in listed
    units = [f"autobot-slm-backup-{job}.service" for job in ("full", "dump", "drill")]
    host.run(["systemd-analyze", "verify", *units])


def test_the_dump_s_timer_makes_a_dump(host):
    """Fired by its calendar, here within seconds; pg_restore reads what it left, whole."""
    timer = "autobot-slm-backup-dump.timer"
    assert "*-*-* 03:00:00" in host.run(f"systemctl show -p TimersCalendar {timer}").stdout
    soon = "[Timer]\nOnCalendar=\nOnCalendar=*-*-* *:*:0/2\nAccuracySec=100ms\n"
    host.write(f"/run/systemd/system/{timer}.d/soon.conf", soon)
    host.run(f"systemctl daemon-reload && systemctl restart {timer}")
    host.until(f"ls {DUMPS}/*/globals.sql", patience=300)
    host.run(f"rm -r /run/systemd/system/{timer}.d && systemctl daemon-reload")
    host.run(f"systemctl restart {timer}")
    state = "systemctl show -P ActiveState autobot-slm-backup-dump.service"
    host.until(f"{state} | grep -qx inactive", patience=300)
    name = host.run(f"ls {DUMPS}").stdout.split()[0]
    said = host.run(f"runuser -u postgres -- pg_restore -f - {DUMPS}/{name}/autobot_slm.dump")
    assert "PostgreSQL database dump complete" in said.stdout
    assert "ROLE autobot_slm" in host.read(f"{DUMPS}/{name}/globals.sql")
    assert host.run("systemctl --failed --no-legend").stdout == ""
    assert host.run("journalctl -q -o cat -u autobot-slm-backup-dump -p warning").stdout == ""


def test_the_drill_s_unit_proves_the_backup(host):
    """As the timer starts it; it leaves the result, and nothing else."""
    before = host.run("ls -A /var/lib/postgresql/15 /run").stdout
    host.run(f"systemctl start {UNIT}.service", timeout=900)
    last = json.loads(host.read(RECORD))["last"]
    assert last["proven"] is True and last["network"] is False
    assert host.run("ls -A /var/lib/postgresql/15 /run").stdout == before
    assert host.run("pg_lsclusters -h").stdout.count("\n") == 1


def test_a_drill_that_fails_is_a_failed_unit(host):
    """With the reason in the journal, and not more than that."""
    host.run("find /var/lib/pgbackrest/backup -name 'backup.manifest*' -exec sh -c ': >{}' ';'")
    assert host.run(f"systemctl start {UNIT}.service", check=False, timeout=900).returncode != 0
    assert UNIT in host.run("systemctl --failed --no-legend").stdout
    journal = host.run(f"journalctl --sync; journalctl -q -o cat -u {UNIT} --since=-5min").stdout
    assert "pgbackrest" in journal and len(journal) < 8000
    last = json.loads(host.read(RECORD))
    assert last["last"]["proven"] is False and last["proven"]["proven"] is True
