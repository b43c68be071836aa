"""The backend in miniature: its directory, its tables, its Alembic project on asyncpg, its venv.

Everything is written through a function `write(path, text)`, so that it serves a directory of this
machine as well as a booted host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.support import image

USER = "autobot-slm-backend"
DIRECTORY = Path("/opt/autobot/autobot-slm-backend")
CHECKOUT = Path(__file__).resolve().parents[2]
REQUIREMENTS = CHECKOUT / "requirements/backend.txt"
PYTHON = "/usr/bin/python3"
TABLES = (
    "nodes",
    "node_code_versions",
    "deployments",
    "system_updates",
    "performance_traces",
    "trace_spans",
    "slo_definitions",
    "alert_rules",
)
INI = """\
[alembic]
script_location = %(here)s/migrations
prepend_sys_path = .
path_separator = os
"""
# As Alembic's own "async" template, with the URL from the environment that systemd gives.
ENV = """\
import asyncio
import os

from alembic import context
from sqlalchemy import pool
from sqlalchemy.ext.asyncio import create_async_engine

URL = os.environ["SLM_DATABASE_URL"]


def run(connection):
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


async def online():
    engine = create_async_engine(URL, poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()


if context.is_offline_mode():
    context.configure(url=URL, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(online())
"""
DATABASE = f"""\
import os

from sqlalchemy import BigInteger, Column, MetaData, Table, Text
from sqlalchemy.ext.asyncio import create_async_engine

metadata = MetaData()
for name in {TABLES!r}:
    Table(name, metadata, Column("id", BigInteger, primary_key=True), Column("name", Text))


class DatabaseService:
    async def initialize(self):
        engine = create_async_engine(os.environ["DATABASE_URL"])
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        await engine.dispose()


db_service = DatabaseService()
"""
REVISION = '''\
"""{message}"""

import os
import time

from alembic import op

revision = {name!r}
down_revision = {down!r}
branch_labels = None
depends_on = None


def upgrade():
{body}


def downgrade():
    raise RuntimeError("a downgrade was tried")
'''


def revision(name, down, message, *lines):
    """Return the text of a migration; `lines` are the statements of its upgrade()."""
    body = textwrap.indent("\n".join(lines) or "pass", "    ")
    return REVISION.format(name=name, down=down, message=message, body=body)


def sql(statement):
    """Return the line of a migration that runs a statement."""
    return f"op.execute({statement!r})"


# Two steps, a branch, and the merge of its two arms.
HISTORY = {
    "a1": (None, "Nodes have a region", sql("ALTER TABLE nodes ADD region text")),
    "b1": ("a1", "Heartbeats", sql("CREATE TABLE heartbeats (id bigint PRIMARY KEY)")),
    "c1": ("b1", "Traces have a colour", sql("ALTER TABLE trace_spans ADD colour text")),
    "c2": ("b1", "Rules have an owner", sql("ALTER TABLE alert_rules ADD owner text")),
    "d1": (("c1", "c2"), "Traces and rules come together"),
}
ORDERS = (["a1", "b1", "c1", "c2", "d1"], ["a1", "b1", "c2", "c1", "d1"])


def files(history=None):
    """Return the backend's files, path below its directory to text."""
    made = {
        "alembic.ini": INI,
        "migrations/env.py": ENV,
        "migrations/script.py.mako": "",
        "services/__init__.py": "",
        "services/database.py": DATABASE,
    }
    for name, (down, message, *lines) in (HISTORY if history is None else history).items():
        made[f"migrations/versions/{name}.py"] = revision(name, down, message, *lines)
    return made


def venv():
    """Return the virtual environment of this machine, made once.

    A world of ours has no network and forgets its files, so it is made by a process outside of it,
    in the namespaces of the process above us. Call this before the world is fresh.
    """
    outside = ["nsenter", "-t", str(os.getppid()), "-m", "-n", f"--wd={CHECKOUT}", "--"]
    command = [*outside, sys.executable, "-m", "tests.support.backend"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(answer.stdout.strip())


def _make_venv(directory):
    subprocess.run([PYTHON, "-m", "venv", str(directory)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--retries", "5", "-r", str(REQUIREMENTS)]
    subprocess.run([f"{directory}/bin/python", *install], check=True, stdout=sys.stderr)


def make_user():
    """Create the backend's user and group in this world."""
    if subprocess.run(["id", USER], capture_output=True, check=False).returncode:
        subprocess.run(["groupadd", "--system", "--force", USER], check=True)
        command = ["useradd", "--system", "--no-create-home", "--gid", USER]
        subprocess.run([*command, "--shell", "/usr/sbin/nologin", USER], check=True)


def deploy(environment=None, history=None, directory=DIRECTORY):
    """Put the backend's files into this world, replacing what was there."""
    remove(directory)
    for name, text in files(history).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if environment:
        (directory / "venv").symlink_to(environment)
    make_user()
    shutil.chown(directory, USER, USER)
    return directory


def add(name, down, message, *lines, directory=DIRECTORY):
    """Add a migration to a deployed backend."""
    path = directory / f"migrations/versions/{name}.py"
    path.write_text(revision(name, down, message, *lines))
    return path


def remove(directory=DIRECTORY):
    """Take the backend away."""
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    print(image.cached("backend-venv", [REQUIREMENTS.read_text(), sys.version, PYTHON], _make_venv))
