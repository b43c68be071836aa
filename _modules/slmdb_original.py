"""
What a host had before the formula wrote its configuration and access rules, kept to go back to.
"""

from __future__ import annotations

import os
from typing import Any

from salt.exceptions import SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_original"

DIRECTORY = "/var/lib/autobot-slm-database/original"
OURS = b"# Written by Salt (slm_database)"
PARTS = ("config", "access")


def __virtual__() -> str:
    return __virtualname__


def keep(path: str) -> None:
    """
    Keep a copy of a file that is not ours, once, before it is written for the first time.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_original.keep /etc/postgresql/15/main/pg_hba.conf

    path
        The file; nothing is done if there is none, it is ours, or there is a copy already.
    """
    data = __salt__["slmdb_file.read"](path)
    copy = f"{DIRECTORY}/{os.path.basename(path)}"
    if data is not None and not data.startswith(OURS) and not os.path.exists(copy):
        __salt__["slmdb_file.write"](copy, data, "root", "root", "0600")


def _targets(part: str) -> dict[str, bytes | None]:
    """Return the files of a part and what they should hold without the formula."""
    if part not in PARTS:
        raise SaltInvocationError(f"part: {part} is given; allowed: {', '.join(PARTS)}")
    found = __salt__["slmdb_instance.facts"]()
    if part == "config":
        return {found["conf_file"]: None}
    read = __salt__["slmdb_file.read"]
    paths = (found["hba_file"], found["ident_file"])
    copies = {path: read(f"{DIRECTORY}/{os.path.basename(path)}") for path in paths}
    return {path: data for path, data in copies.items() if data is not None}


def differences(part: str) -> dict[str, dict[str, Any]]:
    """
    Compare the files of a part with what they were before the formula.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_original.differences access

    part
        config (our file, which was not there) or access (the rules and the user maps).

    Returns file to ``old`` and ``new``; empty if nothing differs, nothing was kept, or somebody
    else wrote the file since.
    """
    changes = {}
    for path, data in _targets(part).items():
        present = __salt__["slmdb_file.read"](path)
        if present is not None and present != data and present.startswith(OURS):
            new = "absent" if data is None else "as before the formula"
            changes[path] = {"old": "the formula's", "new": new}
    return changes


def apply(part: str) -> None:
    """
    Bring back the files of a part as they were before the formula, and let the server read them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_original.apply access

    part
        config or access. What a setting needs a restart for stays in force until there is one.
    """
    user = __salt__["slmdb_instance.facts"]()["user"]
    targets = _targets(part)
    for path in differences(part):
        data = targets[path]
        if data is None:
            __salt__["slmdb_file.remove"](path)
        else:
            __salt__["slmdb_file.write"](path, data, user, user, "0640")
    if __salt__["slmdb_server.available"]():
        __salt__["slmdb_service.reload"]()
