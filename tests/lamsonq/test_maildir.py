"""The maildir queue: what it promises, to whom, and what happens when anything goes wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mailbox
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lamsonq.backends import backlog, durable, open_backend, watch
from lamsonq.backends.maildir import Maildir
from lamsonq.backends.maildir_names import parse_name
from lamsonq.errors import BrokerError, Dead, Later, LeaseLost, QueueError
from lamsonq.jobs import DELIVERIES_MAX, DONE, Backend, Job, Outcome, Put
from lamsonq.reports import entries

from .waiting import PATIENCE, until

BODY = b"From: a@example.org\r\nTo: b@example.org\r\n\r\nhello\x00\xff\n.\r\nno end"
FORK = multiprocessing.get_context("fork")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Maildir]]:
    """`make("posts")` opens a queue under tmp_path, as a process would that has just started."""
    made: list[Maildir] = []

    def open_one(name: str = "posts", **options: Any) -> Maildir:
        made.append(Maildir(str(tmp_path / name), now=clock, **options))
        return made[-1]

    yield open_one
    for queue in made:
        queue.close()


@pytest.fixture
def queue(make: Callable[..., Maildir]) -> Maildir:
    return make()


def push(queue: Backend, body: bytes = BODY, outcome: Later | Dead | None = None, **fields: Any) -> str:
    key = fields.pop("key", None) or queue.new_key()
    queue.put([Put(queue, Job(key=key, body=body, **fields), outcome)])
    return key


def take(queue: Maildir) -> Job:
    [job] = queue.reserve(1)
    return job


def die(queue: Maildir) -> None:
    """What the kernel does to a killed process's lock."""
    queue.forget()


def names(queue: Maildir, folder: str = "new") -> list[str]:
    return sorted(os.listdir(queue.folders.at(folder)))


def counts(queue: Maildir) -> tuple[int, int, int, int]:
    found = queue.counts()
    return found["ready"], found["delayed"], found["reserved"], found["dead"]


def reasons(queue: Maildir, key: str) -> list[str]:
    """Why a job has failed, oldest first."""
    return [entry.reason for entry in entries(queue.report(key))]


def drain(queue: Maildir) -> list[bytes]:
    bodies = []
    while jobs := queue.reserve(100):
        bodies += [job.body for job in jobs]
        for job in jobs:
            queue.settle(job, DONE)
    return bodies


# -- what goes in comes out --------------------------------------------------------------------------------------


def test_a_job_comes_back_with_its_envelope_and_its_bytes(queue: Maildir) -> None:
    key = push(
        queue,
        sender="Joe@Example.org",
        recipients=("A@b.example", "ü@b.example"),
        peer="127.0.0.1:4242",
        target="app.handlers.index.START",
        received=5.5,
        attempts=2,
        metadata={"k": "v"},
    )
    job = take(queue)
    assert (job.key, job.body) == (key, BODY)
    assert (job.sender, job.recipients) == ("Joe@Example.org", ("A@b.example", "ü@b.example"))
    assert (job.peer, job.target, job.received) == ("127.0.0.1:4242", "app.handlers.index.START", 5.5)
    assert (job.deliveries, job.attempts, job.metadata) == (0, 2, {"k": "v"})


def test_the_null_sender_is_not_the_same_as_no_sender(queue: Maildir) -> None:
    push(queue, sender="")
    push(queue, sender=None)
    assert [job.sender for job in queue.reserve(2)] == ["", None]


@pytest.mark.parametrize("body", [b"", b"\n", b"X-Lamsonq-Job: {}\n\nforged", b"x" * 3_000_000, bytes(range(256))])
def test_the_bytes_of_a_message_are_never_changed(queue: Maildir, body: bytes) -> None:
    push(queue, body)
    assert take(queue).body == body


def test_a_record_inside_a_message_is_only_a_header(queue: Maildir) -> None:
    queue.folders.make()
    body = b'X-Lamsonq-Job: {"target":"os.system","sender":"evil@example.org"}\n\nhi'
    Path(queue.folders.at("new", "1.foreign")).write_bytes(body)
    job = take(queue)
    assert (job.target, job.sender, job.body) == (None, None, body)


def test_jobs_come_oldest_first(queue: Maildir) -> None:
    keys = [push(queue) for _ in range(30)]
    assert queue.keys() == keys
    assert [job.key for job in queue.reserve(10)] + [job.key for job in queue.reserve(100)] == keys


def test_file_names_look_as_the_tutorial_shows_them(queue: Maildir) -> None:
    key = push(queue)
    [name] = names(queue)
    assert name.startswith(f"{key},LQ=1b")
    assert key.split(".")[1].startswith("M")


def test_a_producer_leaves_nothing_but_the_job(queue: Maildir) -> None:
    push(queue)
    assert names(queue, "claimed") == names(queue, "held") == names(queue, "tmp") == names(queue, "errors") == []


def test_folders_are_private_and_files_are(queue: Maildir) -> None:
    push(queue)
    for folder in ("", "new", "claimed", ".dead/new"):
        assert os.stat(queue.folders.at(folder)).st_mode & 0o777 == 0o700
    assert os.stat(queue.folders.at("new", names(queue)[0])).st_mode & 0o777 == 0o600


# -- settling ----------------------------------------------------------------------------------------------------


def test_done_leaves_nothing(queue: Maildir) -> None:
    push(queue)
    queue.settle(take(queue), DONE)
    assert counts(queue) == (0, 0, 0, 0)
    assert queue.reserve(1) == []


@pytest.mark.parametrize("outcome", [DONE, Later("busy"), Later(counted=False), Dead("no")])
@pytest.mark.parametrize("with_puts", [False, True])
def test_who_has_lost_its_claim_changes_nothing(queue: Maildir, outcome: Outcome, with_puts: bool) -> None:
    push(queue)
    job = take(queue)
    queue.settle(job, DONE)
    puts = [Put(queue, Job(key=queue.new_key(), body=b"never"))] if with_puts else []
    with pytest.raises(LeaseLost):
        queue.settle(job, outcome, puts)
    assert counts(queue) == (0, 0, 0, 0)
    assert names(queue, "held") == names(queue, "errors") == []


def test_a_job_that_was_not_reserved_cannot_be_settled(queue: Maildir) -> None:
    push(queue)
    job = queue.get(queue.keys()[0])
    assert job is not None
    with pytest.raises(LeaseLost):
        queue.settle(job, DONE)
    assert counts(queue) == (1, 0, 0, 0)


def test_later_waits_until_its_time(queue: Maildir, clock: Clock) -> None:
    push(queue)
    queue.settle(take(queue), Later("busy", at=clock.now + 60.5))
    assert queue.reserve(1) == []
    assert counts(queue) == (0, 1, 0, 0)
    clock.now += 60
    assert queue.reserve(1) == []
    clock.now += 0.6
    job = take(queue)
    assert (job.attempts, job.deliveries, job.body) == (1, 0, BODY)


def test_a_queue_that_was_just_opened_finds_what_is_due(make: Callable[..., Maildir], clock: Clock) -> None:
    first = make()
    push(first, due=clock.now + 5)
    assert counts(first) == (0, 1, 0, 0)
    clock.now += 6
    assert take(make()).body == BODY


def test_what_another_process_delays_is_found(make: Callable[..., Maildir], clock: Clock) -> None:
    one, other = make(), make()
    assert one.reserve(1) == []
    push(other, due=clock.now + 5)
    clock.now += 6
    assert take(one).body == BODY


