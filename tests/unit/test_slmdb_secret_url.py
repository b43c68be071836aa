"""URLs with a password: whose they are, and what another password leaves of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from _modules import slmdb_secret_url as url

WANT = {
    "role": "autobot_slm",
    "adopted_role": None,
    "database": "autobot_slm",
    "port": 5432,
    "url_driver": "postgresql+asyncpg",
}
QUICK = settings(max_examples=300, deadline=None)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
RAW = st.text(st.sampled_from("aZ0/+=#?:%&[],"), min_size=1).filter(lambda text: "%" not in text)
HOSTS = st.sampled_from(
    ["localhost", "127.0.0.1:5432", "[::1]:5432", "[::1]", "h1:5432,h2:5432", "db.example", ""]
)
PATHS = st.sampled_from(["", "/", "/autobot_slm", "/a%2Fb", "?ssl=require", "/db?ssl=require"])


def own(password, place="127.0.0.1:5432/autobot_slm", driver="postgresql+asyncpg"):
    return f"{driver}://autobot_slm:{password}@{place}"


def encoded(text):
    """Percent-encode every byte."""
    return "".join(f"%{byte:02X}" for byte in text.encode())


@QUICK
@given(TEXTS, TEXTS, TEXTS)
def test_what_is_written_is_read_again(password, role, database):
    """Any role, password and database come through the URL and are ours."""
    want = {**WANT, "role": role, "database": database}
    text = url.whole(want, password)
    assert url.password_of(want, text) == password
    assert url.ours(want, text, set())
    assert not url.stale(text, password)


@QUICK
@given(TEXTS, TEXTS)
def test_a_password_is_replaced_and_the_rest_kept(old, new):
    """Only the password's part of an operator's URL changes, and once only."""
    renewed = url.renewed(WANT, own(encoded(old)), new, set())
    before, _, after = own("\0").partition("\0")
    assert renewed.startswith(before)
    assert renewed.endswith(after)
    assert url.password_of(WANT, renewed) == new
    assert url.renewed(WANT, renewed, new, set()) == renewed


@QUICK
@given(RAW, HOSTS, PATHS)
def test_a_raw_password_is_found_whatever_stands_around_it(password, host, path):
    """What SQLAlchemy accepts is compared: raw characters, IPv6, several hosts, no path."""
    text = f"postgresql+asyncpg://autobot_slm:{password}@{host}{path}"
    assert url.holds(text, password)
    assert not url.stale(text, password)
    assert url.stale(text, f"{password}x")
    assert not url.unclear(text)


@pytest.mark.parametrize(
    "place",
    ["localhost/autobot_slm", "127.0.0.1:5432/autobot_slm", "[::1]:5432/autobot_slm"],
)
@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg", "postgres"])
def test_a_url_for_our_role_on_this_server_follows(place, driver):
    """Its form is the operator's, its password is not."""
    text = own("old", place, driver)
    assert url.renewed(WANT, text, "new", set()) == own("new", place, driver)
    assert not url.ours(WANT, text, {"old"})


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        (own("old", "db.example/autobot_slm"), "host db.example, not localhost"),
        (own("old", "127.0.0.1:5433/autobot_slm"), "port 5433, not 5432"),
        (own("old", "127.0.0.1/other"), "another driver, user or database"),
        (own("old", "localhost/autobot_slm?ssl=require"), "with options"),
        (own("old", "h1:5432,h2:5432/autobot_slm"), "several hosts, not localhost"),
        (own("old", "127.0.0.1:5432"), "another driver, user or database"),
        (own("old@rest/of", "localhost/autobot_slm"), "of another form"),
        (own("old", driver="mysql"), "another driver, user or database"),
        ("postgresql://r:old@127.0.0.1:5432/autobot_slm", "another driver, user or database"),
        ("postgresql+asyncpg:///autobot_slm?user=r&password=old", "of another form"),
    ],
)
def test_any_other_is_the_operators(text, apart):
    """It is left alone; why is said in a few words without a password."""
    assert url.renewed(WANT, text, "new", {"old"}) is None
    assert url.password_of(WANT, text) is None
    assert url.holds(text, "old")
    assert url.apart(WANT, text) == apart


