#!/usr/bin/env python3
"""
Measure what the formula costs, as ratios to what Salt costs anyway.

On a booted Debian host, with everything enabled, the commands take turns in every round, so that
what slows the machine down slows all of them; a ratio is taken within its round, and of the rounds
the median with its 95 % bootstrap interval. The tools are hyperfine, GNU time and strace. Run it
as root with the Python of bin/test's environment; it writes speed.json, speed.md and speed.svg:

    bench/speed.py --rounds 15 --sizes --first 5 --fleet --output docs/speed

Others are measured, each on a host of its own, where they are given: --peer-formula PATH (a
checkout of saltstack-formulas/postgres-formula), --playbook PATH (an Ansible playbook for
localhost; what lies beside it, roles for instance, goes with it).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import speed_fleet, speed_host, speed_peer, speed_size, support

# What is measured: the call, what it is compared with, and the goal.
CALLS: dict[str, tuple[tuple[str, ...], str | None, float | None]] = {
    "empty state run": (("state.apply", "empty"), None, None),
    "run, nothing to change": (("state.apply", "slm_database"), "empty state run", 1.3),
    "the same, test=True": (("state.apply", "slm_database", "test=True"), "empty state run", 1.3),
    "test.ping": (("test.ping",), None, None),
    "slmdb.health": (("slmdb.health",), "test.ping", 1.15),
}
PROCESSES = 6


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def take_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run every command once in every round, after a round that does not count."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, words in commands.items():
            seen = speed_host.timed(words)
            if turn:
                found[name].append(seen)
        say(f"round {turn} of {rounds}")
    return found


def others(given: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Measure a quiet run of each other that is given, on a host of its own."""
    found = {}
    for name, path in (
        ("postgres-formula", given.peer_formula),
        ("Ansible playbook", given.playbook),
    ):
        if path:
            say(name)
            with speed_host.Bench(given.release) as bench:
                commands = speed_peer.commands(bench, name, path.resolve())
                found[name] = take_turns(commands, given.rounds)
    return found


def ratios(found: dict[str, list[dict]], name: str, base: str, what: str) -> list[float]:
    pairs = zip(found[name], found[base], strict=True)
    return [mine[what] / floor[what] for mine, floor in pairs]


def runs(bench: speed_host.Bench, given: argparse.Namespace) -> dict[str, Any]:
    """Measure time, memory and processes of the calls."""
    commands = {name: bench.words(*call) for name, (call, _, _) in CALLS.items()}
    found: dict[str, Any] = {"times": take_turns(commands, given.rounds)}
    found["memory"] = {
        name: [speed_host.memory(words) for _ in range(3)] for name, words in commands.items()
    }
    found["processes"] = {name: speed_host.processes(words) for name, words in commands.items()}
    return found


def first(rounds: int, release: str) -> dict[str, list[float]]:
    """Measure a first apply on a bare host, and the same packages by apt with a server start."""
    found: dict[str, list[float]] = {"apply": [], "apt-get": []}
    for _ in range(rounds):
        for name, seconds in found.items():
            with speed_host.Bench(release) as bench:
                fetch = "apt-get -qq update; apt-get -qqy --download-only install"
                bench.host.run(f"{fetch} {speed_host.PACKAGES}", timeout=900)
                begun = time.monotonic()
                if name == "apply":
                    bench.apply()
                else:
                    install = f"apt-get -qqy install {speed_host.PACKAGES}"
                    bench.host.run(f"{install} && pg_lsclusters | grep -q online", timeout=900)
                seconds.append(time.monotonic() - begun)
                say(f"{name} on a bare host: {seconds[-1]:.1f} s")
    return found


def rows(found: dict[str, Any]) -> list[list[object]]:
    """Return the table: what, its ratio by the clock and by CPU, the goal."""
    times, made = found["times"], []
    for name, (_, base, goal) in CALLS.items():
        clock = support.shown([one["wall"] for one in times[name]])
        if base is None:
            made.append([name, clock, "1", "1", ""])
            continue
        cells = [support.shown(ratios(times, name, base, what)) for what in ("wall", "cpu")]
        made.append([name, clock, *cells, f"≤ {goal}"])
    for name, peer in found.get("peers", {}).items():
        clock = support.shown([one["wall"] for one in peer[name]])
        cells = [
            support.shown(ratios(peer, name, "empty state run", what)) for what in ("wall", "cpu")
        ]
        made.append([f"{name}, a host of its own", clock, *cells, ""])
    return made


def counts(found: dict[str, Any]) -> list[list[object]]:
    made = []
    for name, (_, base, _) in CALLS.items():
        memory = statistics.median(found["memory"][name])
        floor = statistics.median(found["memory"][base or name])
        programs = [Path(path).name for path in found["processes"][name]]
        ratio = f"{memory / floor:.2f}"
        made.append([name, f"{memory:.0f}", ratio, len(programs), ", ".join(programs)])
    return made


