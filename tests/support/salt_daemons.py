"""A real Salt master, real minions and salt-ssh, started in this process's private world."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
CHECKOUT = Path(__file__).resolve().parents[2]
# As `systemctl start` would start them: with nothing of the test run around them.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


def run(*command: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run a command as an operator would and return what came of it."""
    return subprocess.run(
        [str(word) for word in command],
        env=ENVIRONMENT,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def copy_formula(target: Path) -> Path:
    """Copy what a file server would serve of this checkout, so that a test may change it."""
    for name in ("_modules", "_states", "slm_database"):
        shutil.copytree(
            CHECKOUT / name, target / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return target


def write_pillar(root: Path, pillar: dict) -> Path:
    """Write a pillar that every minion gets; JSON is YAML."""
    root.mkdir(parents=True)
    (root / "top.sls").write_text(json.dumps({"base": {"*": ["settings"]}}))
    (root / "settings.sls").write_text(json.dumps(pillar))
    return root


class Answer:
    """What a salt command said and how it ended."""

    def __init__(self, completed: subprocess.CompletedProcess[str]):
        self.status = completed.returncode
        self.stdout = completed.stdout
        self.text = completed.stdout + completed.stderr

    def of(self, minion: str) -> Any:
        """Return the value that a minion returned."""
        try:
            return json.loads(self.stdout)[minion]
        except (ValueError, KeyError) as err:
            raise AssertionError(f"no answer of {minion}: {self.text}") from err

    def states(self, minion: str) -> list[dict]:
        """Return a minion's state results in the order they ran."""
        value = self.of(minion)
        if not isinstance(value, dict):
            raise AssertionError("\n".join(map(str, value)) if isinstance(value, list) else value)
        value = value.get("return", value) if "jid" in value else value
        return sorted(value.values(), key=lambda one: one["__run_num__"])


class Daemon:
    """One Salt daemon with a directory of its own."""

    program = ""

    def __init__(self, directory: Path, config: dict):
        self.directory = directory
        (directory / "etc").mkdir(parents=True)
        defaults = {"root_dir": str(directory), "user": "root", "log_level_logfile": "info"}
        path = directory / "etc" / self.program.partition("-")[2]
        path.write_text(json.dumps({**defaults, **config}))
        self.process = subprocess.Popen(
            [str(BIN / self.program), "-c", str(directory / "etc"), "-l", "quiet"],
            env=ENVIRONMENT,
            cwd="/",
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


class Master(Daemon):
    """A master that serves one copy of the formula to whoever comes."""

    program = "salt-master"

    def __init__(self, directory: Path, formula: Path, pillar: dict):
        config = {
            "interface": "127.0.0.1",
            "auto_accept": True,
            "worker_threads": 3,
            "file_roots": {"base": [str(formula)]},
            "pillar_roots": {"base": [str(write_pillar(directory / "pillar", pillar))]},
            # A changed formula is served at once, as after `fileserver.update`.
            "fileserver_list_cache_time": 0,
            "timeout": 120,
        }
        super().__init__(directory, config)

    def salt(self, *words: object, output: str = "json") -> Answer:
        """Run `salt` on the master."""
        options = ("-c", self.directory / "etc", f"--out={output}")
        return Answer(run(BIN / "salt", *options, *words))

    def key(self, *words: object) -> Answer:
        """Run `salt-key` on the master."""
        return Answer(run(BIN / "salt-key", "-c", self.directory / "etc", "--out=json", *words))


class Minion(Daemon):
    """A minion of the master in the same world."""

    program = "salt-minion"

    def __init__(self, directory: Path, name: str):
        self.name = name
        config = {
            "id": name,
            "master": "127.0.0.1",
            "acceptance_wait_time": 1,
            "random_startup_delay": 0,
            "grains_cache": False,
        }
        super().__init__(directory, config)

    def wait(self, seconds: float = 180) -> None:
        """Wait until this minion has said that it is ready for jobs."""
        log = self.directory / "var" / "log" / "salt" / "minion"
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if log.is_file() and "Minion is ready to receive requests!" in log.read_text():
                return
            time.sleep(0.1)
        raise AssertionError(log.read_text() if log.is_file() else f"{self.name} did not start")
