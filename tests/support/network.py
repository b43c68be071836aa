"""A switch of our own: network namespaces on one bridge, with a user-mode way out.

Nothing is set up on the machine itself, so nothing can be left behind or be in another run's way:
a namespace ends with the process that holds it, and that process ends with this one.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL", "--"]
MTU = "1400"
_PROBE = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 20).close()
except OSError as err:
    sys.exit(f"{type(err).__name__}: {err}")
"""


class Namespace:
    """A network namespace with two addresses on the switch."""

    def __init__(self, number):
        self.ipv4 = f"10.0.2.{number}"
        self.ipv6 = f"fd00:736c:6d64::{number:x}"
        self.holder = _hold()

    @property
    def path(self):
        return f"/proc/{self.holder.pid}/ns/net"

    def run(self, *command, check=True):
        """Run a command of the machine inside this namespace."""
        return subprocess.run(
            ["nsenter", f"--net={self.path}", *command],
            check=check,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def listening(self):
        """Return the (address, port) pairs that the kernel accepts TCP connections on."""
        found = set()
        for name in ("tcp", "tcp6"):
            table = Path(f"/proc/{self.holder.pid}/net/{name}").read_text()
            for line in table.splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A":
                    found.add(_endpoint(local))
        return found

    def reaches(self, address, port):
        """Return whether a TCP connection from here to there succeeds."""
        return not self.run("python3", "-c", _PROBE, address, str(port), check=False).returncode

    def close(self):
        self.holder.kill()
        self.holder.wait()


class Switch:
    """A bridge, and whoever is plugged into it."""

    def __init__(self):
        self.numbers = itertools.count(15)
        self.members = []
        self.core = Namespace(1)
        self.core.run("ip", "link", "add", "switch", "type", "bridge")
        self.core.run("ip", "link", "set", "switch", "up")
        self.uplink = self._connect()

    def _connect(self):
        """Start the user-mode gateway (10.0.2.2, names at 10.0.2.3) and plug it in."""
        reader, writer = os.pipe()
        gateway = subprocess.Popen(
            [
                *(*DIES_WITH_US, "slirp4netns", f"--mtu={MTU}", "--disable-host-loopback"),
                *(f"--ready-fd={writer}", "--netns-type=path", self.core.path, "uplink"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writer],
        )
        os.close(writer)
        with os.fdopen(reader, "rb") as ready:
            if not ready.read(1):
                raise RuntimeError(f"slirp4netns ended with status {gateway.wait()}")
        self.core.run("ip", "link", "set", "uplink", "master", "switch", "up")
        return gateway

    def plug(self):
        """Return a new namespace that reaches every other one, and the machine's network."""
        number = next(self.numbers)
        member = Namespace(number)
        port = f"port{number}"
        veth = ["type", "veth", "peer", "name", "eth0", "netns", str(member.holder.pid)]
        self.core.run("ip", "link", "add", port, *veth)
        self.core.run("ip", "link", "set", port, "master", "switch", "up")
        member.run("ip", "link", "set", "lo", "up")
        member.run("ip", "address", "add", f"{member.ipv4}/24", "dev", "eth0")
        member.run("ip", "address", "add", f"{member.ipv6}/64", "dev", "eth0", "nodad")
        member.run("ip", "link", "set", "eth0", "mtu", MTU, "up")
        member.run("ip", "route", "add", "default", "via", "10.0.2.2")
        self.members.append(member)
        return member

    def close(self):
        self.uplink.kill()
        self.uplink.wait()
        for member in [*self.members, self.core]:
            member.close()


def _endpoint(text):
    """Read one address of the kernel's table: words in the machine's byte order, and a port."""
    address, port = text.split(":")
    packed = b"".join(
        int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8)
    )
    return str(ipaddress.ip_address(packed)), int(port, 16)


def _hold():
    """Start a process in a network namespace of its own, and wait until it is there."""
    ours = os.readlink("/proc/self/ns/net")
    holder = subprocess.Popen(
        [*DIES_WITH_US, "unshare", "--net", "sleep", "infinity"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(3000):
        if holder.poll() is not None:
            break
        if os.readlink(Path(f"/proc/{holder.pid}/ns/net")) != ours:
            return holder
        time.sleep(0.02)
    holder.kill()
    raise RuntimeError("no network namespace could be made")
