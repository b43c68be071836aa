"""
Read and edit files in the syntax of systemd's ``EnvironmentFile=``.

Pure: bytes go in, values or bytes come out, no file is opened here. What is read is what systemd
hands to a service. An edit changes the entries it was asked to change and keeps every other byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_envfile"

_NEWLINE = "\n\r"
_WHITESPACE = " \t\n\r"
_COMMENT = "#;"
_ESCAPED_IN_DOUBLE_QUOTES = '"\\`$'
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_BARE_VALUE = re.compile(r"[A-Za-z0-9_./:@%+,^=-]+\Z")
# What can be taken in one go: one character at a time, a large file would take seconds.
_BLANK = re.compile(r"[ \t\n\r]*")
_TO_LINE_END = re.compile(r"[^\\\n\r]*")
_TO_EQUALS_SIGN = re.compile(r"[^=\n\r]*")
_TO_SINGLE_QUOTE = re.compile(r"[^']*")
_TO_DOUBLE_QUOTE = re.compile(r'[^"\\]*')


class Entry(NamedTuple):
    """One line of the file that is neither blank nor a comment, or one comment (key ``#``)."""

    key: str
    value: str
    line: int
    start: int
    value_start: int
    end: int
    closed: bool
    assignment: bool


def __virtual__() -> str:
    return __virtualname__


def _bytes_of(text: str) -> bytes:
    return text.encode("latin-1")


def _decoded(text: str) -> str:
    """Decode text that has one character per byte; bytes that mean nothing become surrogates."""
    return _bytes_of(text).decode("utf-8", "surrogateescape")


class _Reader:
    """The state machine of systemd's parser; a character is a byte, a position one in the file."""

    def __init__(self, text: str, comments_continue: bool):
        self.text = text
        self.comments_continue = comments_continue
        self.position = 0
        self.line, self.counted = 1, 0

    def entries(self) -> list[Entry]:
        found = []
        while self._skip_blank():
            start = self.position
            if self.text[start] in _COMMENT:
                found.append(self._comment(start))
            else:
                found.append(self._line(start))
        return found

    def _skip_blank(self) -> bool:
        self._run(_BLANK)
        return self.position < len(self.text)

    def _entry(
        self, key: str, value: str, start: int, value_start: int, closed: bool, assignment: bool
    ) -> Entry:
        self.line += self.text.count("\n", self.counted, start)
        self.counted = start
        return Entry(
            _decoded(key),
            _decoded(value),
            self.line,
            start,
            value_start,
            self.position,
            closed,
            assignment,
        )

    def _next(self) -> str:
        """Return the next character, or an empty string at the end."""
        character = self.text[self.position : self.position + 1]
        self.position += len(character)
        return character

    def _run(self, expression: re.Pattern[str]) -> str:
        """Return the characters from here on that match, none if the first does not."""
        before = self.position
        self.position = expression.match(self.text, before).end()  # type: ignore[union-attr]
        return self.text[before : self.position]

    def _comment(self, start: int) -> Entry:
        self._run(_TO_LINE_END)
        while self._next() == "\\":
            if self._next() in _NEWLINE and not self.comments_continue:
                break
            self._run(_TO_LINE_END)
        return self._entry("#", "", start, start, True, False)

    def _line(self, start: int) -> Entry:
        self._next()  # an equals sign that comes first ends no name
        self._run(_TO_EQUALS_SIGN)
        character = self._next()
        if character != "=":
            name = self.text[start : self.position]
            return self._entry(name, "", start, start, bool(character), False)
        key = self.text[start : self.position - 1].rstrip(_WHITESPACE)
        value_start = self.position
        value, closed = self._value()
        return self._entry(key, value, start, value_start, closed, True)

    def _value(self) -> tuple[str, bool]:
        value = ""
        while True:
            character = self._next()
            if not character or character in _NEWLINE:
                return value, True
            if character == "'":
                part, closed = self._single_quoted()
            elif character == '"':
                part, closed = self._double_quoted()
            elif character in _WHITESPACE:
                continue
            else:
                self.position -= 1
                part, closed = self._bare(value)
                return part, closed
            value += part
            if not closed:
                return value, False

    def _single_quoted(self) -> tuple[str, bool]:
        value = self._run(_TO_SINGLE_QUOTE)
        return value, bool(self._next())

    def _double_quoted(self) -> tuple[str, bool]:
        value = self._run(_TO_DOUBLE_QUOTE)
        while (character := self._next()) == "\\":
            character = self._next()
            if not character:
                return value, False
            if character != "\n":
                value += character if character in _ESCAPED_IN_DOUBLE_QUOTES else f"\\{character}"
            value += self._run(_TO_DOUBLE_QUOTE)
        return value, bool(character)

    def _bare(self, value: str) -> tuple[str, bool]:
        """Read the rest of a value outside quotes: white space at its end is no part of it."""
        while True:
            part = self._run(_TO_LINE_END)
            value += part
            if self._next() != "\\":
                return value[: len(value) - len(part) + len(part.rstrip(_WHITESPACE))], True
            character = self._next()
            if not character:
                return value, False
            if character not in _NEWLINE:
                value += character


def entries(data: bytes, comments_continue: bool = False) -> list[Entry]:
    """
    List the comments, assignments and other lines of an environment file.

    data
        The content of the file, as bytes.
    comments_continue
        True to read as systemd before 254 did, where a backslash at the end of a comment continues
        it.

    Returns entries (key, value, line, start, value_start, end, closed, assignment) in the order of
    the file.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_envfile.entries 'A=1'
    """
    if isinstance(data, str):
        data = data.encode()
    return _Reader(data.decode("latin-1"), comments_continue).entries()


def valid_text(text: str) -> bool:
    """
    Tell whether systemd accepts a text as a value.

    text
        The text.

    Returns False if it holds a NUL, or a code point that is no character.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_envfile.valid_text 'text'
    """
    return "\0" not in text and (text.isascii() or all(map(_is_character, text)))


def _is_character(one: str) -> bool:
    """Whether it is neither half of a pair nor a code point that Unicode keeps free for ever."""
    code = ord(one)
    kept_free = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
    return not (0xD800 <= code <= 0xDFFF or kept_free)


def values(data: bytes, comments_continue: bool = False) -> dict[str, str]:
    """
    Return the variables that systemd hands to a service for an environment file.

    data
        The content of the file, as bytes.
    comments_continue
        True to read as systemd before 254 did.

    Returns a dictionary of names and values; of a name that occurs twice, the last value.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_envfile.values 'A=1'
    """
    found = entries(data, comments_continue)
    return {
        entry.key: entry.value for entry in found if entry.assignment and _NAME.match(entry.key)
    }


def problem(data: bytes, keys: Iterable[str]) -> str | None:
    """
    Say why a file cannot be understood, as far as some of its keys are concerned.

    data
        The content of the file, as bytes.
    keys
        The names that matter.

    Returns one line without any value of the file, or None.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_envfile.problem 'A=1' '[A]'
    """
    wanted = list(keys)
    if b"\0" in data:
        return "it holds NUL bytes"
    found = entries(data)
    return (
        _broken_entry(found)
        or next((text for key in wanted if (text := _key_problem(found, key))), None)
        or _ambiguous(data, wanted)
        or _something_else(found)
    )


def _broken_entry(found: list[Entry]) -> str | None:
    for entry in found:
        if entry.assignment and not (valid_text(entry.key) and valid_text(entry.value)):
            return f"line {entry.line} is not valid UTF-8, so systemd refuses the whole file"
        if entry.assignment and not entry.closed:
            return f"it is cut off: the value that begins in line {entry.line} has no end"
        if not entry.assignment and not entry.closed:
            return f"it is cut off in line {entry.line}, which has no '=' and no end"
    return None


def _something_else(found: list[Entry]) -> str | None:
    lines = [entry for entry in found if entry.key != "#"]
    if not lines or any(entry.assignment for entry in lines):
        return None
    return f"line {lines[0].line} and all others have no KEY=value: it is no environment file"


def _key_problem(found: list[Entry], key: str) -> str | None:
    assigned = [entry for entry in found if entry.assignment and entry.key == key]
    if len({entry.value for entry in assigned}) > 1:
        lines = ", ".join(str(entry.line) for entry in assigned)
        return f"{key} has different values in lines {lines}"
    if assigned and not assigned[0].value:
        return f"{key} has an empty value in line {assigned[0].line}"
    if assigned:
        return None
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(key)}(?![A-Za-z0-9_])")
    for entry in found:
        if entry.key != "#" and word.search(entry.key):
            return f"line {entry.line} has {key} {_hidden(entry.key)}, which systemd ignores"
    return None