@pytest.mark.parametrize(("attempts", "low", "high"), [(0, 2, 4), (3, 16, 32), (20, 1800, 3600), (10**6, 1800, 3600)])
def test_back_off_doubles_up_to_an_hour(queue: Maildir, clock: Clock, attempts: int, low: float, high: float) -> None:
    key = push(queue, attempts=attempts)
    queue.settle(take(queue), Later("busy"))
    job = queue.get(key)
    assert job is not None
    assert job.due is not None
    assert low <= job.due - clock.now <= high + 0.001


def test_an_uncounted_later_is_as_if_it_had_never_been_taken(queue: Maildir) -> None:
    key = push(queue)
    before = names(queue)
    queue.settle(take(queue), Later("not now", counted=False))
    assert names(queue) == before
    assert queue.report(key) == ""


def test_an_uncounted_later_with_a_time_waits_uncounted(queue: Maildir, clock: Clock) -> None:
    push(queue)
    queue.settle(take(queue), Later(at=clock.now + 1, counted=False))
    assert queue.reserve(1) == []
    clock.now += 2
    assert take(queue).attempts == 0


def test_dead_keeps_the_message_with_the_reason_and_the_traceback(queue: Maildir) -> None:
    key = push(queue)
    try:
        raise ValueError("broken")
    except ValueError as error:
        outcome = Dead("it is broken")
        outcome.__cause__ = error
    queue.settle(take(queue), outcome)
    assert queue.keys("dead") == [key]
    assert reasons(queue, key) == ["it is broken"]
    assert "test_maildir.py" in queue.report(key)
    job = queue.get(key)
    assert job is not None
    assert job.body == BODY


def test_reports_pile_up_and_go_with_the_job(queue: Maildir, clock: Clock) -> None:
    key = push(queue)
    for reason in ("first", "second"):
        queue.settle(take(queue), Later(reason, at=clock.now))
    assert reasons(queue, key) == ["first", "second"]
    queue.settle(take(queue), DONE)
    assert queue.report(key) == ""
    assert names(queue, "errors") == []


def test_kick_makes_a_dead_job_new(queue: Maildir) -> None:
    key = push(queue, attempts=4)
    queue.settle(take(queue), Dead("no"))
    assert queue.kick(key)
    job = take(queue)
    assert (job.key, job.attempts, job.deliveries) == (key, 0, 0)
    assert not queue.kick(key), "it is reserved now"
    assert reasons(queue, key) == ["no"]


def test_remove_takes_what_nobody_works(queue: Maildir) -> None:
    key = push(queue)
    job = take(queue)
    assert not queue.remove(key)
    queue.settle(job, Dead("no"))
    assert queue.remove(key)
    assert not queue.remove(key)
    assert queue.get(key) is None
    assert names(queue, "errors") == []


def test_a_job_can_be_looked_at_in_any_state(queue: Maildir, clock: Clock) -> None:
    key = push(queue)

    def seen() -> Job:
        job = queue.get(key)
        assert job is not None
        assert job.body == BODY
        return job

    seen()
    job = take(queue)
    assert seen().deliveries == 1
    assert queue.keys("reserved") == [key]
    queue.settle(job, Later("busy", at=clock.now + 9))
    assert seen().due == clock.now + 9
    assert queue.keys("delayed") == [key]
    with pytest.raises(ValueError, match="ready, delayed, reserved, dead, done"):
        queue.keys("lost")


def test_a_queue_that_is_not_there_is_empty_and_is_not_made_by_looking(queue: Maildir, tmp_path: Path) -> None:
    assert (queue.keys(), counts(queue), queue.get("x"), queue.report("x")) == ([], (0, 0, 0, 0), None, "")
    assert not queue.remove("x")
    assert list(tmp_path.iterdir()) == []


# -- putting with an outcome -------------------------------------------------------------------------------------


def test_a_job_can_be_put_dead_with_its_report(queue: Maildir) -> None:
    key = push(queue, outcome=Dead("nobody wants it"), target="a.B")
    assert counts(queue) == (0, 0, 0, 1)
    assert reasons(queue, key) == ["nobody wants it"]
    job = queue.get(key)
    assert job is not None
    assert job.target == "a.B"


def test_a_job_can_be_put_delayed_with_its_report(queue: Maildir, clock: Clock) -> None:
    key = push(queue, outcome=Later("busy", at=clock.now + 3))
    assert counts(queue) == (0, 1, 0, 0)
    assert reasons(queue, key) == ["busy"]
    clock.now += 4
    assert take(queue).key == key


def test_a_job_put_later_without_a_time_is_due_at_once(queue: Maildir) -> None:
    key = push(queue, outcome=Later("busy"))
    assert take(queue).key == key
    assert reasons(queue, key) == ["busy"]


def test_a_job_put_later_that_has_failed_before_backs_off(queue: Maildir) -> None:
    push(queue, outcome=Later("busy"), attempts=1)
    assert counts(queue) == (0, 1, 0, 0)


# -- putting durably ---------------------------------------------------------------------------------------------


