"""
What a restore would do: which backup leads to a moment, a restore point or the end, and how.
"""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_restore_plan"

SAME = 86400  # seconds
# What date prints in the usual languages of a server.
DATE = (
    "%a %b %d %H:%M:%S UTC %Y",
    "%a %b %d %I:%M:%S %p UTC %Y",
    "%a %d %b %Y %I:%M:%S %p UTC",
)
# The target in words, pgBackRest's options for it, the backup, and the timeline.
_Way = tuple[str, list[str], dict[str, Any], dict[str, Any]]


def __virtual__() -> str:
    return __virtualname__


def _utc(text: str) -> datetime:
    try:
        moment = _moment(" ".join(str(text).split()))
    except ValueError:
        raise SaltInvocationError(
            f"time: {str(text)[:40]!r} is no moment; allowed: such as 2026-11-23T20:15:00+00:00 "
            "(without an offset it is UTC)"
        ) from None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _moment(words: str) -> datetime:
    """As ISO 8601 has it, or as date prints it; of the zones by name only UTC is sure."""
    for form in DATE:
        with contextlib.suppress(ValueError):
            moment = datetime.strptime(words, form)
            if words.startswith(moment.strftime("%a ")):
                return moment
    moment = datetime.fromisoformat(words.removesuffix(" UTC").replace("Z", "+00:00"))
    if moment.tzinfo and words.endswith(" UTC"):
        raise ValueError("two zones")
    return moment


def _backups() -> list[dict[str, Any]]:
    rows = __salt__["slmdb_backup.list"]()
    if not rows:
        raise CommandExecutionError("there is no backup yet; slmdb_backup.create makes one")
    return rows


def make(
    time: str | None = None, label: str | None = None, restore_point: str | None = None
) -> dict[str, Any]:
    """
    Say what a restore would do, or why it cannot.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_restore_plan.make time=2026-11-23T20:15:00+00:00

    time
        The last moment that shall be there; without an offset it is UTC.
    label
        The backup to begin with; alone: the moment at which it was complete.
    restore_point
        A name given by ``pg_create_restore_point``. It is looked for from the newest backup on, one
        that begins with its moment (as those of migrations do) from the newest before that; any
        other from before the newest backup needs the ``label`` of an older one.

    Of several repositories the first one is taken, unless its fitting backup is a day older than
    another's. After a restore in place a moment means what the server was then: before it on the
    old timeline, after it on the new one. Returns ``target``, ``label``, ``repository``, ``wal``
    (the first segment that is replayed), ``options`` (pgBackRest's), ``ends`` (whether that is
    before the WAL does) and ``bytes`` (of the data). Raises ``SaltInvocationError`` for what cannot
    be reached, with the range that can.
    """
    if time is not None and restore_point is not None:
        raise SaltInvocationError("time and restore_point cannot both be given; choose one")
    rows = _backups()
    _refuse_unknown(label, rows)
    if time is not None:
        target, options, chosen, way = _to_moment(rows, _utc(time), label)
    elif restore_point is not None:
        target, options, chosen, way = _to_point(rows, str(restore_point), label)
    elif label is not None:
        target, options, chosen, way = _to_backup(rows, label)
    else:
        way = __salt__["slmdb_timeline.branch"]()
        target, options = "the end of the archived WAL", []
        chosen = _newest(__salt__["slmdb_timeline.leading"](rows, way))
    timeline = __salt__["slmdb_timeline.options"](way["timeline"], way["latest"])
    return {
        "target": target,
        "label": chosen["label"],
        "repository": chosen["repository"],
        "wal": chosen["wal"][0],
        "options": [f"--set={chosen['label']}", *options, *timeline],
        "ends": bool(options),
        "bytes": chosen["database_bytes"],
    }


def _to_moment(rows: list[dict[str, Any]], moment: datetime, label: str | None) -> _Way:
    way = __salt__["slmdb_timeline.branch"](moment.timestamp(), rows)
    options = _until("time", moment.strftime("%Y-%m-%d %H:%M:%S.%f+00"))
    return moment.isoformat(), options, _before(rows, moment, label, way), way


