"""What many processes want at once, one of them gets: debounced and unique calls, and the ticks of a schedule."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from datetime import datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from lamsonq import clock
from lamsonq.conformance import Clock
from lamsonq.deferred import deferrable, periodic
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.worker import QueueReceiver

from .waiting import PATIENCE

FORK = multiprocessing.get_context("fork")
NOW = 1_700_000_000.0
WINDOW = 30.0


@pytest.fixture(params=["maildir", "sqlite"])
def url(request: pytest.FixtureRequest, here: Path) -> str:
    """A queue that processes share."""
    return {"maildir": "run/jobs", "sqlite": "sqlite:run/q.db?queue=jobs"}[request.param]


def in_processes(number: int, work: object, *args: object) -> None:
    """Run `work(barrier, *args)` in so many processes at once."""
    barrier = FORK.Barrier(number, timeout=PATIENCE)
    children = [FORK.Process(target=work, args=(barrier, *args)) for _ in range(number)]  # type: ignore[arg-type]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * number


@deferrable(debounce_seconds=WINDOW)
def debounced(number: int) -> None:
    write(f"debounced {number}")


@deferrable(unique=True)
def unique(number: int) -> None:
    write(f"unique {number}")


def write(line: str) -> None:
    fd = os.open("ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{line}\n".encode())
    os.close(fd)


def ran() -> Counter[str]:
    return Counter(Path("ran").read_text().splitlines()) if os.path.exists("ran") else Counter()


def produce(barrier: Barrier, url: str, now: float) -> None:
    with clock.replaced(Clock(now)):
        for number in range(5):
            barrier.wait()
            for _ in range(4):
                debounced.using(queue=url).later(number)
                unique.using(queue=url).later(number)


def work_off(url: str, now: float) -> None:
    with clock.replaced(Clock(now)):
        QueueReceiver(url, router=RoutingBase()).start(one_shot=True)


def test_of_racing_producers_one_call_runs_in_a_window(url: str) -> None:
    in_processes(8, produce, url, NOW)
    backend = Queue(url).backend
    with clock.replaced(Clock(NOW)):
        assert (backend.counts()["ready"], backend.counts()["delayed"]) == (10, 5)
    work_off(url, NOW)
    assert ran() == {f"{name} {n}": 1 for name in ("debounced", "unique") for n in range(5)}
    in_processes(8, produce, url, NOW + WINDOW / 2)
    work_off(url, NOW + WINDOW / 2)
    assert ran() == {**{f"debounced {n}": 1 for n in range(5)}, **{f"unique {n}": 2 for n in range(5)}}
    in_processes(8, produce, url, NOW + WINDOW + 1)
    work_off(url, NOW + WINDOW + 1)
    assert ran() == {
        f"{name} {n}": {"debounced": 2, "unique": 3}[name] for name in ("debounced", "unique") for n in range(5)
    }


@periodic("* * * * *", queue="placed by the test")
def every_minute() -> None:
    write("tick")


def work_minutes(barrier: Barrier, url: str) -> None:
    every_minute.queue = url  # type: ignore[attr-defined]  # where it goes is what the decorator has written there
    begin = datetime(2026, 3, 1, 12, 0, 30).timestamp()
    receiver = QueueReceiver(url, router=RoutingBase())
    for minute in range(20):
        barrier.wait()
        with clock.replaced(Clock(begin + 60 * minute)):
            while receiver.run_once():
                pass


def test_of_five_processes_one_runs_each_tick(url: str) -> None:
    in_processes(5, work_minutes, url)
    assert ran() == {"tick": 20}
