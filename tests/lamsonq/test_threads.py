"""The threads that functions run in."""

import queue
import sys
import threading

import pytest

from lamsonq.threads import TOGETHER_MAX, Threads, Together

from .waiting import PATIENCE, until


def test_functions_run_at_the_same_time_up_to_the_number_of_threads() -> None:
    threads = Threads(3, "test")
    together, gate, fourth = threading.Barrier(4), threading.Event(), threading.Event()

    def wait() -> None:
        together.wait(PATIENCE)
        gate.wait(PATIENCE)

    for _ in range(3):
        threads.submit(wait)
    threads.submit(fourth.set)
    together.wait(PATIENCE)
    assert not fourth.is_set()
    gate.set()
    assert fourth.wait(PATIENCE)
    threads.close(wait=True)


def test_a_thread_that_is_free_is_used_again() -> None:
    threads = Threads(5, "test")
    used: list[int] = []
    for _ in range(20):
        threads.submit(lambda: used.append(threading.get_ident()))
        until(lambda: threads._free == len(threads._threads))
    assert len(used) == 20
    assert len(set(used)) == 1
    threads.close(wait=True)


def test_a_function_that_fails_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    threads, done = Threads(1, "test"), threading.Event()
    threads.submit(lambda: 1 / 0)
    threads.submit(done.set)
    assert done.wait(PATIENCE)
    assert "ZeroDivisionError" in caplog.text
    threads.close(wait=True)


def test_what_was_taken_is_done_when_they_are_closed_and_nothing_more_is_taken() -> None:
    threads, done = Threads(2, "test"), []
    for n in range(50):
        threads.submit(lambda n=n: done.append(n))  # type: ignore[misc]
    threads.close(wait=True)
    assert sorted(done) == list(range(50))
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(done.clear)


def test_what_no_thread_has_begun_with_can_be_forgotten() -> None:
    threads, gate, begun, done = Threads(1, "test"), threading.Event(), threading.Event(), []

    def wait() -> None:
        begun.set()
        gate.wait(PATIENCE)

    threads.submit(wait)
    threads.submit(lambda: done.append(1))
    assert begun.wait(PATIENCE)
    threads.drop()
    gate.set()
    threads.close(wait=True)
    assert done == []


class Unstarted(threading.Thread):
    """A thread of a machine that has no more of them."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


def test_where_no_thread_can_be_started_those_that_there_are_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, gate, done = Threads(3, "test"), threading.Event(), threading.Event()
    with monkeypatch.context() as short:
        short.setattr("lamsonq.threads.threading.Thread", Unstarted)
        with pytest.raises(OSError, match="unavailable"):
            threads.submit(done.set)
    threads.submit(lambda: gate.wait(PATIENCE))
    with monkeypatch.context() as short:
        short.setattr("lamsonq.threads.threading.Thread", Unstarted)
        threads.submit(done.set)
    gate.set()
    assert done.wait(PATIENCE)
    threads.close(wait=True)


def test_a_function_that_exits_ends_no_thread() -> None:
    threads, done = Threads(1, "test"), threading.Event()
    threads.submit(sys.exit)
    threads.submit(done.set)
    assert done.wait(PATIENCE)
    threads.close(wait=True)


def test_forgetting_waits_for_nothing_that_a_thread_has_just_taken() -> None:
    class JustTaken(queue.SimpleQueue):  # type: ignore[type-arg]
        def empty(self) -> bool:
            return False

    threads = Threads(1, "test")
    threads._work = JustTaken()
    dropping = threading.Thread(target=threads.drop, daemon=True)
    dropping.start()
    dropping.join(PATIENCE / 10)
    assert not dropping.is_alive()


# -- what is dealt with together ----------------------------------------------------------------------------------


class Desk:
    """Notes what it is given, behind a gate."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.given: list[list[int]] = []
        self.threads: list[int] = []

    def __call__(self, things: list[int]) -> None:
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        self.given.append(things)
        self.threads.append(threading.get_ident())
        if 13 in things:
            raise SystemExit("thirteen")


def submitted(together: Together[int], thing: int) -> threading.Thread:
    thread = threading.Thread(target=together.submit, args=(thing,), daemon=True)
    thread.start()
    return thread


def test_what_comes_alone_is_dealt_with_at_once_by_who_brings_it() -> None:
    desk = Desk()
    desk.gate.set()
    Together(desk).submit(1)
    assert desk.given == [[1]]
    assert desk.threads == [threading.get_ident()]


def test_what_comes_meanwhile_is_dealt_with_at_once_and_nobody_waits_for_it() -> None:
    desk = Desk()
    together = Together(desk)
    first = submitted(together, 0)
    assert desk.begun.acquire(timeout=PATIENCE)
    for number in range(1, 6):
        together.submit(number)  # returns, though the gate is shut
    desk.gate.set()
    first.join(PATIENCE)
    assert desk.given == [[0], [1, 2, 3, 4, 5]]
    assert set(desk.threads) == {first.ident}


def test_no_more_are_dealt_with_at_once_than_the_bound() -> None:
    desk = Desk()
    together = Together(desk)
    first = submitted(together, -1)
    assert desk.begun.acquire(timeout=PATIENCE)
    for number in range(100, 101 + TOGETHER_MAX):
        together.submit(number)
    desk.gate.set()
    first.join(PATIENCE)
    assert [len(things) for things in desk.given] == [1, TOGETHER_MAX, 1]


def test_a_call_that_fails_keeps_nobody_from_being_dealt_with(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    together = Together(desk)
    first = submitted(together, 13)
    assert desk.begun.acquire(timeout=PATIENCE)
    together.submit(1)
    desk.gate.set()
    first.join(PATIENCE)
    assert desk.given == [[13], [1]]
    assert "thirteen" in caplog.text


def test_a_call_that_hangs_is_told_once() -> None:
    desk = Desk()
    together = Together(desk)
    assert not together.hangs(0)
    first = submitted(together, 1)
    assert desk.begun.acquire(timeout=PATIENCE)
    until(lambda: together.hangs(0))
    assert not together.hangs(0)
    desk.gate.set()
    first.join(PATIENCE)
    assert not together.hangs(0)
