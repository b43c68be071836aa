"""
PGDG's package repository, trusted by one key that is pinned by its full fingerprint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_repository"

SOURCE = "/etc/apt/sources.list.d/autobot-slm-pgdg.sources"
KEYRING = "/etc/apt/keyrings/autobot-slm-pgdg.gpg"
LISTS = "/var/lib/apt/lists"
PRIMARY_KEY = 6
# What apt may call a warning and end with exit status 0.
REFUSALS = ("GPG error", "OpenPGP signature", "Failed to fetch", "is not signed")


def __virtual__() -> str:
    return __virtualname__


def _wanted(given: dict[str, Any]) -> dict[str, Any]:
    """What the settings say, with the caller's arguments over it."""
    if given:
        __salt__["slmdb_schema.refuse"]("slmdb_repository", **given)
    get = __salt__["slmdb_pillar.get"]
    wanted = {"repository": get("repository"), **get("pgdg")}
    wanted.update({key: value for key, value in given.items() if value is not None})
    if wanted["repository"] == "pgdg" and not wanted["suite"]:
        wanted["suite"] = f"{__grains__.get('oscodename', '')}-pgdg"
    return wanted


def _dearmored(data: bytes) -> bytes:
    """Return a key's bytes without the ASCII armor that it may have (RFC 4880, 6.2)."""
    if not data.lstrip().startswith(b"-----BEGIN PGP PUBLIC KEY BLOCK-----"):
        return data
    lines = [line.strip() for line in data.strip().splitlines()]
    body = lines[lines.index(b"") + 1 : lines.index(b"-----END PGP PUBLIC KEY BLOCK-----")]
    return base64.b64decode(
        b"".join(line for line in body if not line.startswith(b"=")), validate=True
    )


def _length(data: bytes, at: int, old: int | None) -> tuple[int, int]:
    """Return how long a packet's body is and where it begins (RFC 4880, 4.2)."""
    if old is not None:
        size = 1 << old
        if size > 4:
            raise ValueError("a packet of indeterminate length")
        return int.from_bytes(data[at : at + size], "big"), at + size
    first = data[at]
    if first < 192:
        return first, at + 1
    if first < 224:
        return ((first - 192) << 8) + data[at + 1] + 192, at + 2
    if first < 255:
        raise ValueError("a packet in parts")
    return int.from_bytes(data[at + 1 : at + 5], "big"), at + 5


