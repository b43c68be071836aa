"""
URLs that hold a password: what is in them, whose they are, and the same with another password.

They are read as the backend's library reads them. Nothing here asks the server or writes a file.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_secret_url"

# SQLAlchemy takes everything up to the first "@" for the password, and needs no path.
_URL = re.compile(
    r"(?P<driver>[^:/?#]+)://(?P<user>[^:@/?#]*)(?::(?P<password>[^@]*))?"
    r"@(?P<place>\[[^\]]*\][^/?#]*|[^/?#]*)(?:/(?P<database>[^?#]*))?(?P<options>.*)\Z",
    re.DOTALL,
)
_PLACE = re.compile(r"(?P<host>\[[^\]]*\]|[^:,@]*)(?::(?P<port>\d+))?\Z")
# The same where nobody is named, as over the socket.
_NOBODY = re.compile(
    r"(?P<driver>[^:/?#]+)://(?P<user>)(?P<place>[^@/?#]*)(?:/(?P<database>[^@?#]*))?"
    r"(?P<options>[^@]*)\Z"
)
_ELSEWHERE = re.compile(r"[?&](host|hostaddr|port|database|dbname|service)=")
_DRIVER = re.compile(r"([a-z][a-z0-9_]+(?:\+[a-z0-9_]+)?)://")
_IN_OPTIONS = re.compile(r"[?&]password=([^&#]*)")
_WHITESPACE = re.compile(r"\s")
_POSTGRESQL = re.compile(r"postgres(ql)?(\+\w+)?\Z")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PORT = 5432


def __virtual__() -> str:
    return __virtualname__


def whole(want: dict[str, Any], password: str) -> str:
    """
    Write the URL under which the backend finds its database.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    password
        The password.

    Returns the URL; every part is percent-encoded.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    role, secret, database = (
        quote(text, safe="") for text in (want["role"], password, want["database"])
    )
    return f"{want['url_driver']}://{role}:{secret}@localhost:{want['port']}/{database}"


def _place(parts: re.Match) -> tuple[str | None, int]:
    """Return host and port; no host if there are several."""
    place = _PLACE.match(parts["place"])
    return (place["host"], int(place["port"] or _PORT)) if place else (None, _PORT)


def _of_the_role(want: dict[str, Any], parts: re.Match) -> bool:
    return unquote(parts["user"]) in {want["role"], want["adopted_role"]}


def _formed(want: dict[str, Any], text: str) -> re.Match | None:
    """Read a URL of the formula's form; it may be for other names and another port."""
    parts = _URL.match(text)
    if not parts or not parts["password"] or parts["options"]:
        return None
    same = parts["driver"] == want["url_driver"] and _place(parts)[0] == "localhost"
    return parts if same else None


def _followed(want: dict[str, Any], text: str) -> re.Match | None:
    """Read an operator's URL for our role, in our database, on this server, and nothing else."""
    parts = _URL.match(text)
    if not parts or not parts["password"] or parts["options"]:
        return None
    host, port = _place(parts)
    names = unquote(parts["user"]), unquote(parts["database"] or "")
    same = host in _LOOPBACK and port == want["port"] and _POSTGRESQL.match(parts["driver"])
    return parts if same and names == (want["role"], want["database"]) else None


def ours(want: dict[str, Any], text: str, known: set[str]) -> bool:
    """
    Tell whether a URL is ours to write as a whole.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    text
        The URL.
    known
        Passwords that the file has for the role: who holds one of them is ours under any name.

    Returns True or False.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.ours "$WANTED" 'postgresql://...' "$KNOWN"
    """
    parts = _formed(want, text)
    if not parts:
        return False
    return _of_the_role(want, parts) or unquote(parts["password"]) in known


def renewed(want: dict[str, Any], text: str, password: str, known: set[str]) -> str | None:
    """
    Give a URL another password.

    want, text, known
        As for ``ours``.
    password
        The password it is to have.

    Returns the URL: a new one where it is ours, the same with another password where it is the
    operator's for our role on this server; None where it is for something else.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    if ours(want, text, known):
        return whole(want, password)
    parts = _followed(want, text)
    if not parts:
        return None
    if unquote(parts["password"]) == password:
        return text
    begin, end = parts.span("password")
    return f"{text[:begin]}{quote(password, safe='')}{text[end:]}"


def password_of(want: dict[str, Any], text: str) -> str | None:
    """
    Read the password of our role from a URL.

    want, text
        As for ``ours``.

    Returns the password; None if the URL is another role's, or for another server.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.password_of "$WANTED" 'postgresql://...'
    """
    parts = _formed(want, text)
    if not parts or not _of_the_role(want, parts):
        parts = _followed(want, text)
    return unquote(parts["password"]) if parts else None


def _passwords(text: str) -> list[str]:
    """Return what a URL has for passwords, as written."""
    parts = _URL.match(text)
    found = [parts["password"]] if parts and parts["password"] else []
    return [*found, *_IN_OPTIONS.findall(text)]


def holds(text: str, password: str) -> bool:
    """
    Tell whether a password is in a URL, percent-encoded or not.

    text
        The URL.
    password
        The password.

    Returns True or False.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    return any(password in (raw, unquote(raw)) for raw in _passwords(text))


