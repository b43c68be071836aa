"""
What the secret file and the role's verifier should be, compared with what they are.

A ``Plan`` is made from the settings, the file and the server, and changes nothing. It carries
secrets, so it never leaves the process; what it says of itself (``changes``) holds none.
"""

from __future__ import annotations

import datetime
import grp
import pwd
import secrets
import string
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_secret_plan"

CREDENTIALS = "/etc/autobot/db-credentials.env"
_ALPHABET = string.ascii_letters + string.digits
_FROM_SETTINGS = (
    *("file", "owner", "group", "mode", "key", "url_keys", "url_driver", "generate_missing"),
    *("length", "from_pillar", "rotate_every", "rotate_backend"),
)
_OTHERS = ("role", "database", "port", "credentials_file")
_FOR_OTHER_ROLES: dict[str, Any] = {
    "url_keys": [],
    "generate_missing": [],
    "from_pillar": None,
    "rotate_every": None,
    "rotate_backend": "none",
}


def __virtual__() -> str:
    return __virtualname__


def wanted(**given: Any) -> dict[str, Any]:
    """
    Complete the arguments of ``slmdb_secret.present`` from the settings.

    given
        Any of role, database, port, file, owner, group, mode, key, url_keys, url_driver,
        generate_missing, length, from_pillar, rotate_every, rotate_backend, credentials_file; a
        role other than the formula's has no URL keys unless they are given.

    Returns all of them, adopted_role (``adopt:role``, for the application's role) and named (under
    which key the operator wrote one). Raises ``SaltInvocationError`` for an unknown one.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_plan.wanted
    """
    unknown = sorted(set(given) - {*_FROM_SETTINGS, *_OTHERS})
    if unknown:
        raise SaltInvocationError(f"unknown argument {unknown[0]}")
    settings = __salt__["slmdb_pillar.settings"]()
    result = {name: settings["secret"][name] for name in _FROM_SETTINGS}
    result["role"] = settings["role"]
    result["database"] = settings["database"]
    result["credentials_file"] = settings["adopt"].get("credentials_file")
    result["adopted_role"] = settings["adopt"].get("role")
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("role", settings["role"]) != settings["role"]:
        result.update(_FOR_OTHER_ROLES, credentials_file=None, adopted_role=None)
    result.update(given, named={name: name for name in given})
    if "port" not in given:
        result["port"] = __salt__["slmdb_lastgood.port"]()
    return result


def everyone() -> list[dict[str, Any]]:
    """
    List what the settings want: the application's role first, then the other roles with a secret.

    Returns a list of what ``wanted`` returns; a role with ``password_pillar`` has file ``None``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_plan.everyone
    """
    found = [wanted()]
    for role, options in __salt__["slmdb_pillar.get"]("roles").items():
        options, place = options or {}, f"slm_database:roles:{role}"
        if options.get("secret"):
            named = {name: f"{place}:secret:{name}" for name in options["secret"]}
            found.append({**wanted(role=role, **options["secret"]), "named": named})
        elif options.get("password_pillar"):
            supplied = wanted(role=role, from_pillar=options["password_pillar"])
            named = {"from_pillar": f"{place}:password_pillar"}
            found.append({**supplied, "file": None, "named": named})
    return found


def _named(want: dict[str, Any], name: str) -> str:
    """Return the key under which the operator wrote a setting, else where its default is."""
    return want["named"].get(name, f"slm_database:secret:{name}")


def generated(length: int) -> str:
    """
    Make a random text.

    length
        How many letters and digits it has.

    Returns the text, from the system's random source.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_plan.generated 43
    """
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _adopted(path: str) -> str:
    """Return the password of an older install."""
    old = __salt__["slmdb_secret_file.store"](path)
    old.check(["SLM_DB_PASSWORD"])
    values = old.values()
    if "SLM_DB_PASSWORD" not in values:
        raise CommandExecutionError(
            f"slm_database:adopt:credentials_file: {path} has no SLM_DB_PASSWORD"
        )
    return values["SLM_DB_PASSWORD"]


