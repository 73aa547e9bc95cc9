"""What a receiver keeps before it answers: many messages share one put, and each is told what became of it."""

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import ClassVar

import pytest

from lamsonq.errors import QueueError
from lamsonq.jobs import Job
from lamsonq.queue import Queue, queue_of
from lamsonq.spool import BATCH_BYTES, BATCH_MAX, Spool

from .waiting import PATIENCE


class Message:
    """A message that waits for its reply."""

    def __init__(self, text: str, *, size: int = 3, fails: bool = False) -> None:
        self.text, self.size, self.fails = text, size, fails
        self.told = threading.Event()
        self.error: BaseException | None = None

    def job(self) -> Job:
        if self.fails:
            raise ValueError(self.text)
        return Job(key=self.text, body=b"x" * self.size)

    def kept(self) -> None:
        self.told.set()

    def lost(self, error: BaseException) -> None:
        self.error = error
        self.told.set()

    def waits(self) -> BaseException | None:
        assert self.told.wait(PATIENCE)
        return self.error


class Slow(Queue):
    """A queue whose puts wait for a gate, and are noted."""

    def __init__(self, directory: str = "memory:spool", refuses: Sequence[str] = ()) -> None:
        super().__init__(directory)
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.puts: list[list[str]] = []
        self.refuses = refuses

    def keep(self, jobs: Sequence[Job]) -> None:
        keys = [job.key for job in jobs]
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        self.puts.append(keys)
        if refused := [key for key in keys if key in self.refuses]:
            raise QueueError(f"no room for {refused}")


@pytest.fixture
def slow() -> Iterator[Slow]:
    queue = Slow()
    yield queue
    queue.gate.set()


def kept(spool: Spool, *messages: Message) -> None:
    for message in messages:
        spool.keep(message)


def test_one_message_is_put_at_once_and_those_that_come_meanwhile_go_together(slow: Slow) -> None:
    spool = Spool(slow)
    first, *others = (Message(str(n)) for n in range(6))
    kept(spool, first)
    assert slow.begun.acquire(timeout=PATIENCE)
    kept(spool, *others)
    slow.gate.set()
    assert [message.waits() for message in (first, *others)] == [None] * 6
    assert slow.puts == [["0"], ["1", "2", "3", "4", "5"]]
    spool.close()


def test_a_put_is_bounded_in_messages_and_octets(slow: Slow) -> None:
    spool = Spool(slow)
    many = [Message(str(n)) for n in range(BATCH_MAX + 2)]
    large = [Message(f"large {n}", size=BATCH_BYTES // 2 + 1) for n in range(3)]
    kept(spool, many[0])
    assert slow.begun.acquire(timeout=PATIENCE)
    kept(spool, *many[1:], *large)
    slow.gate.set()
    assert not any(message.waits() for message in (*many, *large))
    assert [len(put) for put in slow.puts] == [1, BATCH_MAX, 1 + 2, 1]
    spool.close()


def test_a_message_that_cannot_be_kept_takes_no_other_with_it(slow: Slow) -> None:
    slow.refuses = ("2",)
    spool = Spool(slow)
    messages = [Message(str(n)) for n in range(4)]
    kept(spool, messages[0])
    assert slow.begun.acquire(timeout=PATIENCE)
    kept(spool, *messages[1:])
    slow.gate.set()
    assert [str(message.waits() or "") for message in messages] == ["", "", "no room for ['2']", ""]
    assert slow.puts[1:] == [["1", "2", "3"], ["1"], ["2"], ["3"]]
    spool.close()


def test_a_message_of_which_no_job_can_be_made_is_told_and_the_others_are_kept(slow: Slow) -> None:
    slow.gate.set()
    spool = Spool(slow)
    broken, whole = Message("broken", fails=True), Message("whole")
    kept(spool, broken, whole)
    assert str(broken.waits()) == "broken"
    assert whole.waits() is None
    spool.close()


def test_what_waits_is_put_when_the_spool_is_closed(slow: Slow) -> None:
    spool = Spool(slow)
    messages = [Message(str(n)) for n in range(3)]
    kept(spool, messages[0])
    assert slow.begun.acquire(timeout=PATIENCE)
    kept(spool, *messages[1:])
    spool.close()
    slow.gate.set()
    assert not any(message.waits() for message in messages)


def test_a_put_that_hangs_is_seen(slow: Slow) -> None:
    spool = Spool(slow)
    message = Message("0")
    kept(spool, message)
    assert slow.begun.acquire(timeout=PATIENCE)
    assert not spool.hangs(PATIENCE)
    assert spool.hangs(0.0)
    assert not spool.hangs(0.0), "it is told twice"
    slow.gate.set()
    message.waits()
    spool.close()


def test_only_a_queues_own_push_is_a_spool() -> None:
    queue = Queue("memory:spool")

    class Noted(Queue):
        def push(self, *arguments: object, **options: object) -> str:
            raise AssertionError((arguments, options))

    assert queue_of(queue.push) is queue
    assert queue_of(Slow().push) is not None
    assert queue_of(Noted("memory:spool").push) is None
    assert queue_of(lambda message: queue.push(message)) is None
    assert queue_of(queue.enqueue) is None
    assert queue_of(None) is None


def test_whoever_has_something_kept_at_the_same_time_starts_one_thread(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(threading.Thread):
        """Takes its time to start: meanwhile others ask whether there is one."""

        started: ClassVar[list[str]] = []

        def start(self) -> None:
            threading.Event().wait(0.01)
            self.started.append(self.name)
            super().start()

    spool = Spool(slow)
    monkeypatch.setattr("lamsonq.spool.threading", SimpleNamespace(Thread=Late))
    messages = [Message(str(n)) for n in range(4)]
    keepers = [threading.Thread(target=spool.keep, args=[message]) for message in messages]
    for keeper in keepers:
        keeper.start()
    for keeper in keepers:
        keeper.join()
    assert slow.begun.acquire(timeout=PATIENCE)
    messages.append(Message("another"))
    spool.keep(messages[-1])
    slow.gate.set()
    assert not any(message.waits() for message in messages)
    assert Late.started == ["lamsonq-spool"]
    spool.close()


def test_where_no_thread_can_be_started_a_message_is_told_and_the_next_one_is_kept(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unstarted(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    slow.gate.set()
    spool, first, second = Spool(slow), Message("first"), Message("second")
    with monkeypatch.context() as short:
        short.setattr("lamsonq.spool.threading.Thread", Unstarted)
        spool.keep(first)
    spool.keep(second)
    assert str(first.waits()) == "can't start new thread"
    assert second.waits() is None
    assert slow.puts == [["second"]]
    spool.close()
