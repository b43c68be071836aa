"""
How far a long command of pgBackRest is: a line in Salt's log, and an event on the master's bus.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_progress"

log = logging.getLogger(__name__)

STEP = 10.0  # per cent, and seconds, between two lines
_PERCENT = re.compile(r" DETAIL: .*, (\d+(?:\.\d+)?)%\)")


def __virtual__() -> str:
    return __virtualname__


def tell(verb: str, repository: int, state: str, **said: Any) -> None:
    """
    Say how far something is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_progress.tell backup 1 running percent=40

    verb
        pgBackRest's command.
    repository
        The number of the repository.
    state
        ``begun``, ``running``, ``done`` or ``failed``.
    said
        What else: ``percent``, ``seconds``, ``label``, ``bytes`` or ``comment``.
    """
    words = ", ".join(f"{key} {value}" for key, value in said.items())
    log.info("slmdb %s, repository %s: %s%s", verb, repository, state, f": {words}" if said else "")
    data = {"verb": verb, "repository": repository, "state": state, **said}
    __salt__["slmdb_event.send"]("backup/progress", data)


class _Pace:
    """Passes on so many of the figures that a person can follow."""

    def __init__(self, verb: str, repository: int) -> None:
        self.verb, self.repository = verb, repository
        self.begun = self.at = time.monotonic()
        self.percent = 0.0

    def __call__(self, percent: float) -> None:
        now = time.monotonic()
        if percent - self.percent < STEP and now - self.at < STEP:
            return
        self.percent, self.at = percent, now
        tell(self.verb, self.repository, "running", percent=percent, seconds=self.seconds())

    def seconds(self) -> float:
        return round(time.monotonic() - self.begun, 1)


def run(verb: str, repository: int, *options: str) -> float:
    """
    Run a command of pgBackRest, and say meanwhile how far it is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_progress.run backup 1 --type=full

    verb
        ``backup`` or ``restore``.
    repository
        The number of the repository.
    options
        More options of pgBackRest.

    Returns the seconds that it took. Raises ``CommandExecutionError`` with its first error if it
    fails.
    """
    tell(verb, repository, "begun")
    pace = _Pace(verb, repository)
    try:
        __salt__["slmdb_pgbackrest.run"](verb, f"--repo={repository}", *options, told=pace)
    except CommandExecutionError as err:
        tell(verb, repository, "failed", comment=str(err), seconds=pace.seconds())
        raise
    return pace.seconds()


def listen(
    words: list[str], timeout: float | None, told: Callable[[float], None] | None
) -> tuple[int, str, str]:
    """
    Run a command line of pgBackRest, and pass on the per cent that it prints.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_progress.listen '["/usr/bin/pgbackrest", "version"]' 5 None

    words
        The command line.
    timeout
        Seconds; ``None``: as long as it takes, as always if somebody listens.
    told
        What is called with the per cent that are done, file by file; ``None``: nobody listens.

    Returns its status and what it wrote to both outputs, without the lines about files. Raises
    ``TimeoutExpired`` and ``OSError``; it has ended then.
    """
    with tempfile.TemporaryFile() as errors:
        process = _start(words, errors)
        try:
            if told:
                text = _without_files(process, told)
            else:
                text = process.communicate(timeout=timeout)[0]
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            _end_workers(process)
        errors.seek(0)
        return status, text, errors.read().decode(errors="replace")


def _end_workers(process: subprocess.Popen) -> None:
    """Workers whose main process was killed would hold its lock for another minute."""
    if process.returncode is not None and process.returncode < 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _start(words: list[str], errors: IO[bytes]) -> subprocess.Popen:
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}
    return subprocess.Popen(
        words,
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _without_files(process: subprocess.Popen, told: Callable[[float], None]) -> str:
    text = ""
    for line in process.stdout or ():
        match = _PERCENT.search(line)
        if match:
            told(float(match[1]))
        elif " DETAIL: " not in line:
            text += line
    return text
