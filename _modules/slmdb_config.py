"""
The server's configuration: one file in ``conf.d``, which the server itself judges before it counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_config"

TUNED = "slm_database:tuning:profile"
BY_MEMORY = (
    *("effective_cache_size", "maintenance_work_mem", "max_connections", "shared_buffers"),
    "work_mem",
)
# Where a setting has its value from although it is in our file: the server took it from nowhere.
UNREAD = ("default", "override")
MEMORY = "# Made for a memory of {}MB.\n"
MODE = "0644"
RECOVERY = ("restore_command", "recovery_target")
# Of each setting the line that counts.
LAST_WORDS = """
SELECT DISTINCT ON (lower(f.name)) lower(f.name) AS name, f.setting AS value,
       f.sourcefile AS file, f.sourceline AS line, s.vartype, s.unit,
       bool_or(f.sourcefile = %s) OVER () AS read
  FROM pg_file_settings f LEFT JOIN pg_settings s ON lower(s.name) = lower(f.name)
 WHERE f.name IS NOT NULL
 ORDER BY lower(f.name), f.seqno DESC
"""


def __virtual__() -> str:
    return __virtualname__


def _facts() -> dict[str, Any]:
    return __salt__["slmdb_instance.facts"]()


def _get(*keys: str) -> Any:
    return __salt__["slmdb_pillar.get"](*keys)


def _given() -> dict[str, Any]:
    """Return the operator's settings, names in lower case as the server has them."""
    return {name.lower(): value for name, value in (_get("settings") or {}).items()}


def _host() -> dict[str, Any]:
    found = _facts()
    match = re.search(MEMORY.replace("{}", r"(\d+)").strip(), _present(found), re.MULTILINE)
    return __salt__["slmdb_tuning.host"](found["data_directory"], int(match[1]) if match else None)


def _present(found: dict[str, Any]) -> str:
    return (__salt__["slmdb_file.read"](found["conf_file"]) or b"").decode(errors="replace")


def _tuned() -> dict[str, dict[str, str]]:
    try:
        connections = int(_given().get("max_connections", 100))
    except (TypeError, ValueError):
        connections = 100
    profile = _get("tuning", "profile")
    return __salt__["slmdb_tuning.recommend"](
        profile, _host(), int(_facts()["version"]), connections
    )


def _own() -> dict[str, Any]:
    return {
        "port": _get("port"),
        "listen_addresses": _get("listen_addresses"),
        "password_encryption": "scram-sha-256",
        **__salt__["slmdb_pgbackrest.settings"](),
    }


def wanted() -> dict[str, str]:
    """
    Return the settings that our file has or will have: the formula's, the tuned, the operator's.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.wanted

    Returns name to value, the operator's above the tuned. Raises SaltInvocationError for a value
    that no line can hold.
    """
    tuned = {name: row["value"] for name, row in _tuned().items()}
    text = __salt__["slmdb_conf.text"]
    return {name: text(value) for name, value in {**tuned, **_own(), **_given()}.items()}


def explain() -> dict[str, dict[str, str]]:
    """
    Return each setting of our file with its value, one line of reason, and where that comes from.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.explain
    """
    tuned, given, own = _tuned(), _given(), _own()
    found = {}
    for name, value in wanted().items():
        if name in given:
            why, source = "the operator's choice", f"slm_database:settings:{name}"
        elif name in tuned:
            why, source = tuned[name]["why"], tuned[name]["source"]
        else:
            why, source = "what the deployment is specified to have", _key(name)
        found[name] = {"value": value, "why": why, "source": source}
        if name in given and name in tuned:
            found[name]["why"] += f" (the profile would say {tuned[name]['value']})"
        elif name in own and name not in given and name == "password_encryption":
            found[name]["source"] = "PostgreSQL documentation, Password Authentication"
    return found


def _key(name: str) -> str:
    """Return the pillar path that a setting comes from."""
    if name in _given():
        return f"slm_database:settings:{name}"
    if name in __salt__["slmdb_pgbackrest.settings"]():
        return "slm_database:backup"
    if name in ("port", "listen_addresses"):
        return f"slm_database:{name}"
    by_memory = name in BY_MEMORY and _get("tuning", "memory")
    return "slm_database:tuning:memory" if by_memory else TUNED


