#!/usr/bin/env python3
"""
Measure the tuned settings against Debian's defaults and those of the former deployment.

One scratch server, one data set; the three configurations take turns in every round, so that what
slows the machine down slows all of them. Four workloads: pgbench's three, and one shaped like the
backend's (heartbeats, batches of trace spans, dashboard reads). Printed is a table of medians and,
for each ratio, its 95 % bootstrap interval over the rounds. Run it as root:

    bench/tuning.py --scale 100 --rounds 7 --seconds 120 --operations 3000
    bench/tuning.py --scale 200 --rounds 5 --seconds 30 --memory 2048 --operations 3000
    bench/tuning.py --rounds 60 --seconds 4 --together --workloads select-only backend

What only the processor decides differs by less than the machine does from minute to minute. There
--together helps: each configuration has a server and data of its own, all of them are up, and the
turns are a few seconds long.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _modules import slmdb_tuning as tuning
from bench import smaller, support
from bench.scratch import WORKLOADS, Server

FORMER = {
    "shared_buffers": "256MB",
    "effective_cache_size": "1GB",
    "work_mem": "16MB",
    "maintenance_work_mem": "128MB",
    "wal_buffers": "8MB",
    "min_wal_size": "1GB",
    "max_wal_size": "2GB",
}


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
    for workload in found["tuned"]:
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
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--memory", type=int, help="MB: the server is held to it, and tuned for it")
    parser.add_argument("--operations", type=int, help="a second, each way: limits the disk")
    parser.add_argument("--megabytes", type=int, default=125, help="a second, likewise")
    parser.add_argument("--together", action="store_true", help="a server for each, all of them up")
    parser.add_argument("--directory", default="/var/tmp", help="where the scratch server is made")
    parser.add_argument("--binaries", type=Path, default=Path("/usr/lib/postgresql/15/bin"))
    return parser.parse_args()


def play(
    servers: dict[str, Server], made: dict[str, dict[str, str]], given: argparse.Namespace
) -> dict:
    """Let the configurations take turns; return transactions per second, round by round."""
    found: dict = {name: {workload: [] for workload in given.workloads} for name in made}
    for turn in range(given.rounds):
        names = list(made)
        random.Random(turn).shuffle(names)
        for name in names:
            server = servers[name]
            if turn == 0 or not given.together:
                server.start(made[name])
                server.warm()
            for workload in given.workloads:
                tps = server.measure(workload, given.seconds, given.clients)
                found[name][workload].append(tps)
                stamp = time.strftime("%H:%M:%S")
                print(f"{stamp} {turn + 1} {name} {workload} {tps:.0f}", file=sys.stderr)
            if not given.together:
                server.stop()
    return found


def filled(directory: Path, given: argparse.Namespace, stack: contextlib.ExitStack) -> Server:
    directory.mkdir(mode=0o755)
    server = Server(directory, given.binaries, given.spans)
    stack.callback(server.kill)
    server.fill(given.scale)
    return server


def measure_in(directory: Path, given: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        limit = None
        if given.operations:
            size = 24 + given.scale // 30
            wanted = (directory, size, given.operations, given.megabytes)
            directory, limit = stack.enter_context(smaller.disk(*wanted))
        memory = given.memory * 1024**2 if given.memory else None
        made = configurations(memory, directory, int(given.binaries.parent.name))
        if given.together:
            servers = {name: filled(directory / name, given, stack) for name in made}
        else:
            servers = dict.fromkeys(made, filled(directory / "server", given, stack))
        if limit:
            limit()
        if given.memory:
            stack.enter_context(smaller.memory(given.memory))
            for server in servers.values():
                stack.callback(server.kill)
        print(table(play(servers, made, given)))


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="slmdb-bench-", dir=given.directory) as directory:
        Path(directory).chmod(0o755)
        measure_in(Path(directory), given)


if __name__ == "__main__":
    main()
