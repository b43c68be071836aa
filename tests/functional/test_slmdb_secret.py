"""The password: made once, kept, in step with the server, never overwritten, never shown."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from tests.support import secrets

KEYS = ("SLM_DB_PASSWORD", "DATABASE_URL", "SLM_DATABASE_URL")


@pytest.fixture
def host(shared_server, minions):
    """A running server, a role without a password, and no secret file."""
    minion = minions()
    secrets.wipe()
    return minion


def apply(minion, **keywords):
    run = minion.state("slmdb_secret.present", **keywords)
    assert run.result is True, run.comment
    return run.changes


def url(password, port=5432):
    return f"postgresql+asyncpg://autobot_slm:{password}@localhost:{port}/autobot_slm"


# made once


def test_a_bare_host_gets_file_keys_and_verifier(host):
    """Everything of the file is as specified, and the password opens the database."""
    apply(host)
    password = secrets.value("SLM_DB_PASSWORD")
    lines = secrets.FILE.read_text().splitlines()
    assert lines == [
        f"SLM_DB_PASSWORD={password}",
        f"DATABASE_URL={url(password)}",
        f"SLM_DATABASE_URL={url(password)}",
    ]
    assert len(password) >= 32
    assert password.isalnum()
    assert secrets.FILE.stat().st_mode & 0o7777 == 0o640
    assert (secrets.FILE.owner(), secrets.FILE.group()) == ("root", secrets.GROUP)
    assert secrets.DIRECTORY.stat().st_mode & 0o7777 == 0o755
    assert [path.name for path in secrets.DIRECTORY.iterdir()] == ["slm-secrets.env"]
    assert secrets.stored().startswith("SCRAM-SHA-256$4096:")
    assert secrets.log_in(password)


def test_a_second_run_changes_nothing(host):
    """The same again: no change, the same bytes, the same inode, the same verifier."""
    apply(host)
    before = secrets.seen(), secrets.FILE.stat().st_ino
    assert apply(host) == {}
    assert (secrets.seen(), secrets.FILE.stat().st_ino) == before


def test_two_hosts_get_two_passwords(host):
    """Passwords are random."""
    apply(host)
    first = secrets.value("SLM_DB_PASSWORD")
    secrets.wipe()
    apply(host)
    assert secrets.value("SLM_DB_PASSWORD") != first


def test_test_mode_announces_the_same_changes_and_does_nothing(host):
    """What test=True says is what then changes, and it leaves the host alone."""
    before = secrets.seen()
    announced = host.state("slmdb_secret.present", test=True)
    assert announced.result is None
    assert secrets.seen() == before
    assert apply(host) == announced.changes


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("SLM_DB_PASSWORD='with space'", "with space"),
        ('SLM_DB_PASSWORD="a=b#c$d%e"', "a=b#c$d%e"),
        ('SLM_DB_PASSWORD="back\\\\slash \\"quote\\" \\`tick"', 'back\\slash "quote" `tick'),
        ("SLM_DB_PASSWORD=it\\'s", "it's"),
        ("  SLM_DB_PASSWORD =  päß密😀  ", "päß密😀"),
        ("SLM_DB_PASSWORD='one'\" two\"", "one two"),
        ("SLM_DB_PASSWORD=a/b?c@d:e&f", "a/b?c@d:e&f"),
    ],
)
def test_an_existing_value_wins_whatever_its_form(host, line, password):
    """The line stays byte for byte, the server and the URLs follow the value systemd would read."""
    secrets.write(f"{line}\n".encode())
    apply(host)
    assert secrets.FILE.read_bytes().startswith(f"{line}\n".encode())
    assert secrets.log_in(password)
    connection = secrets.psycopg2.connect(
        secrets.value("DATABASE_URL").replace("+asyncpg", "").strip('"')
    )
    connection.close()


# the shared file


@pytest.mark.parametrize("end", [b"", b"LAST=no newline", b"# no newline", b"LAST='x'\r\n"])
def test_foreign_lines_stay_byte_for_byte(host, end):
    """Without our lines the file is what it was, and so is its end."""
    foreign = secrets.FOREIGN + end
    secrets.write(foreign)
    apply(host)
    data = secrets.FILE.read_bytes()
    assert b"".join(line for line in data.splitlines(True) if not _ours(line)) == foreign
    assert data.endswith(end) or end.endswith(b"\n")
    assert secrets.log_in(secrets.value("SLM_DB_PASSWORD"))


def _ours(line):
    return line.split(b"=")[0].decode() in KEYS


def test_urls_follow_the_password(host):
    """A URL of ours with another password is brought in step."""
    secrets.write(f"SLM_DB_PASSWORD=new pass\nDATABASE_URL={url('old')}\n".encode())
    assert apply(host)["DATABASE_URL"] == {"old": "stale", "new": "in step"}
    assert secrets.value("DATABASE_URL") == url("new%20pass")


@pytest.mark.parametrize(
    "own",
    [
        "postgresql+asyncpg://autobot_slm:old@db.example:5432/autobot_slm",
        "postgresql+psycopg://autobot_slm:old@localhost:5433/autobot_slm",
        "postgresql+asyncpg://autobot_slm:old@localhost:5432/autobot_slm?ssl=require",
        "postgresql+asyncpg://autobot_slm:o/l+d=#@h1:5432,h2:5432/autobot_slm",
        "postgresql+asyncpg://reporting:theirs@localhost:5433/reports",
    ],
)
def test_an_operators_own_url_is_left_alone_and_reported(host, own):
    """Another role, host, port or option is the operator's choice; health tells of the password."""
    secrets.write(f"SLM_DB_PASSWORD=mine\nDATABASE_URL='{own}'\n".encode())
    assert apply(host) == host_changes("SLM_DATABASE_URL")
    assert apply(host) == {}
    assert secrets.value("DATABASE_URL") == f"'{own}'"
    assert host.call("slmdb_secret.facts")["url_stale"] == ["DATABASE_URL"]
    secrets.write(f"DATABASE_URL='{own}'\n".encode())
    secrets.psql("ALTER ROLE autobot_slm PASSWORD NULL")
    assert apply(host)["SLM_DB_PASSWORD"]["new"] == "generated"


