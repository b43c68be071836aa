"""The backups' timers on a booted host: one that somebody stopped or masked is told, and mended."""

from __future__ import annotations

import pytest

from tests.support import host_database as database

ID = "Backups are made when the schedule says so"
STATE = f"slmdb_backup_|-{ID}_|-{ID}_|-scheduled"
TIMER = "autobot-slm-backup-differential.timer"
COUNT = '#!/bin/sh\necho "$*" >>/run/asked\nexec /usr/bin/systemctl "$@"\n'


@pytest.fixture(scope="module")
def host(boot, applied_layers):
    """A host that was applied."""
    made = boot(applied_layers("bookworm"))
    made.push_formula()
    yield made
    made.close()


def shown(host):
    """How often a run that changes nothing, or a report, asks systemd."""
    lines = host.read("/run/asked").splitlines()
    host.run("rm /run/asked")
    return len([line for line in lines if line.startswith("show ") and "autobot-slm" in line])


def stopped(host):
    return [line for line in database.health(host)[1]["problems"] if "autobot-slm-backup" in line]


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (f"systemctl stop {TIMER}", f"{TIMER} is inactive"),
        (
            f"rm /etc/systemd/system/{TIMER} && systemctl mask --now {TIMER}",
            f"{TIMER} is masked",
        ),
        (
            "rm /etc/systemd/system/autobot-slm-backup-full.service && "
            "systemctl mask autobot-slm-backup-full.service",
            "autobot-slm-backup-full.service is masked",
        ),
    ],
)
def test_a_timer_that_does_not_run(host, how, line):
    """Health says what and what to do; an apply announces it, does it, and has it done."""
    assert stopped(host) == []
    host.run(how)
    assert stopped(host) == [f"{line}; state.apply slm_database.backup mends it"]
    announced = database.apply_states(host, "test=True")
    assert database.announced(announced) == {STATE}
    made = database.apply_states(host)
    assert database.failed(made) == {} and made[STATE]["changes"] == announced[STATE]["changes"]
    assert stopped(host) == []
    assert database.active(host, TIMER) == "active"
    assert database.changed(database.apply_states(host)) == set()


def test_systemd_is_asked_once(host):
    """By a run that changes nothing, and by a report: the timers are in the same question."""
    host.write("/usr/local/bin/systemctl", COUNT)
    host.run("chmod 755 /usr/local/bin/systemctl")
    database.call(host, "state.apply", "slm_database")
    assert shown(host) == 1
    database.health(host)
    assert shown(host) == 1
