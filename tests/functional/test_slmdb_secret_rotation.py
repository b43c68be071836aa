"""Rotation: in file, server and backend, or not at all; and older installs taken over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

from tests.support import secrets
from tests.support.wait import until

SYSTEMD = Path("/run/systemd/system")
TOOLS = Path("/run/tools")
# Stands in for systemd and a backend: the unit's state is in files, the "backend" logs in.
SYSTEMCTL = f"""#!{sys.executable}
import os, pathlib, shutil, sys, time
import psycopg2
tools = pathlib.Path("/run/tools")
with (tools / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "show":
    print("LoadState=" + (tools / "load").read_text())
    print("ActiveState=" + (tools / "active").read_text())
elif sys.argv[1] in ("restart", "reload"):
    shutil.copy("/etc/autobot/slm-secrets.env", tools / "file-at-restart")
    (tools / "said-before").write_text(str(os.stat("/var/log/postgresql/test.log").st_size))
    behaviour = (tools / "behaviour").read_text()
    if behaviour == "fails":
        sys.exit(1)
    if behaviour == "dies":
        (tools / "active").write_text("failed")
    lines = pathlib.Path("/etc/autobot/slm-secrets.env").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines)
    def log_in(password):
        return psycopg2.connect(host="127.0.0.1", user="autobot_slm", dbname="autobot_slm",
                                password=password)
    if behaviour == "refused":
        try:
            log_in("wrong")
        except psycopg2.OperationalError:
            pass
    if behaviour in ("brief", "refused"):
        log_in(values["SLM_DB_PASSWORD"]).close()
    if behaviour == "works" and os.fork() == 0:
        for descriptor in range(3):
            os.close(descriptor)
        session = log_in(values["SLM_DB_PASSWORD"])
        time.sleep(1)
"""
# Stands in for the journal of the server's unit, in any state and language.
JOURNALCTL = f"""#!{sys.executable}
import pathlib, sys
tools = pathlib.Path("/run/tools")
how = (tools / "journal").read_text()
if how == "fails":
    sys.exit(1)
said = pathlib.Path("/var/log/postgresql/test.log").read_bytes()
said = said[int((tools / "said-before").read_text()):].decode()
if how == "translated":
    said = said.replace("password authentication failed for user", "Anmeldung fehlgeschlagen:")
if how != "silent":
    print(said)
