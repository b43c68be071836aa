"""Root file systems of Debian releases: made once, kept outside the checkout."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from urllib.parse import urlparse

CACHE = Path(os.environ.get("AUTOBOT_TEST_CACHE") or "/var/cache/autobot-slm-database-tests")
PACKAGES = "systemd,systemd-sysv,dbus,ca-certificates"
NAMESERVER = "10.0.2.3"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
COPIED_AUTHORITIES = "/etc/ssl/test-machine.crt"
_APT_OPTION = re.compile(
    r'Acquire::(https?::Proxy\S*|Check-Valid-Until|Check-Date|Retries|AllowInsecure\S*) ".+";'
)


@contextlib.contextmanager
def locked(name):
    """Hold the cache's lock of this name: several runs may share one cache."""
    directory = CACHE / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(name, inputs, build):
    """Return the cached directory of these inputs; `build` makes one that is then renamed."""
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    wanted = CACHE / "images" / f"{name}-{key}"
    with locked(f"image-{name}"):
        if not wanted.exists():
            wanted.parent.mkdir(parents=True, exist_ok=True)
            scratch = wanted.with_name(f".{name}-{uuid.uuid4().hex}")
            try:
                build(scratch)
                scratch.rename(wanted)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return wanted


def bare(release):
    """Return the root of a minimal Debian: systemd, and nothing that the formula needs."""
    inputs = [release, PACKAGES, _sources(release), _apt_options(), pip_settings(), _digest()]
    return cached(release, inputs, lambda root: _bootstrap(release, root))


def pip_settings():
    """Return what pip is told on this machine, for whoever installs from inside a host."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    settings = {}
    for scope in ("global.", "user.", "site.", "install.", ":env:."):
        for line in lines:
            if line.startswith(scope):
                key, value = line.removeprefix(scope).split("=", 1)
                settings[key] = value.strip("'\"")
    wanted = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy")
    return {key: settings[key] for key in wanted if settings.get(key)}


def pip_directories():
    """Return the directories of this machine that pip's settings point to."""
    found = set()
    for key, value in pip_settings().items():
        for place in value.split():
            path = Path(urlparse(place).path if place.startswith("file:") else place)
            if path.is_absolute() and path.is_dir():
                # an index links to files beside it
                found.add(path if key == "find-links" else path.parent)
    return sorted(found)


def _bootstrap(release, root):
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"]
    command += [f"--aptopt={option}" for option in _apt_options()]
    answer = subprocess.run(
        [*command, release, str(root), *_sources(release)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if answer.returncode:
        raise RuntimeError(f"mmdebstrap {release} failed:\n{answer.stdout}{answer.stderr}")
    (root / "etc/machine-id").write_text("")
    (root / "etc/hostname").write_text("database\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost database\n::1 localhost\n")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text(f"nameserver {NAMESERVER}\n")
    _trust(root)


def _trust(root):
    """Give a host this machine's certificate authorities and package indexes."""
    lines = [f"{key} = {value}" for key, value in pip_settings().items()]
    if AUTHORITIES.exists():
        for place in (COPIED_AUTHORITIES, str(AUTHORITIES)):
            shutil.copyfile(AUTHORITIES, root / place.lstrip("/"))
        lines.append(f"cert = {COPIED_AUTHORITIES}")
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *lines, ""]))


def _digest():
    return hashlib.sha256(AUTHORITIES.read_bytes()).hexdigest() if AUTHORITIES.exists() else ""


def _apt_options():
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    return [line.rstrip(";") for line in dump.splitlines() if _APT_OPTION.fullmatch(line)]


def _sources(release):
    """Return this machine's Debian mirrors for a release; without any, mmdebstrap has its own."""
    own = re.search(r"^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text(), re.M)
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)"]
    command += ["Created-By: Packages", "Origin: Debian", "Component: main"]
    lines = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split("\n")
    found = []
    for line in lines:
        uri, _, codename = line.partition(" ")
        if own and codename in {own[1], f"{own[1]}-updates", f"{own[1]}-security"}:
            found.append(f"deb {uri} {codename.replace(own[1], release)} main")
    return sorted(set(found))
