"""
Check the pillar as a whole: every key, every value, and what must fit together.

One table says which keys there are and of which kind (see ``slmdb_kinds``) their values are.
In it a dictionary stands for a mapping with exactly these keys, and a tuple for a kind with its
arguments or for one of these:

* ``("list", SPEC)`` a list, ``("some", SPEC)`` a list that is not empty
* ``("names", KIND, SPEC)`` a mapping from names of that kind
* ``("null", SPEC)`` null as well
* ``("one", {…}, KEYS)`` a mapping in which KEYS must be there
* ``("either", TYPE, SPEC, SPEC)`` the first if the value is of that type, else the second
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from salt.exceptions import SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_schema"

TOP = "slm_database"
HIDDEN_KINDS = {
    "command",
    "environment_key",
    "option_value",
    "pillar_key",
    "recipient",
    "setting_value",
    "text",
    "uri",
}
HIDDEN_BELOW = {"adopt", "roles", "secret", "settings"}
OWN_SECRETS = ("secret", "roles")
SECRET_WORD = re.compile(r"pass(w|phrase|$)|pw$|secret|token|credential", re.IGNORECASE)
# What a connection string, a URL or a command's option says.
SECRET_VALUE = re.compile(r"passw(or)?d\s*=\s*\S|://[^\s/@:]*:[^\s/@]+@", re.IGNORECASE)
SECRET_OPTIONS = {"ldapbindpasswd", "radiussecrets"}
HOST_TYPES = ("host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc")

_SECRET_FILE = {
    "file": "path",
    "key": "environment_key",
    "owner": "user",
    "group": "user",
    "mode": "mode",
}
_RULE = (
    "one",
    {
        "type": ("choice", "local", *HOST_TYPES),
        "database": ("either", list, ("some", "rule_name"), "rule_name"),
        "user": ("either", list, ("some", "rule_name"), "rule_name"),
        "address": "address",
        "method": "method",
        "options": ("names", "setting", ("either", bool, "boolean", "option_value")),
    },
    ("type", "database", "user", "method"),
)
_IDENT = (
    "one",
    {"map": "identifier", "system_user": "user", "database_user": "identifier"},
    ("map", "system_user", "database_user"),
)
_WINDOW = (
    "either",
    dict,
    (
        "one",
        {"rrule": "rrule", "start": "time", "duration": "duration", "timezone": "timezone"},
        ("rrule", "start", "duration"),
    ),
    "window",
)
_DATABASE = {
    "owner": "identifier",
    "encoding": "encoding",
    "locale": "locale",
    "extensions": ("list", "identifier"),
}
_ROLE = {
    "secret": ("one", _SECRET_FILE, ("file", "key")),
    "password_pillar": "pillar_key",
    "member_of": ("list", "identifier"),
    "connect": ("list", "database"),
    "connection_limit": ("integer", -1, 10000),
}
_RETENTION = {"full": ("integer", 1, 1000), "differential": ("integer", 1, 1000)}
_REPOSITORY = {
    "type": ("null", ("choice", "path", "s3", "sftp", "host")),
    "path": ("null", "path"),
    "encryption": "boolean",
    "retention": _RETENTION,
    "bucket": ("null", "bucket"),
    "endpoint": ("null", "host_name"),
    "region": ("null", "word"),
    "uri_style": ("null", ("choice", "host", "path")),
    "verify_tls": ("null", "boolean"),
    "ca_file": ("null", "path"),
    "key_pillar": ("null", "pillar_key"),
    "secret_pillar": ("null", "pillar_key"),
    "host": ("null", "host_name"),
    "port": ("null", ("integer", 1, 65535)),
    "user": ("null", "user"),
    "private_key_file": ("null", "path"),
    "host_key_hash_type": ("null", ("choice", "sha256", "sha1", "md5")),
    "known_hosts": ("null", "path"),
}
SCHEMA: dict[str, Any] = {
    "version": ("null", "major"),
    "repository": ("choice", "distribution", "pgdg"),
    "pgdg": {
        "uri": "uri",
        "suite": ("null", "suite"),
        "component": "component",
        "key": "source",
        "fingerprint": "fingerprint",
    },
    "packages": ("list", "package"),
    "port": ("integer", 1024, 65535),  # the server's user may not listen below
    "listen_addresses": ("some", "listen_address"),
    "allow_remote": "boolean",
    "locale": "locale",
    "encoding": "encoding",
    "data_checksums": "boolean",
    "database": "database",
    "role": "role",
    "extensions": ("list", "identifier"),
    # Here and below, null is what is left of a mapping when all its lines are comments. Where
    # somebody could mean something by it, such as no backup, it is refused.
    "databases": ("null", ("names", "database", ("null", _DATABASE))),
    "roles": ("null", ("names", "role", ("null", _ROLE))),
    "settings": ("null", ("names", "setting", "setting_value")),
    "allow_unsafe": ("list", "setting"),
    "restart": ("choice", "window", "now"),
    "tuning": {
        "profile": ("choice", "colocated", "dedicated", "small", "off"),
        "memory": ("null", "size"),
    },
    "hba": {
        "preset": ("choice", "default", "hardened"),
        "backend_user": "user",
        "before": ("list", _RULE),
        "after": ("list", _RULE),
        "ident": ("list", _IDENT),
    },
    "secret": {
        **_SECRET_FILE,
        "url_keys": ("list", "environment_key"),
        "url_driver": "url_driver",
        "generate_missing": ("list", "environment_key"),
        "expected_keys": ("list", "environment_key"),
        "length": ("integer", 32, 256),
        "from_pillar": ("null", "pillar_key"),
        "allow_new": "boolean",
        "rotate_every": ("null", "rotation"),
        "rotate_backend": ("choice", "restart", "reload", "none"),
    },
    "adopt": (
        "null",
        {
            "credentials_file": "path",
            "role": "identifier",
            "databases": ("names", "database", "database"),
            "rename": "boolean",
        },
    ),
    "backend": {
        "unit": "unit",
        "user": "user",
        "directory": "path",
        "venv": "relative_path",
        "protect_home": ("choice", "read-only", "tmpfs", "no"),
    },
    "health": {"timeout": ("amount", 0.1, 60), "tables": ("list", "table")},
    "migration": {
        "alembic_ini": "relative_path",
        "database": ("null", "database"),
        "version_table": "identifier",
        "version_schema": "identifier",
        "target": "revision",
        "user": ("null", "user"),
        "timeout": ("integer", 1, 86400),
        "lock_timeout": ("integer", 1, 3600),
        "initialize": ("null", "command"),
        "alembic": ("null", "command"),
    },
    "maintenance": (
        "null",
        {
            "policy": ("choice", "manual", "window", "auto"),
            "windows": ("list", _WINDOW),
            "approve": "boolean",
        },
    ),
    "backup": {
        "enabled": "boolean",
        "path": "path",
        "encryption": "boolean",
        "allow_new": "boolean",
        "retention": _RETENTION,
        "schedule": {
            "full": ("null", "moment"),
            "differential": ("null", "moment"),
            "dump": ("null", "moment"),
            "drill": ("null", "moment"),
        },
        "drill": {"directory": ("null", "path"), "keep_free": "room"},
        "dump": {"path": "path"},
        "copy": {"recipients": ("list", "recipient")},
        "second": _REPOSITORY,
        "queue_limit": "size",
        "limits": {"backup": "duration", "wal": "duration", "proven_restore": "duration"},
    },
    "clean": {"data": "boolean", "role": "boolean", "secret": "boolean", "packages": "boolean"},
}
# What the states take that may be used with words of their own; null is left out.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "slmdb_role": {
        "roles": (
            "names",
            "role",
            (
                "null",
                {
                    "login": "boolean",
                    "member_of": _ROLE["member_of"],
                    "connection_limit": _ROLE["connection_limit"],
                },
            ),
        )
    },
    "slmdb_database": {"databases": SCHEMA["databases"]},
    "slmdb_secret": {
        **SCHEMA["secret"],
        "role": "identifier",
        "database": "identifier",
        "port": SCHEMA["port"],
        "credentials_file": "path",
    },
    "slmdb_repository": {"repository": SCHEMA["repository"], **SCHEMA["pgdg"]},
}


def __virtual__() -> str:
    return __virtualname__


def _join(path: str, key: Any) -> str:
    plain = isinstance(key, str) and re.fullmatch(r"[\w.+@ -]{1,60}", key, re.ASCII)
    return f"{path}:{key if plain else __salt__['slmdb_kinds.show'](key)}"


def _unknown(path: str, key: Any, known: Any) -> str:
    """Say what to write instead of a key that does not exist, without its value."""
    if isinstance(key, str) and SECRET_WORD.search(key):
        return (
            f"{_join(path, key)}: no password is taken from pillar; let the host make one in a "
            "secret file, or name the pillar key that holds it (secret:from_pillar for the "
            "application, password_pillar for another role)"
        )
    nearest = difflib.get_close_matches(key if isinstance(key, str) else "", known, n=1, cutoff=0.6)
    advice = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(sorted(known))}"
    return f"{_join(path, key)}: there is no such key; {advice}"


def _wrong_type(path: str, value: Any, wanted: str) -> str:
    # Text in place of a mapping may be a password that somebody put one level too high.
    hidden = wanted != "a list" or not path.startswith(TOP) or path.split(":")[1] in OWN_SECRETS
    given = __salt__["slmdb_kinds.show"](value, hidden=hidden)
    return f"{path}: {given} is given; allowed: {wanted}"


def _mapping(fields: dict) -> str:
    return "a mapping with " + ", ".join([*list(fields)[:8], *(["..."] if len(fields) > 8 else [])])


def _fields(fields: dict, value: Any, path: str, required: tuple[str, ...] = ()) -> Iterator[str]:
    """Check a mapping with exactly these keys."""
    if not isinstance(value, dict):
        yield _wrong_type(path, value, _mapping(fields))
        return
    for key, item in value.items():
        if isinstance(key, str) and key in fields:
            yield from _walk(fields[key], item, _join(path, key))
        else:
            yield _unknown(path, key, fields)
    for key in required:
        if key not in value:
            yield f"{_join(path, key)}: is missing"


def _names(key_kind: str, spec: Any, value: Any, path: str) -> Iterator[str]:
    """Check a mapping from names to something."""
    if not isinstance(value, dict):
        yield _wrong_type(path, value, "a mapping from names")
        return
    for key, item in value.items():
        below = _join(path, key)
        line = __salt__["slmdb_kinds.mistake"](key_kind, key)
        if line:
            yield f"{below}: {line}"
        yield from _walk(spec, item, below)


def _items(spec: Any, value: Any, path: str, least: int) -> Iterator[str]:
    """Check a list."""
    if not isinstance(value, list):
        yield _wrong_type(path, value, "a list")
    elif len(value) < least:
        yield f"{path}: an empty list is given; allowed: a list of at least {least}"
    else:
        for position, item in enumerate(value):
            yield from _walk(spec, item, _join(path, position))


def _leaf(kind: str, arguments: tuple, value: Any, path: str) -> Iterator[str]:
    below = HIDDEN_BELOW.intersection(path.split(":"))
    hidden = kind in HIDDEN_KINDS or bool(below and isinstance(value, str))
    line = __salt__["slmdb_kinds.mistake"](kind, value, arguments, hidden=hidden)
    if line:
        yield f"{path}: {line}"


def _walk(spec: Any, value: Any, path: str) -> Iterator[str]:
    """Check a value against what the table says of it."""
    if isinstance(spec, dict):
        yield from _fields(spec, value, path)
        return
    what, *more = (spec,) if isinstance(spec, str) else spec
    if what in ("list", "some"):
        yield from _items(more[0], value, path, least=int(what == "some"))
    elif what == "names":
        yield from _names(more[0], more[1], value, path)
    elif what == "one":
        yield from _fields(more[0], value, path, more[1])
    elif what == "either":
        yield from _walk(more[1] if isinstance(value, more[0]) else more[2], value, path)
    elif what != "null":
        yield from _leaf(what, tuple(more), value, path)
    elif value is not None:
        yield from _walk(more[0], value, path)


def _part(pillar: dict, *keys: str, of: type) -> Any:
    """Return a part of the pillar if it is there and of the type, else an empty one."""
    value: Any = pillar
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, of) else of()


def _text(pillar: dict, *keys: str) -> str:
    """Return a text from the pillar, else from the defaults; empty if pillar broke those."""
    settings = __salt__["slmdb_pillar.settings"]()
    return _part(pillar, *keys, of=str) or _part(settings, *keys, of=str)


def _loopback(address: Any) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address != "*"


def _check_network(pillar: dict) -> Iterator[str]:
    """Addresses off loopback need the explicit key."""
    if pillar.get("allow_remote") is True:
        return
    for position, address in enumerate(_part(pillar, "listen_addresses", of=list)):
        if isinstance(address, str) and not _loopback(address):
            yield (
                f"{TOP}:listen_addresses:{position}: {address} is not a loopback address; "
                f"to listen there on purpose, set {TOP}:allow_remote: true"
            )


def _check_settings(pillar: dict) -> Iterator[str]:
    """What has a key of its own is not set twice, nor is anything; case does not count there."""
    seen: dict[str, str] = {}
    for name, value in _part(pillar, "settings", of=dict).items():
        if not isinstance(name, str):
            continue
        lower = name.lower()
        if isinstance(value, str) and SECRET_VALUE.search(value):
            yield (
                f"{_join(f'{TOP}:settings', name)}: holds a password, which everybody on the host "
                "could read; keep it in a password file of postgres and name that (passfile=...)"
            )
        if lower in ("port", "listen_addresses"):
            yield f"{_join(f'{TOP}:settings', name)}: has a key of its own; set {TOP}:{lower}"
        elif lower in seen:
            yield f"{_join(f'{TOP}:settings', name)}: is the same setting as {seen[lower]}"
        seen[lower] = name


def _check_owners(pillar: dict) -> Iterator[str]:
    """A database belongs to a declared role; the application's own pair is described elsewhere."""
    role, database = _text(pillar, "role"), _text(pillar, "database")
    roles = _part(pillar, "roles", of=dict)
    if role in roles:
        yield (
            f"{TOP}:roles:{role}: is the application's role; "
            f"describe it by {TOP}:role and {TOP}:secret"
        )
    for name, described in _part(pillar, "databases", of=dict).items():
        if name == database:
            yield (
                f"{TOP}:databases:{name}: is the application's database; "
                f"describe it by {TOP}:database"
            )
        owner = _part(pillar, "databases", name, "owner", of=str)
        if isinstance(described, dict) and owner and owner != role and owner not in roles:
            yield f'{TOP}:databases:{name}:owner: "{owner}" is not declared; add it to {TOP}:roles'


