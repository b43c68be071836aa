"""
What the formula is told: pillar over the distribution's map over the defaults.

States and reports read every setting here, so that the pillar is merged in one place and checked
as a whole before any of it is used. A report on a host that has no pillar of ours reads what the
last apply recorded.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from typing import Any

import salt.utils.dictupdate
import yaml
from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_pillar"

TOP = "slm_database"
RECORD = "/var/lib/autobot-slm-database/settings.json"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FILES = ("salt://slm_database/defaults.yaml", "salt://slm_database/osfingermap.yaml")


def __virtual__() -> str:
    return __virtualname__


def _given() -> Any:
    return __pillar__.get(TOP)


def path_of(source: str) -> str | None:
    """
    Say where a file of the formula is. One of this host's own is found without a file client, which
    costs more than all the rest of a report.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.path_of salt://slm_database/defaults.yaml

    source
        Its ``salt://`` address.

    Returns a path; ``None`` if it cannot be reached. Raises nothing.
    """
    if __opts__.get("file_client") == "local":
        roots = __opts__["file_roots"].get(__opts__.get("saltenv") or "base") or []
        for root in roots:
            path = os.path.join(root, source.removeprefix("salt://"))
            if os.path.isfile(path):
                return path
    return __salt__["cp.cache_file"](source) or None


def _load(source: str) -> dict:
    path = path_of(source)
    if not path or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as stream:
        return yaml.load(stream, Loader=LOADER) or {}


def _merge(below: dict, above: dict) -> dict:
    return salt.utils.dictupdate.update(copy.deepcopy(below), copy.deepcopy(above))


def _said(given: dict, below: dict) -> dict:
    """What pillar says: a mapping of which all lines are comments is null, and says nothing."""
    silent = {
        key for key, value in given.items() if value is None and isinstance(below.get(key), dict)
    }
    return {key: value for key, value in given.items() if key not in silent}


def _defaults() -> dict:
    """The defaults with the distribution's map over them; empty where neither can be reached."""
    if "slmdb_defaults" not in __context__:
        made = _kept() if "slmdb_run" not in __context__ else None
        made = made or _made()
        if not made:
            return {}
        __context__["slmdb_defaults"] = made
    return __context__["slmdb_defaults"]


def _made() -> dict:
    defaults, releases = (_load(source) for source in FILES)
    if not defaults:
        return {}
    made = _merge(defaults, releases.get(str(__grains__.get("osfinger")), {}))
    if __opts__.get("file_client") != "local":
        _keep(made)
    return made


def _kept() -> dict | None:
    """
    The defaults as the master gave them last, where it has the files: a report says how the host
    stands to what it was told, and neither waits for the master nor troubles it.
    """
    if __opts__.get("file_client") == "local":
        return None
    kept = _json(_kept_path())
    fits = isinstance(kept, dict) and kept.get("modules") == _modules()
    return kept.get("defaults") if fits else None


