"""What a setting may not break without an explicit key: the formula's promises and the memory."""

from __future__ import annotations

import os
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_limits"

# What a setting must not be, and why. A value of None: no value is allowed.
_PROMISES: dict[str, tuple[str | None, str]] = {
    "listen_addresses": (None, "slm_database:listen_addresses is the key for it"),
    "port": (None, "slm_database:port is the key for it"),
    "data_directory": (None, "the instance's files stay where Debian has them"),
    "config_file": (None, "the instance's files stay where Debian has them"),
    "hba_file": (None, "the access rules are written from slm_database:hba"),
    "ident_file": (None, "the user maps are written from slm_database:hba"),
    "external_pid_file": (None, "Debian's tools look for it"),
    "unix_socket_directories": (None, "root and the backend look for the socket there"),
    "unix_socket_permissions": (None, "the backend's user must reach the socket"),
    "unix_socket_group": (None, "the backend's user must reach the socket"),
    "password_encryption": ("md5", "passwords are kept as SCRAM-SHA-256 verifiers"),
    "fsync": ("off", "a crash of the host would destroy the database"),
    "full_page_writes": ("off", "a crash of the host would destroy the database"),
    "zero_damaged_pages": ("on", "it destroys data"),
    "ignore_system_indexes": ("on", "it is for repairs"),
    "ignore_checksum_failure": ("on", "it hides damage"),
    "allow_system_table_mods": ("on", "it is for repairs"),
    "restart_after_crash": ("off", "a crashed session would take the server down"),
    "autovacuum": ("off", "the transaction ids would run out"),
    "track_counts": ("off", "autovacuum needs it"),
    "krb_server_keyfile": (None, "no access rule of the formula uses it"),
}
# The same of what backups need, while there are any.
_ARCHIVING: dict[str, tuple[str | None, str]] = {
    "wal_level": ("minimal", "it cannot be archived"),
    "archive_mode": ("off", "no WAL would be archived"),
    "archive_command": (None, "WAL would be archived elsewhere"),
    "archive_library": (None, "WAL would be archived elsewhere"),
}
# What the server itself refuses for our file, and what others may have written all the same.
_ELSEWHERE: dict[str, tuple[str | None, str]] = {
    "default_transaction_read_only": ("on", "the application may not write"),
}
HUGE_PAGES = "/sys/kernel/mm/hugepages"
_PAGES = ("free_hugepages", "resv_hugepages")
_FILES = ("ssl_cert_file", "ssl_key_file", "ssl_ca_file", "ssl_crl_file", "ssl_dh_params_file")
# What a server finds in its data directory when it starts, and would not start without room for.
_KEPT = """
SELECT (SELECT count(*) FROM pg_prepared_xacts) AS prepared, count(*) AS slots,
       count(*) FILTER (WHERE slot_type = 'logical') AS logical
  FROM pg_replication_slots WHERE NOT temporary
"""
_DROP = "drop what is too much first, or the server would not start again"
# What a session takes besides work_mem, roughly; and what sessions may take, all together.
_SESSION = 2 * 1024**2
_ABSURD = 4


def __virtual__() -> str:
    return __virtualname__


def promises(settings: dict[str, Any], allowed: list[str], data_directory: str) -> list[str]:
    """
    Return one line for each of the operator's settings that breaks a promise of the formula.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_limits.promises '{"fsync": false}' '[]' /var/lib/postgresql/15/main

    settings
        ``slm_database:settings``: name to value.

    allowed
        ``slm_database:allow_unsafe``: names that may break one.

    data_directory
        Where a relative path of a certificate begins.
    """
    found = []
    permitted = {name.lower() for name in allowed}
    for name, value in sorted(settings.items()):
        if name.lower() in permitted:
            continue
        text = __salt__["slmdb_conf.text"](value)
        unarchived = _unarchived(name.lower(), text)
        if unarchived:
            found.append(
                f"slm_database:settings:{name}: {unarchived}; "
                "remove it, or set slm_database:backup:enabled: false"
            )
            continue
        reason = _broken(name.lower(), text, data_directory)
        if reason:
            found.append(
                f"slm_database:settings:{name}: {reason}; "
                f"remove it, or add {name} to slm_database:allow_unsafe"
            )
    return found


def _unarchived(name: str, value: str) -> str | None:
    """Why backups cannot be with a setting."""
    forbidden, reason = _ARCHIVING.get(name, ("", ""))
    if not reason or not __salt__["slmdb_pillar.get"]("backup", "enabled"):
        return None
    if forbidden is not None and not _is(value, forbidden):
        return None
    shown = f"{forbidden} would end the backups" if forbidden else "it would end the backups"
    return f"{shown}: {reason}"


def danger(name: str, value: str) -> str | None:
    """
    Return why a setting that somebody wrote beside the formula is not safe, or None if it is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_limits.danger fsync off

    name
        Name of the setting, in lower case.

    value
        Its value, as the server reads it from a file.

    What ``slm_database:allow_unsafe`` names is the operator's own choice.
    """
    if name in [one.lower() for one in __salt__["slmdb_pillar.get"]("allow_unsafe")]:
        return None
    forbidden, reason = {**_PROMISES, **_ELSEWHERE}.get(name, (None, ""))
    if forbidden is not None and _is(value, forbidden):
        return reason
    return _unarchived(name, value)


def _is(value: str, forbidden: str) -> bool:
    vartype = "bool" if forbidden in ("on", "off") else "enum"
    return __salt__["slmdb_conf.normal"](value, vartype) == forbidden


