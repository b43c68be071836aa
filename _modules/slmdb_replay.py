"""
A server on restored files that nobody reaches: it replays what they shall have, and ends.

So it is known that a target can be reached before anything that runs is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_replay"

# What must not touch anything outside, or wait for it.
OWN = {
    "external_pid_file": "",
    "unix_socket_permissions": "0700",
    "unix_socket_group": "",
    "listen_addresses": "",
    "ssl": "off",
    "archive_command": "",
    "primary_conninfo": "",
    "synchronous_standby_names": "",
    "max_logical_replication_workers": "0",
    "shared_preload_libraries": "",
    "session_preload_libraries": "",
    "autovacuum": "off",
    "shared_buffers": "128MB",
    "huge_pages": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
    "lc_messages": "C",
    "cluster_name": "replay",
}
STATUS = 7  # the line of postmaster.pid, counted from 0
FILES = {
    "config_file": "postgresql.conf",
    "hba_file": "pg_hba.conf",
    "ident_file": "pg_ident.conf",
}


def __virtual__() -> str:
    return __virtualname__


def start(
    data: str, log: str, settings: dict[str, str], before: Sequence[str] = ()
) -> subprocess.Popen:
    """
    Start a server on restored files; it dies with whoever started it.

    For callers in Python.

    data
        The data directory.
    log
        The file that gets its words.
    settings
        On the command line, so that no file of the copy has another word.
    before
        Words that start it without a network, say.

    Returns the process. Raises ``CommandExecutionError`` if it cannot be started.
    """
    found = __salt__["slmdb_instance.facts"]()
    line = [f"{found['bin_directory']}/postgres", "-D", data]
    words = [*before, *__salt__["slmdb_program.command"](*line, end="QUIT")]
    for name, value in settings.items():
        words += ["-c", f"{name}={value}"]
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": os.path.dirname(log)}
    try:
        with open(log, "ab") as stream:
            return subprocess.Popen(
                words,
                cwd=data,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
    except OSError as err:
        raise CommandExecutionError(f"{data}: no server: {err.strerror}") from err


def isolated(place: str, sockets: str) -> dict[str, str]:
    """
    Write what a server on restored files needs beside them, so that it touches nothing else.

    For callers in Python.

    place
        A directory of the server's user, for its configuration and its log.
    sockets
        The directory of its socket.

    Returns the settings for ``start``. Raises ``CommandExecutionError`` if a file cannot be
    written.
    """
    user = __salt__["slmdb_instance.facts"]()["user"]
    for name in (*FILES.values(), "log"):
        text = "local all all trust\n" if name == FILES["hba_file"] else ""
        __salt__["slmdb_file.write"](f"{place}/{name}", text, user, user, "0600")
    files = {setting: f"{place}/{name}" for setting, name in FILES.items()}
    return {**OWN, **files, "unix_socket_directories": sockets}


@contextlib.contextmanager
def _place() -> Iterator[str]:
    """A directory for what a server needs beside its data; nobody else looks into it."""
    user = __salt__["slmdb_instance.facts"]()["user"]
    place = tempfile.mkdtemp(prefix="autobot-slm-replay-", dir="/run")
    try:
        shutil.chown(place, user, user)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def run(data: str) -> None:
    """
    Let a server replay what restored files shall have, and end it.

    For callers in Python.

    data
        The data directory; pgBackRest wrote the target into it.

    Raises ``CommandExecutionError`` with the server's words if it does not get there.
    """
    with _place() as place:
        settings = {
            **isolated(place, place),
            **__salt__["slmdb_restore.limits"](data),
            "hot_standby": "off",
            # Not archived here: by whoever starts on these files afterwards.
            "archive_mode": "on",
        }
        server = start(data, f"{place}/log", settings)
        try:
            _until_there(data, server, f"{place}/log")
            server.send_signal(signal.SIGINT)
            server.wait()
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGQUIT)
                server.wait()


def _until_there(data: str, server: subprocess.Popen, log: str) -> None:
    """Without hot standby a server is ready for clients when recovery is over; its file says so."""
    while server.poll() is None:
        lines = (__salt__["slmdb_file.read"](f"{data}/postmaster.pid") or b"").split(b"\n")
        if len(lines) > STATUS and lines[STATUS].strip() == b"ready":
            return
        time.sleep(0.2)
    raise CommandExecutionError(last_words(log))


def last_words(log: str) -> str:
    """
    Return the last reason that a server gave for its end.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_replay.last_words /var/log/postgresql/postgresql-15-restored.log

    log
        Its log.
    """
    lines = (__salt__["slmdb_file.read"](log) or b"").decode(errors="replace").splitlines()
    fatal = [line.partition("FATAL:")[2].strip() for line in lines if "FATAL:" in line]
    return fatal[-1] if fatal else f"the restored server ended; see {log}"
