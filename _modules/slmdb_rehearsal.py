"""
A scratch instance with the host's own server and the wanted configuration, to see it start and let
somebody in before the real server ever reads that configuration.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_rehearsal"

DIRECTORY = "/var/lib/postgresql/.autobot-slm-rehearsal"
PATIENCE = 30
PORT = 5432
CONF = "50-autobot-slm.conf"
# What must not touch the real instance: its files, sockets, addresses and archive.
_OWN = {
    "data_directory": "{0}/data",
    "hba_file": "{0}/hba",
    "ident_file": "{0}/ident",
    "external_pid_file": "",
    "unix_socket_directories": "{0}",
    "unix_socket_permissions": "0777",
    "unix_socket_group": "",
    "listen_addresses": "",
    "port": str(PORT),
    "archive_command": "/bin/false",
    "restore_command": "",
    "primary_conninfo": "",
    "synchronous_standby_names": "",
    "log_destination": "stderr",
    "lc_messages": "C",
    "cluster_name": "rehearsal",
}
_WORDS = re.compile(r"\b(LOG|WARNING|ERROR|FATAL|PANIC|HINT|DETAIL|postgres):\s+(.*)")
_ALL_SETTINGS = "SELECT name, setting, unit, vartype, context, source, enumvals FROM pg_settings"


def __virtual__() -> str:
    return __virtualname__


def check(conf: str, hba: str | None = None, ident: str | None = None) -> dict[str, Any] | None:
    """
    Start a scratch instance with a configuration, log in, ask it what it thinks, and remove it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_rehearsal.check "work_mem = '16MB'"

    conf
        The text that would be in our file in ``conf.d``.
    hba, ident
        The text that would be in ``pg_hba.conf`` and ``pg_ident.conf``; None: not asked about.

    Returns None if there is no server program to ask, else ``objections`` (the server's words, one
    line each; none if it starts and lets in a role that is no superuser), ``settings``
    (``pg_settings`` by name; empty if it did not start) and ``rules`` (``pg_hba_file_rules``) and
    ``maps`` (``pg_ident_file_mappings``, from PostgreSQL 15 on). One rehearsal is held once in a
    run. Raises ``CommandExecutionError`` if the scratch instance cannot be made.
    """
    found = __salt__["slmdb_instance.facts"]()
    program = f"{found['bin_directory']}/postgres"
    if not os.access(program, os.X_OK):
        return None
    others = "".join(_read(path) for path in _foreign_files(found))
    # An update in the same run brings another program.
    asked = [conf, hba or "", ident or "", others, str(__salt__["slmdb_file.stamp"](program))]
    key = hashlib.sha256("\0".join(asked).encode()).hexdigest()
    kept = __context__.setdefault("slmdb_rehearsals", {})
    if key not in kept:
        with _scratch(found, conf) as directory:
            kept[key] = _rehearse(found, directory, hba, ident)
    return kept[key]


def with_rules(conf: str) -> dict[str, Any] | None:
    """
    Check a configuration together with the wanted access rules.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_rehearsal.with_rules "ssl = off"

    conf
        The text that would be in our file in ``conf.d``.

    Returns what ``check`` does, and raises as that.
    """
    settings = __salt__["slmdb_pillar.settings"]()
    hba = __salt__["slmdb_hba.render"](settings)
    return check(conf, hba, __salt__["slmdb_hba.render_ident"](settings))


def _foreign_files(found: dict[str, Any]) -> list[str]:
    """Return the configuration files beside ours that a server would read."""
    files = __salt__["slmdb_config_file.paths"]()
    return [path for path in files if path != found["conf_file"]]


def _read(path: str) -> str:
    return (__salt__["slmdb_file.read"](path) or b"").decode(errors="replace")


@contextlib.contextmanager
def _scratch(found: dict[str, Any], conf: str) -> Iterator[str]:
    """Yield a directory with an empty instance and a copy of the host's configuration."""
    parent = os.open(os.path.dirname(DIRECTORY), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        os.mkdir(DIRECTORY, 0o700)
        shutil.chown(DIRECTORY, found["user"], found["user"])
        _initialise(found)
        _copy_configuration(found, conf)
        yield DIRECTORY
    except OSError as err:
        raise CommandExecutionError(f"{DIRECTORY}: a scratch instance failed: {err}") from err
    finally:
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        os.close(parent)


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "HOME": DIRECTORY}


