"""Jobs in memory: the queue for tests, and for what may be forgotten when the process ends.

`memory:posts` is one queue in one process, whoever opens it. All rules of lamsonq.jobs hold, but for durability: so it
behaves in a test as the others do in earnest. A boot that works it with several processes is refused.
"""

from __future__ import annotations

import heapq
import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from lamsonq import clock
from lamsonq.errors import Dead, Later, LeaseLost, QueueError, SettingsError
from lamsonq.jobs import (
    DELIVERIES_MAX,
    STATES,
    Done,
    Expired,
    Job,
    Limit,
    Outcome,
    Put,
    check_state,
    due_after,
    finish_each,
    killed,
)
from lamsonq.keys import new_key
from lamsonq.reports import entry_of


def open_queue(url: str, *, pop_limit: int = 0, oversize_dir: str | None = None) -> Memory:
    """The backend that `memory:NAME` names."""
    return Memory(url, pop_limit=pop_limit, oversize_dir=oversize_dir)


@dataclass(slots=True)
class _Kept:
    """A job where it is: `worker` has claimed it, `since` is when it came into its state, `before` are the deliveries
    before the claim, `origin` is the state from which a tool has claimed it."""

    job: Job
    state: str
    since: float
    worker: str = ""
    report: str = ""
    origin: str = ""
    before: int = 0