class Calls:
    """Counts calls of the operating system and makes the n-th of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...]) -> None:
        self.seen: list[str] = []
        self.fail_at = -1
        self.error: BaseException = OSError(errno.EIO, os.strerror(errno.EIO))
        for function in functions:
            monkeypatch.setattr(os, function, self._wrapped(function, getattr(os, function)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(f"{name} {args[0]}")
            if len(self.seen) - 1 == self.fail_at:
                raise self.error
            return real(*args, **kwargs)

        return call

    def fail(self, at: int, error: BaseException) -> None:
        self.seen.clear()
        self.fail_at, self.error = at, error


def test_a_file_is_synced_before_its_name_and_its_folder_after(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    push(queue)
    order: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        order.append("sync " + os.readlink(f"/proc/self/fd/{fd}").removeprefix(queue.folders.path))
        real_fsync(fd)

    def rename(source: str, target: str) -> None:
        order.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    queue.put([Put(queue, Job(key=f"{n}.key", body=b"x")) for n in range(3)])
    files = [step for step in order if "/tmp/" in step]
    assert len(files) == 3
    assert order == [*files, "rename", "rename", "rename", "sync /new"]


def test_the_first_job_of_a_new_queue_has_synced_folders_up_to_what_was_there(
    make: Callable[..., Maildir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    push(make("a/b/posts"))
    folders = {str(tmp_path / name) for name in ("", "a", "a/b", "a/b/posts", "a/b/posts/new")}
    assert folders <= set(synced)


def refused_put(queue: Maildir, puts: list[Put]) -> QueueError | None:
    try:
        queue.put(puts)
    except QueueError as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_put_that_fails_at_any_call_leaves_nothing_and_says_what_to_do(
    queue: Maildir, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    push(queue)
    kept = names(queue)
    puts = [Put(queue, Job(key=f"{n}.key", body=b"x"), Dead("no") if n == 2 else None) for n in range(3)]
    calls = Calls(monkeypatch, ("open", "write", "fsync", "rename"))
    for at in range(1000):
        calls.fail(at, OSError(code, os.strerror(code)))
        refusal = refused_put(queue, puts)
        calls.fail_at = -1
        if refusal is None:
            break
        assert str(refusal).startswith(f"cannot write {queue.name}: {os.strerror(code)}; ")
        assert refusal.data == puts
        assert names(queue) == kept
        assert names(queue, "tmp") == names(queue, ".dead/new") == []
    assert at > 12, calls.seen
    assert counts(queue) == (3, 0, 0, 1)


def test_a_descriptor_whose_sync_failed_is_not_synced_again(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    push(queue)
    calls = Calls(monkeypatch, ("fsync",))
    calls.fail(0, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(QueueError, match="check the disk"):
        push(queue)
    assert len(calls.seen) == 1


def test_a_full_disk_refuses_and_goes_on_when_there_is_space(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    push(queue)
    calls = Calls(monkeypatch, ("write",))
    calls.fail(0, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(QueueError, match="free some space"):
        push(queue)
    push(queue)
    assert len(queue.reserve(5)) == 2


def test_a_short_write_is_continued(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:7])))
    push(queue)
    assert take(queue).body == BODY


def test_a_queue_below_a_file_is_refused(make: Callable[..., Maildir], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QueueError, match=r"file/posts: .*; something in its path is a file"):
        push(make("file/posts"))
    with pytest.raises(QueueError, match="something in its path is a file"):
        push(make("file"))


def test_a_queue_that_cannot_be_written_is_refused_before_anything_arrives(
    queue: Maildir, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(queue)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so the answer is given here
    with pytest.raises(QueueError, match=r"cannot write .*posts: Permission denied; let the server's user own it"):
        queue.release_stale()


def test_threads_that_wait_together_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[str] = []
    first_runs, go = threading.Event(), threading.Event()

    def slow(folder: str) -> None:
        syncs.append(folder)
        first_runs.set()
        assert go.wait(PATIENCE)

    monkeypatch.setattr(durable, "_fsync_folder", slow)
    threads = [threading.Thread(target=durable.sync_folder, args=[str(tmp_path)]) for _ in range(9)]
    threads[0].start()
    assert first_runs.wait(PATIENCE)
    for thread in threads[1:]:
        thread.start()
    waiting = vars(durable._shared._changed)["_waiters"]
    until(lambda: len(waiting) == 8)
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(syncs) == 2, "one under way when the others asked, and one for all of them"


def test_all_threads_of_a_failed_sync_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "_fsync_folder", broken)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            durable.sync_folder(str(tmp_path))
    monkeypatch.undo()
    durable.sync_folder(str(tmp_path))


def files_of(folder: Path, number: int) -> list[tuple[str, Sequence[bytes]]]:
    return [(str(folder / f"{n}"), (b"one ", b"two")) for n in range(number)]


def test_files_and_their_folder_are_synced_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(durable.SYNCED_AT_ONCE)
    synced: list[str] = []

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        together.wait(10)

    monkeypatch.setattr(os, "fsync", fsync)
    files = files_of(tmp_path, durable.SYNCED_AT_ONCE - 1)
    durable.write_files(files, str(tmp_path))
    assert sorted(synced) == sorted([str(tmp_path), *(path for path, _ in files)])
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"one two"}


def test_of_files_of_which_one_cannot_be_synced_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []

    def third_fails(fd: int) -> None:
        syncs.append(fd)
        if len(syncs) == 3:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", third_fails)
    with pytest.raises(OSError, match="Input/output"):
        durable.write_files(files_of(tmp_path, 5))
    assert len(syncs) == 5
    assert list(tmp_path.iterdir()) == []


def test_where_no_thread_can_be_had_all_files_are_synced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    monkeypatch.setattr(durable._helpers, "submit", Mock(side_effect=OSError(errno.EAGAIN, "no threads")))
    durable.write_files(files_of(tmp_path, 5))
    assert len(syncs) == 5


def test_many_threads_put_and_none_is_lost(queue: Maildir) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            push(queue, f"{number}.{turn}".encode())

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drain(queue)) == sorted(f"{n}.{t}".encode() for n in range(8) for t in range(10))


# -- workers that die --------------------------------------------------------------------------------------------


def test_a_claim_of_a_living_worker_is_never_given_back(make: Callable[..., Maildir]) -> None:
    one, other = make(), make()
    push(one)
    job = take(one)
    assert other.release_stale() == 0
    assert other.reserve(1) == []
    one.settle(job, DONE)


def test_a_job_whose_worker_died_is_worked_again(make: Callable[..., Maildir]) -> None:
    one, other = make(), make()
    key = push(one)
    take(one)
    die(one)
    job = take(other)
    assert (job.key, job.deliveries, job.body) == (key, 1, BODY)
    assert other.release_stale() == 0
    other.settle(job, DONE)
    assert counts(other) == (0, 0, 0, 0)
    assert other._worker is not None
    assert names(other, "claimed") == [other._worker.id, f"{other._worker.id}.lock"]


def test_a_job_that_kills_every_worker_is_dead_with_that_reason(make: Callable[..., Maildir]) -> None:
    key = push(make())
    for deaths in range(DELIVERIES_MAX):
        worker = make()
        assert take(worker).deliveries == deaths
        die(worker)
    last = make()
    assert last.reserve(1) == []
    assert last.keys("dead") == [key]
    assert "the worker died 3 times while it had this job" in last.report(key)


def test_a_count_that_is_too_high_already_is_dead_at_the_claim(queue: Maildir) -> None:
    key = push(queue)
    [name] = names(queue)
    os.rename(queue.folders.at("new", name), queue.folders.at("new", name + "d3"))
    assert queue.reserve(1) == []
    assert queue.keys("dead") == [key]


def test_any_settle_forgets_the_deaths(make: Callable[..., Maildir], clock: Clock) -> None:
    one, other = make(), make()
    push(one)
    take(one)
    die(one)
    other.settle(take(other), Later("busy", at=clock.now))
    assert take(other).deliveries == 0


def test_one_suspect_runs_at_a_time(make: Callable[..., Maildir]) -> None:
    one, other = make(), make()
    suspects = [push(one) for _ in range(3)]
    assert len(one.reserve(3)) == 3
    die(one)
    fresh = push(other)
    first = other.reserve(10)
    assert [job.key for job in first] == [suspects[0], fresh]
    assert other.reserve(10) == []
    other.settle(first[0], DONE)
    assert [job.key for job in other.reserve(10)] == [suspects[1]]


def test_a_job_at_its_last_chance_runs_alone(make: Callable[..., Maildir]) -> None:
    """So what is buried for killing its worker has done so, and no neighbour of it."""
    one, two, three = make(), make(), make()
    key = push(one)
    for worker in (one, two):
        take(worker)
        die(worker)
    fresh = [push(three), push(three)]
    assert [job.key for job in three.reserve(10)] == [key]
    assert three.reserve(10) == []
    three.forget()  # it has killed its worker again
    four = make()
    assert [job.key for job in four.reserve(10)] == fresh
    assert counts(four)[3] == 1


def test_a_sleeper_is_woken_when_a_last_chance_is_over(make: Callable[..., Maildir]) -> None:
    one, two, three = make(), make(), make()
    push(one)
    for worker in (one, two):
        take(worker)
        die(worker)
    last = take(three)
    key = push(three)
    timer = threading.Timer(0.05, three.settle, [last, DONE])
    timer.start()
    begun = time.monotonic()
    found = until(lambda: three.reserve(1, wait=PATIENCE))
    timer.join()
    assert [job.key for job in found] == [key]
    assert time.monotonic() - begun < PATIENCE / 2


def test_a_last_chance_waits_until_the_others_are_settled(make: Callable[..., Maildir]) -> None:
    one, two, three = make(), make(), make()
    push(three)
    busy = take(three)
    key = push(one)
    for worker in (one, two):
        take(worker)
        die(worker)
    three.release_stale()
    late = push(three)
    assert three.reserve(10) == []
    three.settle(busy, DONE)
    last = three.reserve(10)
    assert [job.key for job in last] == [key]
    three.settle(last[0], DONE)
    assert [job.key for job in three.reserve(10)] == [late]


def test_what_a_newer_versions_worker_has_staged_is_left_alone(make: Callable[..., Maildir], tmp_path: Path) -> None:
    queue = make()
    queue.folders.make()
    claimed, held = Path(queue.folders.at("claimed", "77.aa")), Path(queue.folders.at("held"))
    claimed.mkdir()
    (claimed / "1.M1P1Q1.h,LQ=2b0c1").write_text("newer")
    (held / "77.aa.1.0").write_text("staged")
    Path(f"{claimed}.lock").touch()
    queue.release_stale()
    assert (held / "77.aa.1.0").read_text() == "staged"
    assert (claimed / "1.M1P1Q1.h,LQ=2b0c1").exists()


def test_a_sleeper_is_woken_for_the_next_suspect(make: Callable[..., Maildir]) -> None:
    one, other = make(), make()
    keys = [push(one) for _ in range(2)]
    one.reserve(2)
    die(one)
    first = take(other)
    assert other.reserve(1) == []
    timer = threading.Timer(0.05, other.settle, [first, DONE])
    timer.start()
    found = until(lambda: other.reserve(1, wait=5))
    timer.join()
    assert [job.key for job in found] == keys[1:]


def test_claims_are_given_back_uncounted_when_a_queue_is_closed(queue: Maildir) -> None:
    push(queue)
    before = names(queue)
    job = take(queue)
    queue.close()
    assert names(queue) == before
    assert names(queue, "claimed") == []
    with pytest.raises(LeaseLost):
        queue.settle(job, DONE)
    queue.close()
    assert take(queue).deliveries == 0


def test_a_name_that_tells_of_a_commit_is_given_back_as_any_other(queue: Maildir) -> None:
    push(queue)
    [file] = Path(queue.folders.at("new")).iterdir()
    file.rename(f"{file}c1")
    assert take(queue).body == BODY
    queue.close()
    assert queue.counts()["ready"] == 1
    assert take(queue).body == BODY


def test_a_lock_that_somebody_deleted_loses_no_job(make: Callable[..., Maildir]) -> None:
    one, other = make(), make()
    push(one)
    job = take(one)
    die(one)
    [lock] = [name for name in names(one, "claimed") if name.endswith(".lock")]
    os.unlink(one.folders.at("claimed", lock))
    assert take(other).key == job.key


def test_a_claimed_folder_that_somebody_deleted_is_made_again(queue: Maildir) -> None:
    push(queue)
    push(queue)
    take(queue)
    subprocess.run(["rm", "-r", queue.folders.at("claimed")], check=True)
    assert len(queue.reserve(5)) == 1


def test_a_queue_that_somebody_deleted_is_made_again(queue: Maildir) -> None:
    push(queue)
    assert len(queue.reserve(5)) == 1
    subprocess.run(["rm", "-r", queue.folders.path], check=True)
    push(queue)
    assert len(queue.reserve(5)) == 1


def _reserve_and_hang(path: str, told: Any) -> None:
    queue = Maildir(path)
    told.send([job.deliveries for job in queue.reserve(1)])
    signal.pause()


def test_a_killed_process_gives_its_job_back_once_and_the_third_death_is_the_last(queue: Maildir) -> None:
    key = push(queue)
    for deaths in range(3):
        here, there = FORK.Pipe()
        child = FORK.Process(target=_reserve_and_hang, args=[queue.folders.path, there])
        child.start()
        assert here.poll(PATIENCE)
        assert here.recv() == [deaths]
        assert queue.release_stale() == 0, "it lives"
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(PATIENCE)
        if deaths == 0:
            job = take(queue_again := Maildir(queue.folders.path))
            assert job.deliveries == 1
            assert queue.release_stale() == 0
            queue_again.settle(job, Later(counted=False))
            queue_again.close()
    assert queue.reserve(1) == []
    assert queue.keys("dead") == [key]


def _use_inherited(queue: Maildir, told: Any) -> None:
    assert queue._worker is None
    told.send([job.body for job in queue.reserve(5)])
    queue.close()


def test_a_forked_child_is_a_worker_of_its_own(make: Callable[..., Maildir]) -> None:
    queue, other = make(), make()
    push(queue, b"parent's")
    job = take(queue)
    push(queue, b"child's")
    here, there = FORK.Pipe()
    child = FORK.Process(target=_use_inherited, args=[queue, there])
    child.start()
    assert here.poll(PATIENCE)
    assert here.recv() == [b"child's"]
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert other.release_stale() == 0, "the parent's lock was not dropped by the child"
    queue.settle(job, DONE)
    assert counts(queue) == (1, 0, 0, 0)


def test_a_childs_copy_does_not_keep_a_dead_parents_claim(queue: Maildir) -> None:
    """A process claims, forks a child that lives on, and is killed."""
    push(queue)
    told, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        with contextlib.suppress(BaseException):
            own = Maildir(queue.folders.path)
            own.reserve(1)
            child = os.fork()
            if child:
                os.write(tell, str(child).encode())
            signal.pause()
        os._exit(0)
    grandchild = int(os.read(told, 20))
    try:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        until(queue.release_stale)  # the grandchild lets go as soon as it runs
        assert take(queue).deliveries == 1
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_two_reapers_at_once_give_each_job_back_once(make: Callable[..., Maildir]) -> None:
    for _ in range(10):
        one, reapers = make(), [make() for _ in range(4)]
        for _ in range(5):
            push(one)
        assert len(one.reserve(5)) == 5
        die(one)
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(Maildir.release_stale, reapers)) == 5
        for folder in names(one, "new"):
            os.unlink(one.folders.at("new", folder))


def _drain_into(path: str, told: Any) -> None:
    queue = Maildir(path)
    bodies = []
    while jobs := queue.reserve(7):
        for job in jobs:
            bodies.append(job.body)
            queue.settle(job, DONE)
    queue.close()
    told.send(bodies)


def test_three_processes_on_one_queue_get_each_job_once(queue: Maildir) -> None:
    wanted = [str(number).encode() for number in range(600)]
    queue.put([Put(queue, Job(key=queue.new_key(), body=body)) for body in wanted])
    pipes = [FORK.Pipe() for _ in range(3)]
    children = [FORK.Process(target=_drain_into, args=[queue.folders.path, there]) for _, there in pipes]
    for child in children:
        child.start()
    found: list[bytes] = []
    for here, _ in pipes:
        assert here.poll(PATIENCE)
        found += here.recv()
    for child in children:
        child.join(PATIENCE)
    assert sorted(found) == sorted(wanted)
    assert counts(queue) == (0, 0, 0, 0)
    assert names(queue, "claimed") == []


# -- settling with puts ------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


OUTCOMES: dict[str, Callable[[], Outcome]] = {
    "done": lambda: DONE,
    "later": lambda: Later("busy"),
    "dead": lambda: Dead("no"),
}


def _puts(queue: Maildir, other: Maildir, clock: Clock) -> list[Put]:
    return [
        Put(queue, Job(key=queue.new_key(), body=b"child 1", recipients=("a@b",))),
        Put(other, Job(key=other.new_key(), body=b"child 2")),
        Put(other, Job(key=other.new_key(), body=b"child 3"), Dead("bad")),
        Put(queue, Job(key=queue.new_key(), body=b"child 4"), Later("wait", at=clock.now + 9)),
    ]


def _bodies(queue: Maildir, state: str) -> list[bytes]:
    return sorted(job.body for key in queue.keys(state) if (job := queue.get(key)) is not None)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_came_of_a_job_leaves_with_its_outcome(make: Callable[..., Maildir], clock: Clock, outcome: str) -> None:
    queue, other = make(), make("other")
    key = push(queue, b"parent")
    queue.settle(take(queue), OUTCOMES[outcome](), _puts(queue, other, clock))
    assert _bodies(queue, "ready") == [b"child 1"]
    assert _bodies(other, "ready") == [b"child 2"]
    assert _bodies(other, "dead") == [b"child 3"]
    assert reasons(other, other.keys("dead")[0]) == ["bad"]
    assert _bodies(queue, "delayed") == [b"child 4"] + [b"parent"] * (outcome == "later")
    assert _bodies(queue, "dead") == [b"parent"] * (outcome == "dead")
    assert names(queue, "held") == []
    assert counts(queue)[2] == 0
    assert reasons(queue, key) == {"done": [], "later": ["busy"], "dead": ["no"]}[outcome]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_crash_at_any_call_of_a_settle_loses_nothing_and_publishes_nothing_twice(
    make: Callable[..., Maildir], clock: Clock, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, ("open", "write", "fsync", "rename", "unlink"))
    seen_states = set()
    for at in range(1000):
        calls.fail_at = -1
        queue, other = make(f"{at}/posts"), make(f"{at}/other")
        push(queue, b"parent")
        push(other, b"here before")
        job = take(queue)
        calls.fail(at, Crash())
        crashed = True
        try:
            queue.settle(job, OUTCOMES[outcome](), _puts(queue, other, clock))
            crashed = False
        except Crash:
            pass
        calls.fail_at = -1
        assert counts(queue)[0] + counts(queue)[2] >= 0
        die(queue)
        after = make(f"{at}/posts")
        again = [job for job in after.reserve(10) if job.body == b"parent"]
        seen_states.add(bool(again))
        for job in again:  # it was not committed, so nothing of it is visible, and it is worked again
            assert job.deliveries == 1
            assert _bodies(after, "ready") == _bodies(after, "delayed") == _bodies(after, "dead") == []
            assert _bodies(other, "ready") == [b"here before"]
            after.settle(job, OUTCOMES[outcome](), _puts(after, other, clock))
        everything = [
            b for q in (after, other) for s in ("ready", "delayed", "reserved", "dead") for b in _bodies(q, s)
        ]
        parent = [] if outcome == "done" else [b"parent"]
        assert sorted(everything) == sorted([*parent, b"here before", *(b"child %d" % n for n in range(1, 5))]), at
        assert names(after, "held") == [], (at, calls.seen)
        assert reasons(other, other.keys("dead")[0]) == ["bad"]
        if not crashed:
            break
    assert at > 20
    assert seen_states == {True, False}


def test_a_crash_while_a_crash_is_mended_loses_nothing_either(
    make: Callable[..., Maildir], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, ("rename", "unlink", "fsync", "rmdir"))
    for at in range(1000):
        calls.fail_at = -1
        queue, other = make(f"{at}/posts"), make(f"{at}/other")
        push(queue, b"parent")
        job = take(queue)
        committed = threading.Event()
        real = os.rename

        def stop_after_commit(source: str, target: str, real: Any = real, done: Any = committed) -> None:
            if done.is_set():
                raise Crash
            real(source, target)
            done.set()

        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(os, "rename", stop_after_commit)
            queue.settle(job, DONE, _puts(queue, other, clock))
        die(queue)
        mender = make(f"{at}/posts")
        calls.fail(at, Crash())
        crashed = True
        try:
            mender.release_stale()
            crashed = False
        except Crash as crash:
            crash.__traceback__ = None  # it holds the frames, and with them the lock that a dead process has not
        calls.fail_at = -1
        die(mender)
        last = make(f"{at}/posts")
        last.release_stale()
        assert _bodies(last, "ready") == [b"child 1"]
        assert _bodies(other, "ready") + _bodies(other, "dead") == [b"child 2", b"child 3"]
        assert names(last, "held") == names(last, "claimed") == []
        if not crashed:
            break
    assert at > 8


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_settle_that_fails_at_any_call_has_settled_or_has_not(
    make: Callable[..., Maildir], clock: Clock, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    calls = Calls(monkeypatch, ("open", "write", "fsync", "rename"))
    refused = 0
    for at in range(1000):
        calls.fail_at = -1
        queue, other = make(f"{at}/posts"), make(f"{at}/other")
        push(queue, b"parent")
        push(other, b"here before")
        job = take(queue)
        calls.fail(at, OSError(code, os.strerror(code)))
        try:
            queue.settle(job, DONE, _puts(queue, other, clock))
        except QueueError:
            calls.fail_at = -1
            refused += 1
            assert names(queue, "held") == []
            assert _bodies(queue, "ready") + _bodies(other, "dead") == []
            queue.settle(job, DONE, _puts(queue, other, clock))
        calls.fail_at = -1
        queue.release_stale()
        assert _bodies(queue, "ready") == [b"child 1"]
        assert _bodies(queue, "delayed") == [b"child 4"]
        assert _bodies(other, "ready") == [b"child 2", b"here before"]
        assert counts(queue)[2] == 0
        assert names(queue, "held") == []
        if len(calls.seen) <= at:
            break
    assert refused > 5


def test_a_committed_job_without_its_manifest_is_not_lost(
    make: Callable[..., Maildir], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make()
    key = push(queue, b"parent")
    job = take(queue)
    path = queue.folders.at("claimed", job.claim)
    os.rename(path, path + "c9")
    die(queue)
    after = make()
    assert after.reserve(1) == []
    assert after.keys("dead") == [key]
    assert "json, which says how, is gone" in after.report(key)


def test_what_a_newer_version_has_committed_is_left_for_it(
    make: Callable[..., Maildir], caplog: pytest.LogCaptureFixture
) -> None:
    queue = make()
    push(queue, b"parent")
    job = take(queue)
    path = queue.folders.at("claimed", job.claim)
    os.rename(path, path + "c9")
    Path(queue.folders.at("held", f"{job.claim.split('/')[0]}.9.json")).write_text(json.dumps({"version": 2}))
    die(queue)
    after = make()
    for _ in range(3):
        after.release_stale()
    assert counts(after) == (0, 0, 1, 0)
    assert sum("version 2" in line for line in caplog.messages) == 1


def test_a_manifest_that_cannot_be_read_stops_nobody(make: Callable[..., Maildir]) -> None:
    queue = make()
    push(queue, b"parent")
    job = take(queue)
    path = queue.folders.at("claimed", job.claim)
    os.rename(path, path + "c9")
    Path(queue.folders.at("held", f"{job.claim.split('/')[0]}.9.json")).write_text("[" * 100_000)
    die(queue)
    after = make()
    push(after, b"another")
    assert [job.body for job in after.reserve(9)] == [b"another"]


class OtherStore:
    """A store of another kind."""

    name = address = "nowhere:store"
    capabilities: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.kept: list[Put] = []
        self.broken = False

    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:  # noqa: ARG002 - it has no transactions
        if self.broken:
            raise QueueError("nobody answers")
        self.kept += puts
        return [True] * len(puts)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not called")


def test_a_store_of_another_kind_gets_its_job_after_the_commit(queue: Maildir) -> None:
    store = OtherStore()
    push(queue)
    put = Put(store, Job(key="k", body=b"child", sender="x@y"))
    queue.settle(take(queue), DONE, [put])
    assert store.kept == [put]
    assert names(queue, "held") == []
    assert counts(queue) == (0, 0, 0, 0)


def test_a_store_that_does_not_answer_gets_its_job_when_it_does(queue: Maildir) -> None:
    store = OtherStore()
    store.broken = True
    push(queue)
    queue.settle(take(queue), DONE, [Put(store, Job(key="k", body=b"child"))])
    assert counts(queue) == (0, 0, 1, 0)
    queue.release_stale()
    store.broken = False
    queue.release_stale()
    assert [put.job.body for put in store.kept] == [b"child"]
    assert counts(queue) == (0, 0, 0, 0)


def test_a_store_that_did_not_answer_a_dead_worker_gets_its_job_from_the_next(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    store = OtherStore()
    store.broken = True
    queue = make()
    push(queue)
    jobs = [Job(key="k", body=b"child", sender="x@y", target="a.B"), Job(key="l", body=b"dead one")]
    queue.settle(take(queue), DONE, [Put(store, jobs[0]), Put(store, jobs[1], Dead("no"))])
    die(queue)
    store.broken = False
    monkeypatch.setattr("lamsonq.backends.open_backend", lambda url: {"nowhere:store": store}[url])
    after = make()
    assert after.reserve(1) == []
    kept = [(put.job.key, put.job.body, put.job.sender, put.job.target, put.outcome) for put in store.kept]
    assert kept[0] == ("k", b"child", "x@y", "a.B", None)
    assert kept[1][:2] == ("l", b"dead one")
    assert isinstance(kept[1][4], Dead)
    assert counts(after) == (0, 0, 0, 0)


def test_a_store_of_another_kind_gets_its_job_from_the_next_worker_wherever_that_runs(
    make: Callable[..., Maildir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    queue, store = make(), open_backend("sqlite:q.db")
    push(queue)
    with monkeypatch.context() as broken:
        broken.setattr(type(store), "put", lambda *_: (_ for _ in ()).throw(QueueError("nobody answers")))
        queue.settle(take(queue), DONE, [Put(store, Job(key="k", body=b"child"))])
    die(queue)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert make().reserve(1) == []
    [job] = store.reserve(1)
    assert job.body == b"child"
    store.settle(job, DONE)


def test_a_queue_on_another_file_system_gets_a_synced_copy(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, other = make(), make("other")
    push(queue)
    job = take(queue)
    real = os.rename

    def rename(source: str, target: str) -> None:
        if source.startswith(queue.folders.path) and target.startswith(other.folders.path):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    queue.settle(job, DONE, [Put(other, Job(key="k", body=b"child"))])
    assert _bodies(other, "ready") == [b"child"]
    assert names(other, "tmp") == names(queue, "held") == []


# -- strangers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def new(queue: Maildir) -> Path:
    queue.folders.make()
    return Path(queue.folders.at("new"))


def test_what_the_standard_library_delivers_is_a_job(queue: Maildir, new: Path) -> None:
    key = mailbox.Maildir(queue.folders.path, create=False).add(b"Subject: hi\n\nhello\n")
    job = take(queue)
    assert (job.key, job.body) == (key, b"Subject: hi\n\nhello\n")
    assert (job.sender, job.recipients, job.peer, job.target) == (None, (), None, None)
    queue.settle(job, Later(counted=False))
    assert take(queue).key == key


def test_fields_of_other_programs_stay_in_the_name(queue: Maildir, new: Path, clock: Clock) -> None:
    (new.parent / "cur" / "1.M2.host,S=5,W=6:2,RS").write_bytes(b"hello")
    queue.settle(take(queue), Later("busy", at=clock.now + 9))
    [name] = names(queue, ".delayed/new")
    assert name.startswith("1.M2.host,S=5,W=6,LQ=1b0f1t")


def test_what_a_mail_program_moved_to_cur_is_still_ready(queue: Maildir, new: Path) -> None:
    key = push(queue)
    [name] = names(queue)
    os.rename(new / name, new.parent / "cur" / f"{name}:2,S")
    assert (queue.keys(), counts(queue)) == ([key], (1, 0, 0, 0))
    job = take(queue)
    assert (job.key, job.body) == (key, BODY)


def test_what_a_mail_program_marked_as_deleted_is_not_worked(queue: Maildir, new: Path) -> None:
    (new.parent / "cur" / "1.M2.host:2,ST").write_bytes(b"hello")
    assert queue.reserve(1) == []
    assert counts(queue) == (0, 0, 0, 0)
    assert os.listdir(new.parent / "cur") == ["1.M2.host:2,ST"]


def test_what_a_mail_program_did_to_a_dead_letter_does_not_hide_it(queue: Maildir) -> None:
    key = push(queue, outcome=Dead("no"))
    [name] = names(queue, ".dead/new")
    os.rename(queue.folders.at(".dead/new", name), queue.folders.at(".dead/cur", f"{name}:2,S"))
    assert queue.keys("dead") == [key]
    assert queue.kick(key)
    assert take(queue).body == BODY


def test_two_files_with_one_key_are_both_worked(queue: Maildir, new: Path, clock: Clock) -> None:
    key = push(queue, b"one")
    [name] = names(queue)
    (new.parent / "cur" / f"{name}:2,S").write_bytes((new / name).read_bytes())
    (new.parent / "cur" / f"{name},U=3:2,").write_bytes((new / name).read_bytes())
    jobs = queue.reserve(5)
    assert [job.key for job in jobs] == [key] * 3
    for job in jobs:
        queue.settle(job, Later("busy", at=clock.now + 5))
    assert counts(queue) == (0, 3, 0, 0)
    clock.now += 6
    assert drain(queue) == [b"one"] * 3


def test_what_cannot_be_a_job_is_left_alone_and_said_once(
    queue: Maildir, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (new / "a.directory").mkdir()
    (new / "a.link").symlink_to("/etc/passwd")
    os.mkfifo(new / "a.fifo")
    (new / ".hidden").write_bytes(b"x")
    (new / "1.newer,LQ=2b5").write_bytes(b"x")
    key = push(queue)
    for _ in range(3):
        queue._arrivals.look_again()
        for job in queue.reserve(10):
            assert job.key == key
    assert sorted(os.listdir(new)) == [".hidden", "1.newer,LQ=2b5", "a.directory", "a.fifo", "a.link"]
    assert len([line for line in caplog.messages if "is left alone" in line]) == 5
    assert counts(queue) == (0, 0, 1, 0)


def test_a_file_that_may_not_be_read_is_left_alone(
    queue: Maildir, new: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (new / "1.secret").write_bytes(b"x")
    key = push(queue)
    real = os.open

    def deny(path: str, *args: Any, **kwargs: Any) -> int:
        if "1.secret" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", deny)
    assert [job.key for job in queue.reserve(5, wait=0.05)] == [key]
    assert queue.reserve(5, wait=0.05) == []
    assert (new / "1.secret").exists()
    assert len([line for line in caplog.messages if "is left alone: Permission denied" in line]) == 1


def test_a_put_of_more_jobs_than_a_process_may_have_files_open(queue: Maildir) -> None:
    """As when a function pushes a message to each subscriber of a list."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + durable.OPEN_MAX + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        assert all(queue.put([Put(queue, Job(key=queue.new_key(), body=b"")) for _ in range(most)]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert queue.counts()["ready"] == most
    assert os.listdir(queue.folders.at("tmp")) == []


