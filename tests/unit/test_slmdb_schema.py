"""The pillar as a whole: every mistake in one line, all at once, and never a secret."""

from __future__ import annotations

import copy
import importlib.util
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.support import sls

CANARY = "Hunter2-canary-9f3"
TOP = "slm_database"


def _load(name):
    path = sls.CHECKOUT / "_modules" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DEFAULTS = yaml.safe_load((sls.CHECKOUT / "slm_database" / "defaults.yaml").read_text())
EXAMPLE_TEXT = (sls.CHECKOUT / "pillar.example").read_text()
KINDS, SCHEMA, WINDOW, REPOSITORY, INSTANCE, PENDING = (
    _load(f"slmdb_{noun}")
    for noun in ("kinds", "schema", "window", "backup_repository", "instance", "pending")
)


def _default(*keys):
    value: Any = DEFAULTS
    for key in keys:
        value = value[key]
    return value


KINDS.__salt__ = {"slmdb_instance.majors": INSTANCE.majors}
SCHEMA.__salt__ = {
    "slmdb_backup_repository.problems": REPOSITORY.problems,
    "slmdb_kinds.mistake": KINDS.mistake,
    "slmdb_kinds.show": KINDS.show,
    "slmdb_pillar.settings": lambda: DEFAULTS,
    "slmdb_window.problems": WINDOW.problems,
}
problems = SCHEMA.problems


def _pillar(path: str, value: Any) -> dict:
    """A pillar with one key set, levels joined by colons."""
    for key in reversed(path.split(":")):
        value = {key: value}
    return value


RULE = {
    "type": "host",
    "database": "all",
    "user": "all",
    "address": "10.0.0.0/8",
    "method": "md5",
}


def _rule(**changed):
    rule = {**RULE, **changed}
    return {"hba": {"before": [{key: value for key, value in rule.items() if value is not None}]}}


S3 = {
    "type": "s3",
    "path": "/slm",
    "bucket": "slm-backups",
    "endpoint": "s3.example.net",
    "region": "eu-central-1",
    "key_pillar": "vault:key",
    "secret_pillar": "vault:secret",
}
SFTP = {
    "type": "sftp",
    "path": "/slm",
    "host": "sftp.example.net",
    "user": "slm",
    "private_key_file": "/var/lib/postgresql/.ssh/id_ed25519",
    "host_key_hash_type": "sha256",
}


def _second(**told):
    return {"backup": {"second": told}}


def _settled(schema: Any, path: str = "") -> set[str]:
    """Every key of the table that is always there."""
    schema = schema[1] if isinstance(schema, tuple) and schema[0] == "null" else schema
    if not isinstance(schema, dict):
        return {path}
    return {key for name in schema for key in _settled(schema[name], f"{path}:{name}")}


def _given(value: Any, schema: Any, path: str = "") -> set[str]:
    schema = schema[1] if isinstance(schema, tuple) and schema[0] == "null" else schema
    if not isinstance(schema, dict):
        return {path}
    return {
        key for name in value for key in _given(value[name], schema.get(name), f"{path}:{name}")
    }


def test_nothing_is_a_valid_pillar():
    """An empty pillar is complete, and so is `slm_database:` with nothing below."""
    assert problems(None) == problems({}) == []


def test_the_defaults_are_what_the_table_describes():
    """Each default is valid, each key of the table has one; what adopt may hold has none."""
    told = {key: value for key, value in DEFAULTS.items() if key != "distribution"}
    assert problems(told) == []
    schema = {**SCHEMA.SCHEMA, "adopt": None}
    assert _given(told, schema) == _settled(schema)


def test_the_example_is_the_defaults():
    """pillar.example shows every key with its default."""
    example = yaml.safe_load(EXAMPLE_TEXT)
    assert list(example) == [TOP]
    assert example[TOP] == {k: v for k, v in DEFAULTS.items() if k != "distribution"}
    assert problems(example[TOP]) == []


def _examples() -> list[dict]:
    """The blocks of lines that begin with # |, each a pillar."""
    blocks = re.findall(r"(?:^ *# \| .*\n)+", EXAMPLE_TEXT, re.MULTILINE)
    return [yaml.safe_load(re.sub(r"(?m)^ *# \| ", "", block)) for block in blocks]


