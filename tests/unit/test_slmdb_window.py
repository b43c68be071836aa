"""Windows: when they are open, at the days on which the clock is changed too."""

from __future__ import annotations

import importlib.util
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from dateutil import tz
from hypothesis import given, settings
from hypothesis import strategies as st
from salt.exceptions import CommandExecutionError

PATH = Path(__file__).resolve().parents[2] / "_modules/slmdb_window.py"
BERLIN = ZoneInfo("Europe/Berlin")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@pytest.fixture(scope="module")
def window():
    """The module on a host whose clock is Berlin's."""
    spec = importlib.util.spec_from_file_location("slmdb_window_under_test", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    berlin = tz.gettz("Europe/Berlin")
    module._zone = lambda name: tz.gettz(name) if name else berlin
    return module


def at(text, zone=BERLIN, fold=0):
    """Seconds since the epoch of a local time."""
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def ruled(rule, start="02:00", duration="2h", **more):
    return {"rrule": rule, "start": start, "duration": duration, **more}


def test_no_window_needs_no_calendar(monkeypatch):
    """Most hosts have none, and a Salt that came over SSH may lack what looks at one."""
    spec = importlib.util.spec_from_file_location("slmdb_window_alone", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "dateutil", None)
    assert module.spans([], at("2026-06-07T03:00")) == {"until": None, "next": None}
    with pytest.raises(CommandExecutionError, match="dateutil is missing in Salt's Python; "):
        module.spans(["Sun 02:00-04:00"], at("2026-06-07T03:00"))


@pytest.mark.parametrize(
    ("windows", "now", "until", "following"),
    [
        (["Sun 02:00-04:00"], "2026-06-07T03:00", "2026-06-07T04:00", "2026-06-14T02:00"),
        (["Sun 02:00-04:00"], "2026-06-07T04:00", None, "2026-06-14T02:00"),
        (["Sun 02:00-04:00"], "2026-06-07T02:00", "2026-06-07T04:00", "2026-06-14T02:00"),
        (["Mon,Wed 23:00-01:00"], "2026-06-09T00:30", "2026-06-09T01:00", "2026-06-10T23:00"),
        (["Fri-Mon 01:00-02:00"], "2026-06-09T00:30", None, "2026-06-12T01:00"),
        (["03:00-04:00"], "2026-06-09T05:00", None, "2026-06-10T03:00"),
        (["daily 22:00-24:00"], "2026-06-09T23:00", "2026-06-10T00:00", "2026-06-10T22:00"),
        (
            ["Sun 02:00-03:00", "Sun 03:00-05:00"],
            "2026-06-07T02:30",
            "2026-06-07T05:00",
            "2026-06-14T02:00",
        ),
        (
            [ruled("FREQ=MONTHLY;BYDAY=2SA")],
            "2026-06-13T03:59",
            "2026-06-13T04:00",
            "2026-07-11T02:00",
        ),
        ([ruled("FREQ=WEEKLY;INTERVAL=2;BYDAY=MO")], "2026-06-02T00:00", None, "2026-06-15T02:00"),
        (
            [ruled("FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=29")],
            "2026-06-02T00:00",
            None,
            "2028-02-29T02:00",
        ),
        ([ruled("FREQ=DAILY;UNTIL=20260603T000000Z")], "2026-06-03T09:00", None, None),
        ([ruled("FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30")], "2026-06-02T00:00", None, None),
        ([], "2026-06-02T00:00", None, None),
    ],
)
def test_open_until_and_next(window, windows, now, until, following):
    """What an operator reads off a calendar."""
    found = window.spans(windows, at(now))
    assert found == {
        "until": at(until) if until else None,
        "next": at(following) if following else None,
    }


@pytest.mark.parametrize(
    ("windows", "begin", "end"),
    [
        # 29 March 2026: 02:00 becomes 03:00. 25 October 2026: 03:00 becomes 02:00.
        (["Sun 02:00-04:00"], ("2026-03-29T03:00", 0), ("2026-03-29T04:00", 0)),
        (["Sun 02:00-04:00"], ("2026-10-25T02:00", 0), ("2026-10-25T04:00", 0)),
        (["Sun 01:30-02:30"], ("2026-10-25T01:30", 0), ("2026-10-25T02:30", 0)),
        (["Sun 02:30-04:00"], ("2026-03-29T03:30", 0), ("2026-03-29T04:00", 0)),
        ([ruled("FREQ=WEEKLY;BYDAY=SU")], ("2026-03-29T03:00", 0), ("2026-03-29T05:00", 0)),
        ([ruled("FREQ=WEEKLY;BYDAY=SU")], ("2026-10-25T02:00", 0), ("2026-10-25T03:00", 0)),
    ],
)
def test_the_days_on_which_the_clock_is_changed(window, windows, begin, end):
    """Plain windows end by the clock on the wall, rules after the time they last."""
    first, last = (at(text, fold=fold) for text, fold in (begin, end))
    assert window.spans(windows, first - 1)["next"] == first
    assert window.spans(windows, first)["until"] == last
    assert window.spans(windows, last)["until"] is None


def test_a_window_that_the_clock_skips_does_not_open_that_day(window):
    """Between 02:00 and 03:00 there is nothing on that Sunday."""
    found = window.spans(["Sun 02:00-03:00"], at("2026-03-29T01:00"))
    assert found == {"until": None, "next": at("2026-04-05T02:00")}


def test_a_rule_has_a_zone_of_its_own(window):
    """Two in the morning in New York is not two in the morning here."""
    there = ruled("FREQ=DAILY", timezone="America/New_York")
    new_york = ZoneInfo("America/New_York")
    found = window.spans([there], at("2026-03-08T00:00", new_york))
    assert found["next"] == at("2026-03-08T03:00", new_york)
    assert window.spans([there], at("2026-06-08T03:00", new_york))["until"] == at(
        "2026-06-08T04:00", new_york
    )


MOMENTS = st.integers(min_value=1735689600, max_value=1893456000)
TIMES = st.integers(min_value=0, max_value=1439)


def clock(minutes):
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


@settings(max_examples=150, deadline=None)
@given(now=MOMENTS, day=st.integers(0, 6), begin=TIMES, length=st.integers(1, 1439))
def test_open_is_what_the_clock_on_the_wall_says(window, now, day, begin, length):
    """Away from the changes of the clock a plain window is open when the wall's clock is in it."""
    moment = datetime.fromtimestamp(now, BERLIN)
    near = [moment + timedelta(days=days) for days in (-2, 2)]
    if near[0].utcoffset() != near[1].utcoffset():
        return
    text = f"{DAYS[day]} {clock(begin)}-{clock((begin + length) % 1440)}"
    found = window.spans([text], now)
    minute = ((moment.weekday() - day) * 1440 + moment.hour * 60 + moment.minute) % (7 * 1440)
    expected = begin <= minute < begin + length or minute + 7 * 1440 < begin + length
    assert (found["until"] is not None) == expected
    assert found["next"] is not None and found["next"] > now


@settings(max_examples=150, deadline=None)
@given(
    now=MOMENTS, begin=TIMES, hours=st.integers(1, 20), rule=st.sampled_from(["DAILY", "WEEKLY"])
)
def test_a_rule_lasts_as_long_as_it_says_whatever_the_clock_does(window, now, begin, hours, rule):
    """From its beginning to its end pass as many hours as the duration says."""
    windows = [ruled(f"FREQ={rule}", clock(begin), f"{hours}h", timezone="Europe/Berlin")]
    first = window.spans(windows, now)["next"]
    assert window.spans(windows, first)["until"] == first + hours * 3600
    local = datetime.fromtimestamp(first, timezone.utc).astimezone(BERLIN)
    shifted = local.utcoffset() != (local - timedelta(hours=2)).utcoffset()
    assert (local.hour * 60 + local.minute == begin) or shifted


@pytest.mark.parametrize(
    ("given_window", "words"),
    [
        (ruled("FREQ=HOURLY"), "0:rrule: FREQ=HOURLY"),
        (ruled("FREQ=DAILY;COUNT=3"), "COUNT"),
        (ruled("FREQ=DAILY;INTERVAL=0"), "INTERVAL=0; allowed: a whole number from 1 up"),
        (ruled("FREQ=DAILY;INTERVAL=-1"), "INTERVAL=-1"),
        (ruled("FREQ=DAILY;BYHOUR=3"), "BYHOUR"),
        (ruled("FREQ=DAILY;BYDAY=XX"), "no recurrence rule"),
        (ruled("FREQ=DAILY;FOO=1"), "no recurrence rule"),
        (ruled("FREQ=DAILY", timezone="Europe/Nowhere"), "0:timezone"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named(window, given_window, words):
    """One line with the key, what was given and what is allowed."""
    (line,) = window.problems([given_window])
    assert line.startswith("slm_database:maintenance:windows:0:") and words in line


def test_good_windows_have_no_problem(window):
    """Neither form is complained about."""
    assert window.problems(["Sun 02:00-04:00", ruled("RRULE:FREQ=DAILY", timezone="UTC")]) == []
