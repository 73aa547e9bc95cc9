"""Queue receivers: several queues in one, threads by weight, ending when idle or worn out, stopping, keeping."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq import clock, worker
from lamsonq.backends import lives
from lamsonq.conformance import Clock
from lamsonq.errors import Dead, QueueError, SettingsError
from lamsonq.jobs import DONE, Job, Limit, Put
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.worker import QueueReceiver

from .waiting import PATIENCE, until

Module = Callable[..., str]
Mail = Callable[..., MailRequest]
_numbers = itertools.count(1)


def queue() -> Queue:
    return Queue(f"memory:receivers{next(_numbers)}")


def run(receiver: QueueReceiver) -> threading.Thread:
    thread = threading.Thread(target=receiver.start, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def frozen() -> Iterator[Clock]:
    standing = Clock()
    with clock.replaced(standing):
        yield standing


# -- several queues ------------------------------------------------------------------------------------------------


def test_one_receiver_works_several_queues_each_with_handlers_of_its_own(module: Module, mail: Mail) -> None:
    source = '@route("desk@example.com")\n@stateless\ndef START(message):\n    CALLS.append(message.Peer)\n'
    names = [module(source), module(source)]
    routers, queues = [RoutingBase(), RoutingBase()], [queue(), queue()]
    for router, name in zip(routers, names, strict=True):
        router.load([name])
    parts = [QueueReceiver(q, router=r) for q, r in zip(queues, routers, strict=True)]
    receiver = QueueReceiver(parts, workers=3)
    thread = run(receiver)
    for one in queues * 5:
        one.push(mail())
    until(lambda: all(len(sys.modules[name].CALLS) == 5 for name in names))
    receiver.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert [sys.modules[name].CALLS for name in names] == [[one.dir] * 5 for one in queues]


def test_a_queue_that_cannot_be_used_while_a_receiver_sleeps_does_not_end_it(
    mail: Mail, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    posts, locked = queue(), [True, True]
    seen: list[object] = []
    wait = posts.backend.wait

    def wait_or_fail(seconds: float) -> None:
        if locked:
            locked.pop()
            raise QueueError("database is locked")
        wait(seconds)

    monkeypatch.setattr(posts.backend, "wait", wait_or_fail)
    monkeypatch.setattr(worker, "TROUBLE_PAUSE", 0.01)
    receiver = QueueReceiver(posts, deliver=seen.append, sleep=1)
    thread = run(receiver)
    until(lambda: not locked)
    posts.push(mail())
    until(lambda: seen)
    receiver.stop()
    thread.join(PATIENCE)
    assert "database is locked; trying on" in caplog.text


@pytest.mark.parametrize("kind", ["gone", "file"])
@pytest.mark.parametrize("sub", ["", "new"])
def test_a_maildir_that_breaks_ends_no_receiver_and_is_taken_up_again_when_it_is_repaired(
    mail: Mail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sub: str
) -> None:
    monkeypatch.setattr(worker, "TROUBLE_PAUSE", 0.02)
    monkeypatch.setattr(lives, "REAP_EVERY", 0.1)
    broken, fine = Queue(str(tmp_path / "broken")), queue()
    seen: list[object] = []
    receiver = QueueReceiver([broken, fine], deliver=lambda message: seen.append(message.Peer), sleep=0.1)
    thread = run(receiver)
    broken.push(mail())
    until(lambda: seen == [broken.dir])
    folder, numbers = tmp_path / "broken" / sub, itertools.count()

    def breaks() -> bool:
        folder.rename(tmp_path / f"away-{next(numbers)}")
        try:
            return kind == "gone" or bool(folder.write_text("in its place"))
        except IsADirectoryError:
            return False  # the receiver was quicker: it has made the folder anew

    until(breaks)
    fine.push(mail())
    until(lambda: seen == [broken.dir, fine.dir])
    if kind == "file":
        folder.unlink()
    Queue(str(tmp_path / "broken")).push(mail())
    until(lambda: seen == [broken.dir, fine.dir, broken.dir])
    assert thread.is_alive()
    receiver.stop()
    thread.join(PATIENCE)


def test_a_maildir_whose_folder_was_removed_is_whole_again_when_it_is_bound(tmp_path: Path) -> None:
    posts = Queue(str(tmp_path / "posts"))
    receiver = QueueReceiver(posts, deliver=lambda _: None)
    receiver.bind()
    new = tmp_path / "posts" / "new"
    new.rmdir()
    new.write_text("in its place")
    with pytest.raises(QueueError, match="not a directory; something in its path is a file"):
        receiver.bind()
    new.unlink()
    receiver.bind()
    assert new.is_dir()


def test_a_queue_that_cannot_be_used_is_told_when_a_one_shot_run_has_worked_the_others_off(
    mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, fine = queue(), queue()
    seen: list[object] = []

    def refuse(*_: Any, **__: Any) -> list[Job]:
        raise QueueError("cannot write broken")

    monkeypatch.setattr(broken.backend, "reserve", refuse)
    for _ in range(3):
        fine.push(mail())
    with pytest.raises(QueueError, match="cannot write broken"):
        QueueReceiver([broken, fine], deliver=seen.append).start(one_shot=True)
    assert len(seen) == 3


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A free thread is kept for the queue whose turn it is, however long this machine lets its fetcher wait."""
    monkeypatch.setattr(worker, "RIVAL_PATIENCE", PATIENCE)


