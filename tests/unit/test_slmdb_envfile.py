"""The environment file: what is read is what systemd hands over, an edit keeps the rest."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from salt.exceptions import CommandExecutionError

from _modules import slmdb_envfile as envfile

KEY = "SLM_DB_PASSWORD"
QUICK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
AWKWARD = st.sampled_from(
    [*"'\"\\`$#;=% \t\n\r!&|<>*?~^:/@", "\\\n", "export ", "A=", "é", "密", "😀", "\x01", "\x7f"]
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40),
    st.lists(AWKWARD, max_size=20).map("".join),
).filter(envfile.valid_text)
LINES = st.lists(
    st.sampled_from(
        [
            *(
                "# note\n",
                "; note\n",
                "\n",
                "  \n",
                "A=1\n",
                "B='x y'\n",
                'C="x\n y"\n',
                "D=a\\\nb\n",
            ),
            *(
                "export E=1\n",
                " F = 2 \n",
                "bare\n",
                "G=\n",
                "H=x#y\r\n",
                "\u00e9=1\n",
                "# odd \\\n",
            ),
        ]
    ),
    max_size=8,
).map("".join)
ENDS = st.sampled_from(["", "Z=last", "# last", "Z='last'", "  Z=last  "])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("K=plain", "plain"),
        ("K=a b", "a b"),
        ("K=  a b  ", "a b"),
        ("K='a b'", "a b"),
        ('K="a b"', "a b"),
        ("K='a'\"b\" c", "abc"),
        ('K=a "b"', 'a "b"'),
        ("K='a\\b'", "a\\b"),
        (r'K="\"\\\`\$\n"', '"\\`$\\n'),
        ("K=a\\'b", "a'b"),
        ("K=a\\\nb", "ab"),
        ('K="a\\\nb"', "ab"),
        ('K="a\nb"', "a\nb"),
        ("K='a\nb'", "a\nb"),
        ("K=a#b;c", "a#b;c"),
        ("K=#a", "#a"),
        ("K=$HOME%n=x", "$HOME%n=x"),
        ("K=a\\ ", "a "),
        ("K=é密😀", "é密😀"),
        (" K =a", "a"),
        ("K=a\r\n", "a"),
        ("K=1\nK=2", "2"),
        ("K=", ""),
        ("\n\n;x\n#y\nK=a", "a"),
    ],
)
def test_reads_as_systemd_does(text, value):
    """Quotes, escapes, white space and comments mean what systemd's manual and parser say."""
    assert envfile.values(text.encode())["K"] == value


@pytest.mark.parametrize("text", ["export K=a", "#K=a", "1K=a", "K", "=a", "K-L=a", "\ufeffK=a"])
def test_lines_that_systemd_ignores_are_no_variables(text):
    """Neither exports nor comments nor names that are none become variables."""
    assert envfile.values(f"{text}\n".encode()) == {}


def test_a_comment_that_ends_in_a_backslash_is_read_both_ways():
    """Systemd before 254 took the next line for a comment as well."""
    data = b"# x \\\nK=a\n"
    assert envfile.values(data) == {"K": "a"}
    assert envfile.values(data, comments_continue=True) == {}


@settings(QUICK, max_examples=40)
@given(st.lists(TEXTS, min_size=100, max_size=120))
def test_a_written_value_is_read_back(values):
    """Whatever the value, it comes back unchanged."""
    named = {f"V{number}": value for number, value in enumerate(values)}
    assert envfile.values(envfile.edit(b"", named)) == named


@settings(QUICK, max_examples=40)
@given(st.lists(TEXTS, min_size=100, max_size=120))
def test_sh_reads_a_written_value_as_systemd_does(values):
    """A script that sources the file gets the same values."""
    data = b"".join(
        b"V=" + envfile.quoted(value).encode() + b'\nprintf "%s\\0" "$V"\n' for value in values
    )
    answer = subprocess.run(["sh"], input=data, capture_output=True, check=True)
    assert answer.stdout.split(b"\0")[:-1] == [value.encode() for value in values]


@QUICK
@given(LINES, ENDS, TEXTS.filter(bool))
def test_an_edit_keeps_every_other_byte(lines, end, value):
    """What was there is there after a key was added, and again exactly so when it is removed."""
    before = (lines + end).encode()
    after = envfile.edit(before, {KEY: value})
    assert envfile.values(after)[KEY] == value
    assert envfile.edit(after, {KEY: None}).replace(b"\n\n", b"\n") == before.replace(
        b"\n\n", b"\n"
    )
    assert after.endswith(end.encode())