def _broken(name: str, value: str, data_directory: str) -> str | None:
    if name in _FILES and value:
        path = os.path.join(data_directory, value)
        return None if os.path.isfile(path) else f"there is no file {path}"
    if name.startswith("include"):
        return "files are included by Debian's postgresql.conf alone"
    if name == "synchronous_standby_names" and value.strip():
        return "there is no standby: every commit would wait for one"
    forbidden, reason = _PROMISES.get(name, ("", ""))
    if forbidden is None:
        return reason
    if reason and _is(value, forbidden):
        return f"{forbidden} is not safe: {reason}"
    return None


def memory(loaded: dict[str, dict[str, Any]], bytes_there: int) -> dict[str, str]:
    """
    Return what a host's memory cannot hold, by the name of the setting to lower.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_limits.memory '{}' 8589934592

    loaded
        Rows of ``pg_settings`` by name, from a server that has read the wanted configuration.

    bytes_there
        The host's memory.
    """
    if "shared_buffers" not in loaded:
        return {}
    found = {}
    number = {name: int(row["setting"]) for name, row in loaded.items() if name in _COUNTED}
    buffers = number["shared_buffers"] * 8192
    shared = number.get("shared_memory_size", 0) * 1024**2 or buffers
    if shared > bytes_there * 0.9:
        name = "shared_buffers" if buffers > shared / 2 else "max_connections"
        found[name] = f"the server would take {_mb(shared)} of the host's {_mb(bytes_there)} memory"
    sessions = number["max_connections"] * (number["work_mem"] * 1024 + _SESSION)
    if sessions > _ABSURD * bytes_there:
        # The one that is further from what is usual.
        many = number["max_connections"] / 100 >= number["work_mem"] / (64 * 1024)
        found["max_connections" if many else "work_mem"] = (
            f"{number['max_connections']} sessions with work_mem of {number['work_mem']}kB would "
            f"take {_mb(sessions)}, the host has {_mb(bytes_there)}"
        )
    return found


_COUNTED = ("shared_buffers", "shared_memory_size", "max_connections", "work_mem")


def kept(loaded: dict[str, dict[str, Any]]) -> dict[str, str]:
    """
    Return why the running server could not start with what it keeps, by the setting's name.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_limits.kept '{}'

    loaded
        Rows of ``pg_settings`` by name, from a server that has read the wanted configuration.

    Prepared transactions and replication slots outlive a restart. Empty if no server runs. Raises
    ``CommandExecutionError`` if it cannot be asked.
    """
    if not loaded or not __salt__["slmdb_server.available"]():
        return {}
    value = {name: row["setting"] for name, row in loaded.items()}
    (there,) = __salt__["slmdb_server.query"](_KEPT)
    found = {}
    if there["prepared"] > int(value["max_prepared_transactions"]):
        found["max_prepared_transactions"] = (
            f"prepared transactions that are open: {there['prepared']}; end them first, "
            "or the server would not start again"
        )
    if there["slots"] > int(value["max_replication_slots"]):
        found["max_replication_slots"] = f"replication slots there are: {there['slots']}; {_DROP}"
    which = {"minimal": "slots", "replica": "logical"}.get(value["wal_level"])
    if which and there[which]:
        what = "replication" if which == "slots" else "logical replication"
        found["wal_level"] = f"{what} slots there are: {there[which]}; {_DROP}"
    return found


def _mb(size: int | float) -> str:
    return f"{round(size / 1024**2)}MB"


def huge_pages(loaded: dict[str, dict[str, Any]], wanted: str) -> str | None:
    """
    Return why the kernel's huge pages do not suffice, or None if they do or are not asked for.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_limits.huge_pages '{}' on

    loaded
        Rows of ``pg_settings`` by name, from a server that has read the wanted configuration.

    wanted
        The wanted value of ``huge_pages``.

    Those that the running server holds count: it gives them back when it restarts.
    """
    row = loaded.get("shared_memory_size_in_huge_pages")
    if row is None or __salt__["slmdb_conf.normal"](wanted, "bool") != "on":
        return None
    size = int(loaded["huge_page_size"]["setting"]) or _usual_huge_page()
    needed, there = int(row["setting"]), _free_huge_pages(size) + held_huge_pages(size)
    if 0 <= needed <= there:
        return None
    return f"{needed} huge pages of {size}kB are needed, the kernel has {there} (vm.nr_hugepages)"


def held_huge_pages(size: int) -> int:
    """
    Return the huge pages that the running server holds, and gives back when it restarts.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_limits.held_huge_pages 2048

    size
        Their size in kB; a server that holds others holds none of these.
    """
    if not __salt__["slmdb_server.available"]():
        return 0
    rows = __salt__["slmdb_server.query"](
        "SELECT p.setting::int AS pages, s.setting::int AS size "
        "FROM pg_settings p, pg_settings s "
        "WHERE p.name = 'shared_memory_size_in_huge_pages' AND s.name = 'huge_page_size' "
        "AND coalesce(current_setting('huge_pages_status', true), current_setting('huge_pages')) "
        "= 'on'"
    )
    held = [row["pages"] for row in rows if (row["size"] or _usual_huge_page()) == size]
    return max(held[0], 0) if held else 0


def _usual_huge_page() -> int:
    """The kernel's default size of a huge page in kB; 0 if it has none."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        values = dict(line.split(":", 1) for line in stream if ":" in line)
    return int(values.get("Hugepagesize", "0").split()[0])


def _free_huge_pages(size: int) -> int:
    """Pages of a size in kB that nobody has, nor was promised; of a size that is unknown none."""
    try:
        free, promised = (_number(f"{HUGE_PAGES}/hugepages-{size}kB/{name}") for name in _PAGES)
    except FileNotFoundError:
        return 0
    return max(free - promised, 0)


def _number(path: str) -> int:
    with open(path, encoding="ascii") as stream:
        return int(stream.read())
