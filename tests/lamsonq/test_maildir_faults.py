"""The maildir queue when a call of the operating system fails, or the process is killed in the middle of anything.

What is asked each time: the caller is told or it is tried again, no job is lost, none is half there, and what a gate or
`unique` promises is kept.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq.backends import rounds
from lamsonq.backends.maildir import Maildir
from lamsonq.backends.memory import Memory
from lamsonq.conformance import BODY, Clock, push
from lamsonq.errors import Dead, Later, LeaseLost, QueueError
from lamsonq.jobs import DONE, KEPT, STATES, Debounce, Gate, Job, Outcome, Put, Tick

from .faults import CODES, LOOKING, WRITING, Crash, Faults

HOUR = 3600.0
ONE_CODE = [CODES[0], *(pytest.param(code, marks=pytest.mark.slow) for code in CODES[1:])]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unique": {"unique": "u"},
    "debounced": {"gate": Debounce("g", HOUR)},
    "debounced after the window": {"gate": Debounce("g", HOUR, always_delay=True)},
    "tick": {"gate": Tick("g", 100.0)},
    "unique tick": {"unique": "u", "gate": Tick("g", 100.0)},
}
OUTCOMES: dict[str, Callable[[], Outcome]] = {
    "done": lambda: DONE,
    "kept": lambda: KEPT,
    "later": lambda: Later("busy", 2e9),
    "dead": lambda: Dead("no"),
}
ONE_OUTCOME = ["done", *(pytest.param(outcome, marks=pytest.mark.slow) for outcome in list(OUTCOMES)[1:])]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Maildir]]:
    """`make("posts")` opens a queue under tmp_path, as a process would that has just started."""
    made: list[Maildir] = []

    def open_one(name: str = "posts") -> Maildir:
        made.append(Maildir(str(tmp_path / name), now=clock))
        return made[-1]

    yield open_one
    for queue in made:
        queue.close()


def put_of(queue: Maildir, unique: str | None = None, gate: Gate | None = None, body: bytes = BODY) -> Put:
    return Put(queue, Job(key=queue.new_key(), body=body, unique=unique), gate=gate)


def bodies(queue: Maildir, *states: str) -> list[bytes]:
    """What is in the queue, whole."""
    jobs = [queue.get(key) for state in states or STATES for key in queue.keys(state)]
    return sorted(job.body for job in jobs if job is not None)


def names(queue: Maildir, folder: str) -> list[str]:
    return sorted(os.listdir(queue.folders.at(folder)))


# -- putting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ONE_CODE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_put_that_fails_at_any_call_has_not_happened(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    faults = Faults(monkeypatch, (*WRITING, *LOOKING))
    refused = 0
    for at in range(1000):
        queue = make(f"{at}")
        queue.folders.make()
        faults.fail(at, code)
        try:
            [kept] = queue.put([put_of(queue, **KINDS[kind])])
        except QueueError:
            failed = faults.heal()
            refused += 1
            assert bodies(queue) == [], (at, faults.seen)
            assert names(queue, "tmp") == [], (at, faults.seen)
            [kept] = queue.put([put_of(queue, **KINDS[kind])])
        else:
            failed = faults.heal()
        assert kept, (at, faults.seen)
        assert bodies(queue) == [BODY]
        if not failed:
            break
    assert refused > (2 if kind == "plain" else 6)


@pytest.mark.parametrize("code", ONE_CODE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_goes_in_the_middle_of_a_put_leaves_one_job_or_none(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    """Undoing fails too: who puts again, as he must, has one job of a tick and of a unique."""
    faults = Faults(monkeypatch)
    for at in range(1000):
        queue = make(f"{at}")
        queue.folders.make()
        faults.fail(at, code, lasting=True)
        told = True
        try:
            queue.put([put_of(queue, **KINDS[kind])])
        except QueueError:
            told = False
        failed = faults.heal()
        left = len(bodies(queue))
        assert left == 1 if told else left <= 1
        queue.put([put_of(queue, **KINDS[kind])])
        assert set(bodies(queue)) == {BODY}
        if kind in ("unique", "tick", "unique tick"):
            assert len(bodies(queue)) == 1, (at, faults.seen)
        if not failed:
            break
    assert at > 4


@pytest.mark.parametrize("lasting", [False, True])
def test_ticks_of_one_call_are_undone_together(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    faults = Faults(monkeypatch)
    for at in range(1000):
        queue = make(f"{at}")
        push(queue, b"0", gate=Tick("g", 0.0))
        faults.fail(at, errno.ENOSPC, lasting=lasting)
        told = True
        try:
            queue.put([put_of(queue, gate=Tick("g", float(n)), body=b"%d" % n) for n in (1, 2, 3)])
        except QueueError:
            told = False
        failed = faults.heal()
        assert told or lasting or bodies(queue) == [b"0"], (at, faults.seen)
        queue.put([put_of(queue, gate=Tick("g", float(n)), body=b"%d" % n) for n in (0, 1, 2, 3)])
        assert bodies(queue) == [b"0", b"1", b"2", b"3"], (at, faults.seen)
        if not failed:
            break
    assert at > 20


def killed_at(at: int, act: Callable[[], object]) -> bool:
    """Whether a process that does this is ended by a SIGKILL before its call number `at`."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch)
            faults.fail(at, None)
            try:
                act()
            finally:
                os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_call_of_a_put_loses_nothing_and_repeats_no_tick(make: Callable[..., Maildir], kind: str) -> None:
    found = set()
    for at in range(1000):
        queue = make(f"{at}")
        queue.folders.make()
        killed = killed_at(at, lambda queue=queue: queue.put([put_of(queue, **KINDS[kind])]))  # type: ignore[misc]
        before = len(bodies(queue))
        found.add(before)
        assert before <= 1
        [kept] = queue.put([put_of(queue, body=b"again", **KINDS[kind])])
        if "gate" in KINDS[kind] or "unique" in KINDS[kind]:
            assert kept == (before == 0) or kind == "debounced", at
        assert len(bodies(queue)) == before + kept
        if kind != "debounced":
            assert queue.put([put_of(queue, **KINDS[kind])]) == [kind == "plain"]
        if not killed:
            break
    assert found == {0, 1}
    assert at > (4 if kind == "plain" else 6)


