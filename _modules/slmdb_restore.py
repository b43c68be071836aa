"""
Restores: to the end, a moment, a restore point or a backup; beside the instance, or in its place.

Files are always restored into a directory of their own first. What runs, and the repository, are
not touched until that has worked.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_restore"

MARGIN = 1.1
RECOVERING = "SELECT pg_is_in_recovery() AS recovering"
# What a server in recovery needs to have at least as large as the one that wrote the WAL.
LIMITS = {
    "max_connections": "max_connections setting",
    "max_worker_processes": "max_worker_processes setting",
    "max_wal_senders": "max_wal_senders setting",
    "max_prepared_transactions": "max_prepared_xacts setting",
    "max_locks_per_transaction": "max_locks_per_xact setting",
}


def __virtual__() -> str:
    return __virtualname__


def _port(wanted: int | None) -> int:
    """A free TCP port: the wanted one, else the next after the instance's own."""
    own = __salt__["slmdb_instance.facts"]()["port"]
    for port in [wanted] if wanted else range(own + 1, own + 100):
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", int(port)))
            except OSError:
                continue
        return int(port)
    raise SaltInvocationError(f"port: {wanted or 'none of the next hundred'} is free; name another")


def files(
    directory: str, chosen: dict[str, Any], archive: bool, beside: str | None = None
) -> str | None:
    """
    Restore the files into a directory that is made; nothing is left of it if that fails.

    For callers in Python.

    directory
        Where; it does not exist yet.
    chosen
        What ``slmdb_restore_plan.make`` returned.
    archive
        Whether a server on these files shall archive its WAL.
    beside
        The path whose name the directory of the tablespaces begins with; ``None``: the same.

    Returns the directory of the tablespaces, if there are any. Raises ``CommandExecutionError`` if
    pgBackRest or the disk refuses.
    """
    found = __salt__["slmdb_instance.facts"]()
    spaces = f"{beside or directory}.tablespaces-{int(_now())}"
    try:
        for path in (directory, spaces):
            os.mkdir(path, 0o700)
            shutil.chown(path, found["user"], found["user"])
        options = [*chosen["options"], f"--pg1-path={directory}"]
        options.append(f"--tablespace-map-all={spaces}")
        options.append(f"--recovery-option=restore_command={fetch(directory)}")
        if not archive:
            options.append("--archive-mode=off")
        __salt__["slmdb_backup_progress.run"]("restore", chosen["repository"], *options)
        __salt__["slmdb_backup_progress.tell"](
            "restore", chosen["repository"], "done", bytes=chosen["bytes"]
        )
    except OSError as err:
        raise CommandExecutionError(f"{directory}: cannot be made: {err.strerror}") from err
    except CommandExecutionError:
        _remove(directory, spaces)
        raise
    if os.listdir(spaces):
        return spaces
    os.rmdir(spaces)
    return None


def _tablespaces(data: str) -> list[str]:
    """Where the tablespaces of a data directory are."""
    return sorted(os.path.realpath(link) for link in glob.glob(f"{data}/pg_tblspc/*"))


def _remove(*paths: str | None) -> None:
    for path in paths:
        if path:
            shutil.rmtree(path, ignore_errors=True)


def fetch(directory: str) -> str:
    """
    Return the command that gets a segment of WAL from whichever repository has it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.fetch /var/lib/postgresql/15/main

    directory
        The data directory that it is for.

    What pgBackRest writes by itself asks the repository of the backup alone.
    """
    words = ("archive-get", f"--pg1-path={directory}", "%f", '"%p"')
    return " ".join(__salt__["slmdb_pgbackrest.line"](*words))


def limits(directory: str) -> dict[str, str]:
    """
    Return the settings that a server needs at least to replay WAL over restored files.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.limits /var/lib/postgresql/15/main

    directory
        The data directory.

    Returns name to value. Raises nothing.
    """
    found = __salt__["slmdb_instance.facts"]()
    answer = __salt__["cmd.run_all"](
        [f"{found['bin_directory']}/pg_controldata", directory],
        python_shell=False,
        env={"LC_ALL": "C"},
    )
    said = dict(line.partition(":")[::2] for line in answer["stdout"].splitlines())
    return {name: said[words].strip() for name, words in LIMITS.items() if words in said}


