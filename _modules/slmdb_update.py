"""
Minor updates of PostgreSQL's packages: which there are, and how they come to be installed.
"""

from __future__ import annotations

import glob
import gzip
import os
import re
import subprocess
import tarfile
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_update"

ARCHIVES = "/var/cache/apt/archives"
JOURNAL = "/var/lib/dpkg/updates/*"
PATIENCE = 5
# dpkg's warnings are none; that dpkg failed is said of every failure.
_ERROR = re.compile(r"E: |dpkg(?:-\w+)?: (?!warning)")
_EMPTY = re.compile(r"E: Sub-process ")
ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "NEEDRESTART_SUSPEND": "1",
}


def __virtual__() -> str:
    return __virtualname__


def _run(command: list[str], **options: Any) -> dict:
    return __salt__["cmd.run_all"](
        command, python_shell=False, env=ENVIRONMENT, ignore_retcode=True, **options
    )


def _policies(text: str) -> dict[str, dict[str, Any]]:
    """What ``apt-cache policy`` says of each package."""
    found: dict[str, dict[str, Any]] = {}
    package, version = "", ""
    for line in text.splitlines():
        if re.match(r"\S.*:$", line):
            package = line[:-1].partition(":")[0]
            found[package] = {"sources": {}}
        elif match := re.match(r"  (Installed|Candidate): (.*)$", line):
            found[package][match[1].lower()] = None if match[2] == "(none)" else match[2]
        elif match := re.match(r" (?:\*\*\*|   ) (\S+) -?\d+$", line):
            version = match[1]
        elif match := re.match(r" {7,} *-?\d+ (.+)$", line):
            found[package]["sources"].setdefault(version, []).append(match[1])
    return found


def _newer(version: str, than: str) -> bool:
    compared = ["dpkg", "--compare-versions", version, "gt", than]
    return _run(compared)["retcode"] == 0


def _stays(package: str, version: str) -> bool:
    """Whether a version keeps to our major: a meta-package has it in its version, as 15+248."""
    major = __salt__["slmdb_instance.version"]()
    return f"-{major}" in package or version.partition("+")[0] == major


def available() -> list[dict[str, Any]]:
    """
    List the updates that the host's package lists have for the server's packages.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.available

    Returns rows with ``package``, ``installed``, ``candidate``, ``security`` (whether it comes
    from a security archive) and ``state``, empty if there is none; held packages are listed too. A
    meta-package that would lead to another major is not. The state is ``installed``; or it is
    ``interrupted``, and dpkg's word for it follows the version in ``installed``. Raises
    ``CommandExecutionError`` if the major cannot be told.
    """
    known = __salt__["slmdb_hold.installed"]()
    if not known:
        return []
    rows = []
    for name, found in _policies(_run(["apt-cache", "policy", *sorted(known)])["stdout"]).items():
        old, new = known[name]["version"], found.get("candidate") or ""
        newer = new and old != new and _stays(name, new) and _newer(new, old)
        half = known[name]["half_done"]
        if newer or half:
            wanted = new if newer else old
            rows.append(
                {
                    "package": name,
                    "installed": f"{old}, {half}".lstrip(", ") if half else old,
                    "candidate": wanted,
                    "security": _security(found["sources"].get(wanted, [])),
                    "state": "interrupted" if half else "installed",
                }
            )
    return rows


def _security(sources: list[str]) -> bool:
    return any("-security/" in source or "-security " in source for source in sources)


def keeping(package: str) -> str:
    """
    Return the newest version of a meta-package that leads to our major.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.keeping postgresql-contrib

    package
        Its name.

    Returns a version. Raises ``CommandExecutionError`` if the host's package lists have none.
    """
    found = _policies(_run(["apt-cache", "policy", package])["stdout"]).get(package, {})
    for version in found.get("sources", {}):  # the newest is listed first
        if _stays(package, version):
            return version
    major = __salt__["slmdb_instance.version"]()
    raise CommandExecutionError(
        f"{package}: no package source of this host has one of PostgreSQL {major}; "
        "slm_database:repository: pgdg needs none"
    )