def test_queues_that_compete_get_threads_by_their_weights(
    mail: Mail, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heavy, light = queue(), queue()
    begun: list[str] = []
    reserve = heavy.backend.reserve

    def reserve_slowly(*args: Any, **kwargs: Any) -> list[Job]:
        time.sleep(0.005)
        return reserve(*args, **kwargs)

    def work(message: MailRequest) -> None:
        begun.append(str(message.Peer))
        time.sleep(0.002)

    monkeypatch.setattr(heavy.backend, "reserve", reserve_slowly)
    for one in (heavy, light):
        for _ in range(300):
            one.push(mail())
    receiver = QueueReceiver({heavy: 3, light: 1}, workers=2, deliver=work)
    thread = run(receiver)
    until(lambda: len(begun) >= 240)
    receiver.stop(0.0)
    thread.join(PATIENCE)
    assert 148 <= begun[40:240].count(heavy.dir) <= 152


@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("seconds", [0, 0.002])
def test_a_single_thread_is_shared_by_the_weights_from_the_first_job_on(
    mail: Mail, patient: None, one_shot: bool, seconds: float
) -> None:
    heavy, light = queue(), queue()
    begun: list[str] = []

    def work(message: MailRequest) -> None:
        begun.append(str(message.Peer))
        time.sleep(seconds)

    for one in (light, heavy):
        for _ in range(60):
            one.push(mail())
    receiver = QueueReceiver({light: 1, heavy: 3}, workers=1, deliver=work)
    thread = threading.Thread(target=receiver.start, args=(one_shot,), daemon=True)
    thread.start()
    until(lambda: len(begun) == 120)
    receiver.stop()
    thread.join(PATIENCE)
    assert 28 <= begun[:40].count(heavy.dir) <= 32
    assert set(begun[80:]) == {light.dir}


def test_a_queue_whose_store_is_slow_holds_no_thread_back(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = queue(), queue()
    seen: list[object] = []
    go = threading.Event()
    reserve = slow.backend.reserve

    def reserve_slowly(*args: Any, **kwargs: Any) -> list[Job]:
        go.wait(PATIENCE)
        return reserve(*args, **kwargs)

    monkeypatch.setattr(slow.backend, "reserve", reserve_slowly)
    for one in (slow, quick):
        for _ in range(50):
            one.push(mail())
    receiver = QueueReceiver({slow: 100, quick: 1}, workers=2, deliver=seen.append)
    thread = run(receiver)
    until(lambda: len(seen) == 50)
    go.set()
    until(lambda: len(seen) == 100)
    receiver.stop()
    thread.join(PATIENCE)


def test_a_queue_with_nothing_to_do_holds_no_thread_back(mail: Mail, patient: None) -> None:
    idle, busy = queue(), queue()
    seen: list[object] = []
    receiver = QueueReceiver({idle: 100, busy: 1}, workers=1, deliver=seen.append)
    thread = run(receiver)
    for _ in range(50):
        busy.push(mail())
    until(lambda: len(seen) == 50)
    receiver.stop()
    thread.join(PATIENCE)


def test_a_receiver_without_a_queue_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one queue"):
        QueueReceiver([])


# -- ending --------------------------------------------------------------------------------------------------------


def test_a_receiver_ends_after_so_many_rounds_without_a_job(mail: Mail, caplog: pytest.LogCaptureFixture) -> None:
    one, seen = queue(), list[MailRequest]()
    one.push(mail())
    receiver = QueueReceiver(one, sleep=0.05, deliver=seen.append, shutdown_after_number_of_empty_iterations=3)
    with caplog.at_level(logging.DEBUG):
        begun = time.monotonic()
        receiver.start()
    assert 0.1 < time.monotonic() - begun < PATIENCE / 2
    assert (receiver.retired, receiver.worn_out, receiver.stuck, len(seen)) == (True, False, False, 1)
    assert caplog.text.count("Sleeping for 0 seconds...") == 3


def test_a_receiver_that_has_had_enough_jobs_finishes_them_and_asks_to_be_replaced(mail: Mail) -> None:
    one, seen = queue(), list[MailRequest]()
    for _ in range(10):
        one.push(mail())

    def work(message: MailRequest) -> None:
        time.sleep(0.05)
        seen.append(message)

    receiver = QueueReceiver(one, workers=4, deliver=work, max_jobs=6)
    receiver.start()
    assert (receiver.worn_out, receiver.retired, len(seen), one.count()) == (True, False, 6, 4)
    assert one.backend.counts()["reserved"] == 0


def test_a_receiver_that_is_told_to_stop_finishes_what_it_has_and_takes_no_more(mail: Mail) -> None:
    one, go, seen = queue(), threading.Event(), []

    def work(message: MailRequest) -> None:
        go.wait(PATIENCE)
        seen.append(message)

    for _ in range(5):
        one.push(mail())
    receiver = QueueReceiver(one, workers=2, deliver=work)
    thread = run(receiver)
    until(lambda: one.backend.counts()["reserved"] == 2)
    receiver.stop()
    until(lambda: all(job.deliveries == 0 for job in jobs_in(one, "reserved")))  # forgiven: a KILL would harm none
    go.set()
    thread.join(PATIENCE)
    assert (len(seen), one.count(), one.backend.counts()["reserved"]) == (2, 3, 0)


def jobs_in(one: Queue, state: str) -> list[Job]:
    return [job for job in map(one.backend.get, one.backend.keys(state)) if job is not None]


# -- keeping -------------------------------------------------------------------------------------------------------


def test_an_archive_keeps_what_has_succeeded_and_what_came_too_late(mail: Mail, frozen: Clock) -> None:
    one = queue()
    one.push(mail())
    one.push(mail(), expires=-1)
    receiver = QueueReceiver(one, deliver=lambda _: None, archive=100, keep_dead=1000)
    receiver.start(one_shot=True)
    assert {state: n for state, n in one.backend.counts().items() if n} == {"done": 1, "dead": 1}
    [dead] = one.backend.keys("dead")
    assert "it came too late" in one.backend.report(dead)
    frozen.now += 101
    QueueReceiver(one, deliver=lambda _: None, archive=100, keep_dead=1000).start(one_shot=True)
    assert {state: n for state, n in one.backend.counts().items() if n} == {"dead": 1}
    frozen.now += 1000
    QueueReceiver(one, deliver=lambda _: None, keep_dead=1000).start(one_shot=True)
    assert sum(one.backend.counts().values()) == 0


# -- what is bound -------------------------------------------------------------------------------------------------


def test_a_receiver_of_bound_jobs_leaves_alone_what_other_processes_know(module: Module) -> None:
    one, router = queue(), RoutingBase()
    name = module('@route("desk@example.com")\n@stateless\ndef START(message):\n    CALLS.append(1)\n')
    router.load([name])
    for target in (f"{name}.START", "app.elsewhere.START", None):
        job = Job(key=one.new_key(), body=b"", target=target, sender="a@b.example", recipients=("desk@example.com",))
        one.backend.put([Put(one.backend, job)])
    QueueReceiver(one, router=router, bound=True).start(one_shot=True)
    assert sys.modules[name].CALLS == [1]
    assert [job.target for job in jobs_in(one, "ready")] == ["app.elsewhere.START", None]
    assert all(job.deliveries == 0 for job in jobs_in(one, "ready"))


# -- limits --------------------------------------------------------------------------------------------------------


def test_limits_are_refused_where_the_store_cannot_keep_them() -> None:
    with pytest.raises(SettingsError, match="use a sqlite: queue"):
        QueueReceiver(queue(), deliver=lambda _: None, limits=[Limit("sender", concurrency=1)]).bind()


@pytest.mark.parametrize(
    "wrong",
    [("colour", 1, None), ("sender", None, None), ("sender", 1, 1.0), ("sender", 0, None), ("sender", None, 0.0)],
)
def test_a_limit_that_makes_no_sense_is_refused(wrong: tuple[str, int | None, float | None]) -> None:
    with pytest.raises(ValueError, match="Limit"):
        Limit(*wrong)


def test_a_failure_of_a_second_queue_ends_the_receiver_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = queue(), queue()
    receiver = QueueReceiver([one, other], deliver=lambda _: None)

    def broken(*_: object, **__: object) -> list[Job]:
        raise MemoryError("broken")

    monkeypatch.setattr(other.backend, "reserve", broken)
    with pytest.raises(MemoryError):
        receiver.start()


def test_what_could_not_be_settled_in_any_queue_is_given_back(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = queue(), queue()
    other.push(mail())
    receiver = QueueReceiver([one, other], deliver=lambda _: None)
    settle, failures = other.backend.settle, [OSError(28, "No space left on device")]

    def full(job: Job, outcome: object, puts: object = ()) -> list[bool]:
        if outcome is DONE and failures:
            raise failures.pop()
        return settle(job, outcome, puts)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(other.backend, "settle", full)
    thread = run(receiver)
    until(lambda: other.backend.counts()["delayed"] == 1)
    receiver.stop()
    thread.join(PATIENCE)
    [job] = jobs_in(other, "delayed")
    assert (job.attempts, job.deliveries) == (0, 0)


def test_a_dead_letter_says_what_its_function_said(mail: Mail) -> None:
    one = queue()

    def refuse(_: MailRequest) -> None:
        raise Dead("no such list")

    one.push(mail())
    QueueReceiver(one, deliver=refuse).start(one_shot=True)
    [key] = one.backend.keys("dead")
    assert "attempt 1: no such list" in one.backend.report(key)


# -- a thousand at once --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_functions_await_in_one_process_in_few_threads_and_little_memory(module: Module, mail: Mail) -> None:
    one, router = queue(), RoutingBase()
    name = module(
        """
        import asyncio, threading
        NOW, THREADS = [0], []

        @route("desk@example.com")
        @stateless
        async def START(message):
            NOW[0] += 1
            if NOW[0] == 900:
                THREADS.append(threading.active_count())
            while not THREADS:
                await asyncio.sleep(0.1)
            NOW[0] -= 1
            CALLS.append(1)
        """
    )
    router.load([name])
    for _ in range(3000):
        one.push(mail())
    before, memory = threading.active_count(), resident()
    receiver = QueueReceiver(one, router=router, workers=8)
    receiver.start(one_shot=True)
    assert len(sys.modules[name].CALLS) == 3000
    assert sys.modules[name].THREADS[0] - before < 15
    assert resident() - memory < 64 * 2**20


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- a receiver in a receiver --------------------------------------------------------------------------------------


def test_the_parts_of_a_receiver_keep_what_was_said_of_them(mail: Mail, frozen: Clock) -> None:
    one, other = queue(), queue()
    part = QueueReceiver(one, deliver=lambda _: None, archive=100)
    whole = QueueReceiver([part, QueueReceiver(other, deliver=lambda _: None)])
    for each in (one, other):
        each.push(mail())
    whole.start(one_shot=True)
    assert (one.backend.counts()["done"], other.backend.counts()["done"]) == (1, 0)
    frozen.now += 101
    whole._purge_at = 0.0
    whole.start(one_shot=True)
    assert one.backend.counts()["done"] == 0
    limited = QueueReceiver(queue(), deliver=lambda _: None, limits=[Limit("sender", concurrency=1)])
    with pytest.raises(SettingsError, match="limits per key"):
        QueueReceiver([limited]).bind()


def test_what_ends_a_receiver_is_said_of_the_whole() -> None:
    with pytest.raises(TypeError, match="the outer one"):
        QueueReceiver([QueueReceiver(queue(), deliver=lambda _: None, max_jobs=3)])


@pytest.mark.parametrize(
    "wrong", [{"max_jobs": 0}, {"sleep": 0}, {"sleep": -1}, {"workers": 0}, {"limits": ["sender"]}]
)
def test_a_receiver_that_could_do_nothing_or_nothing_else_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        QueueReceiver(queue(), deliver=lambda _: None, **wrong)


@pytest.mark.parametrize("weight", [0, -1, 1.5, True])
def test_a_weight_is_a_number_from_one_on(weight: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        QueueReceiver({queue(): weight}, deliver=lambda _: None)
