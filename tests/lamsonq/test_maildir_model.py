"""The maildir does whatever the queue in memory does, for any sequence of operations on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamsonq.backends.maildir import Maildir
from lamsonq.backends.memory import Memory
from lamsonq.conformance import Clock
from lamsonq.errors import Dead, Later, LeaseLost
from lamsonq.jobs import DONE, EXPIRED, KEPT, STATES, Backend, Debounce, Job, Put, Tick

numbers = st.integers(0, 5)
outcomes = st.sampled_from(["done", "kept", "expired", "dead", "later", "later uncounted", "back"])
new_jobs = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.sampled_from([0, 1, 70_000]),
        "unique": st.sampled_from(["u", "v"]),
        "target": st.sampled_from(["mine", "other"]),
        "delay": st.sampled_from([-1.0, 5.0]),
        "gate": st.sampled_from(
            [Debounce("d", 8.0), Debounce("d", 8.0, always_delay=True), Tick("t", 1.0), Tick("t", 2.0)]
        ),
        "outcome": st.sampled_from(["dead", "kept", "later"]),
        "attempts": numbers,
    },
)
steps = st.one_of(
    st.tuples(st.just("put"), new_jobs),
    st.tuples(
        st.just("reserve"), st.sampled_from([1, 2, 9]), st.sampled_from([None, ("mine",), ("mine", "other"), ()])
    ),
    st.tuples(st.just("settle"), numbers, outcomes, st.lists(new_jobs, max_size=2)),
    st.tuples(st.sampled_from(["kick", "remove", "claim"]), st.integers(0, 9)),
    st.tuples(st.just("pass"), st.sampled_from([1.0, 4.0, 9.0])),
    st.tuples(st.just("purge"), st.sampled_from(STATES)),
    st.tuples(st.sampled_from(["die", "forgive", "close", "pause", "resume"])),
)


class Side:
    """One queue of the two, and the jobs that it has handed out."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.taken: list[Job] = []

    def put_of(self, key: str, clock: Clock, fields: dict[str, Any]) -> Put:
        fields = dict(fields)
        outcome = fields.pop("outcome", None)
        gate, delay = fields.pop("gate", None), fields.pop("delay", None)
        job = Job(key=key, body=key.encode(), due=None if delay is None else clock.now + delay, **fields)
        return Put(self.queue, job, outcome_of(outcome, clock) if outcome else None, gate)

    def seen(self) -> dict[str, list[Any]]:
        self.queue.reserve(0)  # a file moves when it is due and somebody works the queue
        found = {}
        for state in STATES:
            jobs = [self.queue.get(key) for key in self.queue.keys(state)]
            found[state] = [facts(job) for job in jobs]
        # Whether a claim will have counted is told when its worker has died.
        found["reserved"] = [replace(job, deliveries=0) for job in found["reserved"]]
        return found


def facts(job: Job) -> Job:
    return replace(job, claim="")


def outcome_of(word: str, clock: Clock) -> Any:
    return {
        "done": DONE,
        "kept": KEPT,
        "expired": EXPIRED,
        "dead": Dead("no"),
        "later": Later("x", clock.now + 3),
        "later uncounted": Later("x", clock.now + 3, counted=False),
        "back": Later(counted=False),
    }[word]


def act(side: Side, step: Sequence[Any], keys: list[str], new: list[str], clock: Clock) -> Any:
    """Do one step; what a user would see of it."""
    queue: Backend = side.queue
    match step:
        case ("put", fields):
            return queue.put([side.put_of(new[0], clock, fields)])
        case ("reserve", n, only):
            jobs = queue.reserve(n, only=only)
            side.taken += jobs
            return [facts(job) for job in jobs]
        case ("settle", number, word, fields) if side.taken:
            job = side.taken[number % len(side.taken)]
            puts = [side.put_of(key, clock, f) for key, f in zip(new, fields, strict=False)]
            try:
                return queue.settle(job, outcome_of(word, clock), puts)
            except LeaseLost:
                return "lost"
        case ("claim", number) if keys:
            job = queue.claim(keys[number % len(keys)])
            side.taken += [] if job is None else [job]
            return None if job is None else facts(job)
        case ("kick" | "remove", number) if keys:
            return getattr(queue, step[0])(keys[number % len(keys)])
        case ("purge", state):
            return queue.purge(state)
        case ("forgive" | "close" | "pause" | "resume",):
            getattr(queue, step[0])()
        case ("die",):
            side.queue.forget()
            queue.release_stale()
    return None


@settings(max_examples=60)
@given(st.lists(steps, min_size=5, max_size=40))
@example([("put", {}), ("put", {}), ("reserve", 1, None), ("close",), ("reserve", 1, None)])
@example([("put", {}), ("reserve", 1, None), ("die",), ("reserve", 1, None), ("forgive",), ("close",)])
@example([("put", {"outcome": "later"}), ("claim", 0), ("settle", 0, "kept", [])])
def test_the_maildir_does_what_the_queue_in_memory_does(sequence: list[tuple[Any, ...]]) -> None:
    folder = tempfile.mkdtemp(prefix="lamsonq-model-")
    clock = Clock()
    disk, memory = Side(Maildir(f"{folder}/posts", now=clock)), Side(Memory(f"memory:{folder}", now=clock))
    keys: list[str] = []
    claimed = False  # memory does not remember where a tool took a job from
    died = False  # and does not keep jobs apart whose worker has died
    try:
        for step in sequence:
            new = [disk.queue.new_key() for _ in range(2)]
            if step[0] == "pass":
                clock.now += step[1]
            claimed, died = claimed or step[0] == "claim", died or step[0] == "die"
            if claimed and step[0] in ("die", "close", "forgive"):
                continue
            if died and step[0] == "reserve":
                if memory.queue.counts()["reserved"]:
                    continue
                step = ("reserve", 1, step[2])
            told = [act(side, step, keys, new, clock) for side in (disk, memory)]
            assert told[0] == told[1], step
            keys += new
            assert disk.seen() == memory.seen(), step
            assert disk.queue.counts() == memory.queue.counts()
    finally:
        disk.queue.close()
        shutil.rmtree(folder)
