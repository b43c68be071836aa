"""
The one PostgreSQL instance: where it is, whether it runs, and how it comes to be.
"""

from __future__ import annotations

import glob
import ipaddress
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_instance"

NAME = "main"
MAJORS = ("14", "15", "16", "17", "18")
UNIT = "autobot-slm-database"
NAMED = 5  # of what keeps an instance, in one line
# Any of these is where the application, and the formula's own login, connect.
EVERYWHERE = {"*", "0.0.0.0", "::"}
FOR_THE_APPLICATION = {"*", "0.0.0.0", "127.0.0.1", "localhost"}
CONFIGURATION = "/etc/postgresql"
DATA = "/var/lib/postgresql"
SOCKETS = "/var/run/postgresql"
# What earlier runs left that tells the major, and the key that does.
RECORDS = {
    "/var/lib/autobot-slm-database/settings.json": r"version-(\d+)",
    "/var/lib/autobot-slm-database/packages.json": r"postgresql-(\d+)",
}
# linux/netlink.h, linux/sock_diag.h, net/tcp_states.h
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, DUMP = 4, 20, 0x301
NLMSG_ERROR, NLMSG_DONE, TCP_LISTEN = 2, 3, 10
_SETTING = re.compile(
    r"^[ \t]*(data_directory|hba_file|ident_file|port)[ \t]*[= \t][ \t]*('(?:[^'\n]|'')*'|[^\s#]+)",
    re.IGNORECASE | re.MULTILINE,
)


def __virtual__() -> str:
    return __virtualname__


def systemd() -> bool:
    """
    Tell whether systemd runs this host.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.systemd

    Returns a boolean. Raises nothing.
    """
    return os.path.isdir("/run/systemd/system")


def majors() -> tuple[str, ...]:
    """
    Return the PostgreSQL majors that the formula supports.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.majors

    Returns texts, the lowest first. Raises nothing.
    """
    return MAJORS


def _existing() -> list[str]:
    """The majors that have an instance of our name, lowest first."""
    try:
        majors = os.listdir(CONFIGURATION)
    except OSError:
        return []
    found = [
        major
        for major in majors
        if os.path.isfile(os.path.join(CONFIGURATION, major, NAME, "postgresql.conf"))
    ]
    return sorted(found, key=lambda major: [int(part) for part in re.findall(r"\d+", major)])


def _ours(existing: list[str]) -> str:
    """Of several majors the one that is ours: a package may have made an empty newer instance."""
    for told in (_run_by_unit, _recorded, lambda: _at_the_wanted_port(existing)):
        found = [major for major in told() if major in existing]
        if len(found) == 1:
            return found[0]
    return existing[-1]


def _run_by_unit() -> list[str]:
    text = __salt__["slmdb_file.read"](f"/etc/systemd/system/{UNIT}.service") or b""
    program = r"^ExecStart=\S*/postgresql/([^/]+)/bin/"
    return re.findall(program, text.decode(errors="replace"), re.MULTILINE)


def _recorded() -> list[str]:
    """The major that the last apply was told, else the one whose server's package it held."""
    for path, pattern in RECORDS.items():
        try:
            kept = __salt__["slmdb_file.remembered"](path) or {}
        except CommandExecutionError:
            continue
        names = [f"version-{kept.get('version')}", *kept]
        found = [match[1] for name in names if (match := re.fullmatch(pattern, name))]
        if found:
            return found
    return []


def _at_the_wanted_port(existing: list[str]) -> list[str]:
    wanted = __salt__["slmdb_pillar.get"]("port")
    return [major for major in existing if _postmaster(_data(major)).get("port") == wanted]


def _data(major: str, name: str = NAME) -> str:
    own = _configured(f"{CONFIGURATION}/{major}/{name}/postgresql.conf").get("data_directory")
    return own or f"{DATA}/{major}/{name}"


def version() -> str:
    """
    Return the major of our instance: the one that exists, else the one to be made.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.version

    Returns a string such as ``15``. Where several majors have an instance of our name and pillar
    names none: the one that our unit runs, else the one that was recorded, else the one whose
    server has the wanted port, else the highest. Raises ``CommandExecutionError`` if pillar asks
    for another major than the one that exists, that one is not supported, or the distribution is
    unknown and pillar names none.

    A run that saw an instance keeps its major, for a clean has more to undo when it is dropped.
    """
    if "slmdb_major" in __context__:
        return __context__["slmdb_major"]
    major = _version()
    if "slmdb_run" in __context__ and major in _existing():
        __context__["slmdb_major"] = major
    return major


