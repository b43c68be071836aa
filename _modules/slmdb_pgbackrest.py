"""
pgBackRest: its configuration, its key, and how it is asked. No other module runs it.

The key is a file of its own in the directory that our configuration includes, so it is in no
argument list, no environment and no other file.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_pgbackrest"

PROGRAM = "/usr/bin/pgbackrest"
CONFIG = "/etc/pgbackrest/autobot-slm.conf"
INCLUDED = "/etc/pgbackrest/autobot-slm"
# By repository; and what else opens the second one.
KEYS = {1: f"{INCLUDED}/key.conf", 2: f"{INCLUDED}/key-2.conf"}
KEPT = ".kept"
CREDENTIALS = f"{INCLUDED}/repository-2.conf"
STANZA = "autobot-slm"
WORK = "/var/lib/autobot-slm-database/pgbackrest"
LOGS = "/var/log/pgbackrest"
SINCE = "/var/lib/autobot-slm-database/backups-since"
PATIENCE = 60
UNREADABLE = 99  # pgBackRest's status of a repository that it could not read
# Only so does a second repository that is dead not keep WAL from the first. What the process in the
# background would log, the one that the server waits for says as well.
ASYNCHRONOUS = ["", "[global:archive-push]", "archive-async=y", "log-level-file=off"]
CONFIGURED = [
    PROGRAM,
    f"--config={CONFIG}",
    f"--config-include-path={INCLUDED}",
    f"--stanza={STANZA}",
]
# A line that ends with a colon goes on in the next.
_ERROR = re.compile(r"ERROR: \[\d+\]: ((?:.*:\n)*.*)")
_CAUSE = re.compile(r"WARN: unable to check pg1: (?:\[\w+\] )?(.*)")


def __virtual__() -> str:
    return __virtualname__


def _get(*keys: str) -> Any:
    return __salt__["slmdb_pillar.get"]("backup", *keys)


def settings() -> dict[str, str]:
    """
    Return the server's settings that archive its WAL; while ``backup:enabled`` is false, nowhere.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.settings

    Returns name to value. Raises what wrong settings raise.
    """
    if not _get("enabled"):
        # archive_mode ends with a restart; until then a server without a command keeps all WAL.
        return {"archive_command": "/bin/true"}
    return {
        "wal_level": "replica",
        "archive_mode": "on",
        # Its words go where health finds them, whoever collects the server's own.
        "archive_command": f"{' '.join(CONFIGURED)} archive-push %p 2>>{logs()}-archive-push.log",
        "archive_timeout": "5min",
    }


def key(number: int) -> str:
    """
    Return the path of a repository's key.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.key 1

    number
        The repository.
    """
    return KEYS[number]


def credentials_file() -> str:
    """
    Return the path of the file that holds what opens the second repository.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.credentials_file
    """
    return CREDENTIALS


def work() -> str:
    """
    Return a directory that belongs to the server's user, for what lasts a moment.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.work
    """
    return WORK


def stanza() -> str:
    """
    Return the name under which the repositories know our instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.stanza
    """
    return STANZA


def logs() -> str:
    """
    Return how the paths of our logs begin; ``-backup.log`` and the like follow.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.logs
    """
    return f"{LOGS}/{STANZA}"


def since() -> float | None:
    """
    Return when the first apply with backups on was, in seconds since the epoch.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.since

    Returns ``None`` if there was none, or they were switched off after it. Raises
    ``CommandExecutionError`` if it cannot be read.
    """
    try:
        return float(__salt__["slmdb_file.read"](SINCE) or b"")
    except ValueError:
        return None


def repositories() -> list[int]:
    """
    Return the numbers of the configured repositories, as pgBackRest counts them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.repositories

    Raises what wrong settings raise.
    """
    return [row["repository"] for row in __salt__["slmdb_backup_repository.described"]()]


def refuse_unknown(repository: Any) -> None:
    """
    Refuse the number of a repository that there is not.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.refuse_unknown 1

    repository
        A number.

    Returns nothing. Raises ``SaltInvocationError`` with those that there are.
    """
    numbers = repositories()
    if repository not in numbers:
        raise SaltInvocationError(
            f"repository: there is no repository {repository!r}; "
            f"allowed: {', '.join(map(str, numbers))}"
        )


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
        *__salt__["slmdb_backup_repository.lines"](),
        "compress-type=zst",
        "start-fast=y",
        f"archive-push-queue-max={_get('queue_limit').replace(' ', '')}",
        f"lock-path={WORK}/lock",
        f"spool-path={WORK}/spool",
        f"log-path={LOGS}",
        "log-level-console=off",
        *(ASYNCHRONOUS if len(repositories()) > 1 else []),
        "",
        f"[{STANZA}]",
        f"pg1-path={found['data_directory']}",
        f"pg1-port={__salt__['slmdb_lastgood.port']()}",
        f"pg1-socket-path={found['socket_directory']}",
        f"pg1-user={found['user']}",
    ]
    return "\n".join(lines) + "\n"


def _directories() -> dict[str, tuple[str, str, int]]:
    """Path to owner, group and mode."""
    user = __salt__["slmdb_instance.facts"]()["user"]
    made = {
        INCLUDED: ("root", user, 0o750),
        WORK: (user, user, 0o750),
        LOGS: (user, user, 0o750),
    }
    for row in __salt__["slmdb_backup_repository.described"]():
        if row["local"]:
            made[row["path"]] = (user, user, 0o750)
    return made


def _files() -> dict[str, bytes | None]:
    """Path to the wanted content of what only root and the server read; None: no such file."""
    files: dict[str, bytes | None] = {CONFIG: config().encode()}
    encrypted = __salt__["slmdb_backup_repository.encrypted"]()
    for number, path in KEYS.items():
        kept = path + KEPT
        present = __salt__["slmdb_file.read"](path) or __salt__["slmdb_file.read"](kept)
        made = f"[global]\nrepo{number}-cipher-pass={secrets.token_urlsafe(48)}\n".encode()
        # A key is never thrown away, but pgBackRest takes its presence for that of its repository.
        files[path] = (present or made) if number in encrypted else None
        files[kept] = None if number in encrypted else present
    credentials = __salt__["slmdb_backup_repository.credentials"]()
    files[CREDENTIALS] = credentials.text if credentials else None
    return files


def differences() -> dict[str, Any]:
    """
    Compare pgBackRest's configuration, key and directories with what they should be.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs; while ``backup:enabled`` is
    false, only that limits no longer count. Raises ``CommandExecutionError`` if a repository is
    there and its key is not, or one is gone that was there before.
    """
    since = __salt__["slmdb_file.differences"](SINCE, None)
    if not _get("enabled"):
        return since
    __salt__["slmdb_backup_repository.refuse_old"]()
    __salt__["slmdb_backup_presence.refuse_lost"]()
    changes: dict[str, Any] = {} if since else {SINCE: {"old": None, "new": "present"}}
    for path in _barred():
        changes[path] = {"old": "closed to the server", "new": "the server's"}
    for path, (owner, *_) in _directories().items():
        if not os.path.isdir(path):
            changes[path] = {"old": None, "new": "a directory"}
        elif before := _another_owner(path, owner):
            changes[f"{path}: user"] = {"old": before, "new": owner}
    user = __salt__["slmdb_instance.facts"]()["user"]
    for path, data in _files().items():
        changes.update(__salt__["slmdb_file.differences"](path, data, "root", user, "0640"))
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
    if not _get("enabled"):
        __salt__["slmdb_file.remove"](SINCE)
        return
    user = __salt__["slmdb_instance.facts"]()["user"]
    for path in _barred():
        _give(path, user)
    for path, (owner, group, mode) in _directories().items():
        if not os.path.isdir(path) or _another_owner(path, owner):
            _make(path, owner, group, mode)
    # What is removed goes last: it may be the only copy of a key that will be kept elsewhere.
    for path, data in sorted(_files().items(), key=lambda file: file[1] is None):
        if data is None:
            __salt__["slmdb_file.remove"](path)
        else:
            __salt__["slmdb_file.write"](path, data, "root", user, "0640")
    if not os.path.exists(SINCE):
        __salt__["slmdb_file.write"](SINCE, f"{int(time.time())}\n".encode(), mode="0640")


def _another_owner(path: str, owner: str) -> str | None:
    """Whose an empty directory is, such as a disk that was just mounted, if not its owner's."""
    try:
        before, _ = __salt__["slmdb_file.owners"](os.stat(path))
        return before if before != owner and set(os.listdir(path)) <= {"lost+found"} else None
    except OSError:
        return None