def host_changes(*names):
    """What the first run on a host changes if the file has the password."""
    return {
        **{name: {"old": None, "new": "in step"} for name in names},
        "group on this host": {"old": None, "new": secrets.GROUP},
        "verifier of autobot_slm": {"old": None, "new": "scram-sha-256"},
        "group": {"old": "root", "new": secrets.GROUP},
    }


@pytest.mark.parametrize(
    "own",
    [
        "postgresql+asyncpg://autobot_slm:{}@127.0.0.1:5432/autobot_slm",
        "postgresql://autobot_slm:{}@[::1]/autobot_slm",
        "postgresql+psycopg://autobot_slm:{}@localhost:5432/autobot_slm",
    ],
)
def test_an_operators_url_for_the_role_on_this_host_has_its_password(host, own):
    """The rest of it is kept, a second run changes nothing, and a rotation takes it along."""
    secrets.write(f"SLM_DB_PASSWORD=new pass\nDATABASE_URL={own.format('old')}\n".encode())
    announced = host.state("slmdb_secret.present", test=True).changes
    assert apply(host) == announced
    assert announced["DATABASE_URL"] == {"old": "stale", "new": "in step"}
    assert secrets.value("DATABASE_URL").strip('"') == own.format("new%20pass")
    assert apply(host) == {}
    host.call("slmdb_secret.rotate")
    assert secrets.value("DATABASE_URL").strip('"') == own.format(secrets.value("SLM_DB_PASSWORD"))
    assert apply(host) == {}


def test_a_url_follows_the_role_database_and_port_of_the_pillar(host):
    """Its password shows that it is ours, whatever names it has."""
    text = "postgresql+asyncpg://before:mine@localhost:5433/earlier"
    secrets.write(f"SLM_DB_PASSWORD=mine\nDATABASE_URL={text}\n".encode())
    assert apply(host)["DATABASE_URL"] == {"old": "stale", "new": "in step"}
    assert secrets.value("DATABASE_URL") == url("mine")


def test_a_url_that_cannot_be_compared_is_named(host):
    """It is left alone and is not called stale."""
    text = "postgresql+asyncpg://a/b:c@localhost/autobot_slm"
    secrets.write(f"SLM_DB_PASSWORD=mine\nDATABASE_URL={text}\n".encode())
    apply(host)
    assert secrets.value("DATABASE_URL") == text
    found = host.call("slmdb_secret.facts")
    assert (found["url_stale"], found["url_unclear"]) == ([], ["DATABASE_URL"])
    secrets.write(f"SLM_DB_PASSWORD=mine\nDATABASE_URL={url('mine')} # ours\n".encode())
    assert host.call("slmdb_secret.facts")["url_unclear"] == ["DATABASE_URL"]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            "postgresql+asyncpg://autobot_slm:mine@127.0.0.1:5432/other?ssl=disable",
            "is for database other, not autobot_slm",
        ),
        ("sqlite:///x.db", "is for sqlite, not PostgreSQL"),
        ("postgresql+asyncpg://autobot_slm:mine@127.0.0.1:6432/other", None),
    ],
)
def test_a_url_that_leads_the_backend_elsewhere_is_named(host, own, said):
    """It is left alone, whatever it is; one for a pooler is the operator's way to this database."""
    secrets.write(f"SLM_DB_PASSWORD=mine\nDATABASE_URL='{own}'\n".encode())
    apply(host)
    assert secrets.value("DATABASE_URL") == f"'{own}'"
    wanted = {"DATABASE_URL": said} if said else {}
    assert host.call("slmdb_secret.facts")["url_elsewhere"] == wanted


def test_other_keys_are_made_on_request_and_kept(host, minions):
    """`generate_missing` makes a key once and never touches one that is there."""
    secrets.write(b"KEPT_KEY='theirs'\n")
    minion = minions({"slm_database": {"secret": {"generate_missing": ["NEW_KEY", "KEPT_KEY"]}}})
    apply(minion)
    made = secrets.value("NEW_KEY")
    assert len(made) >= 32
    assert apply(minion) == {}
    assert (secrets.value("NEW_KEY"), secrets.value("KEPT_KEY")) == (made, "'theirs'")