def _version() -> str:
    asked = __salt__["slmdb_pillar.get"]("version")
    existing = _existing()
    if existing and asked and str(asked) not in existing:
        raise CommandExecutionError(
            f"slm_database:version: {asked} is asked for, but instance {existing[-1]}/{NAME} "
            "exists; a state does not upgrade across majors: remove the key, or upgrade first"
        )
    if asked:
        return str(asked)
    if existing:
        major = existing[0] if len(existing) == 1 else _ours(existing)
        if major not in MAJORS:
            raise CommandExecutionError(
                f"slm_database:version: instance {major}/{NAME} exists; {MAJORS[0]} to "
                f"{MAJORS[-1]} are supported: upgrade it first, or move it away"
            )
        return major
    offered = __salt__["slmdb_pillar.get"]("distribution", "version")
    if not offered:
        raise CommandExecutionError(
            f"slm_database:version: no PostgreSQL major is known for "
            f"{__grains__.get('osfinger')}; name one"
        )
    return str(offered)


def _postmaster(data_directory: str) -> dict[str, Any]:
    """What postmaster.pid says, if the process it names is alive and a PostgreSQL server."""
    try:
        with open(os.path.join(data_directory, "postmaster.pid"), encoding="utf-8") as stream:
            lines = stream.read().splitlines()
        pid, port = int(lines[0]), int(lines[3])
        with open(f"/proc/{pid}/comm", encoding="utf-8") as stream:
            alive = stream.read().startswith("postgres")
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stream:
            alive = alive and stream.read().rpartition(")")[2].split()[0] not in "ZX"
    except PermissionError as err:
        if os.getuid() == 0:  # another user for the moment of a login
            return {}
        raise CommandExecutionError(
            f"{data_directory} cannot be read by this user: run as root"
        ) from err
    except (OSError, ValueError, IndexError):
        return {}
    return {"pid": pid, "port": port, "started": int(lines[2])} if alive else {}


def _configured(path: str) -> dict[str, str]:
    """The last values in a configuration file, without quotes; read again if the file changed."""
    known = __context__.setdefault("slmdb_configured", {})
    stamp = __salt__["slmdb_file.stamp"](path)
    if path not in known or known[path][0] != stamp:
        known[path] = (stamp, _values(path))
    return known[path][1]


