"""Jobs in a SQLite file: the fast durable spool, and the queue that shares a transaction with your own tables.

`sqlite:run/q.db?queue=posts` is one of the queues in run/q.db. The tables, and how other programs put jobs into them:
sqlite_schema.py. Beside the file lie q.db-bodies/ (large bodies) and q.db-workers/ (who lives).

Rules:

1. A put is durable when it returns; threads that put at the same time share one sync (sqlite_database.py).
2. To claim is one transaction, which counts the delivery and writes the claim's token into the row; all that comes
   after names that token. A claim holds as long as the process of its worker lives (sqlite_workers.py).
3. To settle is one transaction: the outcome, and all puts into queues of the same file. Puts into other stores are
   written down in it and handed over after it (sqlite_outgoing.py).
4. A worker that finds nothing sleeps until somebody writes to the file (sqlite_wake.py); it does not look again.
5. A forked child starts as a worker of its own: with no claims, and on connections of its own.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

from lamsonq import clock
from lamsonq.backends import sqlite_bodies, sqlite_lanes, sqlite_settle, sqlite_workers
from lamsonq.backends.sqlite_bodies import INLINE_MAX, Bodies
from lamsonq.backends.sqlite_database import database_at
from lamsonq.backends.sqlite_errors import Telling
from lamsonq.backends.sqlite_outgoing import Outgoing, write_down
from lamsonq.backends.sqlite_reserve import Reserving
from lamsonq.backends.sqlite_rows import Row, insert, row_of
from lamsonq.databases import DEFAULT_QUEUE, url_of
from lamsonq.errors import BrokerError, LeaseLost, QueueError, SettingsError
from lamsonq.jobs import Done, Job, Limit, Outcome, Put
from lamsonq.keys import new_key

_T = TypeVar("_T")


def open_queue(url: str, *, pop_limit: int = 0, oversize_dir: str | None = None) -> SQLite:
    """The backend that `sqlite:PATH?queue=NAME` names."""
    return SQLite(url, pop_limit=pop_limit, oversize_dir=oversize_dir)


def _parsed(url: str) -> tuple[str, str]:
    """Path and queue."""
    path, _, query = url.removeprefix("sqlite:").partition("?")
    path = unquote(path[2:] if path.startswith("//") else path)
    if not path:
        raise BrokerError(f"{url!r} names no file: it is sqlite:run/q.db?queue=NAME")
    given = parse_qsl(query, keep_blank_values=True)
    parameters = dict(given)
    if len(given) > len(parameters):
        raise BrokerError(f"{url!r}: a sqlite: queue has one name, and this names several")
    if unknown := sorted(set(parameters) - {"queue"}):
        raise BrokerError(f"{url!r}: a sqlite: queue knows no parameter {unknown[0]!r}; it knows: queue")
    return os.path.abspath(path), parameters.get("queue") or DEFAULT_QUEUE


class SQLite(Reserving):
    """A queue in a SQLite file; see lamsonq.jobs.Backend. `now` tells seconds since the epoch."""

    capabilities = frozenset({"processes", "limits", "transactions", "batches"})

    def __init__(
        self,
        name: str,
        *,
        pop_limit: int = 0,
        oversize_dir: str | None = None,
        now: Callable[[], float] = clock.now,
    ) -> None:
        if pop_limit or oversize_dir:
            raise SettingsError(f"{name}: size_limit and oversize_dir are for queues that are a maildir")
        self.name = name
        path, self.queue = _parsed(name)
        self._database = database_at(path)
        self._now = now
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """The state of a process that has claimed nothing yet."""
        self._begin_reserving()
        self._tidy_at = 0.0
        self._bodies = Bodies(self._database, self._worker)
        self._outgoing = Outgoing(self._database)

    @property
    def address(self) -> str:
        """The URL that opens this queue wherever the process runs."""
        return url_of(self._database.path, self.queue)

    def forget(self) -> None:
        """In a forked child: claims, watches and locks are the parent's. For tests: end as a killed process does."""
        if self._life is not None:
            self._life.forget()
        self._ear.close()
        self._begin()

    # -- putting -----------------------------------------------------------------------------------------------

    def new_key(self) -> str:
        return new_key()

    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        """Raises QueueError, and then none of them is in the queue."""
        now = self._now()
        rows = [row_of(put, self.queue, now) for put in puts]
        with Telling(self.name, puts):
            joined = None if conn is None else sqlite_settle.joins(conn, self._database.path)
            if joined is not None:
                try:
                    write = partial(self._bodies.write, rows)
                    results = sqlite_settle.put_on(joined, rows, self._database.path, write)
                finally:
                    self._bodies.doubt(rows)  # until the user commits
            elif rows:
                results = self._write(rows, partial(insert, rows=rows), durable=True)
                self._bodies.doubt(row for row, result in zip(rows, results, strict=True) if not result)
            else:
                results = []
        return [result is not False for result in results]

    def _write(self, rows: Sequence[Row], act: Callable[[sqlite3.Connection], _T], *, durable: bool) -> _T:
        """Write the bodies of these rows, and what `act` makes of them."""
        try:
            if max([len(row.job.body) for row in rows], default=0) > INLINE_MAX:
                self._database.ensure()
                self._bodies.write(rows)
            size = sum([len(row.job.body) for row in rows if row.file is None])
            return self._database.write(act, durable=durable, size=size)
        except BaseException:
            self._bodies.doubt(rows)
            raise

    # -- settling ----------------------------------------------------------------------------------------------

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        """Raises LeaseLost, and QueueError when nothing was settled."""
        if not puts:
            if self._end([job], outcome):
                raise sqlite_settle.lost(job)
            return []
        now = self._now()
        end = sqlite_settle.end(job, outcome, now)
        rows: dict[int, Row] = {}
        others: dict[int, Put] = {}
        for number, put in enumerate(puts):
            if isinstance(put.store, SQLite) and put.store._database is self._database:
                rows[number] = row_of(put, put.store.queue, now)
            else:
                others[number] = put
        worker = self._worker() if others else ""

        def act(connection: Any) -> tuple[list[bool | None], list[int]]:
            end(connection)
            kept = insert(connection, list(rows.values()))
            return kept, write_down(connection, worker, list(others.values()))

        durable = bool(others) or any(len(row.job.body) > INLINE_MAX for row in rows.values())
        try:
            with Telling(self.name, puts):
                kept, numbers = self._write(list(rows.values()), act, durable=durable)
        except LeaseLost:
            self._settled(job.claim)
            raise
        self._settled(job.claim)
        self._bodies.doubt(row for row, result in zip(rows.values(), kept, strict=True) if not result)
        results = {number: result is not False for number, result in zip(rows, kept, strict=True)}
        handed = self._outgoing.hand_over(dict(zip(numbers, others.values(), strict=True))) if others else {}
        results.update(zip(others, (handed[number] for number in numbers), strict=True))
        self._tidy_after([job])
        return [results[number] for number in range(len(puts))]

    def finish(self, jobs: Sequence[Job], outcome: Done) -> list[Job]:
        """Raises QueueError when nothing was settled."""
        return self._end(jobs, outcome)

    def _end(self, jobs: Sequence[Job], outcome: Outcome) -> list[Job]:
        """Settle these, of which nothing came; back come those whose claim no longer held."""
        now = self._now()
        ends = [sqlite_settle.end(job, outcome, now) for job in jobs]

        def act(connection: Any) -> list[Job]:
            lost = []
            for job, end in zip(jobs, ends, strict=True):
                try:
                    end(connection)
                except LeaseLost:
                    lost.append(job)
            return lost

        with Telling(self.name):
            lost = self._database.write(act)
        for job in jobs:
            self._settled(job.claim)
        self._tidy_after(jobs)
        return lost

    def _tidy_after(self, jobs: Sequence[Job]) -> None:
        """Some of these were perhaps large."""
        if any(len(job.body) > INLINE_MAX for job in jobs) and time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + 1
            sqlite_bodies.tidy(self._database)

    def touch(self, job: Job) -> None:
        query = "select 1 from jobs where id = ? and token = ? and state = 'reserved'"
        if not self._database.rows(query, sqlite_settle.row_number(job), job.claim):
            raise sqlite_settle.lost(job)

    # -- workers -------------------------------------------------------------------------------------------------

    def _tend(self) -> None:
        self.release_stale()
        self._bodies.settle_doubts()
        sqlite_bodies.tidy(self._database)

    def _is_at_rest(self) -> bool:
        return not self._limits and self._outgoing.empty and not self._bodies.doubtful

    def release_stale(self) -> int:
        """What a settled job has put into another store is handed over too, if it is not there yet.

        Raises QueueError, also when the queue could not be written.
        """
        now = self._now()

        def mend(connection: Any) -> None:
            connection.execute("delete from lamsonq_gates where until < ?", (now,))
            sqlite_lanes.mend(connection, self.queue, self._limits, now)

        with Telling(self.name):
            self._database.write(mend)
            life = self._life
            if life is not None and not life.is_known():  # somebody has deleted its file: what we have is lost to us
                self._life = None
                life.forget()
            own = None if self._life is None else self._life.id
            found = sqlite_workers.bury_dead(self._database, own, now, self._outgoing.inherit)
        self._outgoing.retry()
        return found

    def forgive(self) -> None:
        if self._life is not None:
            following = next(self._numbers)
            sqlite_workers.forgive(self._database, self._life.id, self._unforgiven)
            self._unforgiven = following

    def limit(self, limits: Sequence[Limit]) -> None:
        self._limits = tuple(limits)
        self._vigil.look_now()
        self.wake()

    def close(self) -> None:
        """Claims go back uncounted. Another `reserve` starts anew."""
        if self._life is not None:
            try:
                self.forgive()
                sqlite_workers.release(self._database, self._life.id, self._now(), counted=False)
                self._outgoing.retry()
                self._bodies.settle_doubts()
                sqlite_bodies.tidy(self._database)
                if self._outgoing.empty:
                    self._life.end()
            except QueueError as error:  # whoever finds this worker gone puts it right
                logging.warning("%s", error)
            self._life.forget()
        self._ear.close()
        self._begin()
        self._database.leave(self)


_all: weakref.WeakSet[SQLite] = weakref.WeakSet()


def _forget_all() -> None:
    for queue in list(_all):
        queue.forget()


os.register_at_fork(after_in_child=_forget_all)
