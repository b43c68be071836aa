"""A whole Debian host, booted with systemd: an overlay over an image, in its own network."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import inspect
import os
import shlex
import shutil
import subprocess
import time
import uuid
from pathlib import Path

from tests.support import image
from tests.support.network import DIES_WITH_US, Switch

CHECKOUT = Path(__file__).resolve().parents[2]
FORMULA = "/srv/autobot-slm-database"
NOT_PUSHED = [".git", "__pycache__", "*.pyc", ".hypothesis", ".venv", ".*_cache"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What systemd and Salt write for themselves while a host runs.
NOT_OURS = ["/opt/autobot-slm-database", "/var/cache/autobot-slm-database"]
NOT_OURS += ["/var/lib/autobot-slm-database/salt", "/var/log/autobot-slm-database"]
NOT_OURS += ["/var/log/journal", "/var/lib/systemd", "/var/tmp/systemd-private-*", "/srv"]
ENOUGH_MEMORY = 6 * 1024 * 1024  # KiB
_CLONE_NEWNS = 0x20000
_START = 'mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"'


class Host:
    """A host that is started from layers of root file systems, the topmost first."""

    def __init__(self, layers, switch):
        self.layers = [str(layer) for layer in layers]
        self.name = f"slm-{uuid.uuid4().hex[:8]}"
        self.network = switch.plug()
        self.directory, self.lock = _scratch(self.name)
        self.nspawn = None
        self.leader = None

    # life

    def start(self, patience=120):
        """Boot, and wait until systemd says that the host runs."""
        for name in ("upper", "work", "root"):
            (self.directory / name).mkdir(exist_ok=True)
        script = f'{_START} && shift 2 && exec "$@"'
        with self.console.open("ab") as console:
            self.nspawn = subprocess.Popen(
                [
                    *(*DIES_WITH_US, "unshare", "--mount", "sh", "-c", script, "sh"),
                    *(":".join(self.layers), str(self.directory), *self._nspawn()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=self._enter_cgroup,
            )
        deadline = time.monotonic() + patience
        self.leader = None
        while (state := self._state()) not in {"running", "degraded"}:
            if self.nspawn.poll() is not None or time.monotonic() > deadline:
                console = self.console.read_text(errors="replace")[-4000:]
                self.kill()
                raise RuntimeError(f"{self.name} did not boot ({state!r}):\n{console}")
            time.sleep(0.2)
        if state == "degraded":
            raise RuntimeError(f"{self.name}: {self.run('systemctl --failed --no-legend').stdout}")
        return self

    def stop(self, patience=90):
        """Shut down as an operator does."""
        if self.ended:
            return
        self.run("systemctl poweroff", check=False)
        try:
            self.nspawn.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"{self.name} did not shut down within {patience} s") from None

    def kill(self):
        """Pull the plug."""
        if self.leader and not self.ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.leader, 9)
        if self.nspawn and not self.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.nspawn.wait(5)
            self.nspawn.kill()
            self.nspawn.wait()

    def reboot(self):
        """Shut down and boot again."""
        self.stop()
        self.start()

    def close(self):
        """Leave nothing behind."""
        self.kill()
        self.network.close()
        for directory in _cgroups(self.name):
            _remove_cgroup(directory)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.lock.close()

    @property
    def ended(self):
        return self.nspawn is None or self.nspawn.poll() is not None

    @property
    def console(self):
        return self.directory / "console.log"

    # what a test does with it

    def run(self, command, check=True, timeout=300, stdin="", env=None):
        """Run a shell command line (or a list of words) as root in the host."""
        line = command if isinstance(command, str) else shlex.join(command)
        answer = subprocess.run(
            [*self._enter(env), "timeout", "-k", "5", str(timeout), "bash", "-c", f"cd /; {line}"],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout + 30,
            check=False,
        )
        if check and answer.returncode:
            raise AssertionError(
                f"`{line}` ended with {answer.returncode}\n{answer.stdout}\n{answer.stderr}"
            )
        return answer

    def path(self, path):
        """Return where the machine sees a file of the running host."""
        return Path(f"/proc/{self.leader}/root/{str(path).lstrip('/')}")

    def read(self, path):
        """Return the text of a file of the host."""
        return self.path(path).read_text()

    def write(self, path, text):
        """Write a text file in the host, with the directories it needs."""
        self.run(f"mkdir -p {shlex.quote(str(Path(path).parent))}")
        self.path(path).write_text(text)

    def push_formula(self):
        """Copy this checkout into the host, as a clone would; return where it is."""
        pack = ["tar", "-C", str(CHECKOUT), *(f"--exclude={name}" for name in NOT_PUSHED)]
        archive = subprocess.run([*pack, "-cf", "-", "."], check=True, capture_output=True).stdout
        unpack = f"mkdir -p {FORMULA} && tar --no-same-owner -C {FORMULA} -xf -"
        subprocess.run([*self._enter(), "bash", "-c", unpack], input=archive, check=True)
        return FORMULA

    def serve(self, port):
        """Let something that is not ours listen on this port, on every address."""
        words = ["systemd-run", "--quiet", f"--unit=held-{port}", "python3", "-m", "http.server"]
        self.run([*words, "--bind", "::", str(port)])
        self.until(f"bash -c ': >/dev/tcp/127.0.0.1/{port}'")

    def until(self, command, patience=120):
        """Wait until a command succeeds."""
        deadline = time.monotonic() + patience
        while self.run(command, check=time.monotonic() > deadline).returncode:
            time.sleep(0.1)

    def processes(self, words):
        """Return the ids, as the machine counts, of the processes of the host with these words."""
        found, ours = [], os.readlink(f"/proc/{self.leader}/ns/pid")
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if words in line and os.readlink(directory / "ns/pid") == ours:
                    found.append(int(directory.name))
        return found

    def snapshot(self, *directories):
        """Return what these directories hold: kind, mode, owner and content of every file."""
        words = ["find", *directories, "-xdev", *_without(NOT_OURS)]
        described = self.run([*words, "-printf", r"%p\t%y %m %u:%g %l\n"]).stdout
        hashed = self.run(shlex.join([*words, "-type", "f", "-print0"]) + " | xargs -0 sha256sum")
        found = dict(line.split("\t", 1) for line in described.splitlines())
        for line in hashed.stdout.splitlines():
            digest, _, path = line.partition("  ")
            found[path] = f"{found.get(path)} {digest}"
        return found

    # how it works

    def _nspawn(self):
        binds = [f"--bind-ro={directory}" for directory in image.pip_directories()]
        return [
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"),
            *("--console=read-only", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
            *(f"--machine={self.name}", f"--directory={self.directory}/root", _midday()),
            *(f"--network-namespace-path={self.network.path}", *binds),
        ]

    def _state(self):
        if not self.leader:
            self.leader = _leader(self.nspawn.pid)
        if not self.leader:
            return ""
        return self.run("systemctl is-system-running", check=False, timeout=20).stdout.strip()

    def _enter(self, env=None):
        words = [
            "nsenter",
            "-t",
            str(self.leader),
            *("-m", "-u", "-i", "-p", "-C", "-n", "-r", "-w"),
        ]
        variables = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"} | (env or {})
        return [*words, "env", "-i", *(f"{key}={value}" for key, value in variables.items())]

    def _enter_cgroup(self):
        """Keep two hosts that boot side by side out of each other's units."""
        for directory in _cgroups(self.name):
            directory.mkdir(exist_ok=True)
            (directory / "cgroup.procs").write_text(str(os.getpid()))


