"""
What long work tells while it goes on: a line in the log, and an event where there is a master.
"""

from __future__ import annotations

import logging
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_event"

log = logging.getLogger(__name__)


def __virtual__() -> str:
    return __virtualname__


def tell(noun: str, step: str, state: str, said: str = "") -> None:
    """
    Say where a piece of work is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_event.tell drill restore begun

    noun, step
        What works, and at what.
    state
        ``begun``, ``done`` or ``failed``.
    said
        One line more.

    Returns nothing, raises nothing.
    """
    # Whoever waits wants to see it, so it has a level that is shown by default.
    log.warning("slmdb %s: %s: %s%s", noun, step, state, f": {said}" if said else "")
    data = {"step": step, "state": state, "comment": said}
    send(f"{noun}/{step.replace(' ', '_')}/{state}", data)


def send(tag: str, data: dict[str, Any]) -> None:
    """
    Send an event, where there is a master.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_event.send backup/progress '{"percent": 40}'

    tag
        Its tag, without the ``slmdb/`` before it.
    data
        What it tells.

    Returns nothing, raises nothing.
    """
    if __opts__.get("file_client") != "local" or __opts__.get("use_master_when_local"):
        __salt__["event.send"](f"slmdb/{tag}", data)
