"""
The kinds of values that pillar holds: what each may look like, and how to say so.

Pure checks without access to the host. ``slmdb_schema`` says which key is of which kind.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from salt.exceptions import SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_kinds"

METHODS = (
    "trust",
    "peer",
    "scram-sha-256",
    "md5",
    "password",
    "cert",
    "gss",
    "ident",
    "ldap",
    "radius",
    "pam",
    "oauth",
    "reject",
)
ENCODINGS = (
    "UTF8",
    "SQL_ASCII",
    "KOI8R",
    "KOI8U",
    "WIN866",
    "WIN874",
    *(f"LATIN{number}" for number in range(1, 11)),
    *(f"ISO_8859_{number}" for number in range(5, 9)),
    *(f"WIN{number}" for number in range(1250, 1259)),
    *("EUC_CN", "EUC_JIS_2004", "EUC_JP", "EUC_KR", "EUC_TW", "MULE_INTERNAL"),
)
_LARGE = 2**63  # beyond that PostgreSQL reads no number, and Python may write none
ADDRESS_WORDS = ("all", "samehost", "samenet")
_DAY = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_DAYS = rf"{_DAY}(?:-{_DAY})?"
# One that ends when it begins could be no time or a whole day: that is 00:00-24:00.
_WINDOW = rf"(?:{_DAYS}(?:,{_DAYS})* |daily )?(?P<begin>{_TIME})-(?!(?P=begin))(?:{_TIME}|24:00)"


class _Kind(NamedTuple):
    what: str
    allowed: str
    holds: Callable[..., bool]


def __virtual__() -> str:
    return __virtualname__


def _matches(pattern: str) -> Callable[[Any], bool]:
    """Return a check that a whole string, and nothing but a string, looks like the pattern."""
    # Compiled when needed: a pillar has few of the kinds, and all of them take milliseconds.
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < _LARGE if isinstance(value, int) else math.isfinite(value)


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_amount(value: Any, low: float, high: float) -> bool:
    return _is_number(value) and low <= value <= high


def _is_choice(value: Any, *choices: str) -> bool:
    return isinstance(value, str) and value in choices


def _is_major(value: Any) -> bool:
    majors = __salt__["slmdb_instance.majors"]()
    return isinstance(value, (int, str)) and value in (*majors, *map(int, majors))


def _is_identifier(value: Any) -> bool:
    if not isinstance(value, str) or value != value.strip() or not value.isprintable():
        return False
    return 1 <= len(value.encode(errors="replace")) <= 63 and not set(value) & set("'\"`\\")


def _is_table(value: Any) -> bool:
    schema, dot, name = value.partition(".") if isinstance(value, str) else ("", "", "")
    return _is_identifier(value) or (bool(dot) and _is_identifier(schema) and _is_identifier(name))


def _is_role(value: Any) -> bool:
    # The first three mean a group, a file and a pattern in an access rule.
    return (
        _is_identifier(value)
        and not value.startswith(("+", "@", "/", "pg_"))
        and value not in ("public", "none", "postgres")
    )


def _is_database(value: Any) -> bool:
    return (
        _is_identifier(value)
        and not value.startswith(("@", "/"))
        and value not in ("template0", "template1", "postgres")
    )


def _is_rule_name(value: Any) -> bool:
    return (
        _is_identifier(value)
        and not value.startswith(("@", "/"))
        and value != "+"
        and "," not in value
    )


def _is_address(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    if value in ADDRESS_WORDS:
        return True
    try:
        ipaddress.ip_network(value)
    except ValueError:
        return False
    return "/" in value and "%" not in value and value.rsplit("/", 1)[1].isdigit()


def _is_listen_address(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return value in ("localhost", "*")
    return "%" not in value


def _is_path(value: Any) -> bool:
    # It ends up in units, in apt's sources and in URLs: nothing that means something there.
    if not isinstance(value, str) or not re.fullmatch(r"/[^\s'\"\\%$*?\[\]`;#]+(?<!/)", value):
        return False
    return value.isprintable() and ".." not in value.split("/")


def _is_relative_path(value: Any) -> bool:
    return isinstance(value, str) and (_is_path(value) or _is_path("/" + value.removeprefix("./")))


def _is_setting_value(value: Any) -> bool:
    if isinstance(value, str):
        return not any(ord(character) < 32 or ord(character) == 127 for character in value)
    return isinstance(value, bool) or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def _is_command(value: Any) -> bool:
    try:
        return _is_text(value) and bool(shlex.split(value))
    except ValueError:
        return False


_NAME = (
    "1 to 63 bytes of printable characters without quotes or backslashes, no space at either end"
)
_KINDS: dict[str, _Kind] = {
    "address": _Kind(
        "an address range",
        "a CIDR range without host bits, such as 10.1.2.0/24, 10.1.2.3/32 or fd00::/8, "
        "or all, samehost, samenet",
        _is_address,
    ),
    "amount": _Kind("in range", "a number from {} to {}", _is_amount),
    "boolean": _Kind("a boolean", "true or false", lambda value: isinstance(value, bool)),
    "choice": _Kind("one of the choices", "", _is_choice),
    "bucket": _Kind(
        "the name of a bucket",
        "3 to 63 lower-case letters, digits, dots and hyphens",
        _matches(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    ),
    "command": _Kind(
        "a command",
        "one line of words, quoted as in a shell, without a shell's operators",
        _is_command,
    ),
    "component": _Kind(
        "a repository component", "such as main or main 17", _matches(r"[a-z0-9.-]+( [a-z0-9.-]+)*")
    ),
    "database": _Kind(
        "a database name",
        f"{_NAME}, not beginning with @ or /, and none of postgres, template0, template1",
        _is_database,
    ),
    "duration": _Kind(
        "a length of time", "such as 90m, 2h or 1d", _matches(r"[1-9][0-9]{0,4}[mhd]")
    ),
    "encoding": _Kind(
        "an encoding of a PostgreSQL server",
        "UTF8 or another server encoding, written as the server does",
        lambda value: isinstance(value, str) and value in ENCODINGS,
    ),
    "environment_key": _Kind(
        "a name for an environment variable",
        "letters, digits and underscores, not beginning with a digit",
        _matches(r"[A-Za-z_][A-Za-z0-9_]{0,127}"),
    ),
    "fingerprint": _Kind(
        "the full fingerprint of a key",
        "40 hexadecimal digits, spaces between them do not matter",
        _matches(r"(?:\s*[0-9A-Fa-f]){40}\s*"),
    ),
    "host_name": _Kind(
        "a host",
        "a name or an IP address, without a scheme, a port and a path",
        _matches(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}"),
    ),
    "identifier": _Kind("a name", _NAME, _is_identifier),
    "instant": _Kind(
        "a moment",
        "UTC to the second, such as 2026-11-23T20:15:00Z",
        _matches(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"),
    ),
    "integer": _Kind("in range", "a whole number from {} to {}", _is_integer),
    "listen_address": _Kind(
        "an address to listen on",
        "an IP address, localhost, or *; each as a string",
        _is_listen_address,
    ),
    "locale": _Kind(
        "a locale",
        "such as C.UTF-8 or en_US.UTF-8",
        _matches(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)?(@[a-z]+)?"),
    ),
    "major": _Kind(
        "a PostgreSQL major",
        "14 to 18",
        _is_major,
    ),
    "method": _Kind(
        "an authentication method", ", ".join(METHODS), lambda value: _is_choice(value, *METHODS)
    ),
    "mode": _Kind(
        "a mode for a secret file",
        'four octal digits in quotes that give others nothing, such as "0640" or "0600"',
        _matches(r"0[46][046]0"),
    ),
    "option_value": _Kind(
        "the value of an option",
        "one line of text in quotes, without double quotes",
        lambda value: _is_text(value) and '"' not in value,
    ),
    "package": _Kind("a package name", "as Debian writes it", _matches(r"[a-z0-9][a-z0-9+.-]+")),
    "path": _Kind(
        "an absolute path",
        "a path that begins with /, without .., spaces, quotes and wildcards",
        _is_path,
    ),
    "moment": _Kind(
        "a time of the week",
        'such as "Sun 01:30", "Mon-Sat 01:30" or "daily 02:30"',
        _matches(rf"(?:{_DAY}(?:[,-]{_DAY})*|daily) {_TIME}"),
    ),
    "pillar_key": _Kind(
        "the name of a pillar key",
        "the name of a key, levels joined by colons, such as vault:slm:password; "
        "never the password itself",
        _matches(r"[A-Za-z0-9_.-]+(:[A-Za-z0-9_.-]+)*"),
    ),
    "recipient": _Kind(
        "the public key of a recipient",
        "age1… as age-keygen -y prints it, or a public SSH key (ssh-ed25519 or ssh-rsa); "
        "never the secret one",
        _matches(
            r"age1[02-9ac-hj-np-z]{58}"
            r"|ssh-(?:ed25519|rsa) [A-Za-z0-9+/]{64,1000}={0,2}(?: [ -~]{1,200})?"
        ),
    ),
    "relative_path": _Kind(
        "a path", "an absolute path, or one below the backend's directory", _is_relative_path
    ),
    "revision": _Kind(
        "a target for Alembic",
        "head, heads, a revision, branch@head or a step such as +1",
        _matches(r"[A-Za-z0-9_@+][A-Za-z0-9_@+.-]{0,127}"),
    ),
    "role": _Kind(
        "a role name",
        f"{_NAME}, not beginning with pg_, +, @ or /, and none of postgres, public, none",
        _is_role,
    ),
    "room": _Kind(
        "a part of a disk",
        "such as 10% or 20GB",
        _matches(r"[1-9]?[0-9]%|[1-9][0-9]{0,6} ?(MB|GB|TB)"),
    ),
    "rotation": _Kind("a length of time", "such as 90d or 12w", _matches(r"[1-9][0-9]{0,3}[dw]")),
    "rrule": _Kind(
        "a recurrence rule",
        "a rule as in RFC 5545, such as FREQ=MONTHLY;BYDAY=2SA",
        _matches(r"(RRULE:)?([A-Z]+=[A-Z0-9,+-]+;)*FREQ=[A-Z]+(;[A-Z]+=[A-Z0-9,+-]+)*"),
    ),
    "rule_name": _Kind(
        "a name in an access rule",
        f"{_NAME}, no comma (write a list), not beginning with @ or /",
        _is_rule_name,
    ),
    "setting": _Kind(
        "the name of a setting",
        "letters, digits and underscores, with a dot after an extension's prefix",
        _matches(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?"),
    ),
    "setting_value": _Kind(
        "the value of a setting", "one line of text, a number, or true or false", _is_setting_value
    ),
    "size": _Kind(
        "a size of memory", "such as 4GB or 512MB", _matches(r"[1-9][0-9]{0,6} ?(kB|MB|GB|TB)")
    ),
    "source": _Kind(
        "where a file is",
        "an absolute path, or a salt:// address",
        lambda value: _is_path(value) or _matches(r"salt://[A-Za-z0-9_./-]+")(value),
    ),
    "suite": _Kind(
        "a repository suite", "such as bookworm-pgdg", _matches(r"[A-Za-z0-9][A-Za-z0-9./-]*")
    ),
    "table": _Kind("a table", f"schema.table or table, each {_NAME}", _is_table),
    "text": _Kind("a line of text", "one line of text that is not empty", _is_text),
    "time": _Kind("a time of day (in quotes)", '"00:00" to "23:59"', _matches(_TIME)),
    "timezone": _Kind(
        "a time zone",
        "UTC or a name such as Europe/Berlin",
        _matches(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*"),
    ),
    "unit": _Kind(
        "the name of a service",
        "the unit's name without .service",
        _matches(r"(?!.*\.service$)[A-Za-z0-9:_.@-]{1,200}"),
    ),
    "uri": _Kind(
        "the address of a repository",
        "an http, https, file or mirror address without spaces and without credentials "
        "(those go to /etc/apt/auth.conf.d)",
        _matches(r"(?:https?|mirror|mirror\+https?)://[^\s/@]+(/[^\s@]*)?|file:/[^\s]*"),
    ),
    "word": _Kind("a word", "letters, digits, _ and -", _matches(r"[A-Za-z0-9_-]{1,63}")),
    "url_driver": _Kind(
        "a URL scheme",
        "such as postgresql+asyncpg",
        _matches(r"[a-z][a-z0-9]*(\+[a-z][a-z0-9_]*)?"),
    ),
    "user": _Kind(
        "an account of the system", "as in /etc/passwd", _matches(r"[a-z_][a-z0-9_.-]{0,30}\$?")
    ),
    "wait": _Kind(
        "in range", "a number from 0.1 to 3600", lambda value: _is_amount(value, 0.1, 3600)
    ),
    "window": _Kind(
        "a window",
        'such as "Sun 02:00-04:00", "Mon,Wed 23:00-01:00" or "daily 00:00-24:00"',
        _matches(_WINDOW),
    ),
}


def show(value: Any, hidden: bool = False) -> str:
    """
    Write a value for a message, shortened, on one line.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_kinds.show 70000

    value
        Anything.

    hidden
        Whether the value could be a secret: then only its type is named.

    Returns text. Raises nothing.
    """
    names = {dict: "a mapping", list: "a list", str: "text that is not shown here"}
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (dict, list)) or hidden:
        return next(
            (name for kind, name in names.items() if isinstance(value, kind)),
            "a value that is not shown here",
        )
    if isinstance(value, int) and abs(value) >= _LARGE:
        return "a number of too many digits"
    if not isinstance(value, str):
        return str(value)[:60].splitlines()[0]
    size = len(value.encode(errors="replace"))
    return json.dumps(value) if size <= 60 else f"{json.dumps(value[:40])}... ({size} bytes)"


def mistake(kind: str, value: Any, arguments: tuple[Any, ...] = (), hidden: bool = False) -> str:
    """
    Say in one line why a value is not of a kind.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_kinds.mistake integer 70000 '[1, 65535]'

    kind
        The name of the kind, such as ``role``, ``integer`` or ``address``.

    value
        What pillar holds.

    arguments
        What the kind needs to know: the bounds of an ``integer``, the words of a ``choice``.

    hidden
        Whether the value could be a secret and must not be repeated.

    Returns one line, or an empty string when the value is right. Raises ``KeyError`` for an
    unknown kind.
    """
    what, allowed, holds = _KINDS[kind]
    if holds(value, *arguments):
        return ""
    allowed = ", ".join(arguments) if kind == "choice" else allowed.format(*arguments)
    line = f"{show(value, hidden)} is not {what}; allowed: {allowed}"
    if isinstance(value, bool):
        line += " (YAML reads a bare on, off, yes or no as a boolean: text goes in quotes)"
    return line


def refuse(argument: str, kind: str, value: Any, *arguments: Any) -> None:
    """
    Refuse an argument of a function whose value is not of a kind.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_kinds.refuse timeout wait 0

    argument
        Its name.

    kind
        The name of the kind.

    value
        What was given.

    arguments
        What the kind needs to know, as for ``mistake``.

    Returns nothing if the value is right. Raises ``SaltInvocationError`` with one line if not.
    """
    line = mistake(kind, value, arguments)
    if line:
        raise SaltInvocationError(f"{argument}: {line}")
