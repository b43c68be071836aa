"""A scratch server with pgbench's tables and some shaped like the backend's, and its workloads."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKLOADS = ("tpcb-like", "simple-update", "select-only", "backend")
SCHEMA = """
CREATE TABLE nodes (id int PRIMARY KEY, name text, status text, last_seen timestamptz);
CREATE TABLE trace_spans (
    id bigserial PRIMARY KEY, trace uuid, node int, name text, started timestamptz, took float);
CREATE INDEX ON trace_spans (trace);
CREATE INDEX ON trace_spans (node, started);
INSERT INTO nodes SELECT n, 'node ' || n, 'up', now() FROM generate_series(1, 500) n;
INSERT INTO trace_spans (trace, node, name, started, took)
SELECT gen_random_uuid(), n % 500 + 1, 'span ' || n % 50, now() - n * interval '1 s', random()
FROM generate_series(1, {spans}) n;
"""
# Of a hundred transactions: sixty heartbeats, ten batches of a hundred spans, thirty reads.
HEARTBEAT = r"""\set node random(1, 500)
UPDATE nodes SET last_seen = now(), status = 'up' WHERE id = :node;
"""
BATCH = r"""\set node random(1, 500)
INSERT INTO trace_spans (trace, node, name, started, took)
SELECT gen_random_uuid(), :node, 'span ' || n % 50, now(), random()
FROM generate_series(1, 100) n;
"""
DASHBOARD = r"""\set node random(1, 500)
SELECT name, count(*), avg(took), max(took) FROM (
    SELECT name, took FROM trace_spans WHERE node = :node ORDER BY started DESC LIMIT 500) s
GROUP BY name ORDER BY avg(took) DESC LIMIT 10;
"""
SCRIPTS = {"heartbeat": (HEARTBEAT, 60), "batch": (BATCH, 10), "dashboard": (DASHBOARD, 30)}


class Server:
    """A scratch server in a directory of its own."""

    def __init__(self, directory: Path, binaries: Path, spans: int):
        self.directory, self.binaries, self.spans = directory, binaries, spans
        shutil.chown(directory, "postgres", "postgres")
        self.run("initdb", "-D", "data", "-A", "trust", "--no-sync", "--data-checksums")
        for name, (text, _) in SCRIPTS.items():
            (directory / f"{name}.sql").write_text(text)

    def popen(self, program: str, *words: str, **options: Any) -> subprocess.Popen:
        """Start a program as the server's user; ours, if there is one of that name."""
        path = self.binaries / program
        command = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PGHOST": str(self.directory)}
        return subprocess.Popen(
            [*command, str(path) if path.exists() else program, *words],
            cwd=self.directory,
            env=environment,
            text=True,
            **options,
        )

    def run(self, program: str, *words: str) -> str:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(program, *words, **pipes) as process:
            said, complained = process.communicate()
        if process.returncode:
            sys.exit(f"{program}: {(complained or said).strip()}")
        return said

    def start(self, settings: dict[str, str]) -> None:
        own = {"listen_addresses": "", "unix_socket_directories": str(self.directory)}
        lines = [f"{name} = '{value}'\n" for name, value in {**settings, **own}.items()]
        (self.directory / "data" / "postgresql.auto.conf").write_text("".join(lines))
        self.run("pg_ctl", "-D", "data", "-l", "log", "-w", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", "data", "-m", "fast", "-w", "-t", "600", "stop")

    def kill(self) -> None:
        """Leave nothing running, whatever happened."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.directory / "data" / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGQUIT)
            time.sleep(1)

    def sql(self, *statements: str) -> None:
        words = [word for statement in statements for word in ("-c", statement)]
        self.run("psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres", *words)

    def fill(self, scale: int) -> None:
        self.start({"max_wal_size": "8GB", "fsync": "off"})
        self.run("pgbench", "-i", "-q", "-s", str(scale), "postgres")
        self.sql(SCHEMA.format(spans=self.spans), "CREATE EXTENSION pg_prewarm")
        self.sql("VACUUM ANALYZE", "CHECKPOINT")
        self.stop()

    def warm(self) -> None:
        """Fill the server's cache with as much of the tables and indexes as it takes."""
        self.sql(
            "SELECT pg_prewarm(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace "
            "AND relkind IN ('r', 'i') ORDER BY relpages DESC"
        )

    def measure(self, workload: str, seconds: int, clients: int) -> float:
        """Return transactions per second, from the same data every time."""
        self.sql(f"DELETE FROM trace_spans WHERE id > {self.spans}", "TRUNCATE pgbench_history")
        self.sql("VACUUM pgbench_tellers, pgbench_branches, nodes, trace_spans", "CHECKPOINT")
        words = ["-n", "-T", str(seconds), "-c", str(clients), "-j", "2", "-M", "prepared"]
        if workload == "backend":
            for name, (_, weight) in SCRIPTS.items():
                words += ["-f", f"{name}.sql@{weight}"]
        else:
            words += ["-b", workload]
        answer = self.run("pgbench", *words, "postgres")
        match = re.search(r"tps = ([\d.]+)", answer)
        return float(match[1]) if match else 0.0
