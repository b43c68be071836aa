"""What is on a host already: an instance, somebody on our port, the backend."""

from __future__ import annotations

from tests.support import host_database as database

BACKEND = """
[Unit]
Description=a stand-in for the backend
[Service]
ProtectHome=true
ExecStart=/bin/sh -c 'env >/run/backend.env; exec sleep infinity'
Restart=always
[Install]
WantedBy=multi-user.target
"""


def test_an_older_instance_is_adopted(prepared_host):
    """A port that something else holds stops the run; apt's instance on 5433 keeps its data."""
    host = prepared_host
    host.serve(5432)
    before = host.snapshot("/etc", "/usr", "/var/lib")
    refused = database.apply(host, check=False)
    assert refused.returncode != 0
    assert len([line for line in refused.stdout.splitlines() if "5432" in line]) >= 1
    assert host.snapshot("/etc", "/usr", "/var/lib") == before

    host.run("apt-get -qy install postgresql", timeout=600)
    host.run("systemctl start postgresql")
    database.sql(host, "create table kept as select 42 as answer", port=5433)
    identifier = database.system_identifier(host)
    host.run("systemctl stop held-5432")

    assert database.failed(database.apply_states(host)) == {}
    assert database.system_identifier(host) == identifier
    assert database.sql(host, "select answer from kept") == "42"
    assert database.ready(host) == database.READY
    assert database.changed(database.apply_states(host)) == set()


def test_the_backend_knows_its_database(applied_host):
    """The backend gets the secrets, may read certificates, and survives the database's troubles."""
    host, unit = applied_host, "autobot-slm-backend"
    host.write(f"/etc/systemd/system/{unit}.service", BACKEND)
    host.run(f"systemctl daemon-reload && systemctl enable --now {unit}")
    assert database.show(host, unit, "ProtectHome") == "read-only"
    assert f"{database.UNIT}.service" in database.show(host, unit, "After").split()
    assert f"{database.UNIT}.service" in database.show(host, unit, "Wants").split()
    host.until("grep -q ^SLM_DB_PASSWORD= /run/backend.env")
    assert "\nDATABASE_URL=postgresql+asyncpg://autobot_slm:" in "\n" + host.read(
        "/run/backend.env"
    )

    process = database.show(host, unit, "MainPID")
    host.run(f"systemctl stop {database.UNIT} && systemctl start {database.UNIT}")
    before = database.postmaster(host)
    host.run(f"kill -9 {before}")
    assert database.came_back(host, before)
    assert (database.active(host, unit), database.show(host, unit, "MainPID")) == (
        "active",
        process,
    )
    host.reboot()
    assert (database.active(host), database.active(host, unit)) == ("active", "active")


def test_clean_keeps_what_is_precious(applied_host):
    """Without its keys, clean keeps data, role and secret and says so; with them, not."""
    host, secret = applied_host, "/etc/autobot/slm-secrets.env"
    password = host.read(secret)
    identifier = database.system_identifier(host)
    cleaned = database.apply(host, "slm_database.clean")
    for kept in ("clean:data", "role autobot_slm", secret):
        assert kept in cleaned.stdout
    assert host.read(secret) == password
    assert database.system_identifier(host) == identifier
    assert host.run("ls /etc/systemd/system | grep autobot-slm", check=False).stdout == ""
    assert database.changed(database.apply_states(host, "slm_database.clean")) == set()

    assert database.failed(database.apply_states(host)) == {}
    assert host.read(secret) == password
    assert database.health(host)[0] == 0

    keys = "{data: true, role: true, secret: true, packages: true}"
    everything = f"pillar={{slm_database: {{clean: {keys}}}}}"
    announced = database.apply_states(host, "slm_database.clean", everything, "test=True")
    states = database.apply_states(host, "slm_database.clean", everything)
    assert database.failed(announced) == database.failed(states) == {}
    assert database.changed(announced) == database.changed(states)
    assert host.run("ls /usr/lib/postgresql/*/bin/postgres", check=False).stdout == ""
    assert host.run(f"ls {secret} /var/lib/postgresql/*/main", check=False).stdout == ""
