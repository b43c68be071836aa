"""
Restores: to the end, a moment, a restore point or a backup; beside the instance, or in its place.

Files are always restored into a directory of their own first. What runs, and the repository, are
not touched until that has worked.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "slmdb_restore"

MARGIN = 1.1
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


def _utc(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(str(text).strip().replace("Z", "+00:00"))
    except ValueError:
        raise SaltInvocationError(
            f"time: {str(text)[:40]!r} is no moment; allowed: such as 2026-11-23T20:15:00+00:00 "
            "(without an offset it is UTC)"
        ) from None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _backups() -> list[dict[str, Any]]:
    rows = __salt__["slmdb_backup.list"]()
    if not rows:
        raise CommandExecutionError("there is no backup yet; slmdb_backup.create makes one")
    return rows


def plan(
    time: str | None = None, label: str | None = None, restore_point: str | None = None
) -> dict[str, Any]:
    """
    Say what a restore would do, or why it cannot.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.plan time=2026-11-23T20:15:00+00:00

    time
        The last moment that shall be there; without an offset it is UTC.
    label
        The backup to begin with; alone: the moment at which it was complete.
    restore_point
        A name given by ``pg_create_restore_point``. It is looked for from the newest backup on;
        one from before that needs the ``label`` of an older backup.

    Of several repositories the first one that has a fitting backup is taken. Returns ``target``,
    ``label``, ``repository``, ``wal`` (the first segment that is replayed), ``options``
    (pgBackRest's) and ``bytes`` (of the data). Raises ``SaltInvocationError`` for what cannot be
    reached, with the range that can.
    """
    if time and restore_point:
        raise SaltInvocationError("time and restore_point cannot both be given; choose one")
    rows = _backups()
    known = {row["label"]: row for row in reversed(rows)}
    if label and label not in known:
        raise SaltInvocationError(
            f"label: there is no backup {label}; there are {', '.join(reversed(known))}"
        )
    chosen = known[label] if label else _newest(rows)
    options, target = [], "the end of the archived WAL"
    if time:
        moment = _utc(time)
        chosen = _before(rows, moment, label)
        target = moment.isoformat()
        text = moment.strftime("%Y-%m-%d %H:%M:%S.%f+00")
        options = ["--type=time", f"--target={text}", "--target-action=promote"]
    elif restore_point:
        target = f"restore point {restore_point}"
        options = ["--type=name", f"--target={restore_point}", "--target-action=promote"]
    elif label:
        target = f"backup {label}"
        options = ["--type=immediate", "--target-action=promote"]
    options = [f"--set={chosen['label']}", *options]
    size = chosen["database_bytes"]
    made = {"label": chosen["label"], "wal": chosen["wal"][0], "bytes": size}
    return {"target": target, "repository": chosen["repository"], "options": options, **made}


def _newest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest of the first repository that has one: that is nearer, and as good."""
    return max(rows, key=lambda row: (-row["repository"], row["stopped"], row["label"]))


def _before(rows: list[dict[str, Any]], moment: datetime, label: str | None) -> dict[str, Any]:
    """The newest backup that was complete at a moment."""
    earliest = _utc(rows[0]["stopped"])
    now = datetime.now(timezone.utc)
    if moment < earliest or moment > now:
        raise SaltInvocationError(
            f"time: {moment.isoformat()} cannot be reached; "
            f"from {earliest.isoformat()} to {now.isoformat(timespec='seconds')} can"
        )
    fitting = [row for row in rows if _utc(row["stopped"]) <= moment]
    if not label:
        return _newest(fitting)
    if label not in [row["label"] for row in fitting]:
        raise SaltInvocationError(
            f"label: backup {label} was not complete at {moment.isoformat()}; "
            f"{fitting[-1]['label']} was"
        )
    return next(row for row in fitting if row["label"] == label)


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


def files(directory: str, chosen: dict[str, Any], archive: bool) -> None:
    """
    Restore the files into a directory that is made; nothing is left of it if that fails.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.plan

    directory
        Where; it does not exist yet.
    chosen
        What ``plan`` returned.
    archive
        Whether a server on these files shall archive its WAL.

    Raises ``CommandExecutionError`` if pgBackRest or the disk refuses.
    """
    found = __salt__["slmdb_instance.facts"]()
    try:
        os.mkdir(directory, 0o700)
        shutil.chown(directory, found["user"], found["user"])
        options = [*chosen["options"], f"--pg1-path={directory}"]
        options.append(f"--tablespace-map-all={directory}.tablespaces")
        options.append(f"--recovery-option=restore_command={_fetch(directory)}")
        if not archive:
            options.append("--archive-mode=off")
        __salt__["slmdb_backup_progress.run"]("restore", chosen["repository"], *options)
        __salt__["slmdb_backup_progress.tell"](
            "restore", chosen["repository"], "done", bytes=chosen["bytes"]
        )
    except OSError as err:
        raise CommandExecutionError(f"{directory}: cannot be made: {err.strerror}") from err
    except CommandExecutionError:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _fetch(directory: str) -> str:
    """WAL comes from whichever repository has it, not from that of the backup alone."""
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
        As for ``plan``; none of them: the end of the archived WAL.

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
            f"pg_dropcluster --stop {version} {instance}"
        )
    chosen = plan(time, label, restore_point)
    number = _port(port)
    refuse = __salt__["slmdb_disk.refuse"]
    refuse(os.path.dirname(directory), "the restore", chosen["bytes"] * MARGIN)
    archived = _archive_all(found)
    gap = __salt__["slmdb_backup_gap.words"](chosen, archived)
    files(directory, chosen, archive=False)
    try:
        _register(found, instance, directory, number)
        _run(["pg_ctlcluster", version, instance, "start"])
        _started(directory, number, instance)
        gap = gap or __salt__["slmdb_backup_gap.short"](chosen, archived, port=number)
    except CommandExecutionError as err:
        _discard(version, instance, directory)
        raise CommandExecutionError(_reason(err, chosen)) from None
    return {
        "instance": f"{version}/{instance}",
        "port": number,
        "data_directory": directory,
        "target": chosen["target"],
        "label": chosen["label"],
        "gap": gap,
        "seconds": round(_clock() - begun, 1),
        "remove": f"pg_dropcluster --stop {version} {instance}",
    }


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