def _barred() -> list[str]:
    """Directories of repositories of this host that the server cannot use, as after a copy."""
    rows = __salt__["slmdb_backup_repository.described"]()
    barred = __salt__["slmdb_backup_repository.barred"]
    return [path for row in rows if row["local"] for path in barred(row["path"])]


def _give(path: str, user: str) -> None:
    """What is below goes along only if all of it is our stanza's."""
    top, account = os.path.realpath(path), pwd.getpwnam(user)
    below = os.walk(top) if os.path.basename(path) == STANZA else [(top, [], [])]
    try:
        for place, _, names in below:
            os.chmod(place, os.stat(place).st_mode | 0o700)
            for one in (place, *(os.path.join(place, name) for name in names)):
                os.chown(one, account.pw_uid, account.pw_gid, follow_symlinks=False)
    except OSError as err:
        raise CommandExecutionError(f"{path}: cannot be given to {user}: {err.strerror}") from err


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
        Its options, and its parameters, which do not begin with a hyphen.

    A backup in a repository host is made by that host, which is told over SSH.
    """
    away = verb == "backup" and "--repo=2" in options
    start = __salt__["slmdb_backup_repository.remote"]() if away else []
    if start:
        return [*start, f"--stanza={STANZA}", *options, verb]
    parameters = [word for word in options if not word.startswith("-")]
    flags = [word for word in options if word.startswith("-")]
    return [*CONFIGURED, *flags, verb, *parameters]


def run(
    verb: str,
    *options: str,
    timeout: float | None = None,
    told: Callable[[float], None] | None = None,
) -> str:
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
    told
        For callers in Python: what is called with the per cent that are done, file by file.

    Returns what it printed. Raises ``CommandExecutionError`` with its first error if it fails.
    """
    if not os.path.exists(CONFIG):
        raise CommandExecutionError(
            f"{CONFIG} does not exist; set slm_database:backup:enabled and apply the formula"
        )
    __salt__["slmdb_backup_presence.refuse_hanging"](_number(options))
    detail = ["--log-level-console=detail"] if told else []
    words = __salt__["slmdb_program.command"](
        *line(verb, *options, *detail, "--log-level-stderr=warn")
    )
    try:
        status, text, said = __salt__["slmdb_backup_progress.listen"](words, timeout, told)
    except subprocess.TimeoutExpired:
        raise CommandExecutionError(f"pgbackrest {verb} took longer than {timeout} s") from None
    except OSError as err:
        raise CommandExecutionError(f"pgbackrest cannot be run: {err.strerror}") from err
    if status:
        killed = __salt__["slmdb_program.fate"](status)
        why = f"it {killed}" if killed else _why(said + text, options)
        raise CommandExecutionError(f"pgbackrest {verb}: {why}")
    return text


