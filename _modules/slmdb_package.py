"""
PostgreSQL's packages, and the driver that Salt's own Python needs to talk to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_package"

# What dpkg knows, and its journal: what is there is not in the other yet.
STATUS = "/var/lib/dpkg/status"
UPDATES = "/var/lib/dpkg/updates"
FRESH = 3600  # seconds for which apt's lists are as good as new
PART = 16 * 1024
VERSION, PYTHON = "slm_database:version", "Salt in the distribution's Python"
HALF_DONE = re.compile("half-installed|unpacked|half-configured|triggers-(awaited|pending)")
FORMAT = "Package: ${Package}\nStatus: ${Status}\nVersion: ${Version}\n\n"


def __virtual__() -> str:
    return __virtualname__


def names() -> list[str]:
    """
    Return the packages that the instance needs.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_package.names

    Returns package names: server, client, contrib, and those of ``slm_database:packages``. Raises
    ``CommandExecutionError`` if the major cannot be told.
    """
    return list(_wanted())


def _wanted() -> dict[str, str]:
    """The packages, and what wants each: a key of pillar, but for Salt's own."""
    get = __salt__["slmdb_pillar.get"]
    major = __salt__["slmdb_instance.version"]()
    wanted = dict.fromkeys([f"postgresql-{major}", f"postgresql-client-{major}"], VERSION)
    # PGDG's contrib package is a meta-package: it would bring the newest major's server along.
    if get("distribution", "contrib") and get("repository") == "distribution":
        wanted[get("distribution", "contrib")] = VERSION
    if _system_python():
        wanted.update(dict.fromkeys(["python3-psycopg2", "python3-dateutil"], PYTHON))
    if get("backup", "enabled"):
        wanted["pgbackrest"] = "slm_database:backup:enabled"
        if get("backup", "copy", "recipients"):
            wanted["age"] = "slm_database:backup:copy:recipients"
        if get("backup", "second", "type") == "host":
            wanted["openssh-client"] = "slm_database:backup:second:type"
    for name in get("packages"):
        wanted.setdefault(name, "slm_database:packages")
    return wanted


def _system_python() -> bool:
    """Whether Salt runs on the distribution's own Python, which pip may not touch (PEP 668)."""
    return sys.prefix == sys.base_prefix and os.path.dirname(sys.executable) == "/usr/bin"


def _driver_missing() -> bool:
    importlib.invalidate_caches()
    return not _system_python() and importlib.util.find_spec("psycopg2") is None


def known(pattern: str) -> dict[str, dict[str, Any]]:
    """
    Return what dpkg's own record says of the packages whose names match, without a process.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_package.known 'postgresql.*'

    pattern
        A regular expression that a whole name matches.

    Returns name to ``version``, ``held``, ``installed`` and ``half_done`` (what dpkg calls the
    state in which an interruption left it, or ``None``). Raises ``CommandExecutionError`` if the
    record cannot be read.
    """
    stanza = re.compile(rf"^Package: ({pattern})\n((?:.+\n)*)", re.MULTILINE)
    found: dict[str, dict[str, Any]] = {}
    for name, rest in (pair for text in _record() for pair in stanza.findall(text)):
        fields = dict(re.findall(r"^(Status|Version): (.*)$", rest, re.MULTILINE))
        want, _, state = fields.get("Status", "unknown ok not-installed").split()
        row = {"version": fields.get("Version", ""), "held": want == "hold"}
        row["installed"] = state == "installed"
        row["half_done"] = state if HALF_DONE.fullmatch(state) else None
        # A package may be there for several architectures.
        if row["installed"] or name not in found:
            found[name] = row
    return found


def _record() -> Iterator[str]:
    """The record in parts of whole packages: of a big host it has megabytes."""
    if os.path.isdir(UPDATES) and os.listdir(UPDATES):
        answer = __salt__["cmd.run_all"](["dpkg-query", "-W", "-f", FORMAT], python_shell=False)
        yield answer["stdout"] + "\n"
        return
    try:
        with open(STATUS, encoding="utf-8", errors="replace") as stream:
            rest = ""
            while block := stream.read(PART):
                whole, _, rest = (rest + block).rpartition("\n\n")
                yield whole + "\n"
            yield rest
    except OSError as err:
        raise CommandExecutionError(f"{STATUS}: cannot be read: {err.strerror}") from err


def _missing() -> list[str]:
    wanted = names()
    found = known("|".join(re.escape(name) for name in wanted))
    absent = [name for name in wanted if not found.get(name, {}).get("installed")]
    # One that dpkg has no record of may be provided by another.
    provided = __salt__["pkg.list_pkgs"]() if absent else {}
    return [name for name in absent if name not in provided]


def differences() -> dict:
    """
    Compare the host with "the packages are installed".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_package.differences

    Returns ``{package: {"old": None, "new": "installed"}}``, empty if none is missing. Raises
    ``CommandExecutionError`` if the major cannot be told.
    """
    changes = {name: {"old": None, "new": "installed"} for name in _missing()}
    if _driver_missing():
        changes["psycopg2 in Salt's Python"] = {"old": None, "new": "installed"}
    return changes