def _check_connect(pillar: dict) -> Iterator[str]:
    """A role connects to databases that are the formula's."""
    known = {_text(pillar, "database"), *_part(pillar, "databases", of=dict)}
    for role in _part(pillar, "roles", of=dict):
        path = f"{_join(f'{TOP}:roles', role)}:connect"
        for position, name in enumerate(_part(pillar, "roles", role, "connect", of=list)):
            right = isinstance(name, str) and not __salt__["slmdb_kinds.mistake"]("database", name)
            if right and name not in known:
                yield f'{path}:{position}: "{name}" is not declared; add it to {TOP}:databases'


def _check_members(pillar: dict) -> Iterator[str]:
    """No role is, by way of others, a member of itself."""
    roles = _part(pillar, "roles", of=dict)
    groups = {
        name: {one for one in _part(roles, name, "member_of", of=list) if one in list(roles)}
        for name in roles
    }
    for name in roles:
        reached: set[str] = set()
        ahead = set(groups[name])
        while ahead:
            reached |= ahead
            ahead = set().union(*(groups[one] for one in ahead)) - reached
        if name in reached:
            yield f"{_join(f'{TOP}:roles', name)}:member_of: makes the role a member of itself"


def _check_passwords(pillar: dict) -> Iterator[str]:
    """A role has one source for its password."""
    for name, role in _part(pillar, "roles", of=dict).items():
        if isinstance(role, dict) and "secret" in role and "password_pillar" in role:
            path = _join(f"{TOP}:roles", name)
            yield f"{path}: has both secret and password_pillar; allowed: one of them"