class Plan(str):
    """What is to be done for one role; to whoever prints or sends it, a word without a secret."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls, "<sealed>")

    def __init__(self, want: dict[str, Any], store: Any, server: bool):
        self.want, self.store, self.server = want, store, server
        self.changes: dict[str, dict[str, Any]] = {}
        self.edits: dict[str, str | None] = {}
        self.rotation: str | None = None
        self.put = False
        key = want["key"]
        self.next_key, self.previous_key, self.since_key = (
            f"{key}_NEXT",
            f"{key}_PREVIOUS",
            f"{key}_SINCE",
        )
        store.check(
            [key, self.next_key, self.previous_key, *want["url_keys"], *want["generate_missing"]]
        )
        self.values = store.values()
        self.kind = __salt__["slmdb_verifier.kind"](want["role"]) if server else "no role"
        self.supplied = supplied(want).password
        self.password = self._choose()
        self._compare()

    def in_step(self, password: str) -> bool:
        """Tell whether the server accepts a password."""
        return self.server and __salt__["slmdb_verifier.in_step"](self.want["role"], password)

    def _choose(self) -> str:
        """Return the password: the file's wins; a new one only if nobody can be locked out."""
        key = self.want["key"]
        if key in self.values:
            return self.values[key]
        if self.next_key in self.values:
            raise CommandExecutionError(
                f"{self.store.path} has {self.next_key} but no {key}: write the password as {key}"
            )
        candidates = self._candidates()
        if self.kind in ("no role", "none"):
            source, password = next(
                iter(candidates.items()), ("generated", generated(self.want["length"]))
            )
        else:
            source, password = self._matching(candidates)
        self._note(key, None, source)
        self.edits[key] = password
        return password

    def _candidates(self) -> dict[str, str]:
        """Return passwords that exist already, by where they are."""
        found = {}
        for name in self.want["url_keys"]:
            text = self.values.get(name, "")
            password = __salt__["slmdb_secret_url.password_of"](self.want, text)
            if password:
                found[f"taken from {name}"] = password
        path = self.want["credentials_file"]
        if path:
            found[f"adopted from {path}"] = _adopted(path)
        if self.supplied:
            found[f"supplied by pillar key {self.want['from_pillar']}"] = self.supplied
        return found

    def _matching(self, candidates: dict[str, str]) -> tuple[str, str]:
        for source, password in candidates.items():
            if self.in_step(password):
                return source, password
        if __salt__["slmdb_pillar.get"]("secret", "allow_new"):
            source = f"supplied by pillar key {self.want['from_pillar']}"
            return (source, self.supplied) if self.supplied else self._anew()
        role, key = self.want["role"], self.want["key"]
        tried = f" (what is {', '.join(candidates)} is not it)" if candidates else ""
        older = (
            " (or name the file that has it, on older hosts "
            f"{CREDENTIALS}, in slm_database:adopt:credentials_file)"
        )
        raise CommandExecutionError(
            f"role {role} has a password, but {self.store.path} has no {key}{tried}: either write "
            f"the password there as {key}=...{older if self._is_the_applications() else ''}, or, "
            "if nobody knows it, set slm_database:secret:allow_new: true for one run: a new one is "
            "made then"
        )

    def _is_the_applications(self) -> bool:
        """Tell whether the file is the application's: its role may have its older name still."""
        return self.store.path == __salt__["slmdb_pillar.get"]("secret", "file")

    def _anew(self) -> tuple[str, str]:
        """Return a new password for a role whose old one is lost with its host."""
        source = "generated anew; the backend's own secrets are not in the file, and are lost"
        return source, generated(self.want["length"])

    def _note(self, what: str, old: Any, new: Any) -> None:
        self.changes[what] = {"old": old, "new": new}

    def _compare(self) -> None:
        self._compare_file()
        if self.next_key in self.values or self.previous_key in self.values:
            self.rotation = "interrupted"
        elif self.supplied and self.supplied != self.password:
            self.rotation = "supplied"
        if self.rotation == "interrupted":
            self._note("rotation", "interrupted", "finished or undone")
            return
        if self.rotation:
            self.refuse_own_urls()
            backend = __salt__["slmdb_secret_backend.intention"](self.want)
            self._note("rotation", "another password is supplied", f"rotated; backend: {backend}")
        self._compare_urls()
        self._compare_helpers()
        self._compare_verifier()

    def _compare_file(self) -> None:
        want = self.want
        if not self.store.exists:
            self._note("file", None, self.store.path)
        for what, old in self.store.ownership().items():
            octal = __salt__["slmdb_secret_file.octal"]
            new = octal(want["mode"]) if what == "mode" else want[what]
            if old != new:
                self._note(what, old, new)
        if self.store.leftover:
            self._note("file left by a killed run", self.store.temporary, None)
        try:
            grp.getgrnam(want["group"])
        except KeyError:
            self._note("group on this host", None, want["group"])
        try:
            pwd.getpwnam(want["owner"])
        except KeyError:
            raise CommandExecutionError(
                f"{_named(want, 'owner')}: there is no user {want['owner']} on this host"
            ) from None

    def _compare_urls(self) -> None:
        expected = __salt__["slmdb_secret_url.whole"](self.want, self.password)
        for name in self.want["url_keys"]:
            present = self.values.get(name)
            if present == expected:
                continue
            if present is None:
                self._set_url(name, None, expected)
                continue
            if self._cut_off() == name and expected.startswith(present):
                raise CommandExecutionError(
                    f"{self.store.path} is cut off in {name}: remove that line"
                )
            renewed = self._renewed(present)
            if renewed not in (None, present):
                self._set_url(name, "stale", renewed)

    def _renewed(self, text: str) -> str | None:
        known = {self.password, *__salt__["slmdb_secret_url.known"](self.want, self.values)}
        return __salt__["slmdb_secret_url.renewed"](self.want, text, self.password, known)

    def refuse_own_urls(self) -> None:
        """Raise CommandExecutionError if another password would lock an operator's URL out."""
        for name in self.want["url_keys"]:
            text = self.values.get(name, "")
            held = __salt__["slmdb_secret_url.holds"](text, self.password)
            if held and self._renewed(text) is None:
                apart = __salt__["slmdb_secret_url.apart"](self.want, text)
                raise CommandExecutionError(
                    f"{self.store.path}: {name} is your own ({apart}) and holds the present "
                    "password, which it would keep: change it to the formula's form, or take it "
                    f"out of {_named(self.want, 'url_keys')}; nothing was changed"
                )

    def _set_url(self, name: str, old: str | None, expected: str) -> None:
        self._note(name, old, "in step")
        self.edits[name] = expected

    def _compare_helpers(self) -> None:
        for name in self.want["generate_missing"]:
            if name not in self.values:
                self._note(name, None, "generated")
                self.edits[name] = generated(self.want["length"])
        if self.want["rotate_every"] and self.since_key not in self.values:
            fresh = self.rotation or self.want["key"] in self.edits
            since = _day(None if fresh else self.store.found)
            self._note(self.since_key, None, since)
            self.edits[self.since_key] = since

    def _compare_verifier(self) -> None:
        if not self.server:
            return
        if self.kind in ("no role", "none"):
            old = None
        elif not self.in_step(self.password):
            old = "another password"
            if self._cut_off() == self.want["key"]:
                raise CommandExecutionError(
                    f"{self.store.path} ends in {self.want['key']} without a newline and role "
                    f"{self.want['role']} has another password: the file looks cut off; if the "
                    "value is whole, end the line"
                )
        elif self.kind != "scram-sha-256":
            old = self.kind
        else:
            return
        self._note(f"verifier of {self.want['role']}", old, "scram-sha-256")
        self.put = True

    def _cut_off(self) -> str | None:
        """Return the key of a last line that has no newline."""
        if self.store.data[-1:] in (b"\n", b"\r", b""):
            return None
        found = __salt__["slmdb_envfile.entries"](self.store.data)
        return found[-1].key if found else None


