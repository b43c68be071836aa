"""What a run that changes nothing asks for, counted: processes, connections, statements."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import world as worlds

CHECKOUT = Path(__file__).resolve().parents[2]
SALT_CALL = Path(sys.executable).parent / "salt-call"
LOG = Path("/var/log/postgresql/postgresql-15-main.log")
PILLAR = {
    "slm_database": {
        "backup": {"enabled": True},
        "maintenance": {"policy": "window", "windows": ["Sun 02:00-04:00"]},
        "settings": {"log_connections": True, "log_statement": "all"},
        "roles": {"reporter": {"secret": {"file": "/etc/autobot/r.env", "key": "REPORTER"}}},
        "databases": {"reports": {"owner": "reporter"}},
    }
}


class Minion:
    """salt-call as an operator calls it, and what it starts and asks."""

    def __init__(self, directory: Path):
        self.directory = directory
        pillar = directory / "pillar"
        pillar.mkdir()
        (pillar / "top.sls").write_text(json.dumps({"base": {"*": ["slm"]}}))
        (pillar / "slm.sls").write_text(json.dumps(PILLAR))
        (directory / "empty.sls").write_text("nothing:\n  test.nop\n")
        config = {
            "id": "slm.19",
            "root_dir": str(directory),
            "cachedir": str(directory / "cache"),
            "file_client": "local",
            "file_roots": {"base": [str(CHECKOUT), str(directory)]},
            "pillar_roots": {"base": [str(pillar)]},
        }
        (directory / "minion").write_text(json.dumps(config))

    def call(self, *words, trace=None):
        salt = [SALT_CALL, "-c", self.directory, "--local", "--out=json", "-l", "error", *words]
        before = ["strace", "-f", "-qq", "-e", "trace=execve", "-o", trace] if trace else []
        done = subprocess.run([*before, *salt], check=True, capture_output=True, text=True)
        return json.loads(done.stdout)["local"]

    def loaded(self, *words):
        """Salt's own execution modules that a call loads, by the functions that asked for them."""
        salt = [SALT_CALL, "-c", self.directory, "--local", "--out=json", "-l", "debug", *words]
        done = subprocess.run(salt, check=True, capture_output=True, text=True)
        names = re.findall(r"LazyLoaded ([a-z_]+)\.", done.stderr)
        return {name for name in names if not name.startswith("slmdb")}

    def programs(self, *words):
        """The programs that a call starts, by name."""
        trace = self.directory / "trace"
        self.call(*words, trace=trace)
        found = re.findall(r'execve\("([^"]+)", .*\) = 0$', trace.read_text(), re.MULTILINE)
        return [Path(path).name for path in found[1:]]

    def asked(self, *words):
        """The connections that a call makes and the statements it sends, by the server's log."""
        before = len(LOG.read_bytes())
        answer = self.call(*words)
        text = LOG.read_bytes()[before:].decode(errors="replace")
        lines = [line for line in text.splitlines() if "archive" not in line]
        connections = [line for line in lines if "connection authorized" in line]
        statements = [line for line in lines if "LOG:  statement: " in line]
        return answer, len(connections), len(statements)


@pytest.fixture(scope="module")
def minion(tmp_path_factory):
    """An applied host on which the next run has nothing to do."""
    worlds.fresh()
    made = Minion(tmp_path_factory.mktemp("counted"))
    for _ in range(2):
        states = made.call("state.apply", "slm_database")
    assert [one["__id__"] for one in states.values() if one["changes"] or not one["result"]] == []
    return made


@pytest.mark.once
def test_a_quiet_run_starts_few_processes(minion):
    """None but systemctl, once, where systemd runs the host."""
    # Salt's own, for its grains, are now more and now less; none of them is one of ours.
    floor = minion.programs("state.apply", "empty")
    for words in ((), ("test=True",)):
        started = minion.programs("state.apply", "slm_database", *words)
        ours = [name for name in started if name not in floor]
        assert ours in ([], ["systemctl"])


@pytest.mark.once
def test_a_quiet_run_loads_no_module_of_salts_own(minion):
    """The one for files has ten thousand lines."""
    empty = minion.loaded("state.apply", "empty")
    assert "state" in empty
    assert minion.loaded("state.apply", "slm_database") <= empty
    assert minion.loaded("slmdb.health") <= minion.loaded("test.ping")


@pytest.mark.once
def test_a_quiet_run_asks_little(minion):
    """Connections and statements, which grow by one connection with each further database."""
    states, connections, statements = minion.asked("state.apply", "slm_database")
    assert [one["changes"] for one in states.values() if one["changes"]] == []
    assert connections <= 5
    assert statements <= 45


@pytest.mark.once
def test_a_report_makes_one_connection(minion):
    """Nothing of it needs a second one, nor a process where systemd does not run the host."""
    report, connections, statements = minion.asked("slmdb.health", "timeout=15")
    assert report["healthy"], report["problems"]
    assert connections == 1
    assert statements <= 25
    floor = minion.programs("test.ping")
    assert set(minion.programs("slmdb.health")) <= set(floor)
