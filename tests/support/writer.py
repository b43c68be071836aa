"""
An application that commits as fast as it is let, and writes down every commit it was told of.

What it writes is outside the database: one line for each acknowledged commit, with a place in the
WAL at which that commit was certainly there.
"""

from __future__ import annotations

import json

from tests.support import host_database as database

PYTHON = "/opt/autobot-slm-database/salt/bin/python3"
DIRECTORY = "/srv/writer"
LOG = f"{DIRECTORY}/log"
UNIT = "writer"
SEGMENT = 16 * 1024 * 1024
PROGRAM = """\
import contextlib, os, time
import psycopg2

WHERE = "host=/var/run/postgresql user=autobot_slm dbname=autobot_slm"
log = os.open("/srv/writer/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
entry = 0
while True:
    with contextlib.suppress(psycopg2.Error):
        connection = psycopg2.connect(WHERE)
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("CREATE TABLE IF NOT EXISTS written (entry bigint, filler bytea)")
        cursor.execute("SELECT greatest(%s, max(entry)) FROM written", [entry])
        entry = cursor.fetchone()[0]
        while True:
            entry += 1
            cursor.execute("INSERT INTO written VALUES (%s, %s)", [entry, os.urandom(300)])
            os.write(log, b"%d " % entry)
            cursor.execute("SELECT pg_current_wal_insert_lsn()::text")
            os.write(log, cursor.fetchone()[0].encode() + b"\\n")
            time.sleep(0.003)
    os.write(log, b"\\n")
    time.sleep(0.05)
"""


def start(host):
    """Begin; it reconnects for ever when the server goes."""
    host.write(f"{DIRECTORY}/program", PROGRAM)
    host.run(["systemd-run", "--quiet", f"--unit={UNIT}", PYTHON, f"{DIRECTORY}/program"])
    goes_on(host)


def stop(host):
    """End it, and forget what it wrote."""
    host.run(f"systemctl stop {UNIT}; rm -f {LOG}")


def logged(host):
    """Return the acknowledged commits and, where known, the end of the WAL after each."""
    lines = [line.split() for line in host.read(LOG).splitlines() if line.strip()]
    return {int(line[0]): position(line[1]) if len(line) > 1 else None for line in lines}


def goes_on(host):
    """Wait until another commit was acknowledged."""
    host.until(f"test -s {LOG}")
    size = host.path(LOG).stat().st_size
    host.until(f"test $(stat -c %s {LOG}) -gt {size + 20}")


def present(host, port=5432):
    """Return the entries that a server has."""
    words = "psql -XAt -h /var/run/postgresql -U autobot_slm -d autobot_slm"
    listed = host.run(f"{words} -p {port} -c 'SELECT entry FROM written'").stdout
    return {int(entry) for entry in listed.split()}


def position(lsn):
    """Return a place in the WAL as a number."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def end(segment):
    """Return the place at which a WAL segment ends."""
    return (int(segment[8:16], 16) << 32) + (int(segment[16:], 16) + 1) * SEGMENT


def count(what, commits, found, archived=None):
    """Return the acknowledged commits that are not there; with a segment, only those up to it."""
    due = {
        entry
        for entry, lsn in commits.items()
        if archived is None or (lsn is not None and lsn <= end(archived))
    }
    lost = due - found
    counted = {"logged": len(commits), "due": len(due), "there": len(due & found)}
    print(what, json.dumps({**counted, "lost": len(lost)}))
    assert due, what
    return lost


def restored(host, what, **target):
    """Restore beside what runs, throw the copy away, and return which commits it lacks."""
    commits = logged(host)
    with database.restored(host, **target) as copy:
        return count(what, commits, present(host, copy["port"]))