@pytest.mark.slow
def test_a_kill_within_a_put_of_several_keeps_each_or_not(make: Callable[..., Maildir]) -> None:
    for at in range(1000):
        queue = make(f"{at}")
        queue.folders.make()
        puts = [put_of(queue, f"u{number}", Tick(f"g{number}", 1.0), b"%d" % number) for number in range(3)]
        killed = killed_at(at, lambda queue=queue, puts=puts: queue.put(puts))  # type: ignore[misc]
        before = bodies(queue)
        again = [put_of(queue, f"u{number}", Tick(f"g{number}", 1.0), b"%d" % number) for number in range(3)]
        kept = [put.job.body for put in again if queue.put([put]) == [True]]
        assert sorted(before + kept) == bodies(queue) == [b"0", b"1", b"2"], at
        if not killed:
            break
    assert at > 20


# -- claiming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ONE_CODE)
@pytest.mark.parametrize("lasting", [False, True])
def test_a_claim_that_fails_at_any_call_is_tried_again_uncounted(
    make: Callable[..., Maildir],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    lasting: bool,
) -> None:
    faults = Faults(monkeypatch, (*WRITING, *LOOKING))
    for at in range(1000):
        queue = make(f"{at}")
        push(queue, unique="u")
        queue.reserve(0)
        faults.fail(at, code, lasting=lasting)
        jobs = []
        try:
            jobs = queue.reserve(1)
        except QueueError:
            pass
        failed = faults.heal()
        queue._vigil.look_now()
        jobs = jobs or queue.reserve(1)
        if not jobs:  # a file that cannot be read stops nobody: who is asked next may be able to
            assert code != errno.EMFILE
            assert "is left alone" in caplog.messages[-1]
            queue = make(f"{at}")
            jobs = queue.reserve(1)
        assert [(job.body, job.deliveries) for job in jobs] == [(BODY, 0)], (at, faults.seen)
        assert queue.counts()["reserved"] == 1
        queue.settle(jobs[0], DONE)
        if not failed:
            break
    assert at > 3


