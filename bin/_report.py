"""Print the JSON of slmdb.health, read from standard input, as a person would want to read it."""

from __future__ import annotations

import json
import sys
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(number: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in UNITS:
        if abs(number) < 1024 or unit == UNITS[-1]:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("the last unit takes every number")


def plain(key: str, value: Any) -> str:
    """Return one value as words: yes and no, sizes with a unit, lists with commas."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and key.endswith("bytes"):
        return size(value)
    if isinstance(value, list):
        return ", ".join(plain(key, one) for one in value) or "none"
    if isinstance(value, dict):
        told = (f"{label(name)} {plain(name, one)}" for name, one in value.items())
        return ", ".join(told) or "none"
    return str(value)


def label(key: str) -> str:
    """Return a key as words; a unit that its value shows is left out."""
    return key.removesuffix("_bytes").replace("_", " ")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line per login of the matrix: what should happen and what would."""
    width = max(len(row["login"]) for row in rows)
    return [
        f"    {row['login']:<{width}}  {row['judged']}"
        + ("" if row["right"] else f"  WRONG, expected: {row['expected']}")
        for row in rows
    ]


def paragraph(details: dict[str, Any]) -> list[str]:
    """Return one subject, a line for each key that says something."""
    shown = {key: value for key, value in details.items() if value not in (None, [], {})}
    width = max((len(label(key)) for key in shown), default=0)
    found = []
    for key, value in shown.items():
        if key == "matrix":
            found += [f"  {label(key)}", *table(value)]
        else:
            found.append(f"  {label(key):<{width}}  {plain(key, value)}")
    return found


def lines(health: dict[str, Any]) -> list[str]:
    """Return the report: the verdict, what is wrong, then one paragraph per subject."""
    found = [f"The database is {'healthy' if health.get('healthy') else 'NOT HEALTHY'}."]
    found += [f"  problem: {one}" for one in health.get("problems") or []]
    found += [f"  warning: {one}" for one in health.get("warnings") or []]
    for subject, details in health.items():
        if subject in ("healthy", "problems", "warnings"):
            continue
        if isinstance(details, dict):
            found += [f"{subject}:", *paragraph(details)]
        elif details:
            found.append(f"{subject}: {plain(subject, details)}")
    return found


def main() -> int:
    """Print the report; return 1 if what came in is none."""
    text = sys.stdin.read()
    try:
        health = json.loads(text)["local"]
        report = lines(health)
    except (ValueError, KeyError, AttributeError, TypeError):
        print("The health could not be read. slmdb.health said:")
        print(text.strip() or "nothing")
        return 1
    print("\n".join(report))
    return 0 if health.get("healthy") is True else 1


if __name__ == "__main__":
    sys.exit(main())
