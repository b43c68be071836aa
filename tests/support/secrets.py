"""The secret file and the role's password, looked at and spoilt without going through Salt."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import stat
import subprocess
from pathlib import Path

import psycopg2

DIRECTORY = Path("/etc/autobot")
FILE = DIRECTORY / "slm-secrets.env"
OLD_FILE = DIRECTORY / "db-credentials.env"
ROLE = DATABASE = "autobot_slm"
GROUP = "autobot-slm-backend"
FOREIGN = b"# the backend's own\nSLM_SECRET_KEY='a b'\n\n; odd\nexport X=1\nSLM_JWT=\"q\\\"\" \n"


def psql(statements, database="postgres"):
    """Run SQL as the superuser, one statement after the other; return the last answer as text."""
    before = os.geteuid()
    os.seteuid(pwd.getpwnam("postgres").pw_uid)
    try:
        connection = psycopg2.connect(
            host="/var/run/postgresql", dbname=database, user="postgres", application_name="test"
        )
    finally:
        os.seteuid(before)
    connection.autocommit = True
    with contextlib.closing(connection), connection.cursor() as cursor:
        for statement in statements.split("; "):
            cursor.execute(statement)
        rows = cursor.fetchall() if cursor.description else []
    return "\n".join("|".join("" if cell is None else str(cell) for cell in row) for row in rows)


def log_in(password, role=ROLE, database=DATABASE, port=5432):
    """Tell whether the server lets a role in over TCP with a password."""
    try:
        psycopg2.connect(
            host="127.0.0.1", port=port, user=role, password=password, dbname=database
        ).close()
    except psycopg2.OperationalError:
        return False
    return True


def write(data, path=FILE, mode=0o640):
    """Write an environment file as an operator would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def value(key, path=FILE):
    """Return a plain value of the file: the first line that assigns it."""
    found = [line for line in path.read_text().splitlines() if line.startswith(f"{key}=")]
    return found[0].partition("=")[2] if found else None


def stored(role=ROLE):
    """Return what the server stores of a role's password."""
    return psql(f"SELECT rolpassword FROM pg_authid WHERE rolname = '{role}'")


def wipe():
    """Begin again: no file, no group, a role without a password and its database."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        DIRECTORY.unlink()
    subprocess.run(["groupdel", GROUP], check=False, capture_output=True)
    psql("ALTER SYSTEM RESET ALL")
    for name in psql(
        "SELECT datname FROM pg_database WHERE datname !~ '^(postgres|template)'"
    ).split():
        psql(f'DROP DATABASE "{name}" WITH (FORCE)')
    for name in psql(r"SELECT rolname FROM pg_roles WHERE rolname !~ '^(pg_|postgres$)'").split():
        psql(f'DROP ROLE "{name}"')
    psql(f"CREATE ROLE {ROLE} LOGIN")
    psql(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")


def seen():
    """Return everything that a refused run must leave as it was."""
    files = {}
    for path in sorted([DIRECTORY, *DIRECTORY.rglob("*")]) if DIRECTORY.exists() else []:
        found = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(found.st_mode) else None
        link = os.readlink(path) if path.is_symlink() else None
        files[path] = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, data, link)
    roles = psql("SELECT rolname, rolpassword FROM pg_authid ORDER BY 1")
    databases = psql("SELECT datname FROM pg_database ORDER BY 1")
    return files, roles, databases, Path("/etc/group").read_text()