class _Store:
    """The jobs of one name. Whoever holds `changed` may change them."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.jobs: dict[str, _Kept] = {}
        self.ready: list[tuple[int, str]] = []
        self.delayed: list[tuple[float, str]] = []
        self.unique: dict[str, str] = {}
        self.gates: dict[str, tuple[float, float]] = {}
        self.dead_workers: set[str] = set()
        self.claims = itertools.count(1)
        self.paused = False


_stores: dict[str, _Store] = {}
_stores_lock = threading.Lock()


def _store_of(name: str) -> _Store:
    with _stores_lock:
        return _stores.setdefault(name, _Store())


class Memory:
    """A queue in memory; see lamsonq.jobs.Backend. `now` tells seconds since the epoch."""

    capabilities: frozenset[str] = frozenset()

    def __init__(
        self,
        name: str,
        *,
        pop_limit: int = 0,
        oversize_dir: str | None = None,
        now: Callable[[], float] = clock.now,
    ) -> None:
        if pop_limit or oversize_dir:
            raise SettingsError(f"{name}: size_limit and oversize_dir are for queues that are a maildir")
        self.name = name
        self._now = now
        self._store = _store_of(name)
        self._begin()

    def _begin(self) -> None:
        self._worker = f"{os.getpid()}.{secrets.token_hex(4)}"
        self._woken = False
        self._only: Collection[str] | None = None  # what the last `reserve` asked for

    def new_key(self) -> str:
        return new_key()

    # -- putting -----------------------------------------------------------------------------------------------

    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        if conn is not None:
            raise QueueError(f"{self.name} is no database: push(..., conn=...) is for sqlite: queues")
        with self._store.changed:
            return [self._put(put) for put in puts]

    def _put(self, put: Put) -> bool:
        store, now, job = self._store, self._now(), put.job
        if job.key in store.jobs:
            return True
        ended = isinstance(put.outcome, Dead | Done)
        if job.unique is not None and not ended and job.unique in store.unique:
            return False
        due = job.due
        if put.gate is not None:
            last, _ = store.gates.get(put.gate.key, (None, 0.0))
            passage = put.gate.passage(last, now)
            if passage is None:
                return False
            store.gates[put.gate.key] = passage.last, passage.last + put.gate.memory
            due = passage.due
        report = put.report
        if isinstance(put.outcome, Later | Dead):
            report += entry_of(put.outcome, max(job.attempts, 1), now)
        if isinstance(put.outcome, Later):
            due = due_after(put.outcome, job.attempts, now) if put.outcome.at is not None or job.attempts else due
        state = "dead" if isinstance(put.outcome, Dead) else "done" if isinstance(put.outcome, Done) else "ready"
        if state == "ready" and due is not None and due > now:
            state = "delayed"
        due = due if state == "delayed" else None
        kept = _Kept(replace(job, due=due, received=job.received or now, deliveries=0, claim=""), state, now)
        kept.report = report
        store.jobs[job.key] = kept
        if job.unique is not None and state in ("ready", "delayed"):
            store.unique[job.unique] = job.key
        self._line_up(kept)
        return True

    def _move(self, kept: _Kept, state: str, **changes: object) -> None:
        kept.job = replace(kept.job, claim="", **changes)  # type: ignore[arg-type]  # the names of a Job's fields
        kept.state, kept.since, kept.worker, kept.origin = state, self._now(), "", ""
        if state in ("dead", "done"):
            self._free_unique(kept.job)
        self._line_up(kept)

    def _line_up(self, kept: _Kept) -> None:
        if kept.state == "ready":
            heapq.heappush(self._store.ready, (kept.job.priority, kept.job.key))
        elif kept.state == "delayed":
            heapq.heappush(self._store.delayed, (kept.job.due or 0.0, kept.job.key))
        self._store.changed.notify_all()

    def _delete(self, key: str) -> None:
        self._free_unique(self._store.jobs.pop(key).job)

    def _free_unique(self, job: Job) -> None:
        if job.unique is not None and self._store.unique.get(job.unique) == job.key:
            del self._store.unique[job.unique]

    # -- reserving ---------------------------------------------------------------------------------------------

    def reserve(self, n: int, wait: float = 0.0, *, only: Collection[str] | None = None) -> list[Job]:
        until = time.monotonic() + wait
        self._only = only
        with self._store.changed:
            while True:
                jobs = self._take(n, only)
                left = until - time.monotonic()
                if jobs or left <= 0 or self._sleep(left):
                    return jobs

    def wait(self, seconds: float) -> None:
        with self._store.changed:
            self._promote()
            if self._store.paused or not any(self._is_wanted(key) for _, key in self._store.ready):
                self._sleep(seconds)

    def _is_wanted(self, key: str) -> bool:
        return self._is(key, "ready") and (self._only is None or self._store.jobs[key].job.target in self._only)

    def _sleep(self, seconds: float) -> bool:
        """Wait for a change; whether it was `wake` that ended it."""
        if not self._woken:
            if self._store.delayed:
                seconds = min(seconds, max(0.0, self._store.delayed[0][0] - self._now()))
            self._store.changed.wait(seconds)
        woken, self._woken = self._woken, False
        return woken

    def wake(self) -> None:
        with self._store.changed:
            self._woken = True
            self._store.changed.notify_all()

    def _take(self, n: int, only: Collection[str] | None) -> list[Job]:
        self.release_stale()
        self._promote()
        store = self._store
        jobs: list[Job] = []
        passed_over: list[tuple[int, str]] = []
        while store.ready and len(jobs) < n and not store.paused:
            entry = heapq.heappop(store.ready)
            kept = store.jobs.get(entry[1])
            if kept is None or kept.state != "ready" or entry[0] != kept.job.priority:
                continue
            if only is not None and kept.job.target not in only:
                passed_over.append(entry)
                continue
            jobs.append(self._claim(kept))
        for entry in passed_over:
            heapq.heappush(store.ready, entry)
        return jobs

    def _promote(self) -> None:
        store, now = self._store, self._now()
        while store.delayed and store.delayed[0][0] <= now:
            _, key = heapq.heappop(store.delayed)
            if self._is(key, "delayed") and (store.jobs[key].job.due or 0.0) <= now:
                self._move(store.jobs[key], "ready", due=None)

    def _is(self, key: str, state: str) -> bool:
        kept = self._store.jobs.get(key)
        return kept is not None and kept.state == state

    def _claim(self, kept: _Kept, *, counted: bool = True) -> Job:
        """The job as its worker sees it: with the deliveries that it had before this one."""
        claim = f"{self._worker}/{next(self._store.claims)}"
        seen = replace(kept.job, claim=claim)
        kept.job = replace(seen, deliveries=seen.deliveries + counted)
        kept.origin, kept.before = "" if counted else kept.state, seen.deliveries
        kept.state, kept.since, kept.worker = "reserved", self._now(), self._worker
        return seen

    def claim(self, key: str) -> Job | None:
        with self._store.changed:
            kept = self._store.jobs.get(key)
            return None if kept is None or kept.state == "reserved" else self._claim(kept, counted=False)

    # -- settling ----------------------------------------------------------------------------------------------

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        with self._store.changed:
            kept = self._held(job)
            results = self._publish_elsewhere(puts)
            now = self._now()
            if isinstance(outcome, Expired) or (isinstance(outcome, Done) and not outcome.kept):
                self._delete(job.key)
            elif isinstance(outcome, Done):
                self._move(kept, "done", deliveries=0, due=None)
            elif isinstance(outcome, Later) and not outcome.counted:
                delayed = outcome.at is not None and outcome.at > now
                due = outcome.at if delayed else None
                self._move(kept, "delayed" if delayed else "ready", deliveries=job.deliveries, due=due)
            else:
                attempts = job.attempts + 1
                kept.report += entry_of(outcome, attempts, now)
                if isinstance(outcome, Dead):
                    self._move(kept, "dead", deliveries=0, attempts=attempts, due=None)
                else:
                    due = due_after(outcome, attempts, now)
                    self._move(kept, "delayed", deliveries=0, attempts=attempts, due=due)
            results.update((n, self._put(put)) for n, put in enumerate(puts) if put.store is self)
            self._store.changed.notify_all()
            return [results[number] for number in range(len(puts))]

    def _publish_elsewhere(self, puts: Sequence[Put]) -> dict[int, bool]:
        """Those for other stores come first, because they may fail; those for this one cannot."""
        results: dict[int, bool] = {}
        for store in {id(put.store): put.store for put in puts if put.store is not self}.values():
            numbers = [number for number, put in enumerate(puts) if put.store is store]
            results.update(zip(numbers, store.put([puts[number] for number in numbers]), strict=True))
        return results

    def finish(self, jobs: Sequence[Job], outcome: Done) -> list[Job]:
        """Raises QueueError, and then some of them may have been settled."""
        return finish_each(self, jobs, outcome)

    def touch(self, job: Job) -> None:
        with self._store.changed:
            self._held(job)

    def _held(self, job: Job) -> _Kept:
        kept = self._store.jobs.get(job.key)
        if kept is None or not job.claim or kept.job.claim != job.claim:
            raise LeaseLost(f"job {job.key} of {self.name} was settled or taken by somebody else")
        return kept

    # -- dead workers ------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """For tests: end as a killed process does. What it had claimed is found by whoever looks next."""
        with self._store.changed:
            self._store.dead_workers.add(self._worker)
            self._begin()
            self._store.changed.notify_all()

    def release_stale(self) -> int:
        with self._store.changed:
            dead = self._store.dead_workers
            lost = [kept for kept in self._store.jobs.values() if kept.worker in dead] if dead else []
            dead.clear()
            for kept in lost:
                if kept.origin:
                    self._move(kept, kept.origin)
                elif kept.job.deliveries >= DELIVERIES_MAX:
                    reason = Dead(killed(kept.job.deliveries))
                    kept.report += entry_of(reason, kept.job.attempts + 1, self._now())
                    self._move(kept, "dead")
                else:
                    self._move(kept, "ready")
            return len(lost)

    def forgive(self) -> None:
        with self._store.changed:
            for kept in self._ours():
                kept.job = replace(kept.job, deliveries=kept.before)

    def _ours(self) -> list[_Kept]:
        """What this worker has reserved."""
        return [kept for kept in self._store.jobs.values() if kept.worker == self._worker and not kept.origin]

    def close(self) -> None:
        with self._store.changed:
            for kept in self._ours():
                self._move(kept, "ready", deliveries=kept.before)
            for kept in [kept for kept in self._store.jobs.values() if kept.worker == self._worker]:
                self._move(kept, kept.origin)
            self._begin()

    # -- looking and mending -----------------------------------------------------------------------------------

    def keys(self, state: str = "ready") -> list[str]:
        check_state(state)
        with self._store.changed:
            self._promote()
            found = [kept.job for kept in self._store.jobs.values() if kept.state == state]
        return [job.key for job in sorted(found, key=lambda job: (job.priority, job.key))]

    def get(self, key: str) -> Job | None:
        kept = self._store.jobs.get(key)
        return None if kept is None else replace(kept.job, claim="")

    def state(self, key: str) -> str | None:
        kept = self._store.jobs.get(key)
        return None if kept is None else kept.state

    def report(self, key: str) -> str:
        kept = self._store.jobs.get(key)
        return "" if kept is None else kept.report

    def remove(self, key: str) -> bool:
        with self._store.changed:
            if key not in self._store.jobs or self._is(key, "reserved"):
                return False
            self._delete(key)
            return True

    def kick(self, key: str) -> bool:
        with self._store.changed:
            kept = self._store.jobs.get(key)
            if kept is None or kept.state not in ("delayed", "dead", "done"):
                return False
            self._move(kept, "ready", deliveries=0, attempts=0, due=None)
            return True

    def purge(self, state: str, before: float | None = None) -> int:
        with self._store.changed:
            old = [key for key in self.keys(state) if before is None or self._store.jobs[key].since < before]
            return sum(self.remove(key) for key in old)

    def pause(self) -> None:
        with self._store.changed:
            self._store.paused = True

    def resume(self) -> None:
        with self._store.changed:
            self._store.paused = False
            self._store.changed.notify_all()

    def paused(self) -> bool:
        return self._store.paused

    def counts(self) -> dict[str, int]:
        with self._store.changed:
            self._promote()
            found = [kept.state for kept in self._store.jobs.values()]
        return {state: found.count(state) for state in STATES}

    def oldest(self) -> float | None:
        with self._store.changed:
            self._promote()
            return min((k.job.received for k in self._store.jobs.values() if k.state == "ready"), default=None)

    def limit(self, limits: Sequence[Limit]) -> None:
        if limits:
            raise SettingsError(f"{self.name} cannot keep limits per key: use a sqlite: queue")
