"""An SSH server on loopback in this process's private world, and a salt-ssh that goes there."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

from tests.support.salt_daemons import BIN, ENVIRONMENT, Answer, run, write_pillar

PORT = 22


class SshHost:
    """An sshd that lets root in with one key."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, mode=0o755)
        # A home of the world's own: the machine's may have a shell set-up that gets in the way.
        home = directory / "home"
        home.mkdir()
        passwd = Path("/etc/passwd")
        passwd.write_text(passwd.read_text().replace(":/root:", f":{home}:", 1))
        self.key = directory / "key"
        host_key = directory / "host_key"
        for key in (self.key, host_key):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).check_returncode()
        # What an operator has who has been there before.
        public = host_key.with_suffix(".pub").read_text()
        Path("/etc/ssh/ssh_known_hosts").write_text(f"127.0.0.1 {public}")
        (directory / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {PORT}\nHostKey {host_key}\nUsePAM no\n"
            f"AuthorizedKeysFile {self.key}.pub\nPermitRootLogin prohibit-password\n"
            f"StrictModes no\nPidFile {directory}/pid\nSubsystem sftp internal-sftp\n"
        )
        self.process = subprocess.Popen(
            [
                "/usr/sbin/sshd",
                "-D",
                "-E",
                str(directory / "log"),
                "-f",
                f"{directory}/sshd_config",
            ],
            env=ENVIRONMENT,
            cwd="/",
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._wait()

    @staticmethod
    def _wait(seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", PORT), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


class SaltSsh:
    """salt-ssh with a roster of one host under the name that a test wants."""

    def __init__(self, directory: Path, name: str, host: SshHost, formula: Path, pillar: dict):
        self.directory = directory
        directory.mkdir(parents=True)
        master = {
            "root_dir": str(directory),
            "user": "root",
            "file_roots": {"base": [str(formula)]},
            "pillar_roots": {"base": [str(write_pillar(directory / "pillar", pillar))]},
        }
        (directory / "master").write_text(json.dumps(master))
        # JSON is YAML in which the id is quoted.
        roster = {
            name: {
                "host": "127.0.0.1",
                "user": "root",
                "priv": str(host.key),
                "thin_dir": str(directory / "thin"),
            }
        }
        (directory / "roster").write_text(json.dumps(roster))

    def __call__(self, *words: object) -> Answer:
        """Run salt-ssh and return its answer."""
        options = ("-c", self.directory, "--out=json", "--static")
        return Answer(run(BIN / "salt-ssh", *options, *words))
