"""
What the backend's unit needs from the database: its secrets, its place in the order, its look-ups.
"""

from __future__ import annotations

import contextlib
import os

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backend"

# Wants, never Requires or BindsTo: a stop, a start or a crash of the database must not take the
# backend down for good. ProtectHome=true blocks asyncpg's look-up of certificates below /home.
TEXT = """\
[Unit]
After={database}.service
Wants={database}.service

[Service]
ProtectHome={protect_home}
EnvironmentFile={secret_file}
"""


def __virtual__() -> str:
    return __virtualname__


def _drop_in() -> tuple[str, bytes]:
    get = __salt__["slmdb_pillar.get"]
    unit = get("backend", "unit")
    text = TEXT.format(
        database=__salt__["slmdb_instance.facts"]()["unit"],
        protect_home=get("backend", "protect_home"),
        secret_file=get("secret", "file"),
    )
    return f"/etc/systemd/system/{unit}.service.d/50-autobot-slm-database.conf", text.encode()


def differences() -> dict:
    """
    Compare the host with "the backend's unit has our drop-in".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backend.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs or systemd does not run
    this host. Raises ``CommandExecutionError`` if the file cannot be read.
    """
    if not __salt__["slmdb_instance.systemd"]():
        return {}
    return __salt__["slmdb_file.differences"](*_drop_in())


def apply() -> None:
    """
    Write the drop-in; the backend is not restarted, its next start reads it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backend.apply

    Returns nothing. Raises ``CommandExecutionError`` if it cannot be written.
    """
    if __salt__["slmdb_instance.systemd"]():
        __salt__["slmdb_file.write"](*_drop_in())
        __salt__["slmdb_unit.reload_units"]()


def leftovers() -> dict:
    """
    Name what ``apply`` left on the host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backend.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty if there is nothing to undo. Raises
    ``CommandExecutionError`` if the file cannot be read.
    """
    path, _ = _drop_in()
    return __salt__["slmdb_file.differences"](path, None)


def remove() -> None:
    """
    Remove the drop-in.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backend.remove

    Returns nothing. Raises ``CommandExecutionError`` if it cannot be removed.
    """
    path, _ = _drop_in()
    __salt__["slmdb_file.remove"](path)
    with contextlib.suppress(OSError):  # somebody else's files are in it, or it is not there
        os.rmdir(os.path.dirname(path))
    if __salt__["slmdb_instance.systemd"]():
        __salt__["slmdb_unit.reload_units"]()