"""


@pytest.fixture
def host(shared_server, minions):
    """A role with a password in the file and the server, without systemd."""
    minion = minions()
    secrets.wipe()
    assert minion.state("slmdb_secret.present").result is True
    return minion


@pytest.fixture
def backend(host, monkeypatch):
    """What looks like systemd and a running backend; returns a function that sets its behaviour."""
    SYSTEMD.mkdir(parents=True)
    TOOLS.mkdir()
    for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
        (TOOLS / name).write_text(text)
        (TOOLS / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{TOOLS}:{os.environ['PATH']}")

    names = host.modules["slmdb_secret_backend.renew"].func.__globals__
    monkeypatch.setitem(names, "_PATIENCE", 3)
    monkeypatch.setitem(names, "_LOG_PATIENCE", 1)

    def become(behaviour="works", load="loaded", active="active", journal="reads"):
        texts = {"behaviour": behaviour, "load": load, "active": active, "journal": journal}
        for name, text in texts.items():
            (TOOLS / name).write_text(text)

    become()
    yield become
    subprocess.run(["rm", "-rf", str(TOOLS), "/run/systemd"], check=True)


def password():
    return secrets.value("SLM_DB_PASSWORD")


def asked():
    calls = (TOOLS / "calls").read_text().splitlines()
    return [call for call in calls if not call.startswith("show")]


def test_rotation_replaces_the_password_everywhere(host):
    """New in the file, its URLs and the server; the old one is refused; nothing else is left."""
    old, foreign = password(), secrets.FOREIGN
    secrets.write(secrets.FILE.read_bytes() + foreign)
    report = host.call("slmdb_secret.rotate")
    assert report["rotated"] is True
    assert report["login"] is True
    assert report["old_password_refused"] is True
    assert "no systemd" in report["backend"]
    assert old not in str(report)
    assert password() not in str(report)
    assert password() != old
    assert secrets.log_in(password())
    assert not secrets.log_in(old)
    data = secrets.FILE.read_bytes()
    assert old.encode() not in data
    assert data.endswith(foreign)
    assert b"_NEXT" not in data
    assert b"_PREVIOUS" not in data
    assert secrets.value("DATABASE_URL").count(password()) == 1
    assert host.state("slmdb_secret.present").changes == {}


def test_a_dry_run_says_what_would_be_done(host):
    """It checks, reports and changes nothing."""
    before = secrets.seen()
    report = host.call("slmdb_secret.rotate", dry_run=True)
    assert report["rotated"] is False
    assert report["keys"] == ["SLM_DB_PASSWORD", "DATABASE_URL", "SLM_DATABASE_URL"]
    assert secrets.seen() == before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda: secrets.psql("ALTER ROLE autobot_slm PASSWORD 'drifted'"), "not in step"),
        (lambda: secrets.psql("ALTER ROLE autobot_slm NOLOGIN"), "not permitted to log in"),
        (secrets.FILE.unlink, "does not exist"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_rotation_that_cannot_be_proven_does_not_begin(host, spoil, says, dry_run):
    """One line says why, and nothing is changed."""
    spoil()
    before = secrets.seen()
    with pytest.raises(CommandExecutionError, match=says) as error:
        host.call("slmdb_secret.rotate", dry_run=dry_run)
    assert len(str(error.value).splitlines()) == 1
    assert secrets.seen() == before


OWN = {
    "host db.example, not localhost": "autobot_slm:{}@db.example/autobot_slm",
    "port 5433, not 5432": "autobot_slm:{}@127.0.0.1:5433/autobot_slm",
    "with options": "autobot_slm:{}@localhost:5432/autobot_slm?ssl=require",
    "another driver, user or database": "other:{}@127.0.0.1/autobot_slm",
    "of another form": "/autobot_slm?password={}",
}


@pytest.mark.parametrize("apart", OWN)
@pytest.mark.parametrize("form", ["p%C3%A4ss", "päss"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_an_operators_url_with_the_present_password_stops_a_rotation(host, apart, form, dry_run):
    """It would keep the old password; the line names the file, the key and the two ways out."""
    own = f"postgresql+asyncpg://{OWN[apart].format(form)}"
    secrets.write(f"SLM_DB_PASSWORD=päss\nDATABASE_URL={own}\n".encode())
    assert host.state("slmdb_secret.present").result is True
    before = secrets.seen()
    with pytest.raises(CommandExecutionError) as error:
        host.call("slmdb_secret.rotate", dry_run=dry_run)
    said = str(error.value)
    assert f"{secrets.FILE}: DATABASE_URL is your own ({apart})" in said
    assert "slm_database:secret:url_keys" in said
    assert len(said.splitlines()) == 1
    assert "p%C3%A4ss" not in said and "päss" not in said
    assert secrets.seen() == before


class _Killed(BaseException):
    """Stands for the end of the process."""


def test_a_file_without_the_key_is_completed_before_it_is_rotated(host, monkeypatch):
    """A rotation that ends between the server and the file's switch is finished by the next run."""
    lines = secrets.FILE.read_text().splitlines(True)
    secrets.write("".join(lines[1:]).encode())
    rename = os.rename

    def killed(source, target, **keywords):
        if "_PREVIOUS" in (secrets.DIRECTORY / source).read_text():
            raise _Killed
        rename(source, target, **keywords)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(_Killed):
        host.call("slmdb_secret.rotate")
    monkeypatch.undo()
    following = secrets.value("SLM_DB_PASSWORD_NEXT")
    assert secrets.log_in(following)
    assert host.state("slmdb_secret.present").result is True
    assert password() == following
    assert "_NEXT" not in secrets.FILE.read_text()
    assert host.call("slmdb_secret.rotate")["rotated"] is True
    assert secrets.log_in(password())


