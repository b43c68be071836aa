"""
pgBackRest: its configuration, its key, and how it is asked. No other module runs it.

The key is a file of its own in the directory that our configuration includes, so it is in no
argument list, no environment and no other file.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from typing import Any

from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_pgbackrest"

PROGRAM = "/usr/bin/pgbackrest"
CONFIG = "/etc/pgbackrest/autobot-slm.conf"
INCLUDED = "/etc/pgbackrest/autobot-slm"
KEY = f"{INCLUDED}/key.conf"
STANZA = "autobot-slm"
WORK = "/var/lib/autobot-slm-database/pgbackrest"
LOGS = "/var/log/pgbackrest"
UNREADABLE = 99  # pgBackRest's status of a repository that it could not read
CONFIGURED = [
    PROGRAM,
    f"--config={CONFIG}",
    f"--config-include-path={INCLUDED}",
    f"--stanza={STANZA}",
]
_ERROR = re.compile(r"ERROR: \[\d+\]: (.*)")
_CAUSE = re.compile(r"WARN: unable to check pg1: (?:\[\w+\] )?(.*)")


def __virtual__() -> str:
    return __virtualname__


def _get(*keys: str) -> Any:
    return __salt__["slmdb_pillar.get"]("backup", *keys)


def settings() -> dict[str, str]:
    """
    Return the server's settings that archive its WAL; none while ``backup:enabled`` is false.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.settings

    Returns name to value. Raises what wrong settings raise.
    """
    if not _get("enabled"):
        return {}
    return {
        "wal_level": "replica",
        "archive_mode": "on",
        "archive_command": " ".join([*CONFIGURED, "archive-push %p"]),
        "archive_timeout": "5min",
    }


def config() -> str:
    """
    Return the text of pgBackRest's configuration; the key is not in it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.config

    Raises ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    found = __salt__["slmdb_instance.facts"]()
    lines = [
        "# Written by the slm_database formula; changes are lost.",
        "[global]",
        f"repo1-path={_get('path')}",
        f"repo1-cipher-type={'aes-256-cbc' if _get('encryption') else 'none'}",
        f"repo1-retention-full={_get('retention', 'full')}",
        f"repo1-retention-diff={_get('retention', 'differential')}",
        "compress-type=zst",
        "start-fast=y",
        f"archive-push-queue-max={_get('queue_limit').replace(' ', '')}",
        f"lock-path={WORK}/lock",
        f"spool-path={WORK}/spool",
        f"log-path={LOGS}",
        "log-level-console=off",
        "",
        f"[{STANZA}]",
        f"pg1-path={found['data_directory']}",
        f"pg1-port={found['port']}",
        f"pg1-socket-path={found['socket_directory']}",
        f"pg1-user={found['user']}",
    ]
    return "\n".join(lines) + "\n"


def _directories() -> dict[str, tuple[str, str, int]]:
    """Path to owner, group and mode."""
    user = __salt__["slmdb_instance.facts"]()["user"]
    return {
        INCLUDED: ("root", user, 0o750),
        WORK: (user, user, 0o750),
        LOGS: (user, user, 0o750),
        _get("path"): (user, user, 0o750),
    }


def _lost_key() -> bool:
    """Tell whether there is a repository that was made with a key that is gone."""
    if not _get("encryption") or os.path.exists(KEY):
        return False
    return os.path.isdir(os.path.join(_get("path"), "archive", STANZA))


def differences() -> dict[str, Any]:
    """
    Compare pgBackRest's configuration, key and directories with what they should be.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs or ``backup:enabled`` is
    false. Raises ``CommandExecutionError`` if a repository is there and its key is not.
    """
    if not _get("enabled"):
        return {}
    if _lost_key():
        raise CommandExecutionError(
            f"slm_database:backup: {_get('path')} holds a repository but its key {KEY} is missing; "
            "bring the copy of the key back, or move the repository away"
        )
    changes: dict[str, Any] = {}
    for path in _directories():
        if not os.path.isdir(path):
            changes[path] = {"old": None, "new": "a directory"}
    user = __salt__["slmdb_instance.facts"]()["user"]
    changes.update(
        __salt__["slmdb_file.differences"](CONFIG, config().encode(), "root", user, "0640")
    )
    if _get("encryption"):
        present = __salt__["slmdb_file.read"](KEY)
        changes.update(
            __salt__["slmdb_file.differences"](KEY, present or b"", "root", user, "0640")
        )
    return changes


def apply() -> None:
    """
    Write pgBackRest's configuration, and make its directories and, once, its key.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.apply

    Raises ``CommandExecutionError`` if a file cannot be written, or a repository's key is missing.
    """
    if not differences():
        return
    user = __salt__["slmdb_instance.facts"]()["user"]
    for path, (owner, group, mode) in _directories().items():
        if not os.path.isdir(path):
            _make(path, owner, group, mode)
    __salt__["slmdb_file.write"](CONFIG, config().encode(), "root", user, "0640")
    if _get("encryption"):
        made = f"[global]\nrepo1-cipher-pass={secrets.token_urlsafe(48)}\n".encode()
        present = __salt__["slmdb_file.read"](KEY)
        __salt__["slmdb_file.write"](KEY, present or made, "root", user, "0640")


