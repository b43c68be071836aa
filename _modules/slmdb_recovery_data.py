"""
The data of a host that was lost: restored from the repository where an instance would be made.

The server that replays the WAL has no address and a socket that nobody finds, so nothing is
written before the formula has had its say.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_recovery_data"

KEYS = "/etc/pgbackrest/autobot-slm"
ENCRYPTED = b"Salted__"  # how a file begins that pgBackRest encrypted
FOREVER = 10**6
MARGIN = 1.1
# The host may be smaller than the one that was lost, and its addresses others.
MODEST = {
    "listen_addresses": "",
    "hot_standby": "off",
    "shared_buffers": "128MB",
    "huge_pages": "off",
    "ssl": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
}


def __virtual__() -> str:
    return __virtualname__


def _get(*keys: str) -> Any:
    return __salt__["slmdb_pillar.get"](*keys)


def _whole(directory: str) -> bool:
    """pgBackRest puts the control file there last."""
    return os.path.exists(os.path.join(directory, "global/pg_control"))


def differences() -> dict[str, Any]:
    """
    Compare the host with "the instance has data, and no recovery is unfinished".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_recovery_data.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if it has. Raises ``CommandExecutionError`` if
    there is no repository here, its key is missing, or other files are where the data belongs.
    """
    found = __salt__["slmdb_instance.facts"]()
    begun, data = __salt__["slmdb_recovery.begun"](), found["data_directory"]
    if _whole(data) and not begun:
        return {}
    if not begun and os.path.isdir(data) and os.listdir(data):
        raise CommandExecutionError(
            f"{data} holds files but no whole instance, and no recovery was begun here; move them "
            "away"
        )
    problem = _repository_problem()
    if problem:
        raise CommandExecutionError(problem)
    old = "an unfinished recovery" if begun else None
    label = f"data of instance {found['version']}/{found['name']}"
    return {label: {"old": old, "new": "restored from the repository"}}


def _repository_problem() -> str | None:
    """Why nothing can be restored, as far as that is seen without running anything."""
    if not _get("backup", "enabled"):
        return "slm_database:backup:enabled: is false; there is nothing to restore from"
    __salt__["slmdb_backup_presence.refuse_hanging"]()
    rows = __salt__["slmdb_backup_repository.described"]()
    held = [row for row in rows if row["local"] and _head(row) is not None]
    for row in held:
        problem = _locked(row)
        if problem:
            return problem
    if held or not all(row["local"] for row in rows):
        return None
    paths = " or ".join(row["path"] for row in rows)
    return (
        f"slm_database:backup:path: no repository of ours in {paths}; bring the repository "
        "there, or say where it is"
    )


def _head(row: dict[str, Any]) -> bytes | None:
    _, backups = __salt__["slmdb_backup_repository.info_files"](row["path"])
    return __salt__["slmdb_file.read"](backups)


def _locked(row: dict[str, Any]) -> str | None:
    """Why a repository of this host cannot be read."""
    path, number = row["path"], row["repository"]
    encrypted = (_head(row) or b"").startswith(ENCRYPTED)
    key = __salt__["slmdb_pgbackrest.key"](number)
    if encrypted and not os.path.exists(key):
        return (
            f"the repository in {path} is encrypted and its key {key} is missing; nobody reads it "
            "without that key: bring the off-host copy (bin/recover), or a copy of the key"
        )
    if encrypted != (number in __salt__["slmdb_backup_repository.encrypted"]()):
        seen = "encrypted" if encrypted else "not encrypted"
        name = "encryption" if number == 1 else "second:encryption"
        return f"slm_database:backup:{name}: the repository in {path} is {seen}; say so"
    return None


def apply() -> None:
    """
    Restore the newest backup and all WAL that follows it, and replay it to its end.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_recovery_data.apply

    The server is stopped afterwards; the formula starts it. What was interrupted is done again.
    Raises ``CommandExecutionError`` if the repository cannot be read, the disk would not hold the
    data, or the server does not reach the end of the WAL.
    """
    if not differences():
        return
    found = __salt__["slmdb_instance.facts"]()
    __salt__["slmdb_recovery.mark"]({"instance": f"{found['version']}/{found['name']}"})
    _stop(found)
    for row in __salt__["slmdb_backup_repository.described"]():
        if row["local"]:
            _own(row["path"], found["user"])
    _share_keys(found["user"])
    __salt__["slmdb_pgbackrest.apply"]()
    _files(found, __salt__["slmdb_restore_plan.make"]())
    if not found["exists"]:
        _register(found)
    _replay()
    __salt__["slmdb_recovery.unmark"]()


def left_out() -> str | None:
    """
    Say which archived WAL the restored data lacks, because a segment is missing or damaged.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_recovery_data.left_out

    To be asked right after ``apply``. Returns one line, ``None`` if nothing lacks. Raises nothing:
    what cannot be told is a line, too.
    """
    data = __salt__["slmdb_instance.facts"]()["data_directory"]
    try:
        return __salt__["slmdb_backup_gap.left_out"](data)
    except CommandExecutionError as err:
        return f"whether all archived WAL was replayed cannot be told: {err}"


def _own(path: str, user: str) -> None:
    """A repository that was carried here may have the numbers of another host's accounts."""
    foreign = ["find", path, "!", "-user", user, "-print", "-quit"]
    if os.path.isdir(path) and _run(*foreign):
        _run("chown", "--recursive", "--no-dereference", f"{user}:{user}", path)


