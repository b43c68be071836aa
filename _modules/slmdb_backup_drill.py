"""
The drill: a backup is restored, started, compared with its source, and thrown away.

The source is read, and gets one empty transaction as a marker, which leaves nothing in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_backup_drill"

RECORD = "/var/lib/autobot-slm-database/drill.json"
# Held while a drill runs; names the directory in use, for whoever cleans up after a kill.
LOCK = "/var/lib/autobot-slm-database/drill.lock"
SHOWN = 20
MARGIN = 1.1
PATIENCE = 10
UNARCHIVED = """
SELECT min(name) AS wal
  FROM pg_ls_waldir(), pg_stat_archiver
 WHERE name ~ '^[0-9A-F]{24}$' AND name > coalesce(last_archived_wal, '')
   AND name <= pg_walfile_name(pg_current_wal_insert_lsn())
"""
_COMMIT = re.compile(r"desc: COMMIT (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")


def __virtual__() -> str:
    return __virtualname__


class _Bound(threading.Thread):
    """Ends the drill's own processes when the disk would hold less than must stay free."""

    def __init__(self, directory: str, least: int) -> None:
        super().__init__(daemon=True)
        self.directory, self.least = directory, least
        self.free, self.end_them = __salt__["slmdb_disk.free"], __salt__["slmdb_backup_scratch.end"]
        self.over, self.crossed = threading.Event(), False

    def run(self) -> None:
        while not self.over.wait(0.3):
            if (self.free(os.path.dirname(self.directory)) or 0) < self.least:
                self.crossed = True
                self.end_them(self.directory)

    def line(self) -> str:
        least = self.least // 1024**2
        return f"{self.directory}: stopped, {least} MiB must stay free (drill:keep_free)"


def _least(directory: str) -> int:
    """What must stay free, in bytes: a share of the disk, or a size."""
    wanted = __salt__["slmdb_pillar.get"]("backup", "drill", "keep_free")
    if wanted.endswith("%"):
        seen = os.statvfs(os.path.dirname(directory))
        return seen.f_blocks * seen.f_frsize * int(wanted[:-1]) // 100
    return int(__salt__["slmdb_conf.normal"](wanted, "integer", "B"))


