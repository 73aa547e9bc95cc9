"""What waits in a queue, and what may become of it.

A job is a record around untouched bytes. Its life:

        put ----> ready ----- reserve ----> reserved ---- settle(Done) -----> gone, or done where an archive is kept
         |          ^                          |
         |          |                          +--------- settle(Expired) --> gone
         |          |                          +--------- settle(Later) ----> delayed
         |          +------- when due ---------|-----------------------------   |
         |          ^                          +--------- settle(Dead) -----> dead
         |          +------- the worker died --+
         +--> not kept: another such job waits (unique), or its gate is shut (debounce, cron)

Rules, which every backend keeps:

1. `put` returns when the job would survive a power failure, or raises. A key that is there already is put once.
2. `reserve` counts the delivery before the handler runs, so a job that kills its worker is found out.
3. `settle` is the one commit point: the outcome, and the `puts` that came of the attempt, become valid together or
   not at all. Whoever has lost the claim gets `LeaseLost` and has changed nothing.
4. The body is never rewritten. What must be known about it travels in the record, never inside the message.
5. What is decided at a put (unique, gate) is decided in the step that keeps the job, so that of many producers one
   wins; a crash in between can repeat a job but not lose one, and never repeats a tick.
6. Ready jobs come by priority (0 first), then in the order of their keys.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lamsonq.clock import CORRECTION
from lamsonq.errors import Dead, Later, LeaseLost
from lamsonq.keys import derived_key

DELIVERIES_MAX = 3
"""How often a job may take its worker down with it before it is a dead letter."""

PRIORITY_MAX = 2**32 - 1
"""The number of the least urgent; 0 is the most urgent."""

STATES = ("ready", "delayed", "reserved", "dead", "done")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One message, or one call of a function, that waits to be worked.

    `sender` is the envelope's reverse-path: "" for the null sender, None where nobody recorded one (a file that
    another program put into a maildir). `recipients` are the envelope's, () where nobody recorded them. `target`
    None means route by address; a dotted name or a request type means run exactly that function. `received`, `due`
    and `expires` are seconds since the epoch. Of two jobs with the same `unique` one waits. `deliveries` counts earlier
    claims that were never settled, `attempts` counts failures. `claim` is the backend's own mark of this reservation.
    """

    key: str
    body: bytes
    sender: str | None = None
    recipients: tuple[str, ...] = ()
    peer: str | None = None
    target: str | None = None
    received: float = 0.0
    due: float | None = None
    expires: float | None = None
    priority: int = 0
    unique: str | None = None
    deliveries: int = 0
    attempts: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    claim: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged(Job):
    """A job that cannot be read whole, as who looks at it sees it: what cannot be read is left empty, and `trouble`
    says why. Nobody is handed it out, and it moves nowhere."""

    trouble: str


@dataclass(frozen=True, slots=True)
class Done:
    """The attempt succeeded: the job is gone; with `kept` it lies in the archive, in the state done."""

    kept: bool = False


class Expired:
    """The job came too late: it is gone, and was not run."""


DONE = Done()
KEPT = Done(kept=True)
EXPIRED = Expired()

Result = Done | Later | Dead
"""What an attempt ends with."""

Outcome = Result | Expired
"""What a job is settled with."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A gate is open: the job is due at `due` (None: at once), and the gate's number becomes `last`."""

    last: float
    due: float | None = None


class Gate(Protocol):
    """Whether a job is to be put at all, decided by one number that the queue keeps under `key`."""

    @property
    def key(self) -> str:
        """Which number."""

    @property
    def memory(self) -> float:
        """Seconds after `last` at which the number may be forgotten."""

    def passage(self, last: float | None, now: float) -> Passage | None:
        """Whether the job passes; `last` is the number, None where there is none yet. Pure."""


@dataclass(frozen=True, slots=True)
class Debounce:
    """Of many like jobs one in `window` seconds is run: the first at once (with `always_delay`: after the window), one
    more at the end of the window for all that come within it.

    The number is when the last of them was due. Source: Deferrable's debounce, whose three keys this one replaces.
    """

    key: str
    window: float
    always_delay: bool = False

    @property
    def memory(self) -> float:
        return self.window

    def passage(self, last: float | None, now: float) -> Passage | None:
        if last is None or not now - self.window < last <= now + self.window:
            # Nothing of late; or the clock has been put back, and what is kept says nothing.
            return Passage(now + self.window, now + self.window) if self.always_delay else Passage(now)
        if last > now:
            return None  # one waits that will do for this one too
        due = now + self.window if self.always_delay else last + self.window
        return Passage(due, due)


