"""How a run and a report grow with what pillar describes, and with the tables in the database."""

from __future__ import annotations

from typing import Any

from bench import speed_host

TABLES = """
DO $$ BEGIN
  FOR n IN {first}..{last} LOOP EXECUTE 'CREATE TABLE t' || n || ' (id int, word varchar(9))';
  END LOOP;
END $$
"""
# What autovacuum would do some minutes later, in the middle of what is measured.
TIDY = "VACUUM ANALYZE pg_class, pg_attribute, pg_type, pg_depend, pg_shdepend; CHECKPOINT"


def described(number: int) -> dict[str, Any]:
    """Return a pillar with this many roles, rules and databases."""
    names = [f"part{at:04d}" for at in range(number)]
    rules = [
        {
            "type": "host",
            "database": name,
            "user": name,
            "address": "127.0.0.1/32",
            "method": "scram-sha-256",
        }
        for name in names
    ]
    databases = {name: {"owner": name} for name in names}
    roles: dict[str, Any] = dict.fromkeys(names)
    return {**speed_host.PILLAR, "roles": roles, "databases": databases, "hba": {"after": rules}}


def pillars(bench: speed_host.Bench, sizes: list[int], rounds: int) -> dict[str, list[dict]]:
    """Measure a quiet run for each size of pillar; from the smallest on, nothing is dropped."""
    found: dict[str, list[dict]] = {}
    for number in sizes:
        bench.tell(described(number))
        bench.apply()
        if left := bench.apply():
            raise SystemExit(f"a second run changes {sorted(left)}")
        words = bench.words("state.apply", "slm_database")
        found[str(number)] = [speed_host.timed(words) for _ in range(rounds)]
    bench.tell(speed_host.PILLAR)
    return found


def tables(bench: speed_host.Bench, sizes: list[int], rounds: int) -> dict[str, dict]:
    """Measure a quiet run and a report for each number of tables."""
    found: dict[str, dict[str, list]] = {}
    there = 0
    command = "runuser -u postgres -- psql -q -v ON_ERROR_STOP=1 -d autobot_slm"
    for number in sizes:
        while there < number:
            last = min(there + 1000, number)
            statement = TABLES.format(first=there + 1, last=last)
            bench.host.run(command, stdin=statement, timeout=900)
            there = last
        bench.host.run(command, stdin=TIDY, timeout=900)
        calls = {"run": ("state.apply", "slm_database"), "health": ("slmdb.health",)}
        made: dict[str, list] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                made[name].append(speed_host.timed(bench.words(*call)))
        found[str(number)] = made
    return found