def _from_archive(version: str) -> str:
    """The changelog of that version in a package that was downloaded already."""
    for path in glob.glob(f"{ARCHIVES}/postgresql-*_{version.replace(':', '%3a')}_*.deb"):
        command = ["dpkg-deb", "--fsys-tarfile", path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpack:
            try:
                with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
                    for member in archive:
                        if os.path.basename(member.name) == "changelog.Debian.gz":
                            stream = archive.extractfile(member)
                            text = gzip.decompress(stream.read()) if stream else b""
                            return text.decode(errors="replace")
            except (OSError, EOFError, tarfile.TarError):
                continue
            finally:
                unpack.kill()
    return ""


def heading(package: str, version: str) -> str | None:
    """
    Return the heading of a version in its changelog, if it can be had within 5 seconds.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.heading postgresql-15 15.20-0+deb12u1

    package
        A package's name.
    version
        Its version; packages of one version come from one source and have one changelog.

    Returns the heading and its first item in one line, ``None`` if neither a downloaded package
    nor the distribution's server has it. Raises nothing.
    """
    kept = __context__.setdefault("slmdb_changelogs", {})
    found = kept.get(version) or _heading(_from_archive(version), version)
    if not found and version not in kept:
        command = ["timeout", str(PATIENCE), "apt-get", "-qq", "-o", "Acquire::Retries=0"]
        answer = _run([*command, "changelog", f"{package}={version}"])
        found = _heading(answer["stdout"], version)
    kept[version] = found
    return found


def _heading(text: str, version: str) -> str | None:
    """The lines of a changelog that begin the entry of a version."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for place, line in enumerate(lines):
        if f"({version})" in line:
            item = lines[place + 1].removeprefix("* ") if len(lines) > place + 1 else ""
            return f"{line}: {item}".rstrip(": ")
    return None


def refresh() -> str | None:
    """
    Fetch the host's package lists.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.refresh

    Returns ``None``, or one line if they could not be fetched. Raises nothing.
    """
    wait = ["-o", "DPkg::Lock::Timeout=300", "-o", "APT::Update::Error-Mode=any"]
    answer = _run(["apt-get", "-q", *wait, "update"])
    return _why(answer) if answer["retcode"] else None


def why(text: str) -> str:
    """
    Say in one line why apt or dpkg failed.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.why 'E: Unable to locate package x'

    text
        What it said, errors before all else.

    Returns the first error that names something, as a package or who holds a lock; else the last
    line. Raises nothing.
    """
    lines = [line.strip(" -") for line in text.strip().splitlines()] or ["no output"]
    for place, line in enumerate(lines):
        if _ERROR.match(line) and not _EMPTY.match(line):
            more = lines[place + 1 : place + 2] if line.endswith(":") else []
            return " ".join([line, *more])
    return next((line for line in lines if _ERROR.match(line)), lines[-1])


def _why(answer: dict) -> str:
    return why(answer["stderr"] + "\n" + answer["stdout"])


def _apt(*words: str) -> str:
    options = ["-q", "-y", "--allow-change-held-packages", "--only-upgrade", "--no-remove"]
    for option in ("Dpkg::Options::=--force-confdef", "Dpkg::Options::=--force-confold"):
        options += ["-o", option]
    answer = _run(["apt-get", *options, "-o", "DPkg::Lock::Timeout=300", *words])
    if answer["retcode"]:
        raise CommandExecutionError(f"apt: {_why(answer)}")
    return answer["stdout"]


def _refuse_majors(wanted: list[str]) -> None:
    """Nothing that is new may come along for another major: its package may start a server."""
    major = __salt__["slmdb_instance.version"]()
    said = _apt("--simulate", "install", *wanted)
    coming = re.findall(r"^Inst (postgresql(?:-client)?-(\d+)) \(", said, re.MULTILINE)
    others = ", ".join(name for name, its in coming if its != major)
    if others:
        raise CommandExecutionError(
            f"apt would install {others} along with the update; this is PostgreSQL {major}"
        )


def _half_done() -> bool:
    return bool(glob.glob(JOURNAL) or _run(["dpkg", "--audit"])["stdout"].strip())


def complete() -> bool:
    """
    Let dpkg complete what an interruption left half-done.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.complete

    Returns whether there was anything; dpkg may have failed. Raises nothing.
    """
    there = _half_done()
    if there:
        _run(["dpkg", "--configure", "-a", "--force-confold"])
    return there


def _install(wanted: list[str]) -> None:
    """Install and hold again; neither failure hides the other."""
    trouble = []
    for step in (lambda: _apt("install", *wanted), __salt__["slmdb_hold.apply"]):
        try:
            step()
        except CommandExecutionError as err:
            trouble.append(str(err))
    if trouble:
        raise CommandExecutionError("; ".join(trouble))


def apply(rows: list[dict[str, Any]]) -> None:
    """
    Install updates: everything is downloaded first, nothing is removed, the holds are kept.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.apply '[{"package": "postgresql-15", "candidate": "15.20-1"}]'

    rows
        Updates as ``available`` lists them.

    What an interruption left half-done is completed first. Returns nothing. Raises
    ``CommandExecutionError`` with apt's reason if it fails, or if a version is not the wanted one
    afterwards.
    """
    wanted = [f"{row['package']}={row['candidate']}" for row in rows]
    if not wanted:
        return
    if complete() and _half_done():  # what dpkg alone cannot, apt may
        _apt("--fix-broken", "install")
    _refuse_majors(wanted)
    _apt("--download-only", "install", *wanted)
    _install(wanted)
    found = __salt__["slmdb_hold.installed"]()
    for row in rows:
        there = found.get(row["package"], {"version": None, "half_done": None})
        if there["version"] != row["candidate"] or there["half_done"]:
            state = there["half_done"] or "installed"
            raise CommandExecutionError(
                f"{row['package']}: {row['candidate']} is wanted, {there['version']} is {state}"
            )