@dataclass(frozen=True, slots=True)
class Tick:
    """One job for each moment of a schedule, whoever puts it and however often: the number only rises.

    Unless it lies far ahead: then the clock was wrong when it was written, and to wait for it could take years.
    """

    key: str
    at: float

    @property
    def memory(self) -> float:
        return float("inf")

    def passage(self, last: float | None, now: float) -> Passage | None:
        return Passage(self.at) if last is None or last < self.at or last > now + CORRECTION else None


@dataclass(frozen=True, slots=True)
class Put:
    """A job on its way into a store: ready, or (with an outcome) straight to the delayed, the dead or the archive.

    A job whose `due` lies ahead is delayed too. One that is put as dead or done is in nobody's way, whatever its
    `unique`. A `Later` without `at` waits as long as the job's `attempts` say. The outcome's report is kept beside the
    job, behind `report`, which it may bring from elsewhere; a `Dead()` without a reason or a cause adds nothing to it.
    """

    store: Backend
    job: Job
    outcome: Later | Dead | Done | None = None
    gate: Gate | None = None
    report: str = ""

    def __post_init__(self) -> None:
        plain = _plain(self.job)
        if plain is not self.job:
            object.__setattr__(self, "job", plain)


def _plain(job: Job) -> Job:
    """The job as every store keeps it: a text or a number of a class of its own, as an enum's or a template's, is its
    text or number. Raises TypeError and ValueError for what no store keeps."""
    if not isinstance(job.body, bytes):
        raise TypeError(f"the body of a job is bytes, not {type(job.body).__name__}")
    one = (job.key, job.sender, job.peer, job.target, job.unique)
    texts = (*one, *job.recipients, *job.metadata, *job.metadata.values())
    if (
        type(job.priority) is int
        and 0 <= job.priority <= PRIORITY_MAX
        and all(type(text) is str or text is None for text in texts)
    ):
        return job
    key, sender, peer, target, unique = map(_text, one)
    return replace(
        job,
        priority=_priority(job.priority),
        key=key,
        sender=sender,
        peer=peer,
        target=target,
        unique=unique,
        recipients=tuple(map(_text, job.recipients)),
        metadata={_text(name): _text(value) for name, value in job.metadata.items()},
    )


def _text(value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"the names, addresses and metadata of a job are texts, not {value!r}")
    # not str(value): an enum's name, or whatever that class says
    return None if value is None else str.__str__(value)