@pytest.mark.parametrize("example", _examples(), ids=lambda example: "-".join(example))
def test_each_example_in_the_example_is_valid_by_itself(example):
    """Whoever takes the # | away from one gets no mistake, and needs no other one."""
    assert problems(example) == []


def test_the_examples_in_the_example_are_valid_together():
    """What two of them declare is not in each other's way."""
    merged: dict = {}
    for example in _examples():
        for key, value in example.items():
            if isinstance(value, dict):
                merged.setdefault(key, {}).update(value)
            else:
                merged[key] = value
    assert len(_examples()) > 10
    assert problems(merged) == []


WRONG = [
    # The full path, what was given, and a word of what is allowed.
    ({"prot": 5433}, "prot", "", "port"),
    ({"Port": 5433}, "Port", "", "port"),
    ({"secret": {"fiel": "/x"}}, "secret:fiel", "", "file"),
    ({"hba": {"befor": []}}, "hba:befor", "", "before"),
    (_rule(metod="md5"), "hba:before:0:metod", "", "method"),
    ({5432: 1}, "5432", "", "known here"),
    ({"port": 0}, "port", "0", "1024 to 65535"),
    ({"backup": {"copy": {"recipients": [CANARY]}}}, "backup:copy:recipients:0", "", "age1"),
    ({"port": 70000}, "port", "70000", "1024 to 65535"),
    ({"port": 80}, "port", "80", "1024 to 65535"),
    ({"port": -1}, "port", "-1", "1024 to 65535"),
    ({"port": 10**5000}, "port", "too many digits", "1024 to 65535"),
    ({"version": -(10**5000)}, "version", "too many digits", "14 to 18"),
    ({"health": {"timeout": 10**400}}, "health:timeout", "too many digits", "0.1 to 60"),
    ({"settings": {"x": 10**5000}}, "settings:x", "a value", "a number"),
    ({10**5000: 1}, "a number of too many digits", "", "known here"),
    ({"port": True}, "port", "true", "1024 to 65535"),
    ({"port": "5432"}, "port", '"5432"', "whole number"),
    ({"port": 5432.0}, "port", "5432.0", "whole number"),
    ({"port": None}, "port", "null", "whole number"),
    ({"port": [5432]}, "port", "a list", "whole number"),
    ({"version": "13"}, "version", '"13"', "14 to 18"),
    ({"version": 15.1}, "version", "15.1", "14 to 18"),
    ({"version": True}, "version", "true", "14 to 18"),
    ({"repository": "PGDG"}, "repository", '"PGDG"', "distribution, pgdg"),
    ({"pgdg": {"fingerprint": "ACCC4CF8"}}, "pgdg:fingerprint", '"ACCC4CF8"', "40 hex"),
    ({"pgdg": {"key": "key.asc"}}, "pgdg:key", '"key.asc"', "absolute path"),
    ({"pgdg": {"uri": "ftp://x"}}, "pgdg:uri", "text", "https"),
    ({"packages": "vim"}, "packages", "vim", "a list"),
    ({"packages": ["vim; rm"]}, "packages:0", '"vim; rm"', "Debian"),
    ({"role": "a" * 64}, "role", "64 bytes", "63 bytes"),
    ({"role": "é" * 32}, "role", "64 bytes", "63 bytes"),
    ({"role": ""}, "role", '""', "63 bytes"),
    ({"role": " a"}, "role", '" a"', "no space"),
    ({"role": "a\nb"}, "role", r'"a\nb"', "printable"),
    ({"role": "a\x00b"}, "role", r'"a\u0000b"', "printable"),
    ({"role": "a'b"}, "role", '"a\'b"', "without quotes"),
    ({"role": 'a"b'}, "role", r'"a\"b"', "without quotes"),
    ({"role": "pg_read"}, "role", '"pg_read"', "pg_"),
    ({"role": "postgres"}, "role", '"postgres"', "postgres"),
    ({"role": True}, "role", "true", "quotes"),
    ({"role": 5}, "role", "5", "63 bytes"),
    ({"database": "template1"}, "database", '"template1"', "template1"),
    ({"database": False}, "database", "false", "boolean"),
    ({"locale": True}, "locale", "true", "boolean"),
    ({"encoding": "UTF-8"}, "encoding", '"UTF-8"', "UTF8"),
    ({"extensions": {"a": 1}}, "extensions", "a mapping", "a list"),
    ({"listen_addresses": []}, "listen_addresses", "empty", "at least 1"),
    ({"listen_addresses": "127.0.0.1"}, "listen_addresses", "127.0.0.1", "a list"),
    ({"listen_addresses": ["my host"]}, "listen_addresses:0", '"my host"', "localhost"),
    ({"listen_addresses": ["::1", "10.0.0.1"]}, "listen_addresses:1", "10.0.0.1", "allow_remote"),
    ({"listen_addresses": ["*"]}, "listen_addresses:0", "*", "allow_remote"),
    ({"listen_addresses": ["0.0.0.0"]}, "listen_addresses:0", "0.0.0.0", "allow_remote"),
    ({"allow_remote": "yes"}, "allow_remote", '"yes"', "true or false"),
    ({"allow_remote": 1}, "allow_remote", "1", "true or false"),
    *(({name: None}, name, "null", "a mapping") for name in ("backup", "hba", "secret", "tuning")),
    ({"hba": {"preset": "hard"}}, "hba:preset", '"hard"', "default, hardened"),
    ({"hba": {"before": [5]}}, "hba:before:0", "a value", "a mapping"),
    (_rule(method="foo"), "hba:before:0:method", '"foo"', "trust, peer"),
    (_rule(method=None), "hba:before:0:method", "missing", ""),
    (_rule(method=True), "hba:before:0:method", "true", "scram-sha-256"),
    (_rule(type="remote"), "hba:before:0:type", '"remote"', "local, host"),
    (_rule(address="10.0.0.1"), "hba:before:0:address", '"10.0.0.1"', "CIDR"),
    (_rule(address="10.0.0.1/8"), "hba:before:0:address", '"10.0.0.1/8"', "host bits"),
    (_rule(address="10.0.0.0/33"), "hba:before:0:address", '"10.0.0.0/33"', "CIDR"),
    (_rule(address="db.example"), "hba:before:0:address", '"db.example"', "CIDR"),
    (_rule(address=None), "hba:before:0:address", "missing", "10.1.2.0/24"),
    (_rule(type="local"), "hba:before:0:address", "local", "remove"),
    (_rule(method="peer"), "hba:before:0:method", "peer", "local"),
    (_rule(user="a\nb"), "hba:before:0:user", r'"a\nb"', "printable"),
    (_rule(user="a,b"), "hba:before:0:user", '"a,b"', "a list"),
    (_rule(database=[]), "hba:before:0:database", "empty", "at least 1"),
    (_rule(database=["@file"]), "hba:before:0:database:0", '"@file"', "@"),
    ({"databases": {"x": {"owner": "who"}}}, "databases:x:owner", '"who"', "roles"),
    ({"databases": {"autobot_slm": {}}}, "databases:autobot_slm", "application", "database"),
    ({"databases": {"pg'x": {}}}, 'databases:"pg\'x"', '"pg\'x"', "quotes"),
    ({"roles": {"autobot_slm": {}}}, "roles:autobot_slm", "application", "secret"),
    ({"roles": {"pg_x": {}}}, "roles:pg_x", '"pg_x"', "pg_"),
    ({"roles": {"r": {"secret": {"file": "/x"}}}}, "roles:r:secret:key", "missing", ""),
    ({"roles": {"r": {"member_of": ["r"]}}}, "roles:r:member_of", "of itself", ""),
    (
        {"roles": {"a": {"member_of": ["b"]}, "b": {"member_of": [[], "a"]}}},
        "roles:a:member_of",
        "of itself",
        "",
    ),
    ({"roles": {"r": {"connection_limit": -2}}}, "roles:r:connection_limit", "-2", "-1 to"),
    ({"settings": {"x": None}}, "settings:x", "null", "one line"),
    ({"settings": {"x": [1]}}, "settings:x", "a list", "one line"),
    ({"settings": {"x": {"a": 1}}}, "settings:x", "a mapping", "one line"),
    ({"settings": {"x": float("nan")}}, "settings:x", "a value", "a number"),
    ({"settings": {"x": "a\nb"}}, "settings:x", "text", "one line"),
    ({"settings": {"a b": 1}}, "settings:a b", '"a b"', "underscores"),
    ({"settings": {"port": 5433}}, "settings:port", "key of its own", "slm_database:port"),
    ({"settings": {"Port": 5433}}, "settings:Port", "key of its own", "slm_database:port"),
    ({"settings": {"jit": 1, "JIT": 0}}, "settings:JIT", "the same setting", "jit"),
    ({"settings": []}, "settings", "a list", "a mapping"),
    ({"secret": {"mode": 0o640}}, "secret:mode", "416", "in quotes"),
    ({"secret": {"mode": "0644"}}, "secret:mode", "text", '"0640"'),
    ({"secret": {"length": 8}}, "secret:length", "8", "32 to 256"),
    ({"secret": {"file": "etc/x"}}, "secret:file", "text", "begins with /"),
    ({"secret": {"key": "A-B"}}, "secret:key", "text", "underscores"),
    ({"secret": {"rotate_backend": None}}, "secret:rotate_backend", "null", "restart"),
    (
        {"secret": {"url_keys": ["SLM_DB_PASSWORD"]}},
        "secret:url_keys:0",
        "already",
        "secret:key",
    ),
    (
        {"settings": {"primary_conninfo": "host=a password=x"}},
        "settings:primary_conninfo",
        "holds a password",
        "passfile",
    ),
    ({"settings": {"x.y": "postgresql://a:b@c/d"}}, "settings:x.y", "holds a password", "passfile"),
    ({"maintenance": {"windows": ["Sonntag"]}}, "maintenance:windows:0", '"Sonntag"', "Sun 02:00"),
    (
        {"maintenance": {"windows": ["Mon-Wed-Fri 02:00-04:00"]}},
        "maintenance:windows:0",
        '"Mon-Wed-Fri 02:00-04:00"',
        "Mon,Wed 23:00",
    ),
    (
        {"maintenance": {"windows": ["Sun 02:00-02:00"]}},
        "maintenance:windows:0",
        '"Sun 02:00-02:00"',
        "daily 00:00-24:00",
    ),
    ({"maintenance": {"windows": [{}]}}, "maintenance:windows:0:rrule", "missing", ""),
    ({"maintenance": {"policy": False}}, "maintenance:policy", "false", "manual, window"),
    ({"migration": {"initialize": "a 'b"}}, "migration:initialize", "text", "a command"),
    ({"health": {"timeout": 0}}, "health:timeout", "0", "0.1 to 60"),
    ({"backend": {"unit": "x.service"}}, "backend:unit", '"x.service"', "without .service"),
    ({"clean": {"data": "no"}}, "clean:data", '"no"', "true or false"),
    ({"backup": {"limits": {"wal": "1w"}}}, "backup:limits:wal", '"1w"', "90m, 2h or 1d"),
    ({"backup": {"limits": {"wol": "1h"}}}, "backup:limits:wol", "", "did you mean wal?"),
    (_second(type="nfs"), "backup:second:type", '"nfs"', "path, s3, sftp, host"),
    (_second(path="/mnt"), "backup:second:type", "missing", "path, s3, sftp, host"),
    (_second(type="path"), "backup:second:path", "missing", "type path needs it"),
    (_second(**{**S3, "key_pillar": "a key"}), "backup:second:key_pillar", "text", "never the"),
    (
        _second(**{**S3, "secret_pillar": None}),
        "backup:second:secret_pillar",
        "missing",
        "s3 needs it",
    ),
    (
        _second(**{**S3, "endpoint": "https://s3"}),
        "backup:second:endpoint",
        '"https://s3"',
        "a scheme",
    ),
    (_second(**{**S3, "bucket": "A_B"}), "backup:second:bucket", '"A_B"', "lower-case"),
    (_second(**S3, user="x"), "backup:second:user", "", "means nothing to type s3"),
    (_second(**S3, uri_style="dns"), "backup:second:uri_style", '"dns"', "host, path"),
    (_second(**SFTP, port=0), "backup:second:port", "0", "1 to 65535"),
    (
        _second(**{**SFTP, "private_key_file": "k"}),
        "backup:second:private_key_file",
        '"k"',
        "with /",
    ),
    (
        _second(**{**SFTP, "host_key_hash_type": "crc"}),
        "backup:second:host_key_hash_type",
        '"crc"',
        "md5",
    ),
    (_second(type="host", host="h"), "backup:second:user", "missing", "type host needs it"),
    (
        _second(type="path", path="/var/lib/pgbackrest/x"),
        "backup:second:path",
        "overlaps slm_database:backup:path",
        "choose another",
    ),
]