def test_owner_group_and_mode_are_repaired(host):
    """A file that is too open is closed again, its content untouched."""
    apply(host)
    data = secrets.FILE.read_bytes()
    secrets.FILE.chmod(0o666)
    os.chown(secrets.FILE, 1, 1)
    assert set(apply(host)) == {"owner", "group", "mode"}
    assert secrets.FILE.stat().st_mode & 0o7777 == 0o640
    assert secrets.FILE.read_bytes() == data


# what cannot be understood


def _spoil_link():
    secrets.DIRECTORY.mkdir(exist_ok=True)
    secrets.FILE.symlink_to("/nonexistent")


def _spoil_second_name():
    secrets.write(b"SLM_DB_PASSWORD=a\n")
    os.link(secrets.FILE, secrets.DIRECTORY / "copy")


def _spoil_link_to_file():
    secrets.write(b"SLM_DB_PASSWORD=a\n", secrets.DIRECTORY / "real")
    secrets.FILE.symlink_to("real")


def _spoil_parent_link():
    Path("/etc/elsewhere").mkdir(exist_ok=True)
    secrets.DIRECTORY.symlink_to("/etc/elsewhere")


def _spoil_parent_mode():
    secrets.DIRECTORY.mkdir()
    secrets.DIRECTORY.chmod(0o777)


def _spoil_parent_owner():
    secrets.DIRECTORY.mkdir()
    os.chown(secrets.DIRECTORY, 1, 1)


def _spoil_fifo():
    secrets.DIRECTORY.mkdir()
    os.mkfifo(secrets.FILE)


