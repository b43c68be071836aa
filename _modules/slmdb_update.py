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

__virtualname__ = "slmdb_update"

ARCHIVES = "/var/cache/apt/archives"
PATIENCE = 5
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

    Returns rows with ``package``, ``installed``, ``candidate`` and ``security`` (whether it comes
    from a security archive), empty if there is none; held packages are listed too. A meta-package
    that would lead to another major is not. Raises ``CommandExecutionError`` if the major cannot
    be told.
    """
    names = sorted(__salt__["slmdb_hold.installed"]())
    if not names:
        return []
    rows = []
    for name, found in _policies(_run(["apt-cache", "policy", *names])["stdout"]).items():
        old, new = found.get("installed"), found.get("candidate")
        if old and new and old != new and _stays(name, new) and _newer(new, old):
            sources = " ".join(found["sources"].get(new, []))
            security = "-security/" in sources or "-security " in sources
            row = {"package": name, "installed": old, "candidate": new, "security": security}
            rows.append(row)
    return rows


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
    return _last(answer) if answer["retcode"] else None


def _last(answer: dict) -> str:
    lines = (answer["stderr"] + "\n" + answer["stdout"]).strip().splitlines() or ["no output"]
    errors = [line for line in lines if line.startswith(("E:", "dpkg:"))]
    return (errors or lines)[-1].strip()


def _apt(*words: str) -> str:
    options = ["-q", "-y", "--allow-change-held-packages", "--only-upgrade", "--no-remove"]
    for option in ("Dpkg::Options::=--force-confdef", "Dpkg::Options::=--force-confold"):
        options += ["-o", option]
    answer = _run(["apt-get", *options, "-o", "DPkg::Lock::Timeout=300", *words])
    if answer["retcode"]:
        raise CommandExecutionError(f"apt: {_last(answer)}")
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


def apply(rows: list[dict[str, Any]]) -> None:
    """
    Install updates: everything is downloaded first, nothing is removed, the holds are kept.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_update.apply '[{"package": "postgresql-15", "candidate": "15.20-1"}]'

    rows
        Updates as ``available`` lists them.

    Returns nothing. Raises ``CommandExecutionError`` with apt's last word if it fails, or if a
    version is not the wanted one afterwards.
    """
    wanted = [f"{row['package']}={row['candidate']}" for row in rows]
    if not wanted:
        return
    if _run(["dpkg", "--audit"])["stdout"].strip():
        _run(["dpkg", "--configure", "-a", "--force-confold"])
    _refuse_majors(wanted)
    _apt("--download-only", "install", *wanted)
    try:
        _apt("install", *wanted)
    finally:
        __salt__["slmdb_hold.apply"]()
    found = __salt__["slmdb_hold.installed"]()
    for row in rows:
        if found.get(row["package"], {}).get("version") != row["candidate"]:
            raise CommandExecutionError(
                f"{row['package']}: {row['candidate']} is wanted, "
                f"{found.get(row['package'], {}).get('version')} is installed"
            )
