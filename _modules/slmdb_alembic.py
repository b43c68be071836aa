"""
The backend's own Alembic: where it is, what its history says, and how to run it.

Alembic is always the one in the backend's virtual environment, run as the backend's user and never
as root. What it says about its history is remembered in Salt's cache until a file it came from
changes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import pwd
import shlex
import signal
import subprocess
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_alembic"

# Both run inside the backend's virtual environment. Whatever a migration prints goes to stderr, so
# that the answer stands alone on stdout.
ASK = """
import json, os, sys
answer = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
def flat(value):
    return [value] if isinstance(value, str) else sorted(value or ())
def message(r):
    return (r.doc or "").split("\\n")[0].strip()
def history(script):
    paths = [script.dir, script.versions] + list(getattr(script, "_version_locations", ()))
    revisions = {
        r.revision: {"down": flat(r.down_revision), "message": message(r),
                     "depends": flat(getattr(r, "_resolved_dependencies", None))}
        for r in script.walk_revisions()
    }
    return {"heads": sorted(script.get_heads()), "revisions": revisions,
            "order": list(revisions), "paths": sorted({os.path.abspath(p) for p in paths})}
def steps(script, target, *current):
    between = list(script.iterate_revisions(target, current, implicit_base=True))
    if target in ("head", "heads"):
        targets = script.get_heads()
    elif target.startswith("+"):
        targets = [r.revision for r in between[:1]] or current
    else:
        targets = [r.revision for r in script.get_revisions(target) if r]
    return {"steps": [{"revision": r.revision, "message": message(r)} for r in between[::-1]],
            "targets": sorted(targets)}
try:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    script = ScriptDirectory.from_config(Config(sys.argv[1]))
    given = steps(script, *sys.argv[2:]) if len(sys.argv) > 2 else history(script)
except ImportError as err:
    given = {"error": "%s" % err if err.name != "alembic" else "Alembic is not installed in it"}
except BaseException as err:
    given = {"error": "%s: %s" % (type(err).__name__, (str(err).strip() or "-").splitlines()[-1])}
json.dump(given, answer); answer.flush(); os._exit(0)
"""
# What changes the database says on its connection what it is, and does not wait for a lock for
# ever: psycopg takes that from PGOPTIONS and PGAPPNAME, asyncpg has to be told when it connects.
TELL = """
import os, sys
settings = {"application_name": os.environ["PGAPPNAME"]}
settings["lock_timeout"] = os.environ["SLMDB_LOCK_TIMEOUT"]
try:
    import asyncpg
    def telling(connect):
        def told(*args, server_settings=None, **kwargs):
            return connect(*args, server_settings={**(server_settings or {}), **settings}, **kwargs)
        return told
    asyncpg.connect = telling(asyncpg.connect)
except ImportError:
    pass
"""
NAME = "slmdb_migration"
UPGRADE = f"""{TELL}
from alembic.config import main
main(argv=sys.argv[1:], prog="alembic")
"""
INITIALIZE = f"""{TELL}
import asyncio
from services.database import db_service
asyncio.run(db_service.initialize())
"""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def __virtual__() -> str:
    return __virtualname__


def _unit() -> dict[str, list[str]]:
    """What systemd knows of the backend's unit; empty without systemd or without the unit."""
    if not __salt__["slmdb_instance.systemd"]():
        return {}
    known = __context__.get("slmdb_units") or __salt__["slmdb_service.units"]()
    return known[__salt__["slmdb_pillar.get"]("backend", "unit")]


def user() -> str:
    """
    Say as which operating-system user the backend's code is run.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.user

    Returns ``migration:user`` from pillar if it is set, else the ``User=`` of the backend's unit,
    else ``backend:user``. Raises nothing but what the settings raise.
    """
    settings = __salt__["slmdb_pillar.settings"]()
    if settings["migration"].get("user"):
        return settings["migration"]["user"]
    return _unit().get("User", [settings["backend"]["user"]])[0]