def _modules() -> str:
    """A digest that changes with our modules: others may know other keys."""
    own = os.path.dirname(os.path.abspath(__file__))
    found = []
    with os.scandir(own) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                seen = entry.stat()
                found.append((entry.name, seen.st_size, seen.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _kept_path() -> str:
    return os.path.join(__opts__["cachedir"], "slmdb", "defaults.json")


def _keep(made: dict) -> None:
    path, kept = _kept_path(), {"modules": _modules(), "defaults": made}
    if _json(path) != kept:
        __salt__["slmdb_file.keep"](path, json.dumps(kept))


def _json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


def recorded() -> dict | None:
    """
    Return what the last apply of the whole formula was told.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.recorded

    Returns the settings of then, ``None`` if there is no record that can be read. Raises nothing.
    """
    kept = _json(RECORD)
    return kept if isinstance(kept, dict) else None


def _remembered() -> dict | None:
    """The record over the defaults, read again only when the record is another file."""
    try:
        stamp = os.stat(RECORD).st_mtime_ns
    except OSError:
        return None
    known, merged = __context__.get("slmdb_remembered", (None, None))
    if known != stamp:
        kept = recorded()
        merged = _merge(_defaults(), kept) if kept else None
        __context__["slmdb_remembered"] = (stamp, merged)
    return merged


def record() -> str:
    """
    Return the path of what the last apply of the whole formula was told.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.record
    """
    return RECORD


def begin_run() -> None:
    """
    Say that a state run has begun: from here on pillar alone decides, not the last one's record.
    A master's minion is asked to take the pillar of this run into its memory, for later reports.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.begin_run

    Returns nothing, raises nothing.
    """
    __context__["slmdb_run"] = True
    __context__.pop("slmdb_defaults", None)
    for known in ("slmdb_settings", "slmdb_major", "slmdb_given_up"):
        __context__.pop(known, None)
    __salt__["slmdb_sync.remember"]()
    if _in_a_minion() and not __opts__.get("test"):
        __salt__["saltutil.refresh_pillar"]()


def _in_a_minion() -> bool:
    """Whether this is a job of a minion that stays: ``salt-call`` fetches the pillar each time."""
    return __opts__.get("file_client") != "local" and __opts__.get("__cli") != "salt-call"


def settings() -> dict:
    """
    Return everything the formula is told, defaults included.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.settings

    Returns a dictionary of the shape of ``slm_database/defaults.yaml``. Raises
    ``CommandExecutionError`` if neither the defaults nor a record of an apply can be read.
    """
    given = _given()
    if not given and "slmdb_run" not in __context__:
        remembered = _remembered()
        if remembered:
            return remembered
    # Salt makes another object of every pillar, and a run has a context of its own: to compare the
    # content at every call would cost more than the calls.
    told, merged = __context__.get("slmdb_settings", (None, None))
    if merged is None or told is not given:
        # salt-ssh has the files of the formula in a state run only; the record holds every setting.
        below = _defaults() or ("slmdb_run" not in __context__ and recorded())
        if not below:
            raise CommandExecutionError(
                f"slm_database: {FILES[0]} cannot be read; is the formula in file_roots?"
            )
        merged = _merge(below, _said(given, below) if isinstance(given, dict) else {})
        __context__["slmdb_settings"] = (given, merged)
    return merged


def get(*keys: str) -> Any:
    """
    Return one setting.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.get secret file

    keys
        Names from the first level down, below ``slm_database``.

    Returns the value, of whatever type the key has. Raises ``CommandExecutionError`` if there is
    no such setting.
    """
    value: Any = settings()
    for key in keys:
        if not isinstance(value, dict) or not isinstance(key, str) or key not in value:
            path = ":".join(map(str, (TOP, *keys)))
            raise CommandExecutionError(f"{path}: there is no such setting")
        value = value[key]
    return value


def beyond_defaults(recorded: dict) -> dict:
    """
    Return the pillar that would give the settings of a record.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.beyond_defaults "$(cat /var/lib/autobot-slm-database/settings.json)"

    recorded
        Settings, as an apply records them.

    Returns what is in them and not in the defaults. Raises ``CommandExecutionError`` if the
    defaults cannot be read.
    """
    defaults = _defaults()
    if not defaults:
        raise CommandExecutionError(
            f"slm_database: {FILES[0]} cannot be read; is the formula in file_roots?"
        )
    found = _beyond(recorded, defaults)
    found.pop("distribution", None)  # this host's release decides
    return found


def _beyond(value: dict, default: dict) -> dict:
    found = {}
    for key, one in value.items():
        below = default.get(key)
        if isinstance(one, dict) and isinstance(below, dict) and below:
            inner = _beyond(one, below)
            if inner:
                found[key] = inner
        elif one != below:
            found[key] = one
    return found


def problems() -> list[str]:
    """
    Check the pillar as a whole.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.problems

    Returns one line per mistake, each with the key's full path; an empty list if there is none.
    Raises nothing.
    """
    given = _given()
    return [] if given is None else __salt__["slmdb_schema.problems"](given)
