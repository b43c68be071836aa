#!/usr/bin/env python3
"""
Measure the tuned settings against Debian's defaults and those of the former deployment.

One scratch server, one data set; the three configurations take turns in every round, so that what
slows the machine down slows all of them. Four workloads: pgbench's three, and one shaped like the
backend's (heartbeats, batches of trace spans, dashboard reads). Printed is a table of medians and,
for each ratio, its 95 % bootstrap interval over the rounds. Run it as root:

    bench/tuning.py --scale 100 --rounds 5 --seconds 20
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _modules import slmdb_tuning as tuning
from bench import support

FORMER = {
    "shared_buffers": "256MB",
    "effective_cache_size": "1GB",
    "work_mem": "16MB",
    "maintenance_work_mem": "128MB",
    "wal_buffers": "8MB",
    "min_wal_size": "1GB",
    "max_wal_size": "2GB",
}
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

    def run(self, program: str, *words: str) -> str:
        command = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        answer = subprocess.run(
            [*command, str(self.binaries / program), *words],
            cwd=self.directory,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "PGHOST": str(self.directory)},
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode:
            sys.exit(f"{program}: {answer.stderr.strip()}")
        return answer.stdout

    def start(self, settings: dict[str, str]) -> None:
        own = {"listen_addresses": "", "unix_socket_directories": str(self.directory)}
        lines = [f"{name} = '{value}'\n" for name, value in {**settings, **own}.items()]
        (self.directory / "data" / "postgresql.auto.conf").write_text("".join(lines))
        self.run("pg_ctl", "-D", "data", "-l", "log", "-w", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", "data", "-m", "fast", "-w", "-t", "600", "stop")

    def sql(self, *statements: str) -> None:
        words = [word for statement in statements for word in ("-c", statement)]
        self.run("psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres", *words)

    def fill(self, scale: int) -> None:
        self.start({"max_wal_size": "8GB", "fsync": "off"})
        self.run("pgbench", "-i", "-q", "-s", str(scale), "postgres")
        self.sql(SCHEMA.format(spans=self.spans), "VACUUM ANALYZE", "CHECKPOINT")
        self.stop()

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


def configurations(memory: int | None, disk: Path, major: int) -> dict[str, dict[str, str]]:
    stat = os.statvfs(disk)
    facts = {
        "memory": memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cores": len(os.sched_getaffinity(0)),
        "rotational": False,
        "disk": stat.f_blocks * stat.f_frsize,
    }
    rows = tuning.recommend("colocated", facts, major)
    tuned = {name: row["value"] for name, row in rows.items()}
    return {"debian": {}, "former": FORMER, "tuned": tuned}


def table(found: dict[str, dict[str, list[float]]]) -> str:
    heads = ["workload", "Debian's defaults", "former", "tuned", "tuned / Debian", "tuned / former"]
    rows = []
    for workload in WORKLOADS:
        rounds = {name: found[name][workload] for name in found}
        cells = [f"{statistics.median(rounds[name]):.0f}" for name in found]
        for other in ("debian", "former"):
            pairs = zip(rounds["tuned"], rounds[other], strict=True)
            cells.append(support.shown([tuned / base for tuned, base in pairs]))
        rows.append([workload, *cells])
    return support.table(heads, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--scale", type=int, default=100, help="pgbench's scale (15 MB each)")
    parser.add_argument("--spans", type=int, default=1_000_000, help="trace spans at the start")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=20, help="for each measurement")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--memory", type=int, help="MB that the settings are made for")
    parser.add_argument("--directory", default="/var/tmp", help="where the scratch server is made")
    parser.add_argument("--binaries", type=Path, default=Path("/usr/lib/postgresql/15/bin"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    directory = Path(tempfile.mkdtemp(prefix="slmdb-bench-", dir=given.directory))
    major = int(given.binaries.parent.name)
    memory = given.memory * 1024**2 if given.memory else None
    made = configurations(memory, directory, major)
    found: dict[str, dict[str, list[float]]] = {n: {w: [] for w in WORKLOADS} for n in made}
    try:
        server = Server(directory, given.binaries, given.spans)
        server.fill(given.scale)
        for turn in range(given.rounds):
            names = list(made)
            random.Random(turn).shuffle(names)
            for name in names:
                server.start(made[name])
                server.sql("SELECT count(*) FROM pgbench_accounts")
                for workload in WORKLOADS:
                    tps = server.measure(workload, given.seconds, given.clients)
                    found[name][workload].append(tps)
                    stamp = time.strftime("%H:%M:%S")
                    print(f"{stamp} {turn + 1} {name} {workload} {tps:.0f}", file=sys.stderr)
                server.stop()
        print(table(found))
    finally:
        subprocess.run(
            ["sh", "-c", 'kill -QUIT "$(head -1 data/postmaster.pid)" 2>/dev/null; sleep 1'],
            cwd=directory,
            check=False,
            stderr=subprocess.DEVNULL,
        )
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
