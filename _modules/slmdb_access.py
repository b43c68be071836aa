"""
Who may log in: ``pg_hba.conf`` and ``pg_ident.conf``, judged before they count and seen to work.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pwd
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_access"

MODE = "0640"
SEEN = "/var/lib/autobot-slm-database/logins.seen"
LOOPBACK = ("127.0.0.1", "::1")
# As an access rule has it: a superuser is a member only of what he was made a member of.
GROUPS = """
WITH RECURSIVE above AS (
    SELECT m.roleid FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = %s
     UNION
    SELECT m.roleid FROM pg_auth_members m JOIN above a ON a.roleid = m.member)
SELECT r.rolname AS name FROM above a JOIN pg_roles r ON r.oid = a.roleid
"""


def __virtual__() -> str:
    return __virtualname__


def _facts() -> dict[str, Any]:
    return __salt__["slmdb_instance.facts"]()


def _settings() -> dict[str, Any]:
    return __salt__["slmdb_pillar.settings"]()


def _wanted(found: dict[str, Any]) -> dict[str, str]:
    settings = _settings()
    return {
        found["hba_file"]: __salt__["slmdb_hba.render"](settings),
        found["ident_file"]: __salt__["slmdb_hba.render_ident"](settings),
    }


def _present(path: str) -> str:
    return (__salt__["slmdb_file.read"](path) or b"").decode(errors="replace")


def differences() -> dict[str, dict[str, Any]]:
    """
    Compare the access rules, and whether the server has read them, with the wanted ones.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.differences

    Returns file to ``old`` and ``new`` (the lines that go and that come); empty if nothing differs.
    Raises CommandExecutionError, one line for each, if something speaks against the wanted rules.
    """
    found = _facts()
    changes = _file_differences(found)
    if changes:
        _refuse(problems())
    elif _unread(found):
        changes["reload"] = {"old": "not read by the server", "new": "read"}
    return changes


def _unread(found: dict[str, Any]) -> bool:
    """Whether the server has other rules than the files; the wanted ones would let us in."""
    if __salt__["slmdb_server.refused"]():
        return True
    return __salt__["slmdb_config_file.unread"](list(_wanted(found)))


def _file_differences(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {}
    for path, text in _wanted(found).items():
        file = __salt__["slmdb_file.differences"](
            path, text.encode(), found["user"], found["user"], MODE
        )
        if path in file:
            old, new = _rules(_present(path)), _rules(text)
            gone = [line for line in old if line not in new]
            come = [line for line in new if line not in old]
            if gone or come:
                file[path] = {"old": gone, "new": come}
            elif sorted(old) == sorted(new) and old != new:
                file[path]["new"] = "in another order"
        changes.update(file)
    return changes


def _rules(text: str) -> list[str]:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _refuse(lines: list[str]) -> None:
    if lines:
        raise CommandExecutionError("\n".join(lines))


def problems() -> list[str]:
    """
    Return what speaks against the wanted rules, one line each.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.problems

    A scratch instance reads the rules, and the login matrix is judged by what it read. Returns an
    empty list if nothing speaks against them. Nothing on the host is changed.
    """
    settings = _settings()
    rules = __salt__["slmdb_hba.rules"](settings)
    rehearse = __salt__["slmdb_rehearsal.with_rules"]
    answer = rehearse(__salt__["slmdb_config.content"]())
    if answer and answer["objections"]:
        # What is wrong there is said of the configuration; the rules are judged all the same.
        answer = rehearse(_present(_facts()["conf_file"]))
    maps = __salt__["slmdb_hba.maps"](__salt__["slmdb_hba.render_ident"](settings))
    if answer and not answer["objections"]:
        lines = errors_of(answer)
        if lines:
            return lines
        judged = __salt__["slmdb_hba.from_server"](answer["rules"])
        for rule, read in zip(rules, judged, strict=False):
            read["key"] = rule["key"]
        rules = judged
    return [
        f"{row['key']}: {row['login']} would be {row['judged']}, must be {row['expected']}: "
        "these rules would lock it out or let it in; change or move the rule"
        for row in judge(rules, maps)
        if not row["right"]
    ]


def errors_of(answer: dict[str, Any]) -> list[str]:
    """
    Return the errors that a scratch instance found in the wanted rules, one line each.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.errors_of '{"rules": [], "maps": []}'

    answer
        As ``slmdb_rehearsal.with_rules`` gives it.
    """
    settings = _settings()
    rules = __salt__["slmdb_hba.rules"](settings)
    return _rule_lines(answer["rules"], rules) + _map_lines(answer["maps"], settings)


def _rule_lines(rows: list[dict[str, Any]], rules: list[dict[str, Any]]) -> list[str]:
    """Return the server's errors, each with the pillar path of its rule (line 1 is a comment)."""
    lines = []
    for row in rows:
        if row["error"]:
            number = row["line_number"] - 2
            key = rules[number]["key"] if 0 <= number < len(rules) else "slm_database:hba"
            lines.append(f"{key}: the server says: {row['error']}; correct the rule")
    return lines