BAD = {
    "twice": (lambda: secrets.write(b"SLM_DB_PASSWORD=a\nSLM_DB_PASSWORD=b\n"), "different values"),
    "NUL": (lambda: secrets.write(b"SLM_DB_PASSWORD=a\0b\n"), "NUL"),
    "empty": (lambda: secrets.write(b"SLM_DB_PASSWORD=\n"), "empty value"),
    "empty URL": (lambda: secrets.write(b"SLM_DB_PASSWORD=a\nDATABASE_URL=\n"), "empty value"),
    "export": (lambda: secrets.write(b"export SLM_DB_PASSWORD=a\n"), "systemd ignores"),
    "open quote": (lambda: secrets.write(b"SLM_DB_PASSWORD='ab"), "cut off"),
    "half a line": (lambda: secrets.write(b"X=1\nSLM_DB_PASSW"), "cut off"),
    "half a URL": (
        lambda: secrets.write(f"SLM_DB_PASSWORD=a\nDATABASE_URL={url('a')[:-4]}".encode()),
        "cut off",
    ),
    "not UTF-8": (lambda: secrets.write(b"SLM_DB_PASSWORD=a\xff\n"), "UTF-8"),
    "NEXT alone": (lambda: secrets.write(b"SLM_DB_PASSWORD_NEXT=a\n"), "SLM_DB_PASSWORD_NEXT"),
    "directory": (lambda: secrets.FILE.mkdir(parents=True), "a directory"),
    "dangling link": (_spoil_link, "a symbolic link"),
    "link": (_spoil_link_to_file, "a symbolic link"),
    "second name": (_spoil_second_name, "hard link"),
    "fifo": (_spoil_fifo, "not a plain file"),
    "parent is a link": (_spoil_parent_link, "a symbolic link"),
    "parent is open": (_spoil_parent_mode, "written by others"),
    "parent is another's": (_spoil_parent_owner, "belongs to"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_used_stops_everything(host, case):
    """One clear line before anything else runs; nothing is made, nothing is changed."""
    spoil, says = BAD[case]
    spoil()
    before = secrets.seen()
    for state in ("slmdb_secret.applicable", "slmdb_secret.present"):
        run = host.state(state)
        assert run.result is False
        assert says in run.comment
        assert len(run.comment.splitlines()) == 1
        assert run.changes == {}
    assert host.call("slmdb_secret.facts")["exists"] in (True, False)
    assert secrets.seen() == before


def test_a_value_cut_off_by_a_full_disk_is_not_taken_for_the_password(host):
    """The last line has no end and the server knows better: stop."""
    apply(host)
    secrets.FILE.write_bytes(secrets.FILE.read_bytes()[:30])
    before = secrets.seen()
    run = host.state("slmdb_secret.present")
    assert run.result is False
    assert "looks cut off" in run.comment
    assert secrets.seen() == before


def test_a_new_password_is_made_only_where_pillar_allows_it(host, minions):
    """For one run: the role gets it, the change says what is lost, the record forgets the key."""
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'unknown'")
    minion = minions({"slm_database": {"secret": {"allow_new": True}}})
    announced = minion.state("slmdb_secret.present", test=True)
    made = minion.state("slmdb_secret.present")
    assert (made.result, made.changes) == (True, announced.changes)
    assert "backend's own secrets are not in the file" in made.changes["SLM_DB_PASSWORD"]["new"]
    password = secrets.value("SLM_DB_PASSWORD")
    assert secrets.log_in(password) and not secrets.log_in("unknown")
    assert minion.state("slmdb_secret.present").changes == {}
    assert minion.state("slmdb_record.present").result is True
    recorded = Path("/var/lib/autobot-slm-database/settings.json").read_text()
    assert json.loads(recorded)["secret"]["allow_new"] is False


def test_a_password_that_nobody_has_written_down_is_not_guessed(host):
    """A role with a password but no file: the message has both ways out, and each works."""
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'unknown'")
    before = secrets.seen()
    for state in ("slmdb_secret.applicable", "slmdb_secret.present"):
        run = host.state(state)
        assert run.result is False
        assert "SLM_DB_PASSWORD=" in run.comment
        assert "slm_database:secret:allow_new" in run.comment
    assert secrets.seen() == before
    secrets.write(b"SLM_DB_PASSWORD=unknown\n")
    apply(host)
    assert secrets.log_in("unknown")
    secrets.FILE.unlink()
    secrets.psql("ALTER ROLE autobot_slm PASSWORD NULL")
    apply(host)
    assert secrets.log_in(secrets.value("SLM_DB_PASSWORD"))


def test_a_lost_key_is_found_again_in_our_url(host):
    """The URL of ours still holds the password that the server has."""
    apply(host)
    password = secrets.value("SLM_DB_PASSWORD")
    lines = secrets.FILE.read_text().splitlines(True)
    secrets.FILE.write_text("".join(lines[1:]))
    assert apply(host)["SLM_DB_PASSWORD"]["new"] == "taken from DATABASE_URL"
    assert secrets.value("SLM_DB_PASSWORD") == password


def test_a_role_that_does_not_exist_gets_no_file(host):
    """The state makes no role, and no password for none."""
    secrets.psql("DROP DATABASE autobot_slm; DROP ROLE autobot_slm")
    run = host.state("slmdb_secret.present")
    assert run.result is False
    assert "role autobot_slm does not exist" in run.comment
    assert not secrets.DIRECTORY.exists()


def test_an_owner_that_does_not_exist_is_named(host):
    """The group is made, a user is not."""
    run = host.state("slmdb_secret.present", owner="nobody-here")
    assert run.result is False
    assert "nobody-here" in run.comment
    assert not secrets.DIRECTORY.exists()


# written safely


def test_the_file_is_never_wider_than_wanted(host):
    """Whoever watches the directory never sees a file of ours that others may read."""
    apply(host)
    seen = set()
    watching = threading.Event()

    def watch():
        while not watching.is_set():
            for entry in os.scandir(secrets.DIRECTORY):
                try:
                    seen.add(entry.stat(follow_symlinks=False).st_mode & 0o777)
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    umask = os.umask(0)
    try:
        for _ in range(5):
            secrets.psql("ALTER ROLE autobot_slm PASSWORD NULL")
            secrets.FILE.unlink()
            apply(host)
    finally:
        os.umask(umask)
        watching.set()
        watcher.join()
    assert seen <= {0o600, 0o640}


LEFT = secrets.DIRECTORY / ".slm-secrets.env.slmdb-new"


@contextlib.contextmanager
def _immutable():
    subprocess.run(["chattr", "+i", str(secrets.FILE)], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(secrets.FILE)], check=True)


@contextlib.contextmanager
def _mounted(*options, target=secrets.FILE):
    subprocess.run(["mount", *options, str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)


def _bound():
    return _mounted("--bind", str(secrets.FILE))


@contextlib.contextmanager
def _full():
    data = secrets.FILE.read_bytes()
    options = ("-t", "tmpfs", "-o", "size=8k,mode=0755", "tmpfs")
    with _mounted(*options, target=secrets.DIRECTORY):
        secrets.write(data)
        with contextlib.suppress(OSError):
            (secrets.DIRECTORY / "other").write_bytes(b"x" * 9000)
        yield


def _read_only():
    return _mounted("--bind", "-o", "ro", str(secrets.DIRECTORY), target=secrets.DIRECTORY)


WRITES = {
    "immutable": (_immutable, "chattr -i"),
    "bind mount": (_bound, "mount point"),
    "full": (_full, "No space left"),
    "read-only": (_read_only, "Read-only"),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_write_that_fails_leaves_no_secret_behind(host, case):
    """One line says why and what to do; no second copy of the secrets stays beside the file."""
    apply(host)
    refusing, says = WRITES[case]
    with refusing():
        for _ in range(2):
            run = host.state("slmdb_secret.present", generate_missing=["ANOTHER_KEY"])
            assert run.result is False
            assert says in run.comment
            assert len(run.comment.splitlines()) == 1
            assert not LEFT.exists()
    assert apply(host) == {}


def _acl(*entries):
    """An access ACL as the kernel has it; entries are tag, permissions and number."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
ACL = "system.posix_acl_access"


def test_an_acl_and_other_attributes_stay(host):
    """Whoever was given the file by name still has it, and nothing is announced without an end."""
    apply(host)
    acl = _acl((1, 6, NOBODY), (2, 4, 1), (4, 4, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY))
    os.setxattr(secrets.FILE, ACL, acl)
    os.setxattr(secrets.FILE, "user.note", b"ours")
    assert apply(host) == {}
    assert host.call("slmdb_secret.rotate")["rotated"] is True
    assert os.getxattr(secrets.FILE, ACL) == acl
    assert os.getxattr(secrets.FILE, "user.note") == b"ours"
    assert apply(host) == {}


def test_a_mask_that_is_too_wide_is_narrowed_once(host):
    """The group's bits of a file with an ACL are its mask: they become what the mode says."""
    apply(host)
    acl = _acl((1, 6, NOBODY), (2, 6, 1), (4, 4, NOBODY), (0x10, 6, NOBODY), (0x20, 4, NOBODY))
    os.setxattr(secrets.FILE, ACL, acl)
    assert set(apply(host)) == {"mode"}
    assert secrets.FILE.stat().st_mode & 0o777 == 0o640
    narrow = _acl((1, 6, NOBODY), (2, 6, 1), (4, 4, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY))
    assert os.getxattr(secrets.FILE, ACL) == narrow
    assert apply(host) == {}


def test_a_default_acl_of_the_directory_opens_no_file_that_had_none(host):
    """The new file is readable by whom the old one was, not by whom new files are."""
    apply(host)
    acl = _acl((1, 7, NOBODY), (2, 7, 1), (4, 5, NOBODY), (0x10, 7, NOBODY), (0x20, 5, NOBODY))
    os.setxattr(secrets.DIRECTORY, "system.posix_acl_default", acl)
    host.call("slmdb_secret.rotate")
    assert ACL not in os.listxattr(secrets.FILE)
    assert secrets.FILE.stat().st_mode & 0o777 == 0o640


def test_a_directory_that_cannot_be_made_is_an_error_of_one_line(host):
    """A parent on a read-only file system says so."""
    Path("/srv/closed").mkdir()
    with _mounted("-t", "tmpfs", "-o", "ro,mode=0755", "tmpfs", target="/srv/closed"):
        run = host.state("slmdb_secret.present", file="/srv/closed/a/b.env")
    assert (run.result, run.comment) == (
        False,
        "/srv/closed/a cannot be made: Read-only file system",
    )


@pytest.mark.parametrize("name", ["a" * 250, "a" * 300, f"{'a' * 300}/b"])
def test_a_name_that_is_too_long_is_an_error_of_one_line(host, name):
    """The kernel's own words, with the path."""
    run = host.state("slmdb_secret.present", file=f"/etc/autobot/{name}")
    assert run.result is False
    assert "File name too long" in run.comment
    assert len(run.comment.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "mode"), [("0640", "0640"), ("640", "0640"), (640, "0640"), ("0o600", "0600")]
)
def test_a_mode_is_taken_as_a_managed_file_takes_it(host, given, mode):
    """With or without its zero and its quotes."""
    assert host.call("slmdb_secret_file.octal", given) == mode


@pytest.mark.parametrize("given", [416, 8, "u=rw", "", "0649", "10640", None, 6.4])
def test_what_is_no_mode_is_named(host, given):
    """A decimal number that would let everybody in is not taken for octal digits."""
    with pytest.raises(SaltInvocationError, match="octal digits in quotes"):
        host.call("slmdb_secret_file.octal", given)


def test_a_second_run_waits_for_the_first(host):
    """While another run holds the file, ours waits; then it goes on."""
    apply(host)
    secrets.FILE.chmod(0o600)
    held = os.open(secrets.DIRECTORY, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    began = time.monotonic()
    releasing = threading.Timer(0.5, os.close, [held])
    releasing.start()
    assert set(apply(host)) == {"mode"}
    assert time.monotonic() - began >= 0.5


def test_what_a_killed_run_left_behind_is_removed(host):
    """A temporary file of ours goes with the next run."""
    apply(host)
    left = secrets.DIRECTORY / ".slm-secrets.env.slmdb-new"
    left.write_text("half")
    assert set(apply(host)) == {"file left by a killed run"}
    assert not left.exists()
    assert apply(host) == {}


# in step


def test_drift_is_reported_and_repaired_from_the_file(host):
    """Someone ran ALTER ROLE: health and test=True say so, apply puts the file's password back."""
    apply(host)
    password = secrets.value("SLM_DB_PASSWORD")
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'drifted'")
    assert host.call("slmdb_secret.facts")["in_step"] is False
    announced = host.state("slmdb_secret.present", test=True)
    assert announced.result is None
    assert set(announced.changes) == {"verifier of autobot_slm"}
    assert apply(host) == announced.changes
    assert secrets.log_in(password)
    assert not secrets.log_in("drifted")
    assert host.call("slmdb_secret.facts")["in_step"] is True


def test_an_md5_verifier_becomes_scram_of_the_same_password(host):
    """Nobody is locked out by the upgrade."""
    secrets.psql("SET password_encryption = md5; ALTER ROLE autobot_slm PASSWORD 'kept'")
    secrets.write(b"SLM_DB_PASSWORD=kept\n")
    assert apply(host)["verifier of autobot_slm"]["old"] == "md5"
    assert secrets.stored().startswith("SCRAM-SHA-256")
    assert secrets.log_in("kept")


def test_a_password_that_matches_is_not_set_again(host):
    """The comparison uses the stored salt: the verifier that libpq made stays."""
    secrets.write("SLM_DB_PASSWORD=pässwörd\n".encode())
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'pässwörd'")
    before = secrets.stored()
    apply(host)
    assert secrets.stored() == before


def test_verifiers_agree_with_those_of_libpq(host):
    """For awkward passwords what libpq makes is what we compare with, and the other way round."""
    connection = host.call("slmdb_server.connect")
    awkward = [
        "a",
        "ä",
        "\u00aa",
        "\u2168x",
        "a\u00a0b",
        "x\u00ad",
        "\u0627\u0031",
        "\u0627b",
        "\u0221",
    ]
    for number in [
        *range(0x80, 0x3100, 31),
        *range(0xF900, 0xFFEF, 31),
        *range(0x1D400, 0x1D7FF, 31),
    ]:
        awkward.append(f"x{chr(number)}{chr(number + 1)}")
    wrong = []
    for password in awkward:
        made = secrets.psycopg2.extensions.encrypt_password(
            password, "r", scope=connection, algorithm="scram-sha-256"
        )
        if not host.call("slmdb_verifier.matches", password, made, "r"):
            wrong.append(password)
    connection.close()
    assert wrong == []


# supplied


def supplied(minions, password):
    return minions(
        {"slm_database": {"secret": {"from_pillar": "vault:db"}}, "vault": {"db": password}}
    )


def test_a_supplied_password_is_used(host, minions):
    """The operator's password is taken by the name of its pillar key."""
    minion = supplied(minions, "from the vault")
    changes = apply(minion)
    assert "from the vault" not in str(changes)
    assert secrets.value("SLM_DB_PASSWORD") == '"from the vault"'
    assert secrets.log_in("from the vault")
    assert apply(minion) == {}


def test_another_supplied_password_is_a_rotation(host, minions):
    """The change goes the way of a rotation, and only one password is left."""
    apply(supplied(minions, "first one"))
    minion = supplied(minions, "second one")
    assert set(apply(minion)) == {"rotation"}
    assert secrets.log_in("second one")
    assert not secrets.log_in("first one")
    assert b"first one" not in secrets.FILE.read_bytes()
    assert b"_NEXT" not in secrets.FILE.read_bytes()


def test_a_supplied_rotation_announces_all_that_it_makes(host, minions):
    """With test=True it names what a run makes beside it, and what becomes of the backend."""
    apply(host)
    more = {"generate_missing": ["NEW_KEY"], "rotate_every": "90d"}
    pillar = {"secret": {"from_pillar": "vault:db", **more}}
    minion = minions({"slm_database": pillar, "vault": {"db": "second one"}})
    announced = minion.state("slmdb_secret.present", test=True).changes
    assert set(announced) == {"rotation", "NEW_KEY", "SLM_DB_PASSWORD_SINCE"}
    assert "backend: left alone (no systemd here)" in announced["rotation"]["new"]
    assert apply(minion) == announced
    assert secrets.value("SLM_DB_PASSWORD_SINCE") == announced["SLM_DB_PASSWORD_SINCE"]["new"]
    assert secrets.value("NEW_KEY")
    assert secrets.log_in("second one")
    assert apply(minion) == {}


def test_a_supplied_password_that_would_lock_an_own_url_out_is_refused(host, minions):
    """Said with test=True as well, and before anything is touched."""
    own = "postgresql+asyncpg://autobot_slm:first@db.example/autobot_slm"
    secrets.write(f"SLM_DB_PASSWORD=first\nDATABASE_URL={own}\n".encode())
    apply(host)
    minion = supplied(minions, "second one")
    before = secrets.seen()
    for keywords in ({"test": True}, {}):
        run = minion.state("slmdb_secret.present", **keywords)
        assert run.result is False
        assert "DATABASE_URL is your own (host db.example, not localhost)" in run.comment
    assert minion.state("slmdb_secret.applicable").result is False
    assert secrets.seen() == before


@pytest.mark.parametrize("value", [None, 5, "", "a\0b", ["x"]])
def test_a_supplied_password_that_is_none_stops_the_run(host, minions, value):
    """The pillar key is named, its value is not."""
    minion = supplied(minions, value)
    before = secrets.seen()
    run = minion.state("slmdb_secret.applicable")
    assert run.result is False
    assert "vault:db" in run.comment
    assert minion.state("slmdb_secret.present").result is False
    assert secrets.seen() == before


def test_a_supplied_password_is_not_rotated_by_command(host, minions):
    """It is changed where it is supplied."""
    minion = supplied(minions, "first one")
    apply(minion)
    with pytest.raises(SaltInvocationError, match="vault:db"):
        minion.call("slmdb_secret.rotate")


# other roles


def test_the_state_works_for_any_role_and_file(host):
    """Outside the formula's own settings: another role, file, key, owner and mode."""
    secrets.psql("CREATE ROLE reporting LOGIN; CREATE DATABASE reports OWNER reporting")
    wanted = {
        "role": "reporting",
        "file": "/etc/reporting/database.env",
        "key": "REPORTING_PASSWORD",
        "url_keys": ["REPORTING_URL"],
        "url_driver": "postgresql",
        "database": "reports",
        "group": "root",
        "mode": "0600",
        "length": 60,
    }
    path = Path(wanted["file"])
    try:
        apply(host, **wanted)
        assert apply(host, **wanted) == {}
        password = secrets.value("REPORTING_PASSWORD", path)
        assert len(password) == 60
        assert secrets.value("REPORTING_URL", path) == (
            f"postgresql://reporting:{password}@localhost:5432/reports"
        )
        assert path.stat().st_mode & 0o777 == 0o600
        assert secrets.log_in(password, "reporting", "reports")
    finally:
        path.unlink()
        path.parent.rmdir()
    assert not secrets.FILE.exists()


def test_roles_of_the_pillar_get_theirs(host, minions):
    """Extra roles have a file of their own, or a password by reference."""
    secrets.psql("CREATE ROLE extra LOGIN; CREATE ROLE vaulted LOGIN")
    roles = {
        "extra": {"secret": {"file": "/etc/autobot/extra.env", "key": "EXTRA"}},
        "vaulted": {"password_pillar": "vault:other"},
    }
    minion = minions({"slm_database": {"roles": roles}, "vault": {"other": "by reference"}})
    apply(minion)
    assert apply(minion) == {}
    password = secrets.value("EXTRA", secrets.DIRECTORY / "extra.env")
    assert secrets.log_in(password, "extra", "postgres")
    assert secrets.log_in("by reference", "vaulted", "postgres")


def test_a_mistake_of_another_role_names_its_own_key(host, minions):
    """The line leads to where the operator wrote it."""
    secrets.psql("CREATE ROLE extra LOGIN; CREATE ROLE vaulted LOGIN")
    minion = minions({"slm_database": {"roles": {"vaulted": {"password_pillar": "vault:none"}}}})
    said = minion.state("slmdb_secret.applicable").comment
    assert said.startswith("slm_database:roles:vaulted:password_pillar: pillar has no key")
    extra = {"file": "/etc/autobot/extra.env", "key": "EXTRA", "owner": "nobody-here"}
    minion = minions({"slm_database": {"roles": {"extra": {"secret": extra}}}})
    said = minion.state("slmdb_secret.applicable").comment
    assert said.startswith("slm_database:roles:extra:secret:owner: there is no user nobody-here")
    secrets.psql("ALTER ROLE extra PASSWORD 'unknown'")
    said = minion.state("slmdb_secret.applicable").comment
    assert "EXTRA=..." in said
    assert "adopt" not in said
    vaulted = {"vaulted": {"password_pillar": "vault:other"}}
    minion = minions({"slm_database": {"roles": vaulted}, "vault": {"other": "text"}})
    with pytest.raises(SaltInvocationError, match="supplied by pillar key vault:other"):
        minion.call("slmdb_secret.rotate", role="vaulted")


def test_an_unknown_argument_is_named(host):
    """A misspelt argument is a mistake, not ignored."""
    run = host.state("slmdb_secret.present", fil="/x")
    assert run.result is False
    assert "fil" in run.comment


# reports


def test_facts_hold_no_secret_and_say_what_matters(host):
    """The report for health: where the file is, whose, what is missing, whether it is in step."""
    apply(host)
    found = host.call("slmdb_secret.facts")
    assert secrets.value("SLM_DB_PASSWORD") not in str(found)
    assert found["file"] == str(secrets.FILE)
    assert (found["owner"], found["group"], found["mode"]) == ("root", secrets.GROUP, "0640")
    assert found["in_step"] is True
    assert found["missing_keys"] == ["SLM_SECRET_KEY", "SLM_ENCRYPTION_KEY", "SLM_ADMIN_PASSWORD"]
    assert host.call("slmdb_secret.facts", server=False)["in_step"] is None


def test_an_overdue_rotation_is_reported_and_not_done(host, minions):
    """`rotate_every` reports; it never rotates."""
    apply(host)
    minion = minions({"slm_database": {"secret": {"rotate_every": "90d"}}})
    assert minion.call("slmdb_secret.facts")["overdue"] is False
    long_ago = time.time() - 91 * 86400
    os.utime(secrets.FILE, (long_ago, long_ago))
    assert minion.call("slmdb_secret.facts")["overdue"] is True
    password = secrets.value("SLM_DB_PASSWORD")
    apply(minion)
    assert secrets.value("SLM_DB_PASSWORD") == password
    assert minion.call("slmdb_secret.facts")["overdue"] is True
    minion.call("slmdb_secret.rotate")
    assert minion.call("slmdb_secret.facts")["overdue"] is False


def test_fingerprints_compare_file_server_and_copy(host, tmp_path):
    """Equal for the same password, different for others, and of no use to whoever reads them."""
    apply(host)
    copy = secrets.DIRECTORY / "copy.env"
    secrets.write(secrets.FILE.read_bytes(), copy)
    found = host.call("slmdb_secret.fingerprint", file=str(copy), key="k")
    assert found["file"] == found["server"] == found["copy"]
    assert len(found["file"]) == 16
    assert host.call("slmdb_secret.fingerprint", key="other")["file"] != found["file"]
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'drifted'")
    secrets.write(b"SLM_DB_PASSWORD=drifted\n", copy)
    drifted = host.call("slmdb_secret.fingerprint", file=str(copy), key="k")
    assert drifted["file"] == found["file"]
    assert drifted["server"] == "differs"
    assert drifted["copy"] != found["file"]


def test_login_says_true_or_why_not(host):
    """A real login over TCP; a refusal is one line without the password."""
    assert "has no SLM_DB_PASSWORD" in host.call("slmdb_secret.login")
    apply(host)
    assert host.call("slmdb_secret.login") is True
    refused = host.call("slmdb_secret.login", database="nowhere")
    assert "nowhere" in refused
    assert len(refused.splitlines()) == 1
    secrets.psql("ALTER ROLE autobot_slm PASSWORD 'drifted'")
    assert "password authentication failed" in host.call("slmdb_secret.login")


def test_nothing_public_returns_the_password(host):
    """What an operator can call shows no password, whatever they call."""
    apply(host)
    password = secrets.value("SLM_DB_PASSWORD")
    want = host.call("slmdb_secret_plan.wanted")
    shown = [
        host.call("slmdb_secret.variables", str(secrets.FILE)),
        host.call("slmdb_secret_file.store", str(secrets.FILE)),
        host.call("slmdb_secret_plan.plan", want),
        host.call("slmdb_secret_plan.everyone"),
        host.call("slmdb_secret.differences"),
        host.call("slmdb_secret.problem"),
    ]
    assert password not in "".join(f"{answer!r}{answer}" for answer in shown)


def test_a_child_of_ours_gets_the_variables_and_their_values_are_masked(host):
    """The sealed mapping is of use inside the process only."""
    apply(host)
    variables = host.call("slmdb_secret.variables", str(secrets.FILE))
    environment = {"PORT": "5432"}
    environment.update(variables)
    password = secrets.value("SLM_DB_PASSWORD")
    assert environment["SLM_DB_PASSWORD"] == password
    environment["PLACE"] = "postgresql://role:raw/p+w@localhost/db"
    hidden = host.call("slmdb_secret.hidden", environment)
    assert "raw/p+w" in hidden
    split = host.call("slmdb_secret.hidden", {"AT": "postgresql://u:p@ssword@localhost/db"})
    assert split == ["p@ssword", "ssword"]
    assert password in hidden
    assert "5432" not in hidden


# clean


def test_clean_keeps_the_secret_without_the_key_and_names_it(host):
    """Nothing is removed unless `clean:secret` says so."""
    apply(host)
    before = secrets.seen()
    run = host.state("slmdb_secret.absent")
    assert run.result is True
    assert str(secrets.FILE) in run.comment
    assert secrets.seen() == before


@pytest.mark.parametrize("foreign", [b"", secrets.FOREIGN])
def test_clean_removes_our_keys_only(host, minions, foreign):
    """What is not ours stays; a file that held nothing else goes."""
    secrets.write(foreign)
    apply(host)
    minion = minions({"slm_database": {"clean": {"secret": True}}})
    announced = minion.state("slmdb_secret.absent", test=True)
    run = minion.state("slmdb_secret.absent")
    assert run.result is True
    assert run.changes == announced.changes
    assert (secrets.FILE.read_bytes() if secrets.FILE.exists() else b"") == foreign
    assert minion.state("slmdb_secret.absent").changes == {}


def test_clean_knows_owners_whose_accounts_are_gone(host, minions):
    """What was removed before leaves a number: the file keeps it."""
    secrets.write(secrets.FOREIGN)
    apply(host)
    os.chown(secrets.FILE, 54321, 54322)
    run = minions({"slm_database": {"clean": {"secret": True}}}).state("slmdb_secret.absent")
    assert run.result is True, run.comment
    found = secrets.FILE.stat()
    assert (found.st_uid, found.st_gid) == (54321, 54322)


def test_the_server_sees_verifiers_only(host):
    """With every statement logged, neither password nor verifier is in the server's log."""
    secrets.psql("ALTER SYSTEM SET log_statement = 'all'")
    secrets.psql("ALTER SYSTEM SET log_transaction_sample_rate = 1")
    secrets.psql("SELECT pg_reload_conf()")
    apply(host)
    log = b"".join(path.read_bytes() for path in Path("/var/log/postgresql").rglob("*.log"))
    assert b"SELECT rolpassword" in log
    assert secrets.value("SLM_DB_PASSWORD").encode() not in log
    assert secrets.stored().encode() not in log


WATCH = """
BEGIN; ALTER ROLE autobot_slm CONNECTION LIMIT -1; SELECT 'the role is locked';
CREATE TEMPORARY VIEW ours AS SELECT query FROM pg_stat_activity
 WHERE application_name = 'slmdb secret' AND wait_event_type = 'Lock';
DO $$ BEGIN FOR turn IN 1..300 LOOP
  PERFORM pg_stat_clear_snapshot(); EXIT WHEN EXISTS (SELECT FROM ours); PERFORM pg_sleep(0.1);
END LOOP; END $$;
SELECT count(*), max(query) FROM ours;
"""


def test_nobody_who_watches_sees_a_verifier(host):
    """Not even a session that may read everybody's statements, while ours waits for a lock."""
    apply(host)
    command = ["runuser", "-u", "postgres", "--", "psql", "-qAt", "-c", WATCH.replace("\n", " ")]
    script = Path("/tmp/watch.sql")
    script.write_text(WATCH)
    command = ["runuser", "-u", "postgres", "--", "psql", "-qAt", "-f", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout.readline() == "the role is locked\n"
        host.call("slmdb_verifier.put", "autobot_slm", "another one")
        seen, _ = watcher.communicate()
    assert seen == "1|\n"
    assert secrets.log_in("another one")


def test_an_unreadable_file_is_an_error_of_one_line(host):
    """The world refused: said so, without a traceback."""
    with pytest.raises(CommandExecutionError, match="absolute and plain"):
        host.call("slmdb_secret_file.store", "relative/path")
