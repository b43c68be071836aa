"""
The systemd unit that is the server, and what keeps Debian's own units off the instance.
"""

from __future__ import annotations

import os

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_unit"

SYSTEM = "/etc/systemd/system"

# Type=notify and ExecReload follow PostgreSQL's own documentation ("Starting the Database Server");
# a minimal Debian has no /bin/kill, but every shell has its own.
# TimeoutSec is infinity because crash recovery may take long. PartOf and ReloadPropagatedFrom let
# `systemctl restart postgresql`, Debian's stub, reach the server.
TEXT = """\
[Unit]
Description=PostgreSQL of the AutoBot SLM (instance {version}/{name})
Documentation=man:postgres(1)
After=network.target
{online}Before=postgresql.service autobot-slm-backend.service
PartOf=postgresql.service
ReloadPropagatedFrom=postgresql.service
RequiresMountsFor={config_directory} {data_directory}
StartLimitIntervalSec=0

[Service]
Type=notify
User=postgres
Group=postgres
Environment=PG_OOM_ADJUST_FILE=/proc/self/oom_score_adj PG_OOM_ADJUST_VALUE=0
ExecStart={bin_directory}/postgres -D {data_directory} -c config_file={config_file}
ExecReload=/bin/sh -c 'kill -HUP $$MAINPID'
KillMode=mixed
KillSignal=SIGINT
OOMScoreAdjust=-900
Restart=on-failure
RestartSec=1
TimeoutSec=infinity
SyslogIdentifier={unit}

[Install]
WantedBy=multi-user.target postgresql.service
"""
# From the same documentation: an address that the host does not have yet cannot be bound.
ONLINE = "After=network-online.target\nWants=network-online.target\n"


def __virtual__() -> str:
    return __virtualname__


def _paths(found: dict) -> dict[str, str]:
    return {
        "unit": f"{SYSTEM}/{found['unit']}.service",
        "mask": f"{SYSTEM}/postgresql@{found['version']}-{found['name']}.service",
        "start": f"{found['config_directory']}/start.conf",
    }


def _text(found: dict) -> bytes:
    backend = __salt__["slmdb_pillar.get"]("backend", "unit")
    online = ONLINE if __salt__["slmdb_instance.needs_network"]() else ""
    text = TEXT.format(**found, online=online)
    return text.replace("autobot-slm-backend.service", f"{backend}.service").encode()


def _start_conf(path: str) -> str | None:
    data = __salt__["slmdb_file.read"](path)
    if data is None:
        return None
    words = [line.split("#")[0].strip() for line in data.decode(errors="replace").splitlines()]
    return next((word for word in words if word), "auto")


def differences() -> dict:
    """
    Compare the host with "our unit is the one that starts the instance".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_unit.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs or systemd does not run
    this host. Raises ``CommandExecutionError`` if a file cannot be read.
    """
    found = __salt__["slmdb_instance.facts"]()
    if not found["systemd"]:
        return {}
    paths = _paths(found)
    changes = __salt__["slmdb_file.differences"](paths["unit"], _text(found))
    if os.path.realpath(paths["mask"]) != os.devnull:
        changes[os.path.basename(paths["mask"])] = {"old": "not masked", "new": "masked"}
    if _start_conf(paths["start"]) != "manual":
        changes[paths["start"]] = {"old": _start_conf(paths["start"]), "new": "manual"}
    return changes


def apply() -> None:
    """
    Write our unit, mask Debian's unit of the instance, and set its ``start.conf`` to ``manual``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_unit.apply

    Returns nothing. Raises ``CommandExecutionError`` if a file cannot be written or systemd does
    not read it.
    """
    found = __salt__["slmdb_instance.facts"]()
    if not found["systemd"]:
        return
    paths = _paths(found)
    changes = differences()
    if paths["unit"] in changes or any(key.startswith(paths["unit"]) for key in changes):
        __salt__["slmdb_file.write"](paths["unit"], _text(found))
    if paths["start"] in changes:
        __salt__["slmdb_file.write"](
            paths["start"], b"manual\n", user=found["user"], group=found["user"]
        )
    if not os.path.islink(paths["mask"]):
        if os.path.exists(paths["mask"]):
            raise CommandExecutionError(
                f"{paths['mask']} is a unit somebody else wrote; remove it, or move it away"
            )
        os.symlink(os.devnull, paths["mask"])
    reload_units()


def reload_units() -> None:
    """
    Let systemd read its units again.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_unit.reload_units

    Returns nothing. Raises ``CommandExecutionError`` if systemd refuses.
    """
    __salt__["slmdb_program.run"]("systemctl", "daemon-reload")


def leftovers() -> dict:
    """
    Name what ``apply`` left on the host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_unit.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty if there is nothing to undo. Raises
    ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    found = __salt__["slmdb_instance.facts"]()
    paths = _paths(found)
    changes = {}
    if os.path.exists(paths["unit"]):
        changes[paths["unit"]] = {"old": "present", "new": "absent"}
    if os.path.islink(paths["mask"]):
        changes[os.path.basename(paths["mask"])] = {"old": "masked", "new": "not masked"}
    if found["exists"] and _start_conf(paths["start"]) == "manual":
        changes[paths["start"]] = {"old": "manual", "new": "auto"}
    return changes


def remove() -> None:
    """
    Give the instance back to Debian's own unit, which starts it if ours had it running.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_unit.remove

    Returns nothing. Raises ``CommandExecutionError`` if a file cannot be changed.
    """
    found = __salt__["slmdb_instance.facts"]()
    paths = _paths(found)
    changes = leftovers()
    if paths["unit"] in changes:
        __salt__["slmdb_server.forget"]()
        command = ["systemctl", "disable", "--now", found["unit"]]
        __salt__["cmd.run_all"](command, python_shell=False)
        __salt__["slmdb_file.remove"](paths["unit"])
    if os.path.islink(paths["mask"]):
        __salt__["slmdb_file.remove"](paths["mask"])
    if paths["start"] in changes:
        __salt__["slmdb_file.write"](
            paths["start"], b"auto\n", user=found["user"], group=found["user"]
        )
    if changes and found["systemd"]:
        reload_units()
    if found["systemd"] and found["exists"] and found["running"]:
        command = ["systemctl", "start", f"postgresql@{found['version']}-{found['name']}"]
        __salt__["cmd.run_all"](command, python_shell=False)
