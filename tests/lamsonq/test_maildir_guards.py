"""Who is let into a maildir queue (unique, gates, keys), and what tools do with one: claims, pauses, purges."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq import fsck
from lamsonq.backends import maildir_arrivals
from lamsonq.backends.maildir import Maildir
from lamsonq.backends.maildir_files import read_record
from lamsonq.backends.maildir_guards import Guards, Number, mark_of
from lamsonq.conformance import Clock, kept, push, take
from lamsonq.errors import Dead, Later, QueueError, SettingsError
from lamsonq.jobs import DONE, KEPT, Debounce, Job, Limit, Outcome, Passage, Put, Tick
from lamsonq.keys import derived_key
from lamsonq.reports import entries

from .waiting import PATIENCE

FORK = multiprocessing.get_context("fork")
HOUR = 3600.0


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


def names(queue: Maildir, folder: str = "new") -> list[str]:
    return sorted(os.listdir(queue.folders.at(folder)))


def guards(queue: Maildir) -> list[str]:
    return [name for name in names(queue, "guards") if name != "lock"]


# -- unique ------------------------------------------------------------------------------------------------------


def test_a_unique_job_is_in_the_way_of_like_ones_as_long_as_its_file_is_anywhere_in_the_queue(
    make: Callable[..., Maildir], clock: Clock
) -> None:
    queue = make()
    key = push(queue, unique="u")
    [name] = names(queue)
    assert name.endswith("q1")
    os.rename(queue.folders.at("new", name), queue.folders.at("cur", f"{name}:2,S"))
    assert not kept(queue, unique="u")
    job = take(queue)
    assert not kept(queue, unique="u")
    queue.settle(job, Later("x", clock.now + 5))
    assert not kept(queue, unique="u")
    os.unlink(str(queue.path_of(key)))  # by hand
    assert kept(queue, unique="u")


@pytest.mark.parametrize("outcome", [DONE, KEPT, Dead("no")])
def test_a_job_that_has_ended_leaves_no_guard(queue: Maildir, outcome: Any) -> None:
    push(queue, unique="u")
    assert guards(queue) == [f"{mark_of('u')}.u"]
    queue.settle(take(queue), outcome)
    assert guards(queue) == []


def test_a_unique_job_that_kills_its_workers_is_in_nobodys_way_when_it_is_dead(make: Callable[..., Maildir]) -> None:
    push(make(), unique="u")
    for _ in range(3):
        worker = make()
        take(worker)
        worker.forget()
    last = make()
    assert not kept(last, unique="u")
    last.release_stale()
    assert (last.counts()["dead"], kept(last, unique="u")) == (1, True)


def test_a_unique_job_over_the_size_limit_is_in_nobodys_way(make: Callable[..., Maildir], tmp_path: Path) -> None:
    queue = make(pop_limit=10, oversize_dir=str(tmp_path / "large"))
    push(queue, b"x" * 11, unique="u")
    assert queue.reserve(1) == []
    assert kept(queue, unique="u")


def test_a_dead_job_that_is_kicked_is_not_unique_any_more(queue: Maildir) -> None:
    key = push(queue, unique="u")
    queue.settle(take(queue), Dead("no"))
    assert kept(queue, b"like", unique="u")
    assert queue.kick(key)
    jobs = queue.reserve(2)
    assert len(jobs) == 2
    queue.settle(jobs[0], DONE)
    assert not kept(queue, unique="u"), "the end of the kicked one is not that of the other"
    queue.settle(jobs[1], DONE)
    assert kept(queue, unique="u")


def test_a_copy_that_a_mail_program_has_made_keeps_nobody_out_when_the_job_is_done(queue: Maildir) -> None:
    push(queue, unique="u")
    [name] = names(queue)
    os.link(queue.folders.at("new", name), f"{queue.folders.path}.backup")
    queue.settle(take(queue), DONE)
    assert kept(queue, unique="u")


def test_a_unique_text_of_any_length_and_kind_will_do(queue: Maildir) -> None:
    for unique in ("x" * 10_000, "a/b\n", "\udcff", ""):
        assert [kept(queue, unique=unique) for _ in range(2)] == [True, False]


def test_a_forked_child_does_not_keep_the_lock(queue: Maildir) -> None:
    queue.folders.make()
    with Guards(queue.folders).locked():
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        done = threading.Thread(target=push, args=[queue], kwargs={"unique": "u"})
        done.start()
        done.join(PATIENCE)
        assert not done.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _push_unique(path: str, told: Any) -> None:
    queue = Maildir(path)
    told.send(sum(kept(queue, unique=f"u{number}") for number in range(40)))


@pytest.mark.slow
def test_of_racing_processes_one_puts_each_unique_job(queue: Maildir) -> None:
    queue.folders.make()
    pipes = [FORK.Pipe() for _ in range(4)]
    children = [FORK.Process(target=_push_unique, args=[queue.folders.path, there]) for _, there in pipes]
    for child in children:
        child.start()
    assert sum(here.recv() for here, _ in pipes if here.poll(PATIENCE)) == 40
    for child in children:
        child.join(PATIENCE)
    assert queue.counts()["ready"] == 40


# -- gates -------------------------------------------------------------------------------------------------------


def test_a_number_is_kept_as_version_1_has_it(queue: Maildir, clock: Clock) -> None:
    """A sample of what is on disk: read, and written the same."""
    push(queue, gate=Debounce("g", HOUR, always_delay=True))
    [name] = guards(queue)
    found = json.loads(Path(queue.folders.at("guards", name)).read_bytes())
    staged = found.pop("staged")
    assert name == "cd0aa9856147b6c5b4ff2b7dfee5da20aa38253099ef1b4a64aced233c9afe29.n"
    assert staged.startswith("tmp/")
    assert found == {"last": 1700003600.0, "until": 1700007200.0, "before": None, "version": 1}
    sample = '{"last": 1700000900.0, "until": 1700007200.0, "staged": "tmp/gone", "before": null, "version": 1}'
    Path(queue.folders.at("guards", name)).write_text(sample)
    assert not kept(queue, gate=Debounce("g", HOUR)), "one waits until then"
    clock.now += 901
    assert kept(queue, gate=Debounce("g", HOUR))


def test_a_number_is_synced_before_its_job_has_a_name_and_both_folders_before_put_returns(
    queue: Maildir, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.folders.make()
    order: list[str] = []
    real_fsync, real_rename, real_link = os.fsync, os.rename, os.link

    def fsync(fd: int) -> None:
        order.append("sync " + os.readlink(f"/proc/self/fd/{fd}").removeprefix(queue.folders.path + "/").split("/")[0])
        real_fsync(fd)

    def rename(source: str, target: str) -> None:
        order.append("number" if target.endswith(".n") else "job")
        real_rename(source, target)

    def link(source: str, target: str) -> None:
        order.append("guard")
        real_link(source, target)

    for name, function in (("fsync", fsync), ("rename", rename), ("link", link)):
        monkeypatch.setattr(os, name, function)
    assert kept(queue, unique="u", gate=Tick("g", 1.0))
    assert order == ["sync tmp", "guard", "sync guards", "number", "job", "sync new", "sync guards"]
    order.clear()
    assert not kept(queue, unique="u", gate=Tick("g", 2.0))
    assert order == ["sync tmp"]


def test_a_number_of_a_newer_version_is_left_untouched(queue: Maildir) -> None:
    push(queue, gate=Tick("g", 1.0))
    [name] = guards(queue)
    path = Path(queue.folders.at("guards", name))
    path.write_text('{"version": 2}')
    with pytest.raises(QueueError, match="version 2"):
        push(queue, gate=Tick("g", 2.0))
    assert path.read_text() == '{"version": 2}'
    assert (names(queue, "tmp"), queue.counts()["ready"]) == ([], 1)


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_number_that_was_damaged_by_hand_stops_nobody(
    queue: Maildir, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    push(queue, gate=Tick("g", 1.0))
    Path(queue.folders.at("guards", guards(queue)[0])).write_text(content)
    assert kept(queue, gate=Tick("g", 2.0))
    assert not kept(queue, gate=Tick("g", 2.0))
    assert "is no number of a gate" in caplog.text


def test_a_number_is_forgotten_when_its_gate_says_so_and_a_tick_never(
    queue: Maildir, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(queue, gate=Debounce("g", HOUR))
    push(queue, gate=Tick("t", 1.0))
    push(queue, unique="u")
    queue.remove(queue.keys()[-1])
    assert len(guards(queue)) == 3

    def tidied() -> int:
        queue._tidy_at = 0.0
        queue.reserve(0)
        return len(guards(queue))

    clock.now += HOUR - 1
    assert tidied() == 2, "the guard of what is gone goes"
    clock.now += 10 * HOUR
    assert tidied() == 1
    assert not kept(queue, gate=Tick("t", 1.0))


def test_what_was_abandoned_in_tmp_shuts_no_gate(queue: Maildir, clock: Clock) -> None:
    """A process died between the number and the rename, and its file is swept."""
    gate = Debounce("g", 100 * HOUR, always_delay=True)
    queue.folders.make()
    staged = Path(queue.folders.at("tmp", "1.dead"))
    staged.write_text("x")
    Guards(queue.folders)._write(
        queue.folders.at("guards", f"{mark_of('g')}.n"), Number(clock.now + 9, None, "tmp/1.dead")
    )
    os.utime(staged, (time.time() - 37 * HOUR,) * 2)
    queue.reserve(1)
    assert (names(queue, "tmp"), guards(queue)) == ([], [])
    assert kept(queue, gate=gate)


def test_a_tick_that_is_put_again_under_its_key_when_it_is_done_is_kept_out(queue: Maildir) -> None:
    put = Put(queue, Job(key="tick 5", body=b"x"), gate=Tick("g", 5.0))
    assert queue.put([put]) == [True]
    queue.settle(take(queue), DONE)
    assert queue.put([put]) == [False]


def test_one_key_twice_in_one_call_is_put_once(queue: Maildir) -> None:
    key = queue.new_key()
    assert queue.put([Put(queue, Job(key=key, body=body)) for body in (b"one", b"and another")]) == [True, True]
    assert take(queue).body == b"one"
    assert queue.counts()["ready"] == 0


class Own:
    """A gate that somebody else has written."""

    key, memory = "own", 5.0

    def passage(self, last: float | None, now: float) -> Passage | None:  # noqa: ARG002 - it asks no clock
        if last is not None:
            raise ZeroDivisionError
        return Passage(1.0)


def test_a_gate_of_somebody_else_may_be_put_but_not_settled(queue: Maildir) -> None:
    assert kept(queue, gate=Own())
    job = take(queue)
    with pytest.raises(QueueError, match="may have Debounce and Tick as a gate, not Own"):
        queue.settle(job, DONE, [Put(queue, Job(key=queue.new_key(), body=b""), gate=Own())])
    queue.settle(job, DONE)
    assert names(queue, "held") == []


def test_a_gate_that_fails_leaves_nothing(queue: Maildir) -> None:
    push(queue, gate=Own())
    with pytest.raises(ZeroDivisionError):
        queue.put([Put(queue, Job(key=queue.new_key(), body=b"", unique="u"), gate=Own())])
    assert (names(queue, "tmp"), queue.counts()["ready"]) == ([], 1)
    assert kept(queue, unique="u")


def test_a_settle_delays_what_a_gate_delays(queue: Maildir, clock: Clock) -> None:
    gate = Debounce("g", HOUR)
    push(queue)
    puts = [Put(queue, Job(key=queue.new_key(), body=b"%d" % number), gate=gate) for number in range(3)]
    assert queue.settle(take(queue), DONE, puts) == [True, True, False]
    assert take(queue).body == b"0"
    [key] = queue.keys("delayed")
    job = queue.get(key)
    assert job is not None
    assert (job.body, job.due) == (b"1", clock.now + HOUR)
    assert names(queue, "held") == []


VERSION_1_MANIFEST = """{"fate": {"folder": "", "name": "", "report": "", "reported": false, "unique": "%s"},
 "publications": [
  {"staged": "77.ab.9.0", "queue": "%s", "folder": "new", "name": "1.M1P1Q1R1.h,LQ=1b0p3", "report": "",
   "foreign": false, "entry": "", "unique": "child", "gate": {"kind": "tick", "key": "g", "at": 5.0}, "open_end": true},
  {"staged": "77.ab.9.1", "queue": "%s", "folder": "new", "name": "1.M1P1Q1R2.h,LQ=1b0", "report": "",
   "foreign": false, "entry": "", "unique": null, "open_end": true,
   "gate": {"kind": "debounce", "key": "h", "window": 60.0, "always_delay": true}},
  {"staged": "77.ab.9.2", "queue": "%s", "folder": ".dead/new", "name": "1.M1P1Q1R3.h,LQ=1b0e1", "report": "bad\\n"}],
 "version": 1}"""


def test_a_settle_that_version_1_has_committed_is_finished(queue: Maildir) -> None:
    """A sample of what is on disk; the last publication is as the first lamsonq wrote it."""
    queue.folders.make()
    claimed = Path(queue.folders.at("claimed", "77.ab"))
    claimed.mkdir()
    Path(f"{claimed}.lock").touch()
    (claimed / "1.M1P1Q1.h,LQ=1b0d1k2c9q1").write_bytes(b"parent")
    os.link(claimed / "1.M1P1Q1.h,LQ=1b0d1k2c9q1", queue.folders.at("guards", f"{mark_of('u')}.u"))
    path = queue.folders.path
    Path(queue.folders.at("held", "77.ab.9.json")).write_text(VERSION_1_MANIFEST % (mark_of("u"), path, path, path))
    for number in range(3):
        Path(queue.folders.at("held", f"77.ab.9.{number}")).write_bytes(b"%d" % number)
    assert queue.release_stale() == 1
    assert queue.counts() == {"ready": 1, "delayed": 1, "reserved": 0, "dead": 1, "done": 0}
    assert (names(queue, "held"), queue.report("1.M1P1Q1R3.h")) == ([], "bad\n")
    assert [kept(queue, gate=gate) for gate in (Tick("g", 5.0), Debounce("h", 60.0))] == [False, False]
    assert [kept(queue, unique=unique) for unique in ("child", "u")] == [False, True]
    assert take(queue).priority == 0


# -- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["ready", "delayed", "reserved", "dead", "done"])
def test_a_key_that_is_there_in_any_state_is_put_once(make: Callable[..., Maildir], clock: Clock, state: str) -> None:
    queue = make()
    key = push(queue, b"one", received=1.5)
    if state != "ready":
        outcomes: dict[str, Outcome] = {"delayed": Later("x", clock.now + 9), "dead": Dead("no"), "done": KEPT}
        outcome = outcomes.get(state)
        job = take(queue)
        if outcome is not None:
            queue.settle(job, outcome)
    assert make().put([Put(queue, Job(key=key, body=b"two"))]) == [True]
    assert (queue.counts()[state], sum(queue.counts().values())) == (1, 1)
    assert names(queue, "tmp") == []


def test_a_part_that_a_crash_puts_again_is_put_once(queue: Maildir) -> None:
    key = derived_key(queue.new_key(), 1)
    for _ in range(2):
        push(queue, b"one", key=key, received=1.5)
    assert queue.counts()["ready"] == 1


def test_a_key_that_was_just_made_costs_no_look_at_the_queue(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.folders.make()
    looks: list[str] = []
    monkeypatch.setattr(os, "scandir", looks.append)
    push(queue)
    push(queue, key=derived_key(queue.new_key(), 3))
    assert looks == []


# -- the order, and what is asked for ------------------------------------------------------------------------------


def test_a_strangers_file_is_of_the_most_urgent(queue: Maildir) -> None:
    push(queue, b"ours", priority=1)
    Path(queue.folders.at("new", "9999999999.stranger")).write_bytes(b"stranger's")
    assert [job.body for job in queue.reserve(2)] == [b"stranger's", b"ours"]


def test_an_urgent_job_that_another_process_puts_is_next_in_a_long_queue(make: Callable[..., Maildir]) -> None:
    queue, other = make(), make()
    for number in range(300):
        push(queue, b"%d" % number, priority=5)
    assert take(queue).body == b"0"
    push(other, b"urgent", priority=4)
    assert [take(queue).body, take(queue).body] == [b"urgent", b"1"]


def test_a_job_that_is_not_asked_for_is_not_touched_and_read_once(
    make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make()
    for target in ("other", None, "mine", "other"):
        push(queue, target=target)
    read: list[str] = []
    real = read_record

    def reading(path: str, name: Any) -> Any:
        read.append(path)
        return real(path, name)

    monkeypatch.setattr(maildir_arrivals, "read_record", reading)
    before = set(names(queue))
    inodes = {name: os.stat(queue.folders.at("new", name)).st_ctime_ns for name in before}
    [job] = queue.reserve(9, only={"mine"})
    assert job.target == "mine"
    assert set(names(queue)) < before
    assert all(os.stat(queue.folders.at("new", name)).st_ctime_ns == inodes[name] for name in names(queue))
    assert len(read) == 3, "what has no target need not be read"
    for _ in range(3):
        assert queue.reserve(9, only=["mine"]) == []
    assert len(read) == 3
    assert len(queue.reserve(9, only={"other"})) == 2
    assert len(queue.reserve(9)) == 1


def test_a_job_that_was_not_asked_for_and_has_failed_elsewhere_is_looked_at_again(
    make: Callable[..., Maildir], clock: Clock
) -> None:
    queue, other = make(), make()
    push(queue, target="other")
    push(queue, target="mine")
    assert len(queue.reserve(9, only={"mine"})) == 1
    other.settle(take(other), Later("x", clock.now + 1))
    clock.now += 2
    assert queue.reserve(9, only={"mine"}) == []
    assert len(queue.reserve(9, only={"mine", "other"})) == 1


def test_a_broken_file_is_buried_by_who_asks_for_some_targets_too(queue: Maildir) -> None:
    queue.folders.make()
    Path(queue.folders.at("new", "1.k,LQ=1b500o1")).write_bytes(b"X-Lamsonq-Job: {}\nbody")
    assert queue.reserve(1, only={"mine"}) == []
    assert queue.keys("dead") == ["1.k"]


# -- tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["ready", "delayed", "dead", "done"])
def test_a_job_whose_tool_was_killed_is_where_it_was_as_it_was(
    make: Callable[..., Maildir], clock: Clock, state: str
) -> None:
    queue, tool = make(), make()
    outcome = {"delayed": Later("x", clock.now + 9), "dead": Dead("no"), "done": KEPT}.get(state)
    key = push(queue, outcome=outcome, attempts=2)
    before = queue.path_of(key)
    assert tool.claim(key) is not None
    assert queue.state(key) == "reserved"
    tool.forget()
    assert queue.release_stale() == 1
    assert (queue.path_of(key), queue.state(key)) == (before, state)


def test_a_job_whose_tool_closes_is_where_it_was(queue: Maildir) -> None:
    key = push(queue, outcome=Dead("no"))
    before = queue.path_of(key)
    assert queue.claim(key) is not None
    queue.close()
    assert queue.path_of(key) == before


def test_a_tool_may_give_a_job_back_to_be_worked(make: Callable[..., Maildir], clock: Clock) -> None:
    queue = make()
    key = push(queue, due=clock.now + 99)
    job = queue.claim(key)
    assert job is not None
    assert job.due == clock.now + 99
    queue.settle(job, Later(counted=False))
    assert take(queue).due is None


def test_a_suspect_that_a_tool_takes_is_no_killer_when_the_tool_dies(make: Callable[..., Maildir]) -> None:
    key = push(make())
    for _ in range(2):
        worker = make()
        take(worker)
        worker.forget()
    for _ in range(3):
        tool = make()
        tool.release_stale()
        assert tool.claim(key) is not None
        tool.forget()
    last = make()
    last.release_stale()
    assert take(last).deliveries == 2


def test_what_is_claimed_after_a_worker_was_forgiven_counts(make: Callable[..., Maildir]) -> None:
    queue = make()
    push(queue, b"before")
    push(queue, b"after")
    take(queue)
    queue.forgive()
    take(queue)
    queue.forget()
    other = make()
    other.release_stale()
    found = {job.body: job.deliveries for job in (*other.reserve(2),)}
    assert found == {b"before": 0, b"after": 1}


def test_to_forgive_costs_the_same_however_much_is_claimed(queue: Maildir, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.forgive()
    for _ in range(50):
        push(queue)
    queue.reserve(50)
    calls: list[str] = []
    for name in ("rename", "scandir", "open"):
        monkeypatch.setattr(os, name, lambda *_, name=name: calls.append(name))
    queue.forgive()
    assert calls == []


def test_a_paused_receiver_that_waits_wakes_soon_after_the_pause(make: Callable[..., Maildir]) -> None:
    queue, other = make(), make()
    push(queue)
    other.pause()
    timer = threading.Timer(0.2, other.resume)
    timer.start()
    begun = time.monotonic()
    [job] = queue.reserve(1, wait=PATIENCE)
    assert 0.15 < time.monotonic() - begun < PATIENCE / 2
    timer.join()
    queue.settle(job, DONE)
    other.pause()
    begun = time.monotonic()
    push(queue)
    queue.wait(0.2)
    assert time.monotonic() - begun > 0.15


def test_a_pause_outlives_everybody_and_may_be_said_twice(make: Callable[..., Maildir]) -> None:
    queue = make()
    queue.resume()
    queue.pause()
    queue.pause()
    queue.close()
    assert (make().paused(), os.stat(queue.folders.at("paused")).st_mode & 0o777) == (True, 0o600)
    queue.resume()
    queue.resume()
    assert not make().paused()


def test_a_purge_goes_by_when_a_job_came_into_its_state(queue: Maildir, clock: Clock) -> None:
    key = push(queue, received=5.0)
    time.sleep(0.02)
    died = time.time()
    time.sleep(0.02)
    queue.settle(take(queue), Dead("no"))
    assert (queue.purge("dead", before=died), queue.purge("dead", before=time.time() + 1)) == (0, 1)
    assert queue.report(key) == ""
    push(queue)
    take(queue)
    assert queue.purge("reserved") == 0
    with pytest.raises(ValueError, match="ready, delayed"):
        queue.purge("old")


def test_the_age_of_a_queue_is_that_of_a_strangers_file_too(queue: Maildir) -> None:
    queue.folders.make()
    for name, age in (("b.eml", 500), ("a.eml", 100)):
        Path(queue.folders.at("new", name)).write_bytes(b"x")
        os.utime(queue.folders.at("new", name), (time.time() - age,) * 2)
    push(queue, received=time.time())
    assert abs((queue.oldest() or 0) - (time.time() - 500)) < PATIENCE


def test_limits_and_foreign_transactions_are_refused(queue: Maildir) -> None:
    assert queue.capabilities == {"processes", "files"}
    queue.limit([])
    with pytest.raises(SettingsError, match="sqlite"):
        queue.limit([Limit("sender", concurrency=1)])
    with pytest.raises(QueueError, match="no database"):
        queue.put([], conn=object())


def test_the_account_of_a_queue_knows_its_archive_and_its_guards(queue: Maildir, tmp_path: Path) -> None:
    message = b"Message-ID: <a@b>\r\n\r\nx"
    push(queue, message, outcome=KEPT, gate=Tick("g", 1.0))
    push(queue, unique="u")
    report = fsck.check(tmp_path, accepted=["<a@b>"])
    assert report.good
    [found] = report.queues.values()
    assert (found.done, found.ready, found.held, found.tmp) == (1, 1, 0, 0)
    assert "done 1" in str(report)
    assert fsck.counts(tmp_path)[Path(queue.folders.path)]["done"] == 1


def test_a_queue_of_an_older_version_gets_what_it_lacks(queue: Maildir) -> None:
    push(queue)
    for folder in (".done/tmp", ".done/new", ".done/cur", ".done", "guards"):
        os.rmdir(queue.folders.at(folder))
    other = Maildir(queue.folders.path)
    assert kept(other, unique="u")
    other.settle(take(other), KEPT)
    assert other.counts()["done"] == 1
    other.close()


def test_old_reports_stay_readable_and_new_ones_come_behind(queue: Maildir) -> None:
    key = push(queue)
    Path(queue.folders.at("errors", key)).write_text("no such post\n\nTraceback: ...\n")
    queue.settle(take(queue), Dead("again"))
    assert [entry.reason for entry in entries(queue.report(key))] == ["no such post", "again"]
