"""The configuration file's syntax: what is written is what is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from salt.exceptions import SaltInvocationError

from _modules import slmdb_conf as conf

LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"))


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,20}", fullmatch=True), LINES))
def test_what_is_rendered_is_what_is_parsed(settings):
    assert conf.parse(conf.render(settings)) == settings


@given(LINES)
def test_a_quoted_value_is_read_as_it_was_given(value):
    assert conf.unquote(conf.quote(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "on"),
        (False, "off"),
        (7, "7"),
        (1.5, "1.5"),
        ("it's", "it's"),
        (["127.0.0.1", "::1"], "127.0.0.1, ::1"),
    ],
)
def test_a_pillar_value_becomes_text(value, text):
    assert conf.text(value) == text


@pytest.mark.parametrize("value", ["a\nb", "a\0", None, {}, float("nan"), float("inf")])
def test_what_no_line_can_hold_is_refused(value):
    with pytest.raises(SaltInvocationError):
        conf.text(value)


def test_a_setting_without_a_value_is_left_out():
    assert conf.parse(conf.render({"jit": None})) == {}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("work_mem = 4MB", {"work_mem": "4MB"}),
        ("work_mem 4MB # a comment", {"work_mem": "4MB"}),
        ("Work_Mem='4MB'", {"work_mem": "4MB"}),
        ("log_line_prefix = '%m # ''x'''", {"log_line_prefix": "%m # 'x'"}),
        (r"a = 'tab\tquote\'octal\101'", {"a": "tab\tquote'octalA"}),
        ("# work_mem = 4MB", {}),
        ("nonsense", {}),
        ("a = 1\na = 2", {"a": "2"}),
    ],
)
def test_lines_are_read_as_the_server_reads_them(line, found):
    assert conf.parse(line) == found


@pytest.mark.parametrize(
    ("value", "vartype", "unit", "normal"),
    [
        ("1GB", "integer", "8kB", "131072"),
        ("1 GB", "integer", "kB", "1048576"),
        (131072, "integer", "8kB", "131072"),
        ("0x10", "integer", None, "16"),
        ("010", "integer", None, "8"),
        ("1.5GB", "integer", "MB", "1536"),
        ("5min", "integer", "s", "300"),
        ("2s", "real", "ms", "2000"),
        ("1e2", "real", None, "100"),
        ("yes", "bool", None, "on"),
        ("F", "bool", None, "off"),
        ("of", "bool", None, "off"),
        ("LOGICAL", "enum", None, "logical"),
        ("As Is", "string", None, "As Is"),
        ("5 parsecs", "integer", "ms", "5 parsecs"),
        ("1GB", "integer", None, "1GB"),
        ("1GB", "integer", "ms", "1GB"),
        ("perhaps", "bool", None, "perhaps"),
        ("0x" + "F" * 5000, "integer", None, "0x" + "F" * 5000),
        ("0" + "7" * 5000, "integer", "kB", "0" + "7" * 5000),
        ("9" * 5000, "integer", None, "9" * 5000),
        ("1e400", "real", None, "1e400"),
    ],
)
def test_values_are_compared_in_the_server_s_units(value, vartype, unit, normal):
    assert conf.normal(value, vartype, unit) == normal


def test_a_typing_error_has_a_nearest_name():
    known = ["shared_buffers", "work_mem"]
    assert conf.nearest("shared_bufers", known) == "shared_buffers"
    assert conf.nearest("WORKMEM", known) == "work_mem"
    assert conf.nearest("zzz", known) is None