def _initialise(found: dict[str, Any]) -> None:
    program = f"{found['bin_directory']}/initdb"
    options = ["--no-sync", "--no-instructions", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    words = [program, "-D", f"{DIRECTORY}/data", "-U", found["user"], *options]
    try:
        __salt__["slmdb_program.run"](*words, as_server=True, environment=_environment())
    except CommandExecutionError as err:
        raise CommandExecutionError(f"a scratch instance: {err.strerror}") from None


def _copy_configuration(found: dict[str, Any], conf: str) -> None:
    target = f"{DIRECTORY}/conf"
    if os.path.isdir(found["config_directory"]):
        shutil.copytree(found["config_directory"], target, ignore_dangling_symlinks=True)
    else:
        os.mkdir(target)
        shutil.copy(f"{DIRECTORY}/data/postgresql.conf", target)
        with open(f"{target}/postgresql.conf", "a", encoding="utf-8") as stream:
            stream.write("include_dir = 'conf.d'\n")
    os.makedirs(f"{target}/conf.d", exist_ok=True)
    _put(f"{target}/conf.d/{CONF}", conf)
    _put(f"{DIRECTORY}/hba", "local all all trust\n")
    _put(f"{DIRECTORY}/ident", "")
    _link_files(found, conf)
    for directory, names, files in os.walk(target):
        for name in (".", *names, *files):
            shutil.chown(os.path.join(directory, name), found["user"], found["user"])


def _link_files(found: dict[str, Any], conf: str) -> None:
    """What lies in the data directory is read where it is: with its own owner and mode."""
    names = {"postgresql.auto.conf", "server.crt", "server.key", "root.crt", "root.crl"}
    for text in (conf, *map(_read, _foreign_files(found))):
        for name, value in __salt__["slmdb_conf.parse"](text).items():
            if name.startswith("ssl_") and name.endswith("_file"):
                names.add(os.path.normpath(value).split("/")[0])
    for name in sorted(names - {"", ".", ".."}):
        source, target = f"{found['data_directory']}/{name}", f"{DIRECTORY}/data/{name}"
        if not os.path.exists(source):
            continue
        if name == "postgresql.auto.conf":
            os.unlink(target)  # initdb's, which sets nothing
        if not os.path.lexists(target):
            os.symlink(source, target)


def _put(path: str, content: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(content)
    os.chmod(path, 0o644)


def _rehearse(
    found: dict[str, Any], directory: str, hba: str | None, ident: str | None
) -> dict[str, Any]:
    answer: dict[str, Any] = {"objections": [], "settings": {}, "rules": [], "maps": []}
    program = f"{found['bin_directory']}/postgres"
    with open(f"{directory}/log", "w+b") as log:
        server = subprocess.Popen(
            __salt__["slmdb_program.command"](program, *_options(found), end="QUIT"),
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            with _watched(server) as late:
                answer["objections"] = _greet(server, directory, answer, hba, ident)
            if late.is_set():
                answer["objections"] = [f"the server starts, but is stuck for {2 * PATIENCE} s"]
            elif server.poll() is not None:
                log.seek(0)
                answer["objections"] = _words(log.read().decode(errors="replace"))
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.send_signal(signal.SIGQUIT)
            server.wait()
    return answer


@contextlib.contextmanager
def _watched(server: subprocess.Popen) -> Iterator[threading.Event]:
    """End a server that does not let go of us in time; the event tells that it was ended."""
    late = threading.Event()

    def end() -> None:
        late.set()
        server.send_signal(signal.SIGQUIT)

    watchdog = threading.Timer(2 * PATIENCE, end)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield late
    finally:
        watchdog.cancel()


def _options(found: dict[str, Any]) -> list[str]:
    options = ["-D", f"{DIRECTORY}/data", "-c", f"config_file={DIRECTORY}/conf/postgresql.conf"]
    for name, value in _OWN.items():
        options += ["-c", f"{name}={value.format(DIRECTORY)}"]
    if int(found["version"]) >= 15:
        options += ["-c", "archive_library="]
    # The running server holds the huge pages that it will give back when it restarts: whether
    # there are enough of them is counted, not tried.
    return [*options, "-c", "huge_pages=off"] if int(found["version"]) >= 15 else options


def _greet(
    server: subprocess.Popen, directory: str, answer: dict, hba: str | None, ident: str | None
) -> list[str]:
    """Log in as soon as the server takes logins; return what stands in the way."""
    deadline = time.monotonic() + PATIENCE
    refused = "it did not answer"
    while server.poll() is None and time.monotonic() < deadline:
        try:
            # Without options: what sessions are given must let everybody work.
            connection = __salt__["slmdb_server.connect"](host=directory, port=PORT, options="")
        except CommandExecutionError as err:
            refused = str(err.strerror)
            if "FATAL" in refused and "starting up" not in refused:
                break
            time.sleep(0.05)
            continue
        return _ask(connection, directory, answer, hba, ident)
    return [f"the server starts, but refuses logins: {refused.partition('FATAL:')[2] or refused}"]


def _ask(
    connection: Any, directory: str, answer: dict, hba: str | None, ident: str | None
) -> list[str]:
    try:
        with contextlib.closing(connection):
            connection.autocommit = True
            _rows(connection, "CREATE ROLE rehearsal LOGIN")
            rows = _rows(connection, _ALL_SETTINGS)
            answer["settings"] = {row["name"].lower(): row for row in rows}  # TimeZone, DateStyle
            if hba is not None:
                _put(f"{directory}/hba.new", hba)
                os.replace(f"{directory}/hba.new", f"{directory}/hba")
                answer["rules"] = _rows(connection, "SELECT * FROM pg_hba_file_rules")
                _put(f"{directory}/hba", "local all all trust\n")
            if (
                ident is not None
                and int(answer["settings"]["server_version_num"]["setting"]) >= 150000
            ):
                _put(f"{directory}/ident", ident)
                answer["maps"] = _rows(connection, "SELECT * FROM pg_ident_file_mappings")
        overrides = {"host": directory, "port": PORT, "user": "rehearsal"}
        with contextlib.closing(__salt__["slmdb_server.connect"](**overrides)) as guest:
            guest.autocommit = True
            _rows(guest, "CREATE TEMPORARY TABLE rehearsal AS SELECT 1")
    except CommandExecutionError as err:
        words = str(err.strerror)
        words = words.partition("FATAL:")[2].strip() or words
        return [f"the server starts, but a role that is no superuser is refused: {words}"]
    except Exception as err:
        diag = getattr(err, "diag", None)
        words = getattr(diag, "message_primary", None) or type(err).__name__
        return [f"the server starts, but does no work: {words}"]
    return []


def _rows(connection: Any, statement: str) -> list[dict[str, Any]]:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        if cursor.description is None or cursor.rowcount < 0:
            return []
        if not statement.startswith("SELECT"):
            return []
        names = [column.name for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _place(match: re.Match[str]) -> str:
    """Where somebody else's mistake is; ours is named by its pillar path."""
    return "" if match[1] == CONF else f" ({match[1]}, line {match[2]})"


def _words(log: str) -> list[str]:
    """Return the server's complaints, each with its hint, without the path of the scratch files."""
    found: list[str] = []
    heard = ""
    for line in log.splitlines():
        match = _WORDS.search(line)
        if not match:
            continue
        level, words = match[1], match[2].strip()
        words = re.sub(rf' in file "{DIRECTORY}[^"]*/([^"/]+)" line (\d+)', _place, words)
        if level in ("HINT", "DETAIL"):
            if found:
                found[-1] += f" ({words})"
        elif "contains errors" in words:
            found += [heard] if heard and not found else []  # what a build lacks is only logged
        elif level != "LOG" or "parameter" in words or "syntax error" in words:
            found.append(words)
        heard = words
    return found or ["the server stopped without a word"]
