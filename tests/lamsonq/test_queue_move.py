"""`lamsonq queue move`: everything arrives as it was, whatever the backends, whoever works, wherever it is killed."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import pty
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lamsonq.backends.memory import Memory
from lamsonq.commands.queues import move, opened
from lamsonq.errors import Dead, Later, QueueError
from lamsonq.jobs import DONE, KEPT, Backend, Job, Put
from lamsonq.queue import Queue

from .cli import ENVIRON, lamsonq, refused
from .waiting import until

_numbers = itertools.count(1)
PAIRS = [
    ("run/a", "run/b"),
    ("run/a", "sqlite:run/q.db?queue=b"),
    ("sqlite:run/q.db?queue=a", "run/b"),
    ("sqlite:run/q.db?queue=a", "sqlite:run/q.db?queue=b"),
    ("sqlite:run/p.db", "sqlite:run/q.db"),
    ("memory:a", "run/b"),
    ("run/a", "memory:b"),
    ("memory:a", "memory:b"),
]


@pytest.fixture(params=PAIRS, ids=lambda pair: " to ".join(name.partition(":")[0] for name in pair))
def queues(request: pytest.FixtureRequest, here: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Queue, Queue]:
    """The two queues, empty."""
    monkeypatch.setattr(opened, "refuse_private", lambda _: None)  # the commands run in this process
    number = next(_numbers)
    source, target = (Queue(f"{name}{number}" if name.startswith("memory") else name) for name in request.param)
    return source, target


def put(queue: Queue, outcome: Any = None, **fields: Any) -> str:
    store = queue.backend
    job = Job(**{"key": store.new_key(), "body": b"\xff\x00 body", "received": 1_700_000_000.0, **fields})
    assert store.put([Put(store, job, outcome)]) == [True]
    return job.key


def another(url: str) -> Backend:
    """The same queue, as another process would open it."""
    scheme = url.partition(":")[0] if ":" in url else "maildir"
    store: Backend = importlib.import_module(f"lamsonq.backends.{scheme}").open_queue(url)
    return store


def whole(store: Backend) -> dict[str, tuple[str, Job, str]]:
    """State, record and report of every job."""
    return {
        key: (state, replace(job, claim=""), store.report(key))
        for state in ("ready", "delayed", "reserved", "dead", "done")
        for key in store.keys(state)
        if (job := store.get(key)) is not None
    }


def test_everything_arrives_as_it_was(queues: tuple[Queue, Queue]) -> None:
    source, target = queues
    fields: dict[str, Any] = {
        "sender": "Joe@example.com",
        "recipients": ("a@example.com", "b@example.com"),
        "peer": "127.0.0.1:25",
        "target": "app.handlers.index.START",
        "expires": 4_000_000_000.0,
        "priority": 7,
        "metadata": {"trace": "1"},
    }
    ready = put(source, unique="u", **fields)
    delayed = put(source, due=int(time.time()) + 3600, attempts=2, **{**fields, "sender": ""})
    failed = put(source, Later("not yet", time.time() + 3600), attempts=3)
    error = Dead("ValueError: no post 12")
    error.__cause__ = ValueError("no post 12")
    dead = put(source, error, attempts=4, **fields)
    done = put(source, KEPT, **fields)
    before = whole(source.backend)
    assert [before[key][0] for key in (ready, delayed, failed, dead, done)] == [
        *("ready", "delayed", "delayed", "dead", "done"),
    ]
    moved = json.loads(lamsonq("queue", "move", source.dir, target.dir, "--json").stdout)
    assert moved["moved"] == {"ready": 1, "delayed": 2, "dead": 1, "done": 1}
    assert (moved["kept_out"], moved["left"]) == ([], {})
    assert whole(source.backend) == {}
    after = whole(target.backend)
    assert after.keys() == before.keys()
    for key, (state, job, report) in before.items():
        found_state, found, found_report = after[key]
        assert (found_state, found_report) == (state, report)
        assert abs((found.due or 0) - (job.due or 0)) < 1.1
        assert replace(found, due=None, deliveries=0) == replace(job, due=None, deliveries=0)


def test_one_state_alone_moves(queues: tuple[Queue, Queue]) -> None:
    source, target = queues
    put(source)
    dead = put(source, Dead("no"))
    text = lamsonq("queue", "move", source.dir, target.dir, "-state", "dead")
    assert text.stdout == f"moved 1 dead from {source.dir} to {target.dir}\n"
    assert target.backend.keys("dead") == [dead]
    assert source.count() == 1


def test_what_is_being_worked_stays_and_is_told(queues: tuple[Queue, Queue]) -> None:
    source, target = queues
    put(source)
    [job] = source.backend.reserve(1)
    put(source)
    done = lamsonq("queue", "move", source.dir, target.dir)
    assert "moved 1 ready" in done.stdout
    assert done.stderr == f"left in {source.dir}: 1 reserved\n"
    source.backend.settle(job, DONE)


def test_a_paused_queue_can_be_moved(queues: tuple[Queue, Queue]) -> None:
    source, target = queues
    keys = [put(source), put(source)]
    source.backend.pause()
    lamsonq("queue", "move", source.dir, target.dir)
    assert sorted(target.keys()) == sorted(keys)
    source.backend.resume()


def test_one_whose_like_waits_over_there_stays(queues: tuple[Queue, Queue]) -> None:
    source, target = queues
    here, there = put(source, unique="u"), put(target, unique="u")
    other = put(source)
    done = lamsonq("queue", "move", source.dir, target.dir)
    assert f"1 stay: a message with the same `unique` waits in {target.dir}" in done.stderr
    assert source.keys() == [here]
    assert sorted(target.keys()) == sorted([there, other])


def test_a_queue_is_not_moved_into_itself(here: Path) -> None:
    Queue("run/a").push("x")
    for name in ("run/a", "./run/a", f"{here}/run/a", "maildir:run/a"):
        assert refused("queue", "move", "run/a", name) == f"ERROR: run/a and {name} are the same queue"
    assert "Give the queue to move to" in refused("queue", "move", "run/a", code=2)


def test_producers_and_consumers_of_both_work_on(queues: tuple[Queue, Queue]) -> None:
    source, target = queues
    made, seen, halt = Counter[bytes](), Counter[bytes](), threading.Event()

    put(source, body=b"0")
    made[b"0"] += 1

    def produce() -> None:
        for number in range(1, 150):
            body = b"%d" % number
            put(source, body=body)
            made[body] += 1

    def consume(store: Backend) -> None:
        while not halt.is_set():
            for job in store.reserve(1, 0.05):
                seen[job.body] += 1
                store.settle(job, DONE)

    workers = [threading.Thread(target=consume, args=(another(queue.dir),), daemon=True) for queue in queues]
    producer = threading.Thread(target=produce, daemon=True)
    for thread in (*workers, producer):
        thread.start()
    for _ in range(3):
        lamsonq("queue", "move", source.dir, target.dir)
    producer.join()
    lamsonq("queue", "move", source.dir, target.dir)
    until(lambda: seen.total() >= 150)
    halt.set()
    for thread in workers:
        thread.join()
    assert seen == made


@pytest.mark.parametrize(("source", "target"), [("run/a", "memory:b"), ("memory:a", "run/b")])
def test_nothing_is_moved_into_or_out_of_the_memory_of_another_process(here: Path, source: str, target: str) -> None:
    key = put(Queue("run/a"))
    line = refused("queue", "move", source, target)
    name = source if source.startswith("memory:") else target
    assert line == f"ERROR: {name} cannot be reached from here: a queue in memory is in its own process"
    assert Queue("run/a").keys() == [key]


def test_nothing_is_moved_into_a_directory_that_is_no_queue(here: Path) -> None:
    key = put(Queue("run/a"))
    Path("config").mkdir()
    Path("config/boot.py").touch()
    for name in ("config", "config/boot.py"):
        assert refused("queue", "move", "run/a", name).startswith(f"ERROR: {name} is not a queue")
    assert list(Path("config").iterdir()) == [Path("config/boot.py")]
    assert Queue("run/a").keys() == [key]


def test_what_cannot_be_put_goes_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "refuse_private", lambda _: None)
    number = next(_numbers)
    source, target = Queue(f"memory:full{number}"), Queue(f"memory:none{number}")
    put(source)
    delayed = put(source, due=int(time.time()) + 3600)
    before = whole(source.backend)

    def full(self: Memory, puts: Any, conn: object = None) -> list[bool]:
        raise QueueError("the disk is full")

    monkeypatch.setattr(target.backend, "put", full.__get__(target.backend))
    assert refused("queue", "move", source.dir, target.dir) == "ERROR: the disk is full"
    assert whole(source.backend) == before
    assert refused("queue", "move", source.dir, target.dir, "-state", "delayed") == "ERROR: the disk is full"
    assert source.backend.keys("delayed") == [delayed]


KILLED = [pair for pair in PAIRS if not any(name.startswith("memory:") for name in pair)]


def check_killed_mover(source: Queue, target: Queue, delay: Callable[[], float], rounds: int) -> None:
    """Kill movers at moments of chance; at the end everything is in the other queue, once, and as it was."""
    for number in range(60):
        outcome = (None, None, Dead("no"), KEPT)[number % 4]
        due = int(time.time()) + 3600 if number % 4 == 1 else None
        put(source, outcome, body=b"%d" % number, due=due)
    before = whole(source.backend)
    command = [sys.executable, "-m", "lamsonq", "queue", "move", source.dir, target.dir]
    for _ in range(rounds):
        mover = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay())
        mover.send_signal(signal.SIGKILL)
        mover.wait()
        both = {**whole(source.backend), **whole(target.backend)}
        assert both.keys() <= before.keys()
    lamsonq("queue", "move", source.dir, target.dir)
    assert whole(source.backend) == {}
    assert whole(target.backend) == before


@pytest.mark.parametrize("names", KILLED, ids=" to ".join)
def test_what_a_killed_mover_had_claimed_is_moved_as_it_was(here: Path, names: tuple[str, str]) -> None:
    source, target = map(Queue, names)
    keys = [
        put(source),
        put(source, due=int(time.time()) + 3600),
        put(source, Later("busy", int(time.time()) + 60), attempts=2),
    ]
    before = whole(source.backend)
    killed: Any = another(source.dir)
    assert all(killed.claim(key) for key in keys)
    killed.forget()
    lamsonq("queue", "move", source.dir, target.dir)
    assert (whole(source.backend), whole(target.backend)) == ({}, before)


def test_what_a_killed_mover_had_settled_arrives_when_it_is_begun_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = Queue("sqlite:run/q.db"), Queue("run/b")
    key = put(source, due=int(time.time()) + 3600)
    before = whole(source.backend)
    killed: Any = another(source.dir)
    job = killed.claim(key)
    with monkeypatch.context() as down:
        down.setattr(target.backend, "put", lambda *_: 1 / 0)
        killed.settle(job, DONE, [Put(target.backend, replace(job, claim=""))])
    killed.forget()
    assert (whole(source.backend), whole(target.backend)) == ({}, {})
    lamsonq("queue", "move", source.dir, target.dir)
    assert whole(target.backend) == before


@pytest.mark.slow
@pytest.mark.parametrize("names", KILLED[:4], ids=" to ".join)
def test_a_mover_that_is_killed_loses_nothing_and_is_begun_again(here: Path, names: tuple[str, str]) -> None:
    source, target = map(Queue, names)
    check_killed_mover(source, target, iter([0.35, 0.45]).__next__, 2)


@pytest.mark.slow
@pytest.mark.parametrize("names", KILLED, ids=" to ".join)
def test_a_mover_that_is_killed_often_loses_nothing(here: Path, names: tuple[str, str]) -> None:
    source, target = map(Queue, names)
    check_killed_mover(source, target, lambda: random.uniform(0.2, 0.7), int(os.environ.get("KILLS", "20")))


def test_a_bar_is_shown_at_a_terminal(here: Path) -> None:
    source = Queue("run/a")
    for _ in range(30):
        put(source)
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "lamsonq", "queue", "move", "run/a", "run/b"]
    done = subprocess.run(command, env=ENVIRON, stderr=child, stdout=subprocess.PIPE, timeout=30, check=True)
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    assert b"100%" in shown
    assert done.stdout == b"moved 30 ready, 0 delayed, 0 dead, 0 done from run/a to run/b\n"


def test_the_states_that_move_are_all_but_the_one_that_is_being_worked() -> None:
    from lamsonq.jobs import STATES

    assert set(move.MOVED) == set(STATES) - {"reserved"}


def test_what_another_program_has_put_into_a_database_is_counted_listed_and_moved(here: Path) -> None:
    store = Queue("sqlite:run/q.db?queue=a").backend
    store.release_stale()
    rows = [
        ("nul\0", 1e9, None, 0),
        ("due", 1e9, math.inf, 0),
        ("long ago", -math.inf, None, 0),
        ("attempts", 1e9, None, 2**62),
        ("fewer than none", 1e9, None, -5),
    ]
    insert = "insert into jobs (queue, key, received, due, attempts, body) values ('a', ?, ?, ?, ?, 'x')"
    with contextlib.closing(sqlite3.connect("run/q.db")) as other, other:
        other.executemany(insert, rows)
    for verb in ("stats", "ls"):
        found = lamsonq("queue", verb, "sqlite:run/q.db?queue=a")
        assert (found.returncode, found.stderr) == (0, "")
    assert '"oldest": null' in lamsonq("queue", "stats", "-json", "sqlite:run/q.db?queue=a").stdout
    lamsonq("queue", "move", "sqlite:run/q.db?queue=a", "run/b")
    into = Queue("run/b").backend
    assert (len(into.keys()), len(into.keys("delayed")), into.keys("dead")) == (4, 1, [])
    assert len(into.reserve(9)) == 4
