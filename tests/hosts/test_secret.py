"""The secret file as the real systemd reads it, and a rotation under a real backend unit."""

from __future__ import annotations

import json
import random
import shlex

import pytest

from _modules import slmdb_envfile as envfile
from tests.hosts.conftest import RELEASES
from tests.support import image

FILES, VALUES = 6, 700
TOKENS = [
    *("'", '"', "\\", "\\\\", "`", "$", "#", ";", "=", "%n", " ", "  ", "\t", "\\\n", "\r"),
    *("$HOME", "${X}", "!", "&", "|", "<", "~", "*", "é", "密", "😀", "\x01", "\x7f", "\u00a0"),
    *("a", "b", "Z9", "'x y'", '"x y"', '"\\"', "\\'", "-", "_"),
]
LINES = ["# note", "; note", "", "  ", "export E=1", "bare", "=x", "9A=x", "K-L=x", "# odd \\"]
BACKEND = """\
[Unit]
Description=Stands in for the backend
[Service]
EnvironmentFile=/etc/autobot/slm-secrets.env
Environment=PGCONNECT_TIMEOUT=5
ExecStart=/usr/local/bin/backend
"""
# Logs in with what the unit gave it, as the application does, and ends if it cannot.
PROGRAM = """\
#!/bin/sh
{condition}
export PGPASSWORD="$SLM_DB_PASSWORD"
exec psql -h 127.0.0.1 -U autobot_slm -d autobot_slm -c 'SELECT pg_sleep(3600)'
"""


def raw_file(seed):
    """Make a file of assignments in every form, well-formed or not, and of other lines."""
    dice = random.Random(seed)
    lines = []
    for number in range(VALUES):
        text = "".join(dice.choice(TOKENS) for _ in range(dice.randint(0, 7)))
        lines.append(f"V{number}={text}")
        if dice.random() < 0.1:
            lines.append(dice.choice(LINES))
    return ("\n".join(lines) + dice.choice(["", "\n"])).encode()


def written_file(seed):
    """Make a file of values as we write them."""
    dice = random.Random(seed)
    wanted = {
        f"W{number}": "".join(dice.choice([*TOKENS, "\n"]) for _ in range(dice.randint(1, 9)))
        for number in range(VALUES)
    }
    return envfile.edit(b"", wanted), wanted


def handed_over(host, data):
    """Return what a service gets of an environment file."""
    host.path("/tmp/it.env").write_bytes(data)
    host.run(
        "systemd-run --quiet --wait --property=EnvironmentFile=/tmp/it.env "
        "--property=StandardOutput=truncate:/tmp/it.out env -0"
    )
    pairs = host.path("/tmp/it.out").read_bytes().decode().split("\0")[:-1]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


@pytest.mark.parametrize("release", RELEASES)
def test_what_is_read_is_what_systemd_hands_over(release, boot):
    """Thousands of values in every form, in one start of a unit per file."""
    host = boot([image.bare(release)])
    try:
        usual = handed_over(host, b"")
        checked = 0
        for seed in range(FILES):
            data = raw_file(seed)
            ours = envfile.values(data, comments_continue=release == "bookworm")
            theirs = handed_over(host, data)
            assert ours == {name: theirs[name] for name in theirs if name not in usual}
            written, wanted = written_file(seed)
            theirs = handed_over(host, written)
            assert wanted == {name: theirs[name] for name in theirs if name not in usual}
            checked += len(ours) + len(wanted)
        print(f"{release}: {checked} values")
        assert checked > FILES * VALUES
    finally:
        host.close()


@pytest.fixture
def applied(boot, applied_layers):
    """A host with the formula applied and a backend that logs in when it starts."""
    host = boot(applied_layers("bookworm"))
    host.push_formula()
    host.write("/etc/systemd/system/autobot-slm-backend.service", BACKEND)
    yield host
    host.close()


def begin_backend(host, condition=":"):
    host.write("/usr/local/bin/backend", PROGRAM.format(condition=condition))
    host.run("chmod 755 /usr/local/bin/backend; systemctl daemon-reload")
    host.run("systemctl restart autobot-slm-backend")


def call(host, *words, check=True):
    line = shlex.join(["/srv/autobot-slm-database/bin/salt-call", "--out=json", *words])
    return host.run(line, check=check)