def _values(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            text = stream.read()
    except OSError:
        return {}
    found = _SETTING.finditer(text)
    return {match[1].lower(): match[2].strip("'") for match in found}


def facts() -> dict[str, Any]:
    """
    Return where the instance is and whether it runs.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.facts

    Returns ``version``, ``name``, ``exists``, ``running``, ``pid``, ``started`` (seconds since the
    epoch), ``port`` (in force, else configured, else wanted), ``wanted_port``, the directories
    ``config_directory``, ``data_directory``, ``bin_directory``, ``socket_directory``, the files
    ``config_file``, ``hba_file``, ``ident_file``, ``conf_file``, and ``unit``, ``systemd``,
    ``user``. Raises ``CommandExecutionError`` if the major cannot be told, or whoever asks may not
    look into the data directory.

    A report looks once and keeps this in ``__context__["slmdb_facts"]`` while it is made.
    """
    return dict(__context__.get("slmdb_facts") or _found())


def _found() -> dict[str, Any]:
    major = version()
    configuration = f"{CONFIGURATION}/{major}/{NAME}"
    config_file = f"{configuration}/postgresql.conf"
    conf_file = f"{configuration}/conf.d/50-autobot-slm.conf"
    main, own = _configured(config_file), _configured(conf_file)
    data = _data(major)
    postmaster = _postmaster(data)
    wanted = __salt__["slmdb_pillar.get"]("port")
    configured = own.get("port") or main.get("port")
    return {
        "version": major,
        "name": NAME,
        "exists": os.path.isfile(config_file),
        "running": bool(postmaster),
        "pid": postmaster.get("pid"),
        "started": postmaster.get("started"),
        "port": postmaster.get("port") or int(configured or wanted),
        "wanted_port": wanted,
        "config_directory": configuration,
        "data_directory": data,
        "bin_directory": f"/usr/lib/postgresql/{major}/bin",
        "socket_directory": SOCKETS,
        "config_file": config_file,
        "hba_file": main.get("hba_file") or f"{configuration}/pg_hba.conf",
        "ident_file": main.get("ident_file") or f"{configuration}/pg_ident.conf",
        "conf_file": conf_file,
        "unit": UNIT,
        "systemd": systemd(),
        "user": "postgres",
    }


def system_identifier(data_directory: str | None = None) -> int | None:
    """
    Return what tells an instance from every other, as initdb gave it; no server need run.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.system_identifier

    data_directory
        Another data directory; default: the instance's.

    Returns a number, ``None`` if there is no data. Raises ``CommandExecutionError`` if it cannot
    be read.
    """
    directory = data_directory or facts()["data_directory"]
    control = __salt__["slmdb_file.read"](os.path.join(directory, "global/pg_control"))
    # It has been the first field of the control file in every release.
    return int.from_bytes(control[:8], sys.byteorder) if control else None


def _listeners(port: int) -> list[str]:
    """The local addresses on which anything listens at a TCP port, from the kernel."""
    try:
        return [address for at, address in _listening() if at == port]
    except OSError:  # a kernel without sock_diag
        return [address for at, address in _listed() if at == port]


def _listening() -> Iterator[tuple[int, str]]:
    """
    Ask the kernel for its listening sockets alone, as ss does, since its text lists go through
    every bucket of a table for all the connections there could be. Source: sock_diag(7).
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(1)
        for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            asked = struct.pack("=BBBBI48x", family, socket.IPPROTO_TCP, 0, 0, 1 << TCP_LISTEN)
            head = struct.pack("=IHHII", 16 + len(asked), SOCK_DIAG_BY_FAMILY, DUMP, 0, 0)
            kernel.send(head + asked)
            for body in _messages(kernel):
                (at,) = struct.unpack_from(">H", body, 4)
                yield at, socket.inet_ntop(family, body[8 : 8 + size])


def _messages(kernel: socket.socket) -> Iterator[bytes]:
    """The bodies of an answer's messages. Source: netlink(7)."""
    while data := kernel.recv(65536):
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == NLMSG_ERROR:
                (error,) = struct.unpack_from("=i", data, 16)
                raise OSError(-error, os.strerror(-error))
            if kind == NLMSG_DONE:
                return
            yield data[16:length]
            data = data[(length + 3) & ~3 :]


def _listed() -> Iterator[tuple[int, str]]:
    """Read the listening sockets from the kernel's text lists."""
    for path, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        try:
            with open(path, encoding="ascii") as stream:
                rows = [line.split() for line in stream.readlines()[1:]]
        except OSError:
            continue
        for row in rows:
            address, _, number = row[1].partition(":")
            if int(row[3], 16) == TCP_LISTEN:
                yield int(number, 16), _address(address, family)


def _address(text: str, family: int) -> str:
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    return socket.inet_ntop(family, b"".join(words))


def listens() -> list[str]:
    """
    Return the addresses on which something listens at the instance's port, asked of the kernel.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.listens

    Returns a sorted list of addresses. Raises ``CommandExecutionError`` as ``facts`` does.
    """
    return sorted(set(_listeners(facts()["port"])))


def port_problem() -> str | None:
    """
    Tell whether anything else holds the wanted port.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.port_problem

    Returns one line, ``None`` if the port is ours or free. Raises ``CommandExecutionError`` as
    ``facts`` does.
    """
    found = facts()
    wanted = found["wanted_port"]
    if found["running"] and found["port"] == wanted:
        return None
    holders = _listeners(wanted)
    if not holders:
        return None
    return _held_by_cluster(found) or (
        f"slm_database:port: {wanted} is held by another program "
        f"(listens on {', '.join(sorted(set(holders)))}); end it or choose another port"
    )


def _held_by_cluster(found: dict[str, Any]) -> str | None:
    """Say which other cluster of Debian's has the wanted port: ours may be renamed."""
    wanted = found["wanted_port"]
    for path in sorted(glob.glob(f"{CONFIGURATION}/*/*/postgresql.conf")):
        major, name = path.split("/")[-3:-1]
        data = _data(major, name)
        if data == found["data_directory"] or _postmaster(data).get("port") != wanted:
            continue
        ours = f"if it is ours, pg_renamecluster {major} {name} {NAME}, and apply again; if not, "
        return (
            f"slm_database:port: {wanted} is held by PostgreSQL's cluster {major}/{name} ({data}); "
            f"{'' if found['exists'] else ours}pg_ctlcluster {major} {name} stop, or choose "
            "another port"
        )
    return None


def address_problems() -> list[str]:
    """
    Tell which wanted addresses the host does not have, and whether the application can connect.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.address_problems

    Returns one line each; empty if the server can listen where it should. Raises nothing.
    """
    path = "slm_database:listen_addresses"
    wanted = __salt__["slmdb_pillar.get"]("listen_addresses")
    missing = set(absent())
    # A host may have no IPv6; ::1 only repeats what 127.0.0.1 gives.
    if "127.0.0.1" in wanted and "127.0.0.1" not in missing:
        missing.discard("::1")
    lines = [
        f"{path}:{position}: this host has no address {address}; correct it or remove it"
        for position, address in enumerate(wanted)
        if address in missing
    ]
    if not FOR_THE_APPLICATION.intersection(wanted):
        lines.append(f"{path}: the application connects to 127.0.0.1; add it")
    return lines


def loopback(address: str) -> bool:
    """
    Tell whether an address to listen on is one that only this host reaches.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.loopback 127.0.0.2

    address
        An IP address, ``localhost``, or ``*``.

    Returns a boolean. Raises nothing.
    """
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def needs_network() -> bool:
    """
    Tell whether the server can start only when the network has given the host its addresses.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.needs_network

    Returns a boolean: true where ``listen_addresses`` has one that is neither loopback nor stands
    for all. Raises ``CommandExecutionError`` if the settings cannot be used.
    """
    wanted = __salt__["slmdb_pillar.get"]("listen_addresses")
    return any(address not in EVERYWHERE and not loopback(address) for address in wanted)


def absent() -> list[str]:
    """
    Return the wanted addresses that this host does not have.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.absent
    """
    wanted = __salt__["slmdb_pillar.get"]("listen_addresses")
    return [address for address in wanted if not _bindable(address)]


def _bindable(address: str) -> bool:
    """Whether a server could listen at an address; a name may stand for several."""
    if address == "*":
        return True
    try:
        places = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_binds(family, place) for family, _, _, _, place in places)


