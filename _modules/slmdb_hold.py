"""
PostgreSQL's packages stay as they are until somebody means to update them: all packages of the
server's major are held, and unattended-upgrades and needrestart are told to leave them alone.
"""

from __future__ import annotations

import re
import time

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_hold"

RECORD = "/var/lib/autobot-slm-database/packages.json"
HOLDS = "/var/lib/autobot-slm-database/holds.json"
UPGRADES = "/etc/apt/apt.conf.d/52autobot-slm-database"
RESTARTS = "/etc/needrestart/conf.d/autobot-slm-database.conf"
PATIENCE, PAUSE = 300, 2  # seconds; apt-mark does not wait for dpkg's lock, unlike apt-get
META = ("postgresql", "postgresql-client", "postgresql-contrib")
# dpkg's words for a lock that another holds, and apt-mark's for a dpkg that did not begin.
_LOCKED = re.compile(r"\block(ed)?\b|Executing dpkg failed")


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
    return __salt__["slmdb_file.remembered"](RECORD)


def _claimed() -> set[str]:
    """The packages that were not held before we held them; all, where nobody wrote down which."""
    kept = __salt__["slmdb_file.remembered"](HOLDS, list)
    return set(_recorded() or {} if kept is None else kept)


def _claim(names: list[str]) -> None:
    """Remember holds as ours, before they are: a kill in between must not make them another's."""
    ours = sorted(_claimed().union(names))
    if ours != __salt__["slmdb_file.remembered"](HOLDS, list):
        __salt__["slmdb_file.remember"](HOLDS, ours)


def _version_changes(found: dict[str, dict]) -> dict:
    """What changed since the last run: somebody installed it, for maintenance records its own."""
    kept, changes = _recorded(), {}
    if kept is None:
        return {RECORD: {"old": None, "new": "present"}}
    for name, old in sorted(kept.items()):  # one that is new may be of this very run
        new = found.get(name, {}).get("version")
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

    What is held by this is remembered as ours. While another program works with dpkg it is waited
    for, up to five minutes. Returns nothing. Raises ``CommandExecutionError`` if apt refuses.
    """
    if not names:
        return
    if verb == "hold":
        _claim(names)
    deadline = time.monotonic() + PATIENCE
    words = _mark(verb, names)
    while _LOCKED.search(words) and time.monotonic() < deadline:
        time.sleep(PAUSE)
        words = _mark(verb, names)
    if _LOCKED.search(words):
        words = f"dpkg was busy for {PATIENCE} s: {words}"
    if words:
        raise CommandExecutionError(f"apt-mark {verb} {' '.join(names)}: {words}")


def _mark(verb: str, names: list[str]) -> str:
    """Return why it failed, nothing if it did not."""
    answer = __salt__["cmd.run_all"](
        ["apt-mark", verb, *names],
        python_shell=False,
        ignore_retcode=True,
        env={"LC_ALL": "C.UTF-8"},
    )
    said = answer["stderr"] or answer["stdout"]
    return __salt__["slmdb_update.why"](said) if answer["retcode"] else ""


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
        __salt__["slmdb_file.remember"](RECORD, versions)


def _held_by_us() -> list[str]:
    ours = _claimed()
    return sorted(name for name, row in installed().items() if row["held"] and name in ours)


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
    for path in (UPGRADES, RESTARTS, RECORD, HOLDS):
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
    for path in (UPGRADES, RESTARTS, RECORD, HOLDS):
        __salt__["slmdb_file.remove"](path)
