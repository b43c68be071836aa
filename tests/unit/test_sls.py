"""Every SLS renders and compiles, whatever the distribution and whatever pillar holds."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.support import sls

EXAMPLE = yaml.safe_load((sls.CHECKOUT / "pillar.example").read_text())["slm_database"]
GARBAGE = {
    "a list": [1],
    "a text": "port: 5432",
    "a number": 0,
    "null everywhere": dict.fromkeys(EXAMPLE),
    "wrong types": {key: [{"a": [None]}] for key in EXAMPLE},
    "strange keys": {5: 1, None: {}, "{{ 1 / 0 }}": "{% raise %}"},
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compiler")
    (directory / "probe.sls").write_text(
        "{{ grains['oscodename'] }} and {{ pillar | length }}:\n  test.nop\n"
    )
    return sls.Compiler(directory, directory)


def test_the_compiler_sees_grains_and_pillar(compiler):
    """The other tests here say nothing unless this holds."""
    assert compiler.low("probe", "Ubuntu-24.04", {})[0]["__id__"] == "noble and 1"
    assert compiler.low("probe", "Debian-13")[0]["__id__"] == "trixie and 0"


def _compiles(compiler, name, release, pillar):
    chunks = compiler.low(name, release, pillar)
    assert "The pillar is valid" in [chunk["__id__"] for chunk in chunks], name


@pytest.mark.parametrize("release", sls.CODENAMES)
@pytest.mark.parametrize("pillar", [None, EXAMPLE], ids=["empty", "example"])
def test_every_sls_compiles(compiler, release, pillar):
    """On every supported release, without pillar and with all of it."""
    for name in sls.names():
        _compiles(compiler, name, release, pillar)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_does_not_break_rendering(compiler, garbage):
    """It is the first state that refuses, in words; a template would only fall over."""
    for name in ("slm_database", "slm_database.clean"):
        _compiles(compiler, name, "Debian-12", GARBAGE[garbage])


def test_every_state_exists(compiler):
    """An SLS calls nothing that the loader does not have."""
    for name in sls.names():
        for chunk in compiler.low(name, "Debian-12"):
            function = f"{chunk['state']}.{chunk['fun']}"
            assert function in compiler.state.states, f"{name}: {function}"


def test_the_pillar_is_checked_before_anything_else(compiler):
    """Whatever else a component does comes after the check, in order and by requisite."""
    for name in sls.names():
        chunks = compiler.low(name, "Debian-12")
        ids = [chunk["__id__"] for chunk in chunks]
        assert ids[:2] == ["The formula is loaded", "The pillar is valid"], name
        for chunk in chunks[2:]:
            assert chunk.get("require"), f"{name}: {chunk['__id__']}"


def test_the_ids_are_sentences(compiler):
    """A run reads as a list of what is true now."""
    for name in sls.names():
        for chunk in compiler.low(name, "Debian-12"):
            assert re.fullmatch(r"[A-Z][^\n]* [^\n]*[^.\n]", chunk["__id__"]), chunk["__id__"]


def test_nothing_from_pillar_is_in_the_low_data(compiler):
    """What the minion caches of a run holds no setting, so it can hold no secret."""
    pillar = {"role": "canary", "secret": {"from_pillar": "canary:key"}, "password": "canary"}
    for name in sls.names():
        assert "canary" not in repr(compiler.low(name, "Debian-12", pillar))
