"""Where each sender is in each conversation, and who may move him.

Rules:

1. A state is the name of a function, kept under (state key, sender). Nothing kept means START.
2. One attempt at a time has a conversation: its lock is taken before the state is read and left after the attempt
   is settled. Threads of one process take turns in order of arrival; between processes the kernel holds the lock,
   so it ends with its process and no clock can break it.
3. A state is committed *before* the attempt is settled, together with the attempt's key and the state that it found.
   If the process dies between the two, the same message comes again: it is routed by the state that it found
   the first time, never by the one that it made itself (a confirmation that nobody sent).
4. What could not be settled is undone while the attempt still has its conversation: whoever comes next, with the same
   words or with others, finds what it found.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from lamsonq.errors import Refusal

START = "START"

BUSY_TIMEOUT = 10.0
"""Seconds to wait for another process that writes states."""

Conversation = tuple[str, str]
"""(state key, sender): what one state belongs to."""

Made = tuple[Mapping[Conversation, str], str]
"""The states that an attempt has made, and its key."""


class StateStorage:
    """The base for storages of one's own: `get`, `set` and `clear` are enough.

    `lock_file` is where the processes that share this storage lock conversations; None: they are one process.
    `commit`, `found_by`, `forget` and `undo` are for stores that can keep rules 3 and 4; without them a message that
    comes again after a crash or a refusal is routed by the newest state.
    """

    lock_file: str | None = "run/conversations.lock"

    def get(self, key: str, sender: str) -> str:
        """The state's name, "START" when nothing is kept."""
        raise NotImplementedError("a StateStorage has get(key, sender) -> str")

    def set(self, key: str, sender: str, state: str) -> None:
        """Keep the state; durable on return where the store is."""
        raise NotImplementedError("a StateStorage has set(key, sender, state)")

    def clear(self) -> None:
        """Forget everything."""
        raise NotImplementedError("a StateStorage has clear()")

    def commit(self, changes: Mapping[Conversation, str], job: str) -> None:  # noqa: ARG002 - stores with rule 3 use it
        """Keep all these states together; `job` is the key of the attempt that made them."""
        for (key, sender), state in changes.items():
            self.set(key, sender, state)

    def found_by(self, key: str, sender: str, job: str) -> str | None:  # noqa: ARG002
        """The state that this very job found when it changed it, if it was not settled since."""
        return None

    def look(self, key: str, sender: str, job: str) -> tuple[str, str | None]:
        """What `get` and `found_by` say: one question, where the store can answer both."""
        return self.get(key, sender), self.found_by(key, sender, job) if job else None

    def forget(self, changes: Mapping[Conversation, str], job: str) -> None:
        """The job is settled and will not come again."""

    def undo(self, changes: Mapping[Conversation, str], job: str) -> None:
        """The job came to nothing: what it found is the state again."""

    def commit_all(self, made: Sequence[Made]) -> None:
        """`commit` what several attempts have made. Where it raises, it is tried with each alone."""
        for changes, job in made:
            self.commit(changes, job)

    def forget_all(self, made: Sequence[Made]) -> None:
        """`forget` what several attempts have made."""
        for changes, job in made:
            self.forget(changes, job)


class MemoryStorage(StateStorage):
    """States of one process, gone with it."""

    lock_file = None

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self._found: dict[str, tuple[str, str]] = {}
        """The job that has changed a state and is not settled yet, and what it found; as in _COMMIT."""

    def key(self, key: str, sender: str) -> str:
        return repr([key, sender])

    def get(self, key: str, sender: str) -> str:
        return self.states.get(self.key(key, sender), START)

    def set(self, key: str, sender: str, state: str) -> None:
        self.commit({(key, sender): state}, "")

    def clear(self) -> None:
        self.states.clear()
        self._found.clear()

    def commit(self, changes: Mapping[Conversation, str], job: str) -> None:
        for (key, sender), state in changes.items():
            before = self.found_by(key, sender, job) or self.get(key, sender)
            self._keep(key, sender, state)
            if job:
                self._found[self.key(key, sender)] = job, before

    def found_by(self, key: str, sender: str, job: str) -> str | None:
        by, found = self._found.get(self.key(key, sender), ("", ""))
        return found if by == job != "" else None

    def forget(self, changes: Mapping[Conversation, str], job: str) -> None:
        for who in changes:
            if self.found_by(*who, job):
                del self._found[self.key(*who)]

    def undo(self, changes: Mapping[Conversation, str], job: str) -> None:
        for who in changes:
            if found := self.found_by(*who, job):
                self._keep(*who, found)

    def _keep(self, key: str, sender: str, state: str) -> None:
        """This, and no attempt that is to be settled."""
        who = self.key(key, sender)
        self._found.pop(who, None)
        if state == START:
            self.states.pop(who, None)
        else:
            self.states[who] = state


