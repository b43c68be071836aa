"""
Backups, made and verified in every repository, one after the other.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_create"

log = logging.getLogger(__name__)

TYPES = {"full": "full", "differential": "diff", "incremental": "incr"}
# A backup is seldom larger than the last one of its kind, but it may be.
MARGIN = 1.2
PAUSE = 2
HELD = "Resource temporarily unavailable"  # pgBackRest's reason for a lock that another one holds
AHEAD = (
    "; set the clock right; if it was ahead when that one was made, "
    "slmdb_backup.create full goes on"
)


def __virtual__() -> str:
    return __virtualname__


def _name(row: dict[str, Any]) -> str:
    return f"repository {row['repository']} ({row['where']})"


def create(wanted: str, everywhere: bool = True, wait: float = 0) -> dict[str, Any]:
    """
    Make a backup in every repository.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_create.create full

    wanted
        ``full``, ``differential`` or ``incremental``.
    everywhere
        Whether every repository must have it; else one is enough, and the log names the others.
    wait
        Seconds to wait in each for another pgBackRest, a timer's backup for instance, to end.

    Returns the one of the first repository as ``slmdb_backup.list`` has it, and ``others``; any
    moment after that can be restored. Raises
    ``SaltInvocationError`` for another type; ``CommandExecutionError`` that names each repository
    that failed, and what was made in the others.
    """
    if wanted not in list(TYPES):
        raise SaltInvocationError(
            f"type: {wanted!r} is not a type of backup; allowed: {', '.join(TYPES)}"
        )
    __salt__["slmdb_backup.refuse_parked"]()
    repositories = __salt__["slmdb_backup_repository.described"]()
    if len(repositories) == 1:
        # Of several each is asked for itself by its backup: a dead one is not in the others' way.
        __salt__["slmdb_backup.settle"]()
    made, failed = [], []
    for row in repositories:
        try:
            made.append(_one(row, wanted, wait))
        except CommandExecutionError as err:
            if len(repositories) == 1:
                raise
            failed.append(f"{_name(row)}: {err}")
    if made and not everywhere:
        for line in failed:
            log.warning("slmdb_backup.create: %s", line)
    elif failed:
        done = [f"repository {row['repository']} has {row['label']}" for row in made]
        raise CommandExecutionError("; ".join(failed + done))
    _pass_its_second(made[-1])
    return {**made[0], "others": made[1:]}


def _pass_its_second(row: dict[str, Any]) -> None:
    """So that any moment from now on can be restored."""
    time.sleep(min(1, max(0, __salt__["slmdb_backup.complete"](row) - time.time())))


def _one(repository: dict[str, Any], wanted: str, wait: float) -> dict[str, Any]:
    number = repository["repository"]
    before = __salt__["slmdb_backup.rows"](number)
    full = [row for row in before if row["type"] == "full"]
    if repository["local"]:
        _refuse_without_room(repository, wanted if full else "full", before)
    try:
        seconds = _run(number, wanted, time.monotonic() + wait)
    except CommandExecutionError as err:
        advice = AHEAD if "is not later than latest backup label" in str(err) else ""
        raise CommandExecutionError(f"{err}{advice}") from None
    labels = {row["label"] for row in before}
    new = [row for row in __salt__["slmdb_backup.rows"](number) if row["label"] not in labels]
    if not new:
        raise CommandExecutionError("pgbackrest backup: it said yes but no new backup is listed")
    size = new[-1]["repository_bytes"]
    __salt__["slmdb_backup_progress.tell"](
        "backup", number, "done", label=new[-1]["label"], bytes=size, seconds=seconds
    )
    return new[-1]


def _run(number: int, wanted: str, deadline: float) -> float:
    """Let pgBackRest make it, as soon as no other one holds the repository's lock."""
    told = False
    while True:
        try:
            return __salt__["slmdb_backup_progress.run"](
                "backup", number, f"--type={TYPES[wanted]}"
            )
        except CommandExecutionError as err:
            if HELD not in str(err) or time.monotonic() > deadline:
                raise
        if not told:
            __salt__["slmdb_backup_progress.tell"]("backup", number, "waiting")
            told = True
        time.sleep(PAUSE)


def _refuse_without_room(
    repository: dict[str, Any], wanted: str, before: list[dict[str, Any]]
) -> None:
    """Compare the free space with the last backup of the kind, else with all of the data."""
    same = [row["repository_bytes"] for row in before if row["type"] == wanted]
    if same:
        needed = int(same[-1] * MARGIN)
    else:
        rows = __salt__["slmdb_server.query"](
            "SELECT sum(pg_database_size(oid))::bigint AS bytes FROM pg_database"
        )
        # Compressed it is smaller, but that is known only afterwards.
        needed = rows[0]["bytes"] // 2 if wanted == "full" else 0
    second = "second:" if repository["repository"] == 2 else ""
    __salt__["slmdb_disk.refuse"](
        repository["path"],
        f"the next {wanted} backup",
        needed,
        advice=f"make room, or lower backup:{second}retention",
        key=f"slm_database:backup:{second}path",
    )


def verify() -> dict[str, Any]:
    """
    Read every file of every repository and compare it with its checksum.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_create.verify

    Returns ``right``, ``problems`` and ``report``, as ``slmdb_backup.verify`` does, and remembers
    it for health. Raises nothing.
    """
    problems, texts = [], []
    repositories = __salt__["slmdb_backup_repository.described"]()
    for row in repositories:
        found, text = _verify(row["repository"])
        prefix = f"{_name(row)}: " if len(repositories) > 1 else ""
        problems += [f"{prefix}{line}" for line in found]
        texts.append(text.strip())
    __salt__["slmdb_backup_health.verified"](problems)
    return {"right": not problems, "problems": problems, "report": "\n".join(texts)}


def _verify(number: int) -> tuple[list[str], str]:
    tell = __salt__["slmdb_backup_progress.tell"]
    begun = time.monotonic()
    tell("verify", number, "begun")
    options = [f"--repo={number}", "--output=text", "--verbose"]
    try:
        text = __salt__["slmdb_pgbackrest.run"]("verify", *options)
        found = _wrong(text)
    except CommandExecutionError as err:
        text, found = "", [str(err)]
    state = "failed" if found else "done"
    tell("verify", number, state, seconds=round(time.monotonic() - begun, 1), problems=len(found))
    return found, text


def _wrong(text: str) -> list[str]:
    """
    The lines of a report that count something missing or invalid.

    A backup that is "in progress" runs, or was ended in the middle: the next one tidies it away.
    """
    found, part = [], ""
    for line in text.splitlines():
        heading = re.match(r"\s*(archiveId|backup): ([^,]+)", line)
        if heading:
            part = f"{heading[1]} {heading[2]}"
        trouble = re.findall(r"((?:missing|checksum invalid|size invalid|other): [1-9]\d*)", line)
        if trouble or re.search(r"status: invalid|ERROR", line):
            found.append(f"{part}: {line.strip()}".lstrip(": "))
    return found
