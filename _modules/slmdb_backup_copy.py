"""
The off-host copy: what a new host needs besides the repository, in one encrypted file.

The file is an ordinary tar, encrypted by age for the public keys that pillar names, so that no
secret is needed to make it. It is never on the disk in clear.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import secrets
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

if TYPE_CHECKING:
    import tarfile

__virtualname__ = "slmdb_backup_copy"

PROGRAM = "/usr/bin/age"
KEYS = "/etc/pgbackrest/autobot-slm"
STATE = "/var/lib/autobot-slm-database/copy.json"
MANIFEST = "manifest.json"
FORMAT = 1
FILES_OF_TLS = ("ssl_cert_file", "ssl_key_file", "ssl_ca_file", "ssl_crl_file")
FILES_OF_REPOSITORY = ("ca_file", "private_key_file", "known_hosts")


def __virtual__() -> str:
    return __virtualname__


def _get(*keys: str) -> Any:
    return __salt__["slmdb_pillar.get"](*keys)


def _secret_files() -> list[str]:
    wanted = (want["file"] for want in __salt__["slmdb_secret_plan.everyone"]())
    return list(dict.fromkeys(path for path in wanted if path))


def _below(directory: str) -> list[str]:
    return sorted(
        os.path.join(where, name) for where, _, names in os.walk(directory) for name in names
    )


def _named_by_settings() -> list[str]:
    """Files of the operator's that the instance or its repository is told to use."""
    settings = _get("settings")
    named = [settings.get(name) for name in FILES_OF_TLS] + [_get("pgdg", "key")]
    named += [_get("backup", "second", name) for name in FILES_OF_REPOSITORY]
    return [path for path in named if isinstance(path, str) and path.startswith("/")]


def _own_of_ssh(user: str) -> list[str]:
    """What lets the server's user into the second repository, where that is over SSH."""
    if _get("backup", "second", "type") not in ("host", "sftp"):
        return []
    return _below(os.path.join(os.path.expanduser(f"~{user}"), ".ssh"))


def _paths() -> list[str]:
    """What the copy holds: plain files that are there."""
    found = __salt__["slmdb_instance.facts"]()
    paths = [*_secret_files(), *_below(KEYS), __salt__["slmdb_pillar.record"]()]
    paths += [*_below(found["config_directory"]), *_named_by_settings()]
    paths += _own_of_ssh(found["user"])
    return [path for path in dict.fromkeys(paths) if _is_plain(path)]


