"""Any order of puts, claims, settles, crashes and jumps of the clock: a job has one owner at a time, and none is lost.

The backends are compared with a model that is a dictionary. Where a backend may choose (which suspect runs next, when a
delayed job is noticed to be due) the model says only what must hold.
"""

from __future__ import annotations

import importlib
import itertools
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamsonq.conformance import Clock
from lamsonq.errors import Dead, Later, LeaseLost
from lamsonq.jobs import DELIVERIES_MAX, DONE, EXPIRED, KEPT, Backend, Job, Put

LIVE = ("ready", "delayed", "reserved")
_numbers = itertools.count(1)


@dataclass
class Kept:
    """What the model knows of a job. `waits`: ready or delayed; `owner` is the number of a worker."""

    body: bytes
    state: str
    due: float = 0.0
    priority: int = 0
    unique: str | None = None
    owner: int | None = None
    deliveries: int = 0
    attempts: int = 0


@dataclass
class Claim:
    """A job that some worker has, or had."""

    worker: int
    job: Job
    holds: bool = field(default=True)


OUTCOMES = st.sampled_from(["done", "kept", "expired", "dead", "later", "soon", "back", "back later"])


class Model(RuleBasedStateMachine):
    """Derive from it with the class of a backend, and how its queues are named."""

    module: ClassVar[str]
    kind: ClassVar[str]
    name: ClassVar[str]
    suspects_alone: ClassVar[bool] = True
    """Whether a worker runs no two jobs at once whose worker died."""

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.latest = self.clock.now
        self.folder = tempfile.mkdtemp(prefix="lamsonq-model-")
        self.opener: Any = getattr(importlib.import_module(self.module), self.kind)
        self.url = self.name.format(folder=self.folder, number=next(_numbers))
        self.jobs: dict[str, Kept] = {}
        self.claims: list[Claim] = []
        self.workers: list[Backend] = [self.opened() for _ in range(3)]

    def opened(self) -> Backend:
        queue: Backend = self.opener(self.url, now=self.clock)
        return queue

    def teardown(self) -> None:
        """A fresh worker finds all that was put and not ended."""
        if not hasattr(self, "folder"):
            return
        for number in range(3):
            self.close(number)
        self.clock.now = self.latest = self.latest + 10_000_000
        last = self.opened()
        while jobs := last.reserve(5):
            for job in jobs:
                kept = self.jobs[job.key]
                assert kept.state in ("ready", "delayed"), (job, kept)
                assert job.body == kept.body
                last.settle(job, DONE)
                del self.jobs[job.key]
        left = {(key, kept.state) for key, kept in self.jobs.items()}
        assert left == {(key, state) for state in ("ready", "delayed", "dead", "done") for key in last.keys(state)}
        assert all(state in ("dead", "done") for _, state in left), left
        last.close()
        shutil.rmtree(self.folder)

    # -- what may happen ---------------------------------------------------------------------------------------

    def may_be_put(self, unique: str | None) -> bool:
        return unique is None or not any(k.unique == unique and k.state in LIVE for k in self.jobs.values())

    def new(self, put: Put, kept: bool) -> None:
        job = put.job
        assert kept == (isinstance(put.outcome, Dead) or self.may_be_put(job.unique))
        if kept:
            state = "dead" if isinstance(put.outcome, Dead) else "delayed" if job.due else "ready"
            self.jobs[job.key] = Kept(job.body, state, job.due or 0.0, job.priority, job.unique)

    @rule(
        worker=st.integers(0, 2),
        delay=st.sampled_from([None, None, -5, 5, 100]),
        priority=st.sampled_from([0, 0, 3]),
        unique=st.sampled_from([None, None, "u", "v"]),
        size=st.sampled_from([0, 10, 140_000]),
        dead=st.sampled_from([False, False, False, True]),
    )
    def put(self, worker: int, delay: int | None, priority: int, unique: str | None, size: int, dead: bool) -> None:
        queue = self.workers[worker]
        due = None if delay is None else self.clock.now + delay
        key = queue.new_key()
        job = Job(key=key, body=key.encode() + b"." * size, due=due, priority=priority, unique=unique)
        put = Put(queue, job, Dead("no") if dead else None)
        [kept] = queue.put([put])
        self.new(put, kept)

    @rule(worker=st.integers(0, 2), n=st.integers(1, 4))
    def reserve(self, worker: int, n: int) -> None:
        queue = self.workers[worker]
        jobs = queue.reserve(n)
        assert len(jobs) <= n
        assert [(job.priority, job.key) for job in jobs] == sorted((job.priority, job.key) for job in jobs)
        for job in jobs:
            kept = self.jobs[job.key]
            assert kept.state in ("ready", "delayed"), f"{job.key} is {kept.state}"
            assert kept.due <= self.latest
            assert (job.body, job.deliveries, job.attempts) == (kept.body, kept.deliveries, kept.attempts)
            kept.state, kept.owner, kept.deliveries = "reserved", worker, kept.deliveries + 1
            self.claims.append(Claim(worker, job))
        suspects = [kept for kept in self.jobs.values() if kept.state == "reserved" and kept.deliveries > 1]
        assert len([kept for kept in suspects if kept.owner == worker]) <= 1 or not self.suspects_alone
        fresh = [k for k in self.jobs.values() if k.state in ("ready", "delayed") and k.due <= self.clock.now]
        if len(jobs) < n and not any(kept.deliveries for kept in self.jobs.values()):
            assert fresh == [], "something ready was left"

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        lost = False
        try:
            self.workers[claim.worker].touch(claim.job)
        except LeaseLost:
            lost = True
        assert lost != claim.holds

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), how=OUTCOMES, children=st.integers(0, 2), unique=st.sampled_from([None, "w"]))
    def settle(self, data: st.DataObject, how: str, children: int, unique: str | None) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        queue, job, kept = self.workers[claim.worker], claim.job, self.jobs.get(claim.job.key)
        now = self.clock.now
        outcome: Any = {
            "done": DONE,
            "kept": KEPT,
            "expired": EXPIRED,
            "dead": Dead("x"),
            "later": Later("x", now + 50),
            "soon": Later("x", now - 1),
            "back": Later(counted=False),
            "back later": Later(counted=False, at=now + 20),
        }[how]
        unique = None if job.unique == unique else unique  # whether one may follow itself is not said
        keys = [queue.new_key() for _ in range(children)]
        puts = [Put(queue, Job(key=key, body=key.encode(), unique=unique)) for key in keys]
        try:
            results = queue.settle(job, outcome, puts)
        except LeaseLost:
            assert not claim.holds
            return
        assert claim.holds
        assert kept is not None
        claim.holds = False
        for put, result in zip(puts, results, strict=True):
            self.new(put, result)
        kept.owner = None
        if how in ("done", "expired"):
            del self.jobs[job.key]
            return
        kept.state = {"kept": "done", "dead": "dead", "back": "ready"}.get(how, "delayed")
        kept.due = {"later": now + 50, "soon": now - 1, "back later": now + 20}.get(how, 0.0)
        kept.deliveries = job.deliveries if how.startswith("back") else 0
        kept.attempts = job.attempts + (how in ("dead", "later", "soon"))

    @rule(worker=st.integers(0, 2), by=st.integers(0, 2))
    def crash(self, worker: int, by: int) -> None:
        lost = self.lose(worker)
        dying: Any = self.workers[worker]
        dying.forget()
        assert self.workers[by].release_stale() == len(lost)
        for kept in lost:
            kept.state = "dead" if kept.deliveries >= DELIVERIES_MAX else "ready"

    @rule(worker=st.integers(0, 2))
    def close(self, worker: int) -> None:
        for kept in self.lose(worker):
            kept.state, kept.deliveries = "ready", max(kept.deliveries - 1, 0)
        self.workers[worker].close()

    def lose(self, worker: int) -> list[Kept]:
        lost = [kept for kept in self.jobs.values() if kept.state == "reserved" and kept.owner == worker]
        for kept in lost:
            kept.owner, kept.due = None, 0.0
        for claim in self.claims:
            claim.holds = claim.holds and claim.worker != worker
        return lost

    @rule(seconds=st.sampled_from([1, 7, 60, 86_400, -1, -3600]))
    def jump(self, seconds: float) -> None:
        self.clock.now += seconds
        self.latest = max(self.latest, self.clock.now)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), worker=st.integers(0, 2))
    def remove(self, data: st.DataObject, worker: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.jobs)))
        removed = self.workers[worker].remove(key)
        assert removed == (self.jobs[key].state != "reserved")
        if removed:
            del self.jobs[key]

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), worker=st.integers(0, 2))
    def kick(self, data: st.DataObject, worker: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.jobs)))
        kept = self.jobs[key]
        if kept.state in ("dead", "done") and kept.unique:
            return  # whether it is unique again is not said
        kicked = self.workers[worker].kick(key)
        if kept.state in ("dead", "done") or (kept.state == "delayed" and kept.due > self.latest):
            assert kicked
        if kept.state in ("ready", "reserved") and not kept.due:
            assert not kicked
        if kicked:
            kept.state, kept.due, kept.deliveries, kept.attempts = "ready", 0.0, 0, 0

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def every_job_is_in_its_state(self) -> None:
        if not hasattr(self, "jobs"):
            return
        counts = self.workers[0].counts()
        states = [kept.state for kept in self.jobs.values()]
        assert counts["ready"] + counts["delayed"] == states.count("ready") + states.count("delayed")
        for state in ("reserved", "dead", "done"):
            assert counts[state] == states.count(state)


class MemoryModel(Model):
    module, kind, name = "lamsonq.backends.memory", "Memory", "memory:model-{number}"
    suspects_alone = False


class MaildirModel(Model):
    module, kind, name = "lamsonq.backends.maildir", "Maildir", "{folder}/posts"


class SQLiteModel(Model):
    module, kind, name = "lamsonq.backends.sqlite", "SQLite", "sqlite:{folder}/q.db?queue=posts"


SETTINGS = settings(max_examples=40, stateful_step_count=30)


@pytest.mark.parametrize("model", [MemoryModel, MaildirModel, SQLiteModel])
def test_in_any_order_of_events_a_job_has_one_owner_and_none_is_lost(model: type[Model]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    try:
        importlib.import_module(model.module)
    except ImportError as error:
        pytest.skip(str(error))
    run_state_machine_as_test(model, settings=SETTINGS)
