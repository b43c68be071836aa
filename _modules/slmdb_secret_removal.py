"""
Taking our keys out of the secret file again, only if ``clean:secret`` says so.
"""

from __future__ import annotations

from typing import Any

from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_secret_removal"


def __virtual__() -> str:
    return __virtualname__


def kept() -> str | None:
    """
    Name what a clean keeps.

    Returns one line, or None if ``slm_database:clean:secret`` is true.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_removal.kept
    """
    if __salt__["slmdb_pillar.get"]("clean", "secret"):
        return None
    files = sorted({want["file"] for want in _targets()})
    return f"Kept (slm_database:clean:secret is false): {', '.join(files)}."


def differences() -> dict[str, dict[str, Any]]:
    """
    Say which of our keys are in the secret files, if ``slm_database:clean:secret`` gives them up.

    Returns what would go as ``{what: {"old": "present", "new": None}}``. Raises
    ``CommandExecutionError`` if a file cannot be read.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_removal.differences
    """
    changes = {}
    for want in _given_up():
        store = __salt__["slmdb_secret_file.store"](want["file"])
        for key in _ours(want, store):
            changes[f"{want['file']}: {key}"] = {"old": "present", "new": None}
    return changes


def apply() -> None:
    """
    Remove the keys that ``differences`` names, and a file that holds nothing else.

    Returns nothing. Raises ``CommandExecutionError`` if a file cannot be read or written.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_secret_removal.apply
    """
    for want in _given_up():
        store = __salt__["slmdb_secret_file.store"](want["file"])
        keys = _ours(want, store)
        if not keys:
            continue
        with store.locked():
            data = __salt__["slmdb_envfile.edit"](store.data, dict.fromkeys(keys))
            found = store.ownership()
            left = data if data.strip() else None
            store.exchange(left, found["owner"], found["group"], found["mode"])


def _targets() -> list[dict[str, Any]]:
    return [want for want in __salt__["slmdb_secret_plan.everyone"]() if want["file"]]


def _given_up() -> list[dict[str, Any]]:
    return _targets() if __salt__["slmdb_pillar.get"]("clean", "secret") else []


def _ours(want: dict[str, Any], store: Any) -> list[str]:
    key = want["key"]
    names = [key, *(f"{key}_{suffix}" for suffix in ("NEXT", "PREVIOUS", "SINCE"))]
    names += __salt__["slmdb_secret_plan.own_urls"](want, store)
    present = store.values()
    return [name for name in names if name in present]