def _day(found: Any) -> str:
    """Return the day of a file's last change, else today, in UTC."""
    utc = datetime.timezone.utc
    moment = (
        datetime.datetime.fromtimestamp(found.st_mtime, utc)
        if found
        else datetime.datetime.now(utc)
    )
    return moment.date().isoformat()


class Supplied(str):
    """A password that the operator supplies; to whoever prints or sends it, a word without it."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls, "<sealed>")

    def __init__(self, password: str | None):
        self.password = password


def supplied(want: dict[str, Any]) -> Supplied:
    """
    Read the password that the operator supplies.

    want
        What ``wanted`` returns.

    Returns an object for use inside the process. Raises ``CommandExecutionError`` if pillar has no
    such key, or no text there.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_plan.supplied "$WANTED"
    """
    name = want["from_pillar"]
    if not name:
        return Supplied(None)
    value = __salt__["config.get"](name, None)
    if value is None:
        raise CommandExecutionError(
            f"{_named(want, 'from_pillar')}: pillar has no key {name}: supply it"
        )
    if not isinstance(value, str) or not value or not __salt__["slmdb_envfile.valid_text"](value):
        raise CommandExecutionError(
            f"{_named(want, 'from_pillar')}: pillar key {name} must hold a text"
        )
    return Supplied(value)


def own_urls(want: dict[str, Any], store: Any) -> list[str]:
    """
    Name the URL keys that are ours to write.

    want
        What ``wanted`` returns.
    store
        An open ``Store``.

    Returns a list of names; a URL for another role, host, driver or option is the operator's.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_plan.own_urls "$WANTED" "$STORE"
    """
    values = store.values()
    ours = __salt__["slmdb_secret_url.ours"]
    known = __salt__["slmdb_secret_url.known"](want, values)
    return [name for name in want["url_keys"] if ours(want, values.get(name, ""), known)]


def adopted_in_step(path: str, role: str) -> bool:
    """
    Tell whether the password of an older install is the one of a role.

    path
        The older install's credentials file.
    role
        The name of the role.

    Returns True or False. Raises ``CommandExecutionError`` if the file has no password.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_plan.adopted_in_step /etc/autobot/db-credentials.env slm_app
    """
    return __salt__["slmdb_verifier.in_step"](role, _adopted(path))


def plan(want: dict[str, Any], store: Any = None, server: bool = True) -> Plan:
    """
    Compare a role's file and verifier with what they should be.

    want
        What ``wanted`` returns.
    store
        An open ``Store``; None opens the file.
    server
        False leaves the server out.

    Returns a ``Plan``, for use inside the process. Raises ``CommandExecutionError`` if the file
    cannot be understood, or the password is not known.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_plan.plan "$WANTED"
    """
    return Plan(want, store or __salt__["slmdb_secret_file.store"](want["file"]), server)
