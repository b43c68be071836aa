"""
Programs that are run beside Salt: with an environment of their own, never by a shell, and with one
line of why if they fail.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_program"

# What the server said counts more than what a program makes of it.
_ERRORS = (re.compile(r"(?:ERROR|FATAL): *(.+)"), re.compile(r"error: *(.+)"))


def __virtual__() -> str:
    return __virtualname__


def command(*words: str, end: str = "TERM") -> list[str]:
    """
    Return a command line that runs as the server's user and ends with us.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_program.command id

    words
        The program and its arguments.
    end
        The signal by which it ends.

    Returns words. Raises ``CommandExecutionError`` if the instance's facts cannot be told.
    """
    user = __salt__["slmdb_instance.facts"]()["user"]
    become = ["--reuid", user, "--regid", user, "--init-groups", "--pdeathsig", end]
    return ["setpriv", *become, "--", *words]


def listen(
    *words: str,
    as_server: bool = False,
    before: Sequence[str] = (),
    umask: int = -1,
    environment: dict[str, str] | None = None,
    timeout: float | None = None,
) -> tuple[int, str, str]:
    """
    Run a program to its end, whatever that is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_program.listen /usr/bin/id as_server=True

    words
        The program and its arguments.
    as_server
        Whether it runs as the server's user, and ends with us; else as whoever runs Salt.
    before
        Words that start it with another priority, say.
    umask
        Its mask of permissions; -1: ours.
    environment
        What it needs besides the path and a language that everybody reads.
    timeout
        Seconds after which it is killed; ``None``: it has all the time that it needs.

    Returns its status, and what it wrote to its output and as errors. Raises
    ``CommandExecutionError`` if it cannot be run, or is killed for taking too long.
    """
    line = [*before, *words]
    if as_server:
        line = command(*line)
    path = os.environ.get("PATH", "/usr/bin:/bin")
    try:
        done = subprocess.run(
            line,
            cwd="/",
            env={"PATH": path, "LC_ALL": "C.UTF-8", **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            umask=umask,
            timeout=timeout,
            check=False,
        )
    except OSError as err:
        raise CommandExecutionError(f"{words[0]} cannot be run: {err.strerror}") from err
    except subprocess.TimeoutExpired:
        raise CommandExecutionError(f"{words[0]} did not end within {timeout} s") from None
    return done.returncode, done.stdout, done.stderr


def run(*words: str, **how: Any) -> str:
    """
    Run a program that has to do well.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_program.run /usr/bin/id as_server=True

    words
        The program and its arguments.
    how
        As for ``listen``.

    Returns its output, without the space around it. Raises ``CommandExecutionError`` with its first
    error in one line if it fails, or cannot be run.
    """
    status, output, errors = listen(*words, **how)
    if status:
        name = os.path.basename(words[0])
        killed = fate(status)
        raise CommandExecutionError(
            f"{name} {killed}" if killed else f"{name}: {_why(errors or output, status)}"
        )
    return output.strip()


def fate(status: int | None) -> str:
    """
    Say of a program that a signal ended that it was that.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_program.fate -9

    status
        Its status as Python has it, a signal as a negative number; ``None``: unknown.

    Returns words that follow its name, empty if no signal ended it. Raises nothing.
    """
    if status is None or status >= 0:
        return ""
    memory = " (out of memory? journalctl -k tells)" if status == -signal.SIGKILL else ""
    return f"was killed by signal {-status}{memory}"


def _why(text: str, status: int) -> str:
    """The first error, else the last line there is."""
    for pattern in _ERRORS:
        found = pattern.search(text)
        if found:
            return found[1]
    return (text.strip().splitlines() or [f"ended with {status}"])[-1]
