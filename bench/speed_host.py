"""A booted Debian host to measure on: everything enabled, and what the floor is measured with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.support import backend
from tests.support.host import FORMULA, Host, prepared
from tests.support.network import Switch

CONFIG = "/etc/salt-bench"
ROOTS = "/srv/bench"
PACKAGES = "postgresql-15 postgresql-client-15 postgresql-contrib pgbackrest"
# Everything enabled: backups by the default schedule, a maintenance policy, a few more of each.
PILLAR: dict[str, Any] = {
    "backup": {"enabled": True},
    "maintenance": {"policy": "window", "windows": ["Sun 02:00-04:00"]},
    "roles": {
        "reporter": {"secret": {"file": "/etc/autobot/reporter.env", "key": "REPORTER_PASSWORD"}},
        "readonly": {"connection_limit": 5},
    },
    "databases": {"reports": {"owner": "reporter"}},
    "hba": {
        "after": [
            {
                "type": "host",
                "database": "reports",
                "user": "reporter",
                "address": "127.0.0.1/32",
                "method": "scram-sha-256",
            }
        ]
    },
}


class Bench:
    """A host, and the commands that are measured on it."""

    def __init__(self, release: str = "bookworm"):
        self.switch = Switch()
        self.host = Host(prepared(release), self.switch)

    def __enter__(self) -> Bench:
        self.host.start()
        self.host.push_formula()
        self.salt_call = "/opt/autobot-slm-database/salt/bin/salt-call"
        self.tell(PILLAR)
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()
        self.switch.close()

    def tell(self, pillar: dict[str, Any]) -> None:
        """Give the host a pillar, and an SLS of one test.nop beside the formula."""
        config = {
            "id": "bench.19",
            "file_client": "local",
            "cachedir": "/var/cache/salt-bench",
            "pki_dir": f"{CONFIG}/pki",
            "log_file": "/var/log/salt-bench",
            "file_roots": {"base": [FORMULA, ROOTS]},
            "pillar_roots": {"base": [f"{ROOTS}/pillar"]},
        }
        self.host.write(f"{CONFIG}/minion", json.dumps(config))
        self.host.write(f"{ROOTS}/empty.sls", "nothing:\n  test.nop\n")
        self.host.write(f"{ROOTS}/pillar/top.sls", json.dumps({"base": {"*": ["slm"]}}))
        self.host.write(f"{ROOTS}/pillar/slm.sls", json.dumps({"slm_database": pillar}))

    def words(self, *call: str) -> list[str]:
        """Return a command line of the machine that runs salt-call on the host."""
        salt = [self.salt_call, "-c", CONFIG, "--local", "--out=json", "-l", "quiet", *call]
        return [*self.host._enter(), *salt]

    def call(self, *call: str) -> Any:
        """Run salt-call on the host and return what it says."""
        done = subprocess.run(self.words(*call), capture_output=True, text=True, check=False)
        try:
            return json.loads(done.stdout)["local"]
        except ValueError as err:
            raise SystemExit(f"{' '.join(call)}: {done.stdout}{done.stderr}") from err

    def apply(self) -> dict[str, dict]:
        """Apply the formula and return what did not go well, or changed."""
        states = self.call("state.apply", "slm_database")
        if not isinstance(states, dict):
            raise SystemExit(f"the formula does not compile: {states}")
        failed = {one["__id__"]: one for one in states.values() if one["result"] is False}
        if failed:
            raise SystemExit(f"the formula was not applied: {json.dumps(failed, indent=1)}")
        return {one["__id__"]: one["changes"] for one in states.values() if one["changes"]}

    def deploy_backend(self) -> None:
        """Put the miniature backend on the host, with a virtual environment and Alembic."""
        directory = str(backend.DIRECTORY)
        for name, text in backend.files().items():
            self.host.write(f"{directory}/{name}", text)
        self.host.run(f"id {backend.USER} || useradd --system -M -g {backend.USER} {backend.USER}")
        self.host.write("/opt/requirements.txt", backend.REQUIREMENTS.read_text())
        install = f"{directory}/venv/bin/pip install -q -r /opt/requirements.txt"
        self.host.run(f"python3 -m venv {directory}/venv && {install}", timeout=900)

    def ready(self) -> None:
        """Apply everything, and see that the next run has nothing to do."""
        self.apply()
        self.deploy_backend()
        approved = {**PILLAR, "maintenance": {**PILLAR["maintenance"], "approve": True}}
        self.tell(approved)
        self.call("state.apply", "slm_database.migration")
        self.tell(PILLAR)
        self.apply()
        left = self.apply()
        if left:
            raise SystemExit(f"a second run changes {left}")


def timed(words: list[str]) -> dict[str, float]:
    """Run a command once by hyperfine; return wall clock, and CPU of all its processes, in s."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = ["hyperfine", "-N", "-i", "--runs", "1", "--style", "none"]
        line = " ".join(_quoted(word) for word in words)
        subprocess.run(
            [*command, "--export-json", file.name, line],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found = json.loads(Path(file.name).read_text())["results"][0]
    return {"wall": found["median"], "cpu": found["user"] + found["system"]}


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def memory(words: list[str]) -> float:
    """Return the peak resident memory of a command's largest process, in MB, by GNU time."""
    command = ["/usr/bin/time", "-v", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    return int(match[1]) / 1024 if match else 0.0


def processes(words: list[str]) -> list[str]:
    """Return the programs that a command starts, in order, its own start and nsenter left out."""
    if not shutil.which("strace"):
        raise SystemExit("strace is missing")
    with tempfile.NamedTemporaryFile(suffix=".strace") as file:
        command = ["strace", "-f", "-qq", "-e", "trace=execve", "-o", file.name, *words]
        subprocess.run(command, capture_output=True, check=False)
        text = Path(file.name).read_text(errors="replace")
    started = re.findall(r'execve\("([^"]+)", .*\) = 0$', text, re.MULTILINE)
    begun = next(at for at, path in enumerate(started) if path.endswith("salt-call"))
    return started[begun + 1 :]
