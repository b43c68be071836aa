"""
Make and compare what PostgreSQL stores of a password.

A SCRAM verifier (RFC 5802, RFC 7677) is computed here, on the client: the server never sees the
password. A password is compared through the salt and the iteration count that the server stores, so
that nothing has to be set to find out.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import stringprep
import time
import unicodedata
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_verifier"

_SCRAM = re.compile(
    r"SCRAM-SHA-256\$(\d+):([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+):([A-Za-z0-9+/=]+)\Z"
)
_ITERATIONS = 4096
_SETTER = "slmdb secret"
_SETTERS = "SELECT pid FROM pg_catalog.pg_stat_activity WHERE application_name = %s"
_PATIENCE = 10
# As the session begins: a transaction is sampled or not before its first statement.
_QUIET = {
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_min_duration_sample": "-1",
    "log_transaction_sample_rate": "0",
    "log_min_error_statement": "panic",
    "pg_stat_statements.track_utility": "off",
    "track_activities": "off",
}


def __virtual__() -> str:
    return __virtualname__


def _prohibited(text: str) -> bool:
    tables = (
        stringprep.in_table_a1,
        stringprep.in_table_c12,
        stringprep.in_table_c21_c22,
        stringprep.in_table_c3,
        stringprep.in_table_c4,
        stringprep.in_table_c5,
        stringprep.in_table_c6,
        stringprep.in_table_c7,
        stringprep.in_table_c8,
        stringprep.in_table_c9,
    )
    return any(table(character) for character in text for table in tables)


def _breaks_bidi(text: str) -> bool:
    right_to_left = [stringprep.in_table_d1(character) for character in text]
    if not any(right_to_left):
        return False
    mixed = any(stringprep.in_table_d2(character) for character in text)
    return mixed or not right_to_left[0] or not right_to_left[-1]


def _prepared(password: str) -> str:
    """Apply SASLprep as libpq does: a password that it does not admit is used as it is."""
    if password.isascii():
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(character) else character
        for character in password
        if not stringprep.in_table_b1(character)
    )
    text = unicodedata.normalize("NFKC", mapped)
    # libpq looks at what goes into the normalization, where the RFC means what comes out of it
    if not mapped or _prohibited(mapped) or _breaks_bidi(mapped):
        return password
    return text


def _keys(password: str, salt: bytes, iterations: int) -> tuple[bytes, bytes]:
    """Return StoredKey and ServerKey of RFC 5802."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client = hmac.digest(salted, b"Client Key", "sha256")
    return hashlib.sha256(client).digest(), hmac.digest(salted, b"Server Key", "sha256")


def make(password: str, iterations: int = _ITERATIONS) -> str:
    """
    Compute a new SCRAM-SHA-256 verifier of a password.

    password
        The password.
    iterations
        How many rounds the key derivation takes.

    Returns the text that PostgreSQL stores.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    salt = os.urandom(16)
    stored, server = (
        base64.b64encode(key).decode() for key in _keys(_prepared(password), salt, iterations)
    )
    return f"SCRAM-SHA-256${iterations}:{base64.b64encode(salt).decode()}${stored}:{server}"


def matches(password: str, verifier: str, role: str) -> bool:
    """
    Tell whether a verifier is one of a password.

    password
        The password.
    verifier
        What PostgreSQL stores, SCRAM-SHA-256 or MD5.
    role
        The role that has the verifier; MD5 uses its name.

    Returns True or False; False as well for a verifier of an unknown kind.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    if verifier.startswith("md5"):
        digest = hashlib.md5((password + role).encode(), usedforsecurity=False).hexdigest()
        return hmac.compare_digest(f"md5{digest}", verifier)
    parts = _SCRAM.match(verifier)
    if not parts:
        return False
    salt, wanted = base64.b64decode(parts[2]), base64.b64decode(parts[3])
    candidates = {password, _prepared(password)}
    return any(
        hmac.compare_digest(_keys(text, salt, int(parts[1]))[0], wanted) for text in candidates
    )


def _stored(role: str) -> list[str | None]:
    rows = __salt__["slmdb_server.query"](
        "SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = %s", (role,)
    )
    return [row["rolpassword"] for row in rows]


