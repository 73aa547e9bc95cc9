"""Dead workers are looked for when the kernel tells that one has died; by the clock, seldom."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lamsonq.backends import lives, maildir, sqlite
from lamsonq.backends.lives import IDLE_REAP_EVERY, REAP_EVERY, Vigil
from lamsonq.jobs import DONE, Backend, Job, Put

from .waiting import PATIENCE

AGES = 1000.0


@pytest.fixture(params=["maildir", "sqlite"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"maildir": f"{tmp_path}/jobs", "sqlite": f"sqlite:{tmp_path}/q.db?queue=jobs"}[request.param]


def opened(name: str) -> Backend:
    return sqlite.SQLite(name) if name.startswith("sqlite:") else maildir.Maildir(name)


@pytest.fixture
def queue(name: str) -> Iterator[Backend]:
    """A queue with one job."""
    queue = opened(name)
    queue.put([Put(queue, Job(key="1.job", body=b"x"))])
    yield queue
    queue.close()


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks because of the time."""
    monkeypatch.setattr(lives, "REAP_EVERY", AGES)
    monkeypatch.setattr(lives, "IDLE_REAP_EVERY", AGES)


def worker(name: str) -> int:
    """A process that has claimed the job, and does not end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)  # if nobody kills it
            queue = opened(name)
            os.write(writing, b"%d" % len(queue.reserve(1)))
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read(1) == b"1"
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.usefixtures("no_clock")
def test_who_sleeps_takes_over_at_once_what_a_killed_worker_had(name: str, queue: Backend) -> None:
    pid = worker(name)
    assert queue.reserve(1, wait=0.01) == []
    threading.Timer(0.1, kill, [pid]).start()
    begun = time.monotonic()
    [job] = queue.reserve(1, wait=PATIENCE)
    assert time.monotonic() - begun < PATIENCE / 2
    queue.settle(job, DONE)


@pytest.mark.usefixtures("no_clock")
def test_who_begins_to_listen_looks_for_those_that_died_before(name: str, queue: Backend) -> None:
    pid = worker(name)
    assert queue.reserve(1) == []  # it has looked, and does not listen yet
    kill(pid)
    begun = time.monotonic()
    [job] = queue.reserve(1, wait=PATIENCE)
    assert time.monotonic() - begun < PATIENCE / 2
    queue.settle(job, DONE)


def test_who_looks_for_the_dead_wakes_nobody_and_neither_does_who_ends(
    name: str, queue: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = queue.reserve(1)
    queue.settle(job, DONE)
    assert queue.reserve(1, wait=0.01) == []  # it listens
    told: list[object] = []
    monkeypatch.setattr(Vigil, "tell", told.append)
    other = opened(name)
    assert other.release_stale() == 0
    other.put([Put(other, Job(key="2.job", body=b"x"))])
    [job] = other.reserve(1)
    other.settle(job, DONE)
    other.close()
    assert queue.reserve(1, wait=0.01) == []
    assert told == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(lives, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_who_hears_of_deaths_sleeps_longer(clock: SimpleNamespace) -> None:
    vigil = Vigil()
    assert vigil.is_due()
    assert not vigil.is_due()
    assert vigil.patience(hears=True) == pytest.approx(IDLE_REAP_EVERY)
    assert vigil.patience(hears=False) == pytest.approx(REAP_EVERY)
    clock.now += REAP_EVERY
    assert vigil.is_due()  # as it is awake


def test_what_is_told_is_looked_at_a_moment_later_and_once_more(clock: SimpleNamespace) -> None:
    vigil = Vigil()
    assert vigil.is_due()
    clock.now += 2
    vigil.tell()
    assert not vigil.is_due()  # the lock is not free yet
    assert 0 < vigil.patience(hears=True) < 0.1
    clock.now += 0.1
    assert vigil.is_due()
    assert vigil.patience(hears=True) == pytest.approx(REAP_EVERY)
    clock.now += REAP_EVERY
    assert vigil.is_due()
    assert vigil.patience(hears=True) == pytest.approx(IDLE_REAP_EVERY)


def test_workers_that_live_for_a_moment_make_for_no_more_than_a_look_a_second(clock: SimpleNamespace) -> None:
    vigil = Vigil()
    looks = 0
    for _ in range(1000):
        vigil.tell()
        clock.now += 0.01
        looks += vigil.is_due()
    assert 9 <= looks <= 12