def password(host):
    lines = host.read("/etc/autobot/slm-secrets.env").splitlines()
    return dict(line.split("=", 1) for line in lines)["SLM_DB_PASSWORD"]


def logs_in(host, secret):
    question = "psql -h 127.0.0.1 -U autobot_slm -d autobot_slm -c 'SELECT 1'"
    return host.run(question, check=False, env={"PGPASSWORD": secret}).returncode == 0


def backend_has(host):
    pid = host.run("systemctl show -P MainPID autobot-slm-backend").stdout.strip()
    pairs = host.path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)["SLM_DB_PASSWORD"]


def test_one_command_rotates_under_a_running_backend(applied):
    """The backend is restarted and seen to log in; one that cannot is given the old one back."""
    begin_backend(applied)
    old = password(applied)
    report = json.loads(call(applied, "slmdb_secret.rotate").stdout)["local"]
    assert report["rotated"] is True
    assert report["backend"] == "restarted, and it logged in"
    assert report["old_password_refused"] is True
    new = password(applied)
    assert new != old
    assert backend_has(applied) == new
    assert logs_in(applied, new)
    assert not logs_in(applied, old)

    begin_backend(applied, f'[ "$SLM_DB_PASSWORD" = "{new}" ] || exit 1')
    refused = call(applied, "slmdb_secret.rotate", check=False)
    assert refused.returncode != 0
    assert "the old password is in force" in refused.stdout + refused.stderr
    assert password(applied) == new
    assert logs_in(applied, new)
    assert backend_has(applied) == new
    assert applied.run("systemctl is-active autobot-slm-backend").stdout.strip() == "active"


# Logs in for a moment when it starts, then never again.
BRIEF = """\
#!/bin/sh
PGPASSWORD="$SLM_DB_PASSWORD" psql -h 127.0.0.1 -U autobot_slm -d autobot_slm -c 'SELECT 1'
exec sleep infinity
"""
# Somebody who always has the file's password at hand, and is not the backend.
BYSTANDER = """\
while :; do
  . /etc/autobot/slm-secrets.env
  PGPASSWORD="$SLM_DB_PASSWORD" psql -h 127.0.0.1 -U autobot_slm -d autobot_slm \\
    -c 'SELECT pg_sleep(0.2)'
done
"""


def test_who_changes_the_file_by_hand_is_told_of_the_backend(applied):
    """The server gets that password; the backend keeps the one with which it was started."""
    begin_backend(applied)
    old = password(applied)
    applied.run(
        "sed -i 's/^SLM_DB_PASSWORD=.*/SLM_DB_PASSWORD=by-hand/' /etc/autobot/slm-secrets.env"
    )
    for arguments in (["test=True"], []):
        answer = call(applied, "state.apply", "slm_database.secret", *arguments)
        states = json.loads(answer.stdout)["local"].values()
        (told,) = [one["warnings"] for one in states if one.get("warnings")]
        assert "systemctl restart autobot-slm-backend.service" in told[0]
    assert logs_in(applied, "by-hand") and not logs_in(applied, old)
    assert backend_has(applied) == old
    again = json.loads(call(applied, "state.apply", "slm_database.secret").stdout)["local"]
    assert not any(one.get("warnings") or one["changes"] for one in again.values())


def test_somebody_else_s_login_proves_nothing(applied):
    """A backend that stays up with a wrong password is found out, whoever else logs in."""
    begin_backend(applied, "PGPASSWORD=wrong psql -h 127.0.0.1 -U autobot_slm; exec sleep infinity")
    applied.write("/usr/local/bin/bystander", BYSTANDER)
    applied.run("systemd-run --quiet --unit=bystander sh /usr/local/bin/bystander")
    old = password(applied)
    refused = call(applied, "slmdb_secret.rotate", check=False)
    assert refused.returncode != 0
    assert "made no connection within 30 s" in refused.stdout + refused.stderr
    assert password(applied) == old
    assert logs_in(applied, old)


def test_a_backend_that_logs_in_for_a_moment_only(applied):
    """Whose short session it was cannot be told any more, but nobody was refused."""
    applied.write("/usr/local/bin/backend", BRIEF)
    applied.run("chmod 755 /usr/local/bin/backend; systemctl daemon-reload")
    applied.run("systemctl restart autobot-slm-backend")
    old = password(applied)
    report = json.loads(call(applied, "slmdb_secret.rotate").stdout)["local"]
    assert report["rotated"] is True
    assert password(applied) != old
