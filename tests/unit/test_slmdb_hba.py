"""Access rules: written, read, and judged as PostgreSQL would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from _modules import slmdb_hba as hba


def settings(preset="default", **given):
    return {
        "database": given.pop("database", "autobot_slm"),
        "role": given.pop("role", "autobot_slm"),
        "hba": {"preset": preset, "backend_user": "autobot-slm-backend", **given},
    }


def lines(text):
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_the_default_is_the_deployment_s_table():
    assert lines(hba.render(settings())) == [
        "local all postgres peer map=autobot_slm_admin",
        "local replication postgres peer map=autobot_slm_admin",
        "local autobot_slm autobot_slm trust",
        "host autobot_slm autobot_slm 127.0.0.1/32 md5",
        "host autobot_slm autobot_slm ::1/128 md5",
    ]
    assert lines(hba.render_ident(settings())) == [
        "autobot_slm_admin root postgres",
        "autobot_slm_admin postgres postgres",
    ]


def test_hardened_trusts_nobody():
    assert lines(hba.render(settings("hardened")))[2:] == [
        "local autobot_slm autobot_slm peer map=autobot_slm_backend",
        "host autobot_slm autobot_slm 127.0.0.1/32 scram-sha-256",
        "host autobot_slm autobot_slm ::1/128 scram-sha-256",
    ]
    assert (
        lines(hba.render_ident(settings("hardened")))[2]
        == "autobot_slm_backend autobot-slm-backend autobot_slm"
    )


def test_the_operator_s_rules_have_their_places():
    rule = {"type": "hostssl", "database": ["a", "b"], "user": "+x y", "method": "cert"}
    before = {**rule, "address": "10.0.0.0/8", "options": {"clientcert": "verify-full"}}
    after = {**rule, "address": "all", "options": {"ldaptls": True, "map": "a b"}}
    found = lines(hba.render(settings(before=[before], after=[after])))
    assert found[0] == 'hostssl a,b +"x y" 10.0.0.0/8 cert clientcert=verify-full'
    assert found[-1] == 'hostssl a,b +"x y" all cert ldaptls=1 "map=a b"'
    assert len(found) == 7


def test_a_mapping_is_added_after_ours():
    row = {"map": "m", "system_user": "u", "database_user": "a b"}
    assert lines(hba.render_ident(settings(ident=[row])))[-1] == 'm u "a b"'


@pytest.mark.parametrize("name", ["all", "replication", "Mixed", "with space", "öl"])
def test_a_name_that_could_be_a_keyword_means_itself(name):
    assert f'"{name}"' in hba.render(settings(database=name))


NAMES = st.lists(
    st.text(st.characters(min_codepoint=32, exclude_characters='"\x7f', codec="utf-8"), min_size=1)
    .filter(lambda name: name == name.strip() and name[0] not in "+/@")
    .filter(str.isprintable),
    min_size=1,
    max_size=3,
)


@given(NAMES, NAMES, st.sampled_from(["10.0.0.0/8", "::1/128", "all", "samenet"]))
def test_what_is_rendered_is_what_is_parsed(databases, users, address):
    rule = {
        "type": "host",
        "database": databases,
        "user": users,
        "address": address,
        "method": "ldap",
        "options": {"ldapserver": "a b, c", "ldapport": "1"},
    }
    (found,) = hba.parse(hba.line(rule))
    assert [name.strip('"') for name in found["database"]] == databases
    assert [name.strip('"') for name in found["user"]] == users
    assert (found["address"], found["method"]) == (address, "ldap")
    assert found["options"] == rule["options"]


def test_a_mask_is_read_as_a_network():
    (found,) = hba.parse("host all all 10.0.0.0 255.0.0.0 md5 # comment")
    assert found["address"] == "10.0.0.0/8"


def test_the_server_s_rows_are_read_like_lines():
    row = {
        "type": "host",
        "database": ["all"],
        "user_name": ["all"],
        "address": "::1",
        "netmask": "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "auth_method": "peer",
        "options": ["map=x"],
        "error": None,
        "line_number": 4,
    }
    (found,) = hba.from_server([row, {"error": "bad"}])
    assert (found["address"], found["options"], found["key"]) == ("::1/128", {"map": "x"}, "line 4")


def deciding(text, *login):
    return [rule and rule["method"] for rule in hba.possible(hba.parse(text), *login)]


@pytest.mark.parametrize(
    ("text", "login", "methods"),
    [
        ("local all all peer", ("local", "a", "a"), ["peer"]),
        ("local all all peer", ("local", "replication", "a"), [None]),
        ("local replication all peer", ("local", "replication", "a"), ["peer"]),
        ("local sameuser all peer", ("local", "a", "b"), [None]),
        ("local sameuser all peer", ("local", "a", "a"), ["peer"]),
        ("local b,a all peer", ("local", "a", "a"), ["peer"]),
        ('local "a" "b" peer', ("local", "a", "b"), ["peer"]),
        ("host all all 10.0.0.0/8 md5", ("host", "a", "a", "10.1.2.3"), ["md5"]),
        ("host all all 10.0.0.0/8 md5", ("host", "a", "a", "::1"), [None]),
        ("hostssl all all all md5", ("host", "a", "a", "::1"), [None]),
        ("hostssl all all all md5", ("hostssl", "a", "a", "::1"), ["md5"]),
        ("hostnossl all all all md5", ("hostssl", "a", "a", "::1"), [None]),
        ("host all all all md5\nhost all all all trust", ("host", "a", "a", "::1"), ["md5"]),
        # What only the server can tell may be either.
        ("local all +g reject\nlocal all all peer", ("local", "a", "a"), ["reject", "peer"]),
        ("host all all some.host md5", ("host", "a", "a", "::1"), ["md5", None]),
    ],
)
def test_the_first_rule_that_matches_decides(text, login, methods):
    assert deciding(text, *login) == methods


@pytest.mark.parametrize(
    ("earlier", "later", "shadowed"),
    [
        ("host all all all reject", "host a b 10.0.0.0/8 md5", True),
        ("host all all 10.0.0.0/8 md5", "hostssl a b 10.1.0.0/16 md5", True),
        ("hostssl all all all md5", "host a b all md5", False),
        ("host all all 10.1.0.0/16 md5", "host a b 10.0.0.0/8 md5", False),
        ("host all all 0.0.0.0/0 md5", "host a b ::1/128 md5", False),
        ("local all all peer", "local replication a peer", False),
        ("local all all peer", "host all all all md5", False),
        ("local a,b all peer", "local a c trust", True),
        ("local a x,y peer", "local a y trust", True),
        ("local a x peer", "local a x,y trust", False),
    ],
)
def test_a_rule_that_can_never_decide_is_named(earlier, later, shadowed):
    found = hba.shadowed(hba.parse(f"{earlier}\n{later}"))
    assert bool(found) is shadowed
    if shadowed:
        assert found[0].startswith("line 2: ") and "(line 1)" in found[0]


TRUST = {"type": "host", "database": ["all"], "user": ["all"], "method": "trust"}


@pytest.mark.parametrize(
    ("before", "rule", "given"),
    [
        ({}, {"address": "10.0.0.0/8"}, True),
        ({}, {"address": "all"}, True),
        ({}, {"address": "samenet"}, True),
        ({}, {"address": "db.example"}, True),
        ({}, {"type": "local"}, True),
        ({}, {"type": "hostssl", "address": "fd00::/8"}, True),
        ({}, {"address": "10.0.0.0/8", "user": ["reporting"]}, False),
        ({}, {"address": "10.0.0.0/8", "user": ["+dba"]}, False),
        ({}, {"address": "10.0.0.0/8", "user": ["+postgres"]}, True),
        ({}, {"address": "10.0.0.0/8", "method": "md5"}, False),
        ({"user": ["postgres"], "address": "all"}, {"address": "10.0.0.0/8"}, False),
        ({"user": ["postgres"], "address": "10.1.0.0/16"}, {"address": "10.0.0.0/8"}, True),
        ({"user": ["postgres"], "address": "all"}, {"type": "local"}, True),
        (
            {"user": ["postgres"], "address": "all"},
            {"database": ["replication"], "address": "all"},
            True,
        ),
    ],
)
def test_a_rule_that_gives_the_superuser_away(before, rule, given):
    """Whoever decides before it counts, as far as that reaches."""
    rules = [{**TRUST, **before, "method": "reject"}] if before else []
    rules.append({**TRUST, **rule})
    assert hba.given_away(rules, "postgres", []) == (rules[-1:] if given else [])
