"""Write, read and judge PostgreSQL's access rules: pure functions, no host and no server."""

from __future__ import annotations

import ipaddress
import itertools
import re
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_hba"

HEADER = "# Written by Salt (slm_database): change the pillar, not this file.\n"
MAP = "autobot_slm_admin"
BACKEND_MAP = "autobot_slm_backend"
PASSWORD_METHODS = ("scram-sha-256", "md5", "password")
# Types of connection that a rule of the type can match, for a connection of the type on the left.
_MATCHES = {
    "local": ("local",),
    "host": ("host", "hostnossl", "hostnogssenc"),
    "hostssl": ("host", "hostssl", "hostnogssenc"),
}
_TOKEN = re.compile(r'(?:"(?:[^"]|"")*"|[^\s,"#])+|,|#.*')


def __virtual__() -> str:
    return __virtualname__


def defaults(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return the rules of the preset, without the operator's own.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.defaults '{"database": "a", "role": "a", "hba": {"preset": "hardened"}}'

    settings
        The formula's settings; database, role and hba are read.
    """
    hardened = settings["hba"].get("preset") == "hardened"
    database, role = settings["database"], settings["role"]
    socket = ("peer", {"map": BACKEND_MAP}) if hardened else ("trust", {})
    method = "scram-sha-256" if hardened else "md5"
    rules = [
        _rule("local", "all", "postgres", None, "peer", {"map": MAP}),
        _rule("local", "replication", "postgres", None, "peer", {"map": MAP}),
        _rule("local", _plain(database), _plain(role), None, *socket),
    ]
    for address in ("127.0.0.1/32", "::1/128"):
        rules.append(_rule("host", _plain(database), _plain(role), address, method, {}))
    return rules


def _rule(
    kind: str, database: Any, user: Any, address: str | None, method: str, options: dict[str, str]
) -> dict[str, Any]:
    return {
        "type": kind,
        "database": _several(database),
        "user": _several(user),
        "address": address,
        "method": method,
        "options": dict(options),
    }


def _several(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return [str(value)]


def _plain(name: str) -> str:
    """Return a name so written that it means itself, even if it is a keyword such as all."""
    if re.fullmatch(r"[a-z_][a-z0-9_$-]*", name) and name not in _KEYWORDS:
        return name
    return '"' + name.replace('"', '""') + '"'


_KEYWORDS = ("all", "sameuser", "samerole", "samegroup", "replication")


def rules(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return every rule in order: the operator's before, the preset's, the operator's after.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.rules '{"database": "a", "role": "a", "hba": {"after": []}}'

    settings
        The formula's settings; database, role and hba are read. A rule has type, database, user,
        address, method and options. The result's rules have a ``key``, too: the pillar path that
        asked for them.
    """
    hba = settings["hba"]
    found = []
    for place in ("before", None, "after"):
        given = defaults(settings) if place is None else hba.get(place) or []
        for number, item in enumerate(given):
            rule = _rule(
                item["type"],
                item.get("database", "all"),
                item.get("user", "all"),
                item.get("address"),
                item["method"],
                item.get("options") or {},
            )
            rule["key"] = f"slm_database:hba:{f'{place}:{number}' if place else 'preset'}"
            found.append(rule)
    return found


def admitted(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """
    Return which roles of pillar the operator's rules let into which databases of pillar by name,
    but for those into which the role itself says that it connects.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.admitted "$(cat /var/lib/autobot-slm-database/settings.json)"

    settings
        The formula's settings; database, databases, roles and hba are read.

    Returns pairs of a role and a database.
    """
    databases, roles = {settings["database"], *settings["databases"]}, settings["roles"]
    given = [*settings["hba"]["before"], *settings["hba"]["after"]] if roles else []
    found = set()
    for rule in given:
        if rule["method"] == "reject":
            continue
        for role in map(_bare, _several(rule["user"])):
            if role in roles:
                there = databases.intersection(map(_bare, _several(rule["database"])))
                told = (roles[role] or {}).get("connect") or []
                found |= {(role, one) for one in there.difference(told)}
    return sorted(found)


def line(rule: dict[str, Any]) -> str:
    """
    Return one rule as a line of ``pg_hba.conf``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.line '{"type": "local", "database": [a], "user": [a], "method": "peer"}'

    rule
        type, database and user (lists), address (None for local), method, options.
    """
    words = [rule["type"], _names(rule["database"]), ",".join(map(_user, rule["user"]))]
    if rule["type"] != "local":
        words.append(rule.get("address") or "all")
    words.append(rule["method"])
    for name, value in sorted((rule.get("options") or {}).items()):
        value = {True: "1", False: "0"}.get(value, value) if isinstance(value, bool) else value
        words.append(_quoted(f"{name}={value}"))
    return " ".join(words)


def _names(names: list[str]) -> str:
    return ",".join(_quoted(name) for name in names)


def _user(name: str) -> str:
    """A plus within the quotes would be a part of the name, not the sign of a group."""
    return f"+{_quoted(name[1:])}" if name.startswith("+") else _quoted(name)


def _quoted(word: str) -> str:
    if word.startswith('"') and word.endswith('"') and len(word) > 1:
        return word
    if re.search(r'[\s,"#]', word) or not word:
        return '"' + word.replace('"', '""') + '"'
    return word


def render(settings: dict[str, Any]) -> str:
    """
    Return the text of ``pg_hba.conf``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.render '{"database": "a", "role": "a", "hba": {}}'

    settings
        The formula's settings; database, role and hba are read.
    """
    return HEADER + "".join(line(rule) + "\n" for rule in rules(settings))


def render_ident(settings: dict[str, Any]) -> str:
    """
    Return the text of ``pg_ident.conf``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.render_ident '{"role": "a", "hba": {"backend_user": "b"}}'

    settings
        The formula's settings; role and hba are read. Each of ``hba:ident`` has map, system_user
        and database_user.
    """
    rows = (" ".join(_quoted(word) for word in row) for row in mappings(settings))
    return HEADER + "".join(row + "\n" for row in rows)


def mappings(settings: dict[str, Any]) -> list[tuple[str, str, str]]:
    """
    Return who may be whom: map, operating-system user, role.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.mappings '{"role": "a", "hba": {"backend_user": "b"}}'

    settings
        The formula's settings; role and hba are read.
    """
    hba = settings["hba"]
    rows = [(MAP, "root", "postgres"), (MAP, "postgres", "postgres")]
    if hba.get("preset") == "hardened":
        rows.append((BACKEND_MAP, hba["backend_user"], _plain(settings["role"])))
    return rows + [
        (row["map"], row["system_user"], row["database_user"]) for row in hba.get("ident") or []
    ]


def maps(content: str) -> list[tuple[str, ...]]:
    """
    Return the lines in the text of a ``pg_ident.conf`` as the server reads them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.maps 'staff alice reporting'

    content
        The text. Lines that are no mapping are passed over.

    Returns map, operating-system user and role of each, without quotes.
    """
    lines = (_fields(raw) for raw in content.split("\n"))
    return [tuple(_bare(field[0]) for field in line) for line in lines if len(line) == 3]


def parse(content: str) -> list[dict[str, Any]]:
    """
    Return the rules in the text of a ``pg_hba.conf``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.parse 'local all all peer'

    content
        The text. Lines that are no rule are passed over: this reads, the server judges.
    """
    found = []
    for number, raw in enumerate(content.split("\n"), 1):
        fields = _fields(raw)
        if len(fields) < 4 or fields[0][0] not in _TYPES:
            continue
        address, rest = None, fields[3:]
        if fields[0][0] != "local":
            address, rest = fields[3][0], fields[4:]
            if rest and re.fullmatch(r"[\d.]{7,}|[\da-fA-F:]*:[\da-fA-F:]*", rest[0][0]):
                address, rest = f"{address}/{_bits(rest[0][0])}", rest[1:]
        if not rest:
            continue
        options = dict(_bare(word).partition("=")[::2] for field in rest[1:] for word in field)
        address = address and _bare(address)
        rule = _rule(fields[0][0], fields[1], fields[2], address, rest[0][0], options)
        found.append(rule | {"key": f"line {number}"})
    return found


_TYPES = ("local", "host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc")


def _bits(mask: str) -> int:
    return bin(int(ipaddress.ip_address(mask))).count("1")


def _bare(word: str) -> str:
    return re.sub(r'"((?:[^"]|"")*)"', lambda match: match[1].replace('""', '"'), word)


def _fields(raw: str) -> list[list[str]]:
    """Split a line into fields, each a list of what commas separate in it."""
    fields: list[list[str]] = []
    end, joined = -1, False
    for match in _TOKEN.finditer(raw):
        word = match[0]
        if word.startswith("#"):
            break
        if word == ",":
            joined = True
            continue
        if fields and (joined or match.start() == end):
            fields[-1].append(word)
        else:
            fields.append([word])
        joined, end = False, match.end()
    return fields


def from_server(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Return rules from rows of ``pg_hba_file_rules``, those with an error left out.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.from_server '[]'

    rows
        type, database, user_name, address, netmask, auth_method, options, error and line_number.
    """
    found = []
    for row in rows:
        if row.get("error"):
            continue
        address = row.get("address")
        if row.get("netmask"):
            address = f"{address}/{_bits(row['netmask'])}"
        options = dict(option.partition("=")[::2] for option in row.get("options") or [])
        names = (row["database"], row["user_name"])
        rule = _rule(row["type"], *names, address, row["auth_method"], options)
        found.append(rule | {"key": f"line {row.get('line_number')}"})
    return found


def possible(
    given: list[dict[str, Any]],
    kind: str,
    database: str,
    user: str,
    address: str | None = None,
    groups: list[str] | None = None,
) -> list[dict[str, Any] | None]:
    """
    Return the rules one of which decides over a connection; None stands for no rule (refused).

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.possible '[]' local autobot_slm autobot_slm

    given
        The rules, in order.

    kind
        The connection: local, host (without encryption) or hostssl.

    database, user
        Its database (replication for a replication connection) and its role.

    address
        Its IP address; None for local.

    groups
        The roles that its role is a member of; None: not known.

    Nearly always one. A rule that only the server can judge (a regular expression, a host name,
    samenet, a group where those are not known) may or may not match: it is in the list, and so is
    what decides without it.
    """
    found: list[dict[str, Any] | None] = []
    for rule in given:
        if rule["type"] not in _MATCHES[kind]:
            continue
        parts = [
            _database_matches(rule["database"], database, user),
            _user_matches(rule["user"], user, groups),
            True if kind == "local" else _address_matches(rule.get("address"), address or ""),
        ]
        if False in parts:
            continue
        found.append(rule)
        if None not in parts:
            return found
    return [*found, None]


def given_away(
    given: list[dict[str, Any]], role: str, groups: list[str] | None = None
) -> list[dict[str, Any]]:
    """
    Return the rules by which somebody comes in as a role without any proof, from anywhere.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.given_away '[]' postgres

    given
        The rules, in order.

    role
        The role.

    groups
        The roles that it is a member of; None: not known.

    A rule counts if one of its databases is reached by it from either end of its addresses.
    """
    found = []
    for rule in given:
        if rule["method"] != "trust" or _user_matches(rule["user"], role, groups) is False:
            continue
        kinds = [kind for kind, types in _MATCHES.items() if rule["type"] in types]
        databases = {
            role if name in _KEYWORDS[:-1] or name.startswith(("/", "@")) else _bare(name)
            for name in rule["database"]
        }
        probes = itertools.product(kinds, databases, _ends(rule.get("address")))
        deciding = (possible(given, kind, base, role, at, groups) for kind, base, at in probes)
        if any(one is rule for rules in deciding for one in rules):
            found.append(rule)
    return found


def _ends(network: str | None) -> list[str]:
    try:
        addresses = ipaddress.ip_network(network or "", strict=False)
    except ValueError:
        return ["127.0.0.1", "192.0.2.1"]
    return [str(addresses[0]), str(addresses[-1])]


def _any(answers: list[bool | None]) -> bool | None:
    return True if True in answers else None if None in answers else False


def _database_matches(names: list[str], database: str, user: str) -> bool | None:
    answers: list[bool | None] = []
    for name in names:
        if name in ("all", "sameuser"):
            # "all" leaves replication connections out.
            matched = database != "replication" and (name == "all" or database == user)
            answers.append(matched)
        elif name in ("samerole", "samegroup"):
            answers.append(database == user or None)
        elif name.startswith(("/", "@")):
            answers.append(None)
        else:
            answers.append(_bare(name) == database)
    return _any(answers)


def _user_matches(names: list[str], user: str, groups: list[str] | None) -> bool | None:
    answers: list[bool | None] = []
    for name in names:
        if name.startswith("+") and groups is not None:
            answers.append(_bare(name[1:]) in (user, *groups))
        else:
            unsure = name.startswith(("+", "/", "@"))
            answers.append(None if unsure else name == "all" or _bare(name) == user)
    return _any(answers)


def _address_matches(network: str | None, address: str) -> bool | None:
    if network in (None, "all", "samehost"):
        return True
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network or "", strict=False)
    except (ValueError, TypeError):
        return None


def shadowed(given: list[dict[str, Any]]) -> list[str]:
    """
    Return one line for each rule that can never decide, because an earlier one matches first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_hba.shadowed '[]'

    given
        The rules, in order, each with the ``key`` it is named by.
    """
    found = []
    # Only what names its database and user, or all, can be wider: a thousand rules are not compared
    # each with each.
    places: dict[tuple[str, str], list[int]] = {}
    for number, rule in enumerate(given):
        database, user = rule["database"][0], rule["user"][0]
        near = {(name, who) for name in (database, "all") for who in (user, "all")}
        for place in sorted(at for key in near for at in places.get(key, ())):
            if _swallows(given[place], rule):
                earlier = given[place]
                found.append(
                    f"{rule['key']}: the rule '{line(rule)}' never counts, "
                    f"because '{line(earlier)}' ({earlier['key']}) matches first; move or remove it"
                )
                break
        for key in {(name, who) for name in rule["database"] for who in rule["user"]}:
            places.setdefault(key, []).append(number)
    return found


def _swallows(earlier: dict[str, Any], later: dict[str, Any]) -> bool:
    wider = earlier["type"] == "host" and later["type"] != "local"
    if earlier["type"] != later["type"] and not wider:
        return False
    databases = all(
        name in earlier["database"] or ("all" in earlier["database"] and name != "replication")
        for name in later["database"]
    )
    users = "all" in earlier["user"] or set(later["user"]) <= set(earlier["user"])
    return databases and users and _wider(earlier.get("address"), later.get("address"))


def _wider(outer: str | None, inner: str | None) -> bool:
    if outer == inner or outer == "all":
        return True
    try:
        wide = ipaddress.ip_network(outer or "", strict=False)
        narrow = ipaddress.ip_network(inner or "", strict=False)
        return wide.version == narrow.version and narrow.subnet_of(wide)  # type: ignore[arg-type]
    except ValueError:
        return False
