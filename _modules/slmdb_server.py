"""
The running server, asked and told over its Unix socket as the superuser ``postgres``.

root is admitted by peer through a ``pg_ident`` map; before that map is in force the connection is
made with the effective user ``postgres``. One connection per database serves a whole run.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import select
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

try:
    import psycopg2
except ImportError:
    psycopg2 = None

__virtualname__ = "slmdb_server"

USER = "postgres"
TIMEOUT = 10
# What a refusal names in all the languages that the server speaks, and no other failure does;
# what asks for a password is libpq's and English.
_KEPT_OUT = re.compile(r"pg_hba\.conf|password|(?<![\w./])postgres(?![\w./])")
# What is set for the sessions of others must not end ours, least of all the one that corrects it;
# but nobody waits for ever behind somebody's lock.
_UNHURRIED = {
    "statement_timeout": "0",
    "lock_timeout": f"{TIMEOUT}s",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_read_only": "off",
}


def __virtual__() -> str:
    return __virtualname__


def _driver() -> Any:
    """psycopg2, which the run itself may have installed after this module was loaded."""
    global psycopg2
    if psycopg2 is None:
        try:
            import psycopg2
        except ImportError as err:
            raise CommandExecutionError(
                "psycopg2 is missing in Salt's Python; state.apply slm_database.package installs it"
            ) from err
    return psycopg2


def _line(err: Exception) -> str:
    """The server's own words, without the statement that str() of the error would quote."""
    primary = getattr(getattr(err, "diag", None), "message_primary", None)
    if primary and getattr(err, "pgcode", None) == "55P03":
        return f"{primary}: somebody has it locked; slmdb_session.blocking says who"
    if primary:
        return primary
    if isinstance(err, _driver().OperationalError) and not getattr(err, "pgcode", None):
        return (str(err).strip().splitlines() or ["no answer"])[0]
    return type(err).__name__


def options() -> str:
    """
    Return libpq's options for a session that nobody's timeouts end, and that may write.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_server.options
    """
    major = int(__salt__["slmdb_instance.facts"]()["version"])
    names = {**_UNHURRIED, **({"transaction_timeout": "0"} if major >= 17 else {})}
    return " ".join(f"-c {name}={value}" for name, value in names.items())


@contextlib.contextmanager
def _as_server_user() -> Iterator[None]:
    """Peer authentication looks at the effective user of whoever connects."""
    try:
        uid = pwd.getpwnam(USER).pw_uid
    except KeyError as err:
        raise CommandExecutionError(f"user {USER} does not exist: no server is installed") from err
    # All threads have one effective user: the next one waits, but never for a thread that a fork
    # left behind.
    turn = __context__.setdefault("slmdb_server_user", threading.Lock())
    mine = turn.acquire(timeout=TIMEOUT)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        if mine:
            turn.release()