def _secrets(pillar: dict) -> Iterator[tuple[str, dict]]:
    """Where each role's secret is described, the application's first, and what each is told."""
    ours = _part(pillar, "secret", of=dict)
    usual = {name: _text(pillar, "secret", name) for name in _SECRET_FILE}
    yield f"{TOP}:secret", {**ours, **usual}
    usual.pop("key")
    for name in _part(pillar, "roles", of=dict):
        secret = _part(pillar, "roles", name, "secret", of=dict)
        if secret:
            yield f"{_join(f'{TOP}:roles', name)}:secret", {**usual, **secret}


def _claims(path: str, secret: dict) -> Iterator[tuple[str, str, str]]:
    """The names that a secret needs in its file: each, its path, and what is added to that."""
    key = secret.get("key")
    if isinstance(key, str):
        yield key, f"{path}:key", ""
        for ending in ("NEXT", "PREVIOUS", "SINCE"):
            yield f"{key}_{ending}", f"{path}:key", f" with _{ending} (of a rotation)"
    for name in ("url_keys", "generate_missing"):
        for position, one in enumerate(_part(secret, name, of=list)):
            if isinstance(one, str):
                yield one, f"{path}:{name}:{position}", ""


def _check_files(pillar: dict) -> Iterator[str]:
    """No key of a secret file is used for two things, and a file has one owner and one mode."""
    used: dict[tuple[str, str], str] = {}
    first: dict[str, tuple[str, dict]] = {}
    for path, secret in _secrets(pillar):
        file = str(secret.get("file"))
        for key, where, ending in _claims(path, secret):
            if (file, key) in used:
                yield f"{where}: this name{ending} is already that of {used[file, key]}"
            used.setdefault((file, key), f"{where}{ending}")
        other, told = first.setdefault(file, (path, secret))
        for what in ("owner", "group", "mode"):
            if secret[what] != told[what]:
                yield f"{path}:{what}: the same file has another {what} by {other}:{what}"


