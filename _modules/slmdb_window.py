"""
When disruptive work may happen: the maintenance policy, its windows, and an approval for one run.

A plain window ("Sun 02:00-04:00") is by the host's clock on the wall: both its ends are times of
day. A window that is a rule (RFC 5545) begins at a time of day of its zone and lasts as long as it
says. A start that the clock skips in spring is taken with the offset from before, as RFC 5545 says
(02:30 is then 03:30); of a time that comes twice in autumn the first is meant.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_window"

# dateutil's, imported when a window is looked at: most runs have none, and it is slow to import.
rrule: Any = None
tz: Any = None

KEY = "slm_database:maintenance"
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
UNITS = {"m": "minutes", "h": "hours", "d": "days"}
ONE_DAY = timedelta(days=1)
# Every second week is counted from here, a Monday.
ANCHOR = datetime(2024, 1, 1)
# No rule pauses longer: the 29th of February can be eight years away.
HORIZON = timedelta(days=9 * 366)
# Windows that follow one another without a pause are followed so far.
FAR = timedelta(days=32)


def __virtual__() -> str:
    return __virtualname__


def _dateutil() -> bool:
    """Whether dateutil is there, imported by now."""
    global rrule, tz
    if rrule is None:
        try:
            from dateutil import rrule, tz
        except ImportError:
            return False
    return True


def _time(text: str) -> timedelta:
    hours, minutes = text.split(":")
    return timedelta(hours=int(hours), minutes=int(minutes))


def _weekdays(text: str) -> list[int]:
    """The numbers of the days of "Mon,Wed", "Fri-Mon" or "daily"."""
    if text in ("", "daily"):
        return list(range(7))
    found: set[int] = set()
    for part in re.findall(r"(\w+)-(\w+)|(\w+)", text):
        first, last = DAYS.index(part[0] or part[2]), DAYS.index(part[1] or part[2])
        found.update((first + step) % 7 for step in range((last - first) % 7 + 1))
    return sorted(found)


def _zone(name: str | None) -> Any:
    """The time zone of that name, else that of the host; ``None`` for a name nobody knows."""
    _dateutil()
    return tz.gettz(name) if name else (tz.gettz() or tz.tzlocal())


def _plain(text: str) -> tuple[Any, timedelta]:
    """The rule of a plain window's days, and its length by the clock on the wall."""
    days, _, times = text.rpartition(" ")
    begin, end = (_time(part) for part in times.split("-"))
    starts = rrule.rrule(rrule.DAILY, dtstart=ANCHOR + begin, byweekday=_weekdays(days))
    return starts, end - begin if end > begin else end - begin + ONE_DAY


def _ruled(window: dict[str, str], zone: Any) -> tuple[Any, timedelta]:
    """The rule of a window that is one, and its length in hours that pass."""

    def local(match: re.Match) -> str:
        moment = datetime.strptime(match[1], "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
        return moment.astimezone(zone).strftime("UNTIL=%Y%m%dT%H%M%S")

    text = re.sub(r"UNTIL=(\d{8}T\d{6})Z", local, window["rrule"])
    starts = rrule.rrulestr(text, dtstart=ANCHOR + _time(window["start"]))
    number, unit = window["duration"][:-1], window["duration"][-1]
    return starts, timedelta(**{UNITS[unit]: int(number)})


def _instant(local: datetime, zone: Any) -> datetime:
    return tz.resolve_imaginary(local.replace(tzinfo=zone)).astimezone(timezone.utc)


def _spans(window: Any, now: datetime) -> Iterator[tuple[datetime, datetime]]:
    """The window's beginnings and ends from the one that may still be open at a moment."""
    plain = isinstance(window, str)
    zone = _zone(None if plain else window.get("timezone"))
    starts, length = _plain(window) if plain else _ruled(window, zone)
    local = now.astimezone(zone).replace(tzinfo=None)
    latest = local + HORIZON
    for begin in starts.xafter(max(local - length - ONE_DAY, ANCHOR), inc=True):
        if begin > latest:
            return
        first = _instant(begin, zone)
        last = _instant(begin + length, zone) if plain else first + length
        if last > max(first, now):
            yield first, last


def _mistake(window: Any) -> str | None:
    """What is wrong with a window that looks right."""
    if isinstance(window, str):
        return None
    if not _zone(window.get("timezone")):
        return f'timezone: "{window["timezone"]}" is not known here; allowed: a name from tzdata'
    parts = dict(part.split("=", 1) for part in window["rrule"].removeprefix("RRULE:").split(";"))
    if parts["FREQ"] not in ("DAILY", "WEEKLY", "MONTHLY", "YEARLY"):
        return f"rrule: FREQ={parts['FREQ']}; allowed: DAILY, WEEKLY, MONTHLY, YEARLY"
    if not parts.get("INTERVAL", "1").lstrip("0").isdigit():
        return f"rrule: INTERVAL={parts['INTERVAL']}; allowed: a whole number from 1 up"
    for name, instead in (
        ("COUNT", "UNTIL ends it"),
        *((f"BY{unit}", "start says it") for unit in ("HOUR", "MINUTE", "SECOND")),
    ):
        if name in parts:
            return f"rrule: {name} cannot be used here; {instead}"
    try:
        _ruled(window, _zone(window.get("timezone")))
    except (ValueError, KeyError, OverflowError):
        return "rrule: this is no recurrence rule of RFC 5545, such as FREQ=MONTHLY;BYDAY=2SA"
    return None


def problems(windows: list) -> list[str]:
    """
    Check what the form of a window alone does not show: whether its rule and its zone exist.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_window.problems '["Sun 02:00-04:00"]'

    windows
        Windows that have the right form, as in ``slm_database:maintenance:windows``.

    Returns one line for each mistake, with its key. Raises nothing.
    """
    # The form says all of a plain window.
    if all(isinstance(window, str) for window in windows) or not _dateutil():
        return []
    found = ((place, _mistake(window)) for place, window in enumerate(windows))
    return [f"{KEY}:windows:{place}:{line}" for place, line in found if line]


def spans(windows: list, now: float) -> dict[str, float | None]:
    """
    Tell whether one of the windows is open at a moment, until when, and when the next one opens.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_window.spans '["Sun 02:00-04:00"]' 1767225600

    windows
        Windows, as in ``slm_database:maintenance:windows``.
    now
        The moment, in seconds since the epoch.

    Returns ``until`` (``None`` if none is open; windows that touch count as one) and ``next``
    (``None`` if there is none), both in seconds since the epoch. Raises ``CommandExecutionError``
    if ``dateutil`` is missing or a window is wrong.
    """
    if not windows:
        return {"until": None, "next": None}
    if not _dateutil():
        raise CommandExecutionError(
            f"{KEY}:windows: dateutil is missing in Salt's Python; "
            "state.apply slm_database.package installs it"
        )
    wrong = problems(windows)
    if wrong:
        raise CommandExecutionError("\n".join(wrong))
    moment = datetime.fromtimestamp(now, timezone.utc)
    until = following = None
    for begin, end in heapq.merge(*(_spans(window, moment) for window in windows)):
        if begin <= (until or moment):
            until = max(until or end, end)
        else:
            following = begin
            break
        if until - moment > FAR:
            break
    return {
        "until": until.timestamp() if until else None,
        "next": following.timestamp() if following else None,
    }


def _shown(moment: float | None) -> str | None:
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, _zone(None)).isoformat(timespec="minutes")