def test_a_role_that_no_rule_admits_is_rotated(host, minions):
    """What the server has is the proof for a further role: a login of it may be meant to fail."""
    secrets.psql("CREATE ROLE extra NOLOGIN")
    file = secrets.DIRECTORY / "extra.env"
    extra = {"secret": {"file": str(file), "key": "EXTRA"}}
    minion = minions({"slm_database": {"roles": {"extra": extra}}})
    assert minion.state("slmdb_secret.present").result is True
    old = secrets.value("EXTRA", file)
    assert minion.call("slmdb_secret.rotate", role="extra", dry_run=True)["keys"] == ["EXTRA"]
    report = minion.call("slmdb_secret.rotate", role="extra")
    assert (report["rotated"], report["login"]) == (True, None)
    assert report["old_password_refused"] is None
    assert secrets.value("EXTRA", file) != old
    assert minion.call("slmdb_verifier.in_step", "extra", secrets.value("EXTRA", file))
    assert minion.state("slmdb_secret.present").changes == {}


def test_the_backend_is_restarted_and_seen_to_log_in(host, backend):
    """While it restarts, the file has the new password, and the next one stands beside it."""
    report = host.call("slmdb_secret.rotate")
    assert report["backend"] == "restarted, and it logged in"
    assert asked() == ["restart autobot-slm-backend.service"]
    during = (TOOLS / "file-at-restart").read_text()
    assert f"SLM_DB_PASSWORD={password()}\n" in during
    assert f"SLM_DB_PASSWORD_NEXT={password()}\n" in during


@pytest.fixture
def configure(host):
    """A function that sets a parameter for the server or a role; all is as before afterwards."""

    def reloaded(change, name, wanted):
        secrets.psql(change)
        secrets.psql("SELECT pg_reload_conf()")
        until(lambda: secrets.psql(f"SHOW {name}") == wanted)

    before = {}

    def become(where, name, value):
        before[where, name] = secrets.psql(f"SHOW {name}")
        reloaded(f"{where} SET {name} = '{value}'", name, value)
        host.call("slmdb_server.forget")

    yield become
    for (where, name), value in before.items():
        reloaded(f"{where} RESET {name}", name, value)
    host.call("slmdb_server.forget")


# A language of our own sessions hides the server's; it needs no other locale on the machine.
UNKNOWN = ("ALTER ROLE postgres", "lc_messages", "C")
QUIET = ("ALTER SYSTEM", "log_min_messages", "panic")


@pytest.mark.parametrize(
    ("journal", "parameter"), [("reads", None), ("reads", UNKNOWN), ("translated", UNKNOWN)]
)
def test_a_short_session_counts_if_the_log_has_nobody_refused(
    host, backend, configure, journal, parameter
):
    """Whose session it was cannot be told; that nobody was refused can, in any language."""
    if parameter:
        configure(*parameter)
    backend("brief", journal=journal)
    assert host.call("slmdb_secret.rotate")["rotated"] is True


@pytest.mark.parametrize(
    ("behaviour", "journal", "parameter"),
    [
        ("refused", "reads", None),
        ("refused", "translated", UNKNOWN),
        ("brief", "fails", None),
        ("brief", "silent", None),
        ("brief", "reads", QUIET),
    ],
)
def test_a_log_that_does_not_answer_proves_nothing(
    host, backend, configure, behaviour, journal, parameter
):
    """A refusal in whatever words, and a log that is not there to be read, undo the rotation."""
    if parameter:
        configure(*parameter)
    old = password()
    backend(behaviour, journal=journal)
    with pytest.raises(CommandExecutionError, match="undone, the old password is in force"):
        host.call("slmdb_secret.rotate")
    assert secrets.log_in(old)