def _number(options: Sequence[str]) -> int | None:
    """The repository that options name."""
    return next((int(word[7:]) for word in options if word.startswith("--repo=")), None)


def _why(text: str, options: Sequence[str]) -> str:
    """The first error in one line, with advice where the words alone would mislead."""
    path = key(_number(options) or 1)
    # A log of what it does begins with its options, and those speak of ciphers.
    text = "\n".join(line for line in text.splitlines() if " INFO: " not in line)
    cause = _CAUSE.search(text)
    reasons = [cause[1]] if cause else errors(text)
    # What another key makes of a file is noise, and now and then no text at all.
    if re.search("cipher|decrypt|flush|\N{REPLACEMENT CHARACTER}", text):
        wrong = "is not the key that it was made with"
        missing = "is missing, which is its key; bring the copy of it back"
        return f"the repository cannot be read: {path} {wrong if os.path.exists(path) else missing}"
    return (reasons or text.strip().splitlines()[-1:] or ["no output"])[0]


def errors(text: str) -> list[str]:
    """
    Return the errors in pgBackRest's words, each in one line.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.errors 'ERROR: [103]: unable to find a valid repository'

    text
        What it wrote.
    """
    return [" ".join(words.split()) for words in _ERROR.findall(text)]


def info(timeout: float | None = None, repository: int = 1) -> dict[str, Any]:
    """
    Return what pgBackRest says of our stanza in one repository.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.info

    timeout
        Seconds; ``None``: as long as it takes.
    repository
        Its number.

    Returns pgBackRest's own structure: ``status``, ``archive``, ``backup``, ``repo`` and more.
    Raises ``CommandExecutionError`` if it fails.
    """
    options = [f"--repo={repository}", "--output=json"]
    # What it cannot decrypt it quotes as it is, control characters and all.
    answer = json.loads(run("info", *options, timeout=timeout) or "[]", strict=False)
    for one in answer[0].get("repo", []) if answer else []:
        if one["status"]["code"] == UNREADABLE:
            raise CommandExecutionError(_why(one["status"]["message"], options))
    rows = __salt__["slmdb_backup_repository.described"]()
    if any(row["repository"] == repository and row["type"] == "host" for row in rows):
        __salt__["slmdb_backup_health.answered"](answer[0].get("backup", []) if answer else [])
    missing = {"status": {"code": 1, "message": "missing stanza"}}
    found = answer[0] if answer else missing
    return {"archive": [], "backup": [], "repo": [], "db": [], **found}