@pytest.mark.parametrize(("pillar", "path", "shown", "allowed"), WRONG)
def test_a_mistake_is_one_line(pillar, path, shown, allowed):
    """The key's full path, what was given, what is allowed; once."""
    lines = problems(pillar)
    ours = [line for line in lines if line.startswith(f"{TOP}:{path}: ")]
    assert len(ours) == 1, lines
    assert shown in ours[0] and allowed in ours[0], ours[0]
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(("pillar", "count"), [("text", 1), ([1], 1), (5, 1), (True, 1), ([], 1)])
def test_something_else_than_a_mapping_is_one_mistake(pillar, count):
    """The top itself can be wrong."""
    assert len(problems(pillar)) == count


def test_all_mistakes_are_reported_at_once():
    """Nobody wants to learn of them one run at a time."""
    pillar = {"port": 0, "prot": 1, "role": "", "secret": {"mode": "0777", "x": 1}}
    assert len(problems(pillar)) == 5


RIGHT = [
    {"port": 1024, "version": 17},
    {"version": "17", "repository": "pgdg"},
    {"listen_addresses": ["localhost", "127.0.0.2"]},
    {"listen_addresses": ["*"], "allow_remote": True},
    {"settings": {"jit": False, "work_mem": "4MB", "random_page_cost": 1.1, "a.b": 5}},
    {"settings": {"search_path": "\"$user\", 'public' ü", "log_line_prefix": ""}},
    {"role": "ünïcode-röle", "database": "all"},
    {"role": "owner", "databases": {"x": {"owner": "owner"}, "y": None}},
    {"roles": {"r": None}, "databases": {"x": {"owner": "r"}}},
    dict.fromkeys(("adopt", "databases", "maintenance", "roles", "settings")),
    {"roles": {"r": {"password_pillar": "vault:r"}}},
    _rule(address="fd00::/8"),
    _rule(address="samenet", user="+staff"),
    _rule(type="local", address=None, method="peer", options={"map": "staff"}),
    _rule(type="hostssl", method="cert", options={"clientcert": "verify-full"}),
    {"maintenance": {"windows": ["Sun 02:00-04:00", "Mon-Fri 23:00-01:00", "daily 03:00-24:00"]}},
    {"adopt": {"credentials_file": "/etc/autobot/db-credentials.env"}},
    {"secret": {"rotate_every": "90d", "rotate_backend": "none", "mode": "0600"}},
    {"backup": {"limits": {"backup": "26h", "wal": "90m", "proven_restore": "15d"}}},
    _second(**S3),
    _second(**S3, uri_style="path", verify_tls=False, ca_file="/etc/ssl/own.pem", port=9000),
    _second(**SFTP),
    _second(type="path", path="/mnt/backups", encryption=False, retention={"full": 4}),
    _second(type="host", host="10.0.0.9", user="pgbackrest", port=2222),
]