def _packets(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Give each packet's tag, its body and all its bytes."""
    at = 0
    while at < len(data):
        head = data[at]
        if not head & 0x80:
            raise ValueError("no packet")
        new = bool(head & 0x40)
        tag = head & 0x3F if new else (head >> 2) & 0x0F
        length, begin = _length(data, at + 1, None if new else head & 0x03)
        end = begin + length
        if end > len(data):
            raise ValueError("a truncated packet")
        yield tag, data[begin:end], data[at:end]
        at = end


def _fingerprint(body: bytes) -> str:
    """Return the fingerprint of a version 4 key packet (RFC 4880, 12.2)."""
    if body[:1] != b"\x04":
        return ""
    # SHA-1 is what the format's fingerprint is made of; no choice of ours.
    framed = b"\x99" + len(body).to_bytes(2, "big") + body
    return hashlib.sha1(framed, usedforsecurity=False).hexdigest().upper()


def keys(data: bytes) -> dict[str, bytes]:
    """
    Take a file of OpenPGP public keys apart.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_repository.keys "$(cat apt.postgresql.org.asc)"

    data
        The file's bytes, armored or not.

    Returns the full fingerprint of each key with the key's own bytes, binary. Raises
    ``CommandExecutionError`` if it is no such file.
    """
    found: dict[str, bytes] = {}
    current = ""
    try:
        for tag, body, whole in _packets(_dearmored(data)):
            if tag == PRIMARY_KEY:
                current = _fingerprint(body)
            found[current] = found.get(current, b"") + whole
    except (ValueError, IndexError, binascii.Error) as err:
        raise CommandExecutionError("it is not an OpenPGP public key") from err
    found.pop("", None)
    return found


def _keyring(wanted: dict[str, Any]) -> bytes:
    """Return the pinned key, and nothing else that the key file may hold."""
    source, pinned = wanted["key"], "".join(wanted["fingerprint"].split()).upper()
    path = __salt__["cp.cache_file"](source) if source.startswith("salt://") else source
    data = __salt__["slmdb_file.read"](path) if path else None
    if data is None:
        raise CommandExecutionError(f"slm_database:pgdg:key: {source} does not exist; put it there")
    try:
        found = keys(data)
    except CommandExecutionError as err:
        raise CommandExecutionError(f"slm_database:pgdg:key: {source}: {err.strerror}") from err
    if pinned not in found:
        raise CommandExecutionError(
            f"slm_database:pgdg:key: {source} does not hold the key {pinned} but "
            f"{', '.join(found) or 'none'}; compare it with slm_database:pgdg:fingerprint"
        )
    return found[pinned]


def _source(wanted: dict[str, Any], keyring: str) -> bytes:
    lines = {
        "Types": "deb",
        "URIs": wanted["uri"],
        "Suites": wanted["suite"],
        "Components": wanted["component"],
        "Signed-By": keyring,
    }
    text = "# Written by Salt (slm_database): change the pillar, not this file.\n"
    return (text + "".join(f"{key}: {value}\n" for key, value in lines.items())).encode()


def _files(wanted: dict[str, Any]) -> dict[str, bytes | None]:
    """Return what our two files should hold; the key comes first, so that it is never missing."""
    if wanted["repository"] != "pgdg":
        return {SOURCE: None, KEYRING: None}
    return {KEYRING: _keyring(wanted), SOURCE: _source(wanted, KEYRING)}


def differences(**given: Any) -> dict:
    """
    Compare the host with the repository that is wanted.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_repository.differences

    given
        ``repository`` (``pgdg`` or ``distribution``), ``uri``, ``suite``, ``component``, ``key``
        (a path or ``salt://`` address), ``fingerprint`` (40 hexadecimal digits), as in
        ``slm_database/defaults.yaml``; default: as the settings say.

    Returns ``{file: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if the key file is missing or does not hold the pinned key.
    """
    changes: dict = {}
    for path, data in _files(_wanted(given)).items():
        changes.update(__salt__["slmdb_file.differences"](path, data))
    return changes


def apply(**given: Any) -> None:
    """
    Set the repository up, or take it away again when the distribution's is wanted.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_repository.apply

    given
        As for ``differences``.

    The repository is fetched and verified in a temporary directory before anything is written.
    Returns nothing. Raises ``CommandExecutionError`` if it cannot be reached, is not signed by the
    pinned key, or does not offer the major; the host is as before then.
    """
    wanted = _wanted(given)
    files = _files(wanted)
    if wanted["repository"] == "pgdg":
        _try(wanted, files[KEYRING] or b"")
    else:
        _forget_lists()
    for path, data in files.items():
        if data is None:
            __salt__["slmdb_file.remove"](path)
        else:
            __salt__["slmdb_file.write"](path, data)
    if wanted["repository"] == "pgdg":
        _update(SOURCE, LISTS)


def offers(package: str) -> bool:
    """
    Tell whether the host's package sources, as last refreshed, have a package.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_repository.offers postgresql-15

    package
        The package's name.

    Returns a boolean. Raises nothing.
    """
    return _candidate(package, [])


def _apt_options(source: str, lists: str) -> list[str]:
    """Options that make apt see one source only, and keep what it knows of the others."""
    options = {
        "Dir::Etc::SourceList": source,
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": lists,
        "APT::Get::List-Cleanup": "0",
        "APT::Update::Error-Mode": "any",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "30",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def _run(*words: str) -> dict[str, Any]:
    return __salt__["cmd.run_all"](
        list(words), python_shell=False, env={"LC_ALL": "C"}, ignore_retcode=True
    )


def _candidate(package: str, options: list[str]) -> bool:
    answer = _run("apt-cache", *options, "policy", package)
    lines = [
        line.split(":", 1)[1].strip()
        for line in answer["stdout"].splitlines()
        if "Candidate:" in line
    ]
    return bool(lines) and lines[0] != "(none)"


def _update(source: str, lists: str) -> None:
    """Fetch one source's lists; apt verifies them against the pinned key."""
    answer = _run("apt-get", *_apt_options(source, lists), "update")
    said = f"{answer['stderr']}\n{answer['stdout']}"
    warned = re.findall(r"^(?:[WE]|Warning|Error): +(.*)", said, re.MULTILINE)
    refused = [line for line in warned if any(word in line for word in REFUSALS)]
    if answer["retcode"] or refused:
        line = [*refused, *warned, "apt-get update failed"][0]
        raise CommandExecutionError(f"slm_database:pgdg: {line}")


def _try(wanted: dict[str, Any], keyring: bytes) -> None:
    """Fetch the repository aside, and look whether it has the major."""
    aside = tempfile.mkdtemp(prefix="slmdb-repository-")
    try:
        # apt reads and fetches as the user _apt.
        os.chmod(aside, 0o755)
        key, source, lists = (os.path.join(aside, name) for name in ("k.gpg", "s.sources", "lists"))
        os.makedirs(os.path.join(lists, "partial"))
        __salt__["slmdb_file.write"](key, keyring)
        __salt__["slmdb_file.write"](source, _source(wanted, key))
        _update(source, lists)
        package = f"postgresql-{__salt__['slmdb_instance.version']()}"
        if not _candidate(package, _apt_options(source, lists)):
            raise CommandExecutionError(
                f"slm_database:version: {wanted['uri']} {wanted['suite']} does not offer "
                f"{package}; choose another version"
            )
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _forget_lists() -> None:
    """Remove the repository's lists, which apt would keep until its next update of everything."""
    text = __salt__["slmdb_file.read"](SOURCE) or b""
    fields = dict(line.split(": ", 1) for line in text.decode().splitlines() if ": " in line)
    if "URIs" not in fields or "Suites" not in fields or not os.path.isdir(LISTS):
        return
    address = fields["URIs"].split(":", 1)[1].removeprefix("//").rstrip("/")
    prefix = f"{address}/dists/{fields['Suites']}".replace("_", "%5f").replace("/", "_") + "_"
    for name in os.listdir(LISTS):
        if name.startswith(prefix):
            __salt__["slmdb_file.remove"](os.path.join(LISTS, name))