def _unavailable(missing: list[str]) -> list[str]:
    """The packages that the host's sources lack; old lists would name files that are gone."""
    absent = missing
    for age in (FRESH, 0):  # a source that was added since is in no list yet
        if absent:
            __salt__["pkg.refresh_db"](cache_valid_time=age)
            absent = [name for name in missing if not __salt__["slmdb_repository.offers"](name)]
    return absent


def _refusal(absent: list[str]) -> str:
    """One line for each key that wants a package that nobody offers."""
    wanted = _wanted()
    lines = []
    for key in dict.fromkeys(wanted[name] for name in absent):
        names = ", ".join(name for name in absent if wanted[name] == key)
        do = "correct it, or add a source that does"
        if key == VERSION:
            do = "choose another version, or repository: pgdg"
        elif key == PYTHON:
            do = "add a source that does"
        lines.append(f"{key}: the package sources of this host do not offer {names}; {do}")
    return "\n".join(lines)


def apply() -> None:
    """
    Install what is missing, and update no server; its package creates no instance of its own.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_package.apply

    Returns nothing. Raises ``CommandExecutionError`` if the host's package sources do not have
    one of them (nothing was touched then), or apt or pip fails.
    """
    missing = _missing()
    absent = _unavailable(missing)
    if absent:
        raise CommandExecutionError(_refusal(absent))
    if missing:
        if not __salt__["slmdb_instance.facts"]()["exists"]:
            path, text = __salt__["slmdb_package.no_cluster"]()
            __salt__["slmdb_file.write"](path, text)
        _install(missing)
    if _driver_missing():
        _install_driver()


def _install(missing: list[str]) -> None:
    """Install by apt, after an earlier run that was killed in the middle of dpkg as well."""
    if __salt__["slmdb_update.complete"]():
        # What is complete now is installed, and to be asked for again might update it.
        missing = _missing()
        if not missing:
            return
    # apt may prefer the newest server where any would do for what it installs.
    found = __salt__["slmdb_hold.installed"]()
    free = sorted(name for name in found if not found[name]["held"] and name not in missing)
    __salt__["slmdb_hold.mark"]("hold", free)
    try:
        __salt__["pkg.install"](pkgs=[_of_our_major(name) for name in missing], refresh=False)
    except CommandExecutionError as err:
        raise CommandExecutionError(f"apt: {__salt__['slmdb_update.why'](str(err))}") from None
    finally:
        __salt__["slmdb_hold.mark"]("unhold", free)


def _of_our_major(name: str) -> str | dict[str, str]:
    """The newest meta-package may be another repository's and bring another major's server."""
    if name != __salt__["slmdb_pillar.get"]("distribution", "contrib"):
        return name
    return {name: __salt__["slmdb_update.keeping"](name)}


def no_cluster() -> tuple[str, bytes]:
    """
    Return the file that keeps the server's package from creating an instance of its own.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_package.no_cluster

    Returns its path and its content: locale, checksums and port of such an instance would be
    those of the moment. Raises nothing.
    """
    return (
        "/etc/postgresql-common/createcluster.d/autobot-slm.conf",
        b"create_main_cluster = false\n",
    )


def _install_driver() -> None:
    answer = __salt__["cmd.run_all"](
        [sys.executable, "-m", "pip", "install", "--quiet", "psycopg2-binary"], python_shell=False
    )
    if answer["retcode"] or _driver_missing():
        lines = (answer["stderr"] or answer["stdout"]).strip().splitlines() or ["no output"]
        raise CommandExecutionError(f"pip install psycopg2-binary: {lines[-1]}")


def leftovers() -> dict:
    """
    Name what ``apply`` left on the host; packages only with ``slm_database:clean:packages``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_package.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty if there is nothing to undo. Raises
    ``CommandExecutionError`` if packages are to go while an instance is there that stays.
    """
    changes = __salt__["slmdb_file.differences"](no_cluster()[0], None)
    if __salt__["slmdb_pillar.get"]("clean", "packages"):
        if not __context__.get("slmdb_given_up"):
            _refuse_beside_an_instance()
        installed = __salt__["pkg.list_pkgs"]()
        wanted = [name for name in names() if name in installed]
        changes.update({name: {"old": "installed", "new": None} for name in wanted})
    return changes


def _refuse_beside_an_instance() -> None:
    if __salt__["slmdb_instance.facts"]()["exists"]:
        raise CommandExecutionError(
            "slm_database:clean:packages: an instance is there and needs them; "
            "slm_database:clean:data and role give it up first"
        )


def remove() -> None:
    """
    Remove what ``leftovers`` names.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_package.remove

    Returns nothing. Raises ``CommandExecutionError`` if apt fails, or if an instance is still there
    that was to be given up.
    """
    path, _ = no_cluster()
    installed = [what for what in leftovers() if what != path]
    if installed:
        _refuse_beside_an_instance()
    __salt__["slmdb_file.remove"](path)
    if installed:
        __salt__["pkg.remove"](pkgs=installed)
