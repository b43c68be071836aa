"""Write and read PostgreSQL's configuration syntax: pure functions, no host and no server."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from salt.exceptions import SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_conf"

HEADER = "# Written by Salt (slm_database): change the pillar, not this file.\n"

_LINE = re.compile(
    r"""\s*(?P<name>[A-Za-z_][\w$.]*)\s*(?:=\s*|\s+|(?='))
        (?P<value>'(?:[^'\\\n]|''|\\.)*'|[^\s#'=]+)\s*(?:\#.*)?$""",
    re.VERBOSE,
)
_NUMBER = re.compile(
    r"\s*([-+]?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))\s*([A-Za-z]*)\s*$"
)
_BYTES = {"B": 1, "kB": 1024, "MB": 1024**2, "GB": 1024**3, "TB": 1024**4}
_SECOND = 10**6
_TIMES = {
    "us": 1,
    "ms": 1000,
    "s": _SECOND,
    "min": 60 * _SECOND,
    "h": 3600 * _SECOND,
    "d": 86400 * _SECOND,
}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def __virtual__() -> str:
    return __virtualname__


def text(value: Any) -> str:
    """
    Return a pillar value as the text that PostgreSQL reads.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.text true

    value
        A string, number, boolean (becomes on or off) or a list of strings (becomes a, b).

    Raises SaltInvocationError for anything else, and for a line break or a NUL in a string.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and not math.isfinite(value):
        raise SaltInvocationError(f"{value} is nothing PostgreSQL reads; give a finite number")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(text(item) for item in value)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise SaltInvocationError(f"a setting is a string, number, boolean or list, not {kind}")
    if re.search(r"[\n\r\0]", value):
        raise SaltInvocationError("a setting cannot hold a line break or a NUL; use one line")
    return value


def quote(value: Any) -> str:
    """
    Return a value in single quotes, as a configuration file holds it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.quote "it's"

    value
        What ``slmdb_conf.text`` takes.

    Raises SaltInvocationError for a value that no line can hold.
    """
    return "'" + text(value).replace("\\", "\\\\").replace("'", "''") + "'"


def unquote(token: str) -> str:
    """
    Return what PostgreSQL reads from a value as it stands in a configuration file.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.unquote "'it''s'"

    token
        The value, with or without its quotes.
    """
    if not token.startswith("'"):
        return token

    def replace(match: re.Match[str]) -> str:
        part = match.group(0)
        if part == "''":
            return "'"
        if part[1] in "01234567":
            return chr(int(part[1:], 8) % 256)
        return _ESCAPES.get(part[1], part[1])

    return re.sub(r"''|\\[0-7]{1,3}|\\.", replace, token[1:-1])


def render(settings: dict[str, Any]) -> str:
    """
    Return the text of a configuration file, one setting to a line, sorted by name.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.render '{"work_mem": "16MB"}'

    settings
        Name to value; a value of None leaves its setting out.

    Raises SaltInvocationError for a value that no line can hold.
    """
    present = sorted(item for item in settings.items() if item[1] is not None)
    return HEADER + "".join(f"{name} = {quote(value)}\n" for name, value in present)


def parse(content: str) -> dict[str, str]:
    """
    Return the settings in the text of a configuration file; the last line of a name wins.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.parse "work_mem = '16MB'"

    content
        The text. Lines that are no setting are passed over: this reads, the server judges.
    """
    return {name: value for _, name, value in lines(content)}


def lines(content: str) -> list[tuple[int, str, str]]:
    """
    Return the lines that set something in the text of a configuration file.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.lines "work_mem = '16MB'"

    content
        The text, as ``parse`` takes it.

    Returns the number of each line, from 1 on, with its name, in lower case, and value.
    """
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        match = _LINE.match(line)
        if match:
            found.append((number, match["name"].lower(), unquote(match["value"])))
    return found


def normal(value: Any, vartype: str, unit: str | None = None) -> str:
    """
    Return a value as ``pg_settings.setting`` would show it, or unchanged if it is not understood.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.normal 1GB integer 8kB

    value
        The value as pillar or a file has it.

    vartype
        ``pg_settings.vartype``: bool, integer, real, enum or string.

    unit
        ``pg_settings.unit``, for example 8kB or ms; None for none.
    """
    raw = text(value)
    if vartype == "bool":
        return _boolean(raw)
    if vartype == "enum":
        return raw.lower()
    if vartype not in ("integer", "real"):
        return raw
    match = _NUMBER.match(raw)
    if not match:
        return raw
    digits = match[1]
    octal = vartype == "integer" and re.fullmatch(r"[-+]?0[0-7]+", digits)
    base = 16 if "x" in digits.lower() else 8 if octal else None
    factor = _factor(match[2], unit)
    try:
        number = (float(int(digits, base)) if base else float(digits)) * (factor or math.nan)
    except OverflowError:
        return raw
    if not math.isfinite(number):
        return raw
    return str(round(number)) if vartype == "integer" else f"{number:g}"


def _boolean(raw: str) -> str:
    word = raw.lower()
    for known, answer in (("true", "on"), ("false", "off"), ("yes", "on"), ("no", "off")):
        if word and known.startswith(word):
            return answer
    return {"on": "on", "1": "on", "off": "off", "of": "off", "0": "off"}.get(word, raw)


def _factor(given: str, unit: str | None) -> float | None:
    """Return what a number in the given unit is multiplied by to be in the setting's own unit."""
    if not given:
        return 1
    match = re.fullmatch(r"(\d*)(\w+)", unit or "")
    if not match:
        return None
    for table in (_BYTES, _TIMES):
        if given in table and match[2] in table:
            return table[given] / (table[match[2]] * int(match[1] or 1))
    return None


def nearest(name: str, known: list[str]) -> str | None:
    """
    Return the known name that is most like the given one, or None if none is like it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_conf.nearest shared_bufers '[shared_buffers, work_mem]'

    name
        What was given.

    known
        The names there are.
    """
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return found[0] if found else None