def test_a_kernel_without_ipv6_stops_no_rotation(host, backend):
    """There is no /proc/net/tcp6 then; a session that is open is looked for in the other list."""
    lists = f"/proc/{os.getpid()}/net"
    tcp = Path(f"{lists}/tcp").read_text()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", lists], check=True)
    try:
        Path(f"{lists}/tcp").write_text(tcp)
        assert not Path("/proc/net/tcp6").exists()
        assert host.call("slmdb_secret.rotate")["rotated"] is True
    finally:
        subprocess.run(["umount", "--lazy", lists], check=True)


@pytest.mark.parametrize("behaviour", ["fails", "dies"])
def test_a_backend_that_does_not_come_back_undoes_everything(host, backend, behaviour):
    """The old password is in force again, in the file, the server and the backend."""
    old, data = password(), secrets.FILE.read_bytes()
    backend(behaviour)
    with pytest.raises(CommandExecutionError, match="undone, the old password is in force"):
        host.call("slmdb_secret.rotate")
    assert secrets.FILE.read_bytes() == data
    assert secrets.log_in(old)
    verbs = [call.split()[0] for call in asked()]
    assert verbs == ["restart", "reset-failed", "restart"]
    assert host.state("slmdb_secret.present").changes == {}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"load": "not-found", "active": "inactive"}, "not deployed"),
        ({"active": "inactive"}, "not running"),
    ],
)
def test_a_backend_that_is_not_there_is_not_restarted(host, backend, state, says):
    """Our own login is the proof then, and the report says so."""
    backend(**state)
    report = host.call("slmdb_secret.rotate")
    assert says in report["backend"]
    assert report["login"] is True
    assert not [call for call in asked() if "autobot-slm-backend" in call]


@pytest.mark.parametrize("how", ["reload", "none"])
def test_pillar_says_what_is_done_with_the_backend(host, backend, minions, how):
    """Restart is the default; reload and none are the operator's choice."""
    minion = minions({"slm_database": {"secret": {"rotate_backend": how}}})
    report = minion.call("slmdb_secret.rotate")
    assert report["rotated"] is True
    calls = (TOOLS / "calls").read_text() if (TOOLS / "calls").exists() else ""
    assert ("reload autobot-slm-backend.service" in calls) == (how == "reload")
    assert "restart" not in calls


def _layout(current, **helpers):
    """Put the file where a killed rotation would have left it."""
    lines = [f"SLM_DB_PASSWORD={current}"]
    lines += [f"{name}={text}" for name, text in helpers.items()]
    urls = [f"{key}={_url(current)}" for key in ("DATABASE_URL", "SLM_DATABASE_URL")]
    secrets.write("\n".join([*lines, *urls, ""]).encode())


def _url(text):
    return f"postgresql+asyncpg://autobot_slm:{text}@localhost:5432/autobot_slm"


@pytest.mark.parametrize(
    ("current", "following", "previous", "server", "left"),
    [
        ("old", "new", None, "old", "old"),
        ("old", "new", None, "new", "new"),
        ("new", "new", "old", "new", "new"),
        ("new", "new", "old", "old", "old"),
        ("old", "new", None, "drifted", "old"),
        ("new", "new", "old", "drifted", "new"),
    ],
)
@pytest.mark.parametrize("by", ["state", "rotate"])
def test_an_interrupted_rotation_is_finished_or_undone(
    host, current, following, previous, server, left, by
):
    """Wherever it stopped, the next run leaves one password, which opens the database."""
    helpers = {"SLM_DB_PASSWORD_NEXT": following, "SLM_DB_PASSWORD_PREVIOUS": previous}
    _layout(current, **{name: text for name, text in helpers.items() if text})
    secrets.psql(f"ALTER ROLE autobot_slm PASSWORD '{server}'")
    assert host.call("slmdb_secret.facts")["rotation"] == "interrupted"
    announced = host.state("slmdb_secret.present", test=True)
    assert set(announced.changes) == {"rotation"}
    if by == "state":
        assert host.state("slmdb_secret.present").result is True
        assert password() == left
    else:
        host.call("slmdb_secret.rotate")
    data = secrets.FILE.read_text()
    assert secrets.log_in(password())
    assert "_NEXT" not in data
    assert "_PREVIOUS" not in data
    assert secrets.value("DATABASE_URL") == _url(password())
    assert host.state("slmdb_secret.present").changes == {}


