"""Others that set up PostgreSQL, each on a host of its own, against the same host's empty run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import speed_host

# What of our scope it has: a server, settings, rules, a role and its database.
PILLAR: dict[str, Any] = {
    "use_upstream_repo": False,
    "version": "15",
    "config_backup": "",
    "postgresconf": "listen_addresses = 'localhost'\nmax_connections = 100\n",
    "users": {
        name: {"ensure": "present", "password": f"bench-{name}", "encrypted": "scram-sha-256"}
        for name in ("app", "reporter", "readonly")
    },
    "databases": {"app": {"owner": "app"}, "reports": {"owner": "reporter"}},
    "acls": [
        ["local", "all", "postgres", "peer"],
        ["host", "app", "app", "127.0.0.1/32", "scram-sha-256"],
        ["host", "reports", "reporter", "127.0.0.1/32", "scram-sha-256"],
    ],
}
ANSIBLE = "/opt/ansible/bin"
INSTALL = (
    "apt-get -qq update && apt-get -qqy install sudo acl locales"
    " && python3 -m venv /opt/ansible && /opt/ansible/bin/pip install -q ansible"
)


def _push(bench: speed_host.Bench, source: Path, target: str) -> None:
    """Copy a directory of the machine into the host."""
    pack = ["tar", "-C", str(source), "--exclude=.git", "-cf", "-", "."]
    archive = subprocess.run(pack, check=True, capture_output=True).stdout
    unpack = [*bench.host._enter(), "bash", "-c", f"mkdir -p {target}; tar -C {target} -xf -"]
    subprocess.run(unpack, input=archive, check=True)


def formula(bench: speed_host.Bench, checkout: Path) -> list[str]:
    """Apply postgres-formula until it has done what it can; return the words of one more run."""
    _push(bench, checkout / "postgres", f"{speed_host.ROOTS}/postgres")
    bench.host.write(
        f"{speed_host.ROOTS}/pillar/slm.sls", json.dumps({"postgres": PILLAR}, indent=1)
    )
    bench.host.run("apt-get -qq update", timeout=300)
    for _ in range(3):
        states = bench.call("state.apply", "postgres")
    failed = (
        [one for one in states.values() if not one["result"]]
        if isinstance(states, dict)
        else states
    )
    if failed:
        raise SystemExit(f"postgres-formula was not applied: {json.dumps(failed, indent=1)}")
    return bench.words("state.apply", "postgres")


def playbook(bench: speed_host.Bench, path: Path) -> list[str]:
    """Run a playbook, with what lies beside it, until all is done; return one more run's words."""
    _push(bench, path.parent, "/srv/playbook")
    bench.host.run(INSTALL, timeout=900)
    words = [f"{ANSIBLE}/ansible-playbook", "-c", "local", "-i", "localhost,", path.name]
    line = f"cd /srv/playbook && {' '.join(words)}"
    for _ in range(2):
        bench.host.run(line, timeout=900)
    return [*bench.host._enter(), "sh", "-c", line]


PREPARE: dict[str, Callable[[speed_host.Bench, Path], list[str]]] = {
    "postgres-formula": formula,
    "Ansible playbook": playbook,
}


def commands(bench: speed_host.Bench, name: str, path: Path) -> dict[str, list[str]]:
    """Return what takes turns on a host: a run of the other that changes nothing, and the floor."""
    return {
        name: PREPARE[name](bench, path),
        "empty state run": bench.words("state.apply", "empty"),
    }
