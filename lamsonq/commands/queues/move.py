"""move: everything that waits in a queue, into another one, over any backends, while both are at work.

Rules:

1. No crash loses a message. What is ready or delayed is claimed, so that nobody works it meanwhile, and settled
   together with its put into the other queue; what is dead or done, which nobody works, is put there and then removed
   here: a claim would make it ready if the mover were killed.
2. The key stays, and a key is put once: a move that was interrupted is simply begun again.
3. State, due moment, attempts, report, priority, unique and metadata stay. A message whose like (`unique`) waits in the
   other queue stays where it is.
4. What is being worked is left to who works it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lamsonq.commands.options import argument, declare, json_option, option
from lamsonq.commands.queues.opened import existing
from lamsonq.commands.queues.printed import print_json, print_line
from lamsonq.errors import LeaseLost, QueueError, Refusal

if TYPE_CHECKING:
    from lamsonq.jobs import Backend, Job

MOVED = ("ready", "delayed", "dead", "done")
ROUNDS = 10
"""How often the queue is looked at: producers may be quicker than a mover."""


@declare()
@argument("source", metavar="FROM")
@argument("target", metavar="TO")
@option("state", "Only what is in this state.", type=click.Choice(MOVED), metavar="STATE")
@json_option
def move(source: str | None, target: str | None, state: str | None, as_json: bool) -> None:
    """Move all messages into another queue, which is made when it is not there. Both may be at work meanwhile.

    Loses none when it is killed: begin it again.
    """
    from lamsonq.queue import Queue

    store = existing(source, "the queue to move from").backend
    if not target:
        raise click.UsageError("Give the queue to move to.", click.get_current_context())
    into = Queue(target).backend
    if into is store or os.path.realpath(store.name) == os.path.realpath(into.name):
        raise Refusal(f"{source} and {target} are the same queue")
    mover = _Mover(store, into, [state] if state else list(MOVED))
    mover.run()
    counts = store.counts()
    left = {each: counts[each] for each in ("reserved", *mover.states) if counts[each]}
    if as_json:
        moved = {each: mover.moved[each] for each in mover.states}
        print_json({"from": store.name, "to": into.name, "moved": moved, "kept_out": mover.kept_out, "left": left})
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
        self.moved: Counter[str] = Counter()
        self.kept_out: list[str] = []

    def run(self) -> None:
        """Move until a look finds nothing more to move."""
        for _ in range(ROUNDS):
            keys = [(state, key) for state in self.states for key in self.store.keys(state) if key not in self.kept_out]
            before = self.moved.total()
            for state, key in _with_progress(keys):
                if self._move(state, key):
                    self.moved[state] += 1
            if self.moved.total() == before:
                return

    def _move(self, state: str, key: str) -> bool:
        return self._waiting(state, key) if state in ("ready", "delayed") else self._kept(state, key)

    def _waiting(self, state: str, key: str) -> bool:
        """One that somebody may want to work: rule 1."""
        from lamsonq.jobs import DONE, Put

        if self.store.state(key) != state:
            return False  # taken since we looked
        before = self.store.get(key)
        job = self.store.claim(key)
        if job is None or before is None:
            return False
        due = job.due or before.due
        put = Put(self.into, replace(job, due=due, claim=""), report=self.store.report(key))
        try:
            if job.unique is not None:
                # A put that is let go must not settle its job, so that is found out first.
                if not self.into.put([put])[0]:
                    self._give_back(job, due)
                    self.kept_out.append(key)
                    return False
                self.store.settle(job, DONE)
            else:
                self.store.settle(job, DONE, [put])
        except LeaseLost:
            return False
        except QueueError:
            self._give_back(job, due)
            raise
        return True

    def _give_back(self, job: Job, due: float | None) -> None:
        from lamsonq.errors import Later

        self.store.settle(job, Later(at=due, counted=False))

    def _kept(self, state: str, key: str) -> bool:
        """One that nobody works."""
        from lamsonq.errors import Dead
        from lamsonq.jobs import KEPT, Put

        job = self.store.get(key)
        if job is None or self.store.state(key) != state:
            return False
        # A Dead that says nothing adds nothing to the report that comes along.
        outcome = Dead() if state == "dead" else KEPT
        if not self.into.put([Put(self.into, replace(job, due=None), outcome, report=self.store.report(key))])[0]:
            self.kept_out.append(key)
            return False
        return self.store.remove(key)


def _with_progress(keys: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """On a terminal a bar shows how far it is, on stderr."""
    if not sys.stderr.isatty():
        yield from keys
        return
    with click.progressbar(keys, file=sys.stderr) as bar:
        yield from bar