def beside(
    instance: str = "restored",
    port: int | None = None,
    time: str | None = None,
    label: str | None = None,
    restore_point: str | None = None,
) -> dict[str, Any]:
    """
    Restore into a new instance beside the present one, to look at.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.beside port=5433

    instance
        Name of the new instance.
    port
        Its TCP port; ``None``: the next free one.
    time, label, restore_point
        As for ``slmdb_restore_plan.make``; none of them: the end of the archived WAL.

    Returns ``instance``, ``port``, ``data_directory``, ``target``, ``label``, ``gap`` (what is
    missing because WAL is, or is damaged; ``None``), ``seconds`` and ``remove`` (the command that
    throws it away).
    It archives nothing and is not started at boot.
    Raises ``SaltInvocationError`` for what cannot be, ``CommandExecutionError`` if it fails;
    nothing is left then.
    """
    begun, found = _clock(), __salt__["slmdb_instance.facts"]()
    version = found["version"]
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", str(instance)) or instance == found["name"]:
        raise SaltInvocationError(
            f"instance: {instance!r} cannot be used; allowed: lower-case letters, digits and _, "
            f"not {found['name']}"
        )
    directory = os.path.join(os.path.dirname(found["data_directory"]), instance)
    if os.path.exists(directory) or os.path.exists(f"/etc/postgresql/{version}/{instance}"):
        raise SaltInvocationError(
            f"instance: {version}/{instance} exists; name another, or: "
            + _removal(version, instance, directory, glob.glob(f"{directory}.tablespaces-*"))
        )
    chosen = __salt__["slmdb_restore_plan.make"](time, label, restore_point)
    number = _port(port)
    refuse = __salt__["slmdb_disk.refuse"]
    refuse(os.path.dirname(directory), "the restore", chosen["bytes"] * MARGIN)
    archived = _archive_all(found)
    gap = __salt__["slmdb_backup_gap.words"](chosen, archived)
    spaces = files(directory, chosen, archive=False)
    try:
        _register(found, instance, directory, number)
        _start(version, instance)
        _started(directory, number, instance)
        gap = gap or __salt__["slmdb_backup_gap.short"](chosen, archived, port=number)
    except CommandExecutionError as err:
        _discard(version, instance, directory, spaces)
        raise CommandExecutionError(_reason(err, chosen)) from None
    return {
        "instance": f"{version}/{instance}",
        "port": number,
        "data_directory": directory,
        "target": chosen["target"],
        "label": chosen["label"],
        "gap": gap,
        "seconds": round(_clock() - begun, 1),
        "remove": _removal(version, instance, directory, [spaces] if spaces else []),
    }


def _removal(version: str, instance: str, directory: str, spaces: list[str]) -> str:
    """The command that throws a restored instance away, or what one that was killed left of it."""
    configuration = f"/etc/postgresql/{version}/{instance}"
    words = []
    if os.path.exists(f"{configuration}/postgresql.conf"):
        words.append(f"pg_dropcluster --stop {version} {instance}")
    else:
        spaces = [path for path in (configuration, directory) if os.path.exists(path)] + spaces
    return " && ".join(words + ([f"rm -r {' '.join(spaces)}"] if spaces else []))


def _clock() -> float:
    return time.monotonic()


def _archive_all(found: dict[str, Any]) -> dict[str, str] | None:
    """Have everything that is committed by now in the repository, where the server runs."""
    if found["running"] and __salt__["slmdb_server.available"]():
        return __salt__["slmdb_backup.settle"]()
    return None


def _register(found: dict[str, Any], instance: str, directory: str, port: int) -> None:
    """Make the restored files an instance; pg_createcluster takes its configuration from them."""
    version, user = found["version"], found["user"]
    own = {
        **limits(directory),
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": found["socket_directory"],
        "archive_mode": "off",
        "cluster_name": f"{version}/{instance}",
    }
    rules = __salt__["slmdb_file.read"](found["hba_file"]) or b"local all postgres peer\n"
    files = {
        "postgresql.conf": __salt__["slmdb_conf.render"](own).encode(),
        "pg_hba.conf": rules,
        "pg_ident.conf": __salt__["slmdb_file.read"](found["ident_file"]) or b"",
    }
    for name, data in files.items():
        __salt__["slmdb_file.write"](f"{directory}/{name}", data, user, user, "0640")
    options = ["-d", directory, "--port", str(port), "--start-conf", "manual"]
    _run(["pg_createcluster", *options, version, instance])