def kind(role: str) -> str:
    """
    Say what the server stores for a role.

    role
        The name of the role.

    Returns ``no role``, ``none``, ``scram-sha-256``, ``md5`` or ``unknown``. Raises
    ``CommandExecutionError`` if the server does not answer.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_verifier.kind autobot_slm
    """
    found = _stored(role)
    if not found:
        return "no role"
    if found[0] is None:
        return "none"
    if _SCRAM.match(found[0]):
        return "scram-sha-256"
    return "md5" if found[0].startswith("md5") else "unknown"


def in_step(role: str, password: str) -> bool:
    """
    Tell whether the server would accept a password for a role, without sending or setting it.

    role
        The name of the role.
    password
        The password.

    Returns True or False; False as well for a role that does not exist or has no password. Raises
    ``CommandExecutionError`` if the server does not answer.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    found = _stored(role)
    if not found or found[0] is None:
        return False
    # To derive the keys is slow on purpose; a run compares the same pair several times.
    known = __context__.setdefault("slmdb_compared", {})
    pair = hashlib.sha256(f"{role}\0{password}\0{found[0]}".encode()).hexdigest()
    if pair not in known:
        known[pair] = matches(password, found[0], role)
    return known[pair]


def put(role: str, password: str) -> None:
    """
    Make a password the password of a role, as a SCRAM verifier.

    role
        The name of the role.
    password
        The password; the server does not see it.

    Raises CommandExecutionError if the server refuses, without quoting the statement.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    from psycopg2 import sql

    if not _stored(role):
        raise CommandExecutionError(f"role {role} does not exist: create it before its password")
    shown = __salt__["slmdb_server.query"](
        "SELECT current_setting('scram_iterations', true) AS iterations"
    )
    verifier = make(password, int(shown[0]["iterations"] or _ITERATIONS))
    alter = sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier))
    _alone(alter)


def _alone(statement: Any) -> None:
    """Run a statement in a session that others can tell by its name, and by nothing else."""
    quiet = " ".join(f"-c {name}={value}" for name, value in _QUIET.items())
    options = f"{__salt__['slmdb_server.options']()} {quiet}"
    connection = __salt__["slmdb_server.connect"](application_name=_SETTER, options=options)
    connection.autocommit = True
    try:
        __salt__["slmdb_server.ask"](connection, statement)
    except CommandExecutionError as err:
        raise CommandExecutionError(f"the password could not be set: {err.strerror}") from None
    finally:
        connection.close()


def settle() -> None:
    """
    Wait until no session is left that sets a password: one of a killed run may still commit.

    Returns nothing. Raises ``CommandExecutionError`` if one stays.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_verifier.settle
    """
    deadline = time.monotonic() + _PATIENCE
    while __salt__["slmdb_server.query"](_SETTERS, (_SETTER,)):
        if time.monotonic() > deadline:
            raise CommandExecutionError(
                f"another session sets a password since {_PATIENCE} s: see pg_stat_activity"
            )
        time.sleep(0.02)


def login(
    role: str, password: str, database: str, host: str, port: int, timeout: int = 5
) -> bool | str:
    """
    Log in over TCP and out again.

    role, password, database
        Whose login it is, and where to.
    host, port
        Address and port of the server.
    timeout
        How long to wait, in seconds.

    Returns True, or the server's one-line refusal.

    For callers in Python: on a command line a password is seen by everybody on the host.
    """
    try:
        import psycopg2
    except ImportError:
        return "psycopg2 is missing in Salt's Python; state.apply slm_database.package installs it"

    try:
        psycopg2.connect(
            host=host,
            port=port,
            user=role,
            password=password,
            dbname=database,
            connect_timeout=timeout,
            passfile=os.devnull,
            # Whatever lets the application in counts; TLS, which costs time and memory, comes last.
            sslmode="allow",
            gssencmode="disable",
            application_name="slmdb login",
            options="",
        ).close()
    except psycopg2.Error as err:
        lines = str(err).strip().splitlines() or ["no answer"]
        # One line for each try; a server without TLS has nothing to say about the second.
        line = ([line for line in lines if "FATAL:" in line] or lines)[-1]
        return line.partition("FATAL:")[2].strip() or line.strip()
    return True
