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

import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from lamsonq import clock
from lamsonq.backends import sqlite_bodies, sqlite_claims, sqlite_lanes, sqlite_settle, sqlite_workers
from lamsonq.backends.maildir_names import new_key
from lamsonq.backends.sqlite_bodies import INLINE_MAX, Bodies
from lamsonq.backends.sqlite_claims import Asked, Claimed
from lamsonq.backends.sqlite_database import database_at
from lamsonq.backends.sqlite_errors import told
from lamsonq.backends.sqlite_kept import Kept
from lamsonq.backends.sqlite_outgoing import Outgoing, write_down
from lamsonq.backends.sqlite_rows import Row, body_of, insert, job_of, row_of, text_of
from lamsonq.backends.sqlite_wake import Ear
from lamsonq.backends.sqlite_workers import Life
from lamsonq.errors import BrokerError, Dead, LeaseLost, QueueError, SettingsError
from lamsonq.jobs import Job, Limit, Outcome, Put

REAP_EVERY = 5.0
"""Seconds between two looks for dead workers."""


def open_queue(url: str, *, pop_limit: int = 0, oversize_dir: str | None = None) -> SQLite:
    """The backend that `sqlite:PATH?queue=NAME` names."""
    return SQLite(url, pop_limit=pop_limit, oversize_dir=oversize_dir)


def _parsed(url: str) -> tuple[str, str]:
    """Path and queue."""
    path, _, query = url.removeprefix("sqlite:").partition("?")
    path = unquote(path[2:] if path.startswith("//") else path)
    if not path:
        raise BrokerError(f"{url!r} names no file: it is sqlite:run/q.db?queue=NAME")
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(parameters) - {"queue"}):
        raise BrokerError(f"{url!r}: a sqlite: queue knows no parameter {unknown[0]!r}; it knows: queue")
    return os.path.abspath(path), parameters.get("queue") or "jobs"