def missing_stanza() -> dict[str, Any]:
    """
    Compare the repositories with "they know this instance".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.missing_stanza

    Returns ``{what: {"old": …, "new": …}}``, empty if they do or ``backup:enabled`` is false.
    Raises ``CommandExecutionError`` if the first cannot be read, one is another instance's, or one
    did know it and does not any more.
    """
    if not _get("enabled"):
        return {}
    wanted, known = {}, __salt__["slmdb_pgbackrest_known.known"]
    for number in repositories():
        if not os.path.exists(CONFIG) or not known(number):
            where = "" if number == 1 else f" in repository {number}"
            wanted[f"stanza {STANZA}{where}"] = {"old": None, "new": "present"}
    return {**wanted, **__salt__["slmdb_backup_presence.differences"]()}


def create_stanza() -> None:
    """
    Make the repositories know this instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.create_stanza

    Raises ``CommandExecutionError`` with pgBackRest's words if one of them cannot; those before it
    know the instance then.
    """
    deadline = time.monotonic() + PATIENCE
    try:
        while not _stanza_created(time.monotonic() < deadline):
            time.sleep(0.5)
    finally:
        __salt__["slmdb_backup_presence.remember"]()


def _stanza_created(again: bool) -> bool:
    """Archiving in the background holds a lock now and then, most while it does not succeed."""
    try:
        run("stanza-create")
    except CommandExecutionError as err:
        if again and "acquire lock" in err.strerror:
            return False
        raise
    return True


def leftovers() -> dict[str, Any]:
    """
    Name what ``apply`` left on the host and goes with ``clean``; repositories and keys stay.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.leftovers

    Returns ``{what: {"old": …, "new": …}}``. Raises ``CommandExecutionError`` if it cannot be read.
    """
    changes: dict[str, Any] = {}
    for path in (CONFIG, CREDENTIALS):
        changes.update(__salt__["slmdb_file.differences"](path, None))
    return changes


def remove() -> None:
    """
    Remove our configuration of pgBackRest; repositories and keys stay.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pgbackrest.remove

    Raises ``CommandExecutionError`` if it cannot be removed.
    """
    for path in (CONFIG, CREDENTIALS):
        __salt__["slmdb_file.remove"](path)
