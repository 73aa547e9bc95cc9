"""Looking at the jobs of one queue, and mending: nothing here needs a claim.

Rules: looking never writes and never waits for a writer. A delayed job whose time has come is ready, whether or not
somebody has written that down; a parked one is ready too. A large purge is made in parts, so that others get between.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from lamsonq.backends import sqlite_bodies
from lamsonq.backends.sqlite_claims import is_paused
from lamsonq.backends.sqlite_database import Database
from lamsonq.backends.sqlite_lanes import leave
from lamsonq.backends.sqlite_rows import COLUMNS, body_of, bound, damaged_of, job_of, legible
from lamsonq.jobs import STATES, Job, check_state

_FRESH = "state = 'ready' and deliveries = 0"
_SUSPECT = "state = 'ready' and deliveries > 0"
_DUE = "state = 'delayed' and due <= :now"
_UNDATED = "state = 'delayed' and due is null"  # another program has put it: nobody said that it is to wait
_WHERE = {
    "ready": (_FRESH, _SUSPECT, "state = 'parked'", _DUE, _UNDATED),
    "delayed": ("state = 'delayed' and due > :now",),
    "reserved": ("state = 'reserved'",),
    "dead": ("state = 'dead'",),
    "done": ("state = 'done'",),
}
"""The parts of a state, each of which an index knows."""

_AT_ONCE = 1000
_KICK = """
update jobs set state = 'ready', deliveries = 0, attempts = 0, due = null, lane = null, since = ?
where queue = ? and key = ? and state in ('delayed', 'dead', 'done')
"""


class Kept:
    """The part of a backend that looks and mends."""

    _database: Database
    _now: Callable[[], float]
    queue: str

    def _rows(self, query: str, **values: object) -> list[tuple[Any, ...]]:
        return self._database.rows(query, {"queue": self.queue, "now": self._now(), **values})

    def keys(self, state: str = "ready") -> list[str]:
        check_state(state)
        parts = (f"select priority, key from jobs where queue = :queue and {part}" for part in _WHERE[state])
        return [legible(key) or "" for _, key in self._rows(f"{' union all '.join(parts)} order by 1, 2")]

    def get(self, key: str) -> Job | None:
        for _ in range(3):  # it may end while we look
            query = f"select {COLUMNS}, file, body from jobs where queue = :queue and key = :key"
            rows = self._rows(query, key=bound(key))
            if not rows:
                return None
            *columns, file, body = rows[0]
            row, content = tuple(columns), b""
            try:
                content = sqlite_bodies.read(self._database, file) if file else body_of(body)
                return job_of(row, content)
            except FileNotFoundError:
                trouble = f"its body, {file} in {self._database.bodies}, is gone"
            except OSError as error:
                trouble = f"its body, {file} in {self._database.bodies}, cannot be read: {error.strerror}"
            except ValueError as error:
                return damaged_of(row, content, str(error))
        return damaged_of(row, b"", trouble)

    def state(self, key: str) -> str | None:
        query = "select state, due is null or due <= :now from jobs where queue = :queue and key = :key"
        for state, due in self._rows(query, key=bound(key)):
            return "ready" if state == "parked" or (state == "delayed" and due) else str(state)
        return None

    def report(self, key: str) -> str:
        query = "select report from jobs where queue = :queue and key = :key"
        return "".join(report for [report] in self._rows(query, key=bound(key)))

    def counts(self) -> dict[str, int]:
        parts = (
            " + ".join(f"(select count(*) from jobs where queue = :queue and {part})" for part in _WHERE[state])
            for state in STATES
        )
        [row] = self._rows(f"select {', '.join(parts)}")
        return dict(zip(STATES, row, strict=True))

    def oldest(self) -> float | None:
        parts = (f"select min(received) as at from jobs where queue = :queue and {part}" for part in _WHERE["ready"])
        [[moment]] = self._rows(f"select min(at) from ({' union all '.join(parts)})")
        return None if moment is None else float(moment)

    def paused(self) -> bool:
        return bool(self._rows("select 1 from lamsonq_queues where name = :queue and paused"))

    def pause(self) -> None:
        self._pause(True)

    def resume(self) -> None:
        self._pause(False)

    def _pause(self, paused: bool) -> None:
        insert = "insert into lamsonq_queues values (?, ?) on conflict do update set paused = excluded.paused"

        def act(connection: sqlite3.Connection) -> None:
            if is_paused(connection, self.queue) != paused:
                connection.execute(insert, (self.queue, paused))

        self._database.write(act, durable=True)

    def remove(self, key: str) -> bool:
        delete = "delete from jobs where queue = ? and key = ? and state != 'reserved' returning id"
        now = self._now()

        def act(connection: sqlite3.Connection) -> bool:
            deleted = connection.execute(delete, (self.queue, bound(key))).fetchall()
            for [number] in deleted:
                leave(connection, number, now)
            return bool(deleted)

        removed = self._database.write(act, durable=True)
        sqlite_bodies.tidy(self._database)
        return removed

    def kick(self, key: str) -> bool:
        values = (self._now(), self.queue, bound(key))

        def act(connection: sqlite3.Connection) -> bool:
            try:
                return bool(connection.execute(_KICK, values).rowcount)
            except sqlite3.IntegrityError:  # while it lay dead or done, another like it has come
                connection.execute("update jobs set uniq = null where queue = ? and key = ?", values[1:])
                return bool(connection.execute(_KICK, values).rowcount)

        return self._database.write(act, durable=True)

    def purge(self, state: str, before: float | None = None) -> int:
        check_state(state)
        if state == "reserved":
            return 0
        purged = sum(self._purge(part, before) for part in _WHERE[state])
        sqlite_bodies.tidy(self._database)
        return purged

    def _purge(self, part: str, before: float | None) -> int:
        age = "" if before is None else "and since < :before"
        which = f"select id from jobs where queue = :queue and {part} {age} limit {_AT_ONCE}"
        now = self._now()
        values = {"queue": self.queue, "now": now, "before": before}

        def act(connection: sqlite3.Connection) -> int:
            deleted = connection.execute(f"delete from jobs where id in ({which}) returning id", values).fetchall()
            for [number] in deleted:
                leave(connection, number, now)
            return len(deleted)

        total = 0
        while number := self._database.write(act):
            total += number
        return total
