"""What a function of ours is told wrongly: one line that names the argument, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

WHOLE, AMOUNT = "a whole number from 1 to 3600", "a number from 0.1 to 3600"
WRONG = [
    *(
        ("slmdb.pg_isready", {"timeout": value}, WHOLE)
        for value in (2.5, 0, -1, "abc", [1], None, True, 10**30)
    ),
    *(
        (function, {"timeout": value}, AMOUNT)
        for function in ("slmdb.health", "slmdb.revision", "slmdb_backup.info")
        for value in (0, -1, "abc", [1], True, 10**30)
    ),
    *(("slmdb_alembic.initialize", {"timeout": value}, "to 86400") for value in (0, "abc", [1])),
    *(("slmdb_backup.create", {"type": value}, "full") for value in ("x", ["x"], {"a": 1}, 5)),
    *(("slmdb_backup.rows", {"repository": value}, "allowed: 1") for value in (7, "1", [1])),
    *(("slmdb_backup.drill", {"repository": value}, "allowed: 1") for value in (7, "1", [1])),
    *(("slmdb_secret.fingerprint", {"file": value}, "path") for value in (5, "a b", [1], "")),
    ("slmdb_secret.fingerprint", {"file": "/nope"}, "there is no file /nope"),
    *(
        ("slmdb_session.end", {"pid": value, "started": "2026-11-23T20:15:00Z"}, "1 to 4194304")
        for value in (0, 2**22 + 1, "1; x", [1], None, True, 2.5)
    ),
    *(
        ("slmdb_session.end", {"started": value, "pid": 1}, "UTC to the second")
        for value in ("now", "2026-11-23", 5, None, [1])
    ),
    *(("slmdb_pending.end_of_life", {"today": value}, "2027-06-01") for value in (5, "x", [1])),
]


@pytest.mark.parametrize(("function", "given", "words"), WRONG)
def test_a_wrong_argument_is_one_line(shared_server, function, given, words):
    """Its name, what was given, what is allowed."""
    with pytest.raises(SaltInvocationError) as refused:
        shared_server.call(function, **given)
    line = str(refused.value.strerror)
    assert line.startswith(f"{next(iter(given))}: ") and words in line and "\n" not in line


@pytest.mark.parametrize("keys", [[5], [[1]], ["port", 5]])
def test_a_setting_that_is_none_is_one_line(shared_server, keys):
    """Whatever Salt's YAML made of the name."""
    with pytest.raises(CommandExecutionError, match=r"^slm_database:.*there is no such setting$"):
        shared_server.call("slmdb_pillar.get", *keys)


def test_what_is_not_there_can_be_taken_away(shared_server):
    """A drop-in whose directory nobody made."""
    assert shared_server.call("slmdb_backend.remove") is None


@pytest.mark.parametrize(
    ("function", "arguments"), [("slmdb_unit.reload_units", []), ("slmdb_alembic.initialize", [5])]
)
def test_a_host_without_what_is_asked_for_is_one_line(shared_server, function, arguments):
    """No systemd, no backend: neither is a fault of the function."""
    with pytest.raises(CommandExecutionError) as refused:
        shared_server.call(function, *arguments)
    assert "\n" not in str(refused.value.strerror)


STATES = {
    "slmdb_role.present": [
        ({"roles": ["reader"]}, "roles: a list is given; allowed: a mapping from names"),
        ({"roles": {"pg_x": {}}}, 'roles:pg_x: "pg_x" is not a role name'),
        ({"roles": {"r": {"superuser": True}}}, "roles:r:superuser: there is no such key"),
        ({"roles": {"r": {"member_of": "a"}}}, "roles:r:member_of: text that is not shown here"),
        ({"roles": {"r": {"connection_limit": "x"}}}, "roles:r:connection_limit: "),
        ({"roles": {"r": {"password": "canary"}}}, "roles:r:password: no password is taken"),
        ({"roles": {"r": {"member_of": ["gone"]}}}, "roles:r:member_of:0: the server has no role"),
    ],
    "slmdb_database.present": [
        ({"databases": {"template1": {}}}, 'databases:template1: "template1" is not a database'),
        ({"databases": {"d": {"extensions": "x"}}}, "databases:d:extensions: text that is not"),
        ({"databases": {"d": {"extensions": ["x"]}}}, "databases:d:extensions:0: the server has"),
    ],
    "slmdb_secret.present": [
        ({"url_keys": "URL"}, "url_keys: text that is not shown here is given; allowed: a list"),
        ({"file": "etc/x"}, 'file: "etc/x" is not an absolute path'),
        ({"mode": 416}, "mode: 416 is not a mode"),
        ({"length": "x"}, 'length: "x" is not in range'),
        ({"fil": "/x"}, "fil: there is no such key; did you mean file?"),
    ],
    "slmdb_repository.present": [
        ({"repository": "PGDG"}, 'repository: "PGDG" is not one of the choices'),
        ({"fingerprint": 5}, "fingerprint: 5 is not the full fingerprint of a key"),
    ],
}


@pytest.mark.parametrize(
    ("state", "given", "words"),
    [(state, given, words) for state, cases in STATES.items() for given, words in cases],
)
def test_a_state_of_another_formula_is_checked_as_pillar_is(shared_server, state, given, words):
    """Its own words go through the same table, with test=True and in earnest."""
    for test in (True, False):
        result = shared_server.state(state, test=test, **given)
        assert result.result is False
        assert result.comment.startswith(f"{state}:{words}") and "canary" not in result.comment


def test_what_a_state_leaves_out_is_as_the_settings_say(shared_server):
    """A database needs no more than its name."""
    told = {"databases": {"brief": None}, "roles": {"autobot_slm": {"login": True}}}
    for noun in ("role", "database"):
        arguments = {f"{noun}s": told[f"{noun}s"]}
        assert shared_server.state(f"slmdb_{noun}.present", **arguments).result is True
    assert shared_server.call("slmdb_database.read", ["brief"])["brief"]["owner"] == "autobot_slm"


@pytest.fixture(scope="module")
def another(shared_server, minions, tmp_path_factory):
    """Apply an SLS of another formula in which our states listen to, or watch, a change."""
    directory = tmp_path_factory.mktemp("roots")
    roots = {"base": [str(Path(__file__).resolve().parents[2]), str(directory)]}

    def apply(how: str, **keywords) -> dict:
        what = [{how: [{"test": "A change"}]}]
        states = {
            "A change": {"test.succeed_with_changes": []},
            "A role": {"slmdb_role.present": [*what, {"roles": {"listening": None}}]},
            "A secret": {"slmdb_secret.applicable": what},
            "The server": {"slmdb_service.running": what},
        }
        (directory / "another.sls").write_text(json.dumps(states))
        run = minions(None, file_roots=roots).call("state.apply", "another", **keywords)
        return {one["__id__"]: one for one in run.raw.values()}

    return apply


@pytest.mark.parametrize("how", ["watch", "listen"])
def test_our_states_watch_and_listen(another, how):
    """What changed elsewhere has them applied once more, and the server read its files again."""
    for test in (True, False):
        states = another(how, test=test)
        assert [one["comment"] for one in states.values() if one["result"] is False] == []
        server = states["listener_The server" if how == "listen" else "The server"]
        assert list(server["changes"]) == ["configuration"]
        assert server["result"] is (None if test else True)
