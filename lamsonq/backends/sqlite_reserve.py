"""Claiming the jobs of one queue, and waiting for them: what one worker remembers of what it has.

Rules: one thread at a time reserves and waits; the others settle. What is remembered is changed after the transaction
that it tells of. A job that is claimed and cannot be read becomes a dead letter here, before any handler sees it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from lamsonq.backends import sqlite_bodies, sqlite_claims
from lamsonq.backends.lives import Vigil
from lamsonq.backends.sqlite_claims import Asked, Claimed
from lamsonq.backends.sqlite_errors import Telling
from lamsonq.backends.sqlite_kept import Kept
from lamsonq.backends.sqlite_rows import TOKEN_SIZE, body_of, bound, job_of, legible
from lamsonq.backends.sqlite_wake import Ear
from lamsonq.backends.sqlite_workers import Life
from lamsonq.errors import Dead, LeaseLost
from lamsonq.jobs import Job, Limit, Outcome, Put

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What this machine is short of just now; any other error is of this one body, and does not stop the jobs behind it."""


class Reserving(Kept):
    """The part of a backend that claims and waits."""

    name: str

    def _begin_reserving(self) -> None:
        self._lock = threading.Lock()
        self._life: Life | None = None
        self._numbers = itertools.count(1)
        self._unforgiven = 0
        self._held: set[str] = set()  # our claims that are not settled
        self._suspect = ""  # the one of them whose worker died before
        self._found = False  # the last look found something, so there may be more
        self._quiet = self._passed_over = False  # what sqlite_claims.Claimed says
        self._only: Collection[str] | None = None  # what the last `reserve` asked for
        self._vigil = Vigil()
        self._limits: tuple[Limit, ...] = getattr(self, "_limits", ())
        self._ear = Ear(f"{self._database.path}-wal", self._database.turn, self._vigil)

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        raise NotImplementedError

    def _tend(self) -> None:
        """Look for dead workers, and mend what nobody else does."""
        raise NotImplementedError

    def _is_at_rest(self) -> bool:
        """Whether nothing is to be mended by time."""
        raise NotImplementedError

    def _keep_up(self) -> None:
        if self._vigil.is_due():
            self._tend()

    def _worker(self) -> str:
        with self._lock:
            if self._life is None:
                self._database.users.add(self)
                self._life = Life(self._database)
            return self._life.id

    def reserve(self, n: int, wait: float = 0.0, *, only: Collection[str] | None = None) -> list[Job]:
        """Raises QueueError."""
        until = time.monotonic() + wait
        self._only = only
        with Telling(self.name):
            while True:
                if wait > 0:
                    self._ear.listen()
                self._keep_up()
                looks = n > 0 and not (self._quiet and self._held) and (self._found or self._is_something_ready())
                jobs = self._take(n, only) if looks else []
                self._found = bool(jobs)
                left = until - time.monotonic()
                if jobs or n <= 0 or left <= 0 or self._sleep(left):
                    return jobs

    def wait(self, seconds: float) -> None:
        """Raises QueueError."""
        until = time.monotonic() + seconds
        with Telling(self.name):
            while True:
                self._ear.listen()
                self._keep_up()
                left = until - time.monotonic()
                if (self._is_something_ready() and not self.paused()) or left <= 0 or self._sleep(left):
                    return

    def _sleep(self, seconds: float) -> bool:
        """Until something is written, `wake` or the time at which a job is due; whether it was `wake`."""
        query = "select min(due) - :now from jobs where queue = :queue and state = 'delayed' and due > :now"
        [[until_due]] = self._rows(query)
        patience = self._vigil.patience(hears=self._ear.hears and self._is_at_rest())
        return self._ear.sleep(min(seconds, patience, *([] if until_due is None else [until_due])))

    def wake(self) -> None:
        self._ear.wake()

    def _is_something_ready(self) -> bool:
        if self._quiet and self._held:
            return False
        parts = ["state = 'ready' and deliveries = 0"]
        if not self._suspect:
            parts.append("state = 'ready' and deliveries > 0")
        wanted: dict[str, object] = {}
        if self._only is not None:
            wanted = {f"target{number}": bound(target) for number, target in enumerate(self._only)}
            parts = [f"{part} and target in ({', '.join(f':{name}' for name in wanted)})" for part in parts]
        exists = (f"exists (select 1 from jobs where queue = :queue and {part})" for part in parts)
        due = "exists (select 1 from jobs where queue = :queue and state = 'delayed' and {})"
        dues = (due.format(when) for when in ("due <= :now", "due is null"))
        [[found]] = self._rows(f"select {' or '.join([*exists, *dues])}", **wanted)
        return bool(found)

    def _take(self, n: int, only: Collection[str] | None) -> list[Job]:
        while True:
            with self._lock:
                has_jobs, has_suspect = bool(self._held), bool(self._suspect)
            asked = Asked(self.queue, n, only, self._now(), self._token(), has_jobs, has_suspect, self._limits)
            claimed = self._database.write(partial(sqlite_claims.take, asked=asked), rings=False)
            with self._lock:
                self._held.update(token for _, token in claimed.jobs)
                self._suspect = claimed.suspect or self._suspect
                self._quiet, self._passed_over = claimed.quiet, claimed.passed_over
            jobs = self._open(claimed)
            if jobs or not (claimed.more or claimed.jobs):
                return jobs

    def _token(self) -> Callable[[int], str]:
        worker, numbers = self._worker(), self._numbers

        def token(row: int) -> str:
            head = f"{worker}/{next(numbers)}."
            return head + str(row).zfill(TOKEN_SIZE - len(head))

        return token

    def claim(self, key: str) -> Job | None:
        with Telling(self.name):
            act = partial(sqlite_claims.claim_one, queue=self.queue, key=key, token=self._token(), now=self._now())
            claimed = self._database.write(act)
            with self._lock:
                self._held.update(token for _, token in claimed.jobs)
            jobs = self._open(claimed)
        return jobs[0] if jobs else None

    def _open(self, claimed: Claimed) -> list[Job]:
        """The jobs as their worker sees them; those that cannot be read become dead letters."""
        jobs = []
        for row, token in claimed.jobs:
            file = row[sqlite_claims.FILE]
            try:
                content = sqlite_bodies.read(self._database, file) if file else body_of(row[sqlite_claims.BODY])
                jobs.append(job_of(row, content, token))
            except FileNotFoundError:
                self._bury(row, token, f"its body, {file} in {self._database.bodies}, is gone")
            except ValueError as error:
                self._bury(row, token, str(error))
            except OSError as error:
                if error.errno in _SHORTAGES:
                    for _, claim in claimed.jobs:
                        self._give_back(claim)
                    raise
                self._bury(row, token, f"its body, {file} in {self._database.bodies}, cannot be read: {error.strerror}")
        return jobs

    def _bury(self, row: tuple[Any, ...], token: str, reason: str) -> None:
        if sqlite_claims.taken_from(token) == "dead":  # it has been told
            self._give_back(token)
            return
        key = legible(row[sqlite_claims.KEY]) or ""
        logging.error("Job %s of %s is a dead letter: %s", key, self.name, reason)
        with contextlib.suppress(LeaseLost):
            self.settle(Job(key=key, body=b"", attempts=row[sqlite_claims.ATTEMPTS], claim=token), Dead(reason))

    def _give_back(self, token: str) -> None:
        origin = sqlite_claims.taken_from(token)
        values = (origin or "ready", 0 if origin else 1, token)
        back = "update jobs set state = ?, token = '', deliveries = max(deliveries - ?, 0) where token = ?"
        self._database.write(lambda connection: connection.execute(back, values) and None)
        self._settled(token)

    def _settled(self, claim: str) -> None:
        with self._lock:
            self._held.discard(claim)
            if claim == self._suspect:
                self._suspect = ""
            wake = (self._quiet and not self._held) or (self._passed_over and not self._suspect)
        if wake:
            self.wake()