def _check_rule(rule: dict, path: str) -> Iterator[str]:
    remote = rule.get("type") in HOST_TYPES
    if rule.get("type") == "local" and "address" in rule:
        yield f"{path}:address: a local rule has no address; remove it or write type: host"
    if remote and "address" not in rule:
        yield f"{path}:address: is missing; a {rule['type']} rule needs one, such as 10.1.2.0/24"
    if remote and rule.get("method") == "peer":
        yield f"{path}:method: peer works for local rules only"
    for option in sorted(SECRET_OPTIONS.intersection(_part(rule, "options", of=dict))):
        yield (
            f"{path}:options:{option}: is a password; "
            "none is taken from pillar, so this option cannot be used"
        )


def _check_rules(pillar: dict) -> Iterator[str]:
    """A rule's parts fit together."""
    for place in ("before", "after"):
        for position, rule in enumerate(_part(pillar, "hba", place, of=list)):
            if isinstance(rule, dict):
                yield from _check_rule(rule, f"{TOP}:hba:{place}:{position}")


def _check_windows(pillar: dict) -> Iterator[str]:
    """A window's rule and zone exist; asked only of windows that look right."""
    windows = _part(pillar, "maintenance", "windows", of=list)
    if windows and not list(_walk(("list", _WINDOW), windows, "")):
        yield from __salt__["slmdb_window.problems"](windows)


