"""
The password of a role: made once, kept in an environment file, in step with the server.

``present`` works for any role, file and keys, also outside the formula's own settings:

.. code-block:: yaml

    The reporting role has its password:
      slmdb_secret.present:
        - role: reporting
        - file: /etc/reporting/database.env
        - key: REPORTING_PASSWORD
        - group: reporting
"""

from __future__ import annotations

from typing import Any

__virtualname__ = "slmdb_secret"


def __virtual__() -> str:
    return __virtualname__


def applicable(name: str) -> dict:
    """
    The secret files can be understood, and the password of a role that exists is known.

    name
        A sentence for the state's id; nothing depends on it.
    """
    return __states__["slmdb.ask"](name, "slmdb_secret.problem", "The secret can be applied.")


def present(name: str, **wanted: Any) -> dict:
    """
    The file holds the password of a role, and the server has its verifier.

    name
        A sentence for the state's id; nothing depends on it.
    wanted
        Any of role, file, owner, group, mode (octal text), key, url_keys (list), url_driver,
        database, port, generate_missing (list), length (characters), from_pillar (name of a pillar
        key), rotate_every (``90d``), rotate_backend (``restart``, ``reload``, ``none``); what is
        left out is as the formula's settings say. None at all: every secret of the settings.

    Example:

    .. code-block:: yaml

        The password is persisted:
          slmdb_secret.present
    """
    wanted = {key: value for key, value in wanted.items() if not key.startswith("__")}
    answer = __states__["slmdb.converge"](name, "slmdb_secret", wanted, server=True)
    changes = answer["changes"] if answer["result"] is not False else {}
    former = __salt__["slmdb_secret_backend.former"](changes) if changes else None
    return {**answer, "warnings": [former]} if former else answer


def adopted(name: str) -> dict:
    """
    A role and databases of an older install have their new names, if ``adopt`` asks for that.

    name
        A sentence for the state's id; nothing depends on it.
    """
    asked = bool(__salt__["slmdb_pillar.get"]("adopt"))
    return __states__["slmdb.converge"](name, "slmdb_secret_adoption", server=asked)


def absent(name: str) -> dict:
    """
    Our keys are gone from the secret file, if ``clean:secret`` asks for that; else they are kept
    and named.

    name
        A sentence for the state's id; nothing depends on it.
    """
    why = "slmdb_secret_removal.kept"
    return __states__["slmdb.converge"](name, "slmdb_secret_removal", why=why)


def mod_watch(name: str, sfun: str, **told: Any) -> dict:
    """
    For ``watch`` and ``listen``: the state once more.

    name
        Its name.
    sfun
        The state's function.
    told
        Its arguments.
    """
    return __states__["slmdb.again"]("slmdb_secret", sfun, name, told)