def _as_asked() -> None:
    """libpq obeys the environment in all that it is not told, up to another server's address."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


def connect(database: str = USER, **overrides: Any) -> Any:
    """
    Open a connection of one's own to the instance as the superuser.

    For callers in Python.

    database
        Name of the database.
    overrides
        Parameters of libpq that replace ours. Another ``user`` gets what everybody is given;
        the superuser has no timeouts and may write.

    Returns a psycopg2 connection, for callers in Python. Raises ``CommandExecutionError`` if the
    server does not answer or refuses.
    """
    driver = _driver()
    _as_asked()
    found = __salt__["slmdb_instance.facts"]()
    ours = overrides.get("user", USER) == USER
    parameters = {
        "host": found["socket_directory"],
        "port": found["port"],
        "dbname": database,
        "user": USER,
        "passfile": "/nonexistent",  # libpq warns of one that is no plain file
        "application_name": "slmdb",
        "connect_timeout": TIMEOUT,
        "client_encoding": "UTF8",
        "options": options() if ours else "",
        **overrides,
    }
    try:
        return driver.connect(**parameters)
    except driver.OperationalError as first:
        # The real user: another thread may be the server's user at this moment.
        if os.getuid() != 0 or not _KEPT_OUT.search(str(first)):
            raise CommandExecutionError(_line(first)) from None
    try:
        with _as_server_user():
            return driver.connect(**parameters)
    except driver.OperationalError as err:
        raise CommandExecutionError(_line(err)) from None


def _ended(connection: Any) -> bool:
    """Whether the server closed a connection that is idle: something is there to be read then."""
    if connection.closed:
        return True
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def _kept() -> dict[str, Any]:
    """The connections of this thread of this process: no two can speak on one of them."""
    own = __context__.setdefault("slmdb_connections", threading.local())
    if getattr(own, "process", None) != os.getpid():
        own.process, own.connections = os.getpid(), {}
    return own.connections


def _connection(database: str) -> Any:
    kept = _kept()
    if database not in kept or _ended(kept[database]):
        kept[database] = connect(database)
        kept[database].autocommit = True
    return kept[database]


def _run(connection: Any, statement: Any, parameters: Sequence | None) -> list[dict]:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor] if names else []


def _any() -> str:
    """The database to ask what is the same in all: the usual one, else one that is open already."""
    kept = _kept() or {USER: None}
    return USER if USER in kept else next(iter(kept))


def query(
    statement: Any, parameters: Sequence | None = None, database: str | None = None
) -> list[dict]:
    """
    Ask the server.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_server.query "SELECT version()"

    statement
        SQL text or a ``psycopg2.sql.Composable``.
    parameters
        Values for its placeholders.
    database
        Name of the database; ``None``: any, for what is the same in all of them.

    Returns the rows, each a dictionary. Raises ``CommandExecutionError`` with the server's words.
    """
    driver = _driver()
    for last_try in (False, True):
        connection = _connection(database or _any())
        try:
            return _run(connection, statement, parameters)
        except driver.Error as err:
            # Only a server that was restarted under a connection that is kept earns a fresh try.
            if last_try or not connection.closed:
                raise CommandExecutionError(_line(err)) from None
        forget()
    return []


def ask(connection: Any, statement: Any, parameters: Sequence | None = None) -> list[dict]:
    """
    Ask a server over a connection of one's own.

    For callers in Python.

    connection
        What ``connect`` returned, for callers in Python.
    statement
        SQL text or a ``psycopg2.sql.Composable``.
    parameters
        Values for its placeholders.

    Returns the rows, each a dictionary. Raises ``CommandExecutionError`` with the server's words,
    also if it ended meanwhile.
    """
    try:
        return _run(connection, statement, parameters)
    except _driver().Error as err:
        raise CommandExecutionError(_line(err)) from None


def execute(statement: Any, parameters: Sequence | None = None, database: str = USER) -> None:
    """
    Tell the server to change something.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_server.execute "CHECKPOINT"

    statement
        SQL text or a ``psycopg2.sql.Composable``; or a list of pairs of statement and parameters,
        which then run in one transaction.
    parameters
        Values for the placeholders of a single statement.
    database
        Name of the database.

    Returns nothing. Raises ``CommandExecutionError`` with the server's words; nothing of a list
    is left then.
    """
    driver = _driver()
    try:
        connection = _connection(database)
        if not isinstance(statement, list):
            _run(connection, statement, parameters)
            return
        connection.autocommit = False
        try:
            with connection:
                for one, values in statement:
                    _run(connection, one, values)
        finally:
            if not connection.closed:
                connection.autocommit = True
    except driver.Error as err:
        raise CommandExecutionError(_line(err)) from None


def forget(database: str | None = None) -> None:
    """
    Close the connections that are kept, for instance before the server is restarted.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_server.forget

    database
        Name of the database whose connection is closed; ``None``: all of them.

    Returns nothing, raises nothing.
    """
    kept = _kept()
    for name in list(kept) if database is None else [database]:
        with contextlib.suppress(Exception):
            kept.pop(name).close()


def available() -> bool:
    """
    Tell whether the server runs and lets us in.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_server.available

    Returns a boolean. Raises nothing.
    """
    try:
        if not __salt__["slmdb_instance.facts"]()["running"]:
            return False
        query("SELECT 1")
    except CommandExecutionError:
        return False
    return True


def refused() -> str | None:
    """
    Say why a server that runs does not let us in, where its own rules are the reason.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_server.refused

    Returns the server's words, or ``None``: it lets us in, does not run or does not answer. Raises
    nothing.
    """
    try:
        if __salt__["slmdb_instance.facts"]()["running"]:
            query("SELECT 1")
    except CommandExecutionError as err:
        words = str(err)
        return words if _KEPT_OUT.search(words) else None
    return None