def test_an_interrupted_rotation_that_the_backend_refuses_is_undone(host, backend):
    """The proof is asked for again after a kill, and without it the old password comes back."""
    _layout("new", SLM_DB_PASSWORD_NEXT="new", SLM_DB_PASSWORD_PREVIOUS="old")
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'new'")
    backend("dies")
    run = host.state("slmdb_secret.present")
    assert run.result is False
    assert "undone" in run.comment
    assert password() == "old"
    assert secrets.log_in("old")


# adoption


@pytest.fixture
def older(shared_server, minions):
    """A host of before the formula: other names, MD5, a password in the credentials file, data."""
    rules = Path(shared_server.call("slmdb_instance.facts")["hba_file"])
    if not rules.read_text().startswith("host all all 127.0.0.1/32 md5"):
        rules.write_text(f"host all all 127.0.0.1/32 md5\n{rules.read_text()}")
    secrets.wipe()
    secrets.psql("SELECT pg_reload_conf(); SELECT pg_sleep(0.2)")
    secrets.psql("DROP DATABASE autobot_slm; DROP ROLE autobot_slm")
    secrets.psql("SET password_encryption = md5; CREATE ROLE slm_app LOGIN PASSWORD 'of old'")
    for name in ("slm", "slm_users", "autobot_users"):
        secrets.psql(f"CREATE DATABASE {name} OWNER slm_app")
    secrets.psql(
        "CREATE TABLE kept AS SELECT 42 AS answer; ALTER TABLE kept OWNER TO slm_app", "slm"
    )
    # A session that is over is counted until its process is gone.
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname LIKE 'slm%'"
    until(lambda: secrets.psql(gone) == "True")
    lines = "SLM_DB_PASSWORD='of old'\nSLM_DATABASE_URL=postgresql://slm_app:x@localhost/slm\n"
    secrets.write(lines.encode(), secrets.OLD_FILE)
    return minions


ADOPT = {"credentials_file": str(secrets.OLD_FILE)}
OLD_NAMES = {"role": "slm_app", "database": "slm", "adopt": ADOPT}
RENAMED = {
    "adopt": {
        **ADOPT,
        "role": "slm_app",
        "rename": True,
        "databases": {"slm": "autobot_slm", "slm_users": "autobot_slm_users"},
    },
    "databases": {"autobot_slm_users": {}},
}


def test_adoption_is_refused_until_pillar_asks_for_it(older):
    """Without `adopt` nothing is guessed, and the message names the file."""
    minion = older({"slm_database": {"role": "slm_app", "database": "slm"}})
    before = secrets.seen()
    run = minion.state("slmdb_secret.present")
    assert run.result is False
    assert "adopt:credentials_file" in run.comment
    assert secrets.seen() == before


def test_an_older_install_is_adopted_under_its_names(older):
    """Same password, now SCRAM; open sessions and data are not touched; the old file neither."""
    minion = older({"slm_database": OLD_NAMES})
    session = secrets.psycopg2.connect(
        host="127.0.0.1", user="slm_app", password="of old", dbname="slm"
    )
    old_file = secrets.OLD_FILE.read_bytes()
    announced = minion.state("slmdb_secret.present", test=True)
    assert "of old" not in str(announced.changes)
    for state in ("slmdb_secret.adopted", "slmdb_secret.present"):
        assert minion.state(state).result is True
    assert secrets.value("SLM_DB_PASSWORD") == '"of old"'
    assert secrets.value("DATABASE_URL").endswith("//slm_app:of%20old@localhost:5432/slm")
    assert secrets.stored("slm_app").startswith("SCRAM")
    assert secrets.log_in("of old", "slm_app", "slm")
    with session.cursor() as cursor:
        cursor.execute("SELECT answer FROM kept")
        assert cursor.fetchall() == [(42,)]
    session.close()
    assert secrets.OLD_FILE.read_bytes() == old_file
    assert minion.state("slmdb_secret.present").changes == {}


