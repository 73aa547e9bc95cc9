"""Who works, and what becomes of the claims of a worker that has died.

Rules: a claim holds exactly as long as the process of its worker lives (lives.py); its token begins with the worker's
id. Of a dead worker everything is put right before its lock file goes: its claims are given back, counted, or buried;
what a tool had claimed by its key goes back as it was; what it had put into other stores is handed over; the bodies
that it has written for nothing are removed.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lamsonq.backends import sqlite_bodies
from lamsonq.backends.durable import make_folders, remove_file
from lamsonq.backends.lives import LOCK, new_lock, take_lock
from lamsonq.backends.sqlite_claims import taken_from
from lamsonq.backends.sqlite_database import Database
from lamsonq.backends.sqlite_lanes import leave
from lamsonq.backends.sqlite_rows import readable
from lamsonq.errors import Dead
from lamsonq.jobs import DELIVERIES_MAX, killed
from lamsonq.reports import entry_of

LOG = logging.getLogger()
"""The root logger, as in the rest of the queue."""

_GIVE_BACK = "update jobs set state = 'ready', token = '', since = ? where id = ?"
_PUT_BACK = "update jobs set state = ?, token = '', since = ? where id = ?"
_BURY = "update jobs set state = 'dead', token = '', since = ?, report = report || ? where id = ?"


class Life:
    """This worker's life, as the others see it."""

    def __init__(self, database: Database) -> None:
        """Raises OSError."""
        try:
            self.id, self._fd = new_lock(database.workers)
        except FileNotFoundError:
            make_folders([database.workers])
            self.id, self._fd = new_lock(database.workers)
        self._path = os.path.join(database.workers, self.id + LOCK)
        # The file stays, for whoever puts right what this worker leaves behind.
        self._finalizer = weakref.finalize(self, os.close, self._fd)

    def is_known(self) -> bool:
        """Whether the others can see it: somebody may have deleted the file."""
        return os.fstat(self._fd).st_nlink > 0

    def end(self) -> None:
        """There is nothing to be put right."""
        remove_file(self._path)
        self.forget()

    def forget(self) -> None:
        """In a forked child: the worker is the parent."""
        self._finalizer()


@contextmanager
def _lock_of(database: Database, worker: str, *, new: bool) -> Iterator[str | None]:
    path = os.path.join(database.workers, worker + LOCK)
    fd = take_lock(path, new=new)
    try:
        yield None if fd is None else path
    finally:
        if fd is not None:
            os.close(fd)


def bury_dead(database: Database, own: str | None, now: float, hand_over: Callable[[str], bool]) -> int:
    """Put right what dead workers have left; how many claims they had. `hand_over` deals with what such a worker has
    put into other stores, and tells whether nothing is left of it."""
    names = set(os.listdir(database.workers))
    locked = {name.removesuffix(LOCK) for name in names if name.endswith(LOCK)}
    claiming = "select distinct substr(token, 1, instr(token, '/') - 1) from jobs where state = 'reserved'"
    others = {worker for [worker] in database.rows(f"{claiming} union select worker from lamsonq_outgoing")}
    found = 0
    for worker in sorted((locked | others) - {own, ""}):
        with _lock_of(database, worker, new=worker not in locked) as path:
            if path is not None:
                found += release(database, worker, now)
                handed_over = hand_over(worker)
                sqlite_bodies.sweep(database, sqlite_bodies.of_worker(database, worker))
                if handed_over:
                    remove_file(path)
    return found


def release(database: Database, worker: str, now: float, *, counted: bool = True) -> int:
    """Give back this worker's claims, or bury what has killed its workers; how many there were. Not `counted`: they
    are forgiven."""

    def act(connection: sqlite3.Connection) -> list[tuple[str, str, str, bool]]:
        query = (
            "select id, queue, key, deliveries, attempts, token from jobs"
            " where state = 'reserved' and token between ? and ?"
        )
        told = []
        for number, queue, key, deliveries, attempts, token in connection.execute(query, span(worker)).fetchall():
            origin = taken_from(token)
            killer = counted and not origin and deliveries >= DELIVERIES_MAX
            if origin:
                connection.execute(_PUT_BACK, (origin, now, number))
            elif killer:
                reason = Dead(killed(deliveries))
                connection.execute(_BURY, (now, readable(entry_of(reason, attempts + 1, now)), number))
            else:
                connection.execute(_GIVE_BACK, (now, number))
            leave(connection, number, now)
            told.append((queue, str(key), origin or ("dead" if killer else "ready"), killer))
        return told

    claims = database.write(act)
    for queue, key, state, killer in claims if counted else ():
        if killer:
            LOG.error("Job %s of %s is a dead letter: its worker died too often", key, queue)
        else:
            LOG.warning("The worker of job %s has died; it is %s again in %s", key, state, queue)
    return len(claims)


def forgive(database: Database, worker: str, since: int) -> None:
    """The claims of this worker from this number on no longer count."""
    update = "update jobs set deliveries = max(deliveries - 1, 0) where state = 'reserved' and token between ? and ?"
    update += " and token not like '%:%'"  # a tool's does not count as it is
    update += " and cast(substr(token, instr(token, '/') + 1) as integer) >= ?"
    database.write(lambda connection: connection.execute(update, (*span(worker), since)) and None)


def span(worker: str) -> tuple[str, str]:
    """Between which two texts the tokens of this worker lie."""
    return f"{worker}/", f"{worker}/:"  # a colon comes behind every digit