def prepared(release):
    """Return the layers of a host that has Salt and the packages at hand, but no database."""
    base = image.bare(release)
    recipe = [CHECKOUT / "bin/_salt.sh", CHECKOUT / "bin/salt-call"]
    recipe += sorted((CHECKOUT / "requirements").glob("host-*.txt"))
    inputs = [base.name, inspect.getsource(_prepare), *(file.read_text() for file in recipe)]
    return [image.cached(f"{release}-prepared", inputs, lambda to: _prepare(base, to)), base]


def _prepare(base, wanted):
    switch = Switch()
    host = Host([base], switch)
    try:
        host.start()
        host.run(f"{host.push_formula()}/bin/salt-call --version", timeout=900)
        host.run("apt-get -q update", timeout=600)
        packages = "postgresql pgbackrest openssh-server"
        host.run(f"apt-get -qy --download-only install {packages}", timeout=600)
        # What Debian does in the night, or makes up for after one, would meet the tests' own apt.
        host.run("systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer")
        host.run(f"rm -rf {FORMULA} /var/log/journal /etc/machine-id; touch /etc/machine-id")
        host.stop()
        subprocess.run(["cp", "-a", str(host.directory / "upper"), str(wanted)], check=True)
    finally:
        host.close()
        switch.close()


@functools.cache
def workspace():
    """
    Return where this process keeps what its hosts write.

    With enough memory that is a file system in memory, which only this process and its children
    see: fast, and gone with them. Otherwise it is a directory on disk.
    """
    directory = image.CACHE / "hosts"
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    if int(available) > ENOUGH_MEMORY:
        library = ctypes.CDLL(None, use_errno=True)
        if library.unshare(_CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "hosts", directory], check=True)
    return directory


def _sweep(workspace):
    """Remove what killed runs left: a directory whose lock nobody holds."""
    for lock in sorted(workspace.glob("*.lock")):
        with lock.open() as handle, contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            for directory in _cgroups(lock.stem):
                _remove_cgroup(directory)
            lock.unlink(missing_ok=True)


def hold(directory):
    """Say that a directory of the cache is in use, for as long as what is returned stays open."""
    lock = directory.with_suffix(".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _without(paths):
    """Return the words that keep find out of these paths."""
    alternatives = [word for path in paths for word in ("-path", path, "-o")][:-1]
    return ["(", *alternatives, ")", "-prune", "-o"]


def _scratch(name):
    """Make the directory of a host, and hold its lock."""
    directory = workspace() / name
    lock = hold(directory)
    directory.mkdir()
    return directory, lock


def _leader(nspawn):
    """Return nspawn's child that is process 1 of the host, once it is there."""
    for child in Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{child}/status").read_text()
            command = Path(f"/proc/{child}/comm").read_text().strip()
            if (
                "\nNSpid:" in status
                and status.split("\nNSpid:")[1].split("\n")[0].split()[-1] == "1"
            ):
                return int(child) if command == "systemd" else None
    return None


def _midday():
    """
    Return what lets systemd take the hour of the boot for midday.

    Timers go by it: at the hours at which Debian's and ours are due, a test would meet their work.
    """
    return f"--setenv=TZ=MIDDAY{time.gmtime().tm_hour - 12:+}"


def _cgroups(name):
    """Return this name's directory in each control group hierarchy of the machine."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options = line.split()[:4]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            own = "0:" if kind == "cgroup2" else ":name=systemd:"
            for membership in Path("/proc/self/cgroup").read_text().splitlines():
                if membership.startswith(own) or own in membership:
                    yield Path(place + membership.split(":", 2)[2]) / name


def _remove_cgroup(directory):
    for path, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):
            Path(path).rmdir()