def _binds(family: int, place: tuple) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.bind(place)  # port 0: any that is free
    except OSError:
        return False
    return True


def trouble() -> str | None:
    """
    Say why the instance is not what a run could use, and none may be made in its place.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.trouble

    Returns one line with what to do; ``None`` if it is there, or a run makes it. Raises
    ``CommandExecutionError`` as ``facts`` does.
    """
    found = facts()
    data = found["data_directory"]
    if found["exists"]:
        if os.path.isfile(os.path.join(data, "PG_VERSION")):
            return None
        kept = aside()
        if kept:
            back = f"mv {kept} {data}"
        elif __salt__["slmdb_backup_presence.orphan"]():
            back = (
                "mount it if a mount is missing, or state.apply slm_database.recovery brings the "
                "data back from the repository (docs/backup.md)"
            )
        elif __salt__["slmdb_pillar.recorded"]():
            back = "mount it if a mount is missing, or bring the data back (docs/backup.md)"
        else:
            back = f"bring the data back, or pg_dropcluster {found['version']} {NAME}"
        return (
            f"instance {found['version']}/{NAME}: {found['config_directory']} exists but {data} "
            f"holds no data; {back}"
        )
    if os.path.isdir(data) and os.listdir(data):
        return (
            f"instance {found['version']}/{NAME}: {data} holds data but "
            f"{found['config_directory']} is missing; bring the configuration "
            "back, or move the data away"
        )
    return _held_by_cluster(found) or __salt__["slmdb_backup_presence.orphan"]()


def aside() -> str | None:
    """
    Name the data that a restore in place moved aside before it was killed.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.aside

    Returns its directory; ``None`` if the data directory is in its place, or nothing was moved.
    Raises ``CommandExecutionError`` as ``facts`` does.
    """
    data = facts()["data_directory"]
    kept = [] if os.path.exists(data) else sorted(glob.glob(f"{glob.escape(data)}.before-*"))
    return kept[-1] if kept else None


def differences() -> dict:
    """
    Compare the host with "the instance exists".

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.differences

    Returns ``{what: {"old": …, "new": …}}``, empty if it exists. Raises
    ``CommandExecutionError`` if data without configuration, or the reverse, is in the way, or the
    host does not have the wanted locale.
    """
    found, why_not = facts(), trouble()
    if why_not:
        raise CommandExecutionError(why_not)
    if found["exists"]:
        return {}
    get = __salt__["slmdb_pillar.get"]
    told = (get("locale"), get("encoding"), "slm_database:locale")
    mistakes = __salt__["slmdb_database.locale_problems"](*told)
    if mistakes:
        raise CommandExecutionError("\n".join(mistakes))
    return {f"instance {found['version']}/{NAME}": {"old": None, "new": "present"}}