@pytest.mark.parametrize("pillar", RIGHT)
def test_what_is_right_is_accepted(pillar):
    """The check stands in nobody's way."""
    assert problems(pillar) == []


LEAKS = [
    {"password": CANARY},
    {"secret": CANARY},
    {"secret": {"password": CANARY, "SLM_DB_PASSWORD": CANARY}},
    {"secret": {"from_pillar": f"{CANARY}!"}},
    {"secret": {"from_pillar": [CANARY]}},
    {"secret": {"file": CANARY, "mode": CANARY, "key": f"{CANARY}=", "owner": f"{CANARY} "}},
    {"secret": {"url_keys": [f"postgresql://a:{CANARY}@b/c"], "url_driver": CANARY}},
    {"secret": {"generate_missing": {"SLM_SECRET_KEY": CANARY}}},
    {"roles": {"r": CANARY}},
    {"roles": {"r": {"password": CANARY}}},
    {"roles": {"r": {"secret": CANARY}}},
    {"roles": {"r": {"password_pillar": f"{CANARY} {CANARY}"}}},
    {"settings": {"primary_conninfo": f"password={CANARY}\n"}},
    {"settings": CANARY},
    {"adopt": {"credentials_file": CANARY, "pw": CANARY}},
    {"pgdg": {"uri": f"https://user:{CANARY}@apt.example/"}},
    {"hba": {"after": [{**RULE, "options": {"ldapbindpasswd": CANARY}}]}},
    {"hba": {"after": [{**RULE, "options": {"x": f'{CANARY}"'}}]}},
    {"hba": CANARY},
    {"tuning": CANARY},
    {"unknown": CANARY},
    CANARY,
    [CANARY],
]


