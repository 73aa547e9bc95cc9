"""Queues beside each other: how many jobs of 5 KB are pushed, and how many taken and settled, in a second.

    python tests/bench/queues.py            a few minutes: 1,000 and 10,000 jobs waiting
    BENCH=full python tests/bench/queues.py 100,000 too, and more rounds

Ours (memory, maildir, sqlite) and peers (huey, persist-queue, litequeue), in turns, so that what else the machine does
hits all alike; medians of the rounds, with the lowest and the highest. The peers are installed into a temporary folder.

What is compared: a push that would survive a power failure (huey and litequeue are told synchronous=FULL; huey's files
cannot be synced, and say so), one producer; then taking and settling at synchronous=NORMAL, one job at a time, by one
and by two processes. huey forgets a job when it hands it out; the others keep it until it is settled. Each measurement
ends after some seconds, done or not, so that what is slow tells its rate as well.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = os.environ.get("BENCH") == "full"
SIZES = (1_000, 10_000, 100_000) if FULL else (1_000, 10_000)
ROUNDS = 5 if FULL else 3
SECONDS = 10.0 if FULL else 1.5
"""How long one measurement lasts at most."""

PEERS = ("huey==3.5.4", "persist-queue==1.1.0", "litequeue==0.9")
BODY = (b"From: a@example.org\r\nTo: b@example.org\r\nSubject: bench\r\n\r\n" + b"x" * 5000)[:5000]
TEXT = BODY.decode()
FORK = multiprocessing.get_context("fork")

Push = Callable[[], object]
Pusher = Callable[[bool], Push]
"""Open for putting: synced, or (True) as fast as may be, to fill the queue before what is measured."""

Take = Callable[[], bool]
"""Take one job and settle it; False when there is none."""


def ours(url: str, place: str) -> tuple[Pusher, Callable[[], Take]]:
    from lamsonq.backends import open_backend
    from lamsonq.jobs import DONE, Job, Put

    queue = open_backend(url.format(place=place))

    def push() -> None:
        fields: dict[str, Any] = {"sender": "a@example.org", "recipients": ("b@example.org",)}
        queue.put([Put(queue, Job(key=queue.new_key(), body=BODY, **fields))])

    def take() -> bool:
        jobs = queue.reserve(1)
        for job in jobs:
            queue.settle(job, DONE)
        return bool(jobs)

    return lambda hasty: unsynced(push, queue) if hasty else push, lambda: take


def unsynced(push: Push, queue: Any) -> Push:
    """Putting without syncs, into a store of ours."""
    database = getattr(queue, "_database", None)
    if database is not None:
        write = database.write
        database.write = lambda act, **options: write(act, **{**options, "durable": False})
    return push


def huey_sqlite(place: str) -> tuple[Pusher, Callable[[], Take]]:
    storages = importlib.import_module("huey.storage")

    def storage(synchronous: str) -> Any:
        made: Any = storages.SqliteStorage(filename=f"{place}/huey.db", fsync=True)
        made.conn.execute(f"pragma synchronous = {synchronous}")
        return made

    def pusher(hasty: bool) -> Push:
        made = storage("off" if hasty else "full")
        return lambda: made.enqueue(BODY)

    def taker() -> Take:
        made = storage("normal")
        return lambda: made.dequeue() is not None

    return pusher, taker


def huey_file(place: str) -> tuple[Pusher, Callable[[], Take]]:
    made = importlib.import_module("huey.storage").FileStorage("bench", f"{place}/huey")
    return lambda _: lambda: made.enqueue(BODY), lambda: lambda: made.dequeue() is not None


def persist_sqlite(place: str) -> tuple[Pusher, Callable[[], Take]]:
    persistqueue = importlib.import_module("persistqueue")

    def opened() -> Any:
        return persistqueue.SQLiteAckQueue(f"{place}/persist", auto_commit=True)

    def pusher(hasty: bool) -> Push:
        made = opened()
        if hasty:
            made._putter.execute("pragma synchronous = off")
        return lambda: made.put(BODY)

    def taker() -> Take:
        made = opened()

        def take() -> bool:
            try:
                made.ack(made.get(block=False))
            except persistqueue.Empty:
                return False
            return True

        return take

    return pusher, taker


def persist_file(place: str) -> tuple[Pusher, Callable[[], Take]]:
    persistqueue = importlib.import_module("persistqueue")

    def pusher(hasty: bool) -> Push:
        made = persistqueue.Queue(f"{place}/persist", autosave=not hasty)
        return lambda: made.put(BODY)

    def taker() -> Take:
        made = persistqueue.Queue(f"{place}/persist")

        def take() -> bool:
            try:
                made.get(block=False)
            except persistqueue.Empty:
                return False
            made.task_done()  # which saves that it was taken
            return True

        return take

    return pusher, taker


def litequeue(place: str) -> tuple[Pusher, Callable[[], Take]]:
    library = importlib.import_module("litequeue")

    def opened(synchronous: str) -> Any:
        made: Any = library.LiteQueue(f"{place}/lite.db", timeout=30)
        made.conn.execute(f"pragma synchronous = {synchronous}")
        return made

    def pusher(hasty: bool) -> Push:
        made = opened("off" if hasty else "full")
        return lambda: made.put(TEXT)

    def taker() -> Take:
        made = opened("normal")

        def take() -> bool:
            message = made.pop()
            if message is not None:
                made.done(message.message_id)
            return message is not None

        return take

    return pusher, taker


KINDS: dict[str, tuple[Callable[[str], tuple[Pusher, Callable[[], Take]]], int]] = {
    "memory": (lambda place: ours("memory:bench", place), 1),
    "maildir": (lambda place: ours("{place}/posts", place), 2),
    "sqlite": (lambda place: ours("sqlite:{place}/q.db", place), 2),
    "huey sqlite": (huey_sqlite, 2),
    "huey file, unsynced": (huey_file, 2),
    "persist-queue sqlite ack": (persist_sqlite, 1),  # two processes hand out the same jobs
    "persist-queue file": (persist_file, 1),
    "litequeue": (litequeue, 2),
}
"""How each is opened, and how many processes may take from it."""


def measure(kind: str, size: int, processes: int) -> dict[str, float]:
    """Fill the queue, then drain it as long as the time is not over; rates per second."""
    opened, allowed = KINDS[kind]
    if processes > allowed:
        return {}
    with tempfile.TemporaryDirectory(prefix="lamsonq-bench-", ignore_cleanup_errors=True) as place:
        pusher, taker = opened(place)
        pushed, pushing = filled(pusher, size)
        if processes == 1:
            number, seconds = drained(taker())
        else:
            results: Any = FORK.Queue()
            begun = FORK.Barrier(processes)

            def work() -> None:
                take = opened(place)[1]()
                begun.wait()
                results.put(drained(take))

            workers = [FORK.Process(target=work) for _ in range(processes)]
            for worker in workers:
                worker.start()
            parts = [results.get(timeout=300) for _ in workers]
            for worker in workers:
                worker.join()
            number, seconds = sum(part[0] for part in parts), max(part[1] for part in parts)
    return {"push": pushed / pushing, "take": number / seconds}


def filled(pusher: Pusher, size: int) -> tuple[int, float]:
    """How many pushes were measured, and their seconds; the rest goes in without syncs."""
    push, pushed = pusher(False), 0
    push()  # which also makes the store, once
    begun = time.perf_counter()
    while pushed < size - 1 and time.perf_counter() - begun < SECONDS:
        push()
        pushed += 1
    seconds, fsync, push = time.perf_counter() - begun, os.fsync, pusher(True)
    os.fsync = lambda fd: None  # noqa: ARG005 - typed as the original
    try:
        for _ in range(size - pushed - 1):
            push()
    finally:
        os.fsync = fsync
    return pushed, seconds


def drained(take: Take) -> tuple[int, float]:
    """How many were taken, and the seconds."""
    begun, number = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS and take():
        number += 1
    return number, time.perf_counter() - begun


def measured_apart(kind: str, size: int, processes: int, libraries: str) -> dict[str, float]:
    """In a process of its own, so that no measurement leaves anything to the next."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""), libraries])
    command = [sys.executable, __file__, kind, str(size), str(processes)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    if done.returncode:
        print(f"{kind}, {size}, {processes}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; {ROUNDS} rounds, jobs of {len(BODY)} bytes")
    with tempfile.TemporaryDirectory(prefix="lamsonq-peers-") as libraries:
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", libraries, *PEERS]
        subprocess.run([sys.executable, *install], check=True)
        for size in SIZES:
            found: dict[tuple[str, str], list[float]] = {}
            for _ in range(ROUNDS):
                for processes in (1, 2):
                    for kind in KINDS:
                        result = measured_apart(kind, size, processes, libraries)
                        if result and processes == 1:
                            found.setdefault((kind, "push"), []).append(result["push"])
                        if result:
                            found.setdefault((kind, f"take {processes}"), []).append(result["take"])
            table(size, found)


def table(size: int, found: dict[tuple[str, str], list[float]]) -> None:
    """The medians of one size, with their spread, and the ratio to those of our sqlite."""
    print(f"\n{size:,} jobs, per second: median (lowest-highest) ratio to sqlite", flush=True)
    columns = ("push", "take 1", "take 2")
    print(f"{'':26}" + "".join(f"{column:>32}" for column in columns))
    for kind in KINDS:
        cells = []
        for column in columns:
            rates, own = found.get((kind, column)), found.get(("sqlite", column))
            if not rates or not own:
                cells.append(f"{'-':>32}")
                continue
            middle = statistics.median(rates)
            ratio = middle / statistics.median(own)
            cells.append(f"{f'{middle:,.0f} ({min(rates):,.0f}-{max(rates):,.0f}) {ratio:.2f}':>32}")
        print(f"{kind:26}" + "".join(cells), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