def _start(version: str, instance: str) -> None:
    """Where systemd starts it, only the server's log has the server's words."""
    try:
        _run(["pg_ctlcluster", version, instance, "start"])
    except CommandExecutionError:
        if not __salt__["slmdb_instance.facts"]()["systemd"]:
            raise
        raise CommandExecutionError(
            __salt__["slmdb_replay.last_words"](_log(version, instance))
        ) from None


def _log(version: str, instance: str) -> str:
    return f"/var/log/postgresql/postgresql-{version}-{instance}.log"


def _run(command: list[str]) -> None:
    answer = __salt__["cmd.run_all"](
        command, python_shell=False, env={"LC_ALL": "C.UTF-8"}, ignore_retcode=True
    )
    if answer["retcode"]:
        lines = (answer["stderr"] or answer["stdout"]).strip().splitlines() or ["no output"]
        fatal = [line for line in lines if "FATAL:" in line]
        words = fatal[-1].partition("FATAL:")[2].strip() if fatal else lines[0]
        raise CommandExecutionError(f"{command[0]}: {words}")


def _started(directory: str, port: int, instance: str) -> None:
    """Wait until the server on restored files has replayed what it shall."""
    version = __salt__["slmdb_instance.facts"]()["version"]
    log = _log(version, instance)
    pid_file = os.path.join(directory, "postmaster.pid")
    until_recovered(log, lambda: os.path.exists(pid_file), port=port)


def until_recovered(log: str, alive: Callable[[], bool], **where: Any) -> None:
    """
    Wait until a server has replayed what it shall; there is no limit while it is alive.

    For callers in Python.

    log
        The server's log, for its last words.
    alive
        Tells whether the server runs.
    where
        Parameters of libpq.

    Raises ``CommandExecutionError`` with the server's words if it ends.
    """
    dead_since = None
    while True:
        with contextlib.suppress(CommandExecutionError):
            connection = __salt__["slmdb_server.connect"](**where)
            with contextlib.closing(connection):
                (row,) = __salt__["slmdb_server.ask"](connection, RECOVERING)
            if not row["recovering"]:
                return
        if alive():
            dead_since = None
        else:
            dead_since = dead_since or _clock()
            if _clock() - dead_since > 1:
                raise CommandExecutionError(__salt__["slmdb_replay.last_words"](log))
        time.sleep(0.1)


def _reason(err: Exception, chosen: dict[str, Any]) -> str:
    if "before configured recovery target was reached" not in str(err):
        return f"restore to {chosen['target']}: {err}"
    return (
        f"restore to {chosen['target']}: the archived WAL that follows backup {chosen['label']} "
        "ends before it; name an older backup by label if it was made before that one, or restore "
        "without a target to get the last transaction there is"
    )


def _discard(version: str, instance: str, directory: str, spaces: str | None) -> None:
    if os.path.exists(f"/etc/postgresql/{version}/{instance}"):
        __salt__["cmd.run_all"](["pg_dropcluster", "--stop", version, instance], python_shell=False)
    _remove(directory, spaces)


