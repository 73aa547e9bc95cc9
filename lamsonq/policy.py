"""Policies: when a job is to run, and what becomes of it when its function fails.

Rules:

1. What the store must know is read when a job is put: delay, ttl, debounce, priority, unique. What decides after a
   failure is read from the function then: a deploy that changes it mends the jobs that wait.
2. An error that is no word of ours is a crash: it is tried again if it is of `error_classes`, `max_attempts` times in
   all. A function that asks for later itself is asked again until GIVE_UP_AFTER, unless `max_attempts` was given.
3. Functions without a policy have DEFAULT: crashes are tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from lamsonq.errors import Dead, Later, SMTPError, Undelivered, outcome_of, reason_of
from lamsonq.jobs import PRIORITY_MAX, exponential

MAX_ATTEMPTS = 5
"""How often a function is run in all that crashes and says nothing else."""

GIVE_UP_AFTER = 5 * 24 * 3600.0
"""Seconds after which a job that keeps saying *later* is a dead letter (RFC 5321 section 4.5.4.1: 4-5 days)."""

WAIT_MAX = 366 * 24 * 3600.0
"""Seconds that a backoff may ask for."""

Seconds = float | timedelta | Callable[[], float | timedelta]
"""A span of time, or a function that is asked for it at each put."""


def deferrable_backoff(failures: int) -> float:
    """Seconds to wait after so many failures, as Deferrable has them: 4, 6, 10, 18, 34, ... 900."""
    return float(min(2 + 2 ** min(failures, 20), 900))


def at_once(failures: int) -> float:  # noqa: ARG001 - always the same
    """No waiting between two tries."""
    return 0.0


def seconds(span: Seconds) -> float:
    """A span of time in seconds, asked for if it is a function. Raises TypeError or ValueError for what is none."""
    found = span() if callable(span) else span
    if isinstance(found, timedelta):
        found = found.total_seconds()
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"a time is a number of seconds or a timedelta, not {found!r}")
    if not 0 <= found < float("inf"):
        raise ValueError(f"{found} is no number of seconds to wait")
    return float(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a function is run. Zero seconds mean: none.

    - `error_classes`: errors that deserve another try; () for none.
    - `max_attempts`: how often it is run in all; None is MAX_ATTEMPTS for crashes only.
    - `backoff(failures)`: the time until the next try, in seconds or as a timedelta. One that fails is logged, and
      `exponential` is asked.
    - `give_up_after`: seconds after which a job that keeps saying *later* is a dead letter.
    - `timeout`: seconds that one run may take; None is the receiver's.
    - `delay`, `ttl`, `debounce`: from the put to the first run, to the last moment at which it may begin, and between
      two runs with the same arguments. With `debounce_always_delay` the first one waits too.
    - `priority`: 0 comes first. `unique`: of jobs with the same arguments one waits.

    Raises ValueError for what contradicts itself.
    """

    error_classes: tuple[type[BaseException], ...] = (Exception,)
    max_attempts: int | None = None
    backoff: Callable[[int], float | timedelta] = exponential
    give_up_after: float = GIVE_UP_AFTER
    timeout: float | None = None
    delay: Seconds = 0.0
    ttl: Seconds = 0.0
    debounce: Seconds = 0.0
    debounce_always_delay: bool = False
    priority: int = 0
    unique: bool = False

    def __post_init__(self) -> None:
        wrong = [
            kind for kind in self.error_classes if not (isinstance(kind, type) and issubclass(kind, BaseException))
        ]
        if wrong:
            raise TypeError(f"error_classes takes exception classes, not {wrong[0]!r}")
        if not callable(self.backoff):
            raise TypeError(
                f"backoff={self.backoff!r}: a function of the number of failures, as in lambda failures: 60"
            )
        for name in ("delay", "ttl", "debounce"):
            if not callable(getattr(self, name)):
                seconds(getattr(self, name))
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts={self.max_attempts}: a function is run at least once")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout}: a function needs some time")
        if self.delay and self.debounce:
            raise ValueError("delay_seconds and debounce_seconds do not go together: debouncing is a delay already")
        if self.debounce_always_delay and not self.debounce:
            raise ValueError("debounce_always_delay goes with debounce_seconds")
        if self.unique and self.debounce:
            raise ValueError("unique and debounce_seconds do not go together: a debounced job is unique in its window")
        for name in ("delay", "debounce"):
            span, ttl = getattr(self, name), self.ttl
            if span and ttl and not callable(span) and not callable(ttl) and seconds(span) > seconds(ttl):
                raise ValueError(
                    f"{name}_seconds={span} is longer than ttl_seconds={ttl}: it would expire before it runs"
                )

    @property
    def at_put(self) -> list[str]:
        """The names of what is set and decides when a job is put."""
        names = ("delay", "ttl", "debounce", "priority", "unique")
        return [name for name in names if getattr(self, name)]

    def judge(self, error: BaseException, attempts: int, received: float, now: float) -> Later | Dead:
        """What becomes of a job that has failed `attempts` times before; times are seconds since the epoch."""
        outcome = outcome_of(error)
        crashed = not isinstance(error, Later | Dead | SMTPError | Undelivered)
        if isinstance(outcome, Later) and not outcome.counted:
            return outcome
        if crashed:
            return self._judge_crash(error, attempts, now)
        if isinstance(outcome, Dead):
            return outcome
        if self.max_attempts is not None and attempts + 1 >= self.max_attempts:
            return _given_up(outcome, f"after {self.max_attempts} attempts")
        if received and now - received > self.give_up_after:
            return _given_up(outcome, f"after {_in_words(self.give_up_after)}")
        return outcome if outcome.at is not None else self._later(outcome, outcome.reason, attempts, now)

    def _judge_crash(self, error: BaseException, attempts: int, now: float) -> Later | Dead:
        limit = MAX_ATTEMPTS if self.max_attempts is None else self.max_attempts
        if isinstance(error, self.error_classes) and attempts + 1 < limit:
            return self._later(error, reason_of(error), attempts, now)
        dead = Dead(reason_of(error))
        dead.__cause__ = error
        return dead

    def _later(self, cause: BaseException, reason: str, attempts: int, now: float) -> Later:
        later = Later(reason, now + self._wait(attempts + 1))
        later.__cause__ = cause.__cause__ if isinstance(cause, Later) else cause
        return later

    def _wait(self, failures: int) -> float:
        try:
            wait = self.backoff(failures)
            wait = wait.total_seconds() if isinstance(wait, timedelta) else wait
            return min(seconds(max(wait, 0.0)), WAIT_MAX)
        except Exception as error:  # a function of the user's: the job must be settled all the same
            logging.error("backoff(%d) of a policy fails: %s", failures, reason_of(error))
            return exponential(failures)


DEFAULT = Policy()


def _in_words(span: float) -> str:
    """A span of time, as people say it: 5 days, 12 hours, 90 seconds."""
    for size, word in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if span >= 2 * size:
            return f"{round(span / size)} {word}"
    return f"{round(span)} seconds"


def _given_up(outcome: Later, when: str) -> Dead:
    dead = Dead(f"gave up {when}: {outcome.reason}")
    dead.__cause__ = outcome.__cause__
    return dead


def priority_of(number: int) -> int:
    """A priority within its bounds: a negative one is the most urgent, as in pulpo-messaging. Raises TypeError."""
    if not isinstance(number, int):
        raise TypeError(f"priority={number!r}: it is a whole number, and 0 is the most urgent")
    return min(max(int(number), 0), PRIORITY_MAX)
