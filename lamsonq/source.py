"""A queue as its receiver sees it: what a claimed job asks for, and how what came of it is settled.

Rules:

1. A message that asks for several calls is first replaced, in one settle, by one job bound to each of them: from
   then on each succeeds and fails alone, and what has succeeded never runs again.
2. A failure stays in this queue, bound to the function that failed: delayed, or dead with its traceback.
3. What cannot be settled, because the store cannot be written, is given back as soon as it can.
4. A job that comes too late is not run.
5. Where a relay takes the messages, lamsonq.outbound says what becomes of a failure, and who is told. That a function
   has handled a message is reported where its sender asked for it, in the settle that ends its job (lamsonq.delivery).
6. A job of which nothing is left, not even the state of a conversation, may be settled with others like it: by the
   fetcher, before it takes or waits for the next. Where the store has batches, that is one transaction for all.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from socket import gethostname

from lamsonq import clock, deferred, events
from lamsonq.attempt import Call, Spawn
from lamsonq.connection import own_name
from lamsonq.delivery import Reports, reported, reported_once
from lamsonq.errors import Dead, Failure, Later, LeaseLost, QueueError, SettingsError, Undelivered, reason_of
from lamsonq.jobs import DONE, EXPIRED, KEPT, Done, Expired, Job, Limit, Outcome, Put, part_of
from lamsonq.mail import MailRequest
from lamsonq.outbound import Outbox, Settlement, outbox_of
from lamsonq.policy import DEFAULT
from lamsonq.queue import Queue, message_of
from lamsonq.routing import CONVERSATION, UNKNOWN_AFTER, RoutingBase, unplanned

LOG = logging.getLogger()
"""The root logger, as the tutorial shows these lines."""

RETRY_AFTER = 10.0
"""Seconds after which a job comes again that could not be begun or settled, through no fault of its own."""


class Owed(Exception):
    """A job could not be settled; the fetcher gives it back as soon as that is possible."""


class Source:
    """One queue of a receiver: what a QueueReceiver's arguments of the same names say of it."""

    def __init__(
        self,
        queue: Queue,
        deliver: Callable[[MailRequest], object] | None,
        router: RoutingBase,
        *,
        bound: bool = False,
        weight: int = 1,
        timeout: float = 300.0,
        limits: Sequence[Limit] = (),
        archive: float | None = None,
        keep_dead: float | None = None,
        reports: Reports | None = None,
    ) -> None:
        self.queue = queue
        self.outbox = outbox_of(deliver)
        self.deliver = deliver if self.outbox is None else self.outbox.deliver_from(queue.backend)
        self.router = router
        self.bound = bound
        self.weight = weight
        self.timeout = timeout
        self.limits = limits
        self.archive = archive
        self.keep_dead = keep_dead
        self.reports = reports
        self.owed: deque[tuple[Job, str]] = deque()
        self.finished: deque[Job] = deque()
        """What rule 6 is about."""
        self.gathers = False
        """Whether somebody sees to it."""
        self._sleeps = False

    def bind(self) -> None:
        """See whether the queue can be used so. Raises Refusal."""
        backend = self.queue.backend
        backend.release_stale()
        if self.limits:
            backend.limit(self.limits)
        if self.deliver is not None:
            return
        self.router.check()
        undeliverable = self.router.UNDELIVERABLE_QUEUE
        if undeliverable is not None and undeliverable.backend is backend and not self.bound:
            raise SettingsError(
                f"this boot works {self.queue.dir} off, where undeliverable messages go: it would put them there for"
                " ever; set Router.UNDELIVERABLE_QUEUE = None in it"
            )

    def reserve(self, n: int) -> list[Job]:
        """Claim up to n jobs. Raises QueueError."""
        jobs = self.queue.backend.reserve(n, only=self._targets() if self.bound else None)
        for job in jobs:
            events.tell("pop", job)
        return jobs

    def _targets(self) -> frozenset[str]:
        return frozenset(self.router.table.handlers) | deferred.targets()

    # -- what a job asks for -----------------------------------------------------------------------------------

    def call_for(self, job: Job, spawn: Spawn) -> tuple[Call | None, MailRequest]:
        """The one call that this job asks for; None when it is dealt with without one.

        Raises Later or Dead for a job that cannot be run, LeaseLost and Owed.
        """
        message = message_of(job, self.queue.dir)
        if job.expires is not None and clock.now() > job.expires:
            LOG.warning("Job %s of %s came too late and is dropped", job.key, self.queue.dir)
            spawn(lambda: self._expire(job))
            return None, message
        if self.deliver is None and job.target == CONVERSATION:
            return self.router.in_conversation(message), message
        if self.deliver is None and job.target is not None and job.target not in self.router.table.handlers:
            self.router.reload_if_changed()
            call = deferred.call_for(job)
            if call is None:
                reason = f"no handler {job.target} in this process"
                raise Later(reason, clock.now() + UNKNOWN_AFTER, counted=False)
            return call, message
        LOG.debug(
            "Message received from Peer: %r, From: %r, to To %r.",
            message.Peer,
            message.From,
            message.route_to,
        )
        if self.outbox is not None and (parts := self.outbox.parts(job)):
            spawn(lambda: self._settle_parted(job, parts))
            return None, message
        if self.deliver is not None:
            return Call(self.deliver, message.To, policy=self.outbox.policy if self.outbox else DEFAULT), message
        if job.target is not None:
            return self.router.bound(job, message), message
        calls = self.router.plan(message)
        left = unplanned(message, calls)
        if len(calls) == 1 and not left:
            return calls[0], message.addressed(calls[0].recipient)
        if any(call.stateful is not None for call in calls):
            self._split(job, calls, left)  # at once: its conversation is to see the messages in order
        else:
            spawn(lambda: self._split(job, calls, left))
        return None, message

    def _expire(self, job: Job) -> None:
        late = Dead("it came too late: its time to live was over")
        reports = self.outbox.expired(self.queue.backend, job) if self.outbox is not None else []
        self._settle_job(job, late if self.archive is not None else EXPIRED, reports)

    def _settle_parted(self, job: Job, parts: Sequence[Job]) -> None:
        self._store(job, DONE, [Put(self.queue.backend, part) for part in parts])

    def _split(self, job: Job, calls: list[Call], left: list[MailRequest]) -> None:
        """Replace a job by one for each call of its plan (rule 1), and one for each part that nothing takes."""
        store = self.queue.backend
        puts = [Put(store, part) for part in reported_once([_bound(job, call, n) for n, call in enumerate(calls, 1)])]
        for n, message in enumerate(left, len(calls) + 1):
            undeliverable = self.router.undeliverable_queue(message)
            reason = f"no route takes {', '.join(message.route_to) or 'a message without recipient'}"
            if undeliverable is not None:
                kept = replace(_part(job, message, n), key=undeliverable.backend.new_key())
                puts.append(Put(undeliverable.backend, kept))
            elif calls:
                puts.append(Put(store, _part(job, message, n), Dead(reason)))
            else:
                self._settle_job(job, Dead(reason))
                return
        self._store(job, DONE, puts)

    # -- settling ----------------------------------------------------------------------------------------------

    def settle(self, job: Job, call: Call | None, outcome: Outcome, puts: Sequence[Put] = ()) -> None:
        """Settle an attempt: what failed is kept, bound to what it failed at. Raises LeaseLost, Owed."""
        if isinstance(outcome, Later) and not outcome.counted:
            self._settle_job(job, outcome)
            return
        if isinstance(outcome, Done | Expired):
            if isinstance(outcome, Done) and self.reports is not None:
                puts = [*puts, *reported(self.reports, job, puts, own_name() or gethostname())]
            if self.gathers and not puts and isinstance(outcome, Done) and call is not None and call.stateful is None:
                self.finished.append(job)
                if self._sleeps:
                    self.queue.backend.wake()
            else:
                self._settle_job(job, outcome, puts)
            return
        if self.outbox is not None and call is not None:
            self._settle_outbound(self.outbox, job, outcome)
            return
        again = f"; tried again at {_utc(outcome.at)}" if isinstance(outcome, Later) else ""
        LOG.error("Job %s of %s failed: %s%s", job.key, self.queue.dir, reason_of(outcome), again)
        store = self.queue.backend
        refused = outcome.__cause__ if call is not None and call.name is None else None
        if isinstance(refused, Undelivered) and refused.failures:
            self._keep_refused(job, refused.failures, outcome, puts)
        elif call is not None and call.name is not None and job.target is None:
            failed = Put(store, _failed(_bound(job, call, 1)), outcome)
            self._store(job, DONE, [*puts, failed])
            events.tell_settled(failed.job, outcome)
        else:
            self._settle_job(job, outcome, puts)

    def _keep_refused(self, job: Job, failures: Sequence[Failure], outcome: Later | Dead, puts: Sequence[Put]) -> None:
        """Keep those for whom our own `deliver` has failed; the others have got the message."""
        if len(job.recipients) == 1:
            self._settle_job(job, outcome, puts)
            return
        kept = [_failed(part_of(job, (failure.recipient,), n)) for n, failure in enumerate(failures, 1)]
        store = self.queue.backend
        parts = [Put(store, part, failure.outcome()) for part, failure in zip(kept, failures, strict=True)]
        self._store(job, DONE, [*puts, *parts])
        for part, failure in zip(kept, failures, strict=True):
            events.tell_settled(part, failure.outcome())

    def _settle_outbound(self, outbox: Outbox, job: Job, outcome: Later | Dead) -> None:
        """Rule 5: what goes on in parts, and the report to the sender, in one settle."""
        ended = outbox.settlement(self.queue.backend, job, outcome)
        self._say_ended(job, ended)
        if ended.outcome is not None:
            self._settle_job(job, ended.outcome, ended.reports)
            return
        kept = self._store(job, DONE, [*ended.parts, *ended.reports])
        events.tell_puts(ended.reports, kept[len(ended.parts) :])
        for part in ended.parts:
            if part.outcome is not None:
                events.tell_settled(part.job, part.outcome)

    def _say_ended(self, job: Job, ended: Settlement) -> None:
        """One line: an error where somebody is given up; that mail has to wait is everyday life."""
        ends = [(part.job, part.outcome) for part in ended.parts] if ended.outcome is None else [(job, ended.outcome)]
        dead = [_told(part, end) for part, end in ends if isinstance(end, Dead)]
        waiting = [f"tried again at {_utc(end.at)}: {_told(part, end)}" for part, end in ends if isinstance(end, Later)]
        level, what = (logging.ERROR, "failed: ") if dead else (logging.WARNING, "is ")
        LOG.log(level, "Job %s of %s %s%s", job.key, self.queue.dir, what, "; ".join([*dead, *waiting]))

    def _settle_job(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> None:
        """Settle, and say so."""
        if isinstance(outcome, Done) and self.archive is not None:
            outcome = KEPT
        kept = self._store(job, outcome, puts)
        events.tell_puts(puts, kept)
        events.tell_settled(job, outcome)

    def _store(self, job: Job, outcome: Outcome, puts: Sequence[Put]) -> list[bool]:
        """Raises LeaseLost, and Owed: then the job comes again, and has to be routed as it was this time."""
        store = self.queue.backend
        try:
            return store.settle(job, outcome, puts)
        except LeaseLost:
            events.tell("lease_lost", job)
            raise
        except Exception as error:  # a full disk, most often: nothing was published, and giving back needs no space
            self._owe(job, error)
            store.wake()  # the fetcher tries to give it back
            raise Owed(job.key) from error

    def _owe(self, job: Job, error: Exception) -> None:
        LOG.error("Job %s of %s could not be settled: %s", job.key, self.queue.dir, reason_of(error))
        self.owed.append((job, f"it could not be settled: {reason_of(error)}"))

    def settle_finished(self) -> None:
        """Rule 6."""
        if not self.finished:
            return
        jobs = [self.finished.popleft() for _ in range(len(self.finished))]
        outcome = DONE if self.archive is None else KEPT
        try:
            lost = self.queue.backend.finish(jobs, outcome)
        except Exception as error:  # any store: as in `_store`
            for job in jobs:
                self._owe(job, error)
            return
        for job in jobs:
            if any(job is other for other in lost):
                LOG.warning("job %s was taken away while it was handled; this attempt's result is dropped", job.key)
                events.tell("lease_lost", job)
            else:
                events.tell_settled(job, outcome)

    def wait(self, seconds: float) -> None:
        """Sleep until something comes, or something is finished. Raises QueueError."""
        self._sleeps = True
        try:
            if not self.finished:
                self.queue.backend.wait(seconds)
        finally:
            self._sleeps = False

    def purge(self) -> None:
        """Delete what has been kept long enough."""
        for state, kept_for in (("done", self.archive), ("dead", self.keep_dead)):
            if kept_for is None:
                continue
            try:
                self.queue.backend.purge(state, before=clock.now() - kept_for)
            except QueueError as error:
                LOG.error("What is %s in %s could not be purged: %s", state, self.queue.dir, error)

    @property
    def behind(self) -> bool:
        """Whether something is to be settled yet."""
        return bool(self.owed or self.finished)

    def catch_up(self) -> None:
        """Settle what is finished, and give back what could not be settled, uncounted; as often as it takes."""
        self.settle_finished()
        for job, reason in [self.owed.popleft() for _ in range(len(self.owed))]:
            try:
                self.queue.backend.settle(job, Later(reason, clock.now() + RETRY_AFTER, counted=False))
            except LeaseLost:
                pass
            except Exception:  # still the same trouble, which was logged
                self.owed.append((job, reason))


def _bound(job: Job, call: Call, number: int) -> Job:
    """The job that stands for one call of another job's plan. One without a name is what a conversation asks for that
    is in a queue, or in no function here: were its job bound to nothing, it would ask for all calls again."""
    part = part_of(job, (call.recipient,), number)
    return replace(part, target=call.name or CONVERSATION, metadata={**job.metadata, "route": call.route})


def _part(job: Job, message: MailRequest, number: int) -> Job:
    """The job for those recipients of a job that nothing takes."""
    recipients = tuple(r for r in job.recipients if r.lower() in message.route_to) or tuple(message.route_to)
    return part_of(job, recipients, number)


def _told(job: Job, failed: Later | Dead) -> str:
    return f"{', '.join(job.recipients) or 'nobody'}: {reason_of(failed)}"


def _utc(at: float | None) -> str:
    at = min(max(at or clock.now(), 0.0), 253402300799.0)  # no calendar has a later moment than the year 9999
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _failed(job: Job) -> Job:
    return replace(job, attempts=job.attempts + 1)