def apply() -> None:
    """
    Create the instance, stopped, with the encoding, locale and checksums of the settings.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.apply

    Returns nothing. Raises ``CommandExecutionError`` with the first error of ``pg_createcluster``
    if it fails; what it left is removed.
    """
    found = facts()
    get = __salt__["slmdb_pillar.get"]
    command = ["pg_createcluster", "--port", str(get("port")), "--start-conf", "auto"]
    command += ["--locale", get("locale"), "--encoding", get("encoding")]
    command += [found["version"], NAME, "--"]
    if get("data_checksums"):
        command.append("--data-checksums")
    elif int(found["version"]) >= 18:  # where initdb makes them unless it is told not to
        command.append("--no-data-checksums")
    # pg_createcluster cleans up after a failed initdb itself; what a kill leaves is refused by
    # differences(), which names the way out.
    __salt__["slmdb_program.run"](*command)
    # Somebody wants an empty one: a recovery that was begun earlier must not overwrite it.
    __salt__["slmdb_recovery.unmark"]()


def report(present: dict[str, dict[str, Any]] | None = None) -> list[str]:
    """
    Name what differs from the settings and cannot be changed without rebuilding the instance.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.report

    present
        The databases as ``slmdb_database.read`` gives them, if that is known.

    Returns one line per fact; empty if there is none. Raises ``CommandExecutionError`` if the
    server does not answer.
    """
    get = __salt__["slmdb_pillar.get"]
    wanted, lines = __salt__["slmdb_database.wanted"](), []
    if present is None:
        present = __salt__["slmdb_database.read"](list(wanted))
    if get("data_checksums") and any(row["checksums"] != "on" for row in present.values()):
        lines.append("data checksums are off; pg_checksums --enable turns them on while it is down")
    for name, found in present.items():
        own = get("databases").get(name) or {}
        for what in ("encoding", "locale"):
            asked = wanted[name][what]
            if found[what].lower().replace("-", "") != asked.lower().replace("-", ""):
                key = f"databases:{name}:{what}" if own.get(what) else what
                lines.append(
                    f"slm_database:{key}: {asked} is wanted, database {name} has {found[what]}; "
                    "only a dump and a restore change it"
                )
    return lines


def why_kept() -> str | None:
    """
    Say why the instance stays although ``slm_database:clean:data`` is set.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.why_kept

    Returns one line with what to do; ``None`` if nothing keeps it, or nobody asked. Raises
    ``CommandExecutionError`` if the server does not answer.
    """
    found = facts()
    get = __salt__["slmdb_pillar.get"]
    if not found["exists"] or not get("clean", "data"):
        return None
    stays = f"instance {found['version']}/{NAME} stays"
    if not get("clean", "role"):
        return f"{stays}: its roles would go with it; slm_database:clean:role gives them up"
    if not __salt__["slmdb_server.available"]():
        return f"{stays}: the server cannot be asked what is in it; start it, and clean again"
    others = __salt__["slmdb_foreign.found"]()
    if not others:
        return None
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return f"{stays}: it holds {', '.join(others[:NAMED])}{more}; drop that, and clean again"


def leftovers() -> dict:
    """
    Name the instance if ``slm_database:clean`` gives up data and roles and nobody else's are in it.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.leftovers

    Returns ``{what: {"old": …, "new": …}}``, empty without these keys, without an instance, or if
    it holds anything that is not ours (a stopped one counts as such). Raises
    ``CommandExecutionError`` if the server does not answer.
    """
    found = facts()
    asked = found["exists"] and __salt__["slmdb_pillar.get"]("clean", "data")
    # The packages' own clean goes by this: in test mode the instance is still there.
    __context__["slmdb_given_up"] = bool(asked and not why_kept())
    if not __context__["slmdb_given_up"]:
        return {}
    return {f"instance {found['version']}/{NAME}": {"old": "present", "new": "absent"}}


def remove() -> None:
    """
    Drop the instance that ``leftovers`` names, with all its data.

    CLI Example:

    .. code-block:: bash

        salt-call slmdb_instance.remove

    Returns nothing. Raises ``CommandExecutionError`` with the first error of ``pg_dropcluster``.
    """
    if not leftovers():
        return
    found = facts()
    __salt__["slmdb_server.forget"]()
    if found["systemd"]:
        __salt__["cmd.run_all"](["systemctl", "stop", UNIT], python_shell=False)
    __salt__["slmdb_program.run"]("pg_dropcluster", "--stop", found["version"], NAME)