def test_an_older_install_is_adopted_under_new_names(older):
    """Renamed in one transaction, the password survives although MD5 does not."""
    minion = older({"slm_database": RENAMED})
    announced = minion.state("slmdb_secret.adopted", test=True)
    run = minion.state("slmdb_secret.adopted")
    assert run.result is True
    assert run.changes == announced.changes
    assert set(run.changes) == {"role slm_app", "database slm", "database slm_users"}
    assert minion.state("slmdb_secret.adopted").changes == {}
    assert minion.state("slmdb_secret.present").result is True
    assert secrets.log_in("of old")
    assert secrets.psql("SELECT answer FROM kept", "autobot_slm") == "42"


@pytest.mark.parametrize("known", ["", "SLM_DB_PASSWORD='of old'\n", "DATABASE_URL={}\n"])
def test_a_rename_without_a_password_to_go_on_with_is_refused(older, known):
    """Without a credentials file the secret file must have it, as its key or in its URL."""
    secrets.psql("SET password_encryption = 'scram-sha-256'; ALTER ROLE slm_app PASSWORD 'of old'")
    url = "postgresql+asyncpg://slm_app:of%20old@localhost:5432/slm"
    secrets.write(f"OTHER=1\n{known.format(url)}".encode())
    adopt = {name: value for name, value in RENAMED["adopt"].items() if name != "credentials_file"}
    minion = older({"slm_database": {**RENAMED, "adopt": adopt}})
    before = secrets.seen()
    for test in (True, False):
        run = minion.state("slmdb_secret.adopted", test=test)
        if not known:
            assert run.result is False
            assert "role slm_app has a password" in run.comment
            assert secrets.seen() == before
    if known:
        assert run.result is True
        assert minion.state("slmdb_secret.present").result is True
        assert secrets.log_in("of old")


def _occupied():
    return secrets.psycopg2.connect(
        host="127.0.0.1", user="slm_app", password="of old", dbname="slm"
    )


def _both_names():
    secrets.psql("CREATE ROLE autobot_slm LOGIN")


def _another_password():
    secrets.psql("ALTER ROLE slm_app PASSWORD 'unknown'")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_occupied, "stop the backend first"),
        (_both_names, "exists already"),
        (_another_password, "is not that of slm_app"),
        (secrets.OLD_FILE.unlink, "has no SLM_DB_PASSWORD"),
    ],
)
def test_an_adoption_that_would_hurt_is_refused(older, spoil, says):
    """Nothing is renamed, and the backend keeps its sessions."""
    minion = older({"slm_database": RENAMED})
    kept = spoil()
    before = secrets.seen()
    for test in (True, False):
        run = minion.state("slmdb_secret.adopted", test=test)
        assert run.result is False
        assert says in run.comment
    assert secrets.seen() == before
    if kept:
        kept.close()


def test_old_names_without_the_settings_are_a_mistake(older):
    """`adopt:role` alone would leave the formula with a role of its own."""
    minion = older({"slm_database": {"adopt": {**ADOPT, "role": "slm_app"}}})
    run = minion.state("slmdb_secret.adopted")
    assert run.result is False
    assert "slm_database:role: slm_app" in run.comment


def test_without_adopt_nothing_is_adopted(host):
    """The state is there for every host and does nothing."""
    run = host.state("slmdb_secret.adopted")
    assert run.result is True
    assert run.changes == {}
