"""move: everything that waits in a queue, into another one, over any backends, while both are at work.

Rules:

1. No crash loses a message. What is ready or delayed is claimed, so that nobody works it meanwhile, and settled
   together with its put into the other queue, or after it. What is dead or done, which nobody works, is put there and
   then removed here: a claim might make it ready if the mover were killed.
2. The key stays, and a key is put once: a move that was interrupted is simply begun again, and mends what is in both.
   What a mover that was killed had claimed is as it was before, and what it had settled arrives, before anything else.
3. State, due moment, attempts, report, priority, unique and metadata stay. A message whose like (`unique`) waits in the
   other queue stays where it is.
4. What is being worked is left to who works it, and what cannot be read stays where it is.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lamsonq.commands.options import argument, declare, json_option, option
from lamsonq.commands.queues.opened import existing, made
from lamsonq.commands.queues.printed import print_json, print_line
from lamsonq.errors import LeaseLost, QueueError, Refusal

if TYPE_CHECKING:
    from lamsonq.jobs import Backend, Job, Put

MOVED = ("ready", "delayed", "dead", "done")
ROUNDS = 10
"""How often the queue is looked at: producers may be quicker than a mover."""

BATCH = 64
"""How many are claimed together."""

THREADS = 8
"""How many are handed over at the same time, so that they share syncs."""


@declare()
@argument("source", metavar="FROM")
@argument("target", metavar="TO")
@option("state", "Only what is in this state.", type=click.Choice(MOVED), metavar="STATE")
@json_option
def move(source: str | None, target: str | None, state: str | None, as_json: bool) -> None:
    """Move all messages into another queue, which is made when it is not there. Both may be at work meanwhile.

    Loses none when it is killed: begin it again.
    """
    store = existing(source, "the queue to move from").backend
    into = made(target, "the queue to move to").backend
    if into is store or os.path.realpath(store.name) == os.path.realpath(into.name):
        raise Refusal(f"{source} and {target} are the same queue")
    mover = _Mover(store, into, [state] if state else list(MOVED))
    mover.run()
    counts = store.counts()
    left = {each: counts[each] for each in ("reserved", *mover.states) if counts[each]}
    if as_json:
        moved = {each: mover.moved[each] for each in mover.states}
        print_json(
            {"from": store.name, "to": into.name, "moved": moved, "kept_out": list(mover.kept_out), "left": left}
        )
        return
    told = ", ".join(f"{mover.moved[each]} {each}" for each in mover.states)
    print_line(f"moved {told} from {store.name} to {into.name}")
    if mover.kept_out:
        click.echo(f"{len(mover.kept_out)} stay: a message with the same `unique` waits in {into.name}", err=True)
    if left:
        click.echo(f"left in {store.name}: {', '.join(f'{n} {each}' for each, n in left.items())}", err=True)


class _Mover:
    """Moves from `store` into `into`; `moved` counts what was, by its state, `kept_out` are the keys that stay."""

    def __init__(self, store: Backend, into: Backend, states: list[str]) -> None:
        self.store = store
        self.into = into
        self.states = states
        # A maildir looks through its folders at each put of keys that are not its own: many should share that look.
        self.together = "files" in into.capabilities and "files" not in store.capabilities
        self.moved: Counter[str] = Counter()
        self.kept_out: dict[str, None] = {}

    def run(self) -> None:
        """Move until a look finds nothing more to move."""
        self.store.release_stale()
        self.into.release_stale()
        for _ in range(ROUNDS):
            counts, before = self.store.counts(), self.moved.total()
            with _progress(sum(counts[state] for state in self.states)) as advance:
                if "ready" in self.states:
                    self._move_ready(counts["ready"], advance)
                for state in self.states:
                    self._move_listed(state, advance)
            if self.moved.total() == before:
                return

    def _move_ready(self, count: int, advance: Advance) -> None:
        """So many of the ready ones, as a worker takes them: the quickest way. From a paused queue it takes none."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(THREADS, thread_name_prefix="lamsonq-move") as pool:
            while count > 0:
                jobs = self.store.reserve(min(count, BATCH))
                self.store.forgive()  # it counts no delivery that a mover is killed
                moved = sum(self._hand_over_together(jobs) if self.together else pool.map(self._hand_over, jobs))
                self.moved["ready"] += moved
                advance(moved)
                count -= len(jobs)
                if not moved:
                    return

    def _move_listed(self, state: str, advance: Advance) -> None:
        """What is in this state now."""
        keys = [key for key in self.store.keys(state) if key not in self.kept_out]
        if state in ("dead", "done"):
            for start in range(0, len(keys), BATCH):
                moved = self._move_kept(state, keys[start : start + BATCH])
                self.moved[state] += moved
                advance(moved)
            return
        for key in keys:
            if self.store.state(key) == state and self._move_waiting(key):
                self.moved[state] += 1
                advance(1)

    def _move_waiting(self, key: str) -> bool:
        job = self.store.claim(key)
        return job is not None and self._hand_over(job)

    def _hand_over(self, job: Job) -> bool:
        """Settle a claimed job by putting it into the other queue; False when it stays."""
        from lamsonq.jobs import DONE

        if job.unique is not None:
            return self._hand_over_together([job])[0]
        try:
            self.store.settle(job, DONE, [self._put_of(job)])
        except LeaseLost:
            return False
        except QueueError:
            self._give_back(job)
            raise
        return True

    def _hand_over_together(self, jobs: list[Job]) -> list[bool]:
        """Put claimed jobs first, and settle those that were kept: a put that is let go must not settle its job."""
        try:
            kept = self.into.put([self._put_of(job) for job in jobs])
        except QueueError:
            for job in jobs:
                self._give_back(job)
            raise
        return [self._settle(job, done) for job, done in zip(jobs, kept, strict=True)]

    def _settle(self, job: Job, kept: bool) -> bool:
        from lamsonq.jobs import DONE

        if not kept:
            self.kept_out[job.key] = None
            self._give_back(job)
            return False
        with suppress(LeaseLost):
            self.store.settle(job, DONE)
        return True

    def _put_of(self, job: Job) -> Put:
        from lamsonq.jobs import Put

        return Put(self.into, replace(job, claim=""), report=self.store.report(job.key))

    def _give_back(self, job: Job) -> None:
        from lamsonq.errors import Later

        with suppress(LeaseLost):
            self.store.settle(job, Later(at=job.due, counted=False))

    def _move_kept(self, state: str, keys: list[str]) -> int:
        """Some that are dead or done, which nobody works; how many have moved."""
        from lamsonq.errors import Dead
        from lamsonq.jobs import KEPT, Damaged, Put

        # A Dead that says nothing adds nothing to the report that comes along.
        outcome = Dead() if state == "dead" else KEPT
        looks = ((key, self.store.get(key)) for key in keys)  # what cannot be read whole stays
        found = [(job, self.store.report(key)) for key, job in looks if job and not isinstance(job, Damaged)]
        still = set(self.store.keys(state))  # one look for all of them: somebody may have made one ready
        puts = [
            Put(self.into, replace(job, due=None), outcome, report=report) for job, report in found if job.key in still
        ]
        moved = 0
        for put, kept in zip(puts, self.into.put(puts), strict=True):
            if kept:
                moved += self.store.remove(put.job.key)
            else:
                self.kept_out[put.job.key] = None
        return moved


Advance = Callable[[int], None]


@contextmanager
def _progress(length: int) -> Iterator[Advance]:
    """On a terminal a bar shows how far it is, on stderr."""
    if not sys.stderr.isatty() or not length:
        yield lambda _: None
        return
    with click.progressbar(length=length, file=sys.stderr) as bar:
        yield bar.update