def _utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _record() -> dict[str, Any]:
    try:
        with open(RECORD, encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def last() -> dict[str, Any]:
    """
    Return what the last drill found, and the last one that proved a backup.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_drill.last

    Returns ``last`` and ``proven``, each what ``run`` returned then, or ``None``. Raises nothing.
    """
    found = _record()
    return {name: found.get(name) for name in ("last", "proven")}


def _remember(answer: dict[str, Any]) -> None:
    known = _record()
    drilled = {**known.get("drilled", {}), str(answer["repository"]): answer["at"]}
    proven = answer if answer["proven"] else known.get("proven")
    data = {"last": answer, "proven": proven, "drilled": drilled}
    __salt__["slmdb_file.remember"](RECORD, data, mode="0640")


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """
    One drill at a time; what a killed one left is thrown away first, which may take a while to be
    gone, at its priority.
    """
    with __salt__["slmdb_file.alone"](LOCK, "drill", PATIENCE) as lock:
        discard = __salt__["slmdb_backup_scratch.discard"]
        for path in sorted({lock.read().strip(), directory} - {""}):
            discard(path)
        lock.seek(0)
        lock.truncate()
        lock.write(directory)
        lock.flush()
        try:
            yield
        finally:
            discard(directory)


@contextlib.contextmanager
def _last_in_line() -> Iterator[None]:
    """Whatever the drill starts gets processor and disk only when nobody else wants them."""
    before, own = os.getpriority(os.PRIO_PROCESS, 0), str(os.getpid())
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    subprocess.run(["ionice", "-c", "3", "-p", own], capture_output=True, check=False)
    try:
        yield
    finally:
        subprocess.run(["ionice", "-c", "0", "-p", own], capture_output=True, check=False)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def _turn(wanted: int | None) -> int:
    """
    The repository that is asked for, else, of those that have a backup, the one whose last drill is
    the longest ago: so each is proven in its turn, and one that is dead or new stops no drill.
    """
    numbers = __salt__["slmdb_pgbackrest.repositories"]()
    drilled = _record().get("drilled", {})
    if wanted is None:
        usable = _with_backups() or set(numbers)
        return min(usable, key=lambda number: (drilled.get(str(number), ""), number))
    __salt__["slmdb_pgbackrest.refuse_unknown"](wanted)
    return wanted


def _with_backups() -> set[int]:
    try:
        return {row["repository"] for row in __salt__["slmdb_backup.list"]()}
    except CommandExecutionError:
        return set()  # the drill itself fails with the reason, and that is remembered


def _tell(step: str, state: str, said: str = "") -> None:
    __salt__["slmdb_event.tell"]("drill", step, state, said)


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    _tell(name, "begun")
    try:
        yield
    except CommandExecutionError as err:
        _tell(name, "failed", str(err))
        raise
    _tell(name, "done")


def run(repository: int | None = None) -> dict[str, Any]:
    """
    Restore the latest backup and its WAL into a throw-away instance, look, and throw it away.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_backup_drill.run

    repository
        Its number; ``None``: of those that have a backup the one whose last drill is the longest
        ago.

    Returns ``at`` (UTC), ``proven``, ``problems`` (lines), ``label``, ``repository``, ``marker``
    (its transaction and WAL segment), ``rpo_seconds``, ``rto_seconds``, ``seconds``, ``network``
    (whether the copy had one), ``checksums``, and how many ``databases``, ``tables`` and ``rows``
    were read, and tables were ``equal`` to the source's, ``written`` since, or ``locked`` there.
    Raises ``SaltInvocationError`` for another number, ``CommandExecutionError`` while another drill
    runs.
    """
    number = _turn(repository)
    directory = __salt__["slmdb_backup_scratch.place"]()
    answer: dict[str, Any] = {"at": _utc(), "proven": False, "problems": [], "label": None}
    answer |= {"repository": number, "marker": None, "rpo_seconds": None, "rto_seconds": None}
    began = time.monotonic()
    with _alone(directory), _last_in_line():
        _tell("drill", "begun", f"repository {number}")
        try:
            answer["problems"] = _drill(directory, answer)
        except CommandExecutionError as err:
            answer["problems"] = [str(err)]
        finally:
            __salt__["slmdb_server.forget"]()
    answer["seconds"] = round(time.monotonic() - began, 1)
    answer["proven"] = not answer["problems"]
    _remember(answer)
    said = "; ".join(answer["problems"][:3]) or f"backup {answer['label']} can be restored"
    _tell("drill", "done" if answer["proven"] else "failed", said)
    return answer


def _drill(directory: str, answer: dict[str, Any]) -> list[str]:
    chosen = _chosen(answer["repository"])
    answer["label"] = chosen["label"]
    least = _least(directory)
    __salt__["slmdb_disk.refuse"](
        os.path.dirname(directory),
        "the drill",
        chosen["bytes"] * MARGIN,
        advice="make room, or set slm_database:backup:drill (directory, keep_free)",
        keep=least,
    )
    with _step("marker"):
        before = __salt__["slmdb_backup_compare.source"]()
        _mark(answer)
    bound = _Bound(directory, least)
    bound.start()
    try:
        return _tried(directory, chosen, before, answer)
    except CommandExecutionError:
        if bound.crossed:
            raise CommandExecutionError(bound.line()) from None
        raise
    finally:
        bound.over.set()
        bound.join()


def _chosen(number: int) -> dict[str, Any]:
    rows = [row for row in __salt__["slmdb_backup.list"]() if row["repository"] == number]
    if not rows:
        raise CommandExecutionError(
            f"there is no backup in repository {number} yet; slmdb_backup.create makes one"
        )
    way = __salt__["slmdb_timeline.branch"]()
    rows = __salt__["slmdb_timeline.leading"](rows, way, f" in repository {number}")
    newest = max(rows, key=lambda row: (row["stopped"], row["label"]))
    found = {"label": newest["label"], "repository": number, "bytes": newest["database_bytes"]}
    return {**found, "options": [f"--set={newest['label']}"]}


def _mark(answer: dict[str, Any]) -> None:
    """Commit the marker, have it archived, and note what would have been lost meanwhile."""
    exposed = _exposed()
    began = time.monotonic()
    settled = __salt__["slmdb_backup.settle"]()
    answer["rpo_seconds"] = round(max(exposed, time.monotonic() - began), 1)
    answer["marker"] = {name: settled[name] for name in ("transaction", "wal")}


def _exposed() -> float:
    """The age of the oldest commit that is not archived yet, in seconds; 0 if there is none."""
    found = __salt__["slmdb_instance.facts"]()
    first = __salt__["slmdb_server.query"](UNARCHIVED)[0]["wal"]
    if not first:
        return 0
    words = [f"{found['bin_directory']}/pg_waldump", "-p", f"{found['data_directory']}/pg_wal"]
    words += ["-n", "20", "-r", "Transaction", first]
    listen = __salt__["slmdb_program.listen"]
    # It ends with an error where the WAL does.
    _, output, _ = listen(*words, as_server=True, environment={"TZ": "UTC"})
    match = _COMMIT.search(output)
    if not match:
        return 0
    moment = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc)
    return max(0, time.time() - moment.timestamp())


def _tried(
    directory: str, chosen: dict[str, Any], before: dict[str, Any], answer: dict[str, Any]
) -> list[str]:
    scratch, began = "slmdb_backup_scratch", time.monotonic()
    where = __salt__[f"{scratch}.where"]()
    with _step("restore"):
        __salt__[f"{scratch}.make"](directory, chosen)
        server = __salt__[f"{scratch}.start"](directory, chosen, before["preload"])
        try:
            __salt__[f"{scratch}.wait"](directory, server)
        except BaseException:
            server.kill()
            server.wait()
            raise
    answer["rto_seconds"] = round(time.monotonic() - began, 1)
    answer["network"] = not __salt__[f"{scratch}.isolation"](chosen["repository"])
    try:
        with _step("comparison"):
            transaction = answer["marker"]["transaction"]
            compared = __salt__["slmdb_backup_compare.problems"]
            lines, seen = compared(before, transaction, **where)
        with _step("pg_amcheck"):
            lines += __salt__["slmdb_backup_compare.check"](**where)
    finally:
        __salt__[f"{scratch}.end"](directory)
        server.wait()
    answer.update(seen)
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more
