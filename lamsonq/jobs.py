"""What waits in a queue, and what may become of it.

A job is a record around untouched bytes. Its life:

        put ----> ready ----- reserve ----> reserved ---- settle(Done) ----> gone
                    ^                          |
                    |                          +--------- settle(Later) ---> delayed
                    +------- when due ---------|-----------------------------   |
                    ^                          +--------- settle(Dead) ----> dead
                    +------- the worker died --+

Rules, which every backend keeps:

1. `put` returns when the job would survive a power failure, or raises.
2. `reserve` counts the delivery before the handler runs, so a job that kills its worker is found out.
3. `settle` is the one commit point: the outcome, and the `puts` that came of the attempt, become valid together or
   not at all. Whoever has lost the claim gets `LeaseLost` and has changed nothing.
4. The body is never rewritten. What must be known about it travels in the record, never inside the message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lamsonq.errors import Dead, Later

DELIVERIES_MAX = 3
"""How often a job may take its worker down with it before it is a dead letter."""

GIVE_UP_AFTER = 5 * 24 * 3600.0
"""Seconds after which a job that keeps saying *later* is a dead letter (RFC 5321 section 4.5.4.1: 4-5 days)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One message, or one call of a function on it, that waits to be worked.

    `sender` is the envelope's reverse-path: "" for the null sender, None where nobody recorded one (a file that
    another program put into a maildir). `recipients` are the envelope's, () where nobody recorded them. `target`
    None means route by address, a dotted name means run exactly that function. `received` and `due` are seconds
    since the epoch. `deliveries` counts earlier claims that were never settled, `attempts` counts failures. `claim`
    is the backend's own mark of this reservation.
    """

    key: str
    body: bytes
    sender: str | None = None
    recipients: tuple[str, ...] = ()
    peer: str | None = None
    target: str | None = None
    received: float = 0.0
    due: float | None = None
    deliveries: int = 0
    attempts: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    claim: str = ""


class Done:
    """The attempt succeeded: the job is gone."""


DONE = Done()

Outcome = Done | Later | Dead


@dataclass(frozen=True, slots=True)
class Put:
    """A job on its way into a store: ready, or (with an outcome) straight to the delayed or the dead.

    A `Later` outcome without `at` waits as long as the job's `attempts` say. The outcome's report is kept beside it.
    """

    store: Backend
    job: Job
    outcome: Later | Dead | None = None


class Backend(Protocol):
    """Where jobs are kept. One object per queue and process; all methods may be called from any thread,
    except that one thread at a time reserves."""

    name: str
    """The queue as its user wrote it: `run/posts`."""

    def new_key(self) -> str:
        """A key that no other process, thread or machine makes."""

    def put(self, puts: Sequence[Put]) -> None:
        """Keep these jobs (each `store` is this backend). Durable on return; on an exception none is kept."""

    def reserve(self, n: int, wait: float = 0.0, *, bound: bool = False) -> list[Job]:
        """Claim up to n ready jobs, oldest first; when none is ready, wait up to `wait` seconds or until `wake`.

        `bound=True` takes only jobs that have a target. Comes back early, perhaps with nothing.
        """

    def wake(self) -> None:
        """Make a waiting `reserve` return; from any thread, also before it waits."""

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> None:
        """Finish this reservation and publish what came of it, as one. Raises LeaseLost."""

    def release_stale(self) -> int:
        """Give back the claims of dead workers (`reserve` does this as well); how many were found."""

    def keys(self, state: str = "ready") -> list[str]:
        """The keys in one state, oldest first: ready, delayed, reserved or dead."""

    def get(self, key: str) -> Job | None:
        """A job in any state, without claiming it."""

    def report(self, key: str) -> str:
        """The reasons and tracebacks that were kept beside a job, oldest first; "" when there are none."""

    def remove(self, key: str) -> bool:
        """Delete a job that is ready, delayed or dead; False when there is none."""

    def kick(self, key: str) -> bool:
        """Make a delayed or dead job ready, its counts at zero; False when there is none."""

    def counts(self) -> dict[str, int]:
        """How many jobs are ready, delayed, reserved and dead."""

    def close(self) -> None:
        """Give up this process's claims and watches. Idempotent."""


def derived_key(key: str, number: int) -> str:
    """A key beside its parent's in the order of the queue, that only this parent can make."""
    derived, found = re.subn(r"^(\d+\.M\d+P\d+Q\d+(?:R\d+)*)", rf"\1R{_in_order(number)}", key, count=1)
    return derived if found else f"{key}.R{_in_order(number)}"


def _in_order(number: int) -> str:
    """The number in digits that sort as texts do, because keys are sorted so: 8, 9009, 9010, 9099, 990100."""
    if number < 9:
        return str(number)
    digits = f"{number:02d}"
    return f"{'9' * (len(digits) - 1)}0{digits}"