def _to_point(rows: list[dict[str, Any]], name: str, label: str | None) -> _Way:
    way = __salt__["slmdb_timeline.branch"]()
    options = _until("name", _quoted(name))
    return f"restore point {name}", options, _before_point(rows, name, label, way), way


def _to_backup(rows: list[dict[str, Any]], label: str) -> _Way:
    """On the timeline that it was made on."""
    chosen, way = _labelled(rows, label), __salt__["slmdb_timeline.branch"]()
    own = __salt__["slmdb_timeline.own"](chosen)
    options = ["--type=immediate", "--target-action=promote"]
    # With this type pgBackRest takes the timeline only in PostgreSQL's own words.
    options.append(f"--recovery-option=recovery_target_timeline={own}")
    return f"backup {label}", options, chosen, {**way, "latest": True}


def _until(kind: str, target: str) -> list[str]:
    return [f"--type={kind}", f"--target={target}", "--target-action=promote"]


def _quoted(name: str) -> str:
    """As it stands in PostgreSQL's configuration, into which pgBackRest writes it as it is."""
    if not name or len(name.encode()) > 63 or not name.isprintable():
        raise SaltInvocationError(
            f"restore_point: {name[:70]!r} is no name; allowed: 1 to 63 bytes that can be printed"
        )
    return name.replace("\\", "\\\\").replace("'", "''")


def _refuse_unknown(label: str | None, rows: list[dict[str, Any]]) -> None:
    known = {row["label"] for row in rows}
    if label is not None and label not in known:
        raise SaltInvocationError(
            f"label: there is no backup {label!r}; there are {', '.join(sorted(known))}"
        )


def _labelled(rows: list[dict[str, Any]], label: str) -> dict[str, Any]:
    return next(row for row in rows if row["label"] == label)


def _newest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest; one of a nearer repository is as good if it is of the same day."""
    stopped = {row["stopped"]: __salt__["slmdb_backup.seconds"](row["stopped"]) for row in rows}
    recent = [row for row in rows if max(stopped.values()) - stopped[row["stopped"]] <= SAME]
    return max(recent, key=lambda row: (-row["repository"], row["stopped"], row["label"]))


def _complete(row: dict[str, Any]) -> datetime:
    """From when on a backup can be restored."""
    return datetime.fromtimestamp(__salt__["slmdb_backup.complete"](row), timezone.utc)


def _before(
    rows: list[dict[str, Any]], moment: datetime, label: str | None, way: dict[str, Any]
) -> dict[str, Any]:
    """The newest backup that was complete at a moment, and leads to what the server was then."""
    earliest = _complete(rows[0])
    now = datetime.now(timezone.utc)
    if moment < earliest or moment > now:
        raise SaltInvocationError(
            f"time: {moment.isoformat()} cannot be reached; "
            f"from {earliest.isoformat()} to {now.isoformat(timespec='seconds')} can"
        )
    fitting = __salt__["slmdb_timeline.leading"](
        [row for row in rows if _complete(row) <= moment], way
    )
    if label is None:
        return _newest(fitting)
    if label not in [row["label"] for row in fitting]:
        raise SaltInvocationError(
            f"label: backup {label} was not complete at {moment.isoformat()}; "
            f"{fitting[-1]['label']} was"
        )
    return _labelled(fitting, label)


def _before_point(
    rows: list[dict[str, Any]], name: str, label: str | None, way: dict[str, Any]
) -> dict[str, Any]:
    """The backup to look for a restore point from: our own names begin with their moment."""
    if label is not None:
        return _labelled(rows, label)
    leading = __salt__["slmdb_timeline.leading"](rows, way)
    with contextlib.suppress(ValueError):
        made = datetime.strptime(name[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        stopped = __salt__["slmdb_backup.seconds"]
        before = [row for row in leading if stopped(row["stopped"]) <= made.timestamp()]
        leading = before or leading
    return _newest(leading)
