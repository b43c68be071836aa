"""Every command that the documentation tells an operator to type is typed on a booted host."""

from __future__ import annotations

import pytest

from tests.support import documents
from tests.support.host import FORMULA

# The operator's guide comes last: it ends with taking everything away.
DOCUMENTS = sorted(
    (path for path in documents.documents() if documents.local(path)),
    key=lambda path: path.name == "operating.md",
)


@pytest.fixture(scope="module")
def host(boot, applied_layers):
    """One host for all documents."""
    made = boot(applied_layers("trixie"))
    made.push_formula()
    # The machine that runs the tests is busy with others: the reports may take their time.
    made.write("/srv/pillar/top.sls", "base: {'*': [slm_database]}\n")
    made.write("/srv/pillar/slm_database.sls", "slm_database: {health: {timeout: 30}}\n")
    made.until("pg_isready -q")
    yield made
    made.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of(document, host):
    """Typed in the document's order, each ends well."""
    failed = {}
    for command in documents.local(document):
        answer = host.run(f"cd {FORMULA} && {command}", check=False, timeout=900)
        if answer.returncode:
            failed[command] = answer.stdout[-1500:] + answer.stderr[-1500:]
    assert failed == {}


def test_the_two_commands_come_first():
    """The README begins with how to apply the formula and how to test it."""
    beginning = documents.CHECKOUT.joinpath("README.md").read_text().partition("\n## ")[0]
    assert "# bin/apply\n" in beginning
    assert "bin/test\n" in beginning
