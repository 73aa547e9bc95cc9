"""Queues, each in a process of its own: how many jobs of 5 KB are put, and taken and settled, in a second.

    python -m tests.bench.stores KIND FOLDER SIZE SECONDS PROCESSES

First all push, then all take, one job at a time. A push would survive a power failure wherever the library can do that;
huey and litequeue are told synchronous = FULL, and NORMAL for taking, as ours. Each measurement ends after SECONDS,
done or not, so that what is slow tells its rate as well. Runs under the interpreter that has the library; prints JSON.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

BODY = (b"From: a@example.org\r\nTo: b@example.org\r\nSubject: bench\r\n\r\n" + b"x" * 5000)[:5000]
FORK = multiprocessing.get_context("fork")


class Store(Protocol):
    """A queue in a folder, opened anew in each process."""

    def push(self) -> None:
        """Put one job."""

    def take(self) -> bool:
        """Take one job and settle it; False when there is none."""

    def hasten(self) -> None:
        """From here on without syncs: to fill it with what is not measured, or to take as the library does."""


Open = Callable[[str], Store]


class Ours:
    def __init__(self, url: str) -> None:
        from lamsonq.backends import open_backend
        from lamsonq.jobs import DONE, Job, Put

        self._queue, self._done, self._job, self._put = open_backend(url), DONE, Job, Put

    def push(self) -> None:
        fields: dict[str, Any] = {"sender": "a@example.org", "recipients": ("b@example.org",)}
        self._queue.put([self._put(self._queue, self._job(key=self._queue.new_key(), body=BODY, **fields))])

    def take(self) -> bool:
        jobs = self._queue.reserve(1)
        for job in jobs:
            self._queue.settle(job, self._done)
        return bool(jobs)

    def hasten(self) -> None:
        database = getattr(self._queue, "_database", None)
        if database is not None:
            write = database.write
            database.write = lambda act, **options: write(act, **{**options, "durable": False})


class Memory(Ours):
    def __init__(self, _: str) -> None:
        super().__init__("memory:bench")


class Maildir(Ours):
    def __init__(self, place: str) -> None:
        super().__init__(f"{place}/posts")


class SQLite(Ours):
    def __init__(self, place: str) -> None:
        super().__init__(f"sqlite:{place}/q.db?queue=posts")


class RawMaildir:
    """The system calls that a durable maildir cannot do without."""

    def __init__(self, place: str) -> None:
        self.folders = {name: f"{place}/raw/{name}" for name in ("tmp", "new", "cur")}
        for folder in self.folders.values():
            os.makedirs(folder, exist_ok=True)
        self.directory = os.open(self.folders["new"], os.O_RDONLY | os.O_DIRECTORY)
        self.number = 0
        self.listed: list[str] | None = None

    def push(self) -> None:
        self.number += 1
        name = f"{time.time():.6f}.{os.getpid()}Q{self.number}"
        file = os.open(f"{self.folders['tmp']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(file, BODY)
        os.fsync(file)
        os.close(file)
        os.rename(f"{self.folders['tmp']}/{name}", f"{self.folders['new']}/{name}")
        os.fsync(self.directory)

    def take(self) -> bool:
        if self.listed is None:
            self.listed = sorted((entry.name for entry in os.scandir(self.folders["new"])), reverse=True)
        while self.listed:
            name = self.listed.pop()
            claimed = f"{self.folders['cur']}/{name}"
            try:
                os.rename(f"{self.folders['new']}/{name}", claimed)
            except FileNotFoundError:  # the other process was faster
                continue
            with open(claimed, "rb") as file:
                file.read()
            os.unlink(claimed)
            return True
        return False

    def hasten(self) -> None:
        """os.fsync does nothing while the queue is filled."""


class RawSQLite:
    """The statements that a durable queue in SQLite cannot do without, each in a transaction of its own."""

    CLAIM = """update jobs set claimed = 1 where id = (select id from jobs where claimed = 0 order by id limit 1)
               returning id, body"""

    def __init__(self, place: str) -> None:
        self.database = sqlite3.connect(f"{place}/raw.db", isolation_level=None, timeout=30)
        self.database.execute("pragma journal_mode = wal")
        self.database.execute("create table if not exists jobs (id integer primary key, claimed default 0, body)")
        self.database.execute("create index if not exists ready on jobs (id) where claimed = 0")
        self.database.execute("pragma synchronous = full")

    def push(self) -> None:
        self.database.execute("insert into jobs (body) values (?)", (BODY,))

    def take(self) -> bool:
        if self.database.total_changes == 0:
            self.database.execute("pragma synchronous = normal")
        row = self.database.execute(self.CLAIM).fetchone()
        if row:
            self.database.execute("delete from jobs where id = ?", (row[0],))
        return row is not None

    def hasten(self) -> None:
        self.database.execute("pragma synchronous = off")


class HueySQLite:
    def __init__(self, place: str) -> None:
        self.storage: Any = importlib.import_module("huey.storage").SqliteStorage(
            filename=f"{place}/huey.db", fsync=True
        )
        self.storage.conn.execute("pragma synchronous = full")
        self.taking = False

    def push(self) -> None:
        self.storage.enqueue(BODY)

    def take(self) -> bool:
        if not self.taking:
            self.taking = True
            self.storage.conn.execute("pragma synchronous = normal")
        return self.storage.dequeue() is not None

    def hasten(self) -> None:
        self.storage.conn.execute("pragma synchronous = off")


class HueyFile:
    def __init__(self, place: str) -> None:
        self.storage: Any = importlib.import_module("huey.storage").FileStorage("bench", f"{place}/huey")

    def push(self) -> None:
        self.storage.enqueue(BODY)

    def take(self) -> bool:
        return self.storage.dequeue() is not None

    def hasten(self) -> None:
        """It never syncs."""


class PersistSQLite:
    def __init__(self, place: str) -> None:
        self.library: Any = importlib.import_module("persistqueue")
        self.queue = self.library.SQLiteAckQueue(f"{place}/persist", auto_commit=True)

    def push(self) -> None:
        self.queue.put(BODY)

    def take(self) -> bool:
        try:
            self.queue.ack(self.queue.get(block=False))
        except self.library.Empty:
            return False
        return True

    def hasten(self) -> None:
        self.queue._putter.execute("pragma synchronous = off")


class PersistFile:
    def __init__(self, place: str) -> None:
        self.library: Any = importlib.import_module("persistqueue")
        self.place = f"{place}/persist"
        self.queue = self.library.Queue(self.place, autosave=True)

    def push(self) -> None:
        self.queue.put(BODY)

    def take(self) -> bool:
        try:
            self.queue.get(block=False)
        except self.library.Empty:
            return False
        self.queue.task_done()  # which saves that it was taken
        return True

    def hasten(self) -> None:
        self.queue = self.library.Queue(self.place)


class Litequeue:
    def __init__(self, place: str) -> None:
        self.queue: Any = importlib.import_module("litequeue").LiteQueue(f"{place}/lite.db", timeout=30)
        self.queue.conn.execute("pragma synchronous = full")
        self.text, self.taking = BODY.decode(), False

    def push(self) -> None:
        self.queue.put(self.text)

    def take(self) -> bool:
        if not self.taking:
            self.taking = True
            self.queue.conn.execute("pragma synchronous = normal")
        message = self.queue.pop()
        if message is not None:
            self.queue.done(message.message_id)
        return message is not None

    def hasten(self) -> None:
        self.queue.conn.execute("pragma synchronous = off")


class Salmon:
    def __init__(self, place: str) -> None:
        self.queue: Any = importlib.import_module("salmon.queue").Queue(f"{place}/salmon")

    def push(self) -> None:
        self.queue.push(BODY)

    def take(self) -> bool:
        return self.queue.pop()[0] is not None

    def hasten(self) -> None:
        """os.fsync does nothing while the queue is filled."""


KINDS: dict[str, Open] = {
    store.__name__: store
    for store in (
        *(Memory, Maildir, SQLite, RawMaildir, RawSQLite),
        *(HueySQLite, HueyFile, PersistSQLite, PersistFile, Litequeue, Salmon),
    )
}


Work = Callable[[Store], tuple[int, float]]
"""What one process does with the queue: how many jobs, in how many seconds."""


def measure(kind: Open, place: str, size: int, seconds: float, processes: int) -> dict[str, float]:
    """Jobs put, and taken and settled, per second; of one process also its processor seconds per 1000 taken."""
    kind(place)  # which makes what is made once
    pushed = together(kind, place, processes, lambda store: filled(store, size // processes, seconds))
    os.sync()
    if processes > 1:
        return {"push": pushed, "take": together(kind, place, processes, lambda store: drained(store, seconds))}
    worked = time.process_time()
    taken, taking = drained(kind(place), seconds)
    worked = time.process_time() - worked
    return {"push": pushed, "take": taken / taking, "cpu": worked / max(taken, 1) * 1000}


def together(kind: Open, place: str, processes: int, work: Work) -> float:
    """Jobs per second of all processes, until the last has ended: while one waits for the others its jobs wait too. A
    single one is this one."""
    if processes == 1:
        done, took = work(kind(place))
        return done / took
    results: Any = FORK.Queue()
    ready = FORK.Barrier(processes)

    def begin() -> None:
        store = kind(place)
        ready.wait()
        results.put(work(store))

    workers = [FORK.Process(target=begin) for _ in range(processes)]
    for worker in workers:
        worker.start()
    parts: list[tuple[int, float]] = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    return sum(done for done, _ in parts) / max(took for _, took in parts)


def filled(store: Store, size: int, seconds: float) -> tuple[int, float]:
    """How many pushes were measured, and their seconds; the rest goes in without syncs."""
    store.push()
    pushed, began = 0, time.perf_counter()
    while pushed < size - 1 and time.perf_counter() - began < seconds:
        store.push()
        pushed += 1
    took, fsync = time.perf_counter() - began, os.fsync
    store.hasten()
    os.fsync = lambda fd: None  # noqa: ARG005 - typed as the original
    try:
        for _ in range(size - pushed - 1):
            store.push()
    finally:
        os.fsync = fsync
    return pushed, took


def drained(store: Store, seconds: float) -> tuple[int, float]:
    """How many were taken, and the seconds."""
    taken, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds and store.take():
        taken += 1
    return taken, time.perf_counter() - began


if __name__ == "__main__":
    name, folder, *numbers = sys.argv[1:]
    print(json.dumps(measure(KINDS[name], folder, int(numbers[0]), float(numbers[1]), int(numbers[2]))))
