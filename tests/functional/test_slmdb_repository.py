"""PGDG's repository: trusted by the pinned key alone, and all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import apt

SOURCE = Path("/etc/apt/sources.list.d/autobot-slm-pgdg.sources")
KEYRING = Path("/etc/apt/keyrings/autobot-slm-pgdg.gpg")
LISTS = Path("/var/lib/apt/lists")
PGDG = "B97B0AFCAA1A47F044F244A07FCC7D46ACCC4CF8"


def _made(*arguments, **keywords):
    key = apt.Key(*arguments, **keywords)
    yield key
    key.remove()


@pytest.fixture(scope="module")
def key():
    yield from _made("repository")


@pytest.fixture(scope="module")
def stranger():
    yield from _made("stranger")


@pytest.fixture(autouse=True)
def _temporary(bare, minions, monkeypatch):
    """Temporary files go where only this test looks; Salt's own, which outlive it, do not."""
    minions()
    Path("/srv/tmp").mkdir(mode=0o755)
    monkeypatch.setattr("tempfile.tempdir", "/srv/tmp")


@pytest.fixture
def host(bare, minions, key):
    """A bare host, a signed repository with one major, and a function that gives the pillar."""
    root = Path("/srv/pgdg")
    root.mkdir()
    uri = apt.publish(root, key, ["postgresql-15", "postgresql-client-15"])
    path = Path("/srv/key.asc")
    path.write_bytes(key.public())
    pgdg = {"uri": uri, "suite": "bookworm-pgdg", "key": str(path)}
    pgdg["fingerprint"] = key.fingerprint

    def tell(**changed):
        version = changed.pop("version", "15")
        told = {"repository": "pgdg", "version": version, "pgdg": {**pgdg, **changed}}
        return minions({"slm_database": told})

    return tell


def _traces() -> set[Path]:
    """What the repository leaves on a host."""
    places = (Path("/etc/apt"), LISTS)
    found = {path for place in places for path in place.rglob("*") if "pgdg" in path.name}
    return found | set(Path("/srv/tmp").iterdir())


def _refused(minion, *words):
    """The state fails in one line with these words, and the host is as before."""
    result = minion.state("slmdb_repository.present")
    assert result.result is False
    assert len(str(result.comment).splitlines()) == 1
    for word in words:
        assert word in str(result.comment)
    assert _traces() == set()


@pytest.mark.parametrize("armored", [True, False])
def test_the_repository_is_set_up_once(host, key, armored):
    """Test mode announces, apply does just that, a second apply does nothing."""
    Path("/srv/key.asc").write_bytes(key.public(armored))
    minion = host()
    announced = minion.state("slmdb_repository.present", test=True)
    assert (announced.result, _traces()) == (None, set())
    made = minion.state("slmdb_repository.present")
    assert (made.result, made.changes) == (True, announced.changes)
    assert f"Signed-By: {KEYRING}" in SOURCE.read_text()
    assert "trusted" not in SOURCE.read_text().lower()
    assert KEYRING.read_bytes() == key.public(armored=False)
    assert minion.call("slmdb_repository.offers", "postgresql-client-15") is True
    assert minion.call("slmdb_repository.offers", "postgresql-77") is False
    again = minion.state("slmdb_repository.present")
    assert (again.result, again.changes) == (True, {})


def test_only_the_pinned_key_is_trusted(host, key, stranger):
    """A key file may hold more keys; they do not reach apt."""
    Path("/srv/key.asc").write_bytes(stranger.public(False) + key.public(False))
    assert host().state("slmdb_repository.present").result is True
    assert KEYRING.read_bytes() == key.public(armored=False)


def test_a_fingerprint_with_spaces_and_small_letters_is_the_same(host, key):
    """People copy fingerprints as gpg prints them."""
    spaced = " ".join(key.fingerprint[at : at + 4] for at in range(0, 40, 4)).lower()
    assert host(fingerprint=spaced).state("slmdb_repository.present").result is True


def test_another_fingerprint_is_refused(host, key, stranger):
    """The key file holds something else than what is pinned; test mode says so too."""
    minion = host(fingerprint=stranger.fingerprint)
    _refused(minion, "slm_database:pgdg:key", stranger.fingerprint, key.fingerprint)
    assert minion.state("slmdb_repository.present", test=True).result is False


def test_a_repository_signed_by_a_stranger_is_refused(host, stranger):
    """The pinned key is there, the signature is not by it."""
    apt.publish(Path("/srv/pgdg"), stranger, ["postgresql-15"])
    _refused(host(), "slm_database:pgdg")


