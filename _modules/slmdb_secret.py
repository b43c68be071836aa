"""
The password of a role: made once, kept in the secret file, in step with the server, never shown.
"""

from __future__ import annotations

import contextlib
import datetime
import grp
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_secret"

_SECRET_NAME = re.compile(r"pass|secret|key|token|credential|salt|url|dsn", re.IGNORECASE)
_IN_URL = re.compile(r"://[^:@/]*:(\S+)@")
_DAYS = {"d": 1, "w": 7}


def __virtual__() -> str:
    return __virtualname__


class _Sealed(str):
    """A mapping that is a word without a secret to whoever prints or sends it."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls, "<sealed>")

    def __init__(self, values: dict[str, str]):
        self._values = values

    def keys(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, key: Any) -> str:
        return self._values[key]


def _targets(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the caller asks for: one role if anything is given, else all of the settings."""
    given = {name: value for name, value in given.items() if not name.startswith("__")}
    if given:
        __salt__["slmdb_schema.refuse"]("slmdb_secret", **given)
        return [__salt__["slmdb_secret_plan.wanted"](**given)]
    return __salt__["slmdb_secret_plan.everyone"]()


def differences(**wanted: Any) -> dict[str, dict[str, Any]]:
    """
    Say what ``apply`` would change, without any secret.

    wanted
        Arguments of the state ``slmdb_secret.present``; none of them: everything the settings ask
        for.

    Returns what differs as ``{what: {"old": …, "new": …}}``. Raises ``CommandExecutionError`` if
    the file cannot be understood or the password of an existing role is not known.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.differences
    """
    changes: dict[str, dict[str, Any]] = {}
    targets = _targets(wanted)
    for want in targets:
        prefix = "" if want is targets[0] else f"{want['role']}: "
        for what, change in _differences(want).items():
            changes[prefix + what] = change
    return changes