def _hidden(name: str) -> str:
    """Say what makes something else of a name."""
    if name.startswith("\ufeff"):
        return "behind a byte order mark"
    return "behind 'export'" if name.split()[0] == "export" else "in a form"


def _ambiguous(data: bytes, keys: list[str]) -> str | None:
    newer, older = values(data), values(data, comments_continue=True)
    for key in keys:
        if newer.get(key) != older.get(key):
            return (
                f"{key} follows a comment that ends in a backslash, which older systemd continues"
            )
    return None


def quoted(value: str) -> str:
    """
    Write a value so that systemd and sh read it back unchanged.

    value
        The value: any text without NUL.

    Returns the text to put behind the equals sign.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_envfile.quoted 'a b'
    """
    if _BARE_VALUE.match(value):
        return value
    return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'


def edit(data: bytes, changes: dict[str, str | None]) -> bytes:
    """
    Set and remove keys of an environment file and keep every other byte.

    data
        The content of the file, as bytes.
    changes
        Names and their new values; None removes the name. A name that the file has is changed in
        its place, a new one is added as a line of its own.

    Returns the new content.

    Raises CommandExecutionError if the result would not be read back as wanted.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_envfile.edit 'A=1' '{"A": "2"}'
    """
    end = _place_for_new(data)
    for place, gap in ((end, b""), (end, b"\n"), (0, b"")):
        result = _edited(data, changes, place, gap)
        if all(_reads_back(data, result, changes, old) for old in (False, True)):
            return result
    raise CommandExecutionError(
        f"cannot set {', '.join(changes)} so that systemd reads it back: see the lines around it"
    )


