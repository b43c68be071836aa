"""One master and N minions on this machine: what slmdb.health costs a fleet, by test.ping."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench import support
from tests.support import world as worlds
from tests.support.salt_daemons import Master, Minion, copy_formula

ROUNDS = 5
CALLS = {"test.ping": ("test.ping",), "slmdb.health": ("slmdb.health", "timeout=30")}
PAPER = (1_000, 10_000)


def _site(most: int) -> tuple[Master, list[Minion]]:
    """Start a master and one minion, and make the database that all of them share."""
    worlds.enter()
    worlds.fresh()
    base = Path("/srv/fleet")
    base.mkdir()
    pillar: dict[str, Any] = {"slm_database": {"health": {"timeout": 30}}}
    master = Master(base / "master", copy_formula(base / "formula"), pillar)
    minions = [Minion(base / "minion0", "m0.19")]
    minions[0].wait()
    answer = master.salt("m0.19", "state.apply", "slm_database").states("m0.19")
    failed = [one["__id__"] for one in answer if one["result"] is False]
    if failed:
        raise SystemExit(f"the formula was not applied: {failed}")
    return master, minions


def _ask(master: Master, number: int, call: tuple[str, ...]) -> tuple[float, int]:
    """Ask the whole fleet; return seconds, and bytes of one minion's answer."""
    begun = time.monotonic()
    answer = master.salt("-t", "120", "*.19", "--static", *call)
    seconds = time.monotonic() - begun
    given = json.loads(answer.stdout)
    if len(given) != number:
        raise SystemExit(f"{len(given)} of {number} minions answered")
    return seconds, len(json.dumps(given["m0.19"]))


def measure(sizes: list[int]) -> dict[str, dict[str, Any]]:
    """Measure both calls for each size of the fleet, by turns."""
    master, minions = _site(max(sizes))
    found: dict[str, dict[str, Any]] = {}
    for number in sizes:
        more = range(len(minions), number)
        started = [Minion(Path(f"/srv/fleet/minion{at}"), f"m{at}.19") for at in more]
        for minion in started:
            minion.wait()
        minions += started
        master.salt("*.19", "saltutil.sync_all")
        made: dict[str, Any] = {name: [] for name in CALLS}
        for turn in range(ROUNDS + 1):
            for name, call in CALLS.items():
                seconds, size = _ask(master, number, call)
                made[f"{name}, bytes"] = size
                if turn:
                    made[name].append(seconds)
        found[str(number)] = made
        print(f"fleet of {number}: done", file=sys.stderr, flush=True)
    return found


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of the fleet, and what its answers come to for larger ones."""
    lines = []
    for number, made in found.items():
        cells = [support.shown(made[name]) for name in CALLS]
        lines.append([number, *cells, support.shown(_ratios(made))])
    heads = ["minions", "test.ping, s", "slmdb.health, s", "ratio (goal ≤ 1.2)"]
    last = next(reversed(found.values()))
    size = last["slmdb.health, bytes"]
    # A job is one publication to all, and an answer of each; the answers are what grows.
    paper = [f"{number:,} minions: {number * size / 1e6:.1f} MB" for number in PAPER]
    slope = _slope({int(number): made for number, made in found.items()})
    words = (
        f"One answer has {size:,} bytes (test.ping: {last['test.ping, bytes']}); a call is one "
        f"message to all and one answer from each. {'; '.join(paper)} of answers. "
        f"Each further minion costs {1000 * slope['slmdb.health']:.0f} ms here, where all share "
        f"the master's two cores (test.ping: {1000 * slope['test.ping']:.0f} ms)."
    )
    return support.table(heads, lines) + "\n\n" + words


def bars(found: dict[str, dict[str, Any]]) -> list[tuple[str, float, float | None]]:
    """Return the ratio of each size of the fleet, and the goal."""
    return [
        (f"slmdb.health / test.ping, {number} minions", statistics.median(_ratios(made)), 1.2)
        for number, made in found.items()
    ]


def _ratios(made: dict[str, Any]) -> list[float]:
    pairs = zip(made["slmdb.health"], made["test.ping"], strict=True)
    return [mine / ping for mine, ping in pairs]


def _slope(found: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Return seconds per minion, between the smallest and the largest fleet."""
    low, high = min(found), max(found)
    return {
        name: (statistics.median(found[high][name]) - statistics.median(found[low][name]))
        / max(high - low, 1)
        for name in CALLS
    }
