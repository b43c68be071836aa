"""
The repositories: which there are, what pgBackRest is told of each, and what opens them.

The first is a directory of this host; ``backup:second`` may add one more of several types.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_repository"

SECOND = "slm_database:backup:second"
# What each type cannot do without, and what else it may have.
NEEDED = {
    "path": ("path",),
    "s3": ("path", "bucket", "endpoint", "region", "key_pillar", "secret_pillar"),
    "sftp": ("path", "host", "user", "private_key_file", "host_key_hash_type"),
    "host": ("host", "user"),
}
POSSIBLE = {
    "path": (),
    "s3": ("uri_style", "verify_tls", "ca_file", "port"),
    "sftp": ("port", "known_hosts"),
    "host": ("path", "port"),
}
COMMON = ("type", "encryption", "retention")
# pgBackRest's names of our keys; what has none is written elsewhere.
OPTIONS = {
    "s3": {
        "bucket": "s3-bucket",
        "endpoint": "s3-endpoint",
        "region": "s3-region",
        "uri_style": "s3-uri-style",
        "ca_file": "storage-ca-file",
        "port": "storage-port",
    },
    "sftp": {
        "host": "sftp-host",
        "port": "sftp-host-port",
        "user": "sftp-host-user",
        "private_key_file": "sftp-private-key-file",
        "host_key_hash_type": "sftp-host-key-hash-type",
        "known_hosts": "sftp-known-host",
    },
    "host": {"host": "host", "user": "host-user", "port": "host-port"},
    "path": {},
}
SFTP = (2, 46)
INFO = ("archive/{}/archive.info", "backup/{}/backup.info")
PATIENCE = 30


def __virtual__() -> str:
    return __virtualname__


def _get(*keys: str) -> Any:
    return __salt__["slmdb_pillar.get"]("backup", *keys)


def described() -> list[dict[str, Any]]:
    """
    Describe the configured repositories.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.described

    Returns for each ``repository`` (pgBackRest's number), ``type``, ``where`` (in words), ``path``
    and ``local`` (whether it is a directory of this host). Raises what wrong settings raise.
    """
    first = {"repository": 1, "type": "path", "where": _get("path"), "path": _get("path")}
    rows = [{**first, "local": True}]
    second = _get("second")
    if second["type"]:
        row = {"repository": 2, "type": second["type"], "where": _where(second)}
        rows.append({**row, "path": second["path"], "local": second["type"] == "path"})
    return rows


def info_files(path: str) -> list[str]:
    """
    Return where a repository of this host says what it knows; each file has a ``.copy`` beside it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.info_files /var/lib/pgbackrest

    path
        The repository's directory.

    Returns the paths of the archive's and of the backups' file.
    """
    stanza = __salt__["slmdb_pgbackrest.stanza"]()
    return [os.path.join(path, name.format(stanza)) for name in INFO]


def barred(path: str) -> list[str]:
    """
    Name the directories of a repository of this host that the server's user cannot use.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.barred /var/lib/pgbackrest

    path
        The repository's directory.

    Returns paths, from the top down; empty if there is no repository. Raises
    ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    user, permits = __salt__["slmdb_instance.facts"]()["user"], __salt__["slmdb_file.permits"]
    wanted: dict[str, int] = {}
    for place in (os.path.dirname(info) for info in info_files(path)):
        # To enter what is above, to write where pgBackRest does.
        wanted |= {path: 1, os.path.dirname(place): 1, place: 3}
    return [one for one in wanted if os.path.isdir(one) and not permits(one, user, wanted[one])]


def _where(second: dict[str, Any]) -> str:
    path = second["path"] or ""
    if second["type"] == "path":
        return path
    place = second["bucket"] if second["type"] == "s3" else f"{second['user']}@{second['host']}"
    return f"{second['type']}:{place}{':' if path else ''}{path}"


def lines() -> list[str]:
    """
    Return the lines of pgBackRest's configuration that describe the repositories; no secret.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.lines
    """
    found = _common(1, _get())
    second = _get("second")
    kind = second["type"]
    if not kind:
        return found
    found += [] if kind == "host" else _common(2, second)
    if kind == "host" and second["path"]:
        found.append(f"repo2-path={second['path']}")
    if kind in ("s3", "sftp"):
        found.append(f"repo2-type={kind}")
    for key, option in OPTIONS[kind].items():
        if second[key] is not None:
            found.append(f"repo2-{option}={second[key]}")
    if kind == "sftp":
        # The engine keeps every file that it opened there open, and servers allow some 1000.
        found.append("repo2-bundle=y")
    if second["verify_tls"] is False:
        found.append("repo2-storage-verify-tls=n")
    return found


def _common(number: int, told: dict[str, Any]) -> list[str]:
    return [
        f"repo{number}-path={told['path']}",
        f"repo{number}-cipher-type={'aes-256-cbc' if told['encryption'] else 'none'}",
        f"repo{number}-retention-full={told['retention']['full']}",
        f"repo{number}-retention-diff={told['retention']['differential']}",
    ]


def encrypted() -> list[int]:
    """
    Return the numbers of the repositories that have a key of ours.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.encrypted
    """
    second = _get("second")
    ours = [1] if _get("encryption") else []
    return ours + ([2] if second["type"] not in (None, "host") and second["encryption"] else [])


class Credentials(str):
    """The text that opens the second repository; to whoever prints or sends it, a word without."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls, "<sealed>")

    def __init__(self, key: str, secret: str):
        self.text = f"[global]\nrepo2-s3-key={key}\nrepo2-s3-key-secret={secret}\n".encode()


def credentials() -> Credentials | None:
    """
    Return the file that holds what opens the second repository, for use inside the process.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.credentials

    Returns an object with its ``text``, ``None`` if none is needed. Raises
    ``CommandExecutionError`` if pillar has nothing where ``key_pillar`` or ``secret_pillar`` point.
    """
    second = _get("second")
    if second["type"] != "s3":
        return None
    key, secret = (_supplied(name, second[name]) for name in ("key_pillar", "secret_pillar"))
    return Credentials(key, secret)


def supply(second: dict[str, Any], text: bytes) -> dict[str, Any]:
    """
    Return the pillar that gives what such a file holds.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.supply '{"type": "path"}' ''

    second
        ``backup:second`` from pillar.
    text
        The file's, as ``credentials`` made it.

    Returns a dictionary of nested keys; empty for a type that needs none. Raises nothing.
    """
    found = dict(re.findall(r"^repo2-s3-(key(?:-secret)?)=(\S+)$", text.decode(), re.MULTILINE))
    pillar: dict[str, Any] = {}
    for option, name in (("key", "key_pillar"), ("key-secret", "secret_pillar")):
        if option in found and second.get(name):
            *above, last = second[name].split(":")
            place = pillar
            for part in above:
                place = place.setdefault(part, {})
            place[last] = found[option]
    return pillar


def _supplied(name: str, reference: str) -> str:
    value: Any = __pillar__
    for part in reference.split(":"):
        value = value.get(part) if hasattr(value, "get") else None
    if value is None:
        raise CommandExecutionError(f"{SECOND}:{name}: pillar has no key {reference}: supply it")
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]{1,512}", value):
        raise CommandExecutionError(f"{SECOND}:{name}: pillar key {reference} must hold one word")
    return value


def remote() -> list[str]:
    """
    Return how a command line begins that runs pgBackRest on the repository host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.remote

    Returns an empty list if the second repository is of another type.
    """
    second = _get("second")
    if second["type"] != "host":
        return []
    port = ["-p", str(second["port"])] if second["port"] else []
    return ["ssh", "-o", "BatchMode=yes", *port, f"{second['user']}@{second['host']}", "pgbackrest"]


def refuse_old() -> None:
    """
    Refuse a type that the installed pgBackRest does not know.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.refuse_old

    Raises ``CommandExecutionError`` that names the installed version; nothing is refused while
    pgBackRest is not installed.
    """
    if _get("second", "type") != "sftp":
        return
    row = __salt__["slmdb_package.known"]("pgbackrest").get("pgbackrest", {})
    found = re.search(r"(\d+)\.(\d+)", row["version"]) if row.get("installed") else None
    if found and (int(found[1]), int(found[2])) < SFTP:
        raise CommandExecutionError(
            f"{SECOND}:type: sftp needs pgBackRest 2.46, {found[0]} is installed; "
            "choose path, s3 or host"
        )


def holds(row: dict[str, Any], segment: str) -> bool:
    """
    Tell whether a segment of WAL is in a repository.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.holds '{…}' 000000010000000000000003

    row
        The repository, as ``described`` has it.
    segment
        The segment's name.

    Returns a boolean; a repository that cannot be asked holds nothing. Raises nothing.
    """
    stanza, below = __salt__["slmdb_pgbackrest.stanza"](), f"{segment[:16]}/{segment}-*"
    options = [f"--repo={row['repository']}", "--output=json"]
    try:
        if row["local"]:
            __salt__["slmdb_backup_presence.refuse_hanging"](row["repository"])
            return bool(glob.glob(f"{row['path']}/archive/{stanza}/*/{below}"))
        found = __salt__["slmdb_pgbackrest.info"](PATIENCE, row["repository"])["archive"]
        where = f"archive/{stanza}/{found[-1]['id']}/{segment[:16]}" if found else "archive"
        text = __salt__["slmdb_pgbackrest.run"]("repo-ls", *options, where, timeout=PATIENCE)
    except CommandExecutionError:
        return False
    return f'"{segment}-' in text


def refuse_another(number: int, history: list[dict[str, Any]]) -> None:
    """
    Refuse a repository of another instance: what is kept of that is not mixed with ours.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.refuse_another 1 '[]'

    number
        The repository.
    history
        The instances that it knows, as pgBackRest lists them.

    Raises ``CommandExecutionError`` that names both; nothing while the server does not answer. One
    that knows no instance is refused if it knew ours before.
    """
    if not history:
        __salt__["slmdb_backup_presence.refuse_gone"](number)
    if not history or not __salt__["slmdb_server.available"]():
        return
    query = "SELECT system_identifier::text AS id FROM pg_control_system()"
    ours, theirs = __salt__["slmdb_server.query"](query)[0]["id"], history[-1]["system-id"]
    if str(theirs) != ours:
        key = "path" if number == 1 else "second:path"
        raise CommandExecutionError(
            f"slm_database:backup:{key}: {described()[number - 1]['where']} holds the backups of "
            f"another instance (system identifier {theirs}, this one has {ours}); name another "
            "path, or move them away"
        )


def problems(told: dict[str, Any], first: str) -> Iterator[str]:
    """
    Check that what pillar says of the second repository fits together.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_repository.problems '{"type": "path"}' /var/lib/pgbackrest

    told
        ``backup:second`` as pillar has it.
    first
        The path of the first repository.

    Returns one line per mistake. Raises nothing.
    """
    kind = told.get("type")
    given = [key for key in told if told[key] is not None and key not in COMMON]
    if kind is None and given:
        yield f"{SECOND}:type: is missing; allowed: {', '.join(NEEDED)}"
    if not isinstance(kind, str) or kind not in NEEDED:
        return
    for key in NEEDED[kind]:
        if told.get(key) is None:
            yield f"{SECOND}:{key}: is missing; type {kind} needs it"
    for key in given:
        if key in KEYS and key not in NEEDED[kind] + POSSIBLE[kind]:
            yield f"{SECOND}:{key}: means nothing to type {kind}; remove it"
    path = told.get("path")
    if kind == "path" and isinstance(path, str) and _within(path, first):
        yield f"{SECOND}:path: {path} overlaps slm_database:backup:path; choose another"


def _within(one: str, other: str) -> bool:
    one, other = f"{one}/", f"{other}/"
    return one.startswith(other) or other.startswith(one)


KEYS = {key for table in (NEEDED, POSSIBLE) for keys in table.values() for key in keys}
