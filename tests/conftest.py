"""What every layer shares: no skip in CI, a report for bin/test, and a working directory."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from salt._logging.impl import shutdown_temp_handler

LINES, WIDTH = 12, 300  # of what the summary says about a failure
# The same examples everywhere, and no deadline: the machine decides nothing.
hypothesis.settings.load_profile("ci")


def _refuse_skip(report):
    """In CI a test that did not run has failed."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not accept: {report.longrepr}"


def _record(outcome, name, why=""):
    """Tell bin/test at once: a run that is killed later keeps what it found."""
    path = os.environ.get("AUTOBOT_TEST_REPORT")
    if path:
        lines = [line[:WIDTH] for line in why.splitlines() if line.strip()]
        if len(lines) > LINES:
            lines = [*lines[: LINES // 2], "…", *lines[-LINES // 2 :]]
        with Path(path).open("a", encoding="utf-8") as report:
            report.write(f"{outcome}\t{name}\n" + "".join(f"why\t{line}\n" for line in lines))


def _why(report):
    """What went wrong, without the code around it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"{crash.path}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    _refuse_skip(report)
    if report.failed:
        name = item.nodeid if call.when == "call" else f"{item.nodeid} ({call.when})"
        _record("failed", name, _why(report))
    elif report.passed and call.when == "call":
        _record("passed", item.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    report = (yield).get_result()
    _refuse_skip(report)
    if report.failed:
        _record("failed", f"{collector.nodeid} (collection)", _why(report))


def pytest_collection_finish(session):
    """Leave the checkout: servers run as users who may not enter it."""
    os.chdir("/")
    # Salt keeps what is logged for the end of the process, when pytest has closed that stream.
    shutdown_temp_handler()
