"""
What the formula is told: pillar over the distribution's map over the defaults.

States and reports read every setting here, so that the pillar is merged in one place and checked
as a whole before any of it is used. A report on a host that has no pillar of ours reads what the
last apply recorded.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import salt.utils.dictupdate
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

__virtualname__ = "slmdb_pillar"

TOP = "slm_database"
RECORD = "/var/lib/autobot-slm-database/settings.json"
FILES = ("salt://slm_database/defaults.yaml", "salt://slm_database/osfingermap.yaml")


def __virtual__() -> str:
    return __virtualname__


def _given() -> Any:
    return __pillar__.get(TOP)


def _load(source: str) -> dict:
    path = __salt__["cp.cache_file"](source)
    if not path or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as stream:
        return salt.utils.yaml.safe_load(stream) or {}


def _merge(below: dict, above: dict) -> dict:
    return salt.utils.dictupdate.update(copy.deepcopy(below), copy.deepcopy(above))


def _defaults() -> dict:
    """The defaults with the distribution's map over them; empty where neither can be reached."""
    if "slmdb_defaults" not in __context__:
        defaults, releases = (_load(source) for source in FILES)
        if not defaults:
            return {}
        release = releases.get(str(__grains__.get("osfinger")), {})
        __context__["slmdb_defaults"] = _merge(defaults, release)
    return __context__["slmdb_defaults"]


def _recorded() -> dict | None:
    try:
        with open(RECORD, encoding="utf-8") as stream:
            recorded = json.load(stream)
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) else None


def _remembered() -> dict | None:
    """The record over the defaults, read again only when the record is another file."""
    try:
        stamp = os.stat(RECORD).st_mtime_ns
    except OSError:
        return None
    known, merged = __context__.get("slmdb_remembered", (None, None))
    if known != stamp:
        recorded = _recorded()
        merged = _merge(_defaults(), recorded) if recorded else None
        __context__["slmdb_remembered"] = (stamp, merged)
    return merged


def begin_run() -> None:
    """
    Say that a state run has begun: from here on pillar alone decides, not the last one's record.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.begin_run

    Returns nothing, raises nothing.
    """
    __context__["slmdb_run"] = True
    __context__.pop("slmdb_defaults", None)
    __context__.pop("slmdb_settings", None)


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
    key, merged = __context__.get("slmdb_settings", (None, None))
    if merged is None or key != repr(given):
        # salt-ssh has the files of the formula in a state run only; the record holds every setting.
        below = _defaults() or ("slmdb_run" not in __context__ and _recorded())
        if not below:
            raise CommandExecutionError(
                f"slm_database: {FILES[0]} cannot be read; is the formula in file_roots?"
            )
        merged = _merge(below, given if isinstance(given, dict) else {})
        __context__["slmdb_settings"] = (repr(given), merged)
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
        if not isinstance(value, dict) or key not in value:
            raise CommandExecutionError(f"slm_database:{':'.join(keys)}: there is no such setting")
        value = value[key]
    return value


def problems() -> list[str]:
    """
    Check the pillar as a whole.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_pillar.problems

    Returns one line per mistake, each with the key's full path; an empty list if there is none.
    Raises nothing.
    """
    return __salt__["slmdb_schema.problems"](_given())
