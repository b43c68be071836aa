"""
What the last apply was told, kept on the host for reports that come without a pillar.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time

__virtualname__ = "slmdb_record"

DIRECTORY = "/var/lib/autobot-slm-database"
INSTALLED = f"{DIRECTORY}/installed"


def __virtual__() -> str:
    return __virtualname__


def _text() -> bytes:
    settings = copy.deepcopy(__salt__["slmdb_pillar.settings"]())
    # These are for one run; a report that reads the record must not find them again.
    settings["maintenance"]["approve"] = settings["secret"]["allow_new"] = False
    settings["backup"]["allow_new"] = False
    return (json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n").encode()


def differences() -> dict:
    """
    Compare the record with the settings of this run.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_record.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if a file cannot be read.
    """
    path = __salt__["slmdb_pillar.record"]()
    changes = __salt__["slmdb_file.differences"](path, _text(), mode="0640")
    if __salt__["slmdb_file.read"](INSTALLED) is None:
        changes[INSTALLED] = {"old": None, "new": "present"}
    return changes


def apply() -> None:
    """
    Write the record; it holds no secret, since no pillar of ours does.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_record.apply

    Returns nothing. Raises ``CommandExecutionError`` if it cannot be written.
    """
    __salt__["slmdb_file.write"](__salt__["slmdb_pillar.record"](), _text(), mode="0640")
    if __salt__["slmdb_file.read"](INSTALLED) is None:
        __salt__["slmdb_file.write"](INSTALLED, f"{int(time.time())}\n".encode(), mode="0640")


def leftovers() -> dict:
    """
    Name what ``apply`` left on the host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_record.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty if there is nothing to undo. Raises
    ``CommandExecutionError`` if a file cannot be read.
    """
    return {path: {"old": "present", "new": "absent"} for path in _state_files()}


def remove() -> None:
    """
    Forget what the formula remembered of this host: settings, first install, last good files.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_record.remove

    Returns nothing. Raises ``CommandExecutionError`` if a file cannot be removed.
    """
    for path in _state_files():
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            __salt__["slmdb_file.remove"](path)


def _state_files() -> list[str]:
    """All that the formula remembers; the Salt of bin/apply and the dumps beside it stay."""
    dumps = __salt__["slmdb_pillar.get"]("backup", "dump", "path")
    try:
        names = sorted(os.listdir(DIRECTORY))
    except FileNotFoundError:
        return []
    paths = [f"{DIRECTORY}/{name}" for name in names if name != "salt"]
    return [path for path in paths if not f"{dumps}/".startswith(f"{path}/")]


def kept() -> list[str]:
    """
    Name what is on the host and goes only behind a key of ``slm_database:clean``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_record.kept

    Returns one line per thing with its key; empty if nothing is left. Raises
    ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    found = __salt__["slmdb_instance.facts"]()
    lines = []
    if found["exists"]:
        name = f"{found['version']}/{found['name']}"
        lines.append(f"kept: instance {name} with its data (slm_database:clean:data)")
    if __salt__["slmdb_server.available"]():
        roles = __salt__["slmdb_role.read"](list(__salt__["slmdb_role.wanted"]()))
        lines += [f"kept: role {role} (slm_database:clean:role)" for role in sorted(roles)]
    secret = __salt__["slmdb_pillar.get"]("secret", "file")
    if os.path.exists(secret):
        lines.append(f"kept: {secret} (slm_database:clean:secret)")
    if __salt__["slmdb_backup_dump.list"]():
        path = __salt__["slmdb_pillar.get"]("backup", "dump", "path")
        lines.append(f"kept: the dumps in {path} (no key: remove them by hand)")
    if found["version"] and os.path.exists(found["bin_directory"]):
        lines.append("kept: PostgreSQL's packages (slm_database:clean:packages)")
    return lines
