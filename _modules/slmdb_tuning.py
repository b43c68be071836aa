"""Settings that fit the host, each with its reason: a pure calculation, and what it reads."""

from __future__ import annotations

import os
import re
from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_tuning"

MB = 1024**2
GB = 1024**3
# Of the host's memory: for shared_buffers, for the server altogether (cache included).
_SHARES = {"colocated": (0.20, 0.50), "dedicated": (0.25, 0.75), "small": (0.12, 0.30)}
_DOCS = "PostgreSQL documentation, "
_RESOURCE = _DOCS + "Resource Consumption"
_WAL = _DOCS + "Write Ahead Log"
_PLANNER = _DOCS + "Query Planning"
_VACUUM = _DOCS + "Automatic Vacuuming"
_LOGGING = _DOCS + "Error Reporting and Logging"


def __virtual__() -> str:
    return __virtualname__


def host(data_directory: str, remembered: int | None = None) -> dict[str, Any]:
    """
    Return what the settings depend on: memory (bytes), cores, storage and disk (bytes); and the
    memory that there really is.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_tuning.host /var/lib/postgresql/15/main

    data_directory
        Where the data is or will be.

    remembered
        The memory, in MB, that the present configuration was made for: kept if the host's is within
        a tenth of it, so that a host whose memory varies a little keeps its settings.
    """
    given = __salt__["slmdb_pillar.get"]("tuning", "memory")
    real = _memory()
    memory = _size(given) if given else real
    if not given and remembered and abs(memory - remembered * MB) <= 0.1 * remembered * MB:
        memory = remembered * MB
    path = data_directory
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    disk = os.statvfs(path)
    return {
        "memory": memory // MB * MB,
        "real": real,
        "cores": len(os.sched_getaffinity(0)),
        "rotational": _rotational(path),
        "disk": disk.f_blocks * disk.f_frsize,
    }


def _size(words: str) -> int:
    match = re.fullmatch(r"(\d+) ?(kB|MB|GB|TB)", words)
    if not match:
        return 0
    return int(match[1]) * 1024 ** (1 + ("kB", "MB", "GB", "TB").index(match[2]))


def _memory() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as stream:
            return min(memory, int(stream.read()))
    except (OSError, ValueError):
        return memory


def _rotational(path: str) -> bool:
    """Tell whether the kernel calls the disk a rotating one; where it cannot say, it is not."""
    device = os.stat(path).st_dev
    base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for place in (f"{base}/queue/rotational", f"{base}/../queue/rotational"):
        try:
            with open(place, encoding="ascii") as stream:
                return stream.read().strip() == "1"
        except OSError:
            continue
    return False


def recommend(
    profile: str, facts: dict[str, Any], major: int, connections: int = 100
) -> dict[str, dict[str, str]]:
    """
    Return settings for a host: name to ``value``, ``why`` (one line) and ``source``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_tuning.recommend small '{memory: 1, disk: 1, cores: 1, rotational: no}' 15

    profile
        colocated, dedicated, small, or off (nothing).

    facts
        memory and disk in bytes, cores, and whether the storage is rotational.

    major
        The server's major version.

    connections
        ``max_connections``, which bounds ``work_mem``.
    """
    if profile == "off":
        return {}
    rows = [
        *_memory_rows(profile, facts, connections),
        *_wal_rows(profile, facts, major),
        *_planner_rows(facts),
        *_parallel_rows(facts),
        *_VACUUM_ROWS,
        *_LOG_ROWS,
    ]
    return {
        name: {"value": value, "why": why, "source": source} for name, value, why, source in rows
    }


def _clamp(value: float, low: int, high: int) -> int:
    return int(min(max(value, low), high))


