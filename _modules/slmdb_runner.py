"""
Our functions for timers: a copy of the modules that the last apply ran, and a command that calls
one of them with the settings that apply recorded, without master, minion, pillar or checkout.

Each copy is a directory of its own, named by its content; ``current`` leads to the newest. A job
that runs keeps the copy it began with, whatever an apply does meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import salt
import salt.version
from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_runner"

DIRECTORY = "/var/lib/autobot-slm-database/formula"
CURRENT = f"{DIRECTORY}/current"
CACHE = "/var/cache/autobot-slm-database/runner"
OWN_SALT = "/opt/autobot-slm-database/salt"
SOURCES = ("defaults.yaml", "osfingermap.yaml")

MINION = """\
# Written by the slm_database formula; changes are lost.
id: '{id}'
file_client: local
master_type: disable
file_roots: {{base: [{here}]}}
pillar_roots: {{base: [{here}/pillar]}}
cachedir: {cache}
extension_modules: {cache}/extmods
pki_dir: {cache}/pki
sock_dir: {cache}/run
pidfile: {cache}/pid
log_file: {cache}/log
log_level: warning
log_level_logfile: quiet
minion_id_caching: false
user: root
"""
# What is said is shown only if it went wrong, and then its end: it may reach the journal or a mail.
# Salt's own answer to a signal would be the status 0; where there is one already, it takes that.
LAUNCHER = """\
#!/bin/sh
# Written by the slm_database formula; changes are lost.
# Calls one function of the formula: run FUNCTION [ARGUMENT...]
umask 077
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP
export HOME=/root LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
{path}here=$(dirname "$(readlink -f "$0")")
cd / || exit 1
if [ ! -e {record} ]; then
  echo "no settings are recorded: apply slm_database as a whole first" >&2
  exit 1
fi
mkdir -p {cache} && chmod 0700 {cache} || exit 1
said=$({python} -c '
import signal, sys
from salt.scripts import salt_call
def end(number, frame):
    print("interrupted by", signal.Signals(number).name, file=sys.stderr)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
salt_call()' \\
  --local --config-dir="$here" --module-dirs="$here" --retcode-passthrough --no-color \\
  --out=yaml "$@" 2>&1 </dev/null)
status=$?
[ "$status" = 0 ] || printf '%s\\n' "$said" | tail -c 4000 >&2
exit "$status"
"""


def __virtual__() -> str:
    return __virtualname__


def command(function: str, *arguments: str) -> list[str]:
    """
    Return a command line, for root, that calls a function as the last apply left it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_runner.command slmdb.health

    function
        An execution module's function.
    arguments
        Its arguments, as salt-call takes them.

    The command ends with the function's exit status, and prints only if that is not 0. Raises
    nothing.
    """
    return ["/bin/sh", f"{CURRENT}/run", function, *arguments]


def _python() -> str:
    """The Python of this run, by the name that outlives an update of its Salt."""
    own = os.path.realpath(OWN_SALT)
    if os.path.realpath(sys.prefix) == own:
        return f"{OWN_SALT}/bin/python3"
    general = os.path.join(os.path.dirname(sys.executable), "python3")
    same = os.path.realpath(general) == os.path.realpath(sys.executable)
    return general if same else sys.executable


def _thin() -> str | None:
    """The directory of a Salt that salt-ssh brought; its Python would not find it by itself."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(salt.__file__)))
    lasting = any(home.startswith(prefix) for prefix in (sys.prefix, sys.base_prefix, OWN_SALT))
    return None if lasting else os.path.dirname(home)


def _salt_of(thin: str) -> str:
    """The place of the copy of a Salt of salt-ssh, whose own directory a host may tidy away."""
    sums = __salt__["slmdb_file.read"](os.path.join(thin, "code-checksum")) or b""
    key = hashlib.sha256(sums + thin.encode()).hexdigest()[:8]
    return f"{DIRECTORY}/salt-{salt.version.__version__}-{key}"


def _launcher() -> str:
    thin = _thin()
    path = ""
    if thin:
        kept = _salt_of(thin)
        places = [f"{kept}/{name}" for name in sorted(os.listdir(thin)) if name.startswith("py")]
        path = f"export PYTHONPATH={':'.join(places)}\n"
    record = __salt__["slmdb_pillar.record"]()
    return LAUNCHER.format(path=path, record=record, cache=CACHE, python=_python())


