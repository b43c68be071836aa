"""
A host that was lost: another one gets the secrets and settings of the off-host copy, and the data
of the repository.

``unpack`` opens the copy and puts its files back; the state ``slmdb_recovery.restored``, which
comes before the instance is made, restores the data. A mark says that this was begun: only what
was begun by us is ever overwritten.
"""

from __future__ import annotations

import grp
import io
import json
import os
import subprocess
import tarfile
from typing import Any, NamedTuple

import salt.utils.yaml
from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_recovery"

PROGRAM = "/usr/bin/age"
PACKAGES = ["age", "postgresql-common"]  # the second makes the account that owns some files
MARK = "/var/lib/autobot-slm-database/recovery.json"
MANIFEST = "manifest.json"
FORMAT = 1
DATA = "/var/lib/postgresql"


class _File(NamedTuple):
    data: bytes
    user: str
    group: str
    mode: str


def __virtual__() -> str:
    return __virtualname__


def _readable(what: str, path: str) -> None:
    if not isinstance(path, str) or not path.startswith("/"):
        raise SaltInvocationError(f"{what}: {path!r} is not the absolute path of a file")
    if not os.path.isfile(path):
        raise SaltInvocationError(f"{what}: there is no file {path}")


def _opened(copy: str, identity: str) -> tuple[dict[str, Any], dict[str, _File]]:
    """The manifest, and path to file, of a copy; nothing of it is ever on the disk in clear."""
    words = [PROGRAM, "--decrypt", f"--identity={identity}", copy]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise CommandExecutionError(
            f"{copy} cannot be opened with {identity}: {lines[0].removeprefix('age: error: ')}"
        )
    try:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            members = {one.name: _file(archive, one) for one in archive.getmembers()}
        manifest = json.loads(members[MANIFEST].data)
        paths = manifest["files"]
        files = {path: members[path.lstrip("/")] for path in paths}
    except (tarfile.TarError, KeyError, ValueError, TypeError, AttributeError):
        raise CommandExecutionError(f"{copy} is no copy that slmdb_backup.copy made") from None
    if manifest.get("format") != FORMAT or any(path != os.path.normpath(path) for path in paths):
        raise CommandExecutionError(f"{copy} was made by another release of the formula")
    return manifest, files


def _file(archive: tarfile.TarFile, member: tarfile.TarInfo) -> _File:
    stream = archive.extractfile(member)
    if stream is None:
        raise tarfile.TarError("not a plain file")
    return _File(stream.read(), member.uname, member.gname, f"{member.mode & 0o7777:04o}")


def _planned(manifest: dict[str, Any], files: dict[str, _File]) -> dict[str, Any]:
    instance = manifest["instance"]
    name = f"{instance['version']}/{instance['name']}"
    _refuse_other_instance(instance, name)
    settings = _settings(files)
    return {
        "made": manifest["made"],
        "instance": name,
        "system_identifier": instance["system_identifier"],
        "files": _to_write(files, again=begun() or _same_instance(instance)),
        "settings": settings,
        "pillar": _pillar_file(settings),
    }


def _same_instance(instance: dict[str, Any]) -> bool:
    found = __salt__["slmdb_instance.system_identifier"](instance["data_directory"])
    return str(found) == instance["system_identifier"]


def _refuse_other_instance(instance: dict[str, Any], name: str) -> None:
    """Another instance of our name would be taken for the lost one, or have its data covered."""
    data = instance["data_directory"]
    present = os.path.exists(os.path.join(data, "PG_VERSION"))
    if present and not begun() and not _same_instance(instance):
        raise CommandExecutionError(
            f"this host has an instance {name} with other data in {data}; recover on a bare "
            "host, or move that data away"
        )
    for major in os.listdir(DATA) if os.path.isdir(DATA) else []:
        other = f"{major}/{instance['name']}"
        if other != name and os.path.exists(os.path.join(DATA, other, "PG_VERSION")):
            raise CommandExecutionError(
                f"this host has an instance {other}, the copy is of {name}; recover on a bare "
                f"host, or: pg_dropcluster --stop {other.replace('/', ' ')}"
            )


def _to_write(files: dict[str, _File], again: bool) -> list[str]:
    """The files that are missing, or that we wrote before the data was there."""
    wanted = []
    for path, file in files.items():
        present = __salt__["slmdb_file.read"](path)
        if present is None or (present != file.data and begun()):
            wanted.append(path)
        elif present != file.data and not again:
            raise CommandExecutionError(
                f"{path} exists and is not as in the copy; recover on a bare host, or move it away"
            )
    return wanted


def _settings(files: dict[str, _File]) -> dict[str, Any]:
    record = __salt__["slmdb_pillar.record"]()
    recorded = json.loads(files[record].data) if record in files else {}
    return __salt__["slmdb_pillar.beyond_defaults"](recorded)


