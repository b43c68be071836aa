"""Waits for a fact: however slow the machine is, a test goes on when it is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], patience: float = 180) -> Any:
    """Ask again and again until the answer is true; return it."""
    deadline = time.monotonic() + patience
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {patience} s"
        time.sleep(0.05)
    return answer
