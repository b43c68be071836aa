"""A package repository on this host, signed by a key that was made on the spot."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
import tempfile
from email.utils import formatdate
from pathlib import Path


def _gpg(home: Path, *words: str, data: bytes = b"") -> bytes:
    command = ["gpg", "--homedir", str(home), "--batch", "--yes", "--quiet", *words]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


class Key:
    """A signing key; `made` and `expires` are days from now and from then."""

    def __init__(self, name: str, made: int = 0, expires: int = 0):
        # A short path: gpg's agent has its socket there.
        self.home = Path(tempfile.mkdtemp(prefix="gpg-", dir="/tmp"))
        self.name, self.made = name, made
        self._do("--quick-generate-key", name, "ed25519", "sign", f"{expires}d")
        listed = _gpg(self.home, "--list-keys", "--with-colons").decode().splitlines()
        self.fingerprint = next(line.split(":")[9] for line in listed if line.startswith("fpr"))

    def _do(self, *words: str, data: bytes = b"") -> bytes:
        moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=self.made)
        faked = ["--faked-system-time", moment.strftime("%Y%m%dT%H%M%S")] if self.made else []
        return _gpg(self.home, *faked, "--passphrase", "", *words, data=data)

    def public(self, armored: bool = True) -> bytes:
        """The public key, as a file holds it."""
        return _gpg(self.home, *(["--armor"] if armored else []), "--export", self.name)

    def sign(self, data: bytes) -> bytes:
        """The text with its signature around it."""
        return self._do("--clearsign", data=data)

    def remove(self) -> None:
        """End the agent and remove what the key was made of."""
        subprocess.run(
            ["gpgconf", "--homedir", str(self.home), "--kill", "all"], capture_output=True
        )
        subprocess.run(["rm", "-rf", str(self.home)], check=True)


def publish(root: Path, key: Key, packages: list[str], suite: str = "bookworm-pgdg") -> str:
    """Write a repository that offers the packages, signed by the key; return its address."""
    architecture = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    index = "\n".join(
        f"Package: {name}\nVersion: 99.1-1.pgdg\nArchitecture: {architecture}\n"
        f"Maintainer: test\nFilename: pool/{name}.deb\nSize: 1\nSHA256: {'0' * 64}\n"
        for name in packages
    ).encode()
    below = root / "dists" / suite
    name = f"main/binary-{architecture}/Packages"
    (below / name).parent.mkdir(parents=True, exist_ok=True)
    (below / name).write_bytes(index)
    release = (
        f"Origin: test\nSuite: {suite}\nCodename: {suite}\nDate: {formatdate(usegmt=True)}\n"
        f"Architectures: {architecture}\nComponents: main\nSHA256:\n"
        f" {hashlib.sha256(index).hexdigest()} {len(index)} {name}\n"
    )
    (below / "InRelease").write_bytes(key.sign(release.encode()))
    return f"file:{root}"