def _pillar_file(settings: dict[str, Any]) -> str | None:
    """Where a host without a master will find its settings, if its pillar has none of ours."""
    if not settings or __pillar__.get("slm_database"):
        return None
    keys = ", ".join(settings)
    if __opts__.get("file_client") != "local":
        raise CommandExecutionError(
            f"the master's pillar has no slm_database for this minion, the lost host had {keys}; "
            f"{__salt__['slmdb_pillar.record']()} in the copy has the values: give them to the "
            "minion first"
        )
    directory = __opts__["pillar_roots"]["base"][0]
    top = os.path.join(directory, "top.sls")
    if os.path.exists(top) and not begun():
        raise CommandExecutionError(
            f"{top} gives this host no slm_database, the lost one had {keys}: write them in pillar "
            "first, or move the file away"
        )
    return os.path.join(directory, "slm_database.sls")


def unpack(copy: str, identity: str) -> dict[str, Any]:
    """
    Put the files of an off-host copy back; ``state.apply slm_database.recovery`` does the rest.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_recovery.unpack /root/slm-copy.age /root/identity.txt

    copy
        The file that ``slmdb_backup.copy`` made.
    identity
        The file of the secret key that opens it (of age, or an SSH key).

    Everything is checked before a file is written; only age is installed if it is missing.
    Returns ``made`` (UTC), ``instance``, ``system_identifier``, ``files`` (that were written),
    ``settings`` (the pillar that the lost host had beyond the defaults) and ``pillar`` (the file
    in which they are; ``None`` if pillar has them). Raises ``SaltInvocationError`` if a file is
    missing, ``CommandExecutionError`` if the copy cannot be opened, or this host has another
    instance or other secrets.
    """
    _readable("copy", copy)
    _readable("identity", identity)
    _install()
    manifest, files = _opened(copy, identity)
    planned = _planned(manifest, files)
    if not os.path.exists(os.path.join(manifest["instance"]["data_directory"], "PG_VERSION")):
        mark({"instance": planned["instance"], "copy": planned["made"]})
    if planned["pillar"]:
        _write_pillar(planned["pillar"], planned["settings"], files)
    for path in planned["files"]:
        _write(path, files[path])
    return planned


def begun() -> bool:
    """
    Tell whether a recovery was begun here and is not finished.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_recovery.begun

    Returns a boolean. Raises nothing.
    """
    return os.path.exists(MARK)


def mark(told: dict[str, Any]) -> None:
    """
    Remember that a recovery was begun on a host without data.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_recovery.mark '{"instance": "15/main"}'

    told
        What the mark says, for whoever finds it.

    Raises ``CommandExecutionError`` if it cannot be written.
    """
    if not begun():
        __salt__["slmdb_file.remember"](MARK, told, mode="0640")


def unmark() -> None:
    """
    Forget that a recovery was begun: it is finished, or an empty instance was wanted after all.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_recovery.unmark

    Raises ``CommandExecutionError`` if the mark cannot be removed.
    """
    __salt__["slmdb_file.remove"](MARK)


def _install() -> None:
    missing = [name for name in PACKAGES if not __salt__["pkg.version"](name)]
    if not missing:
        return
    __salt__["pkg.refresh_db"]()
    try:
        __salt__["pkg.install"](pkgs=missing, refresh=False)
    except CommandExecutionError as err:
        line = (str(err).strip().splitlines() or ["no output"])[-1]
        raise CommandExecutionError(f"apt-get install {' '.join(missing)}: {line}") from None


def _write_pillar(path: str, settings: dict[str, Any], files: dict[str, _File]) -> None:
    """
    The settings first, with the keys of the repository that they refer to: a top file without them
    would be an error.
    """
    name = os.path.basename(path).removesuffix(".sls")
    kept = files.get(__salt__["slmdb_pgbackrest.credentials_file"]())
    second = settings.get("backup", {}).get("second", {})
    keys = __salt__["slmdb_backup_repository.supply"](second, kept.data) if kept else {}
    contents = {
        path: {**keys, "slm_database": settings},
        os.path.join(os.path.dirname(path), "top.sls"): {"base": {"*": [name]}},
    }
    for one, content in contents.items():
        text = salt.utils.yaml.safe_dump(content, default_flow_style=False)
        __salt__["slmdb_file.write"](one, text.encode(), mode="0600")


def _write(path: str, file: _File) -> None:
    """An account that does not exist yet is the formula's to make; until then it is root's."""
    users = {file.user} & set(__salt__["user.list_users"]())
    groups = {file.group} & {entry.gr_name for entry in grp.getgrall()}
    mode = file.mode if users and groups else "0600"
    __salt__["slmdb_file.write"](
        path, file.data, (users or {"root"}).pop(), (groups or {"root"}).pop(), mode
    )