def _content() -> Iterator[tuple[str, bytes]]:
    """Every file of the copy, one after the other, but for the configuration."""
    own = os.path.dirname(os.path.abspath(__file__))
    names = sorted(name for name in os.listdir(own) if name.endswith(".py"))
    files = {f"_modules/{name}": os.path.join(own, name) for name in names if "slmdb" in name}
    for name in SOURCES:
        path = __salt__["slmdb_pillar.path_of"](f"salt://slm_database/{name}")
        if not path:
            raise CommandExecutionError(
                f"salt://slm_database/{name} cannot be read; is the formula in file_roots?"
            )
        files[f"slm_database/{name}"] = path
    for name, path in files.items():
        yield name, __salt__["slmdb_file.read"](path) or b""
    yield "run", _launcher().encode()


def _identity() -> str:
    return str(__grains__["id"]).replace("'", "''")


def _place(content: Iterable[tuple[str, bytes]]) -> str:
    """The directory of the copy, named by its content."""
    total = hashlib.sha256(f"{_identity()}\0{MINION}".encode())
    for name, data in content:
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return f"{DIRECTORY}/{total.hexdigest()[:16]}"


def differences() -> dict[str, Any]:
    """
    Compare the copy that timers call with the modules of this run.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_runner.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if nothing differs. Raises
    ``CommandExecutionError`` if the formula's files cannot be read.
    """
    if not __salt__["slmdb_pillar.get"]("backup", "enabled"):
        return leftovers()
    here = _place(_content())
    present = os.path.basename(os.path.realpath(CURRENT)) if os.path.exists(CURRENT) else None
    wanted = os.path.basename(here)
    return {} if present == wanted else {CURRENT: {"old": present, "new": wanted}}


def apply() -> None:
    """
    Copy the modules of this run, and let timers call the copy from now on.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_runner.apply

    Raises ``CommandExecutionError`` if the copy cannot be written.
    """
    if not __salt__["slmdb_pillar.get"]("backup", "enabled"):
        remove()
        return
    files = dict(_content())
    here = _place(files.items())
    files["minion"] = MINION.format(id=_identity(), here=here, cache=CACHE).encode()
    before = os.path.realpath(CURRENT)
    try:
        os.makedirs(DIRECTORY, mode=0o700, exist_ok=True)
        thin = _thin()
        if thin:
            _keep(thin, _salt_of(thin))
        _write(here, files)
        link = f"{DIRECTORY}/.current.{os.getpid()}"
        os.symlink(os.path.basename(here), link)
        os.replace(link, CURRENT)
        _tidy({here, before, *([_salt_of(thin)] if thin else [])})
    except OSError as err:
        raise CommandExecutionError(f"{DIRECTORY}: cannot be written: {err.strerror}") from err


def _write(here: str, files: dict[str, bytes]) -> None:
    """Make the directory whole, or not at all."""
    new = f"{here}.{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(f"{new}/pillar", mode=0o700)
    for name, data in files.items():
        __salt__["slmdb_file.write"](f"{new}/{name}", data, mode="0600")
    # What has this name is the same, or was left half by somebody else's hand.
    shutil.rmtree(here, ignore_errors=True)
    os.rename(new, here)


def _keep(thin: str, kept: str) -> None:
    if os.path.isdir(kept):
        return
    new = f"{kept}.{os.getpid()}"
    for name in sorted(os.listdir(thin)):
        if name.startswith("py") and os.path.isdir(f"{thin}/{name}"):
            shutil.copytree(f"{thin}/{name}", f"{new}/{name}", symlinks=True)
    os.rename(new, kept)


def _tidy(used: set[str]) -> None:
    """Remove all copies but the newest and the one before, which a job may be running."""
    kept = {os.path.basename(path) for path in used} | {os.path.basename(CURRENT)}
    for name in os.listdir(DIRECTORY):
        path = os.path.join(DIRECTORY, name)
        if name not in kept and not (name.startswith("salt-") and _used(name, kept)):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


def _used(salt_copy: str, kept: set[str]) -> bool:
    launchers = (__salt__["slmdb_file.read"](f"{DIRECTORY}/{name}/run") or b"" for name in kept)
    return any(f"/{salt_copy}/".encode() in text for text in launchers)


def leftovers() -> dict[str, Any]:
    """
    Name what ``apply`` left on the host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_runner.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty if there is nothing to undo. Raises nothing.
    """
    places = (DIRECTORY, CACHE)
    return {path: {"old": "present", "new": "absent"} for path in places if os.path.isdir(path)}


def remove() -> None:
    """
    Remove the copies and what was cached for them.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_runner.remove

    Raises ``CommandExecutionError`` if a directory cannot be removed.
    """
    for path in leftovers():
        try:
            shutil.rmtree(path)
        except OSError as err:
            raise CommandExecutionError(f"{path}: cannot be removed: {err.strerror}") from err