def _run(command: list[str]) -> None:
    answer = __salt__["cmd.run_all"](command, python_shell=False, env={"LC_ALL": "C.UTF-8"})
    if answer["retcode"]:
        lines = (answer["stderr"] or answer["stdout"]).strip().splitlines() or ["no output"]
        fatal = [line for line in lines if "FATAL:" in line]
        words = fatal[-1].partition("FATAL:")[2].strip() if fatal else lines[0]
        raise CommandExecutionError(f"{command[0]}: {words}")


def _started(directory: str, port: int, instance: str) -> None:
    """Wait until the server on restored files has replayed what it shall."""
    version = __salt__["slmdb_instance.facts"]()["version"]
    log = f"/var/log/postgresql/postgresql-{version}-{instance}.log"
    pid_file = os.path.join(directory, "postmaster.pid")
    until_recovered(log, lambda: os.path.exists(pid_file), port=port)


def until_recovered(log: str, alive: Callable[[], bool], **where: Any) -> None:
    """
    Wait until a server has replayed what it shall; there is no limit while it is alive.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore.plan

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
            with contextlib.closing(connection), connection.cursor() as cursor:
                cursor.execute("SELECT pg_is_in_recovery()")
                if not cursor.fetchone()[0]:
                    return
        if alive():
            dead_since = None
        else:
            dead_since = dead_since or _clock()
            if _clock() - dead_since > 1:
                raise CommandExecutionError(_last_words(log))
        time.sleep(0.1)


def _last_words(log: str) -> str:
    lines = (__salt__["slmdb_file.read"](log) or b"").decode(errors="replace").splitlines()
    fatal = [line.partition("FATAL:")[2].strip() for line in lines if "FATAL:" in line]
    return fatal[-1] if fatal else f"the restored server ended; see {log}"


def _reason(err: Exception, chosen: dict[str, Any]) -> str:
    if "before configured recovery target was reached" not in str(err):
        return f"restore to {chosen['target']}: {err}"
    return (
        f"restore to {chosen['target']}: the archived WAL that follows backup {chosen['label']} "
        "ends before it; restore without a target to get the last transaction there is"
    )


def _discard(version: str, instance: str, directory: str) -> None:
    if os.path.exists(f"/etc/postgresql/{version}/{instance}"):
        __salt__["cmd.run_all"](["pg_dropcluster", "--stop", version, instance], python_shell=False)
    for path in (directory, f"{directory}.tablespaces"):
        shutil.rmtree(path, ignore_errors=True)


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
        As for ``plan``; none of them: the end of the archived WAL.

    Returns ``instance``, ``port``, ``target``, ``label``, ``seconds`` and ``kept`` (the directory
    of the old data). Without a target all WAL is read first, and the files are restored before the
    server is stopped. Raises
    ``SaltInvocationError`` for what cannot be; ``CommandExecutionError`` if it fails: the old data
    is back in its place, and the server runs, then.
    """
    begun, found = _clock(), __salt__["slmdb_instance.facts"]()
    own = f"{found['version']}/{found['name']}"
    if name != own:
        raise SaltInvocationError(f"name: {name!r} is not this instance; to go on, type {own}")
    chosen = plan(time, label, restore_point)
    data = found["data_directory"]
    new, kept = f"{data}.restoring", f"{data}.before-{int(_now())}"
    shutil.rmtree(new, ignore_errors=True)
    refuse = __salt__["slmdb_disk.refuse"]
    refuse(os.path.dirname(data), "the restore", chosen["bytes"] * MARGIN)
    gap = __salt__["slmdb_backup_gap.words"](chosen, _archive_all(found))
    gap = gap or __salt__["slmdb_backup_gap.damaged"](chosen, f"{new}.wal")
    if gap:
        raise CommandExecutionError(f"{gap}; a time before it can be restored in place")
    files(new, chosen, archive=True)
    _moved(new, data)
    if found["running"]:
        __salt__["slmdb_service.stop"]()
    try:
        os.rename(data, kept)
        os.rename(new, data)
        __salt__["slmdb_service.start"]()
        _started(data, found["port"], found["name"])
    except (CommandExecutionError, OSError) as err:
        _put_back(data, kept, found["running"])
        shutil.rmtree(new, ignore_errors=True)
        raise CommandExecutionError(_reason(err, chosen)) from None
    return {
        "instance": own,
        "port": found["port"],
        "target": chosen["target"],
        "label": chosen["label"],
        "seconds": round(_clock() - begun, 1),
        "kept": kept,
    }


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
