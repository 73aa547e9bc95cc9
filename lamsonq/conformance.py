"""What every queue backend has to do, as tests. For backends of one's own:

    class TestMine(BackendConformance):
        @pytest.fixture
        def stores(self, tmp_path):
            return MyStores(tmp_path)

A test is a method that takes `stores`; it needs nothing else of pytest, so that any runner can call it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from lamsonq.errors import Dead, Later, LeaseLost
from lamsonq.jobs import DELIVERIES_MAX, DONE, EXPIRED, KEPT, STATES, Backend, Debounce, Gate, Job, Put, Tick
from lamsonq.reports import entries

BODY = b"From: a@example.org\r\nTo: b@example.org\r\n\r\nhello\x00\xff\n.\r\nno end"
WINDOW = 60.0
SLEEP, WOKEN = 6.0, 5.0
"""Seconds of a sleep that something is to end, and how soon it has to: a busy machine is late, too."""

_T = TypeVar("_T")


class Word(str):
    """A text of a class of its own, as enums, templates and web frameworks have them."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"<{str.__str__(self)}>"


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Stores(Protocol):
    """How a backend is opened for a test; every test gets one that has no jobs yet."""

    clock: Clock
    """What the backends that are opened go by."""

    def open(self, name: str = "posts") -> Backend:
        """The queue of this name, as a process would that has just started: each call is a worker of its own."""

    def die(self, backend: Backend) -> None:
        """Let this worker end as if it had been killed."""


def push(queue: Backend, body: bytes = BODY, *, outcome: Any = None, gate: Gate | None = None, **fields: Any) -> str:
    """Put one job; its key."""
    key = fields.pop("key", None) or queue.new_key()
    queue.put([Put(queue, Job(key=key, body=body, **fields), outcome, gate)])
    return str(key)


def kept(queue: Backend, body: bytes = b"", gate: Gate | None = None, unique: str | None = None) -> bool:
    """Put one job; whether unique and gate let it in."""
    [result] = queue.put([Put(queue, Job(key=queue.new_key(), body=body, unique=unique), gate=gate)])
    return result


def take(queue: Backend) -> Job:
    """Reserve the one job that is ready."""
    [job] = queue.reserve(1)
    return job


def drain(queue: Backend) -> list[bytes]:
    """The bodies of all ready jobs, settled one by one."""
    bodies = []
    while jobs := queue.reserve(100):
        bodies += [job.body for job in jobs]
        for job in jobs:
            queue.settle(job, DONE)
    return bodies


def counted(queue: Backend) -> dict[str, int]:
    """The counts that are not zero."""
    return {state: number for state, number in queue.counts().items() if number}


def refusal(act: Callable[[], object]) -> str:
    """What a job that is none is refused with."""
    try:
        act()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("it was not refused")


def raises_lease_lost(act: Callable[[], object]) -> bool:
    try:
        act()
    except LeaseLost:
        return True
    return False


def at_once(acts: Iterable[Callable[[], _T]]) -> list[_T]:
    """What these return when all of them begin in the same moment, each in a thread."""
    acts = list(acts)
    gate = threading.Barrier(len(acts))

    def begin(act: Callable[[], _T]) -> _T:
        gate.wait()
        return act()

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(begin, acts))