def _edited(data: bytes, changes: dict[str, str | None], place: int, gap: bytes) -> bytes:
    """Add the new keys at a place, behind a gap if a comment there would swallow them."""
    present = {entry.key for entry in entries(data) if entry.assignment}
    new = [key for key, value in changes.items() if value is not None and key not in present]
    lines = b"".join(f"{key}={quoted(changes[key] or '')}\n".encode() for key in new)
    result = data[:place] + (gap if new else b"") + lines + data[place:]
    for key, value in changes.items():
        if key in present:
            result = _removed(result, key) if value is None else _replaced(result, key, value)
    return result


def _reads_back(before: bytes, after: bytes, changes: dict[str, str | None], old: bool) -> bool:
    found = _assigned(after, old)
    now = {key: value for key, value in found if _NAME.match(key)}
    if any(now.get(key) != value for key, value in changes.items()):
        return False
    was = _assigned(before, old)
    return [one for one in found if one[0] not in changes] == [
        one for one in was if one[0] not in changes
    ]


def _assigned(data: bytes, old: bool) -> list[tuple[str, str]]:
    return [(entry.key, entry.value) for entry in entries(data, old) if entry.assignment]


def _named(data: bytes, key: str) -> list[Entry]:
    return [entry for entry in entries(data) if entry.assignment and entry.key == key]


def _replaced(data: bytes, key: str, value: str) -> bytes:
    text, kept, done = quoted(value).encode(), [], 0
    for entry in _named(data, key):
        kept += [data[done : entry.value_start], text]
        ends_line = data[entry.end - 1 : entry.end] in (b"\n", b"\r")
        done = entry.end - 1 if ends_line else entry.end
    return b"".join([*kept, data[done:]])


def _place_for_new(data: bytes) -> int:
    """Return where new lines go: the end, or before a last line that has no newline."""
    if not data or data[-1:] in (b"\n", b"\r"):
        return len(data)
    last = entries(data)
    return _line_start(data, last[-1].start) if last else 0


def _line_start(data: bytes, position: int) -> int:
    newline = data.rfind(b"\n", 0, position)
    return max(newline, data.rfind(b"\r", newline + 1, position)) + 1


def _removed(data: bytes, key: str) -> bytes:
    kept, done = [], 0
    for entry in _named(data, key):
        kept.append(data[done : _line_start(data, entry.start)])
        done = entry.end
    return b"".join([*kept, data[done:]])
