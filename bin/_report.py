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
    if isinstance(value, (int, float)) and key.endswith(("bytes", "size", "free")):
        return size(value)
    if isinstance(value, list):
        return ", ".join(plain(key, one) for one in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(name, one)}" for name, one in value.items()) or "none"
    return str(value)


def lines(health: dict[str, Any]) -> list[str]:
    """Return the report: the verdict, what is wrong, then one paragraph per subject."""
    found = [f"The database is {'healthy' if health.get('healthy') else 'NOT HEALTHY'}."]
    found += [f"  problem: {one}" for one in health.get("problems") or []]
    found += [f"  warning: {one}" for one in health.get("warnings") or []]
    for subject, details in health.items():
        if subject in ("healthy", "problems", "warnings"):
            continue
        if not isinstance(details, dict):
            found.append(f"{subject}: {plain(subject, details)}")
            continue
        width = max((len(str(key)) for key in details), default=0)
        found.append(f"{subject}:")
        for key, value in details.items():
            name = str(key).replace("_", " ")
            found.append(f"  {name:<{width}}  {plain(str(key), value)}")
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
