#!/usr/bin/env python3
"""
Measure backups and restores of the formula's engine against PostgreSQL's own tools.

One scratch server and one data set. In every round pgBackRest (encrypted, zstd, as the formula
sets it up), pg_basebackup and pg_dump take turns, in another order each time; a TPC-B-like workload
runs all the while. Printed are medians: how long a backup takes, how much of the workload's speed
is left meanwhile, how long until a restored server accepts logins, and the size of the backup; and
pgBackRest's ratio to each of the others with its 95 % bootstrap interval. Run it as root:

    bench/backup.py --scale 100 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import support
from bench.scratch import Server

CONFIG = """\
[global]
repo1-path={directory}/repository
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass={key}
repo1-retention-full=1
compress-type=zst
start-fast=y
lock-path={directory}/lock
spool-path={directory}/spool
log-level-file=off
[bench]
pg1-path={directory}/data
pg1-socket-path={directory}
pg1-user=postgres
"""
TOOLS = ("pgbackrest", "pg_basebackup", "pg_dump")
FIGURES = ("backup_seconds", "speed_left", "restore_seconds", "bytes")
QUIET = 8  # seconds of the workload alone, before each backup


class Workload:
    """pgbench without end, and its speed between two moments."""

    def __init__(self, server: Server, clients: int):
        self.seconds: list[tuple[float, float]] = []
        words = ["-n", "-T", "100000", "-P", "1", "-c", str(clients), "-M", "prepared"]
        self.process = server.popen("pgbench", *words, "postgres", stderr=subprocess.PIPE)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            match = re.search(r"progress: [\d.]+ s, ([\d.]+) tps", line)
            if match:
                self.seconds.append((time.monotonic(), float(match[1])))

    def speed(self, begin: float, end: float) -> float:
        """The median of the whole seconds inside; the nearest one if it was shorter than that."""
        inside = [tps for moment, tps in self.seconds if begin + 1 <= moment <= end]
        return statistics.median(inside or [self.seconds[-1][1]])

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


class Tools:
    """A backup and a restore by each tool, into directories of their own."""

    def __init__(self, server: Server):
        self.server, self.directory = server, server.directory
        self.config = self.directory / "pgbackrest.conf"
        text = CONFIG.format(directory=self.directory, key=secrets.token_urlsafe(48))
        self.config.write_text(text)
        shutil.chown(self.config, "postgres", "postgres")
        self.config.chmod(0o600)
        self.engine = ["pgbackrest", f"--config={self.config}", "--stanza=bench"]

    def settings(self) -> dict[str, str]:
        return {
            "archive_mode": "on",
            "archive_command": " ".join([*self.engine, "archive-push %p"]),
        }

    def clear(self) -> None:
        for name in ("base", "dump", "restored"):
            shutil.rmtree(self.directory / name, ignore_errors=True)

    def back_up(self, tool: str) -> Path:
        run, base = self.server.run, self.directory / "base"
        if tool == "pgbackrest":
            run(*self.engine, "--type=full", "backup")
            return self.directory / "repository" / "backup" / "bench" / "latest"
        if tool == "pg_basebackup":
            run("pg_basebackup", "-D", str(base), "-X", "stream", "-c", "fast")
            return base
        dump = self.directory / "dump"
        run("pg_dump", "-Fc", "-f", str(dump / "dump"), "postgres")
        return dump

    def restore(self, tool: str) -> None:
        """Until a server with the restored data accepts a login."""
        run, target = self.server.run, self.directory / "restored"
        if tool == "pgbackrest":
            run(*self.engine, f"--pg1-path={target}", "--type=immediate", "restore")
        elif tool == "pg_basebackup":
            run("cp", "-a", str(self.directory / "base"), str(target))
        else:
            run("initdb", "-D", str(target), "-A", "trust", "--data-checksums")
        with self._started(target):
            if tool == "pg_dump":
                options = ["-h", str(target), "-p", "6000", "-d", "postgres", "--clean"]
                run("pg_restore", *options, "--if-exists", str(self.directory / "dump" / "dump"))

    @contextlib.contextmanager
    def _started(self, target: Path) -> Iterator[None]:
        own = f"-p 6000 -c unix_socket_directories={target} -c listen_addresses= "
        own += "-c archive_mode=off -c cluster_name=restored"
        log = str(self.directory / "restored.log")
        pg_ctl = ["pg_ctl", "-D", str(target), "-l", log, "-w", "-t", "900"]
        self.server.run(*pg_ctl, "-o", own, "start")
        try:
            yield
        finally:
            self.server.run(*pg_ctl, "-m", "immediate", "stop")


def timed(function: Callable, *arguments: str) -> tuple[float, float, Path]:
    begin = time.monotonic()
    answer = function(*arguments)
    return begin, time.monotonic(), answer


def size(path: Path) -> int:
    there = path.resolve()
    return sum(one.stat().st_size for one in there.rglob("*") if one.is_file())


def play(server: Server, tools: Tools, given: argparse.Namespace) -> dict:
    """Let the tools take turns; return every figure of every tool, round by round."""
    found: dict = {tool: {figure: [] for figure in FIGURES} for tool in TOOLS}
    workload = Workload(server, given.clients)
    try:
        for turn in range(given.rounds):
            for tool in random.Random(turn).sample(TOOLS, len(TOOLS)):
                row = one(tools, tool, workload)
                for figure, value in row.items():
                    found[tool][figure].append(value)
                print(turn + 1, tool, row, file=sys.stderr)
    finally:
        workload.end()
    return found


def one(tools: Tools, tool: str, workload: Workload) -> dict[str, float]:
    tools.clear()
    dump = tools.directory / "dump"
    dump.mkdir()
    shutil.chown(dump, "postgres", "postgres")
    begin = time.monotonic()
    time.sleep(QUIET)
    alone = workload.speed(begin, time.monotonic())
    began, ended, made = timed(tools.back_up, tool)
    kept = size(made)
    restoring, restored, _ = timed(tools.restore, tool)
    return {
        "backup_seconds": ended - began,
        "speed_left": workload.speed(began, ended) / alone,
        "restore_seconds": restored - restoring,
        "bytes": kept,
    }


def table(found: dict) -> str:
    rows = []
    for figure in FIGURES:
        cells = [f"{statistics.median(found[tool][figure]):.3g}" for tool in TOOLS]
        for other in TOOLS[1:]:
            pairs = zip(found["pgbackrest"][figure], found[other][figure], strict=True)
            cells.append(support.shown([ours / theirs for ours, theirs in pairs]))
        rows.append([figure, *cells])
    return support.table(["figure", *TOOLS, "to pg_basebackup", "to pg_dump"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--scale", type=int, default=100, help="pgbench's scale (15 MB each)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--directory", default="/var/tmp", help="where the scratch server is made")
    parser.add_argument("--binaries", type=Path, default=Path("/usr/lib/postgresql/15/bin"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    with (
        tempfile.TemporaryDirectory(prefix="slmdb-bench-", dir=given.directory) as directory,
        contextlib.ExitStack() as stack,
    ):
        Path(directory).chmod(0o755)
        server = Server(Path(directory), given.binaries, spans=100_000)
        stack.callback(server.kill)
        server.fill(given.scale)
        tools = Tools(server)
        server.start({**tools.settings(), "max_wal_size": "4GB"})
        server.run(*tools.engine, "stanza-create")
        print(table(play(server, tools, given)))
        server.stop()


if __name__ == "__main__":
    main()