def _differences(want: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if want["file"]:
        return __salt__["slmdb_secret_plan.plan"](want).changes
    role = want["role"]
    if __salt__["slmdb_verifier.in_step"](
        role, __salt__["slmdb_secret_plan.supplied"](want).password
    ):
        return {}
    return {f"verifier of {role}": {"old": "another password", "new": "scram-sha-256"}}


def apply(**wanted: Any) -> None:
    """
    Make the file, its keys and the role's verifier what they should be.

    wanted
        Arguments of the state ``slmdb_secret.present``; none of them: everything the settings ask
        for.

    Returns nothing. Raises ``CommandExecutionError`` as ``differences`` does, if the role does not
    exist, or another run holds the file; nothing was changed then.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.apply
    """
    for want in _targets(wanted):
        if want["file"]:
            _apply(want)
        elif _differences(want):
            password = __salt__["slmdb_secret_plan.supplied"](want).password
            __salt__["slmdb_verifier.put"](want["role"], password)


def _apply(want: dict[str, Any]) -> None:
    store = __salt__["slmdb_secret_file.store"](want["file"])
    if __salt__["slmdb_secret_plan.plan"](want, store).kind == "no role":
        raise CommandExecutionError(
            f"role {want['role']} does not exist: create it, then its password is made"
        )
    with store.locked():
        __salt__["slmdb_verifier.settle"]()
        plan = __salt__["slmdb_secret_plan.plan"](want, store)
        _make_group(want["group"])
        for _ in range(2):  # what was interrupted, then what is supplied
            if plan.rotation:
                _settle(plan)
                plan = __salt__["slmdb_secret_plan.plan"](want, store)
        _write(plan)


def _settle(plan: Any) -> dict[str, Any]:
    if plan.rotation == "interrupted":
        return __salt__["slmdb_secret_rotation.resume"](plan)
    want = plan.want
    if plan.edits:
        plan.store.save(plan.edits, want["owner"], want["group"], want["mode"])
    if not plan.in_step(plan.password):
        __salt__["slmdb_verifier.put"](want["role"], plan.password)
    return __salt__["slmdb_secret_rotation.rotate"](plan, plan.supplied, strict=False)


def rotate(dry_run: bool = False, role: str | None = None) -> dict[str, Any]:
    """
    Replace the password in the file, the server and the running backend, or change nothing.

    dry_run
        True says what would be done and does nothing.
    role
        The role; default: the application's. Others are those of the settings that have a secret
        file.

    Returns rotated, role, file, backend (what was done with it), login (True if the new password
    was seen to log in, None if that was not tried: no rule is sure to admit another role),
    old_password_refused and url_stale (URL keys of the operator's own that need the new password).
    Raises ``CommandExecutionError`` with one line if it cannot begin or had to be undone.

    CLI Example:

    .. code-block:: bash

        salt '*.19' slmdb_secret.rotate dry_run=True
        salt '*.19' slmdb_secret.rotate
    """
    want = _known(role)
    if want["from_pillar"]:
        raise SaltInvocationError(
            f"the password of {want['role']} is supplied by pillar key {want['from_pillar']}: "
            "change it there and apply slm_database.secret"
        )
    store = __salt__["slmdb_secret_file.store"](want["file"])
    if not store.exists:
        raise CommandExecutionError(
            f"{want['file']} does not exist: apply slm_database.secret first"
        )
    if dry_run:
        plan = __salt__["slmdb_secret_plan.plan"](want, store)
        return __salt__["slmdb_secret_rotation.preview"](plan)
    with store.locked():
        __salt__["slmdb_verifier.settle"]()
        plan = __salt__["slmdb_secret_plan.plan"](want, store)
        if plan.rotation:
            report = _settle(plan)
            if report["rotated"]:
                return report
            plan = __salt__["slmdb_secret_plan.plan"](want, store)
        return __salt__["slmdb_secret_rotation.rotate"](plan)


def _known(role: str | None) -> dict[str, Any]:
    everyone = __salt__["slmdb_secret_plan.everyone"]()
    for want in everyone:
        if role in (None, want["role"]):
            return want
    raise SaltInvocationError(f"role {role} has no secret in the settings")


def _write(plan: Any) -> None:
    """Write the file first, then the verifier: a kill between them leaves a password to use."""
    want = plan.want
    if any(not what.startswith("verifier of ") for what in plan.changes):
        plan.store.save(plan.edits, want["owner"], want["group"], want["mode"])
    if plan.put:
        __salt__["slmdb_verifier.put"](want["role"], plan.password)


def _make_group(name: str) -> None:
    try:
        grp.getgrnam(name)
    except KeyError:
        if not __salt__["group.add"](name, system=True):
            raise CommandExecutionError(f"group {name} could not be made") from None


def problem() -> str | None:
    """
    Say why the secrets of the settings could not be applied, before anything else is.

    Returns one line, or None. The server is asked as well if it runs.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.problem
    """
    try:
        server = __salt__["slmdb_server.available"]()
        for want in _targets({}):
            if want["file"]:
                __salt__["slmdb_secret_plan.plan"](want, server=server)
            else:
                __salt__["slmdb_secret_plan.supplied"](want)
    except (CommandExecutionError, SaltInvocationError) as err:
        return err.strerror
    return None


def facts(server: bool = True) -> dict[str, Any]:
    """
    Report on the application's secret, without any secret.

    server
        False leaves the server out: ``in_step`` is None then.

    Returns file, exists, owner, group, mode (of the file, or None), wanted (those three), in_step
    (True, False, None if unknown), verifier (its kind), problem (one line or None), missing_keys
    (of ``secret:expected_keys``), url_stale (URL keys with another password), url_unclear (URL keys
    that cannot be compared), url_elsewhere (URL keys that lead elsewhere, and where), rotation
    (None or ``interrupted``), age_days, overdue (True, False, None if ``rotate_every`` is not set),
    left_behind (the old credentials file if it holds another password).

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.facts
    """
    want = __salt__["slmdb_secret_plan.wanted"]()
    found: dict[str, Any] = {
        "missing_keys": [],
        "url_stale": [],
        "url_unclear": [],
        "url_elsewhere": {},
        "rotation": None,
        "age_days": None,
        "overdue": None,
        "verifier": None,
        "in_step": None,
        "left_behind": None,
    }
    there, store = _there(want)
    found.update(there)
    if store is None:
        return found
    values = store.values()
    found.update(_report(want, store, values))
    if found["rotation"]:
        found["problem"] = None  # it has the password under another key
    if server and want["key"] in values:
        with contextlib.suppress(CommandExecutionError):
            found.update(_server_report(want, values[want["key"]]))
    return found


def others() -> list[dict[str, Any]]:
    """
    Report on the secret files of the roles beside the application's, without any secret.

    Returns file, exists, owner, group, mode, wanted and problem of each, as ``facts`` does.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.others
    """
    return [
        _there(want)[0] for want in __salt__["slmdb_secret_plan.everyone"]()[1:] if want["file"]
    ]


def _there(want: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A secret's file as a report has it, and its store, if it can be understood."""
    found: dict[str, Any] = {
        "file": want["file"],
        "exists": False,
        "owner": None,
        "group": None,
        "mode": None,
        "wanted": {name: want[name] for name in ("owner", "group", "mode")},
        "problem": None,
    }
    try:
        store = __salt__["slmdb_secret_file.store"](want["file"])
        found.update(store.ownership(), exists=store.exists)
        store.check([want["key"], *want["url_keys"]])
    except (CommandExecutionError, SaltInvocationError) as err:
        return {**found, "problem": err.strerror}, None
    if want["key"] not in store.values():
        lost = f"{want['file']}: there is no {want['key']}"
        lost = lost if store.exists else f"there is no {want['file']}"
        apply = "state.apply slm_database.secret"
        found["problem"] = f"{lost}: bring the copy back; on a new install {apply} makes it"
    return found, store


def _report(want: dict[str, Any], store: Any, values: dict[str, str]) -> dict[str, Any]:
    expected = __salt__["slmdb_pillar.get"]("secret", "expected_keys")
    interrupted = f"{want['key']}_NEXT" in values or f"{want['key']}_PREVIOUS" in values
    age = _age(want, store, values)
    return {
        "missing_keys": [name for name in expected if name not in values],
        "url_stale": __salt__["slmdb_secret_url.stale_urls"](want, store),
        "url_unclear": __salt__["slmdb_secret_url.unclear_urls"](want, store),
        "url_elsewhere": __salt__["slmdb_secret_url.elsewhere_urls"](want, store),
        "rotation": "interrupted" if interrupted else None,
        "age_days": age,
        "overdue": _overdue(want["rotate_every"], age),
        "left_behind": _left_behind(want, values.get(want["key"])),
    }


def _left_behind(want: dict[str, Any], password: str | None) -> str | None:
    path = want["credentials_file"]
    if not path or password is None:
        return None
    with contextlib.suppress(CommandExecutionError):
        old = __salt__["slmdb_secret_file.store"](path).values().get("SLM_DB_PASSWORD", password)
        return path if old != password else None
    return None


def _server_report(want: dict[str, Any], password: str) -> dict[str, Any]:
    kind = __salt__["slmdb_verifier.kind"](want["role"])
    in_step = __salt__["slmdb_verifier.in_step"](want["role"], password)
    return {"verifier": kind, "in_step": in_step}


def _age(want: dict[str, Any], store: Any, values: dict[str, str]) -> int | None:
    """Return the days since the password was set, or the file's age, the least it can be."""
    if want["key"] not in values:
        return None
    today = datetime.datetime.now(datetime.timezone.utc).date()
    try:
        since = datetime.date.fromisoformat(values.get(f"{want['key']}_SINCE", ""))
    except ValueError:
        since = datetime.datetime.fromtimestamp(store.found.st_mtime, datetime.timezone.utc).date()
    return max(0, (today - since).days)


def _overdue(every: str | None, age: int | None) -> bool | None:
    if not every or age is None:
        return None
    return age > int(every[:-1]) * _DAYS[every[-1]]


def login(
    database: str | None = None,
    host: str = "127.0.0.1",
    role: str | None = None,
    file: str | None = None,
    key: str | None = None,
    timeout: int = 5,
) -> bool | str:
    """
    Log in over TCP with the password of the secret file, as the application does.

    database
        Name of the database; default: the application's.
    host
        Address to connect to.
    role, file, key
        The role, its file and the key in it; default: the application's.
    timeout
        How long to wait, in seconds.

    Returns True, or one line that says why not.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.login
    """
    want = __salt__["slmdb_secret_plan.wanted"](role=role, file=file, key=key, database=database)
    try:
        password = __salt__["slmdb_secret_file.store"](want["file"]).values().get(want["key"])
    except CommandExecutionError as err:
        return err.strerror
    if password is None:
        return f"{want['file']} has no {want['key']}"
    return __salt__["slmdb_verifier.login"](
        want["role"], password, want["database"], host, want["port"], timeout
    )


def fingerprint(file: str | None = None, key: str | None = None) -> dict[str, Any]:
    """
    Give a short digest of the password, to compare file, server and a copy without showing
    anything.

    file
        A copy of the secret file to compare; default: none.
    key
        What the digest is keyed with; default: the identity of this host, so that digests of two
        hosts differ. Give the same text on two hosts to compare them.

    Returns file, server (the same digest if the server is in step, ``differs`` or None if it is not
    there) and copy. Raises ``SaltInvocationError`` if there is no such copy,
    ``CommandExecutionError`` if a file cannot be read.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.fingerprint file=/mnt/copy/slm-secrets.env
    """
    if file is not None:
        __salt__["slmdb_kinds.refuse"]("file", "path", file)
        if not os.path.lexists(file):
            raise SaltInvocationError(f"file: there is no file {file}")
    want = __salt__["slmdb_secret_plan.wanted"]()
    text = key or _host_identity()
    password = _password_in(want["file"], want["key"])
    own = _digest(password, text, want["role"]) if password else None
    server = None
    if password and __salt__["slmdb_server.available"]():
        server = own if __salt__["slmdb_verifier.in_step"](want["role"], password) else "differs"
    result = {"file": own, "server": server}
    if file:
        copied = _password_in(file, want["key"])
        result["copy"] = _digest(copied, text, want["role"]) if copied else None
    return result


def _password_in(path: str, key: str) -> str | None:
    store = __salt__["slmdb_secret_file.store"](path)
    store.check([key])
    return store.values().get(key)


def _host_identity() -> str:
    identity = (
        (__salt__["slmdb_file.read"]("/etc/machine-id") or b"").decode("ascii", "replace").strip()
    )
    if not identity:
        raise CommandExecutionError(
            "this host has no /etc/machine-id: give key= some text of your own"
        )
    return identity


def _digest(password: str, key: str, role: str) -> str:
    """Derive slowly, so that a digest is of no use for guessing."""
    salt = f"slmdb fingerprint {role} {key}".encode()
    return hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 300_000).hex()[:16]


def variables(path: str) -> _Sealed:
    """
    Read an environment file for a child process of ours.

    path
        Absolute path of the file; one that does not exist has no variables.

    Returns a mapping for use inside the process, which shows nothing of itself. Raises
    ``CommandExecutionError`` if the file cannot be read.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.variables /etc/autobot/slm-secrets.env
    """
    return _Sealed(__salt__["slmdb_secret_file.store"](path.removeprefix("-")).values())


def hidden(variables: Any) -> list[str]:
    """
    Pick the values that no output may show from variables that the caller has.

    variables
        A mapping of names and values.

    Returns the values of names that sound secret, and passwords inside URLs, the longest first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret.hidden '{"PORT": "5432"}'
    """
    found = set()
    for name in variables.keys():  # noqa: SIM118 - a sealed mapping cannot be iterated
        value = variables[name]
        if _SECRET_NAME.search(name) and len(value) >= 4:
            found.add(value)
        for password in _IN_URL.findall(value):
            # A driver takes a bare @ in it for its end, and names the rest as a host.
            found.update(part for part in (password, *password.split("@")) if len(part) > 2)
    return sorted(found, key=len, reverse=True)