@QUICK
@given(LINES, ENDS, TEXTS.filter(bool), TEXTS.filter(bool))
def test_a_change_happens_in_its_place(lines, end, old, new):
    """A key that is there keeps its line."""
    before = f"{lines}X=1\n{KEY}={envfile.quoted(old)}\n{end}".encode()
    after = envfile.edit(before, {KEY: new})
    place = before.index(f"{KEY}=".encode())
    assert after[:place] == before[:place]
    assert after[place:] == f"{KEY}={envfile.quoted(new)}\n{end}".encode()


@QUICK
@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(data):
    """No file breaks the reader, and what the reader accepts an edit does not harm."""
    assert envfile.entries(data) is not None
    problem = envfile.problem(data, [KEY])
    if problem is None:
        foreign = {key: value for key, value in envfile.values(data).items() if key != KEY}
        after = envfile.values(envfile.edit(data, {KEY: "new"}))
        assert after == {**foreign, KEY: "new"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"SLM_DB_PASSWORD=a\nSLM_DB_PASSWORD=b\n", "different values in lines 1, 2"),
        (b"A=1\n\0SLM_DB_PASSWORD=a\n", "NUL"),
        (b"SLM_DB_PASSWORD=\n", "empty value in line 1"),
        (b"SLM_DB_PASSWORD=''\n", "empty value"),
        (b"export SLM_DB_PASSWORD=a\n", "behind 'export', which systemd ignores"),
        (b"\xef\xbb\xbfSLM_DB_PASSWORD=a\n", "behind a byte order mark, which systemd ignores"),
        (b"SLM_DB_PASSWORD\n", "which systemd ignores"),
        (b"SLM_DB_PASSWORD='a\nB=1\n", "value that begins in line 1 has no end"),
        (b'A="b\nSLM_DB_PASSWORD=a\n', "value that begins in line 1 has no end"),
        (b"SLM_DB_PASSWORD=a\\", "has no end"),
        (b"A=1\nSLM_DB_PASSW", "cut off in line 2"),
        (b"A=\xff\nSLM_DB_PASSWORD=a\n", "line 1 is not valid UTF-8"),
        (b"# x \\\nSLM_DB_PASSWORD=a\n", "older systemd"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named(data, says):
    """One line says what is wrong and where, and shows no value."""
    assert says in envfile.problem(data, [KEY])


def test_a_large_file_keeps_its_line_numbers():
    """Lines are counted across values and comments that have several, however many there are."""
    lines = [f"KEY_{number}='a\nb' # {number}" for number in range(9_999)]
    data = "\n".join([*lines, f"{KEY}=a", *lines, f"{KEY}=b", ""]).encode()
    assert envfile.problem(data, [KEY]) == f"{KEY} has different values in lines 19999, 39998"


class CountedText(str):
    """A text that adds up over how many of its characters somebody counted."""

    seen = 0

    def count(self, part, start, end):
        self.seen += end - start
        return super().count(part, start, end)


def test_a_large_file_is_counted_through_once():
    """The line of an entry is found from that of the one before, not from the file's beginning."""
    text = CountedText("A=1\n" * 20_000)
    found = envfile._Reader(text, comments_continue=False).entries()
    assert [entry.line for entry in found] == list(range(1, 20_001))
    assert text.seen <= len(text)


def test_all_lines_of_a_key_are_edited():
    """A key that is there twice is changed in both places, and taken out of both."""
    data = b"A=1\r\nB=x\n  A='1' \nC=y\rA=1"
    assert envfile.edit(data, {"A": "2", "B": None}) == b"A=2\r\n  A=2\nC=y\rA=2"
    assert envfile.edit(data, {"A": None}) == b"\nB=x\nC=y\r"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SLM_DB_PASSWORD=a",
        b"SLM_DB_PASSWORD=a\nSLM_DB_PASSWORD=a\n",
        b"# SLM_DB_PASSWORD=\nSLM_DB_PASSWORD=a\n",
        b"OTHER=\nexport SLM_DB_PASSWORD=a\nSLM_DB_PASSWORD=a\n",
        b"# caf\xe9\nSLM_DB_PASSWORD=a\n",
    ],
)
def test_a_file_that_can_be_understood_is_not_refused(data):
    """Foreign oddities are no reason to stop."""
    assert envfile.problem(data, [KEY]) is None


def test_an_edit_that_would_not_be_read_back_is_refused():
    """A value that systemd would not hand over is not written."""
    with pytest.raises(CommandExecutionError, match="1KEY"):
        envfile.edit(b"A=1\n", {"1KEY": "x"})


@pytest.mark.parametrize("text", ["root:*:19000:0:99999:7:::\n", "# note\n[section]\nkey value\n"])
def test_another_kind_of_file_is_no_environment_file(text):
    """A path that was meant for something else is not written to."""
    assert "it is no environment file" in envfile.problem(text.encode(), [KEY])
    assert envfile.problem(f"{text}A=1\n".encode(), [KEY]) is None
    assert envfile.problem(b"# note\n\n", [KEY]) is None
