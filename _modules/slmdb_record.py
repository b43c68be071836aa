"""
What the last apply was told, kept on the host for reports that come without a pillar.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import time

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_record"

DIRECTORY = "/var/lib/autobot-slm-database"
INSTALLED = f"{DIRECTORY}/installed"
# All that the formula writes there, by the path below it. What is not listed is somebody's: a dump
# from a time when pillar named another place, a copy for another host.
FILES = re.compile(
    r"(settings|pending|copy|drill|packages|holds|recovery|verified|repositories|repository-2)\.json"
    r"|installed|(drill|dump|maintenance|restore)\.lock|initialize\.begun|logins\.seen|backups-since"
    r"|last-good/(conf|hba|ident)|original/[^/]+\.conf"
    r"|pgbackrest/lock/[^/]+\.(lock|stop)|pgbackrest/spool/archive/[^/]+/(in|out)/[^/]+"
    r"|pgbackrest/segment-[^/]+"
    r"|((last-good|original)/)?\.slmdb-[^/]+"
)
TREES = re.compile(r"last-good|original|pgbackrest(/lock|/spool(/archive(/[^/]+(/(in|out))?)?)?)?")
# The Salt of bin/apply, and the copies that the timers ran: not this module's to remove.
OTHERS = ("salt", "formula")

ARCHIVING = """
SELECT current_setting('archive_mode') AS mode, current_setting('archive_command') AS command
"""


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
    own, _ = _sorted(DIRECTORY)
    return {path: {"old": "present", "new": "absent"} for path in own}


def remove() -> None:
    """
    Forget what the formula remembered of this host: settings, first install, last good files.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_record.remove

    Returns nothing. Raises ``CommandExecutionError`` if a file cannot be removed.
    """
    own, _ = _sorted(DIRECTORY)
    for path in own:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            __salt__["slmdb_file.remove"](path)


def _sorted(directory: str) -> tuple[list[str], list[str]]:
    """What below a directory the formula wrote, and what it did not."""
    own: list[str] = []
    foreign: list[str] = []
    for entry in _entries(directory):
        below = os.path.relpath(entry.path, DIRECTORY)
        if below in OTHERS:
            continue
        if not entry.is_dir(follow_symlinks=False):
            (own if FILES.fullmatch(below) else foreign).append(entry.path)
        elif TREES.fullmatch(below):
            inside, strange = _sorted(entry.path)
            own += inside if strange else [entry.path]
            foreign += strange
        else:
            foreign.append(entry.path)
    return own, foreign


def _entries(directory: str) -> list[os.DirEntry]:
    try:
        with os.scandir(directory) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def spared() -> list[str]:
    """
    Name what is in the formula's own directory and not its own: a clean leaves it where it is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_record.spared

    Returns one line per path; empty if there is none. Raises nothing.
    """
    _, foreign = _sorted(DIRECTORY)
    lines = []
    for path in foreign:
        what = "dumps" if __salt__["slmdb_backup_dump.holds"](path) else "not the formula's record"
        lines.append(f"left: {path} ({what}: remove by hand)")
    return lines


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
        why = __salt__["slmdb_instance.why_kept"]()
        said = f"instance {name} with its data (slm_database:clean:data)"
        lines.append(f"kept: {why or said}")
    if __salt__["slmdb_server.available"]():
        roles = __salt__["slmdb_role.read"](list(__salt__["slmdb_role.wanted"]()))
        lines += [f"kept: role {role} (slm_database:clean:role)" for role in sorted(roles)]
        (archiving,) = __salt__["slmdb_server.query"](ARCHIVING)
        nobody = not archiving["command"] or "/autobot-slm" in archiving["command"]
        if archiving["mode"] != "off" and nobody:
            restart = f"pg_ctlcluster {found['version']} {found['name']} restart"
            lines.append(
                "kept: the server archives its WAL until it is restarted, and nobody takes it any "
                f"more: it piles up in pg_wal ({restart})"
            )
    secret = __salt__["slmdb_pillar.get"]("secret", "file")
    if os.path.exists(secret):
        lines.append(f"kept: {secret} (slm_database:clean:secret)")
    if __salt__["slmdb_backup_dump.list"]():
        path = __salt__["slmdb_pillar.get"]("backup", "dump", "path")
        lines.append(f"kept: the dumps in {path} (no key: remove them by hand)")
    if found["version"] and os.path.exists(found["bin_directory"]):
        lines.append("kept: PostgreSQL's packages (slm_database:clean:packages)")
    return lines