def test_when_there_are_no_descriptors_left_the_job_stays(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    push(queue)
    queue.reserve(0)
    real = os.open

    def none_left(path: str, *args: Any, **kwargs: Any) -> int:
        if "LQ=" in str(path):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", none_left)
        with pytest.raises(QueueError, match="ulimit -n"):
            queue.reserve(1)
    assert take(queue).deliveries == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.k,LQ=1b500", b"X-Lamsonq-Job: {}\nbody"),
        ("1.k,LQ=1b10", b"From: somebody\n\nbody"),
        ("1.k,LQ=1b18", b"X-Lamsonq-Job: {} body"),
        ("1.k,LQ=1b18", b"X-Lamsonq-Job: [}\nbody"),
        ("1.k,LQ=1b99999999999999999", b""),
        ("1.k,LQ=1b0z5", b"body"),
        ("1.k,LQ=", b"body"),
    ],
)
def test_a_file_whose_record_does_not_check_out_is_dead_with_a_reason(
    queue: Maildir, new: Path, name: str, content: bytes
) -> None:
    (new / name).write_bytes(content)
    after = push(queue, b"goes on")
    assert [job.key for job in queue.reserve(5)] == [after]
    assert queue.keys("dead") == ["1.k"]
    assert queue.report("1.k").strip()
    dead = queue.get("1.k")
    assert dead is not None
    assert dead.body == content