def in_place(
    name: str,
    time: str | None = None,
    label: str | None = None,
    restore_point: str | None = None,
) -> dict[str, Any]:
    """
    Restore into the instance itself; its old data is kept aside.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.in_place 15/main time=2026-11-23T20:15:00+00:00

    name
        The instance, typed again, such as ``15/main``.
    time, label, restore_point
        As for ``slmdb_restore_plan.make``; none of them: the end of the archived WAL.

    Returns ``instance``, ``port``, ``target``, ``label``, ``seconds``, ``kept`` (the directory of
    the old data), ``kept_tablespaces`` (those that go with it) and ``secret`` (what to do if a
    password is not the secret file's any more; ``None``). The files are restored before the server
    is stopped; to a target they are also replayed before, without one all WAL is read. Raises
    ``SaltInvocationError`` for what cannot be; ``CommandExecutionError`` if it fails: the old data
    is back in its place, and the server runs, then.
    """
    begun, found = _clock(), __salt__["slmdb_instance.facts"]()
    own = f"{found['version']}/{found['name']}"
    if name != own:
        raise SaltInvocationError(f"name: {name!r} is not this instance; to go on, type {own}")
    data = found["data_directory"]
    if os.path.realpath(data) in __salt__["slmdb_disk.mount_points"]():
        raise CommandExecutionError(
            f"{data} is a mount of its own, which cannot be moved aside: restore beside it"
        )
    _undo_half(data)
    chosen = __salt__["slmdb_restore_plan.make"](time, label, restore_point)
    new, kept = f"{data}.restoring", f"{data}.before-{int(_now())}"
    # What one that was killed left.
    spaces = {os.path.dirname(one) for one in _tablespaces(new)}
    _remove(*(one for one in spaces if one.startswith(f"{data}.tablespaces-")), new)
    refuse = __salt__["slmdb_disk.refuse"]
    refuse(os.path.dirname(data), "the restore", chosen["bytes"] * MARGIN)
    gap = __salt__["slmdb_backup_gap.words"](chosen, _archive_all(found))
    gap = gap or __salt__["slmdb_backup_gap.damaged"](chosen)
    if gap:
        raise CommandExecutionError(f"{gap}; a time before it can be restored in place")
    made = files(new, chosen, archive=True, beside=data)
    try:
        if chosen["ends"]:
            __salt__["slmdb_replay.run"](new)
    except CommandExecutionError as err:
        _remove(new, made)
        raise CommandExecutionError(_reason(err, chosen)) from None
    running = _stopped(found)
    try:
        if not chosen["ends"]:
            # Only now all is archived; and in recovery no limit of the instance may be too low.
            __salt__["slmdb_replay.run"](new)
        _moved(new, data)
        os.rename(data, kept)
        os.rename(new, data)
        __salt__["slmdb_service.start"]()
        _started(data, found["port"], found["name"])
    except (CommandExecutionError, OSError) as err:
        _put_back(data, kept, running)
        _remove(new, made)
        raise CommandExecutionError(_reason(err, chosen)) from None
    return {
        "instance": own,
        "port": found["port"],
        "target": chosen["target"],
        "label": chosen["label"],
        "seconds": round(_clock() - begun, 1),
        "kept": kept,
        "kept_tablespaces": _tablespaces(kept),
        "secret": _secret(),
    }


def _secret() -> str | None:
    """A password that was changed since: the restored server has the one from before."""
    try:
        changes = __salt__["slmdb_secret.differences"]()
    except (CommandExecutionError, SaltInvocationError) as err:
        return str(err)
    other = [what for what in changes if "verifier of " in what]
    return (
        f"{', '.join(other)}: another password than the secret file's, from before it was changed; "
        "state.apply slm_database.secret puts it right"
        if other
        else None
    )


def _stopped(found: dict[str, Any]) -> bool:
    """
    Stop the server, whatever became of it while the files were restored; tell whether it ran then
    or before. systemd may be about to start one that is down.
    """
    now = __salt__["slmdb_instance.facts"]()
    if now["running"] or now["systemd"]:
        __salt__["slmdb_service.stop"]()
    return found["running"] or now["running"]


def _undo_half(data: str) -> None:
    """What was killed between moving the old data away and the new one in."""
    kept = __salt__["slmdb_instance.aside"]()
    if kept:
        os.rename(kept, data)


def _moved(new: str, data: str) -> None:
    """Let the restored server fetch WAL for the place where its files will be."""
    user, path = __salt__["slmdb_instance.facts"]()["user"], f"{new}/postgresql.auto.conf"
    text = (__salt__["slmdb_file.read"](path) or b"").replace(new.encode(), data.encode())
    __salt__["slmdb_file.write"](path, text, user, user, "0600")


def _now() -> float:
    return time.time()


def _put_back(data: str, kept: str, start: bool) -> None:
    """The old data is what counts; a half-restored one is not worth keeping."""
    if os.path.exists(kept):
        with contextlib.suppress(CommandExecutionError):
            __salt__["slmdb_service.stop"]()
        shutil.rmtree(data, ignore_errors=True)
        os.rename(kept, data)
    if start:
        __salt__["slmdb_service.start"]()