@pytest.mark.parametrize("pillar", LEAKS)
def test_what_could_be_a_secret_is_never_repeated(pillar):
    """A password in the wrong place is refused without showing it."""
    lines = problems(pillar)
    assert lines
    assert CANARY not in "\n".join(lines)


@pytest.mark.parametrize("pillar", [{"password": "x"}, {"roles": {"r": {"db_password": "x"}}}])
def test_a_password_in_pillar_is_refused_with_the_right_way(pillar):
    """By reference, or made on the host."""
    (line,) = problems(pillar)
    assert "no password is taken from pillar" in line
    assert "secret:from_pillar" in line and "password_pillar" in line


PLACE = {"file": "/etc/x.env", "key": "P"}
OURS = {"file": _default("secret", "file"), "key": "R"}


@pytest.mark.parametrize(
    ("secret", "roles", "line"),
    [
        ({}, {"b": PLACE}, "roles:b:secret:key: this name is already that of {}roles:a:secret:key"),
        (
            {},
            {"b": {**PLACE, "key": "P_NEXT"}},
            "roles:b:secret:key: this name is already that of {}roles:a:secret:key "
            "with _NEXT (of a rotation)",
        ),
        (
            {"key": "R_PREVIOUS"},
            {"b": OURS},
            "roles:b:secret:key: this name with _PREVIOUS (of a rotation) is already that of "
            "{}secret:key",
        ),
        (
            {},
            {"b": {**OURS, "key": "DATABASE_URL"}},
            "roles:b:secret:key: this name is already that of {}secret:url_keys:0",
        ),
        (
            {"generate_missing": ["R"]},
            {"b": OURS},
            "roles:b:secret:key: this name is already that of {}secret:generate_missing:0",
        ),
        (
            {},
            {"b": {**PLACE, "key": "Q", "mode": "0600"}},
            "roles:b:secret:mode: the same file has another mode by {}roles:a:secret:mode",
        ),
        (
            {"owner": "slm"},
            {"b": {**OURS, "owner": "root"}},
            "roles:b:secret:owner: the same file has another owner by {}secret:owner",
        ),
    ],
)
def test_what_is_in_one_file_has_names_of_its_own(secret, roles, line):
    """The second would overwrite the first one's password, or its file, at every run."""
    roles = {name: {"secret": dict(place)} for name, place in {"a": PLACE, **roles}.items()}
    told = {"secret": {"url_keys": ["DATABASE_URL"], **secret}, "roles": roles}
    assert f"{TOP}:{line.format(f'{TOP}:')}" in problems(told)