@pytest.mark.parametrize("folder", ["new", "claimed"])
def test_while_a_folder_is_immutable_nothing_is_claimed_and_afterwards_everything(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    queue = make()
    keys = [push(queue), push(queue)]
    queue.reserve(0)
    access = os.access
    with monkeypatch.context() as immutable:
        immutable.setattr(os, "rename", may_not_be_moved)
        immutable.setattr(os, "access", lambda path, mode: folder not in path and access(path, mode))
        with pytest.raises(QueueError, match="Operation not permitted"):
            queue.reserve(2)
    assert sorted(job.key for job in queue.reserve(2) + queue.reserve(2)) == keys


def test_a_file_that_is_immutable_itself_stops_no_other(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    queue = make()
    immutable, movable = push(queue), push(queue)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (may_not_be_moved if immutable in old else rename)(old, new))
    assert [job.key for job in queue.reserve(2)] == [movable]
    assert "is left alone: it may not be moved" in caplog.text
    assert queue.state(immutable) == "ready"


def may_not_be_moved(old: str, new: str) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), old, new)


@pytest.mark.parametrize("code", ONE_CODE)
def test_a_delayed_job_that_cannot_be_moved_when_it_is_due_is_moved_later(
    make: Callable[..., Maildir], clock: Clock, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    faults = Faults(monkeypatch)
    queue = make()
    push(queue, due=clock.now + 5)
    queue.reserve(1, wait=0.01)
    clock.now += 6
    faults.fail(0, code)
    with pytest.raises(QueueError):
        queue.reserve(1)
    assert faults.heal()
    assert len(queue.reserve(1)) == 1


@pytest.mark.parametrize("code", ONE_CODE)
@pytest.mark.parametrize("state", ["ready", "dead"])
def test_a_tools_claim_that_fails_at_any_call_leaves_the_job_where_it_was(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    faults = Faults(monkeypatch, (*WRITING, *LOOKING))
    for at in range(1000):
        queue = make(f"{at}")
        key = push(queue, outcome=Dead("no") if state == "dead" else None)
        faults.fail(at, code)
        job = None
        try:
            job = queue.claim(key)
        except QueueError:
            faults.heal()
            assert queue.state(key) == state
        failed = faults.heal()
        job = job or queue.claim(key)
        assert job is not None, (at, faults.seen)
        queue.settle(job, DONE)
        if not failed:
            break
    assert at > 3


# -- settling ----------------------------------------------------------------------------------------------------


def children(queue: Maildir, other: Maildir) -> list[Put]:
    return [
        put_of(queue, body=b"child 1"),
        put_of(other, "u", body=b"child 2"),
        put_of(other, gate=Tick("g", 100.0), body=b"child 3"),
        put_of(other, "v", Debounce("h", HOUR, always_delay=True), body=b"child 4"),
        Put(other, Job(key=other.new_key(), body=b"child 5"), Dead("bad"), report="before\n"),
        Put(queue, Job(key=queue.new_key(), body=b"child 6"), KEPT),
    ]


CHILDREN = [b"child %d" % number for number in range(1, 7)]
STAY = {"done": [], "kept": [b"parent"], "later": [b"parent"], "dead": [b"parent"]}
STATE = {"kept": "done", "later": "delayed", "dead": "dead"}


def everything(*queues: Maildir) -> list[bytes]:
    return sorted(body for queue in queues for body in bodies(queue))


@pytest.mark.parametrize("code", ONE_CODE)
@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("lasting", [False, True])
def test_a_settle_that_fails_at_any_call_has_settled_or_has_not(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, outcome: str, code: int, lasting: bool
) -> None:
    faults = Faults(monkeypatch)
    refused = 0
    for at in range(1000):
        queue = make(f"{at}")
        push(queue, b"parent", unique="p")
        [job] = queue.reserve(1)
        faults.fail(at, code, lasting=lasting)
        try:
            queue.settle(job, OUTCOMES[outcome]())
        except QueueError:
            failed = faults.heal()
            refused += 1
            assert queue.counts()["reserved"] == 1
            assert lasting or queue.put([put_of(queue, "p")]) == [False], "it is still the one"
            queue.settle(job, OUTCOMES[outcome]())
        else:
            failed = faults.heal()
        assert bodies(queue) == STAY[outcome]
        assert queue.put([put_of(queue, "p")]) == [outcome != "later"], (at, faults.seen)
        if not failed:
            break
    assert refused > 0


@pytest.mark.parametrize("code", ONE_CODE)
@pytest.mark.parametrize("outcome", ONE_OUTCOME)
def test_a_settle_with_puts_that_fails_at_any_call_has_settled_or_has_not(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    faults = Faults(monkeypatch)
    refused = 0
    for at in range(1000):
        queue, other = make(f"{at}/posts"), make(f"{at}/other")
        other.folders.make()
        push(queue, b"parent")
        [job] = queue.reserve(1)
        faults.fail(at, code)
        try:
            results = queue.settle(job, OUTCOMES[outcome](), children(queue, other))
        except QueueError:
            failed = faults.heal()
            refused += 1
            assert everything(queue, other) == [b"parent"], (at, faults.seen)
            results = queue.settle(job, OUTCOMES[outcome](), children(queue, other))
        else:
            failed = faults.heal()
        assert results == [True] * 6
        queue.release_stale()
        assert everything(queue, other) == sorted(CHILDREN + STAY[outcome]), (at, faults.seen)
        assert other.put([put_of(other, **KINDS["unique tick"])]) == [False]
        assert queue.counts()["reserved"] == 0
        queue.close()
        assert names(queue, "held") == []
        if not failed:
            break
    assert refused > 5


@pytest.mark.parametrize("outcome", ONE_OUTCOME)
def test_a_crash_at_any_call_of_a_settle_lets_each_guarded_put_through_once(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    faults = Faults(monkeypatch)
    again = set()
    for at in range(1000):
        queue, other = make(f"{at}/posts"), make(f"{at}/other")
        other.folders.make()
        push(queue, b"parent", unique="p")
        [job] = queue.reserve(1)
        puts = children(queue, other)
        faults.fail(at, Crash())
        try:
            queue.settle(job, OUTCOMES[outcome](), puts)
        except Crash:
            pass
        failed = faults.heal()
        queue.forget()
        after = make(f"{at}/posts")
        jobs = after.reserve(9)
        again.add(b"parent" in [job.body for job in jobs])
        for job in jobs:
            if job.body == b"parent":
                assert everything(after, other) == [b"parent"]
                after.settle(job, OUTCOMES[outcome](), children(after, other))
        assert everything(after, other) == sorted(CHILDREN + STAY[outcome]), (at, faults.seen)
        assert sorted(other.report(other.keys("dead")[0]).splitlines()[0:1]) == ["before"]
        for kind in ("unique", "tick"):
            assert other.put([put_of(other, **KINDS[kind])]) == [False]
        assert after.put([put_of(after, "p", body=b"like")]) == [outcome != "later"], (at, faults.seen)
        assert names(after, "held") == []
        if not failed:
            break
    assert again == {True, False}
    assert at > 40


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_kill_at_any_call_of_a_settle_without_puts_loses_no_unique_job(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    faults = Faults(monkeypatch)
    for at in range(100):
        queue = make(f"{at}")
        push(queue, b"parent", unique="p")
        [job] = queue.reserve(1)
        faults.fail(at, Crash())
        settled = False
        try:
            queue.settle(job, OUTCOMES[outcome]())
            settled = True
        except Crash:
            pass
        failed = faults.heal()
        queue.forget()
        after = make(f"{at}")
        for job in after.reserve(1):
            assert not settled
            after.settle(job, OUTCOMES[outcome]())
        assert bodies(after) == STAY[outcome]
        assert after.put([put_of(after, "p")]) == [outcome != "later"], (at, faults.seen)
        if not failed:
            break
    assert at > 0


def test_a_guarded_put_to_another_file_system_leaves_once(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(monkeypatch)
    for at in range(1000):
        queue, other = make(f"{at}/posts"), make(f"{at}/other")
        other.folders.make()
        push(queue, b"parent")
        [job] = queue.reserve(1)
        with monkeypatch.context() as patch:
            for call in ("rename", "link"):
                patch.setattr(os, call, across(queue.folders.path, other.folders.path, getattr(os, call)))
            puts = [put_of(other, "u", Tick("g", 1.0), b"child 1"), put_of(other, gate=Tick("h", 1.0), body=b"child 2")]
            faults.fail(at, Crash())
            try:
                queue.settle(job, DONE, puts)
            except Crash:
                pass
            failed = faults.heal()
            queue.forget()
            after = make(f"{at}/posts")
            for job in after.reserve(9):
                after.settle(job, DONE, puts)
        assert bodies(other) == [b"child 1", b"child 2"], (at, faults.seen)
        assert other.put([put_of(other, "u"), put_of(other, gate=Tick("h", 1.0))]) == [False, False]
        if not failed:
            break
    assert at > 30


def across(here: str, there: str, real: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """A rename or link that fails from one of these trees to the other."""

    def call(source: str, target: str) -> None:
        if source.startswith(here) and target.startswith(there):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    return call


def test_who_has_lost_his_claim_publishes_nothing_guarded(make: Callable[..., Maildir]) -> None:
    queue, other = make(), make("other")
    push(queue, b"parent", unique="p")
    [job] = queue.reserve(1)
    queue.settle(job, Later("x", 2e9))
    with pytest.raises(LeaseLost):
        queue.settle(job, DONE, children(queue, other))
    assert everything(queue, other) == [b"parent"]
    assert queue.put([put_of(queue, "p")]) == [False]


class Refusing(Memory):
    """A store that is down until it is up."""

    up = False
    asked = 0

    def put(self, puts: Any, conn: object = None) -> list[bool]:  # noqa: ARG002
        self.asked += 1
        if not self.up:
            raise QueueError("it is down")
        return super().put(puts)


def test_a_store_that_is_down_holds_up_nothing_that_goes_to_others(make: Callable[..., Maildir]) -> None:
    queue, other, down = make(), make("other"), Refusing("memory:down")
    push(queue)
    [job] = queue.reserve(1)
    to_down = Put(down, Job(key="1", body=b"to the one that is down"))
    queue.settle(job, DONE, [to_down, put_of(other, body=b"to another")])
    assert bodies(other) == [b"to another"]
    down.up = True
    queue.release_stale()
    assert [job.body for job in down.reserve(9)] == [b"to the one that is down"]
    assert bodies(other) == [b"to another"]
    assert (names(queue, "held"), sum(queue.counts().values())) == ([], 0)


def test_a_store_that_keeps_us_waiting_is_asked_once_in_a_round(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, down = make(), Refusing("memory:slow")
    for number in range(3):
        push(queue)
        [job] = queue.reserve(1)
        queue.settle(job, DONE, [Put(down, Job(key=f"{number}", body=BODY))])
    down.asked = 0
    queue.release_stale()
    assert down.asked == 3
    monkeypatch.setattr(rounds, "PATIENCE", -1.0)
    queue.release_stale()
    assert down.asked == 4
    down.up = True
    queue.release_stale()
    assert len(down.reserve(9)) == 3