class SQLite(Kept):
    """A queue in a SQLite file; see lamsonq.jobs.Backend. `now` tells seconds since the epoch."""

    capabilities = frozenset({"processes", "limits", "transactions"})

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
        self._limits: tuple[Limit, ...] = ()
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """The state of a process that has claimed nothing yet."""
        self._lock = threading.Lock()
        self._life: Life | None = None
        self._numbers = itertools.count(1)
        self._held: set[str] = set()  # our claims that are not settled
        self._suspect = ""  # the one of them whose worker died before
        self._quiet = self._passed_over = False  # what sqlite_claims.Claimed says
        self._keep_up_at = self._tidy_at = 0.0
        self._ear = Ear(f"{self._database.path}-wal", self._database.turn)
        self._bodies = Bodies(self._database, self._worker)
        self._outgoing = Outgoing(self._database)

    @property
    def address(self) -> str:
        """The URL that opens this queue wherever the process runs."""
        return f"sqlite:{quote(self._database.path)}?queue={quote(self.queue, safe='')}"

    def _worker(self) -> str:
        with self._lock:
            if self._life is None:
                self._database.users.add(self)
                self._life = Life(self._database)
            return self._life.id

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
        with self._about(puts):
            joined = None if conn is None else sqlite_settle.joins(conn, self._database.path)
            if joined is not None:
                write = partial(self._bodies.write, rows)
                with self._doubting(rows):
                    results = sqlite_settle.put_on(joined, rows, self._database.path, write)
                self._bodies.doubt(rows)  # until the user commits
            elif rows:
                results = self._keep(rows)
            else:
                results = []
        return [result is not False for result in results]

    def _keep(self, rows: Sequence[Row]) -> list[bool | None]:
        with self._doubting(rows):
            self._write_bodies(rows)
            results = self._database.write(
                lambda connection: [insert(connection, row) for row in rows], durable=True, size=_size(rows)
            )
        self._bodies.doubt(row for row, result in zip(rows, results, strict=True) if not result)
        return results

    def _write_bodies(self, rows: Sequence[Row]) -> None:
        if any(len(row.job.body) > INLINE_MAX for row in rows):
            self._database.ensure()
            self._bodies.write(rows)

    @contextlib.contextmanager
    def _doubting(self, rows: Sequence[Row]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._bodies.doubt(rows)
            raise

    @contextlib.contextmanager
    def _about(self, data: object = None) -> Iterator[None]:
        """A QueueError tells what was to be queued."""
        try:
            yield
        except QueueError as error:
            error.data = data
            raise
        except OSError as error:
            raise told(self.name, error, data) from error

    # -- reserving ---------------------------------------------------------------------------------------------

    def reserve(self, n: int, wait: float = 0.0, *, only: Collection[str] | None = None) -> list[Job]:
        """Raises QueueError."""
        until = time.monotonic() + wait
        with self._about():
            while True:
                self._keep_up()
                if wait > 0:
                    self._ear.listen()
                jobs = self._take(n, only) if n > 0 and self._is_something_ready() else []
                left = until - time.monotonic()
                if jobs or n <= 0 or left <= 0 or self._sleep(left):
                    return jobs

    def wait(self, seconds: float) -> None:
        """Raises QueueError."""
        until = time.monotonic() + seconds
        with self._about():
            while True:
                self._keep_up()
                self._ear.listen()
                left = until - time.monotonic()
                if (self._is_something_ready() and not self.paused()) or left <= 0 or self._sleep(left):
                    return

    def _sleep(self, seconds: float) -> bool:
        """Until something is written, `wake` or the time at which a job is due; whether it was `wake`."""
        query = "select min(due) - :now from jobs where queue = :queue and state = 'delayed' and due > :now"
        [[until_due]] = self._rows(query)
        return self._ear.sleep(min(seconds, REAP_EVERY, *([] if until_due is None else [until_due])))

    def wake(self) -> None:
        self._ear.wake()

    def _is_something_ready(self) -> bool:
        if self._quiet and self._held:
            return False
        parts = ("state = 'ready' and deliveries = 0", "state = 'ready' and deliveries > 0")
        exists = (f"exists (select 1 from jobs where queue = :queue and {part})" for part in parts)
        due = "exists (select 1 from jobs where queue = :queue and state = 'delayed' and due <= :now)"
        [[found]] = self._rows(f"select {' or '.join(exists)} or {due}")
        return bool(found)

    def _take(self, n: int, only: Collection[str] | None) -> list[Job]:
        while True:
            with self._lock:
                has_jobs, has_suspect = bool(self._held), bool(self._suspect)
            asked = Asked(self.queue, n, only, self._now(), self._token(), has_jobs, has_suspect, self._limits)
            claimed = self._database.write(partial(sqlite_claims.take, asked=asked), rings=False)
            with self._lock:
                self._held.update(token for _, _, _, token in claimed.jobs)
                self._suspect = claimed.suspect or self._suspect
                self._quiet, self._passed_over = claimed.quiet, claimed.passed_over
            jobs = self._open(claimed)
            if jobs or not (claimed.more or claimed.jobs):
                return jobs

    def _token(self) -> Callable[[int], str]:
        worker, numbers = self._worker(), self._numbers
        return lambda row: f"{worker}/{next(numbers)}.{row}"

    def claim(self, key: str) -> Job | None:
        with self._about():
            act = partial(sqlite_claims.claim_one, queue=self.queue, key=key, token=self._token(), now=self._now())
            claimed = self._database.write(act)
            with self._lock:
                self._held.update(token for _, _, _, token in claimed.jobs)
            jobs = self._open(claimed)
        return jobs[0] if jobs else None

    def _open(self, claimed: Claimed) -> list[Job]:
        """The jobs as their worker sees them; those that cannot be read become dead letters."""
        jobs = []
        for row, body, file, token in claimed.jobs:
            try:
                content = sqlite_bodies.read(self._database, file) if file else body_of(body)
                jobs.append(job_of(row, content, token))
            except FileNotFoundError:
                self._bury(row, token, f"its body, {file} in {self._database.bodies}, is gone")
            except ValueError as error:
                self._bury(row, token, str(error))
            except OSError:  # this machine is short of something just now
                for _, _, _, claim in claimed.jobs:
                    self._give_back(claim)
                raise
        return jobs

    def _bury(self, row: tuple[Any, ...], token: str, reason: str) -> None:
        key = text_of(row[sqlite_claims.KEY]) or ""
        logging.error("Job %s of %s is a dead letter: %s", key, self.name, reason)
        with contextlib.suppress(LeaseLost):
            self.settle(Job(key=key, body=b"", attempts=row[12], claim=token), Dead(reason))

    def _give_back(self, token: str) -> None:
        back = "update jobs set state = 'ready', token = '', deliveries = max(deliveries - 1, 0) where token = ?"
        self._database.write(lambda connection: connection.execute(back, (token,)) and None)
        self._settled(token)

    # -- settling ----------------------------------------------------------------------------------------------

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        """Raises LeaseLost, and QueueError when nothing was settled."""
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
            kept = [insert(connection, row) for row in rows.values()]
            return kept, write_down(connection, worker, list(others.values()))

        durable = bool(others) or any(len(row.job.body) > INLINE_MAX for row in rows.values())
        try:
            with self._about(puts), self._doubting(list(rows.values())):
                self._write_bodies(list(rows.values()))
                kept, numbers = self._database.write(act, durable=durable, size=_size(rows.values()))
        except LeaseLost:
            self._settled(job.claim)
            raise
        self._settled(job.claim)
        self._bodies.doubt(row for row, result in zip(rows.values(), kept, strict=True) if not result)
        results = {number: result is not False for number, result in zip(rows, kept, strict=True)}
        handed = self._outgoing.hand_over(dict(zip(numbers, others.values(), strict=True))) if others else {}
        results.update(zip(others, (handed[number] for number in numbers), strict=True))
        if len(job.body) > INLINE_MAX and time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + 1
            sqlite_bodies.tidy(self._database)
        return [results[number] for number in range(len(puts))]

    def _settled(self, claim: str) -> None:
        with self._lock:
            self._held.discard(claim)
            if claim == self._suspect:
                self._suspect = ""
            wake = (self._quiet and not self._held) or (self._passed_over and not self._suspect)
        if wake:
            self.wake()

    def touch(self, job: Job) -> None:
        query = "select 1 from jobs where id = ? and token = ? and state = 'reserved'"
        if not self._database.rows(query, sqlite_settle.row_number(job), job.claim):
            raise LeaseLost(f"job {job.key} of {self.name} was settled or taken by somebody else")

    # -- workers -------------------------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        """Now and then: look for dead workers, and mend what nobody else does."""
        now = time.monotonic()
        if now >= self._keep_up_at:
            self._keep_up_at = now + REAP_EVERY
            self.release_stale()
            self._outgoing.retry()
            self._bodies.settle_doubts()
            sqlite_bodies.tidy(self._database)

    def release_stale(self) -> int:
        """Raises QueueError, also when the queue could not be written."""
        now = self._now()

        def mend(connection: Any) -> None:
            connection.execute("delete from lamsonq_gates where until < ?", (now,))
            sqlite_lanes.mend(connection, self.queue, self._limits, now)

        with self._about():
            self._database.write(mend)
            life = self._life
            if life is not None and not life.is_known():  # somebody has deleted its file: what we have is lost to us
                self._life = None
                life.forget()
            own = None if self._life is None else self._life.id
            return sqlite_workers.bury_dead(self._database, own, now, self._outgoing.inherit)

    def forgive(self) -> None:
        if self._life is not None:
            sqlite_workers.forgive(self._database, self._life.id)

    def limit(self, limits: Sequence[Limit]) -> None:
        self._limits = tuple(limits)
        self._keep_up_at = 0.0
        self.wake()

    def close(self) -> None:
        """Claims go back uncounted. Another `reserve` starts anew."""
        if self._life is not None:
            try:
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


def _size(rows: Collection[Row]) -> int:
    return sum(len(row.job.body) for row in rows if row.file is None)


_all: weakref.WeakSet[SQLite] = weakref.WeakSet()


def _forget_all() -> None:
    for queue in list(_all):
        queue.forget()


os.register_at_fork(after_in_child=_forget_all)