def content() -> str:
    """
    Return the text that our file should have.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.content
    """
    text = __salt__["slmdb_conf.render"](wanted())
    if _get("tuning", "profile") != "off" and not _get("tuning", "memory"):
        text += MEMORY.format(_host()["memory"] // 1024**2)
    return text


def problems() -> list[str]:
    """
    Return what speaks against the wanted configuration, one line each, asking a scratch instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.problems

    Returns an empty list if nothing does. Nothing on the host is changed. Raises
    CommandExecutionError if a scratch instance cannot be made.
    """
    found = _facts()
    lines = __salt__["slmdb_limits.promises"](
        _given(), _get("allow_unsafe"), found["data_directory"]
    )
    busy = __salt__["slmdb_instance.port_problem"]()
    if busy:
        lines.append(busy)
    lines += __salt__["slmdb_instance.address_problems"]()
    if lines:
        return lines
    answer = __salt__["slmdb_rehearsal.with_rules"](content())
    if not answer:
        return []
    # A rule can be wrong for the configuration's sake: hostssl without ssl.
    return _objections(answer) or __salt__["slmdb_access.errors_of"](answer)


def _objections(answer: dict[str, Any]) -> list[str]:
    if answer["objections"]:
        return [f"{_blame(words)}: {words}; correct it or remove it" for words in _named(answer)]
    loaded, allowed = answer["settings"], [name.lower() for name in _get("allow_unsafe")]
    lines = [
        f"slm_database:settings:{name}: the server takes it from no file, a session sets it for "
        "itself; remove it"
        for name in sorted(set(_given()) & set(loaded))
        if loaded[name]["context"] != "postmaster" and loaded[name]["source"] in UNREAD
    ]
    for name in sorted(set(_given()) - set(loaded) - set(allowed)):
        lines.append(
            f"slm_database:settings:{name}: the server knows no such setting"
            f"{_advice(name, list(loaded))}; if it is your own, "
            f"add {name} to slm_database:allow_unsafe"
        )
    host = _host()
    # A memory in pillar may be less than there is; it does not make more.
    too_much = __salt__["slmdb_limits.memory"](loaded, min(host["memory"], host["real"]))
    pages = __salt__["slmdb_limits.huge_pages"](loaded, wanted().get("huge_pages", "try"))
    if pages:
        too_much["huge_pages"] = pages
    for name, words in too_much.items():
        if name not in allowed:
            lines.append(f"{_key(name)}: {words}; lower {name} or add it to allow_unsafe")
    kept = __salt__["slmdb_limits.kept"](loaded)
    # Also where it was taken out of pillar: there it is missed.
    return lines + [f"slm_database:settings:{name}: {words}" for name, words in kept.items()]


def _named(answer: dict[str, Any]) -> list[str]:
    """Return the server's objections, with the nearest known name where a name is unknown."""
    found = []
    for words in answer["objections"]:
        match = re.search(r'unrecognized configuration parameter "([^"]+)"', words)
        found.append(words + (_advice(match[1], _known_names()) if match else ""))
    return found


def _advice(name: str, known: list[str]) -> str:
    near = __salt__["slmdb_conf.nearest"](name, known)
    return f"; did you mean {near}?" if near else ""


def _known_names() -> list[str]:
    """Return the names of ``pg_settings``, from the running server, else from a scratch one."""
    if __salt__["slmdb_server.available"]():
        rows = __salt__["slmdb_server.query"]("SELECT name FROM pg_settings")
        return [row["name"] for row in rows]
    answer = __salt__["slmdb_rehearsal.check"]("")
    return list(answer["settings"]) if answer else []


def _blame(words: str) -> str:
    """Return the pillar path, or the file, of the setting that the server's words are about."""
    settings = wanted()
    quoted = re.findall(r'"([^"]+)"', words)
    for name in [*quoted, *re.findall(r"[A-Za-z_]+(?:\.[a-z_]+)?", words)]:
        if name.lower() in settings:
            return _key(name.lower())
    for name in _given():
        if any(name in word or word in str(settings[name]) for word in quoted):
            return _key(name)
    place = culprit(words)
    if place:
        return place
    if "shared memory" in words:
        return _key("shared_buffers")
    if "ssl" in _given() and re.search("certificate|private key", words):
        return _key("ssl")
    return "slm_database:settings"


def culprit(words: str) -> str | None:
    """
    Return where somebody else wrote what a server's words are about, or None if nobody did.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.culprit 'could not access file "nosuch"'

    words
        What the server said when it did not start.
    """
    quoted, named = re.findall(r'"([^"]+)"', words), re.findall(r"[a-z_]+(?:\.[a-z_]+)?", words)
    # A value that cannot be is refused wherever it stands, also where a later line overrides it.
    lines = [row for row in _written() if row["name"] in quoted and row["value"] in quoted]
    for row in [*lines, *foreign()]:
        if row["name"] in named or any(word in row["value"] for word in quoted):
            return f"{row['file']}, line {row['line']}"
    return None


def _loaded() -> dict[str, dict[str, Any]]:
    """Return ``pg_settings`` by name, ``shown`` being the value as people write it."""
    if not __salt__["slmdb_server.available"]():
        return {}
    rows = __salt__["slmdb_server.query"](
        "SELECT name, setting, unit, vartype, context, source, sourcefile, pending_restart, "
        "current_setting(name, true) AS shown FROM pg_settings"
    )
    return {row["name"].lower(): row for row in rows}  # TimeZone, DateStyle


def differences() -> dict[str, dict[str, Any]]:
    """
    Compare our file, and whether the server has read it, with the wanted configuration.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.differences

    Returns setting to ``old`` and ``new``; a new value that only a restart brings says so. Empty if
    nothing differs. Raises CommandExecutionError, one line for each, if something speaks against
    the wanted configuration.
    """
    found = _facts()
    text = content()
    changes = _file_differences(found, text)
    _refuse_unread()
    if changes:
        _refuse(problems())
    elif __salt__["slmdb_config_file.unread"]([found["conf_file"]]):
        changes["reload"] = {"old": "not read by the server", "new": "read"}
    return changes


def _refuse(lines: list[str]) -> None:
    if lines:
        raise CommandExecutionError("\n".join(lines))


def _refuse_unread() -> None:
    words = __salt__["slmdb_config_file.left_out"]()
    _refuse([words] if words else [])


def _file_differences(found: dict[str, Any], text: str) -> dict[str, dict[str, Any]]:
    file = __salt__["slmdb_file.differences"](
        found["conf_file"], text.encode(), found["user"], found["user"], MODE
    )
    if not file:
        return {}
    old, new = (__salt__["slmdb_conf.parse"](part) for part in (_present(found), text))
    loaded = _loaded()
    now = __salt__["slmdb_window.restart_permitted"]()
    when = ": at a restart" if now else ": waits for a restart"
    changes = {}
    for name in sorted({**old, **new}):
        if old.get(name) == new.get(name):
            continue
        shown = old.get(name) or loaded.get(name, {}).get("shown")
        wait = when if _waits(loaded.get(name), new.get(name)) else ""
        changes[name] = {"old": shown, "new": f"{new.get(name, 'the default')}{wait}"}
    rest = {key: value for key, value in file.items() if key != found["conf_file"]}
    return {**changes, **rest} or file


def _waits(row: dict[str, Any] | None, value: str | None) -> bool:
    """Tell whether a running server takes a value at a restart only."""
    if row is None or row["context"] != "postmaster":
        return False
    if value is None:
        return True
    return __salt__["slmdb_conf.normal"](value, row["vartype"], row["unit"]) != row["setting"]


def apply() -> None:
    """
    Write our file, let the server judge it, load it, and look at what is loaded.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.apply

    If the server objects, what was there comes back, and CommandExecutionError has the server's
    words and the pillar key. What only a restart brings is left waiting.
    """
    found = _facts()
    text = content()
    written = bool(_file_differences(found, text))
    if written:
        _refuse(problems())
        before = __salt__["slmdb_file.read"](found["conf_file"])
        _write(found, text.encode())
        if __salt__["slmdb_server.available"]():
            refused = _server_objections(found)
            if refused:
                _put_back(found, before)
                _refuse(refused)
    if __salt__["slmdb_server.available"]():
        __salt__["slmdb_config_file.load"]([found["conf_file"]], written)
        _refuse_unread()
        _look(found)
        __salt__["slmdb_since.remember"](pending())


def _write(found: dict[str, Any], data: bytes) -> None:
    __salt__["slmdb_file.write"](found["conf_file"], data, found["user"], found["user"], MODE)


def _put_back(found: dict[str, Any], before: bytes | None) -> None:
    if before is None:
        __salt__["slmdb_file.remove"](found["conf_file"])
    else:
        _write(found, before)


def _server_objections(found: dict[str, Any]) -> list[str]:
    """Return what the running server has against our file, which it has not loaded yet."""
    return [
        f"{_key(row['name'])}: the server says: {row['error']}"
        for row in __salt__["slmdb_config_file.errors"]()
        if row["known"] and row["file"] == found["conf_file"]
    ]


def _look(found: dict[str, Any]) -> None:
    """Raise unless each of our settings is in force, waits for a restart, or is overridden."""
    loaded, overridden = _loaded(), {row["name"] for row in foreign()}
    missing = []
    for name, value in wanted().items():
        row = loaded.get(name)
        if row is None or name in overridden or row["sourcefile"] == found["conf_file"]:
            continue
        # What only a restart brings is flagged by the server itself; a session's own values (its
        # encoding, say) are no sign of anything.
        if row["context"] == "postmaster" or row["source"] not in ("default", "configuration file"):
            continue
        if __salt__["slmdb_conf.normal"](value, row["vartype"], row["unit"]) != row["setting"]:
            missing.append(f"{_key(name)}: the server has {row['shown']} after it was reloaded")
    _refuse(missing)


def waiting() -> list[dict[str, Any]]:
    """
    Return what a restart would bring: what waits for one, and what will once our file is written.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.waiting

    Returns ``name``, ``old`` and ``new`` for each; empty if no server runs.
    """
    old, new = (__salt__["slmdb_conf.parse"](part) for part in (_present(_facts()), content()))
    rows = {row["name"]: row for row in pending()}
    coming = [name for name in sorted({**old, **new}) if old.get(name) != new.get(name)]
    loaded = _loaded() if coming else {}
    for name in coming:
        rows.pop(name, None)
        if _waits(loaded.get(name), new.get(name)):
            shown = new.get(name, "the default")
            rows[name] = {"name": name, "old": loaded[name]["shown"], "new": shown}
    return [{key: rows[name][key] for key in ("name", "old", "new")} for name in sorted(rows)]


def pending() -> list[dict[str, Any]]:
    """
    Return the settings that wait for a restart: ``name``, ``old``, ``new`` and ``since``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.pending

    Returns an empty list if none waits or no server runs; ``since`` is when it was
    seen to wait for the first time (UTC).
    """
    if not __salt__["slmdb_server.available"]():
        return []
    rows = __salt__["slmdb_server.query"](
        "SELECT s.name, current_setting(s.name) AS old, f.setting AS new, f.sourcefile AS file "
        "FROM pg_settings s LEFT JOIN (SELECT DISTINCT ON (name) name, setting, sourcefile "
        "FROM pg_file_settings ORDER BY name, seqno DESC) f USING (name) "
        # The flag stays on what is in no file any more before it was ever in force.
        "WHERE s.pending_restart AND NOT (f.setting IS NULL AND s.source = 'default' "
        "AND s.setting IS NOT DISTINCT FROM s.boot_val) ORDER BY s.name"
    )
    if rows and __salt__["slmdb_config_file.left_out"]():
        rows = [row for row in rows if row["name"] not in wanted()]  # a restart would lose them
    ours, found = _facts()["conf_file"], []
    for row in rows:
        new = row["new"] if row["new"] is not None else "the default"
        since = __salt__["slmdb_since.when"](row["name"], new, row["file"] or ours)
        found.append({"name": row["name"], "old": row["old"], "new": new, "since": since})
    return found


def foreign() -> list[dict[str, Any]]:
    """
    Return what others set: in another file of ``conf.d``, by ALTER SYSTEM, or not safely anywhere.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_config.foreign

    Returns ``name``, ``value``, ``file`` and ``line`` for each, ``ours`` (our value that it
    overrides, or None) and ``danger`` (why it is not safe, or None); empty if there is none. The
    files are read where no server can be asked. Nothing is deleted.
    """
    settings, paths, found = wanted(), _facts(), []
    if __salt__["slmdb_server.available"]():
        rows = __salt__["slmdb_server.query"](LAST_WORDS, [paths["conf_file"]])
    else:
        rows = _last_words()
    for row in rows:
        kind = row.pop("vartype") or "string", row.pop("unit")
        name = row["name"]
        # What the server does not read at all is not overridden (slmdb_config_file.left_out).
        ours = settings.get(name) if row.pop("read") else None
        normal = __salt__["slmdb_conf.normal"]
        same = ours is not None and normal(row["value"], *kind) == normal(ours, *kind)
        if same or row["file"] == paths["conf_file"]:
            continue
        danger = __salt__["slmdb_limits.danger"](name, row["value"])
        # Debian's own file sets much that is nobody's choice, and a restore leaves what it was for.
        nobodys = row["file"] == paths["config_file"] or name.startswith(RECOVERY)
        if ours is not None or danger or not nobodys:
            found.append({**row, "ours": ours, "danger": danger})
    return found


def _last_words() -> list[dict[str, Any]]:
    """LAST_WORDS without a server."""
    found = {row["name"]: row for row in _written()}
    return [{**found[name], "vartype": None, "unit": None, "read": True} for name in sorted(found)]


def _written() -> Iterator[dict[str, Any]]:
    """Every line of the configuration that sets something, in the order that the server reads."""
    for path in __salt__["slmdb_config_file.paths"]():
        text = (__salt__["slmdb_file.read"](path) or b"").decode(errors="replace")
        for number, name, value in __salt__["slmdb_conf.lines"](text):
            yield {"name": name, "value": value, "file": path, "line": number}
