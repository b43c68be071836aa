"""What the documentation tells an operator to type on a master is typed there."""

from __future__ import annotations

from tests.integration.conftest import OLD_SALT
from tests.support import documents


def test_salt_by_glob(site):
    """Each command that names `*.19` ends well, in the documents' order."""
    master = site.master("slm.19")
    typed = [words for words in documents.remote("salt") if words[0] == "*.19"]
    assert typed
    for words in typed:
        answer = master.salt(*words, output="nested")
        assert answer.status == 0, answer.text


def test_salt_by_list(site):
    """Each command that names `.19` in a list ends well on 3008, and is refused on 3006 as told."""
    master = site.master(".19")
    typed = [words for words in documents.remote("salt") if words[:2] == ["-L", ".19"]]
    assert typed
    for words in typed:
        answer = master.salt(*words, output="nested")
        if OLD_SALT:
            assert "No minions matched the target" in answer.text
        else:
            assert answer.status == 0, answer.text


def test_no_other_target_is_told():
    """Whatever the documents tell to type on a master is one of the two."""
    targets = {tuple(words[: 2 if words[0] == "-L" else 1]) for words in documents.remote("salt")}
    assert targets == {("*.19",), ("-L", ".19")}


def test_salt_ssh(site):
    """Each command ends well, in the documents' order."""
    salt_ssh = site.salt_ssh(".19")
    typed = documents.remote("salt-ssh")
    assert typed
    for words in typed:
        answer = salt_ssh(*words)
        assert answer.status == 0, answer.text