def _make(path: str, owner: str, group: str, mode: int) -> None:
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
        shutil.chown(path, owner, group)
        os.chmod(path, mode)
    except OSError as err:
        raise CommandExecutionError(f"{path}: cannot be made: {err.strerror}") from err


def line(verb: str, *options: str) -> list[str]:
    """
    Return a command line of pgBackRest with our configuration, for whoever runs as the server.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.line backup

    verb
        pgBackRest's command.
    options
        Its options.
    """
    return [*CONFIGURED, *options, verb]


def command(*words: str) -> list[str]:
    """
    Return a command line that runs as the server's user and ends with us.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.command id

    words
        The program and its arguments.
    """
    user = __salt__["slmdb_instance.facts"]()["user"]
    become = ["--reuid", user, "--regid", user, "--init-groups", "--pdeathsig", "TERM"]
    return ["setpriv", *become, "--", *words]


def run(verb: str, *options: str, timeout: float | None = None) -> str:
    """
    Run a command of pgBackRest with our configuration, as the server's user.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.run info

    verb
        pgBackRest's command.
    options
        Its options.
    timeout
        Seconds; ``None``: as long as it takes.

    Returns what it printed. Raises ``CommandExecutionError`` with its first error if it fails.
    """
    if not os.path.exists(CONFIG):
        raise CommandExecutionError(
            f"{CONFIG} does not exist; set slm_database:backup:enabled and apply the formula"
        )
    words = command(*line(verb, *options, "--log-level-stderr=warn"))
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            words,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CommandExecutionError(f"pgbackrest {verb} took longer than {timeout} s") from None
    except OSError as err:
        raise CommandExecutionError(f"pgbackrest cannot be run: {err.strerror}") from err
    if done.returncode:
        raise CommandExecutionError(f"pgbackrest {verb}: {_why(done.stderr + done.stdout)}")
    return done.stdout


def _why(text: str) -> str:
    """The first error in one line, with advice where the words alone would mislead."""
    match = _CAUSE.search(text) or _ERROR.search(text)
    # What another key makes of a file is noise, and now and then no text at all.
    if re.search(r"cipher|decrypt|flush", text) or "\N{REPLACEMENT CHARACTER}" in text:
        return f"the repository cannot be read: {KEY} is not the key that it was made with"
    return match[1] if match else (text.strip().splitlines() or ["no output"])[-1]


def info(timeout: float | None = None) -> dict[str, Any]:
    """
    Return what pgBackRest says of our stanza.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.info

    timeout
        Seconds; ``None``: as long as it takes.

    Returns pgBackRest's own structure: ``status``, ``archive``, ``backup``, ``repo`` and more.
    Raises ``CommandExecutionError`` if it fails.
    """
    # What it cannot decrypt it quotes as it is, control characters and all.
    answer = json.loads(run("info", "--output=json", timeout=timeout) or "[]", strict=False)
    for repository in answer[0].get("repo", []) if answer else []:
        if repository["status"]["code"] == UNREADABLE:
            raise CommandExecutionError(_why(repository["status"]["message"]))
    missing = {"status": {"code": 1, "message": "missing stanza"}}
    found = answer[0] if answer else missing
    return {"archive": [], "backup": [], "repo": [], **found}


def missing_stanza() -> dict[str, Any]:
    """
    Compare the repository with "it knows this instance".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.missing_stanza

    Returns ``{what: {"old": …, "new": …}}``, empty if it does or ``backup:enabled`` is false.
    Raises ``CommandExecutionError`` if the repository cannot be read.
    """
    if not _get("enabled"):
        return {}
    wanted = {f"stanza {STANZA}": {"old": None, "new": "present"}}
    if not os.path.exists(CONFIG):
        return wanted
    codes = [one["status"]["code"] for one in info()["repo"]]
    known = codes and all(code in (0, 2) for code in codes)
    return {} if known else wanted


def create_stanza() -> None:
    """
    Make the repository know this instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.create_stanza

    Raises ``CommandExecutionError`` with pgBackRest's words, for instance if the repository is
    another instance's.
    """
    run("stanza-create")


def leftovers() -> dict[str, Any]:
    """
    Name what ``apply`` left on the host and goes with ``clean``; repository and key stay.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.leftovers

    Returns ``{what: {"old": …, "new": …}}``. Raises ``CommandExecutionError`` if it cannot be read.
    """
    return __salt__["slmdb_file.differences"](CONFIG, None)


def remove() -> None:
    """
    Remove our configuration of pgBackRest; repository and key stay.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.remove

    Raises ``CommandExecutionError`` if it cannot be removed.
    """
    __salt__["slmdb_file.remove"](CONFIG)
