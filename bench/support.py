"""What the measurements share: intervals, tables, a plot. Nothing but the standard library."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Sequence
from html import escape


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval; always the same for the same values."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(5000))
    return statistics.median(values), medians[125], medians[4874]


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Return "median (low to high)"."""
    middle, low, high = interval(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def bars(title: str, rows: Sequence[tuple[str, float, float | None]], unit: str) -> str:
    """Return an SVG of horizontal bars: label, value, and the goal (a line) or None."""
    height, wide, left = 26, 420, 270
    most = max(max(value, goal or 0) for _, value, goal in rows) * 1.1
    parts = [f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>']
    for number, (label, value, goal) in enumerate(rows):
        y = 32 + number * height
        met = goal is None or value <= goal
        width = wide * value / most
        parts.append(f'<text x="8" y="{y + 14}">{escape(label)}</text>')
        colour = "#4878a8" if met else "#c0504d"
        parts.append(
            f'<rect x="{left}" y="{y}" width="{width:.0f}" height="18" fill="{colour}"/>'
            f'<text x="{left + width + 6:.0f}" y="{y + 14}">{value:.2f} {escape(unit)}</text>'
        )
        if goal is not None:
            x = left + wide * goal / most
            line = f'x1="{x:.0f}" x2="{x:.0f}" y1="{y - 3}" y2="{y + 21}"'
            parts.append(f'<line {line} stroke="#222" stroke-width="2"/>')
    size = f'width="{left + wide + 110}" height="{44 + len(rows) * height}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"'
    return f'{start} font-size="13">\n' + "\n".join(parts) + "\n</svg>\n"


def stacked(charts: Sequence[str]) -> str:
    """Return one SVG with several below each other."""
    sizes = [[int(size) for size in re.findall(r'(?:width|height)="(\d+)"', c)[:2]] for c in charts]
    parts, top = [], 0
    for chart, (_, height) in zip(charts, sizes, strict=True):
        parts.append(chart.replace("<svg ", f'<svg y="{top}" ', 1))
        top += height + 8
    wide = max(width for width, _ in sizes)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{top}">'
    return start + "\n" + "".join(parts) + "</svg>\n"