def _map_lines(rows: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    own = len(__salt__["slmdb_hba.mappings"](settings)) - len(settings["hba"].get("ident") or [])
    lines = []
    for row in rows:
        if row["error"]:
            number = row["line_number"] - 2 - own
            lines.append(f"slm_database:hba:ident:{number}: the server says: {row['error']}")
    return lines


def apply() -> None:
    """
    Write the access rules, let the server judge them, and load them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.apply

    If the server objects, what was there comes back, and CommandExecutionError has the server's
    words and the pillar key.
    """
    found = _facts()
    wanted = _wanted(found)
    alive = __salt__["slmdb_server.available"]()
    written = bool(_file_differences(found))
    if written:
        _refuse(problems())
        before = {path: __salt__["slmdb_file.read"](path) for path in wanted}
        # Maps first: a rule that names a map must never be read before the map is there.
        for path in reversed(wanted):
            __salt__["slmdb_original.keep"](path)
            _write(found, path, wanted[path].encode())
        refused = _errors() if alive else []
        if refused:
            for path, data in before.items():
                if data is not None:
                    _write(found, path, data)
            _refuse(refused)
    if alive or __salt__["slmdb_server.refused"]():
        __salt__["slmdb_config_file.load"](list(wanted), written)


def _write(found: dict[str, Any], path: str, data: bytes) -> None:
    __salt__["slmdb_file.write"](path, data, found["user"], found["user"], MODE)


def _errors() -> list[str]:
    settings = _settings()
    rules = __salt__["slmdb_hba.rules"](settings)
    lines = _rule_lines(_loaded_rules(), rules)
    if int(_facts()["version"]) >= 15:
        lines += _map_lines(_loaded_maps(), settings)
    return lines


def _loaded_maps() -> list[dict[str, Any]]:
    return __salt__["slmdb_server.query"]("SELECT * FROM pg_ident_file_mappings")


def _loaded_rules() -> list[dict[str, Any]]:
    return __salt__["slmdb_server.query"]("SELECT * FROM pg_hba_file_rules")


def rule_errors() -> list[str]:
    """
    Return the errors that the running server finds in the files with the access rules.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.rule_errors

    Returns one line each, with file and line; empty if there is none. Raises CommandExecutionError
    if the server does not answer.
    """
    found = _facts()
    rows = [(found["hba_file"], row) for row in _loaded_rules()]
    if int(found["version"]) >= 15:
        rows += [(found["ident_file"], row) for row in _loaded_maps()]
    return [
        # From PostgreSQL 16 on the line may be one of an included file.
        f"{row.get('file_name') or file}, line {row['line_number']}: {row['error']}"
        for file, row in rows
        if row["error"]
    ]


def shadowed() -> list[str]:
    """
    Return one line for each wanted rule that never counts because an earlier one matches first.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.shadowed
    """
    return __salt__["slmdb_hba.shadowed"](__salt__["slmdb_hba.rules"](_settings()))


def matrix() -> list[dict[str, Any]]:
    """
    Return the login matrix as the rules that the running server reads have it; nobody logs in.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.matrix

    Returns a row for each login: ``login``, ``expected`` and ``judged`` (admitted or refused),
    ``right``, and ``key`` (the line that decides). Raises CommandExecutionError if the server does
    not answer.
    """
    rules = __salt__["slmdb_hba.from_server"](_loaded_rules())
    return judge(rules, __salt__["slmdb_hba.maps"](_present(_facts()["ident_file"])))


def judge(rules: list[dict[str, Any]], maps: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """
    Return the login matrix as given rules have it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.judge '[]' '[]'

    rules
        As ``slmdb_hba.from_server`` or ``slmdb_hba.rules`` gives them.

    maps
        Map, operating-system user and role, for each line of ``pg_ident.conf``.
    """
    settings = _settings()
    database, role = settings["database"], settings["role"]
    hardened = settings["hba"]["preset"] == "hardened"
    backend = settings["hba"]["backend_user"] if hardened else None
    groups = {who: _groups(rules, who) for who in ("postgres", role)}
    row = functools.partial(_row, rules, maps, groups)
    rows = [
        row("root over the socket as postgres", "root", "postgres", "postgres"),
        row("the application over the socket", backend, database, role),
    ]
    for address in LOOPBACK:
        kinds: dict[str, Any] = {"address": address}
        name = f"the application over {address} with the password"
        rows.append(row(name, None, database, role, **kinds, password=True))
        name = f"the application over {address} with a wrong password"
        rows.append(row(name, None, database, role, **kinds, expected="refused"))
        name = f"postgres over {address}"
        rows.append(row(name, None, "postgres", "postgres", **kinds, expected="refused"))
    blamed = [row["key"] for row in rows if not row["right"]]
    open_to_all = __salt__["slmdb_hba.given_away"](rules, "postgres", groups["postgres"])
    rows += [
        {
            "login": "anybody as postgres",
            "expected": "refused",
            "judged": "admitted",
            "right": False,
            "key": rule["key"],
        }
        for rule in open_to_all
        if rule["key"] not in blamed
    ]
    unknown = {"key": "none", "login": "an unknown role", "expected": "refused"}
    # A role that does not exist is refused whatever the rules say.
    return [*rows, {**unknown, "judged": "refused", "right": True}]


def _row(
    rules: list[dict[str, Any]],
    maps: list[tuple[str, ...]],
    groups: dict[str, list[str]],
    login: str,
    user: str | None,
    database: str,
    role: str,
    address: str | None = None,
    password: bool = False,
    expected: str = "admitted",
) -> dict[str, Any]:
    kinds = ["local"] if address is None else ["host", "hostssl"]
    deciding = [
        rule
        for kind in kinds
        for rule in __salt__["slmdb_hba.possible"](
            rules, kind, database, role, address, groups[role]
        )
    ]
    answers = [_lets_in(rule, maps, user, role, password) for rule in deciding]
    wrong = [rule for rule, answer in zip(deciding, answers, strict=True) if answer != expected]
    blamed = (wrong or deciding)[0]
    return {
        "login": login,
        "expected": expected,
        "judged": answers[deciding.index(blamed)],
        "right": not wrong,
        "key": blamed["key"] if blamed else "slm_database:hba",
    }


def _groups(rules: list[dict[str, Any]], role: str) -> list[str]:
    """What a role is a member of, if any rule is about members; a new server has none."""
    about = any(name.startswith("+") for rule in rules for name in rule["user"])
    if not about or not __salt__["slmdb_server.available"]():
        return []
    return [row["name"] for row in __salt__["slmdb_server.query"](GROUPS, [role])]


def _lets_in(
    rule: dict[str, Any] | None,
    maps: list[tuple[str, ...]],
    user: str | None,
    role: str,
    password: bool,
) -> str:
    """Return whether a rule admits somebody: an account of the system, or one with a password."""
    method = rule["method"] if rule else "reject"
    if method == "trust":
        return "admitted"
    if method in ("scram-sha-256", "md5", "password"):
        return "admitted" if password else "refused"
    if rule and method == "peer" and user:
        name = rule["options"].get("map")
        if name is None:
            return "admitted" if user == role else "refused"
        return "admitted" if (name, user, role) in maps else "refused"
    return "refused"


def verify() -> list[str]:
    """
    Log in as the matrix says, and return what was wrong, one line each.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_access.verify

    The logins that must succeed are made every time. Those that must fail are made if the server,
    its rules, the role or the secret changed since they were last made, and judged from the rules
    otherwise. When all is right, the configuration is kept as the last good one.
    """
    lines = [
        f"{row['login']}: {row['judged']} by the rules, must be {row['expected']} ({row['key']})"
        for row in matrix()
        if not row["right"]
    ]
    lines += rule_errors() + _admitted()
    mark = _mark()
    if mark != _present(SEEN).strip():
        lines += _refused()
        if not lines:
            __salt__["slmdb_file.write"](SEEN, f"{mark}\n".encode())
    if not lines:
        __salt__["slmdb_lastgood.save"]()
    return lines


def _mark() -> str:
    """Return a digest that changes with the server, its rules, the role or the secret."""
    settings, found = _settings(), _facts()
    rows = __salt__["slmdb_server.query"](
        "SELECT md5(coalesce(rolpassword, '')) || rolname || rolcanlogin AS role "
        "FROM pg_authid WHERE rolname IN (%s, 'postgres') ORDER BY rolname",
        [settings["role"]],
    )
    parts = [
        str(found["pid"]),
        str(found["started"]),
        str(found["port"]),
        *(r["role"] for r in rows),
    ]
    parts += [_present(path) for path in (found["hba_file"], found["ident_file"])]
    try:
        secret = os.stat(settings["secret"]["file"])
        parts.append(f"{secret.st_ino} {secret.st_mtime_ns} {secret.st_size}")
    except OSError:
        parts.append("no secret file")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _admitted() -> list[str]:
    settings = _settings()
    lines = []
    socket = _socket_login(settings)
    if socket:
        lines.append(f"the application over the socket: refused ({socket})")
    password = __salt__["slmdb_secret.login"]()
    if password is not True:
        lines.append(f"the application over 127.0.0.1 with the password: refused ({password})")
    return lines


def _socket_login(settings: dict[str, Any]) -> str | None:
    """Log in as the application does over the socket; return why that failed."""
    login = {"user": settings["role"], "database": settings["database"]}
    if settings["hba"]["preset"] != "hardened":
        return _attempt(**login)
    try:
        account = pwd.getpwnam(settings["hba"]["backend_user"])
    except KeyError:
        # Nobody can be that user yet; the rule itself was judged.
        return None
    return _as(account, login)


def _attempt(**overrides: Any) -> str | None:
    try:
        __salt__["slmdb_server.connect"](**overrides).close()
    except CommandExecutionError as err:
        return str(err.strerror)
    return None


def _as(account: pwd.struct_passwd, login: dict[str, Any]) -> str | None:
    """Attempt a login in a child process that is another user, as peer looks at the process."""
    reader, writer = os.pipe()
    found = _facts()
    child = os.fork()
    if child == 0:
        words = "the login could not be tried"
        try:
            __context__["slmdb_facts"] = found  # what only root sees
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            words = _attempt(**login) or ""
        finally:
            os.write(writer, words.encode()[:4000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read().decode(errors="replace")
    os.waitpid(child, 0)
    return answer or None


def _refused() -> list[str]:
    import secrets  # a report never needs it

    settings = _settings()
    made_up = secrets.token_urlsafe(24)
    tcp = {"host": LOOPBACK[0], "password": made_up}
    tries = {
        "a wrong password": {"user": settings["role"], "database": settings["database"], **tcp},
        "postgres over 127.0.0.1": {"user": "postgres", **tcp},
        "an unknown role": {"user": f"nobody_{secrets.token_hex(6)}", **tcp},
    }
    return [
        f"{name}: admitted, must be refused"
        for name, login in tries.items()
        if _attempt(**login) is None
    ]
