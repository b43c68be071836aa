"""Every command that the documentation tells an operator to type is typed on a booted host."""

from __future__ import annotations

import pytest

from tests.support import documents
from tests.support.host import FORMULA

DOCUMENTS = {path.name: path for path in documents.documents() if documents.local(path)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_commands_of(name, boot, applied_layers):
    """In the document's order, on one host; each ends well."""
    host = boot(applied_layers("trixie"))
    try:
        host.push_formula()
        host.until("pg_isready -q")
        failed = {}
        for command in documents.local(DOCUMENTS[name]):
            answer = host.run(f"cd {FORMULA} && {command}", check=False)
            if answer.returncode:
                failed[command] = answer.stdout[-1500:] + answer.stderr[-1500:]
        assert failed == {}
    finally:
        host.close()


def test_the_two_commands_come_first():
    """The README begins with how to apply the formula and how to test it."""
    beginning = documents.CHECKOUT.joinpath("README.md").read_text().partition("\n## ")[0]
    assert "# bin/apply\n" in beginning
    assert "bin/test\n" in beginning