def test_a_job_that_is_cut_at_any_byte_stops_nothing(queue: Maildir, new: Path) -> None:
    push(queue, b"body", sender="a@b")
    [name] = names(queue)
    whole = (new / name).read_bytes()
    block = parse_name(name)
    assert block is not None
    os.unlink(new / name)
    for length in range(len(whole)):
        (new / name.replace("P", f"P{length:04d}")).write_bytes(whole[:length])
    assert len(drain(queue)) == len(whole) - block.block
    assert counts(queue) == (0, 0, 0, block.block)


def test_a_name_that_is_too_long_gets_a_key_of_ours(queue: Maildir, new: Path, clock: Clock) -> None:
    (new / ("1." + "x" * 253)).write_bytes(b"hello")
    job = take(queue)
    assert job.body == b"hello"
    assert len(job.key) < 150
    queue.settle(job, Later("busy", at=clock.now))
    assert take(queue).key == job.key


def test_names_that_are_no_text_are_worked(queue: Maildir, new: Path, clock: Clock) -> None:
    Path(os.fsdecode(os.fsencode(new) + b"/1.\xff\xfe\n,S=1")).write_bytes(b"hello")
    job = take(queue)
    queue.settle(job, Later("busy", at=clock.now))
    queue.settle(take(queue), DONE, [Put(queue, Job(key="k", body=b"child"))])
    assert drain(queue) == [b"child"]
    assert counts(queue) == (0, 0, 0, 0)


