"""The README and the guides: what they tell an operator to type is typed by a test."""

from __future__ import annotations

import re

import pytest

from tests.support import documents

TESTS = documents.CHECKOUT / "tests"
# Of what is shown in any other way nothing is typed on a host by an operator of the database.
SHOWN = ("ini", "text", "yaml")


@pytest.mark.parametrize("document", documents.documents(), ids=lambda path: path.name)
def test_every_block_says_what_it_is(document):
    """A command to type is behind a root prompt in a console; no block is without a name."""
    found = documents.blocks(document)
    fences = re.findall(r"^ *```", document.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(found)
    for fence, text in found:
        name = fence.split(" ")[0]
        if document.name == "README.md" and text == "bin/test\n":
            continue
        assert name in (*SHOWN, "console"), fence
        if name == "console":
            assert all(line.startswith("# ") for line in text.splitlines()), text


def test_every_scene_has_a_test():
    """What is typed only when something happened is typed by the test that lets it happen."""
    text = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    tested = set(re.findall(r'(?:commands\(GUIDE|typed\(\w+), "([a-z ]+)"', text))
    fences = {fence for one in documents.documents() for fence, _ in documents.blocks(one)}
    told = {fence.removeprefix("console ") for fence in fences if fence.startswith("console ")}
    assert told == tested