def _check_second(pillar: dict) -> Iterator[str]:
    """A second repository has what its type needs, and nothing else."""
    told = _part(pillar, "backup", "second", of=dict)
    first = _text(pillar, "backup", "path")
    yield from __salt__["slmdb_backup_repository.problems"](told, first)


CHECKS = (
    _check_network,
    _check_settings,
    _check_owners,
    _check_connect,
    _check_members,
    _check_passwords,
    _check_files,
    _check_rules,
    _check_windows,
    _check_second,
)


def problems(pillar: Any) -> list[str]:
    """
    Check what pillar holds under ``slm_database`` as a whole.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_schema.problems '{"port": 70000}'

    pillar
        What pillar holds: a mapping, or nothing. Anything else is one mistake.

    Returns a list of lines, one per mistake, each with the key's full path, what was given and
    what is allowed; a value that could be a secret is never in it. Raises nothing for any pillar.
    """
    if pillar is None:
        return []
    lines = list(_fields(SCHEMA, pillar, TOP))
    if isinstance(pillar, dict):
        for check in CHECKS:
            lines.extend(check(pillar))
    return list(dict.fromkeys(lines))


def refuse(noun: str, **given: Any) -> None:
    """
    Refuse what a state of a noun is told, by the same rules as pillar.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_schema.refuse slmdb_secret url_keys=URL

    noun
        The name of its module, such as ``slmdb_role``.
    given
        Arguments of its state ``present``; ``None`` is one that is left out.

    Returns nothing if they are right. Raises ``SaltInvocationError`` with one line per mistake.
    """
    told = {key: value for key, value in given.items() if value is not None}
    lines = list(_fields(ARGUMENTS[noun], told, f"{noun}.present"))
    if lines:
        raise SaltInvocationError("\n".join(lines))