def stale(text: str, password: str | None) -> bool:
    """
    Tell whether a URL has another password.

    text
        The URL.
    password
        The password in force; None if there is none.

    Returns True or False; False as well for one without a password.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    return any(unquote(raw) != password for raw in _passwords(text))


def unclear(text: str) -> bool:
    """
    Tell whether a URL cannot be understood: its password is not to be found, or behind its host
    there is white space.

    text
        The URL.

    Returns True or False.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.unclear 'postgresql://...'
    """
    if "://" not in text or "@" not in text:
        return False
    # A comment behind a value is part of it, and the backend would look for that database.
    return not _URL.match(text) or bool(_WHITESPACE.search(text.rpartition("@")[2]))


def elsewhere(want: dict[str, Any], text: str) -> str | None:
    """
    Say that a URL leads to another database of this server, or to no PostgreSQL.

    want, text
        As for ``ours``.

    Returns a few words; None if it does not, if it is for another host or port, where a pooler may
    lead to this database, or if that cannot be told.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.elsewhere "$WANTED" 'sqlite:///x.db'
    """
    driver = _DRIVER.match(text)
    if driver and not _POSTGRESQL.match(driver[1]):
        return f"is for {driver[1]}, not PostgreSQL"
    parts = _URL.match(text) or _NOBODY.match(text)
    if not driver or not parts or text.count("@") > 1 or _ELSEWHERE.search(parts["options"]):
        return None
    host, port = _place(parts)
    here = host in (*_LOOPBACK, "") and port == want["port"]
    name = unquote(parts["database"] or parts["user"])
    known = name.isprintable() and not _WHITESPACE.search(f"{name}{parts['options']}")
    if not here or not known or name in ("", want["database"]):
        return None
    return f"is for database {name}, not {want['database']}"


def apart(want: dict[str, Any], text: str) -> str:
    """
    Say what makes a URL the operator's own.

    want, text
        As for ``ours``.

    Returns a few words. A URL with a second ``@`` is not quoted: what looks like its host may be
    the rest of a password.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.apart "$WANTED" 'postgresql://...'
    """
    parts = _URL.match(text)
    if not parts or text.count("@") > 1:
        return "of another form"
    if parts["options"]:
        return "with options"
    host, port = _place(parts)
    if host not in _LOOPBACK:
        return f"host {host}, not localhost" if host else "several hosts, not localhost"
    if port != want["port"]:
        return f"port {port}, not {want['port']}"
    return "another driver, user or database"


def known(want: dict[str, Any], values: dict[str, str]) -> set[str]:
    """
    Gather every password that a file has under the keys of a role.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    values
        What the file holds.

    Returns a set, for use inside the process.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.known "$WANTED" "$VALUES"
    """
    names = (want["key"], f"{want['key']}_NEXT", f"{want['key']}_PREVIOUS")
    return {values[name] for name in names if name in values}


def stale_urls(want: dict[str, Any], store: Any) -> list[str]:
    """
    Name the URL keys whose password is not the one of the file's key.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    store
        An open ``Store``.

    Returns a list of names, those that the operator wrote for another host, driver or option
    included.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.stale_urls "$WANTED" "$STORE"
    """
    values = store.values()
    password = values.get(want["key"])
    return [name for name in want["url_keys"] if stale(values.get(name, ""), password)]


def unclear_urls(want: dict[str, Any], store: Any) -> list[str]:
    """
    Name the URL keys whose password cannot be compared.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    store
        An open ``Store``.

    Returns a list of names.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.unclear_urls "$WANTED" "$STORE"
    """
    values = store.values()
    return [name for name in want["url_keys"] if unclear(values.get(name, ""))]


def elsewhere_urls(want: dict[str, Any], store: Any) -> dict[str, str]:
    """
    Name the URL keys that lead the backend to another database, and that a run leaves so.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    store
        An open ``Store``.

    Returns what ``elsewhere`` says, by their names.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_url.elsewhere_urls "$WANTED" "$STORE"
    """
    values = store.values()
    passwords = known(want, values)
    texts = {name: values[name] for name in want["url_keys"] if name in values}
    said = {
        name: elsewhere(want, text)
        for name, text in texts.items()
        if not ours(want, text, passwords)
    }
    return {name: words for name, words in said.items() if words}


def renewed_urls(want: dict[str, Any], store: Any, password: str) -> dict[str, str]:
    """
    Write the URLs that follow the password.

    want
        What ``slmdb_secret_plan.wanted`` returns.
    store
        An open ``Store``.
    password
        The password that they are to have.

    Returns the URLs by their keys: ours, and those of the operator for our role on this server.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    values = store.values()
    passwords = known(want, values)
    urls = ((name, values[name]) for name in want["url_keys"] if name in values)
    texts = {name: renewed(want, text, password, passwords) for name, text in urls}
    return {name: text for name, text in texts.items() if text is not None}