def facts() -> dict[str, Any]:
    """
    Say where the backend and its Alembic are, and what is in the way of running it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.facts

    Returns ``deployed`` (whether the backend's directory exists), ``directory``, ``ini``, ``venv``,
    ``python``, ``user`` and ``problem`` (one line, or ``None`` if Alembic can be asked). Raises
    nothing but what the settings raise.
    """
    settings = __salt__["slmdb_pillar.settings"]()
    directory = settings["backend"]["directory"]
    venv = os.path.join(directory, settings["backend"]["venv"])
    found: dict[str, Any] = {
        "deployed": os.path.isdir(directory),
        "directory": directory,
        "ini": os.path.join(directory, settings["migration"]["alembic_ini"]),
        "venv": venv,
        "python": os.path.join(venv, "bin", "python"),
        "user": settings["backend"]["user"],
    }
    if found["deployed"]:
        found["user"] = user()
    found["problem"] = _in_the_way(found)
    return found


def _in_the_way(found: dict[str, Any]) -> str | None:
    if not found["deployed"]:
        return f"The backend is not deployed: there is no {found['directory']}."
    if not os.path.isdir(found["venv"]):
        return f"The backend has no virtual environment: there is no {found['venv']}."
    if not os.path.exists(found["python"]):
        return f"The virtual environment is broken: there is no {found['python']}."
    if not os.path.isfile(found["ini"]):
        return f"The backend has no Alembic project: there is no {found['ini']}."
    try:
        pwd.getpwnam(found["user"])
    except KeyError:
        return _no_user(found["user"])
    return None


def _no_user(name: str) -> str:
    return f"The backend's user {name} does not exist on this host."


