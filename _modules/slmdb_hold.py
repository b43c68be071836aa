"""
PostgreSQL's packages stay as they are until somebody means to update them: all packages of the
server's major are held, and unattended-upgrades and needrestart are told to leave them alone.
"""

from __future__ import annotations

import json
import re

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_hold"

RECORD = "/var/lib/autobot-slm-database/packages.json"
UPGRADES = "/etc/apt/apt.conf.d/52autobot-slm-database"
RESTARTS = "/etc/needrestart/conf.d/autobot-slm-database.conf"
META = ("postgresql", "postgresql-client", "postgresql-contrib")


def __virtual__() -> str:
    return __virtualname__


def _ours() -> str:
    """Matches every package of the server's major: server, client, extensions, languages."""
    return rf"^postgresql(-[a-z0-9+.]+)*-{__salt__['slmdb_instance.version']()}(-.+)?$"


def installed() -> dict[str, dict]:
    """
    Return the installed packages of the server's major, and the meta-packages that lead to one.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hold.installed

    Returns package to ``version``, ``held`` and ``half_done`` (the state in which an interruption
    left it, or ``None``). Raises ``CommandExecutionError`` if the major cannot be told.
    """
    pattern = re.compile(_ours())
    return {
        name: {what: row[what] for what in ("version", "held", "half_done")}
        for name, row in __salt__["slmdb_package.known"]("postgresql[^\n]*").items()
        if (row["installed"] or row["half_done"]) and (name in META or pattern.match(name))
    }


def _files() -> dict[str, bytes]:
    """The drop-ins, by path."""
    upgrades = (
        "// The maintenance of the AutoBot SLM's database updates these, in its own time.\n"
        f'Unattended-Upgrade::Package-Blacklist:: "{_ours()}";\n'
        f'Unattended-Upgrade::Package-Blacklist:: "^({"|".join(META)})$";\n'
    )
    unit = __salt__["slmdb_instance.facts"]()["unit"]
    restarts = (
        "# The maintenance of the AutoBot SLM's database restarts the server, in its own time.\n"
        f"$nrconf{{override_rc}}{{qr(^{unit})}} = 0;\n"
        "$nrconf{override_rc}{qr(^postgresql)} = 0;\n"
    )
    return {UPGRADES: upgrades.encode(), RESTARTS: restarts.encode()}


def _recorded() -> dict[str, str] | None:
    try:
        kept = json.loads(__salt__["slmdb_file.read"](RECORD) or b"null")
    except ValueError:
        return None
    return kept if isinstance(kept, dict) else None


def _version_changes(found: dict[str, dict]) -> dict:
    """What changed since the last run: somebody installed it, for maintenance records its own."""
    kept, changes = _recorded(), {}
    if kept is None:
        return {RECORD: {"old": None, "new": "present"}}
    for name in sorted({*found, *kept}):
        old, new = kept.get(name), found.get(name, {}).get("version")
        if old != new:
            changes[name] = {"old": old, "new": f"{new}, by somebody's hand" if new else None}
    return changes


def differences() -> dict:
    """
    Compare the host with "the packages are held and left alone".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hold.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs; a version that somebody
    installed since the last run is one of them. Raises ``CommandExecutionError`` if the major
    cannot be told.
    """
    found = installed()
    pattern = re.compile(_ours())
    coming = [
        name for name in __salt__["slmdb_package.names"]() if name in META or pattern.match(name)
    ]
    changes = {
        f"{name}: hold": {"old": None, "new": "held"}
        for name in sorted({*found, *coming})
        if not found.get(name, {}).get("held")
    }
    changes.update(_version_changes(found))
    for path, text in _files().items():
        changes.update(__salt__["slmdb_file.differences"](path, text))
    return changes


def mark(verb: str, names: list[str]) -> None:
    """
    Hold packages, or let them go.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hold.mark hold '[postgresql-15]'

    verb
        ``hold`` or ``unhold``.
    names
        The packages; none: nothing happens.

    Returns nothing. Raises ``CommandExecutionError`` if apt refuses.
    """
    if not names:
        return
    answer = __salt__["cmd.run_all"](["apt-mark", verb, *names], python_shell=False)
    if answer["retcode"]:
        lines = (answer["stderr"] or answer["stdout"]).strip().splitlines() or ["no output"]
        raise CommandExecutionError(f"apt-mark {verb}: {lines[-1]}")


def apply() -> None:
    """
    Hold the packages, write the drop-ins, and record the versions.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hold.apply

    Returns nothing. Raises ``CommandExecutionError`` if apt or a file refuses.
    """
    found = installed()
    mark("hold", sorted(name for name in found if not found[name]["held"]))
    for path, text in _files().items():
        if __salt__["slmdb_file.differences"](path, text):
            __salt__["slmdb_file.write"](path, text)
    record()


def record() -> None:
    """
    Remember the installed versions as known.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hold.record

    Returns nothing. Raises ``CommandExecutionError`` if the file cannot be written.
    """
    versions = {name: row["version"] for name, row in installed().items()}
    if versions != _recorded():
        text = json.dumps(versions, indent=1, sort_keys=True) + "\n"
        __salt__["slmdb_file.write"](RECORD, text.encode())


def _held_by_us() -> list[str]:
    kept = _recorded() or {}
    return sorted(name for name, row in installed().items() if row["held"] and name in kept)


def leftovers() -> dict:
    """
    Name what ``apply`` left on the host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hold.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty if there is nothing to undo. Raises
    ``CommandExecutionError`` if the major cannot be told.
    """
    changes = {f"{name}: hold": {"old": "held", "new": None} for name in _held_by_us()}
    for path in (UPGRADES, RESTARTS, RECORD):
        changes.update(__salt__["slmdb_file.differences"](path, None))
    return changes


def remove() -> None:
    """
    Let apt, unattended-upgrades and needrestart treat the packages as any other.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hold.remove

    Returns nothing. Raises ``CommandExecutionError`` if apt or a file refuses.
    """
    mark("unhold", _held_by_us())
    for path in (UPGRADES, RESTARTS, RECORD):
        __salt__["slmdb_file.remove"](path)