class BackendConformance:
    """Derive from it and give it a fixture `stores` (see `Stores`)."""

    # -- what goes in comes out ----------------------------------------------------------------------------------

    def test_a_job_comes_back_with_all_that_it_was_put_with(self, stores: Stores) -> None:
        queue = stores.open()
        fields: dict[str, Any] = {
            "sender": "Joe@Example.org",
            "recipients": ("A@b.example", "ü@b.example"),
            "peer": "127.0.0.1:4242",
            "target": "app.handlers.index.START",
            "received": 5.5,
            "expires": stores.clock.now + 100,
            "priority": 7,
            "unique": "a",
            "attempts": 2,
            "metadata": {"k": "v", "ü": "\udcff"},
        }
        key = push(queue, **fields)
        job = take(stores.open())
        assert (job.key, job.body, job.deliveries, job.due) == (key, BODY, 0, None)
        assert {name: getattr(job, name) for name in fields} == fields

    def test_a_text_of_a_class_of_its_own_is_kept_as_its_text(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open("other")
        texts: dict[str, Any] = {name: Word(name) for name in ("sender", "target", "unique", "peer")}
        key = push(queue, recipients=(Word("b@example.org"),), metadata={Word("shop"): Word("7")}, **texts)
        job = take(queue)
        assert (job.sender, job.target, job.unique, job.peer) == ("sender", "target", "unique", "peer")
        assert (job.recipients, job.metadata) == (("b@example.org",), {"shop": "7"})
        told = (job.sender, job.target, job.unique, job.peer, *job.recipients, *job.metadata, *job.metadata.values())
        assert {type(text) for text in told} == {str}
        queue.settle(job, DONE, [Put(other, Job(key=key, body=b"", sender=Word("x")), Dead(Word("of its own")))])
        assert "of its own" in other.report(key)

    def test_the_null_sender_is_not_the_same_as_no_sender(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue, sender="")
        push(queue, sender=None)
        assert [job.sender for job in queue.reserve(2)] == ["", None]

    def test_the_bytes_of_a_message_are_never_changed(self, stores: Stores) -> None:
        queue = stores.open()
        bodies = [b"", b"\n", b"X-Lamsonq-Job: {}\n\nforged", b"x" * 3_000_000, bytes(range(256))]
        for body in bodies:
            push(queue, body)
        assert drain(queue) == bodies

    def test_a_job_without_a_moment_was_received_when_it_was_put(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue)
        assert take(queue).received == stores.clock.now

    def test_a_key_that_is_there_already_is_put_once(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue, b"one")
        push(queue, b"two", key=key)
        assert drain(queue) == [b"one"]

    def test_keys_rise_and_are_nobody_elses(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open()
        made = [store.new_key() for _ in range(50) for store in (queue, other)]
        assert made == sorted(made)
        assert len(set(made)) == 100

    def test_several_puts_are_kept_together(self, stores: Stores) -> None:
        queue = stores.open()
        puts = [Put(queue, Job(key=queue.new_key(), body=b"%d" % n)) for n in range(5)]
        assert queue.put(puts) == [True] * 5
        assert drain(queue) == [b"0", b"1", b"2", b"3", b"4"]

    # -- the order -----------------------------------------------------------------------------------------------

    def test_jobs_come_oldest_first(self, stores: Stores) -> None:
        queue = stores.open()
        keys = [push(queue) for _ in range(30)]
        assert queue.keys() == keys
        assert [job.key for job in queue.reserve(10)] + [job.key for job in queue.reserve(100)] == keys

    def test_the_most_urgent_come_first_and_the_oldest_of_them(self, stores: Stores) -> None:
        queue = stores.open()
        for priority, body in [(10, b"c"), (0, b"a"), (4_000_000, b"e"), (9, b"b"), (10, b"d")]:
            push(queue, body, priority=priority)
        assert drain(queue) == [b"a", b"b", b"c", b"d", b"e"]

    def test_a_job_that_no_store_could_keep_is_refused_by_name(self, stores: Stores) -> None:
        queue = stores.open()
        for priority in (2**70, -1, 1.5, "urgent"):
            assert refusal(partial(push, queue, priority=priority)).startswith(f"priority={priority!r}: ")
        wrong: tuple[dict[str, Any], ...] = (
            {"sender": 3},
            {"recipients": ("a", 3)},
            {"metadata": {"a": 3}},
            {"key": 3},
        )
        for fields in wrong:
            assert "texts, not 3" in refusal(partial(push, queue, **fields))
        assert "bytes, not str" in refusal(partial(push, queue, cast(bytes, "text")))
        assert counted(queue) == {}

    def test_an_urgent_job_that_comes_late_is_next(self, stores: Stores) -> None:
        queue = stores.open()
        for number in range(3):
            push(queue, b"%d" % number, priority=5)
        first = take(queue)
        push(queue, b"urgent", priority=1)
        assert [first.body, take(queue).body, take(queue).body] == [b"0", b"urgent", b"1"]

    def test_no_more_are_reserved_than_were_asked_for(self, stores: Stores) -> None:
        queue = stores.open()
        for _ in range(5):
            push(queue)
        assert len(queue.reserve(3)) == 3
        assert queue.reserve(0) == []
        assert counted(queue) == {"ready": 2, "reserved": 3}

    def test_only_jobs_with_these_targets_are_reserved(self, stores: Stores) -> None:
        queue = stores.open()
        for target in ("other", None, "mine", "other", "mine2"):
            push(queue, str(target).encode(), target=target)
        assert [job.target for job in queue.reserve(9, only={"mine", "mine2"})] == ["mine", "mine2"]
        assert queue.reserve(9, only=frozenset()) == []
        assert [job.target for job in stores.open().reserve(9)] == ["other", None, "other"]
        assert all(job.deliveries == 0 for job in queue.reserve(9))

    # -- delays --------------------------------------------------------------------------------------------------

    def test_a_delayed_job_comes_when_it_is_due_and_not_before(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue, due=stores.clock.now + 10)
        assert (queue.reserve(1), counted(queue)) == ([], {"delayed": 1})
        stores.clock.now += 9.9
        assert stores.open().reserve(1) == []
        stores.clock.now += 0.2
        assert take(stores.open()).body == BODY

    def test_what_is_due_already_is_ready(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue, due=stores.clock.now - 1)
        assert take(queue).due is None

    def test_delayed_jobs_come_in_the_order_in_which_they_are_due(self, stores: Stores) -> None:
        queue = stores.open()
        for delay in (30, 10, 20):
            push(queue, b"%d" % delay, due=stores.clock.now + delay)
        found = []
        for _ in range(3):
            stores.clock.now += 10
            found += drain(queue)
        assert found == [b"10", b"20", b"30"]

    def test_a_delay_outlives_the_process_that_asked_for_it(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue, due=stores.clock.now + 10)
        stores.die(queue)
        other = stores.open()
        assert counted(other) == {"delayed": 1}
        stores.clock.now += 11
        assert len(other.reserve(1)) == 1

    # -- outcomes ------------------------------------------------------------------------------------------------

    def test_what_is_done_is_gone(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        queue.settle(take(queue), DONE)
        assert (counted(queue), queue.get(key), queue.state(key)) == ({}, None, None)

    def test_what_is_kept_lies_in_the_archive_and_can_be_run_again(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        queue.settle(take(queue), KEPT)
        assert (counted(queue), queue.state(key), queue.keys("done")) == ({"done": 1}, "done", [key])
        assert queue.reserve(1) == []
        assert queue.kick(key)
        assert take(queue).key == key

    def test_what_has_expired_is_gone(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue, expires=stores.clock.now - 1)
        queue.settle(take(queue), EXPIRED)
        assert counted(queue) == {}

    def test_later_is_delayed_and_counted_with_its_reason(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        queue.settle(take(queue), Later("the disk is full", at=stores.clock.now + 5))
        assert counted(queue) == {"delayed": 1}
        stores.clock.now += 6
        job = take(stores.open())
        assert (job.attempts, job.deliveries) == (1, 0)
        [entry] = entries(queue.report(key))
        assert (entry.reason, entry.attempt, entry.at) == ("the disk is full", 1, stores.clock.now - 6)

    def test_later_without_a_moment_waits_a_while(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue)
        queue.settle(take(queue), Later("soon"))
        stores.clock.now += 1
        assert queue.reserve(1) == []
        stores.clock.now += 4
        assert len(queue.reserve(1)) == 1

    def test_a_job_given_back_uncounted_is_as_if_it_had_never_been_taken(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        for _ in range(DELIVERIES_MAX + 2):
            queue.settle(take(queue), Later(counted=False))
        job = take(queue)
        assert (job.key, job.attempts, job.deliveries, queue.report(key)) == (key, 0, 0, "")
        queue.settle(job, Later("busy", stores.clock.now + 2, counted=False))
        assert (queue.reserve(1), counted(queue)) == ([], {"delayed": 1})

    def test_dead_letters_are_kept_with_reason_and_traceback(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        dead = Dead("no such list")
        try:
            raise ValueError("because\nof this")
        except ValueError as error:
            dead.__cause__ = error
        queue.settle(take(queue), dead)
        assert (counted(queue), queue.state(key), queue.keys("dead")) == ({"dead": 1}, "dead", [key])
        assert queue.reserve(1) == []
        [entry] = entries(stores.open().report(key))
        assert entry.reason == "no such list"
        assert "ValueError: because" in entry.details
        found = queue.get(key)
        assert found is not None
        assert (found.body, found.attempts) == (BODY, 1)

    def test_each_failure_is_told_behind_the_others(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        for reason in ("one", "two"):
            queue.settle(take(queue), Later(reason, stores.clock.now + 1))
            stores.clock.now += 2
        queue.settle(take(queue), Dead("three"))
        found = [(entry.attempt, entry.reason) for entry in entries(queue.report(key))]
        assert found == [(1, "one"), (2, "two"), (3, "three")]

    def test_a_job_may_be_put_as_delayed_dead_or_done(self, stores: Stores) -> None:
        queue = stores.open()
        later = push(queue, outcome=Later("busy", stores.clock.now + 3), attempts=1)
        dead = push(queue, outcome=Dead("no"), attempts=1)
        done = push(queue, outcome=KEPT)
        assert [queue.state(key) for key in (later, dead, done)] == ["delayed", "dead", "done"]
        assert [entry.reason for key in (later, dead, done) for entry in entries(queue.report(key))] == ["busy", "no"]

    # -- claims ----------------------------------------------------------------------------------------------------

    def test_a_job_has_one_worker(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open()
        push(queue)
        take(queue)
        assert (other.reserve(1), counted(other)) == ([], {"reserved": 1})

    def test_of_many_workers_each_job_has_one(self, stores: Stores) -> None:
        workers = [stores.open() for _ in range(4)]
        keys = [push(workers[0], b"") for _ in range(60)]

        def work(queue: Backend) -> list[str]:
            found = []
            while jobs := queue.reserve(3):
                for job in jobs:
                    queue.settle(job, DONE)
                    found.append(job.key)
            return found

        found = [key for part in at_once([partial(work, queue) for queue in workers]) for key in part]
        assert sorted(found) == keys

    def test_a_job_is_settled_once(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue)
        job = take(queue)
        queue.settle(job, DONE)
        assert raises_lease_lost(lambda: queue.settle(job, DONE))
        assert raises_lease_lost(lambda: queue.touch(job))

    def test_who_has_lost_a_claim_changes_nothing(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open()
        push(queue)
        lost = take(queue)
        stores.die(queue)
        assert other.release_stale() == 1
        again = take(other)
        child = Put(queue, Job(key=queue.new_key(), body=b"child"))
        for outcome in (DONE, KEPT, Dead("x"), Later("x"), Later(counted=False), EXPIRED):
            assert raises_lease_lost(partial(queue.settle, lost, outcome, [child]))
        assert raises_lease_lost(lambda: queue.touch(lost))
        other.touch(again)
        assert counted(other) == {"reserved": 1}
        other.settle(again, DONE)
        assert counted(other) == {}

    def test_several_jobs_are_finished_at_once(self, stores: Stores) -> None:
        queue = stores.open()
        for n in range(4):
            push(queue, b"%d" % n)
        jobs = queue.reserve(4)
        assert queue.finish(jobs[:2], DONE) == []
        assert queue.finish(jobs[2:3], KEPT) == []
        assert counted(queue) == {"reserved": 1, "done": 1}
        assert queue.finish([], DONE) == []

    def test_of_jobs_that_are_finished_at_once_those_that_were_lost_come_back(self, stores: Stores) -> None:
        queue = stores.open()
        for _ in range(3):
            push(queue)
        first, second, third = queue.reserve(3)
        queue.settle(second, Later(counted=False))
        assert queue.finish([first, second, third], DONE) == [second]
        assert counted(queue) == {"ready": 1}

    def test_a_job_that_was_never_reserved_cannot_be_settled(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        found = queue.get(key)
        assert found is not None
        assert raises_lease_lost(lambda: queue.settle(found, DONE))
        assert counted(queue) == {"ready": 1}

    def test_the_job_of_a_dead_worker_comes_again_counted(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        take(queue)
        stores.die(queue)
        other = stores.open()
        other.release_stale()
        job = take(other)
        assert (job.key, job.deliveries, job.attempts) == (key, 1, 0)
        other.settle(job, Later("not its fault", stores.clock.now + 1))
        stores.clock.now += 2
        assert (take(other).deliveries, counted(other)) == (0, {"reserved": 1})

    def test_a_job_that_kills_its_workers_is_a_dead_letter(self, stores: Stores) -> None:
        key = push(stores.open())
        for _ in range(DELIVERIES_MAX):
            worker = stores.open()
            worker.release_stale()
            take(worker)
            stores.die(worker)
        other = stores.open()
        other.release_stale()
        assert (other.reserve(1), other.state(key)) == ([], "dead")
        assert f"the worker died {DELIVERIES_MAX} times" in other.report(key)

    def test_a_worker_that_is_being_stopped_may_be_killed_and_harms_no_job(self, stores: Stores) -> None:
        key = push(stores.open())
        for _ in range(DELIVERIES_MAX + 1):
            worker = stores.open()
            worker.release_stale()
            take(worker)
            worker.forgive()
            stores.die(worker)
        other = stores.open()
        other.release_stale()
        job = take(other)
        assert (job.key, job.deliveries) == (key, 0)

    def test_what_is_forgiven_can_still_be_settled(self, stores: Stores) -> None:
        queue = stores.open()
        for _ in range(3):
            push(queue)
        one, two, three = queue.reserve(3)
        queue.forgive()
        queue.touch(one)
        queue.settle(one, DONE)
        queue.settle(two, Later("x", stores.clock.now + 1))
        queue.settle(three, Later(counted=False))
        assert counted(queue) == {"delayed": 1, "ready": 1}
        assert take(queue).deliveries == 0

    def test_a_worker_that_closes_gives_its_jobs_back_uncounted(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue)
        take(queue)
        queue.close()
        job = take(stores.open())
        assert (job.key, job.deliveries) == (key, 0)

    def test_a_claim_that_is_forgiven_and_given_back_leaves_the_deliveries_before_it(self, stores: Stores) -> None:
        killed, queue = stores.open(), stores.open()
        key = push(killed)
        take(killed)
        stores.die(killed)
        queue.release_stale()
        take(queue)
        queue.forgive()
        queue.close()
        job = take(stores.open())
        assert (job.key, job.deliveries) == (key, 1)

    # -- one commit point ----------------------------------------------------------------------------------------

    def test_what_came_of_a_job_is_there_when_it_is_settled(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open("others")
        push(queue)
        job = take(queue)
        puts = [
            Put(queue, Job(key=queue.new_key(), body=b"here", metadata={"a": "b"})),
            Put(other, Job(key=other.new_key(), body=b"there", target="x", priority=2)),
            Put(queue, Job(key=queue.new_key(), body=b"dead", attempts=1), Dead("no")),
        ]
        assert counted(other) == {}
        assert queue.settle(job, DONE, puts) == [True, True, True]
        assert (counted(queue), counted(other)) == ({"ready": 1, "dead": 1}, {"ready": 1})
        found = take(other)
        assert (found.body, found.target, found.priority) == (b"there", "x", 2)
        assert take(queue).metadata == {"a": "b"}

    def test_what_came_of_a_job_that_failed_is_there_too(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue)
        queue.settle(take(queue), Dead("no"), [Put(queue, Job(key=queue.new_key(), body=b"answer"))])
        assert counted(queue) == {"ready": 1, "dead": 1}

    def test_what_came_of_a_job_may_go_to_a_store_of_another_kind(self, stores: Stores) -> None:
        from lamsonq.backends.memory import Memory

        queue, other = stores.open(), Memory(f"memory:{id(stores)}")
        push(queue)
        queue.settle(take(queue), DONE, [Put(other, Job(key=other.new_key(), body=b"there"))])
        assert (counted(queue), drain(other)) == ({}, [b"there"])

    def test_a_key_that_a_settle_puts_again_is_put_once(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open("others")
        push(queue)
        key = push(other, b"one")
        queue.settle(take(queue), DONE, [Put(other, Job(key=key, body=b"two"))])
        assert drain(other) == [b"one"]

    # -- unique, debounce, cron ------------------------------------------------------------------------------------

    def test_of_like_jobs_one_waits(self, stores: Stores) -> None:
        queue = stores.open()
        other = stores.open()
        assert kept(queue, b"1", unique="u")
        assert not kept(other, b"2", unique="u")
        assert kept(other, b"3", unique="v")
        assert drain(queue) == [b"1", b"3"]

    def test_a_like_job_is_kept_out_while_the_first_is_delayed_or_worked(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue, b"1", unique="u", due=stores.clock.now + 5)
        push(queue, b"2", unique="u")
        assert counted(queue) == {"delayed": 1}
        stores.clock.now += 6
        job = take(queue)
        push(queue, b"3", unique="u")
        queue.settle(job, Later("again", stores.clock.now + 1))
        push(queue, b"4", unique="u")
        assert counted(queue) == {"delayed": 1}

    def test_a_like_job_may_come_when_the_first_has_ended(self, stores: Stores) -> None:
        queue = stores.open()
        for outcome in (DONE, KEPT, Dead("no"), EXPIRED):
            push(queue, b"x", unique="u")
            queue.settle(take(queue), outcome)
        push(queue, b"last", unique="u")
        assert drain(queue) == [b"last"]
        key = push(queue, b"y", unique="u")
        assert queue.remove(key)
        push(queue, b"z", unique="u")
        assert drain(queue) == [b"z"]

    def test_a_job_that_ends_is_not_in_the_way_of_a_like_one_that_it_puts(self, stores: Stores) -> None:
        queue = stores.open()
        for outcome in (DONE, KEPT, Dead("no")):
            push(queue, b"1", unique="u")
            job = take(queue)
            assert queue.settle(job, outcome, [Put(queue, Job(key=queue.new_key(), body=b"2", unique="u"))]) == [True]
            assert drain(queue) == [b"2"]
        push(queue, b"1", unique="u")
        again = Later("later", stores.clock.now + 5)
        assert queue.settle(take(queue), again, [Put(queue, Job(key=queue.new_key(), body=b"2", unique="u"))]) == [
            False
        ]
        assert counted(queue) == {"delayed": 1, "done": 1, "dead": 1}

    def test_what_has_ended_is_in_nobodys_way(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue, b"1", unique="u")
        for outcome in (Dead("no"), KEPT):
            push(queue, b"2", unique="u", outcome=outcome)
        push(queue, b"3", unique="u")
        assert counted(queue) == {"ready": 1, "dead": 1, "done": 1}
        assert drain(queue) == [b"1"]

    def test_of_racing_like_jobs_one_is_kept(self, stores: Stores) -> None:
        queues = [stores.open() for _ in range(6)]
        for name in ("a", "b", "c"):
            results = at_once(partial(kept, queue, unique=name) for queue in queues)
            assert results.count(True) == 1
        assert counted(queues[0]) == {"ready": 3}

    def test_a_settle_keeps_to_unique_too(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue)
        job = take(queue)
        push(queue, b"first", unique="u")
        results = queue.settle(job, DONE, [Put(queue, Job(key=queue.new_key(), body=b"second", unique="u"))])
        assert (results, drain(queue)) == ([False], [b"first"])

    def test_debounced_the_first_runs_at_once_and_one_more_at_the_end_of_the_window(self, stores: Stores) -> None:
        queue, gate = stores.open(), Debounce("key", WINDOW)
        for body in (b"1", b"2", b"3"):
            push(queue, body, gate=gate)
        assert (drain(queue), counted(queue)) == ([b"1"], {"delayed": 1})
        stores.clock.now += WINDOW - 1
        push(stores.open(), b"4", gate=gate)
        assert drain(queue) == []
        stores.clock.now += 2
        push(queue, b"5", gate=gate)
        assert (drain(queue), counted(queue)) == ([b"2"], {"delayed": 1})
        stores.clock.now += 3 * WINDOW
        assert drain(queue) == [b"5"]
        push(queue, b"6", gate=gate)
        assert drain(queue) == [b"6"]

    def test_debounced_and_always_delayed_one_runs_at_the_end_of_each_window(self, stores: Stores) -> None:
        queue, gate = stores.open(), Debounce("key", WINDOW, always_delay=True)
        for body in (b"1", b"2"):
            push(queue, body, gate=gate)
        assert (drain(queue), counted(queue)) == ([], {"delayed": 1})
        stores.clock.now += WINDOW + 1
        assert drain(queue) == [b"1"]
        push(queue, b"3", gate=gate)
        assert (drain(queue), counted(queue)) == ([], {"delayed": 1})

    def test_of_racing_debounced_jobs_one_runs_in_a_window(self, stores: Stores) -> None:
        queues = [stores.open() for _ in range(6)]
        gate = Debounce("key", WINDOW)
        results = at_once(partial(kept, queue, gate=gate) for queue in queues)
        assert results.count(True) == 2
        assert counted(queues[0]) == {"ready": 1, "delayed": 1}

    def test_a_clock_that_is_put_back_holds_no_debounced_job_up(self, stores: Stores) -> None:
        queue, gate = stores.open(), Debounce("key", WINDOW)
        push(queue, b"1", gate=gate)
        stores.clock.now -= 10 * WINDOW
        push(queue, b"2", gate=gate)
        assert drain(queue) == [b"1", b"2"]

    def test_each_tick_is_put_once_by_whomever(self, stores: Stores) -> None:
        queues = [stores.open() for _ in range(5)]
        for at in (100.0, 200.0):
            results = at_once(partial(kept, queue, gate=Tick("cron", at)) for queue in queues)
            assert results.count(True) == 1
        assert drain(queues[0]) == [b"", b""]
        assert queues[0].put([Put(queues[0], Job(key=queues[0].new_key(), body=b""), gate=Tick("cron", 150.0))]) == [
            False
        ]

    # -- waiting -------------------------------------------------------------------------------------------------

    def test_a_waiting_worker_hears_of_a_job_that_another_process_puts(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open()
        assert queue.reserve(1) == []
        later = threading.Timer(0.1, lambda: push(other))
        later.start()
        begun = time.monotonic()
        found: list[Job] = []
        while not found and time.monotonic() - begun < SLEEP:
            found = queue.reserve(1, wait=SLEEP)
        assert [job.body for job in found] == [BODY]
        assert time.monotonic() - begun < WOKEN
        later.join()

    def test_waiting_claims_nothing_and_ends_when_there_is_something(self, stores: Stores) -> None:
        queue = stores.open()
        push(stores.open())
        begun = time.monotonic()
        queue.wait(SLEEP)
        assert (counted(queue), time.monotonic() - begun < WOKEN) == ({"ready": 1}, True)

    def test_who_asks_for_some_targets_sleeps_while_there_are_only_others(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue)
        push(queue, target="other")
        assert queue.reserve(1, only={"mine"}) == []
        begun = time.monotonic()
        queue.wait(0.2)
        assert time.monotonic() - begun > 0.15
        push(stores.open(), target="mine")
        queue.wait(60)
        assert [job.target for job in queue.reserve(9, only={"mine"})] == ["mine"]

    def test_wake_ends_a_wait_also_one_that_begins_later(self, stores: Stores) -> None:
        queue = stores.open()
        begun = time.monotonic()
        queue.wake()
        queue.reserve(1, wait=SLEEP)
        threading.Timer(0.05, queue.wake).start()
        queue.wait(SLEEP)
        assert time.monotonic() - begun < WOKEN

    # -- looking and mending ---------------------------------------------------------------------------------------

    def test_looking_claims_nothing(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue, sender="a@b.example")
        found = stores.open().get(key)
        assert found is not None
        assert (found.body, found.sender, found.claim) == (BODY, "a@b.example", "")
        assert (queue.get("nothing"), queue.state("nothing"), queue.report("nothing")) == (None, None, "")
        assert take(queue).deliveries == 0

    def test_a_job_is_counted_under_one_state(self, stores: Stores) -> None:
        queue = stores.open()
        for outcome in (None, Later("x", stores.clock.now + 9), Dead("x"), KEPT):
            push(queue, outcome=outcome, attempts=1)
        push(queue)
        take(queue)
        assert queue.counts() == {"ready": 1, "delayed": 1, "reserved": 1, "dead": 1, "done": 1}
        assert set(queue.counts()) == set(STATES)
        assert all(len(queue.keys(state)) == 1 for state in STATES)

    def test_a_word_that_is_no_state_is_refused(self, stores: Stores) -> None:
        told = ""
        try:
            stores.open().keys("gone")
        except ValueError as error:
            told = str(error)
        assert "ready" in told

    def test_kicked_jobs_are_ready_with_their_counts_at_zero(self, stores: Stores) -> None:
        queue = stores.open()
        dead = push(queue, outcome=Dead("no"), attempts=3)
        later = push(queue, outcome=Later("x", stores.clock.now + 9), attempts=1)
        ready = push(queue)
        assert [queue.kick(key) for key in (dead, later, ready, "nothing")] == [True, True, False, False]
        assert [(job.key, job.attempts) for job in queue.reserve(9)] == [(dead, 0), (later, 0), (ready, 0)]

    def test_a_dead_letter_that_comes_from_elsewhere_keeps_its_report_as_it_was(self, stores: Stores) -> None:
        queue = stores.open()
        key = push(queue, outcome=Dead("no such post"), attempts=2)
        report = queue.report(key)
        other = stores.open("others")
        other.put([Put(other, Job(key=key, body=BODY, attempts=2), Dead(), report=report)])
        assert (other.state(key), other.report(key)) == ("dead", report)

    def test_a_job_that_nobody_works_can_be_removed(self, stores: Stores) -> None:
        queue = stores.open()
        dead, later = push(queue, outcome=Dead("no")), push(queue, due=stores.clock.now + 9)
        key = push(queue)
        job = take(queue)
        assert [queue.remove(k) for k in (key, dead, later, later)] == [False, True, True, False]
        queue.settle(job, DONE)
        assert counted(queue) == {}

    def test_one_job_can_be_claimed_by_its_key_in_any_state_but_reserved(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open()
        keys = [
            push(queue),
            push(queue, due=stores.clock.now + 9),
            push(queue, outcome=Dead("no")),
            push(queue, outcome=KEPT),
        ]
        for key in keys:
            job = other.claim(key)
            assert job is not None
            assert (job.key, job.body, queue.state(key)) == (key, BODY, "reserved")
            assert queue.claim(key) is None
            other.settle(job, DONE)
        assert (counted(queue), queue.claim("nothing")) == ({}, None)

    def test_what_a_tool_had_claimed_when_it_died_goes_back_as_it_was(self, stores: Stores) -> None:
        ends: list[Callable[[Backend], None]] = [stores.die, lambda tool: tool.close()]
        for end in ends:
            queue, tool = stores.open(), stores.open()
            keys = [
                push(queue),
                push(queue, due=stores.clock.now + 9),
                push(queue, outcome=Later("busy", at=stores.clock.now + 60), attempts=2),
                push(queue, outcome=Dead("no"), attempts=3),
                push(queue, outcome=KEPT),
            ]
            before = [(queue.state(key), queue.get(key), queue.report(key)) for key in keys]
            assert all(tool.claim(key) for key in keys)
            end(tool)
            queue.release_stale()
            assert [(queue.state(key), queue.get(key), queue.report(key)) for key in keys] == before
            [job] = queue.reserve(9)
            assert job.key == keys[0]
            queue.settle(job, DONE)
            assert [queue.purge(state) for state in ("delayed", "dead", "done")] == [2, 1, 1]

    def test_purging_deletes_one_state_or_what_has_been_in_it_for_long(self, stores: Stores) -> None:
        queue = stores.open()
        stores.clock.now = time.time()
        push(queue)
        push(queue, outcome=Dead("no"))
        assert queue.purge("dead", before=stores.clock.now - 100) == 0
        assert queue.purge("dead", before=stores.clock.now + 100) == 1
        assert counted(queue) == {"ready": 1}
        assert (queue.purge("ready"), queue.purge("ready"), counted(queue)) == (1, 0, {})

    def test_nothing_is_reserved_from_a_paused_queue_by_any_process(self, stores: Stores) -> None:
        queue, other = stores.open(), stores.open()
        push(queue)
        queue.pause()
        assert (other.paused(), other.reserve(1), counted(other)) == (True, [], {"ready": 1})
        other.resume()
        assert (queue.paused(), len(queue.reserve(1))) == (False, 1)

    def test_a_pause_keeps_nobody_from_putting_and_settling(self, stores: Stores) -> None:
        queue = stores.open()
        push(queue)
        job = take(queue)
        queue.pause()
        push(queue, b"another")
        queue.settle(job, DONE)
        assert counted(queue) == {"ready": 1}
        queue.resume()
        assert drain(queue) == [b"another"]

    def test_the_age_of_a_queue_is_that_of_its_oldest_ready_job(self, stores: Stores) -> None:
        queue = stores.open()
        assert queue.oldest() is None
        push(queue, received=stores.clock.now - 50)
        push(queue, received=stores.clock.now - 10)
        assert abs((queue.oldest() or 0) - (stores.clock.now - 50)) < 1.5
        take(queue)
        assert abs((queue.oldest() or 0) - (stores.clock.now - 10)) < 1.5

    def test_queues_do_not_share_jobs(self, stores: Stores) -> None:
        posts, others = stores.open(), stores.open("others")
        push(posts, unique="u")
        push(others, unique="u")
        posts.pause()
        assert (counted(others), others.paused()) == ({"ready": 1}, False)
        assert others.purge("ready") == 1
        assert counted(posts) == {"ready": 1}