_SCHEMA_VERSION = 1
_SCHEMA = """
create table if not exists conversations (
    key    text not null,
    sender text not null,
    state  text not null,
    job    text not null default '',      -- who made this state and is not settled yet
    found  text not null default 'START', -- the state that this job found
    primary key (key, sender)
) without rowid
"""
_COMMIT = """
insert into conversations (key, sender, state, job) values (?1, ?2, ?3, ?4)
on conflict do update set state = ?3, job = ?4,
    -- A job that comes a second time still found what it found the first time.
    found = case when job = ?4 and job != '' then found else state end
"""
_FORGET = "update conversations set job = '' where key = ? and sender = ? and job = ?"
_UNDO = "update conversations set state = found, job = '' where key = ? and sender = ? and job = ?"
_TIDY = "delete from conversations where key = ? and sender = ? and state = 'START' and job = ''"


class _Write:
    """One thread's change on its way into the file. `waits`: it is to be durable before that thread goes on."""

    def __init__(self, execute: Callable[[sqlite3.Connection], object], *, waits: bool) -> None:
        self.execute = execute
        self.waits = waits
        self.done = False
        self.error: BaseException | None = None


class SQLiteStorage(StateStorage):
    """States in one SQLite file, shared by any number of processes; they survive restarts and power failures.

    Readers never wait for writers, and threads that write at the same time share one sync. Raises Refusal when the file
    cannot be used or was written by a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.lock_file = f"{self.path}-conversations"
        self._begin()
        _STORAGES.add(self)

    def _begin(self) -> None:
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._pending: deque[_Write] = deque()
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._synchronous = ""
        self._locked: list[threading.Lock] = []

    def get(self, key: str, sender: str) -> str:
        row = self._one("select state from conversations where key = ? and sender = ?", key, sender)
        return row[0] if row else START

    def set(self, key: str, sender: str, state: str) -> None:
        self.commit({(key, sender): state}, "")

    def clear(self) -> None:
        self._write(_Write(lambda database: database.execute("delete from conversations"), waits=True))

    def commit(self, changes: Mapping[Conversation, str], job: str) -> None:
        self.commit_all([(changes, job)])

    def commit_all(self, made: Sequence[Made]) -> None:
        rows = [(*who, state, job) for changes, job in made for who, state in changes.items()]
        self._write(_Write(lambda database: database.executemany(_COMMIT, rows), waits=True))

    def found_by(self, key: str, sender: str, job: str) -> str | None:
        return self.look(key, sender, job)[1]

    def look(self, key: str, sender: str, job: str) -> tuple[str, str | None]:
        row = self._one("select state, found, job from conversations where key = ? and sender = ?", key, sender)
        if row is None:
            return START, None
        state, found, by = row
        return state, found if by == job != "" else None

    def forget(self, changes: Mapping[Conversation, str], job: str) -> None:
        self.forget_all([(changes, job)])

    def forget_all(self, made: Sequence[Made]) -> None:
        rows = [(*who, job) for changes, job in made for who in changes]
        over = [who for changes, _ in made for who, state in changes.items() if state == START]

        def execute(database: sqlite3.Connection) -> None:
            database.executemany(_FORGET, rows)
            database.executemany(_TIDY, over)

        # Losing this to a power failure is harmless: the job only stays remembered. So nobody waits for it.
        self._write(_Write(execute, waits=False))

    def undo(self, changes: Mapping[Conversation, str], job: str) -> None:
        def execute(database: sqlite3.Connection) -> None:
            database.executemany(_UNDO, [(*who, job) for who in changes])
            database.executemany(_TIDY, list(changes))

        self._write(_Write(execute, waits=True))  # whoever has the conversation next reads it at once

    def _one(self, query: str, *values: str) -> tuple[str, ...] | None:
        with self._reading:
            if self._reader is None:
                self._reader = self._open()
            row: tuple[str, ...] | None = self._reader.execute(query, values).fetchone()
            return row

    def _write(self, write: _Write) -> None:
        """Whoever gets the lock writes for all that wait for it; what nobody waits for goes along."""
        self._pending.append(write)
        while not write.done and self._writing.acquire(blocking=write.waits):
            self._write_pending()
        while self._pending and self._writing.acquire(blocking=False):
            self._write_pending()  # what came without waiting while the lock was ours
        if write.error is not None:
            raise write.error

    def _write_pending(self) -> None:
        """Write all that has come, and release the lock."""
        try:
            batch = [self._pending.popleft() for _ in range(len(self._pending))]
            if batch:
                self._write_batch(batch)
        finally:
            self._writing.release()

    def _write_batch(self, batch: list[_Write]) -> None:
        try:
            self._transaction(batch)
        except sqlite3.OperationalError as error:  # the file is locked, the disk full: the same for all
            for write in batch:
                write.error = error
        except Exception as error:  # one of them alone may be at fault
            for write in batch:
                write.error = error if len(batch) == 1 else self._alone(write)
        except BaseException:
            for write in batch:
                write.error = Refusal(f"writing to the state file {self.path} was interrupted")
            raise
        finally:
            for write in batch:
                write.done = True

    def _alone(self, write: _Write) -> BaseException | None:
        try:
            self._transaction([write])
        except Exception as error:  # handed to the thread that waits for it
            return error
        return None

    def _transaction(self, batch: list[_Write]) -> None:
        if self._writer is None:
            self._writer, self._synchronous = self._open(), ""
        database = self._writer
        synchronous = "full" if any(write.waits for write in batch) else "normal"
        if synchronous != self._synchronous:
            database.execute(f"pragma synchronous = {synchronous}")
            self._synchronous = synchronous
        database.execute("begin immediate")
        try:
            for write in batch:
                write.execute(database)
            database.execute("commit")
        except BaseException:
            if database.in_transaction:
                database.execute("rollback")
            raise

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._connect()
        except (sqlite3.Error, OSError) as error:
            raise Refusal(f"cannot open the state file {self.path}: {error}; check its folder") from error

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        give_up_at = time.monotonic() + BUSY_TIMEOUT
        try:
            while True:
                try:
                    self._prepare(database)
                except sqlite3.OperationalError as error:
                    # Who makes a file anew finds it locked by others who do, and SQLite waits for none of them.
                    if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > give_up_at:
                        raise
                    time.sleep(0.01)
                else:
                    return database
        except BaseException:
            database.close()
            raise

    def _prepare(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("pragma user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise Refusal(f"{self.path} was written by a newer lamsonq (schema {version}); it is left untouched")
        database.execute("pragma journal_mode = wal")
        if version < _SCHEMA_VERSION:
            database.execute(_SCHEMA)
            database.execute(f"pragma user_version = {_SCHEMA_VERSION}")

    def _before_fork(self) -> None:
        """No connection may be open at a fork: SQLite would share it with the child's, and the kernel drops its locks
        there (lamsonq/backends/sqlite_database.py, rule 5)."""
        self._locked = [lock for lock in (self._reading, self._writing) if lock.acquire(timeout=5)]
        if len(self._locked) == 2:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    with suppress(sqlite3.Error):
                        connection.close()
            self._reader = self._writer = None

    def _after_fork(self) -> None:
        for lock in self._locked:
            lock.release()
        self._locked = []

    def _forked(self) -> None:
        _ABANDONED.extend([self._reader, self._writer])  # what was busy: neither to be used here nor closed
        self._begin()


_ABANDONED: list[sqlite3.Connection | None] = []
_STORAGES: WeakSet[SQLiteStorage] = WeakSet()


def _before_fork() -> None:
    for storage in list(_STORAGES):
        storage._before_fork()


def _after_fork() -> None:
    for storage in list(_STORAGES):
        storage._after_fork()


def _in_child() -> None:
    for storage in list(_STORAGES):
        storage._forked()
    for conversations in list(_CONVERSATIONS):
        conversations._forked()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


class Conversations:
    """Who has which conversation now (rule 2)."""

    def __init__(self, lock_file: str | None) -> None:
        self._path = lock_file
        self._file: int | None = None
        self._lines: dict[Conversation, deque[Callable[[], None]]] = {}
        self._lock = threading.Lock()
        _CONVERSATIONS.add(self)

    def enter(self, who: Conversation, resume: Callable[[], None]) -> bool:
        """Take the conversation, or get in line: False means that `resume` is called once, from the thread of
        whoever leaves, and that the conversation is the caller's from then on."""
        with self._lock:
            line = self._lines.get(who)
            if line is None:
                self._lines[who] = deque()
                return True
            line.append(resume)
            return False

    def withdraw(self, who: Conversation, resume: Callable[[], None]) -> bool:
        """Get out of the line; False when the turn has come already."""
        with self._lock:
            try:
                self._lines[who].remove(resume)
            except (KeyError, ValueError):
                return False
            return True

    def lock(self, who: Conversation) -> bool:
        """Lock out the other processes; False when one of them has this conversation. Only after `enter`."""
        if self._path is None:
            return True
        try:
            fcntl.fcntl(self._descriptor(), fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, who))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def leave(self, who: Conversation) -> None:
        """Unlock, and call whoever is next in line."""
        if self._file is not None:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, who))
        with self._lock:
            line = self._lines[who]
            resume = line.popleft() if line else None
            if resume is None:
                del self._lines[who]
        if resume is not None:
            resume()

    def _descriptor(self) -> int:
        with self._lock:
            if self._file is None:
                assert self._path is not None
                Path(self._path).parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            return self._file

    def _forked(self) -> None:
        # The locks belong to the open file, which a child shares: without this a child would keep them alive.
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._lines = {}
        self._lock = threading.Lock()


_CONVERSATIONS: WeakSet[Conversations] = WeakSet()


def _flock(kind: int, who: Conversation) -> bytes:
    """One byte of the lock file per conversation, at an offset that is its hash (struct flock, fcntl(2))."""
    digest = hashlib.blake2b(repr(who).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    offset = int.from_bytes(digest, "big") >> 2
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, 1, 0)