def _round(size: float) -> int:
    """Round down to two binary digits and a half, so that values are few and readable."""
    step = 2 ** max(int(size).bit_length() - 4, 20)
    return max(int(size) // step * step, MB)


def _show(size: int) -> str:
    return f"{size // GB}GB" if size % GB == 0 else f"{size // MB}MB"


def _memory_rows(profile: str, facts: dict, connections: int) -> list[tuple[str, str, str, str]]:
    memory = facts["memory"]
    share, whole = _SHARES[profile]
    buffers = _clamp(_round(memory * share), 32 * MB, 256 * MB if profile == "small" else 16 * GB)
    cache = max(_round(memory * whole), buffers)
    left = (memory * whole - buffers) / (3 * max(connections, 1))
    work = _clamp(_round(left), 2 * MB if profile == "small" else 4 * MB, 64 * MB)
    maintenance = _clamp(_round(memory / 16), 32 * MB, GB)
    return [
        (
            "shared_buffers",
            _show(buffers),
            f"{share:.0%} of the memory ({profile}): the rest caches files and runs the backend",
            _RESOURCE,
        ),
        (
            "effective_cache_size",
            _show(cache),
            f"{whole:.0%} of the memory is what the planner may expect to be cached",
            _PLANNER,
        ),
        (
            "work_mem",
            _show(work),
            f"what is left for {connections} connections, three sorts each, within bounds",
            _RESOURCE,
        ),
        (
            "maintenance_work_mem",
            _show(maintenance),
            "a sixteenth of the memory, 1GB at most: index builds and vacuum",
            _RESOURCE,
        ),
        (
            "huge_pages",
            "try",
            "used when the kernel has enough of them, else not missed",
            _RESOURCE,
        ),
    ]


def _wal_rows(profile: str, facts: dict, major: int) -> list[tuple[str, str, str, str]]:
    largest = GB if profile == "small" else 8 * GB if profile == "dedicated" else 4 * GB
    most = _clamp(_round(facts["disk"] / 10), 256 * MB, largest)
    return [
        (
            "max_wal_size",
            _show(most),
            "a tenth of the disk, within bounds: checkpoints come by time, not by volume",
            _WAL,
        ),
        ("min_wal_size", _show(max(most // 4, 80 * MB)), "files are reused, not made anew", _WAL),
        (
            "wal_compression",
            "lz4" if major >= 15 else "on",
            "page images after a checkpoint are most of the WAL",
            _WAL,
        ),
        ("checkpoint_timeout", "15min", "fewer full-page images; a crash replays more", _WAL),
        ("checkpoint_completion_target", "0.9", "a checkpoint's writes are spread out", _WAL),
    ]


def _planner_rows(facts: dict) -> list[tuple[str, str, str, str]]:
    cost, depth = ("4", "2") if facts["rotational"] else ("1.1", "200")
    kind = "rotating" if facts["rotational"] else "solid-state"
    return [
        ("random_page_cost", cost, f"what a random read costs on {kind} storage", _PLANNER),
        (
            "effective_io_concurrency",
            depth,
            f"requests that {kind} storage does at once",
            _RESOURCE,
        ),
        (
            "jit",
            "off",
            "the backend's queries are short: compiling costs more than it saves",
            _PLANNER,
        ),
    ]


def _parallel_rows(facts: dict) -> list[tuple[str, str, str, str]]:
    cores = facts["cores"]
    helpers = str(_clamp(cores // 2, 0 if cores == 1 else 1, 4))
    reason = "half of the cores at most, so that one query leaves room for others"
    return [
        ("max_parallel_workers_per_gather", helpers, reason, _RESOURCE),
        ("max_parallel_maintenance_workers", helpers, reason, _RESOURCE),
        ("max_parallel_workers", str(max(cores, 2)), "one for each core", _RESOURCE),
    ]


_VACUUM_ROWS = [
    (
        "autovacuum_vacuum_insert_scale_factor",
        "0.05",
        "trace tables only grow: frozen and made visible in small steps",
        _VACUUM,
    ),
    ("autovacuum_vacuum_scale_factor", "0.05", "small bites, often", _VACUUM),
    ("autovacuum_analyze_scale_factor", "0.02", "the planner knows of new traces", _VACUUM),
    ("autovacuum_vacuum_cost_limit", "1000", "vacuum keeps up with inserts", _VACUUM),
]
_LOG_ROWS = [
    ("log_min_duration_statement", "1s", "slow statements are named", _LOGGING),
    ("log_lock_waits", "on", "who waits for whom, after deadlock_timeout", _LOGGING),
    ("log_autovacuum_min_duration", "10s", "long vacuums are named", _LOGGING),
    ("log_temp_files", "10MB", "sorts that did not fit into work_mem are named", _LOGGING),
    ("log_checkpoints", "on", "how often and how long", _LOGGING),
    ("log_parameter_max_length", "0", "bind values may hold secrets", _LOGGING),
    ("log_parameter_max_length_on_error", "0", "bind values may hold secrets", _LOGGING),
    (
        "shared_preload_libraries",
        "pg_stat_statements",
        "which statements cost what",
        _DOCS + "pg_stat_statements",
    ),
    (
        "pg_stat_statements.track_utility",
        "off",
        "ALTER ROLE and its kind may hold secrets",
        _DOCS + "pg_stat_statements",
    ),
    ("track_io_timing", "on", "how long reads and writes take", _DOCS + "Run-time Statistics"),
]