def test_a_changed_index_is_refused(host):
    """The signature is right, what it signs is not what is there."""
    index = next(Path("/srv/pgdg").rglob("Packages"))
    index.write_bytes(index.read_bytes().replace(b"99.1", b"98.1"))
    _refused(host(), "slm_database:pgdg")


def test_an_expired_key_is_refused(host):
    """A key that was good once is not good now."""
    for key in _made("expired", made=-10, expires=5):
        Path("/srv/key.asc").write_bytes(key.public())
        apt.publish(Path("/srv/pgdg"), key, ["postgresql-15"])
        _refused(host(fingerprint=key.fingerprint), "slm_database:pgdg")


def test_a_missing_key_file_is_refused(host):
    """The line names the file."""
    _refused(host(key="/srv/nowhere.asc"), "slm_database:pgdg:key", "/srv/nowhere.asc")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 9, b"<html>", b"\x99\x01\x0d\x04"],
    ids=["empty", "binary", "html", "cut"],
)
def test_a_file_that_is_no_key_is_refused(host, data):
    """Whatever a proxy or an editor made of it."""
    Path("/srv/key.asc").write_bytes(data)
    _refused(host(), "slm_database:pgdg:key", "/srv/key.asc")


def test_a_truncated_key_is_refused(host, key):
    """Half an armor has no end."""
    Path("/srv/key.asc").write_bytes(key.public()[:120])
    _refused(host(), "slm_database:pgdg:key", "not an OpenPGP public key")


@pytest.mark.parametrize("uri", ["file:/srv/nowhere", "http://127.0.0.1:9/pgdg"])
def test_an_unreachable_repository_is_refused(host, uri):
    """Nothing is written for a repository that was never seen."""
    _refused(host(uri=uri), "slm_database:pgdg")


def test_a_major_that_is_not_offered_is_refused(host):
    """The line names the pillar key; the repository is not set up either."""
    _refused(host(version="17"), "slm_database:version", "postgresql-17")


def test_a_refusal_keeps_the_repository_that_works(host, stranger):
    """A later mistake does not take away what an earlier run set up."""
    assert host().state("slmdb_repository.present").result is True
    before = (SOURCE.read_bytes(), KEYRING.read_bytes())
    refused = host(fingerprint=stranger.fingerprint).state("slmdb_repository.present")
    assert refused.result is False
    refused = host(uri="file:/srv/nowhere").state("slmdb_repository.present")
    assert refused.result is False
    assert (SOURCE.read_bytes(), KEYRING.read_bytes()) == before


@pytest.mark.parametrize("way", ["absent", "distribution"])
def test_the_repository_can_be_taken_away(host, minions, way):
    """By the state, or because pillar wants the distribution's packages again."""
    minion = host()
    assert minion.state("slmdb_repository.present").result is True
    function = "slmdb_repository.absent"
    if way == "distribution":
        minion, function = minions(), "slmdb_repository.present"
    announced = minion.state(function, test=True)
    assert announced.result is None
    gone = minion.state(function)
    assert (gone.result, gone.changes) == (True, announced.changes)
    assert _traces() == set()
    again = minion.state(function)
    assert (again.result, again.changes) == (True, {})


def test_without_pillar_there_is_no_repository_of_ours(bare, minions):
    """The distribution's packages are the default."""
    result = minions().state("slmdb_repository.present")
    assert (result.result, result.changes) == (True, {})
    assert _traces() == set()


def test_the_key_that_the_formula_ships_is_pgdg_s(bare, minions):
    """Its fingerprint is the one that PGDG publishes, and it is the only key in the file."""
    minion = minions()
    path = minion.call("cp.cache_file", minion.call("slmdb_pillar.get", "pgdg", "key"))
    assert list(minion.call("slmdb_repository.keys", Path(path).read_bytes())) == [PGDG]
    assert minion.call("slmdb_pillar.get", "pgdg", "fingerprint") == PGDG


def test_a_clean_takes_the_repository_away(host):
    """Though pillar goes on asking for it; a second clean finds nothing."""
    minion = host()
    assert minion.state("slmdb_repository.present").result is True
    files = {str(KEYRING), str(SOURCE)}
    for test, result, changes in ((True, None, files), (False, True, files), (False, True, set())):
        run = minion.call("state.apply", "slm_database.package.clean", test=test)
        gone = {one["__id__"]: one for one in run.raw.values()}["PGDG's repository is gone"]
        assert (gone["result"], set(gone["changes"])) == (result, changes)
    assert _traces() == set()
