"""One SQLite file as the threads of this process use it together.

Rules:

1. Threads that write at the same time share one transaction and one sync: whoever comes first writes for all that wait,
   up to a bound. What has to survive a power failure is written at synchronous=FULL; the rest at NORMAL, where a power
   failure undoes the last transactions whole. One write alone goes straight through.
2. When a shared transaction fails, it is rolled back, and each write is tried alone once: one that cannot be written
   takes no other with it. A write is a function of the connection that changes nothing else, so it may run twice.
3. Processes line up at a lock of the kernel's (flock), which wakes the next at once; SQLite itself would sleep and try
   again. Who claims or settles and finds it taken steps aside for a moment first: so each does several in a row.
   Programs that do not know that lock are waited for by SQLite's busy_timeout.
4. No cursor is open, and no transaction, when a method has returned.
5. No connection is open at a fork. SQLite knows of one by the process's memory, but the kernel drops its locks in the
   child: one that is opened there would share it, hold no lock, and lose its -wal to whoever closes the file next.
6. A file that was removed or replaced while it was open is opened anew, before anything is written to the lost one.
7. On a full disk the -wal can grow no more, but what it has can be copied into the file, mostly over pages that are
   there: then it is written anew from its beginning. So what waits can still be worked, which makes room.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from lamsonq.backends import sqlite_schema
from lamsonq.backends.durable import make_folders, sync_folder
from lamsonq.backends.sqlite_errors import TROUBLE, told
from lamsonq.errors import LeaseLost, QueueError

BATCH_MAX = 256
BATCH_BYTES = 8 << 20
BUSY_TIMEOUT = 10.0
"""Seconds to wait for a program that has the file locked."""

STEP_ASIDE = 0.001
"""Seconds for which a process that finds another one writing lets it go on, unless somebody waits for the sync. To take
turns at each write costs a wake-up each time, and the pages that one has in memory and the other has changed: two that
claim and settle did 5,300 jobs a second so, and do 7,400."""

FORK_PATIENCE = 5.0
"""Seconds that a fork waits for what is being read or written."""

_WAL_KEPT = 64 << 20
_T = TypeVar("_T")


class _Write:
    """One thread's change on its way into the file."""

    __slots__ = ("act", "done", "durable", "error", "result", "rings", "size")

    def __init__(self, act: Callable[[sqlite3.Connection], Any], durable: bool, size: int, rings: bool) -> None:
        self.act, self.durable, self.size, self.rings = act, durable, size, rings
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class Database:
    """The file at `path`; opened when it is first used."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        """The queues that are at work in it: when the last has left, the file is closed."""
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._pending: deque[_Write] = deque()
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._turn: int | None = None
        self._durable: bool | None = None
        self._inode = 0
        self._locked: list[threading.Lock] = []

    @property
    def bodies(self) -> str:
        """The folder of the large bodies."""
        return f"{self.path}-bodies"

    @property
    def workers(self) -> str:
        """The folder of the locks that tell who lives."""
        return f"{self.path}-workers"

    @property
    def turn(self) -> str:
        """The file at which processes line up to write, and by which they wake each other."""
        return os.path.join(self.workers, "turn")

    # -- writing -----------------------------------------------------------------------------------------------

    def write(
        self, act: Callable[[sqlite3.Connection], _T], *, durable: bool = False, size: int = 0, rings: bool = True
    ) -> _T:
        """What `act` returns, once its changes are committed; with `rings`, sleepers hear of it. Raises QueueError, and
        what `act` raises: LeaseLost only before it has changed anything."""
        write = _Write(act, durable, size, rings)
        self._pending.append(write)
        while not write.done:
            with self._writing:
                if not write.done:
                    self._write_pending()
        if isinstance(write.error, TROUBLE):
            raise told(self.path, write.error) from write.error
        if write.error is not None:
            raise write.error
        result: _T = write.result
        return result

    def _write_pending(self) -> None:
        batch: list[_Write] = []
        size = 0
        while self._pending and len(batch) < BATCH_MAX and (size < BATCH_BYTES or not batch):
            batch.append(self._pending.popleft())
            size += batch[-1].size
        if not batch:
            return
        try:
            try:
                self._transaction(batch)
            except Exception as error:
                for write in batch:
                    write.error = error if len(batch) == 1 else self._alone(write)
        except BaseException:
            for write in batch:
                write.error = write.error or QueueError(f"writing to {self.path} was interrupted")
            raise
        finally:
            for write in batch:
                write.done = True

    def _alone(self, write: _Write) -> Exception | None:
        try:
            self._transaction([write])
        except Exception as error:  # handed to the thread that waits for it
            return error
        return None

    def _transaction(self, batch: list[_Write]) -> None:
        """All of these, or none."""
        try:
            self._commit(batch)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not self._has_emptied_log():
                raise
            self._commit(batch)

    def _has_emptied_log(self) -> bool:
        """Rule 7; whether it could be done."""
        try:
            [(busy, written, copied)] = self._opened().execute("pragma wal_checkpoint(passive)").fetchall()
        except sqlite3.Error:
            return False
        return not busy and bool(written == copied)

    def _commit(self, batch: list[_Write]) -> None:
        database = self._opened()
        durable = rings = False
        for write in batch:
            durable, rings = durable or write.durable, rings or write.rings
        if durable != self._durable:
            database.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
            self._durable = durable
        before = database.total_changes
        turn = self._take_turn(STEP_ASIDE if not durable else 0.0)
        try:
            database.execute("begin immediate")
            for write in batch:
                write.error = None
                try:
                    write.result = write.act(database)
                except LeaseLost as error:  # it has changed nothing, so the others need not begin again
                    write.error = error
            database.execute("commit")
        except BaseException:
            if database.in_transaction:
                with suppress(sqlite3.Error):
                    database.execute("rollback")
            raise
        finally:
            fcntl.flock(turn, fcntl.LOCK_UN)
        if rings and database.total_changes != before:
            self._ring(turn)

    def _ring(self, turn: int) -> None:
        try:
            os.pwrite(turn, b"!", 0)
        except OSError:  # who sleeps looks now and then
            return

    def _take_turn(self, aside: float = 0.0) -> int:
        if self._turn is None:
            self._turn = os.open(self.turn, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(aside)
            fcntl.flock(self._turn, fcntl.LOCK_EX)
        return self._turn

    # -- reading -----------------------------------------------------------------------------------------------

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Raises QueueError."""
        try:
            with self._reading:
                reader = self._reader  # who writes may find just now that the file has moved, and take it away
                if reader is None or self._moved():
                    with self._writing:
                        self._opened()
                    reader = self._reader = self._connect()
                bound = values[0] if values and isinstance(values[0], dict) else values
                return reader.execute(query, bound).fetchall()
        except TROUBLE as error:
            raise told(self.path, error) from error

    def ensure(self) -> None:
        """The file and its tables are there. Raises QueueError."""
        self.rows("select 1")

    # -- opening -----------------------------------------------------------------------------------------------

    def _moved(self) -> bool:
        try:
            return os.stat(self.path).st_ino != self._inode
        except FileNotFoundError:
            return True

    def _opened(self) -> sqlite3.Connection:
        """The connection that writes; the caller has `_writing`."""
        if self._writer is not None and not self._moved():
            return self._writer
        for lost in (self._writer, self._reader):
            if lost is not None:
                _ABANDONED.append(lost)  # to close it would remove the -wal of the file that took its place
        self._writer = self._reader = None
        if self._turn is not None:
            os.close(self._turn)
            self._turn = None
        make_folders([self.bodies, self.workers])
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        parent = os.path.dirname(self.path)
        for folder in (parent, os.path.dirname(parent)):
            with suppress(PermissionError):  # a parent that is not ours to read was there before
                sync_folder(folder)
        self._durable = None
        database = self._connect()
        try:
            turn = self._take_turn()
            try:
                self._prepare(database)
            finally:
                fcntl.flock(turn, fcntl.LOCK_UN)
        except BaseException:
            database.close()
            raise
        self._inode = os.stat(self.path).st_ino
        self._writer = database
        return database

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        database.execute("pragma secure_delete = fast")  # what is deleted is not written once more as zeros
        database.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        if not sqlite_schema.check(database, self.path):
            database.execute("pragma journal_mode = wal")
            database.execute("pragma synchronous = full")
            database.execute("begin immediate")
            if not sqlite_schema.check(database, self.path):
                sqlite_schema.create(database)
            database.execute("commit")
        database.execute("pragma journal_mode = wal")
        database.execute(f"pragma journal_size_limit = {_WAL_KEPT}")

    def leave(self, user: object) -> None:
        """This queue is closed; the file too, when nobody else in this process is at work in it."""
        self.users.discard(user)
        if self.users:
            return
        with self._reading, self._writing:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    connection.close()
            self._reader = self._writer = None
            if self._turn is not None:
                os.close(self._turn)
                self._turn = None

    def before_fork(self) -> None:
        """Close the connections, unless they are busy for longer than FORK_PATIENCE."""
        self._locked = [lock for lock in (self._reading, self._writing) if lock.acquire(timeout=FORK_PATIENCE)]
        if len(self._locked) < 2:
            return
        for connection in (self._reader, self._writer):
            if connection is not None and self._moved():
                _ABANDONED.append(connection)
            elif connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()
        self._reader = self._writer = None

    def after_fork(self) -> None:
        """In the parent: go on."""
        for lock in self._locked:
            lock.release()
        self._locked = []

    def forget(self) -> None:
        """In a forked child."""
        _ABANDONED.extend(connection for connection in (self._reader, self._writer) if connection is not None)
        if self._turn is not None:
            os.close(self._turn)
        self._begin()


_ABANDONED: list[sqlite3.Connection] = []
_all: weakref.WeakSet[Database] = weakref.WeakSet()
_by_path: weakref.WeakValueDictionary[str, Database] = weakref.WeakValueDictionary()
_finding = threading.Lock()


def database_at(path: str) -> Database:
    """The one object for this file in this process."""
    path = os.path.realpath(path)
    with _finding:
        found = _by_path.get(path)
        if found is None:
            found = _by_path[path] = Database(path)
        return found


def _forget_all() -> None:
    global _finding
    _finding = threading.Lock()
    for database in list(_all):
        database.forget()
    _forking.clear()


def _before_fork() -> None:
    _forking[:] = _all
    for database in _forking:
        database.before_fork()


def _after_fork() -> None:
    for database in _forking:
        database.after_fork()
    _forking.clear()


_forking: list[Database] = []
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget_all)