def test_a_url_of_the_formulas_form_is_ours_by_its_user_or_its_password():
    """Another role's on this host is not; an adopted role's is, and so is who has our password."""
    text = "postgresql+asyncpg://reporting:theirs@localhost:5433/reports"
    assert not url.ours(WANT, text, {"mine"})
    assert url.password_of(WANT, text) is None
    assert url.ours(WANT, text, {"mine", "theirs"})
    assert url.ours({**WANT, "adopted_role": "reporting"}, text, set())
    assert url.ours(WANT, own("old", "localhost:5433/reports"), set())


@pytest.mark.parametrize("text", ["postgresql://a/b:c@h/d", "://u:p@h/d"])
def test_what_cannot_be_read_is_unclear(text):
    """It is neither in step nor stale."""
    assert url.unclear(text)
    assert not url.stale(text, "p")


@pytest.mark.parametrize("behind", [" # the database", "\tx", " "])
def test_a_comment_behind_a_url_is_unclear(behind):
    """The backend would take it for part of the name; in a password white space may be."""
    assert url.unclear(own("p", "localhost:5432/autobot_slm") + behind)
    assert not url.unclear(own("p q", "localhost:5432/autobot_slm"))


@pytest.mark.parametrize("text", ["", "plain", "postgresql:///autobot_slm?host=/run/postgresql"])
def test_what_has_no_password_is_not_unclear(text):
    """There is nothing to compare."""
    assert not url.unclear(text)
    assert not url.stale(text, "p")


OTHER = "is for database other, not autobot_slm"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (own("p", "127.0.0.1:5432/other?ssl=disable"), OTHER),
        (own("p", "localhost/other"), OTHER),
        (own("a/b?c#d:e", "[::1]/oth%65r"), OTHER),
        ("postgresql:///other", OTHER),
        ("postgresql://localhost:5432/other?application_name=slm", OTHER),
        ("postgresql://other@localhost", OTHER),
        ("sqlite:///x.db", "is for sqlite, not PostgreSQL"),
        ("mysql+aiomysql://u:p@db.example/autobot_slm", "is for mysql+aiomysql, not PostgreSQL"),
        (own("p", "127.0.0.1:5432/autobot_slm?ssl=disable"), None),
        (own("p", "127.0.0.1:6432/other"), None),
        (own("p", "db.example/other"), None),
        (own("p", "h1:5432,h2:5432/other"), None),
        (own("p", "localhost/other?host=db.example"), None),
        (own("p", "localhost/other?a=b&port=6432"), None),
        (own("p", "localhost"), None),
        (own("p@localhost/rest", "h/other"), None),
        (own("p", "localhost/other # ours"), None),
        (own("p", "localhost/other%0A"), None),
        ("postgresql:///autobot_slm", None),
        ("postgresql:///?host=/run/postgresql&dbname=other", None),
        ("p://w@h", None),
        ("plain", None),
        ("", None),
    ],
)
def test_a_url_for_another_database_of_this_server_leads_the_backend_elsewhere(text, said):
    """Another host or port may be a pooler; what is not understood is not quoted."""
    assert url.elsewhere(WANT, text) == said


def test_a_url_that_the_next_run_writes_leads_nowhere_else():
    """It holds a password of ours, so that it is written as a whole."""
    values = {"SLM_DB_PASSWORD": "mine", "A": own("mine", "localhost/other")}
    values["B"] = "postgresql://r:theirs@localhost/other"
    want = {**WANT, "key": "SLM_DB_PASSWORD", "url_keys": ["A", "B", "C"]}
    store = type("Store", (), {"values": lambda self: values})()
    assert url.elsewhere_urls(want, store) == {"B": OTHER}
