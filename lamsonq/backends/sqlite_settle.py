"""What becomes of the row of a job that is settled; and puts on the user's own connection.

Rules: each statement names the claim, so that who has lost it changes nothing. A settle sets the deliveries to zero,
because the worker has lived; only what is given back uncounted keeps those that it had before this claim.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from lamsonq.backends import sqlite_schema
from lamsonq.backends.sqlite_errors import TROUBLE, told
from lamsonq.backends.sqlite_lanes import leave
from lamsonq.backends.sqlite_rows import COUNT_MAX, Row, insert, readable
from lamsonq.errors import Dead, Later, LeaseLost, QueueError
from lamsonq.jobs import Done, Expired, Job, Outcome, due_after
from lamsonq.reports import entry_of

_CLAIMED = "where id = ? and token = ? and state = 'reserved'"
_GONE = f"delete from jobs {_CLAIMED}"
_KEPT = f"update jobs set state = 'done', token = '', since = ?, deliveries = 0, due = null {_CLAIMED}"
_BACK = f"update jobs set state = ?, token = '', since = ?, deliveries = ?, due = ? {_CLAIMED}"
_FAILED = f"""
update jobs set state = ?, token = '', since = ?, deliveries = 0, attempts = ?, due = ?, report = report || ? {_CLAIMED}
"""


def row_number(job: Job) -> int:
    """The id of this claim's row; 0 when there is no claim."""
    number = job.claim.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def end(job: Job, outcome: Outcome, now: float) -> Callable[[sqlite3.Connection], None]:
    """The change that this outcome makes; it raises LeaseLost before it has changed anything."""
    number = row_number(job)
    statement, values = _change(job, outcome, now)

    def act(connection: sqlite3.Connection) -> None:
        if connection.execute(statement, (*values, number, job.claim)).rowcount != 1:
            raise lost(job)
        leave(connection, number, now)

    return act


def lost(job: Job) -> LeaseLost:
    """The claim of this job no longer holds."""
    return LeaseLost(f"job {job.key} was settled or taken by somebody else")


def _change(job: Job, outcome: Outcome, now: float) -> tuple[str, tuple[Any, ...]]:
    if isinstance(outcome, Expired) or (isinstance(outcome, Done) and not outcome.kept):
        return _GONE, ()
    if isinstance(outcome, Done):
        return _KEPT, (now,)
    if isinstance(outcome, Later) and not outcome.counted:
        due = outcome.at if outcome.at is not None and outcome.at > now else None
        return _BACK, ("ready" if due is None else "delayed", now, job.deliveries, due)
    attempts = min(job.attempts, COUNT_MAX) + 1
    report = readable(entry_of(outcome, attempts, now))
    if isinstance(outcome, Dead):
        return _FAILED, ("dead", now, attempts, None, report)
    return _FAILED, ("delayed", now, attempts, due_after(outcome, attempts, now), report)


def joins(conn: object, path: str) -> sqlite3.Connection | None:
    """The user's connection, if a put on it becomes valid with what he commits; None when it commits each statement at
    once. Raises QueueError for a connection that cannot be used."""
    if not isinstance(conn, sqlite3.Connection):
        raise QueueError(f"push(..., conn=...) takes a sqlite3.Connection to {path}, not {type(conn).__name__}")
    try:
        cursor = conn.cursor()
        cursor.row_factory = None
        found = cursor.execute("pragma database_list").fetchall()
    except sqlite3.Error as error:  # it is closed, or another thread's
        raise told(path, error) from error
    files = {os.fsdecode(name): os.fsdecode(file or "") for _, name, file in found}
    if not _same(files.get("main", ""), path):
        raise QueueError(
            f"this connection is to {files.get('main') or 'a database in memory'}, and the queue lies in {path}: "
            f"connect to that file, or name the queue sqlite:<your file>?queue=..."
        )
    autocommit = getattr(conn, "autocommit", None)  # of Python 3.12: True, False, or a number for the older way
    at_once = autocommit is True or (autocommit is not False and conn.isolation_level is None)
    return None if at_once and not conn.in_transaction else conn


def _same(file: str, path: str) -> bool:
    try:
        return os.path.samefile(file, path)
    except OSError:
        return False


def put_on(
    conn: sqlite3.Connection, rows: Sequence[Row], path: str, write_bodies: Callable[[], None]
) -> list[bool | None]:
    """Insert these rows in the user's transaction: all or none. Raises QueueError."""
    began = not conn.in_transaction
    try:
        if began:  # as Python does before the first statement that writes, but sure of the lock
            conn.execute("begin immediate")
        conn.execute("savepoint lamsonq")
        try:
            if not sqlite_schema.check(conn, path):
                sqlite_schema.create(conn)
            # From here on this connection has the write lock, so nobody takes the bodies for orphans.
            conn.execute("delete from lamsonq_doomed where 0")
            write_bodies()
            results = insert(conn, rows)
        except BaseException:
            conn.execute("rollback to lamsonq")
            raise
        finally:
            conn.execute("release lamsonq")
    except TROUBLE as error:
        if began and conn.in_transaction:
            conn.rollback()
        raise told(path, error) from error
    return results