def status() -> dict[str, Any]:
    """
    Tell whether disruptive work may happen now, and what would be done.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_window.status

    Returns ``policy``, ``approved`` (for this run, by pillar), ``permitted``, ``open`` (a window),
    ``until`` and ``next`` (times of the host's zone, or ``None``), and ``would``: one line for
    each thing that is parked. Raises ``CommandExecutionError`` if the settings cannot be used or
    the server cannot be asked.
    """
    told = __salt__["slmdb_pillar.get"]("maintenance")
    found = spans(told["windows"], _now())
    return {
        "policy": told["policy"],
        "approved": told["approve"],
        "permitted": bool(reason()),
        "open": found["until"] is not None,
        "until": _shown(found["until"]),
        "next": _shown(found["next"]),
        "would": __salt__["slmdb_pending.lines"](),
    }


def _now() -> float:
    return datetime.now(timezone.utc).timestamp()


def reason() -> str | None:
    """
    Say what permits disruptive work now.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_window.reason

    Returns one line for the record, ``None`` if nothing permits it. Raises
    ``CommandExecutionError`` if the settings cannot be used.
    """
    told = __salt__["slmdb_pillar.get"]("maintenance")
    if told["approve"] is True:  # who calls a function has no pillar checked
        return f"approved for this run by {KEY}:approve"
    if told["policy"] == "auto":
        return f"{KEY}:policy is auto"
    if told["policy"] == "window":
        until = spans(told["windows"], _now())["until"]
        return f"a window is open until {_shown(until)}" if until else None
    return None


def restart_permitted() -> str | None:
    """
    Say what permits a restart of the server now: a first install, ``restart: now``, or ``reason``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_window.restart_permitted

    Returns one line, ``None`` if nothing permits it. Raises ``CommandExecutionError`` if the
    settings cannot be used.
    """
    if not __salt__["slmdb_lastgood.exists"]():
        return "first install"
    if __salt__["slmdb_pillar.get"]("restart") == "now":
        return "slm_database:restart is now"
    return reason()


def refusal() -> str:
    """
    Say why disruptive work may not happen now, when it may, and how to approve it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_window.refusal

    Returns one line. Raises ``CommandExecutionError`` if the settings cannot be used.
    """
    told = __salt__["slmdb_pillar.get"]("maintenance")
    if told["policy"] == "manual":
        why = f"{KEY}:policy is manual"
    else:
        following = _shown(spans(told["windows"], _now())["next"])
        why = f"no window is open; the next one opens at {following}"
        if not following:
            why = f"no window is open, and none comes: {KEY}:windows names none"
    return f"{why}; for one run, {KEY}:approve: true in pillar permits it"
