"""A real backend's schema is migrated on a booted host, as the guide says."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from tests.support import backend, documents, image
from tests.support import host as hosts
from tests.support import host_database as database
from tests.support.host import FORMULA

RELEASE = "bookworm"
GUIDE = documents.CHECKOUT / "docs/migrations.md"
VENV = f"{backend.DIRECTORY}/venv"
# Another user than the formula's default: what counts is the unit's.
UNIT = f"""\
[Unit]
Description=The SLM backend in miniature

[Service]
User=slmapp
SupplementaryGroups={backend.USER}
WorkingDirectory={backend.DIRECTORY}
Environment="SLM_MARK=from the unit"
ExecStart=/bin/sleep infinity

[Install]
WantedBy=multi-user.target
"""
SAYS = (
    "who = f\"{os.environ['USER']}, {os.environ['SLM_MARK']}\"",
    "op.execute(f\"COMMENT ON TABLE nodes IS '{who}'\")",
)
HISTORY = {**backend.HISTORY, "e1": ("d1", "Says who runs it", *SAYS)}


def _venv_layer(switch):
    """Return a layer that holds the backend's virtual environment and nothing else."""
    below = hosts.prepared(RELEASE)

    def build(wanted):
        host = hosts.Host(below, switch)
        try:
            host.start()
            host.write("/opt/requirements.txt", backend.REQUIREMENTS.read_text())
            host.run(f"python3 -m venv {VENV}")
            host.run(f"{VENV}/bin/pip install -q -r /opt/requirements.txt", timeout=600)
            host.stop()
            (wanted / "opt").mkdir(parents=True)
            made = host.directory / "upper/opt/autobot"
            subprocess.run(["cp", "-a", str(made), str(wanted / "opt")], check=True)
        finally:
            host.close()

    inputs = [*(layer.name for layer in below), backend.REQUIREMENTS.read_text()]
    return image.cached(f"{RELEASE}-backend", inputs, build)


@pytest.fixture(scope="module")
def host(switch, boot, applied_layers):
    """A host with the formula applied and the backend deployed, its database still empty."""
    made = boot([*applied_layers(RELEASE), _venv_layer(switch)])
    made.push_formula()
    made.run("useradd --system --no-create-home slmapp")
    for name, text in backend.files(HISTORY).items():
        made.write(backend.DIRECTORY / name, text)
    made.write("/etc/systemd/system/autobot-slm-backend.service", UNIT)
    made.run("systemctl daemon-reload && systemctl enable --now autobot-slm-backend")
    yield made
    made.close()


def revision(host):
    answer = host.run([f"{FORMULA}/bin/salt-call", "--out=json", "slmdb.revision"])
    return json.loads(answer.stdout)["local"]


def migrate(host, *arguments, check=True):
    return database.apply(host, "slm_database.migration", *arguments, check=check)


def guide():
    """The commands of the guide that need a deployed backend."""
    return documents.commands(GUIDE, "backend")


def test_a_migration_as_the_guide_says(host):
    """Announced, read as SQL, approved, done, read back; the backend is not interrupted."""
    assert revision(host)["state"] == "not tracked"
    assert database.changed(database.apply_states(host)) == set()
    pid = database.show(host, "autobot-slm-backend", "MainPID")
    typed = guide()
    assert len(typed) == 5
    said = [host.run(f"cd {FORMULA} && {command}", timeout=600).stdout for command in typed]
    for message in ("Nodes have a region", "Traces and rules come together"):
        assert message in said[0]
    assert "Nodes have a region" in said[1]
    assert "CREATE TABLE heartbeats" in said[2]
    assert "the database is empty" in said[3]
    assert "Restore point: " in said[3]
    found = revision(host)
    assert (found["state"], found["current"], found["heads"]) == ("up to date", ["e1"], ["e1"])
    assert database.show(host, "autobot-slm-backend", "MainPID") == pid


def test_it_ran_as_the_units_user_with_the_units_environment(host):
    """What the migration saw is what systemd gives the backend."""
    statement = "SELECT obj_description('nodes'::regclass)"
    words = ["runuser", "-u", "postgres", "--", "psql", "-XAtd", "autobot_slm", "-c", statement]
    assert host.run(words).stdout.strip() == "slmapp, from the unit"


def test_the_second_run_changes_nothing(host):
    """Neither the migration nor the default run finds anything left to do."""
    states = json.loads(migrate(host, "--out=json").stdout)["local"]
    assert database.changed(states) == set()
    status, health = database.health(host)
    assert status == 0
    assert health["tables"]["missing"] == []
    assert health["migration"]["up_to_date"] is True


def test_a_later_migration_needs_an_approval(host):
    """The default run leaves it alone, health warns, the migration's own run names the two ways."""
    host.write(
        backend.DIRECTORY / "migrations/versions/f1.py",
        backend.revision("f1", "e1", "Later", backend.sql("CREATE TABLE later (id int)")),
    )
    assert database.changed(database.apply_states(host)) == set()
    status, health = database.health(host)
    assert status == 0
    assert any("waiting: f1" in line for line in health["warnings"])
    answer = migrate(host, check=False)
    assert answer.returncode != 0
    assert "A schema change needs a window or an approval" in answer.stdout
    assert revision(host)["current"] == ["e1"]
    (approving,) = (command for command in guide() if "approve" in command)
    approved = shlex.split(approving)[2]
    assert "approved for this run" in migrate(host, approved).stdout
    assert revision(host)["current"] == ["f1"]