def too_many(found: dict[str, Any]) -> list[str]:
    """Return a line for each call that starts more processes than it may; counts are exact."""
    lines = []
    for name, (_, base, _) in CALLS.items():
        own = len(found["processes"][name]) - len(found["processes"][base or name])
        if own > PROCESSES or any("psql" in path for path in found["processes"][name]):
            lines.append(f"{name}: {own} processes more than {base}: {found['processes'][name]}")
    return lines


def markdown(found: dict[str, Any]) -> str:
    """Return everything that was measured as Markdown tables."""
    heads = ["", "seconds", "ratio by the clock", "ratio by CPU", "goal"]
    parts = [support.table(heads, rows(found))]
    heads = ["", "peak memory, MB", "ratio", "processes", "which"]
    parts.append(support.table(heads, counts(found)))
    if "first" in found:
        pairs = zip(found["first"]["apply"], found["first"]["apt-get"], strict=True)
        cells = [support.shown(found["first"][name], 1) for name in ("apply", "apt-get")]
        line = [*cells, support.shown([mine / apt for mine, apt in pairs]), "≤ 1.25"]
        heads = ["first apply, s", "apt-get install and start, s", "ratio", "goal"]
        parts.append(support.table(heads, [line]))
    for what, head in (("pillar", "databases, roles and rules in pillar"), ("tables", "tables")):
        if what in found:
            parts.append(_sizes(found[what], head))
    if "fleet" in found:
        parts.append(speed_fleet.markdown(found["fleet"]))
    return "\n\n".join(parts) + "\n"


def _sizes(found: dict[str, Any], head: str) -> str:
    """Return the table of one kind of size, by the clock and by CPU."""
    heads = [head, "quiet run, s", "its CPU, s"]
    if "run" not in next(iter(found.values())):
        return support.table(heads, [[number, *_both(made)] for number, made in found.items()])
    lines = [
        [number, *_both(made["run"]), *_both(made["health"])] for number, made in found.items()
    ]
    return support.table([*heads, "slmdb.health, s", "its CPU, s"], lines)


def _both(made: list[dict[str, float]]) -> list[str]:
    return [support.shown([one[what] for one in made]) for what in ("wall", "cpu")]


def plot(found: dict[str, Any]) -> str:
    """Return the ratios, and how they grow, as bars; a line is a goal."""
    bars = []
    for name, (_, base, goal) in CALLS.items():
        if base is not None:
            ratio = statistics.median(ratios(found["times"], name, base, "wall"))
            bars.append((f"{name} / {base}", ratio, goal))
    charts = [support.bars("What the formula costs (line: the goal)", bars, "x")]
    if "tables" in found:
        bars = [
            (f"{what}, {int(number):,} tables", _median(made[what]), None)
            for what in ("run", "health")
            for number, made in found["tables"].items()
        ]
        charts.append(support.bars("By tables", bars, "s"))
    if "pillar" in found:
        rows = found["pillar"].items()
        bars = [
            (f"run, {int(number):,} databases, roles, rules", _median(made), None)
            for number, made in rows
        ]
        charts.append(support.bars("By pillar", bars, "s"))
    if "fleet" in found:
        charts.append(support.bars("A fleet", speed_fleet.bars(found["fleet"]), "x"))
    return support.stacked(charts)


def _median(made: list[dict[str, float]]) -> float:
    return statistics.median(one["wall"] for one in made)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--release", default="bookworm", help="Debian's release of the host")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--first", type=int, default=0, help="rounds of first applies")
    parser.add_argument("--sizes", action="store_true", help="pillars and tables of three sizes")
    parser.add_argument("--fleet", action="store_true", help="a master with up to 20 minions")
    parser.add_argument("--check", action="store_true", help="fail if too many processes start")
    parser.add_argument("--peer-formula", type=Path, help="a checkout of postgres-formula")
    parser.add_argument("--playbook", type=Path, help="an Ansible playbook")
    parser.add_argument("--output", type=Path, default=Path("speed"), help="path without an ending")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with speed_host.Bench(given.release) as bench:
        bench.ready()
        found |= runs(bench, given)
        if given.sizes:
            say("sizes")
            found["tables"] = speed_size.tables(bench, [10, 10_000, 100_000], 7)
            found["pillar"] = speed_size.pillars(bench, [1, 100, 1_000], 5)
    if peers := others(given):
        found["peers"] = peers
    if given.first:
        found["first"] = first(given.first, given.release)
    if given.fleet:
        found["fleet"] = speed_fleet.measure([1, 5, 10, 20])
    return found


def main() -> None:
    given = arguments()
    found = measure(given)
    text = markdown(found)
    given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(text)
    given.output.with_suffix(".svg").write_text(plot(found))
    print(text)
    if given.check and (lines := too_many(found)):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