def _priority(number: Any) -> int:
    if not isinstance(number, int):
        raise TypeError(f"priority={number!r}: it is a whole number")
    if not 0 <= number <= PRIORITY_MAX:
        raise ValueError(f"priority={number}: from 0, the most urgent, to {PRIORITY_MAX}")
    return int(number)


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so many jobs with the same `per` at once (`concurrency`), or begun in a second (`rate`).

    `per` is "recipient_domain", "sender" or "target".
    """

    per: str
    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.per not in _LANES:
            raise ValueError(f"Limit({self.per!r}): one of {', '.join(_LANES)}")
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError(f"Limit({self.per!r}) takes concurrency=... or rate=..., one of them")
        if self.concurrency is not None and not isinstance(self.concurrency, int):
            raise TypeError(f"Limit({self.per!r}, concurrency={self.concurrency!r}): so many jobs, a whole number")
        if (self.concurrency is not None and self.concurrency < 1) or (self.rate is not None and not self.rate > 0):
            raise ValueError(f"Limit({self.per!r}) must let something through")

    def lane(self, job: Job) -> str:
        """What this job shares the limit with."""
        return _LANES[self.per](job)


def _domain(job: Job) -> str:
    return job.recipients[0].rpartition("@")[2].lower() if job.recipients else ""


_LANES: dict[str, Callable[[Job], str]] = {
    "recipient_domain": _domain,
    "sender": lambda job: (job.sender or "").lower(),
    "target": lambda job: job.target or "",
}


class Backend(Protocol):
    """Where jobs are kept. One object per queue and process; all methods may be called from any thread,
    except that one thread at a time reserves and waits. Whatever cannot be read or written is a QueueError."""

    name: str
    """The queue as its user wrote it: `run/posts`. A store whose names are paths has an `address`, too, that opens it
    wherever a process runs (lamsonq.backends.address_of)."""

    capabilities: frozenset[str]
    """What not every store can: "limits" (`limit`), "transactions" (`put` with `conn`), "processes" (several processes
    see the same queue), "files" (each message is a file), "batches" (`finish`)."""

    def new_key(self) -> str:
        """A key that no other process, thread or machine makes; keys sort in the order in which they were made."""

    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        """Keep these jobs (each `store` is this backend). Durable on return; on an exception none is kept.

        False stands where a job was not kept because of `unique` or its gate. With `conn`, a connection to the same
        database, they are kept when its transaction commits.
        """

    def reserve(self, n: int, wait: float = 0.0, *, only: Collection[str] | None = None) -> list[Job]:
        """Claim up to n ready jobs; when none is ready, wait up to `wait` seconds or until `wake`.

        `only` takes no jobs but those with one of these targets. Comes back early, perhaps with nothing.
        """

    def wait(self, seconds: float) -> None:
        """Sleep until there may be something to reserve, of what the last `reserve` asked for, `wake` is called or the
        time is over. Claims nothing."""

    def wake(self) -> None:
        """Make a waiting `reserve` or `wait` return; from any thread, also before it waits."""

    def claim(self, key: str) -> Job | None:
        """Claim this one job, if it is ready, delayed, dead or done; uncounted, for tools: if it is never settled, it
        goes back as it was."""

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        """Finish this reservation and publish what came of it, as one; tells of each put what `put` would.

        Raises LeaseLost.
        """

    def finish(self, jobs: Sequence[Job], outcome: Done) -> list[Job]:
        """Settle all of these at once, of which nothing came; back come those whose reservation no longer held. Where
        that costs less than to settle each."""

    def touch(self, job: Job) -> None:
        """Raises LeaseLost when this reservation no longer holds; where claims have a lease, renews it."""

    def release_stale(self) -> int:
        """Give back the claims of dead workers (`reserve` does this as well), and publish what came of jobs that they
        had settled; how many claims were found."""

    def forgive(self) -> None:
        """The claims of this process no longer count as deliveries: it is being stopped, and may be killed."""

    def keys(self, state: str = "ready") -> list[str]:
        """The keys in one of STATES, in their order. Raises ValueError for another word."""

    def get(self, key: str) -> Job | None:
        """A job in any state, without claiming it. What cannot be read may be a `Damaged`, or None."""

    def state(self, key: str) -> str | None:
        """Which of STATES a job is in; None when there is none."""

    def report(self, key: str) -> str:
        """The reasons and tracebacks that were kept beside a job, oldest first; "" when there are none."""

    def remove(self, key: str) -> bool:
        """Delete a job that is not reserved; False when there is none."""

    def kick(self, key: str) -> bool:
        """Make a delayed, dead or done job ready, its counts at zero; False when there is none."""

    def purge(self, state: str, before: float | None = None) -> int:
        """Delete all jobs of one state (not reserved), or those that have been in it since `before`; how many."""

    def pause(self) -> None:
        """Let nothing be reserved, by any process, until `resume`."""

    def resume(self) -> None:
        """End a pause."""

    def paused(self) -> bool:
        """Whether the queue is paused."""

    def counts(self) -> dict[str, int]:
        """How many jobs are in each of STATES."""

    def oldest(self) -> float | None:
        """When the oldest ready job was put, in seconds since the epoch; None when none is ready."""

    def limit(self, limits: Sequence[Limit]) -> None:
        """From now on `reserve` keeps these limits. Raises SettingsError where the store cannot."""

    def close(self) -> None:
        """Give up this process's claims and watches. Idempotent."""


def finish_each(store: Backend, jobs: Sequence[Job], outcome: Done) -> list[Job]:
    """What `finish` is in a store without batches: some may be settled when one of them raises."""
    lost = []
    for job in jobs:
        try:
            store.settle(job, outcome)
        except LeaseLost:
            lost.append(job)
    return lost


def due_after(outcome: Later, failures: int, now: float) -> float:
    """When a job comes again that has failed so often, this time included, if the outcome does not say so itself."""
    return now + exponential(failures) if outcome.at is None else outcome.at


def exponential(failures: int) -> float:
    """Seconds to wait after so many failures: 2-4, 4-8, ... up to an hour; at random, so that jobs that failed together
    do not come back together."""
    return float(min(2 ** min(max(failures, 1), 20) * 2, 3600)) * random.uniform(0.5, 1)


def killed(times: int) -> str:
    """Why a job is dead whose worker died so often."""
    return f"the worker died {times} times while it had this job"


def check_state(state: str) -> None:
    """Raises ValueError for a word that is none of STATES."""
    if state not in STATES:
        raise ValueError(f"a job is {', '.join(STATES)}; not {state!r}")


def part_of(job: Job, recipients: tuple[str, ...], number: int) -> Job:
    """A new job for some of a job's recipients, beside it in the order of the queue."""
    key = derived_key(job.key, number)
    return replace(job, key=key, recipients=recipients, deliveries=0, due=None, unique=None, claim="")