def _share_keys(user: str) -> None:
    """The keys were brought by root, perhaps for root alone; the server's user has to read them."""
    if os.path.isdir(KEYS):
        _run("chown", "--recursive", "--no-dereference", f"root:{user}", KEYS)
        _run("chmod", "--recursive", "u=rwX,g=rX,o=", KEYS)


def _files(found: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Restore into the data directory; an interrupted restore goes on where it was."""
    data = found["data_directory"]
    fetch = __salt__["slmdb_restore.fetch"](data)
    options = [f"--repo={chosen['repository']}", *chosen["options"]]
    options.append(f"--recovery-option=restore_command={fetch}")
    begun = ("backup.manifest", "PG_VERSION")
    if any(os.path.exists(os.path.join(data, name)) for name in begun):
        options.append("--delta")
    else:
        _make_empty(data, found["user"])
        __salt__["slmdb_disk.refuse"](data, "the restore", chosen["bytes"] * MARGIN)
    __salt__["slmdb_pgbackrest.run"]("restore", f"--pg1-path={data}", *options)


def _make_empty(directory: str, user: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        _make_above(os.path.dirname(directory), user)
        os.mkdir(directory, 0o700)
        shutil.chown(directory, user, user)
    except OSError as err:
        raise CommandExecutionError(f"{directory}: cannot be made: {err.strerror}") from err


def _make_above(directory: str, user: str) -> None:
    """What is made on the way is the server's, as its packages make it."""
    if not os.path.isdir(directory):
        _make_above(os.path.dirname(directory), user)
        os.mkdir(directory, 0o755)
        shutil.chown(directory, user, user)


def _register(found: dict[str, Any]) -> None:
    """
    Make an instance of the data where no copy brought its configuration.

    The configuration is what initdb gives; pg_createcluster takes it from beside the data.
    """
    data, user = found["data_directory"], found["user"]
    scratch = f"{data}.configuration"
    _make_empty(scratch, user)
    options = [f"--locale={_get('locale')}", f"--encoding={_get('encoding')}", "--no-sync"]
    try:
        _as_server(f"{found['bin_directory']}/initdb", "-D", scratch, *options)
        for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
            text = __salt__["slmdb_file.read"](f"{scratch}/{name}")
            __salt__["slmdb_file.write"](f"{data}/{name}", text or b"", user, user, "0640")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    command = ["pg_createcluster", "-d", data, "--port", str(_get("port")), "--start-conf", "auto"]
    _run(*command, found["version"], found["name"])


def _replay() -> None:
    """Let a server that nobody reaches replay the WAL to its end, then stop it."""
    found = __salt__["slmdb_instance.facts"]()
    data = found["data_directory"]
    settings = {"config_file": found["config_file"], "unix_socket_directories": data, **MODEST}
    settings.update(__salt__["slmdb_pgbackrest.settings"]())
    words = shlex.join(word for pair in settings.items() for word in ("-c", "=".join(pair)))
    log = f"/var/log/postgresql/postgresql-{found['version']}-{found['name']}.log"
    before = os.path.getsize(log) if os.path.exists(log) else 0
    command = [f"{found['bin_directory']}/pg_ctl", "start", "-D", data, "-w", "-t", str(FOREVER)]
    try:
        _as_server(*command, "-l", log, "-o", words)
        _until_replayed(found)
    except CommandExecutionError as err:
        raise CommandExecutionError(_last_words(log, before) or str(err)) from None
    _stop(found)


def _until_replayed(found: dict[str, Any]) -> None:
    """What pg_ctl waits for is the beginning; how long it takes until the end, nobody can say."""
    program, data = f"{found['bin_directory']}/pg_controldata", found["data_directory"]
    while not re.search(r"cluster state: +in production", _run(program, data)):
        if not __salt__["slmdb_instance.facts"]()["running"]:
            raise CommandExecutionError("the restored server ended before the WAL did")
        time.sleep(0.2)


def _last_words(log: str, offset: int) -> str | None:
    text = (__salt__["slmdb_file.read"](log) or b"")[offset:].decode(errors="replace")
    fatal = re.findall(r"(?:FATAL|PANIC): *(.+)", text)
    return f"the restored server did not reach the end of the WAL: {fatal[-1]}" if fatal else None


def _stop(found: dict[str, Any]) -> None:
    """End the server that replays, also one that an interrupted run left."""
    if not __salt__["slmdb_instance.facts"]()["running"]:
        return
    program, data = f"{found['bin_directory']}/pg_ctl", found["data_directory"]
    _as_server(program, "stop", "-D", data, "-w", "-t", str(FOREVER), "-m", "fast")


def _as_server(*words: str) -> None:
    _run(*words, as_server=True)


def _run(*words: str, as_server: bool = False) -> str:
    return __salt__["slmdb_program.run"](*words, as_server=as_server)
