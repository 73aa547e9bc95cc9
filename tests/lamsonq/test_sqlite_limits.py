"""Limits per key: so many jobs at once, or begun in a second, for all processes together."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq.backends.sqlite import SQLite
from lamsonq.conformance import Clock, counted, push
from lamsonq.errors import Dead, Later
from lamsonq.jobs import DONE, Job, Limit

from .waiting import PATIENCE, until

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., SQLite]]:
    """`make(limit, ...)` opens a worker that keeps these limits."""
    made: list[SQLite] = []

    def open_one(*limits: Limit, now: Callable[[], float] = clock) -> SQLite:
        made.append(SQLite(f"sqlite:{tmp_path}/q.db?queue=posts", now=now))
        made[-1].limit(limits)
        return made[-1]

    yield open_one
    for queue in made:
        queue.close()


TWO_A_DOMAIN = Limit("recipient_domain", concurrency=2)


def to(queue: SQLite, *domains: str, **fields: Any) -> list[str]:
    return [push(queue, domain.encode(), recipients=(f"joe@{domain}",), **fields) for domain in domains]


def names(jobs: list[Job]) -> list[str]:
    return [job.body.decode() for job in jobs]


def test_no_more_of_one_lane_are_worked_at_once(make: Callable[..., SQLite]) -> None:
    one, two = make(TWO_A_DOMAIN), make(TWO_A_DOMAIN)
    to(one, "a", "a", "a", "a", "b", "A")
    jobs = one.reserve(3)
    assert names(jobs) == ["a", "a", "b"]
    assert two.reserve(9) == []
    assert counted(two) == {"ready": 3, "reserved": 3}
    assert len(two.keys()) == 3
    one.settle(jobs[2], DONE)
    assert two.reserve(9) == []
    one.settle(jobs[0], DONE)
    [job] = two.reserve(9)
    assert (names([job]), two.reserve(9), counted(one)) == (["a"], [], {"ready": 2, "reserved": 2})


@pytest.mark.parametrize("outcome", [DONE, Later("x", 0), Dead("x"), Later(counted=False)])
def test_every_outcome_lets_the_next_go(make: Callable[..., SQLite], outcome: Any) -> None:
    queue = make(Limit("sender", concurrency=1))
    keys = [push(queue, sender="joe") for _ in range(3)]
    [job] = queue.reserve(9)
    queue.settle(job, outcome)
    assert len(queue.reserve(9)) == 1
    assert queue.state(keys[2]) == "ready"


def test_a_dead_workers_places_are_free_again(make: Callable[..., SQLite]) -> None:
    one, two = make(TWO_A_DOMAIN), make(TWO_A_DOMAIN)
    to(one, "a", "a", "a")
    assert len(one.reserve(9)) == 2
    assert two.reserve(9) == []
    one.forget()
    two.release_stale()
    assert len(two.reserve(9)) == 2


def test_those_that_wait_for_a_lane_come_by_priority(make: Callable[..., SQLite]) -> None:
    queue = make(Limit("recipient_domain", concurrency=1))
    to(queue, "a", priority=5)
    [job] = queue.reserve(9)
    low = to(queue, "a", "a", priority=5)
    assert queue.reserve(9) == []
    [urgent] = to(queue, "a", priority=1)
    assert queue.reserve(9) == []
    found = []
    for _ in range(3):
        queue.settle(job, DONE)
        [job] = queue.reserve(9)
        found.append(job.key)
    assert found == [urgent, *low]


def test_several_limits_hold_at_once(make: Callable[..., SQLite]) -> None:
    limits = [Limit("sender", concurrency=2), Limit("recipient_domain", concurrency=1), Limit("target", concurrency=9)]
    queue, other = make(*limits), make(*limits)
    for number in range(60):
        domain, sender = f"d{number % 3}", f"s{number % 4}"
        push(queue, b"%d" % number, recipients=(f"x@{domain}",), sender=sender, target=f"t{number % 5}")
    held: list[tuple[SQLite, Job]] = []
    done = 0
    while jobs := [(worker, job) for worker in (queue, other) for job in worker.reserve(2)]:
        held += jobs
        lanes = [limit.lane(job) for _, job in held for limit in limits[1:2]]
        assert len(lanes) == len(set(lanes))
        senders = [job.sender for _, job in held]
        assert all(senders.count(sender) <= 2 for sender in senders)
        worker, job = held.pop(0)
        worker.settle(job, DONE)
        done += 1
        while len(held) > 2:
            worker, job = held.pop()
            worker.settle(job, DONE)
            done += 1
    while held or (jobs := [(worker, job) for worker in (queue, other) for job in worker.reserve(2)]):
        held += [] if held else jobs
        worker, job = held.pop()
        worker.settle(job, DONE)
        done += 1
    assert (done, counted(queue)) == (60, {})


def test_a_rate_lets_so_many_begin_in_a_second(make: Callable[..., SQLite], clock: Clock) -> None:
    queue, other = make(Limit("recipient_domain", rate=4)), make(Limit("recipient_domain", rate=4))
    to(queue, *"aaaaaaaaaa", "b")
    begun: list[tuple[float, str]] = []
    for step in range(40):
        for worker in (queue, other):
            for job in worker.reserve(3):
                begun.append((step / 16, job.body.decode()))
                worker.settle(job, DONE)
        clock.now += 1 / 16
    assert [at for at, name in begun if name == "a"] == [n / 4 for n in range(10)]
    assert [at for at, name in begun if name == "b"] == [0.0]


def test_after_a_pause_a_rate_is_not_made_up_for(make: Callable[..., SQLite], clock: Clock) -> None:
    queue = make(Limit("recipient_domain", rate=1))
    to(queue, *"aaaa")
    assert len(queue.reserve(9)) == 1
    clock.now += 1000
    assert len(queue.reserve(9)) == 1
    assert queue.reserve(9) == []


def test_an_urgent_job_overtakes_those_that_wait_for_their_rate(make: Callable[..., SQLite], clock: Clock) -> None:
    queue = make(Limit("recipient_domain", rate=1))
    to(queue, *"aaaaa", priority=5)
    assert len(queue.reserve(9)) == 1
    [urgent] = to(queue, "a", priority=0)
    found = []
    for _ in range(3):
        clock.now += 1
        found += [job.key for job in queue.reserve(9)]
    assert urgent in found[:2]
    assert len(found) == 3


def test_a_worker_sleeps_until_the_rate_lets_the_next_begin(make: Callable[..., SQLite]) -> None:
    queue = make(Limit("recipient_domain", rate=5), now=time.time)
    to(queue, *"aaa")
    begun, found = time.monotonic(), 0
    while found < 3 and time.monotonic() - begun < PATIENCE:
        found += len(queue.reserve(9, wait=PATIENCE))
    assert (found, 0.39 < time.monotonic() - begun < PATIENCE / 2) == (3, True)


def test_a_clock_that_is_put_back_holds_a_lane_up_for_one_interval(make: Callable[..., SQLite], clock: Clock) -> None:
    queue = make(Limit("recipient_domain", rate=1))
    to(queue, *"a")
    assert len(queue.reserve(9)) == 1
    clock.now -= 100_000
    to(queue, *"a")
    assert queue.reserve(9) == []
    clock.now += 1
    assert len(queue.reserve(9)) == 1


def test_rate_and_concurrency_hold_together(make: Callable[..., SQLite], clock: Clock) -> None:
    queue = make(Limit("recipient_domain", concurrency=2), Limit("recipient_domain", rate=10))
    to(queue, *"a" * 20)
    held: list[Job] = []
    done, last = 0, -1.0
    for step in range(400):
        jobs = queue.reserve(9)
        assert len(jobs) <= 1
        if jobs:
            assert clock.now - last > 0.099
            last = clock.now
        held += jobs
        assert len(held) <= 2
        if held and step % 8 == 0:
            queue.settle(held.pop(0), DONE)
            done += 1
        clock.now += 0.05
    assert (done, counted(queue)) == (20, {})


def test_what_is_removed_while_it_has_a_place_gives_it_up(make: Callable[..., SQLite], clock: Clock) -> None:
    queue = make(Limit("recipient_domain", rate=1))
    keys = to(queue, *"aaaa")
    assert len(queue.reserve(9)) == 1
    assert queue.remove(keys[1])  # it has the next place
    clock.now += 1
    assert [job.key for job in queue.reserve(9)] == [keys[2]]
    assert queue.purge("delayed") == 1
    to(queue, "a")
    clock.now += 1
    assert len(queue.reserve(9)) == 1


def test_a_limit_that_is_lifted_or_raised_lets_those_go_that_wait(make: Callable[..., SQLite]) -> None:
    queue = make(Limit("recipient_domain", concurrency=1))
    to(queue, *"aaaaa")
    assert len(queue.reserve(9)) == 1
    queue.limit([Limit("recipient_domain", concurrency=3)])
    assert len(queue.reserve(9)) == 2
    queue.limit([])
    assert len(queue.reserve(9)) == 2


def test_a_waiting_worker_hears_that_a_place_is_free(make: Callable[..., SQLite]) -> None:
    one, two = make(Limit("sender", concurrency=1), now=time.time), make(Limit("sender", concurrency=1), now=time.time)
    for _ in range(2):
        push(one, sender="joe")
    [job] = one.reserve(9)
    threading.Timer(0.1, lambda: one.settle(job, DONE)).start()
    begun = time.monotonic()
    found = until(lambda: two.reserve(9, wait=PATIENCE))
    assert (len(found), time.monotonic() - begun < PATIENCE / 2) == (1, True)


def test_what_waits_for_a_lane_is_looked_at_once(make: Callable[..., SQLite]) -> None:
    queue = make(Limit("recipient_domain", concurrency=1))
    to(queue, *["a"] * 300)
    statements = 0

    def count(_: str) -> None:
        nonlocal statements
        statements += 1

    for _ in range(2):
        [job] = queue.reserve(9)
        queue.settle(job, DONE)
    queue._database._opened().set_trace_callback(count)
    for _ in range(100):
        [job] = queue.reserve(9)
        queue.settle(job, DONE)
    assert statements < 100 * 40


def test_processes_keep_a_limit_together(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/q.db"
    queue = SQLite(url)
    for number in range(120):
        push(queue, sender=f"s{number % 3}")
    limits = [Limit("sender", concurrency=2), Limit("sender", rate=200)]

    def work() -> None:
        worker = SQLite(url)
        worker.limit(limits)
        ledger = sqlite3.connect(tmp_path / "ledger.db", timeout=20, isolation_level=None)
        while jobs := worker.reserve(3, wait=1):
            for job in jobs:
                ledger.execute("insert into running values (?, 1, ?)", (job.sender, time.time()))
            time.sleep(0.005)
            for job in jobs:
                ledger.execute("insert into running values (?, -1, ?)", (job.sender, time.time()))
                worker.settle(job, DONE)

    with sqlite3.connect(tmp_path / "ledger.db") as ledger:
        ledger.execute("create table running (sender, change, at)")
    workers = [FORK.Process(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    rows = ledger.execute("select sender, change, at from running order by rowid").fetchall()
    now: dict[str, int] = {}
    for sender, change, _ in rows:
        now[sender] = now.get(sender, 0) + change
        assert now[sender] <= 2
    assert (len(rows), counted(queue)) == (240, {})
    queue.close()