def _entry(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise CommandExecutionError(_no_user(name)) from None


def _identity(name: str) -> dict[str, Any]:
    """Popen's arguments that make a child another user, groups included."""
    if os.geteuid():
        return {}
    entry = _entry(name)
    groups = os.getgrouplist(name, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}


def _plain_environment(name: str) -> dict[str, str]:
    entry = _entry(name)
    return {
        "PATH": PATH,
        "HOME": entry.pw_dir,
        "USER": name,
        "LOGNAME": name,
        "SHELL": entry.pw_shell or "/bin/sh",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _unit_environment() -> dict[str, str]:
    """The variables systemd would give the backend: its Environment= and EnvironmentFile=."""
    settings = __salt__["slmdb_pillar.settings"]()
    unit = _unit()
    given: dict[str, str] = {}
    for line in unit.get("Environment", []):
        given.update(dict(part.partition("=")[::2] for part in shlex.split(line)))
    for value in unit.get("EnvironmentFiles", []) or [settings["secret"]["file"]]:
        path, _, flags = value.partition(" (")
        if path.removeprefix("-") == settings["secret"]["file"]:
            given.update(__salt__["slmdb_secret.variables"](path))
        else:
            optional = path.startswith("-") or "ignore_errors=yes" in flags
            given.update(_others_variables(path.removeprefix("-"), optional))
    return given


def _others_variables(pattern: str, optional: bool) -> dict[str, str]:
    """Files of others are read as systemd does: by root, whoever owns them, in order of names."""
    given: dict[str, str] = {}
    for path in sorted(glob.glob(pattern)) or [pattern]:
        try:
            with open(path, "rb") as stream:
                given.update(__salt__["slmdb_envfile.values"](stream.read()))
        except OSError as err:
            if not optional:
                raise CommandExecutionError(
                    f"{path}, an EnvironmentFile= of the backend's unit, cannot be read: "
                    f"{err.strerror}"
                ) from err
    return given


def environment() -> list[str]:
    """
    Name the variables that the backend's unit gives its code.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.environment

    Returns sorted names, no value. Raises ``CommandExecutionError`` if one of the unit's files
    cannot be read.
    """
    return sorted(_unit_environment())


def _end(process: subprocess.Popen) -> None:
    """End a child that still runs, and all it started."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(command: list[str], found: dict[str, Any], extra: dict[str, str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(
            command,
            cwd=found["directory"],
            env={**_plain_environment(found["user"]), **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **_identity(found["user"]),
        )
    except OSError as err:
        raise CommandExecutionError(
            f"{command[0]} cannot be run as {found['user']} in {found['directory']}: {err.strerror}"
        ) from err


def _mask(text: bytes, secrets: list[str]) -> str:
    shown = text.decode("utf-8", "replace")
    for secret in secrets:
        shown = shown.replace(secret, "********")
    return shown


def _run(command: list[str], timeout: float) -> dict[str, Any]:
    """Run a command of the backend's as its user, with its unit's environment."""
    found, extra = facts(), _unit_environment()
    secrets = __salt__["slmdb_secret.hidden"](extra)
    patience = f"{__salt__['slmdb_pillar.get']('migration', 'lock_timeout')}s"
    ours = {"PGAPPNAME": NAME, "SLMDB_LOCK_TIMEOUT": patience}
    process = _start(command, found, {**extra, **ours, "PGOPTIONS": f"-c lock_timeout={patience}"})
    try:
        output, errors = process.communicate(timeout=timeout)
        retcode = process.returncode
    except subprocess.TimeoutExpired:
        _end(process)
        output, errors = process.communicate()
        retcode = None
    except BaseException:
        _end(process)
        raise
    return {
        "retcode": retcode,
        "stdout": _mask(output, secrets),
        "stderr": _mask(errors, secrets),
    }


def missing_tables() -> list[str]:
    """
    Name the tables that Alembic may not run without, and that are not there.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.missing_tables

    Returns those of ``health:tables`` from pillar that the migrations' database does not have.
    Raises ``CommandExecutionError`` if it cannot be asked.
    """
    expected = list(__salt__["slmdb_pillar.get"]("health", "tables"))
    return __salt__["slmdb_health.missing_tables"](expected, __salt__["slmdb_migration.database"]())


def initialize(timeout: float) -> dict[str, Any]:
    """
    Let the backend create its tables: ``db_service.initialize()``.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.initialize 600

    timeout
        Seconds; what was started is then killed.

    Returns ``retcode`` (``None`` if it was killed for its time), ``stdout`` and ``stderr``, secrets
    masked. Raises ``SaltInvocationError`` for a timeout that is none, ``CommandExecutionError`` if
    it cannot be started.
    """
    __salt__["slmdb_kinds.refuse"]("timeout", "amount", timeout, 0.1, 86400)
    found = facts()
    given = __salt__["slmdb_pillar.get"]("migration", "initialize")
    command = shlex.split(given) if given else [found["python"], "-c", INITIALIZE]
    return _run(command, timeout)


def alembic(arguments: list[str], timeout: float) -> dict[str, Any]:
    """
    Run the backend's Alembic with its unit's environment; never before the backend made its tables.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.alembic '["current"]' 60

    arguments
        List of words, as behind ``alembic``.
    timeout
        Seconds; what was started is then killed.

    Returns ``retcode`` (``None`` if it was killed for its time), ``stdout`` and ``stderr``, secrets
    masked. Raises ``CommandExecutionError`` if it cannot be started, or if tables are missing.
    """
    found = facts()
    if found["problem"]:
        raise CommandExecutionError(found["problem"])
    missing = missing_tables() if "--sql" not in arguments else []
    if missing:
        raise CommandExecutionError(
            f"Alembic does not run before the backend's initialize(): missing {', '.join(missing)}"
        )
    given = __salt__["slmdb_pillar.get"]("migration", "alembic")
    command = shlex.split(given) if given else [found["python"], "-c", UPGRADE]
    return _run([*command, "-c", found["ini"], *arguments], timeout)


def _cache_file(found: dict[str, Any]) -> str:
    name = hashlib.sha256(f"{found['ini']}\n{found['venv']}".encode()).hexdigest()[:16]
    return os.path.join(__opts__["cachedir"], "slmdb", f"alembic-{name}.json")


def _sources(found: dict[str, Any], paths: list[str]) -> list[str]:
    files = [found["ini"], os.path.join(found["venv"], "pyvenv.cfg"), found["python"]]
    for path in paths:
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            files += [os.path.join(folder, name) for name in sorted(names)]
    return files


def _state_of(found: dict[str, Any], paths: list[str]) -> str:
    """A digest that changes with any file the history comes from."""
    return __salt__["slmdb_file.digest"](_sources(found, paths))


def _remembered(found: dict[str, Any]) -> dict[str, Any] | None:
    try:
        with open(_cache_file(found), encoding="utf-8") as stream:
            kept = json.load(stream)
        return kept if kept["state"] == _state_of(found, kept["paths"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(found: dict[str, Any], given: dict[str, Any], state: str) -> None:
    __salt__["slmdb_file.keep"](_cache_file(found), json.dumps({**given, "state": state}))


def _ask(found: dict[str, Any], words: list[str], timeout: float) -> dict[str, Any]:
    """What Alembic says in the backend's virtual environment, without a secret and a database."""
    process = _start([found["python"], "-c", ASK, found["ini"], *words], found, {})
    try:
        output, errors = process.communicate(timeout=max(timeout, 0.1))
    except subprocess.TimeoutExpired as err:
        raise CommandExecutionError(
            f"Alembic did not answer within {timeout:.1f} s; slmdb.revision waits longer"
        ) from err
    finally:
        _end(process)
    try:
        given = json.loads(output)
        reason = given.get("error")
    except (ValueError, AttributeError):
        killed = __salt__["slmdb_program.fate"](process.returncode)
        lines = errors.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        reason = f"it {killed}" if killed else lines[-1].strip()
    if reason:
        raise CommandExecutionError(
            f"Alembic cannot be asked with {found['python']}: {reason[:300]}"
        )
    return given


def steps(target: str, current: list[str], timeout: float = 30) -> dict[str, Any]:
    """
    Ask the backend's Alembic what an upgrade would do.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.steps head '[]'

    target
        As for ``alembic upgrade``.
    current
        The revisions the database has.
    timeout
        Seconds Alembic may take.

    Returns ``steps`` (in order, each with ``revision`` and ``message``) and ``targets``
    (revisions). Raises ``CommandExecutionError`` with Alembic's own line, for instance for an
    unknown target.
    """
    found = facts()
    if found["problem"]:
        raise CommandExecutionError(found["problem"])
    kept, question = _remembered(found), " ".join([target, *sorted(current)])
    given = (kept or {}).get("steps", {}).get(question)
    if given is None:
        given = _ask(found, [target, *current], timeout)
        if kept:
            kept.setdefault("steps", {})[question] = given
            _remember(found, kept, kept["state"])
    return given


def graph(timeout: float = 30) -> dict[str, Any]:
    """
    Return the history of revisions as the backend's own Alembic sees it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.graph

    timeout
        Seconds Alembic may take when it has to be asked again because a file changed.

    Returns ``heads`` (list), ``revisions`` (name to ``down``, ``depends`` and ``message``) and
    ``order`` (names, newest first). Raises ``CommandExecutionError`` with one line if there is no
    backend, no virtual environment, no Alembic, or if its history is broken.
    """
    found = facts()
    if found["problem"]:
        raise CommandExecutionError(found["problem"])
    kept = _remembered(found)
    if kept is None:
        kept = _ask(found, [], timeout)
        _remember(found, kept, _state_of(found, kept["paths"]))
    return {key: kept[key] for key in ("heads", "revisions", "order")}


def reached(revisions: dict[str, dict], current: list[str]) -> list[str]:
    """
    Say which revisions a database at the given ones has: they and all they build on.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_alembic.reached '{}' '[]'

    revisions
        As in ``graph``.
    current
        Names of the revisions the database says it has.

    Returns a sorted list of names, unknown ones left out. Raises nothing.
    """
    found: set[str] = set()
    waiting = [name for name in current if name in revisions]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [*revisions[name]["down"], *revisions[name]["depends"]]
    return sorted(found)