def _is_plain(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def make(path: str) -> dict[str, Any]:
    """
    Make the copy.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_copy.make /root/slm-copy.age

    path
        The file to write; an older copy there is replaced.

    Returns ``path``, ``bytes``, ``made`` (UTC), ``recipients`` (how many) and ``holds`` (names of
    files). Raises ``SaltInvocationError`` if no recipient is named or the path cannot be used,
    ``CommandExecutionError`` if something that belongs into it is missing or age fails.
    """
    recipients = _get("backup", "copy", "recipients")
    _refuse(path, recipients)
    contents = {one: __salt__["slmdb_file.read"](one) for one in _paths()}
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sealed = _sealed(_archive(contents, moment), recipients)
    __salt__["slmdb_file.write"](path, sealed, mode="0600")
    _remember(contents, moment, path)
    return {
        "path": path,
        "bytes": len(sealed),
        "made": moment,
        "recipients": len(recipients),
        "holds": list(contents),
    }


def _refuse(path: str, recipients: list[str]) -> None:
    if not recipients:
        raise SaltInvocationError(
            "slm_database:backup:copy:recipients: is empty; name who can open the copy, by public "
            "keys (age-keygen makes a pair; keep the secret one off this host), and apply"
        )
    if not isinstance(path, str) or not path.startswith("/") or path.endswith("/"):
        raise SaltInvocationError(f"path: {path!r} is not the absolute path of a file")
    if os.path.isdir(path):
        raise SaltInvocationError(f"path: {path} is a directory; name a file in it")
    if not os.path.isdir(os.path.dirname(path)):
        raise SaltInvocationError(f"path: {os.path.dirname(path)} does not exist")
    if not os.path.exists(PROGRAM):
        raise CommandExecutionError(f"{PROGRAM} is missing; state.apply slm_database installs it")
    for needed in (_get("secret", "file"), __salt__["slmdb_pillar.record"]()):
        if not _is_plain(needed):
            raise CommandExecutionError(f"{needed} does not exist; apply the formula first")


def _archive(contents: dict[str, bytes], moment: str) -> bytes:
    import tarfile  # health, which asks how old the copy is, does without

    buffer = io.BytesIO()
    manifest = {"format": FORMAT, "made": moment, "instance": _instance(), "files": list(contents)}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        head = tarfile.TarInfo(MANIFEST)
        head.mode = 0o600
        _add(archive, head, (json.dumps(manifest, indent=1) + "\n").encode())
        for path, data in contents.items():
            member = archive.gettarinfo(path, arcname=path.lstrip("/"))
            member.type = tarfile.REGTYPE
            _add(archive, member, data)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _instance() -> dict[str, Any]:
    found = __salt__["slmdb_instance.facts"]()
    identifier = __salt__["slmdb_instance.system_identifier"]()
    if identifier is None:
        raise CommandExecutionError("there is no instance; apply the formula first")
    return {
        **{key: found[key] for key in ("version", "name", "port", "data_directory")},
        **{key: _get(key) for key in ("locale", "encoding")},
        "system_identifier": str(identifier),
    }


def _sealed(data: bytes, recipients: list[str]) -> bytes:
    words = [PROGRAM, "--encrypt", *(f"--recipient={one}" for one in recipients)]
    done = subprocess.run(words, input=data, capture_output=True, cwd="/", check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise CommandExecutionError(
            f"slm_database:backup:copy:recipients: {lines[0].removeprefix('age: error: ')}"
        )
    return done.stdout


def _remember(contents: dict[str, bytes], moment: str, path: str) -> None:
    """Keep what tells later whether anything changed, and nothing that shows a secret."""
    salt = secrets.token_bytes(32)
    kept = {one: _digest(salt, data) for one, data in contents.items() if not _rendered(one)}
    told = {"made": moment, "path": path, "salt": salt.hex(), "digests": kept}
    text = json.dumps(told, indent=1) + "\n"
    __salt__["slmdb_file.write"](STATE, text.encode(), mode="0600")


def _rendered(path: str) -> bool:
    """Whether the formula writes a file from the settings, which are compared anyway."""
    found = __salt__["slmdb_instance.facts"]()
    return path in (found["conf_file"], found["hba_file"], found["ident_file"])


def _digest(salt: bytes, data: bytes | None) -> str:
    return hmac.new(salt, data or b"", hashlib.sha256).hexdigest()


def state() -> dict[str, Any]:
    """
    Tell when the last copy was made, and whether it still holds what a new host would need.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_copy.state

    Returns ``made`` (UTC; ``None``), ``path`` (where it was written), ``changed`` (names of files
    that are not as in the copy) and ``problem`` (one line; ``None`` if all is well, or
    ``backup:enabled`` is false). Only small local files are read, no program is run. Raises
    nothing.
    """
    told: dict[str, Any] = {"made": None, "path": None, "changed": [], "problem": None}
    try:
        if not _get("backup", "enabled"):
            return told
        kept = json.loads(__salt__["slmdb_file.read"](STATE) or b"{}")
        if not kept:
            return {**told, "problem": _none_yet()}
        changed = _changed(kept)
        told.update(made=kept["made"], path=kept["path"], changed=changed)
    except (CommandExecutionError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {**told, "problem": f"{STATE} cannot be read; slmdb_backup.copy makes another copy"}
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        told["problem"] = (
            f"the off-host copy is older than {changed[0]}{more}: slmdb_backup.copy makes a new one"
        )
    return told


def _none_yet() -> str:
    if _get("backup", "copy", "recipients"):
        return "no off-host copy yet: slmdb_backup.copy makes one"
    return (
        "no off-host copy yet: name who can open it in slm_database:backup:copy:recipients, then "
        "slmdb_backup.copy makes one"
    )


def _changed(kept: dict[str, Any]) -> list[str]:
    salt, digests = bytes.fromhex(kept["salt"]), kept["digests"]
    present = [path for path in _paths() if not _rendered(path)]
    return [
        path
        for path in dict.fromkeys([*present, *digests])
        if digests.get(path) != _digest(salt, __salt__["slmdb_file.read"](path))
    ]