def test_roles_may_share_a_file():
    """With a key each, whoever says the owners and the mode."""
    roles = {"a": {"secret": OURS}, "b": {"secret": {**OURS, "key": "S", "owner": "root"}}}
    assert problems({"roles": roles}) == []


def test_a_role_connects_to_databases_that_are_declared():
    """The application's counts, by its default name as well; a mistake is named with its place."""
    told = {"databases": {"metrics": None}, "roles": {"r": {"connect": ["autobot_slm", "metrics"]}}}
    assert problems(told) == []
    assert problems({**told, "database": "other"}) == [
        f'{TOP}:roles:r:connect:0: "autobot_slm" is not declared; add it to {TOP}:databases'
    ]
    assert problems({"roles": {"r": {"connect": "metrics"}}}) == [
        f"{TOP}:roles:r:connect: text that is not shown here is given; allowed: a list"
    ]


def test_one_source_for_a_password():
    """Both would leave open which one counts."""
    role = {"secret": {"file": "/etc/x.env", "key": "P"}, "password_pillar": "a:b"}
    assert problems({"roles": {"r": role}}) == [
        f"{TOP}:roles:r: has both secret and password_pillar; allowed: one of them"
    ]


SCALARS = some.one_of(
    some.none(),
    some.booleans(),
    some.integers(),
    some.floats(),
    some.text(max_size=12),
    some.dates(),
    some.binary(max_size=4),
    some.sampled_from([CANARY, "\n", "\x00", "pg_x", "all"]),
)
KEYS = some.one_of(
    some.sampled_from(sorted(SCHEMA.SCHEMA)),
    some.sampled_from(["file", "key", "before", "after", "owner", "secret", "type", "method"]),
    some.text(max_size=8),
    some.none(),
    some.integers(),
    some.booleans(),
)
ANYTHING = some.recursive(
    SCALARS,
    lambda inner: some.one_of(
        some.lists(inner, max_size=3), some.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=600, deadline=None)
@given(some.one_of(ANYTHING, some.dictionaries(KEYS, ANYTHING, max_size=4)))
def test_no_pillar_breaks_the_check(pillar):
    """Whatever it is: lines of text, each with a path, none twice; and the pillar is untouched."""
    before = copy.deepcopy(pillar)
    lines = problems(pillar)
    assert repr(pillar) == repr(before)
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert line.startswith((f"{TOP}:", TOP)) and ": " in line and line.isprintable()


@settings(max_examples=400, deadline=None)
@given(some.sampled_from(sorted(_settled(SCHEMA.SCHEMA))), ANYTHING)
def test_any_value_anywhere_is_accepted_or_named(path, value):
    """A mistake at a key is reported at that key or below, or by a check across keys."""
    for line in problems(_pillar(path.strip(":"), value)):
        assert line.startswith(f"{TOP}:{path.strip(':').split(':')[0]}")


@settings(max_examples=300, deadline=None)
@given(some.text(min_size=1, max_size=70))
def test_a_role_name_that_is_accepted_is_one_postgresql_can_have(name):
    """Never truncated, never two words of a rule, never a line break."""
    if problems({"role": name}) == []:
        assert len(name.encode()) <= 63 and name.isprintable()
        assert not set(name) & set("\"'\\`\n\x00") and not name.startswith("pg_")


DOCUMENT = (sls.CHECKOUT / "docs" / "configuration.md").read_text()
FENCED = re.compile(r"```yaml\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize(("pillar", "said"), FENCED.findall(DOCUMENT))
def test_the_manual_is_right(pillar, said):
    """Each pillar in it is valid, or gives exactly the mistakes that are shown below it."""
    assert problems(yaml.safe_load(pillar)[TOP]) == said.splitlines()


def test_every_setting_has_a_reader():
    """A key that no module asks for would be a promise that nobody keeps."""
    code = "\n".join(
        path.read_text()
        for path in (sls.CHECKOUT / "_modules").glob("*.py")
        if path.stem not in ("slmdb_schema", "slmdb_kinds")
    )
    names = {path.rpartition(":")[2] for path in _settled(SCHEMA.SCHEMA)}
    assert names - set(re.findall(r"""["'](\w+)["']""", code)) == set()


def test_each_supported_major_has_an_end():
    """What is allowed, what an instance may have, and whose end is announced are the same."""
    assert tuple(PENDING.END_OF_LIFE) == INSTANCE.majors()
    for major in ("13", *INSTANCE.majors(), "19"):
        assert (problems(_pillar("version", major)) == []) == (major in INSTANCE.majors())
    assert KINDS.mistake("major", "13").endswith("14 to 18")
