"""Large bodies, each in a file beside the database.

Rules:

1. A body over 128 KiB is written and synced before its row is: a row that can be seen has its body.
2. A file is named after the worker that wrote it, which lives while the file may be without a row: whoever finds the
   worker dead removes what no row names. No clock is asked.
3. The row goes first, at synchronous=FULL, the file after: a trigger notes each file whose row has gone, in the same
   transaction, whoever deleted it; `tidy` makes that durable, unlinks, and strikes the note.
"""

from __future__ import annotations

import itertools
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence

from lamsonq.backends.durable import make_folders, remove_file, write_files
from lamsonq.backends.sqlite_database import Database
from lamsonq.backends.sqlite_rows import Row
from lamsonq.errors import QueueError

INLINE_MAX = 128 << 10
"""Bytes that a body may have in the database: above it a file is faster."""

_AT_ONCE = 500


class Bodies:
    """The files of one worker. `worker` gives its id, and lives from then on."""

    def __init__(self, database: Database, worker: Callable[[], str]) -> None:
        self._database, self._worker = database, worker
        self._numbers = itertools.count(1)
        self._doubtful: set[str] = set()

    def write(self, rows: Iterable[Row]) -> None:
        """Write those of these bodies that are large. Raises OSError."""
        files: dict[str, Sequence[bytes]] = {}
        for row in rows:
            if len(row.job.body) > INLINE_MAX:
                row.file = f"{self._worker()}.{next(self._numbers)}"
                files[os.path.join(self._database.bodies, row.file)] = (row.job.body,)
        if files:
            try:
                write_files(files.items(), self._database.bodies)
            except FileNotFoundError:  # somebody has removed the folder
                make_folders([self._database.bodies])
                write_files(files.items(), self._database.bodies)

    def doubt(self, rows: Iterable[Row]) -> None:
        """It is not certain that these rows are in the database, or will be: the put has failed, or is the user's."""
        self._doubtful.update(row.file for row in rows if row.file)

    @property
    def doubtful(self) -> bool:
        """Whether there is something for `settle_doubts`."""
        return bool(self._doubtful)

    def settle_doubts(self) -> None:
        """Remove what has come into no row."""
        if self._doubtful:
            doubtful = set(self._doubtful)
            sweep(self._database, doubtful)
            self._doubtful -= doubtful


def read(database: Database, file: str) -> bytes:
    """Raises OSError."""
    with open(os.path.join(database.bodies, os.path.basename(file)), "rb") as body:
        return body.read()


def of_worker(database: Database, worker: str) -> set[str]:
    """The files that this worker has written."""
    try:
        return {name for name in os.listdir(database.bodies) if name.rpartition(".")[0] == worker}
    except FileNotFoundError:
        return set()


def sweep(database: Database, files: Iterable[str]) -> None:
    """Remove those of these files that no row names. A transaction that has put a row and is not yet committed keeps us
    out, so none of them can still get one."""

    def orphans(connection: sqlite3.Connection) -> list[str]:
        query = "select 1 from jobs where file = ?"
        return [file for file in files if not connection.execute(query, (file,)).fetchall()]

    if files:
        for file in database.write(orphans):
            remove_file(os.path.join(database.bodies, file))


def tidy(database: Database) -> None:
    """Remove the bodies of jobs that are gone (rule 3); what fails is done another time."""
    try:
        while doomed := database.rows(f"select file from lamsonq_doomed limit {_AT_ONCE}"):
            _tidy(database, doomed)
            if len(doomed) < _AT_ONCE:
                return
    except QueueError as error:
        logging.warning("Bodies of jobs that are gone stay for now: %s", error)


def _tidy(database: Database, doomed: list[tuple[str]]) -> None:
    def touch(connection: sqlite3.Connection) -> None:
        # Something must be written for a sync, and then all that was committed before it is durable too.
        connection.execute("update lamsonq_doomed set file = file where file = ?", doomed[0])

    def strike(connection: sqlite3.Connection) -> None:
        connection.executemany("delete from lamsonq_doomed where file = ?", doomed)

    database.write(touch, durable=True)
    for [file] in doomed:
        remove_file(os.path.join(database.bodies, os.path.basename(str(file))))  # the file may be damaged
    database.write(strike)