def test_many_left_alone_do_not_starve_the_others(queue: Maildir, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "LIMIT", 10)
    for number in range(30):
        (new / f"0.{number},LQ=2b5").write_bytes(b"x")
        (new / f"1.{number}").mkdir()
    keys = [push(queue) for _ in range(35)]
    assert [job.key for job in queue.reserve(100)] == keys[:10]
    assert [job.key for _ in range(30) for job in queue.reserve(1)] == keys[10:]


# -- oversize ----------------------------------------------------------------------------------------------------


def test_a_message_over_the_limit_is_moved_with_a_line(
    make: Callable[..., Maildir], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    queue = make(pop_limit=100, oversize_dir=str(tmp_path / "large"))
    small = push(queue, b"x" * 100)
    large = push(queue, b"x" * 101, sender="a@b")
    assert [job.key for job in queue.reserve(5)] == [small]
    assert f"Message key {large} over size limit 100, moving to {tmp_path}/large." in caplog.messages
    moved = Maildir(str(tmp_path / "large")).get(large)
    assert moved is not None
    assert (moved.body, moved.sender, moved.deliveries) == (b"x" * 101, "a@b", 0)


def test_a_message_over_the_limit_is_never_deleted(
    make: Callable[..., Maildir], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    queue = make(pop_limit=100)
    key = push(queue, b"x" * 101)
    assert queue.reserve(5) == []
    assert queue.keys("dead") == [key]
    line = f"Message key {key} over size limit 100, moving to the dead letters (set oversize_dir)."
    assert line in caplog.messages
    assert "size limit of 100 bytes" in queue.report(key)


# -- sleeping and waking -----------------------------------------------------------------------------------------


def _push_when_told(path: str, told: Any) -> None:
    queue = Maildir(path)
    told.recv()
    staged = queue.folders.at("tmp", "1.x")
    Path(staged).write_bytes(b"hello")
    begun = time.monotonic()
    os.rename(staged, queue.folders.at("new", "1.x"))
    told.send(begun)


def test_a_sleeper_is_woken_by_another_process_rename(queue: Maildir) -> None:
    queue.folders.make()
    here, there = FORK.Pipe()
    child = FORK.Process(target=_push_when_told, args=[queue.folders.path, there])
    child.start()
    timer = threading.Timer(0.1, here.send, ["now"])
    timer.start()
    [job] = queue.reserve(1, wait=PATIENCE)
    woken = time.monotonic()
    assert job.body == b"hello"
    assert here.poll(PATIENCE)
    assert woken - here.recv() < PATIENCE / 2
    child.join(PATIENCE)
    timer.join()


@pytest.mark.parametrize("folder", ["new", "cur", ".delayed/new"])
def test_a_file_that_appears_ends_the_sleep(queue: Maildir, folder: str) -> None:
    queue.folders.make()
    assert queue.reserve(1, wait=0.01) == []

    def deliver() -> None:
        Path(queue.folders.at("tmp", "1.x")).write_bytes(b"hello")
        os.rename(queue.folders.at("tmp", "1.x"), queue.folders.at(folder, "1.x"))

    timer = threading.Timer(0.05, deliver)
    timer.start()
    begun = time.monotonic()
    [job] = queue.reserve(1, wait=PATIENCE)
    timer.join()
    assert (job.key, job.body) == ("1.x", b"hello")
    assert time.monotonic() - begun < PATIENCE / 2


def looked_at(patch: pytest.MonkeyPatch) -> list[str]:
    """The directories that are read from now on."""
    looks: list[str] = []
    real = os.scandir

    def scandir(path: str) -> Any:
        looks.append(str(path))
        return real(path)

    patch.setattr(os, "scandir", scandir)
    return looks


def test_an_empty_queue_is_watched_and_not_looked_at_again(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    push(queue)
    assert drain(queue) == [BODY]
    queue.reserve(1, wait=0.01)
    looks = looked_at(monkeypatch)
    for number in range(5):
        queue.reserve(1, wait=0.001)
        push(queue, b"%d" % number)
        assert take(queue).body == b"%d" % number
    assert looks == []


def test_the_sleep_ends_when_a_delayed_job_is_due(make: Callable[..., Maildir], tmp_path: Path) -> None:
    queue = Maildir(str(tmp_path / "real"))
    due = time.time() + 0.2
    push(queue, due=due)
    begun = time.monotonic()
    [job] = queue.reserve(1, wait=PATIENCE)
    assert time.monotonic() - begun < PATIENCE / 2
    assert time.time() >= due
    queue.settle(job, DONE)
    queue.close()


def test_nothing_to_do_comes_back_in_time(queue: Maildir) -> None:
    begun = time.monotonic()
    assert queue.reserve(1, wait=0.1) == []
    assert 0.09 < time.monotonic() - begun < PATIENCE / 2


def test_wake_ends_the_sleep_also_before_it(queue: Maildir) -> None:
    begun = time.monotonic()
    queue.wake()
    assert queue.reserve(1, wait=PATIENCE) == []
    timer = threading.Timer(0.05, queue.wake)
    timer.start()
    assert queue.reserve(1, wait=PATIENCE) == []
    timer.join()
    assert time.monotonic() - begun < PATIENCE / 2


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOSPC])
def test_without_watches_it_looks_by_itself(
    queue: Maildir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def none_left(**_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(watch, "Inotify", none_left)
    monkeypatch.setattr("lamsonq.backends.maildir_arrivals.BLIND_LOOK_EVERY", 0.02)
    assert queue.reserve(1, wait=0.05) == []
    timer = threading.Timer(0.05, push, [queue])
    timer.start()
    assert len(queue.reserve(1, wait=10)) == 1
    timer.join()
    assert len([line for line in caplog.messages if "Cannot watch" in line]) == 1


def test_watches_that_the_kernel_had_not_are_asked_for_again(
    queue: Maildir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as shortage:
        shortage.setattr(watch, "Inotify", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
        shortage.setattr(watch, "AGAIN_AFTER", 0.01)
        shortage.setattr("lamsonq.backends.maildir_arrivals.BLIND_LOOK_EVERY", 0.005)
        until(lambda: queue.reserve(1, wait=0.05) or "Cannot watch" in caplog.text)
        assert not queue._arrivals.seeing

    def sees() -> bool:
        queue.reserve(1, wait=0.01)
        return queue._arrivals.seeing

    until(sees)
    assert len([line for line in caplog.messages if "Cannot watch" in line]) == 1


def test_when_too_much_has_happened_it_looks_again(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.reserve(1, wait=0.01)
    monkeypatch.setattr(watch.Watch, "appeared", lambda _: None)
    push(queue)
    assert take(queue).body == BODY


def test_a_folder_that_was_replaced_is_watched_again(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.reserve(1, wait=0.01)
    os.rename(queue.folders.path, queue.folders.path + ".old")
    queue._vigil.look_now()
    queue.reserve(1, wait=0.05)
    timer = threading.Timer(0.05, push, [Maildir(queue.folders.path)])
    timer.start()
    assert len(queue.reserve(1, wait=10)) == 1
    timer.join()


def test_a_long_queue_is_drained_in_order_a_part_at_a_time(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "LIMIT", 7)
    queue.reserve(1, wait=0.01)
    for number in range(50):
        push(queue, str(number).encode())
    assert drain(queue) == [str(number).encode() for number in range(50)]


def test_many_delayed_jobs_are_not_read_again_for_each(
    queue: Maildir, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(backlog, "LIMIT", 300)
    queue.put([Put(queue, Job(key=f"1.{n}", body=b"x", due=clock.now + 100 + n)) for n in range(400)])
    queue.reserve(1)
    queue.reserve(1)
    with monkeypatch.context() as patch:
        looks = looked_at(patch)
        for number in range(5):
            push(queue, b"%d" % number, due=clock.now + 5)
            clock.now += 6
            assert take(queue).body == b"%d" % number
    assert not [look for look in looks if ".delayed" in look]
    clock.now += 1000
    assert len(queue.reserve(1000) + queue.reserve(1000)) == 400


def test_what_was_never_finished_is_swept_after_a_day_and_a_half(queue: Maildir) -> None:
    queue.folders.make()
    for name, hours in (("old", 37), ("young", 35)):
        Path(queue.folders.at("tmp", name)).write_bytes(b"x")
        os.utime(queue.folders.at("tmp", name), (time.time() - hours * 3600,) * 2)
    queue.reserve(1)
    assert names(queue, "tmp") == ["young"]


# -- opening -----------------------------------------------------------------------------------------------------


def test_the_same_queue_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = open_backend("run/posts")
    assert open_backend("run/posts") is one
    assert one.name == "run/posts"
    assert open_backend("run/posts", pop_limit=5) is not one
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_backend("run/posts") is not one


def test_opening_and_pushing_again_and_again_needs_no_descriptors(tmp_path: Path) -> None:
    def used() -> int:
        return len(os.listdir("/proc/self/fd"))

    push(open_backend(str(tmp_path / "posts")))
    before = used()
    for _ in range(20):
        push(open_backend(str(tmp_path / "posts")))
    assert used() == before


def test_a_queue_that_is_no_longer_used_gives_its_descriptors_back(here: Path) -> None:
    """In an interpreter of its own: here, other tests' descriptors may go in the same moment."""
    script = """
import gc, os
from lamsonq.backends.maildir import Maildir
count = lambda: len(os.listdir("/proc/self/fd"))
before = count()
queue = Maildir("posts")
queue.folders.make()
queue.reserve(1, wait=0.05)
assert count() > before
del queue
gc.collect()
assert count() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_scheme_that_nothing_serves_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        BrokerError, match=r"no queue backend serves carrier-pigeon: .*installed are .*maildir"
    ) as found:
        open_backend("carrier-pigeon:coop")
    assert found.value.exit_code == 3
    with pytest.raises(BrokerError):
        open_backend("durable:x")


@pytest.mark.parametrize("name", ["", "maildir:"])
def test_a_queue_without_a_name_is_not_the_current_directory(name: str, here: Path) -> None:
    with pytest.raises(BrokerError, match="a queue without a name: give a directory"):
        open_backend(name)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["posts\0", "run/q.db?queue=posts"])
def test_what_names_no_queue_is_refused_and_makes_no_folder(here: Path, name: str) -> None:
    with pytest.raises(BrokerError, match="sqlite:"):
        open_backend(name)
    assert os.listdir(here) == []


def test_a_scheme_may_be_written_in_any_case(here: Path) -> None:
    assert open_backend("SQLite:q.db?queue=Posts") is open_backend("sqlite:q.db?queue=Posts")
    assert open_backend("Maildir:posts") is open_backend("posts")
    with pytest.raises(BrokerError, match="no queue backend serves carrier-pigeon:"):
        open_backend("Carrier-Pigeon://coop")
    assert os.listdir(here) == []


def test_a_backend_of_somebody_else_is_an_entry_point(tmp_path: Path) -> None:
    """A package that is installed elsewhere, seen by a fresh interpreter."""
    info = tmp_path / "pigeon-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lamsonq.backends]\npigeon = pigeon:open_queue\n")
    (tmp_path / "pigeon.py").write_text(
        "def open_queue(url, *, pop_limit, oversize_dir):\n    return [url, pop_limit]\n"
    )
    code = "from lamsonq.backends import open_backend; print(open_backend('pigeon:coop', pop_limit=3))"
    path = os.pathsep.join([str(tmp_path), os.getcwd(), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['pigeon:coop', 3]\n"
