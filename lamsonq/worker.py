"""From a queue to a function: reserve, attempt, settle.

Rules:

1. One thread fetches, and feeds `workers` threads. Nothing is claimed that cannot start, except a few that wait for
   their turn in a conversation.
2. A message that asks for several calls is first replaced, in one settle, by one job bound to each of them: from
   then on each succeeds and fails alone, and what has succeeded never runs again.
3. A failure stays in this queue, bound to the function that failed: delayed, or dead with its traceback.
4. A function that does not return in time is settled without it, and this process asks to be replaced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import Empty, SimpleQueue

from lamsonq.about import About, about, within
from lamsonq.attempt import Attempt, Call, Spawn
from lamsonq.errors import Dead, Failure, Later, LeaseLost, QueueError, SettingsError, Undelivered, reason_of
from lamsonq.jobs import DONE, Done, Job, Outcome, Put, derived_key
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue, message_of
from lamsonq.routing import Router, RoutingBase, unplanned

LOG = logging.getLogger()
"""The root logger, as the tutorial shows these lines."""

RETRY_AFTER = 10.0
"""Seconds after which a job comes again that could not be begun or settled, through no fault of its own."""

TROUBLE_PAUSE = 1.0
"""Seconds between two tries while the queue cannot be used."""

IN_LINE = 100
"""How many claimed jobs may wait for their turn in a conversation or for an async function."""


class _AnyTarget(frozenset[str]):
    """Every target, but not none."""

    def __contains__(self, target: object) -> bool:
        return target is not None


_ANY_TARGET = _AnyTarget()


class _Owed(Exception):
    """A job could not be settled; the fetcher gives it back as soon as that is possible."""


class QueueReceiver:
    """Works a queue off. Many may work on one queue, in threads, processes or both.

    `queue_dir` names the queue (a folder or a URL) or is a Queue. `sleep` is after how many seconds an idle receiver
    says so in the log again: a file that appears wakes it at once. `size_limit` (bytes, 0 = none) and `oversize_dir`
    say what becomes of larger messages. `workers` is how many functions run at once. `deliver` takes each message
    instead of the router, as in `QueueReceiver("run/outbox", deliver=relay.deliver)`. `timeout` is how many seconds a
    function may take. `bound=True` works only the jobs that are bound to a function.

    Source: Lamson's and Salmon's `server.QueueReceiver`.
    """

    def __init__(
        self,
        queue_dir: str | os.PathLike[str] | Queue,
        sleep: float = 10,
        size_limit: int = 0,
        oversize_dir: str | None = None,
        workers: int = 10,
        *,
        deliver: Callable[[MailRequest], object] | None = None,
        router: RoutingBase = Router,
        timeout: float = 300.0,
        bound: bool = False,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: a QueueReceiver needs at least one")
        if not isinstance(queue_dir, Queue):
            queue_dir = Queue(queue_dir, pop_limit=size_limit, oversize_dir=oversize_dir)
        elif size_limit or oversize_dir:
            raise TypeError("give pop_limit and oversize_dir to the Queue: this receiver gets one that is made already")
        self.queue = queue_dir
        self.queue_dir = queue_dir.dir
        self.sleep = sleep
        self.workers = workers
        self.deliver = deliver
        self.router = router
        self.timeout = timeout
        self.bound = bound
        self.stuck = False
        self._left_running = False
        self._stopping = threading.Event()
        self._drained = threading.Event()
        self._drained.set()
        self._give_back_at: float | None = None
        self._changed = threading.Condition()
        self._busy = 0
        self._running: dict[Attempt, Job] = {}
        self._in_trouble = False
        self._owed: deque[tuple[Job, str]] = deque()

    # -- the receiver's life -----------------------------------------------------------------------------------

    def bind(self) -> None:
        """Make the queue's folders, so that what cannot be used refuses the boot. Raises Refusal."""
        self.queue.backend.release_stale()
        if self.deliver is None:
            self.router.check()
            undeliverable = self.router.UNDELIVERABLE_QUEUE
            if undeliverable is not None and undeliverable.backend is self.queue.backend and not self.bound:
                raise SettingsError(
                    f"this boot works {self.queue_dir} off, where undeliverable messages go: it would put them there"
                    " for ever; set Router.UNDELIVERABLE_QUEUE = None in it"
                )

    def listening(self) -> str:
        return f"working the queue {self.queue_dir}"

    def start(self, one_shot: bool = False) -> None:
        """Work the queue until `stop`; with `one_shot` until it is empty. Blocks."""
        self.bind()
        self._drained.clear()
        LOG.info("Queue receiver started on queue dir %s", self.queue_dir)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="lamsonq-queue")
        try:
            self._work(pool, one_shot)
        finally:
            pool.shutdown(wait=not self._left_running, cancel_futures=self._left_running)
            self._drained.set()

    def run_once(self) -> bool:
        """Take one job and see it through, in this thread; False when none is ready. For loops of one's own.

        A message that asks for several calls is only split into them; the next calls run those.
        """
        jobs = self.queue.backend.reserve(1, only=_ANY_TARGET if self.bound else None)
        steps: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for job in jobs:
            attempt = self._begin(job, steps.put)
            while attempt in self._running or not steps.empty():
                try:
                    steps.get(timeout=0.2)()
                except Empty:
                    self._give_up_the_late()
        self._give_back_owed()
        return bool(jobs)

    def stop(self, grace: float = 30.0) -> None:
        """Take no more; finish what runs, and after `grace` seconds give the rest back uncounted. Returns at once."""
        self._give_back_at = time.monotonic() + grace
        self._stopping.set()
        self.queue.backend.wake()
        if self._changed.acquire(blocking=False):  # a signal handler may interrupt the thread that holds it
            self._changed.notify_all()
            self._changed.release()

    def join(self) -> None:
        """Wait until everything that was taken is settled."""
        self._drained.wait()

    def process_message(self, message: MailRequest) -> None:
        """Deliver one message that is in no queue. Raises Undelivered."""
        (self.deliver or self.router.deliver)(message)

    # -- the fetcher -------------------------------------------------------------------------------------------

    def _work(self, pool: ThreadPoolExecutor, one_shot: bool) -> None:
        idle = False
        while not self._stopping.is_set():
            self._give_up_the_late()
            self._give_back_owed()
            free = self._free_slots()
            if not free or self._stopping.is_set():
                continue
            quiet = self._quiet()
            jobs = self._reserve(free, 0 if not idle else self._patience()) if not one_shot else self._take(free)
            for job in jobs:
                self._submit(pool, job)
            if jobs:
                idle = False
            elif one_shot and quiet:
                return
            elif one_shot:
                self._wait_for_change()
            elif quiet and not self._stopping.is_set():
                idle = True
                LOG.debug("Sleeping for %d seconds...", self.sleep)
            else:
                idle = True
        self._drain()

    def _take(self, free: int, wait: float = 0.0) -> list[Job]:
        return self.queue.backend.reserve(free, wait, only=_ANY_TARGET if self.bound else None)

    def _reserve(self, free: int, wait: float) -> list[Job]:
        """Take jobs; while the queue cannot be used, wait and say so once."""
        try:
            jobs = self._take(free, wait)
        except QueueError as error:
            if not self._in_trouble:
                LOG.error("%s; trying on", error)
            self._in_trouble = True
            self._stopping.wait(TROUBLE_PAUSE)
            return []
        self._in_trouble = False
        return jobs

    def _free_slots(self) -> int:
        """How many more may start now; waits for a while when none may."""
        with self._changed:
            free = min(self.workers - self._busy, self.workers + IN_LINE - len(self._running))
            if free <= 0:
                self._changed.wait(1.0)
            return max(free, 0)

    def _quiet(self) -> bool:
        """Whether nothing is under way."""
        with self._changed:
            return not self._busy and not self._running and not self._owed

    def _patience(self) -> float:
        # While functions run, somebody must look at their clocks.
        return min(self.sleep, 1.0) if self._running or self._owed else self.sleep

    def _wait_for_change(self) -> None:
        with self._changed:
            if self._busy or self._running or self._owed:
                self._changed.wait(0.1)

    def _submit(self, pool: ThreadPoolExecutor, job: Job) -> None:
        def spawn(function: Callable[[], None]) -> None:
            with self._changed:
                self._busy += 1
            pool.submit(self._in_thread, function)

        self._begin(job, spawn)

    def _in_thread(self, function: Callable[[], None]) -> None:
        try:
            function()
        except (LeaseLost, _Owed):  # dealt with where it was raised
            pass
        except Exception:  # a thread of the pool must live on, whatever happens
            LOG.exception("Exception while working the queue %s", self.queue_dir)
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _drain(self) -> None:
        """Wait for what runs; after the grace, and for what hangs, go without it."""
        while True:
            self._give_up_the_late()
            self._give_back_owed()
            with self._changed:
                if not self._running and not self._owed:
                    return
                if time.monotonic() >= (self._give_back_at or 0):
                    break
                self._changed.wait(0.2)
        for attempt, job in list(self._running.items()):
            self._left_running = self._left_running or attempt.started is not None
            self._settle_instead(attempt, job, Later("the server was stopped", counted=False))

    def _give_up_the_late(self) -> None:
        now = time.monotonic()
        for attempt, job in list(self._running.items()):
            if attempt.started is not None and now - attempt.started > self.timeout:
                with about(attempt.about):
                    LOG.error("%s hangs on job %s; this process will be replaced", attempt.call.name, job.key)
                self.stuck = self._left_running = True
                self._settle_instead(attempt, job, attempt.hung(self.timeout))
                self.stop()

    def _settle_instead(self, attempt: Attempt, job: Job, outcome: Outcome) -> None:
        if attempt.give_up():
            self._forget(attempt)
            with about(attempt.about), contextlib.suppress(LeaseLost, _Owed):
                self._settle(job, attempt.call, outcome, [])  # taken away: nothing to settle; or given back later

    # -- one job -----------------------------------------------------------------------------------------------

    def _begin(self, job: Job, spawn: Spawn) -> Attempt | None:
        """Find out what a claimed job asks for, and start it. In the fetching thread: that keeps the order."""
        subject = About(job.key, self.queue_dir)
        with about(subject):
            return self._begin_with(job, lambda function: spawn(within(subject, function)))

    def _begin_with(self, job: Job, spawn: Spawn) -> Attempt | None:
        LOG.debug("Pulled message with key: %r off", job.key)
        try:
            call, message = self._call_for(job, spawn)
        except (Later, Dead) as outcome:
            failure = outcome
            spawn(lambda: self._settle_failure(job, None, failure))
            call = None
        except (LeaseLost, _Owed):
            call = None
        except Exception as error:  # a state store, a disk, a reload: not the job's fault
            LOG.error("Job %s of %s cannot be begun: %s", job.key, self.queue_dir, reason_of(error))
            failure = Later(f"it could not be begun: {reason_of(error)}", time.time() + RETRY_AFTER, counted=False)
            spawn(lambda: self._settle_failure(job, None, failure))
            call = None
        if call is None:
            return None
        holder: list[Attempt] = []

        def settle(outcome: Outcome, puts: list[Put]) -> None:
            try:
                self._settle(job, holder[0].call, outcome, puts)
            finally:
                self._forget(holder[0])

        attempt = Attempt(call, message, key=job.key, settle=settle)
        holder.append(attempt)
        with self._changed:
            self._running[attempt] = job
        attempt.start(spawn, here=False)
        return attempt

    def _call_for(self, job: Job, spawn: Spawn) -> tuple[Call | None, MailRequest]:
        """The one call that this job asks for; None when it is dealt with without one."""
        message = message_of(job, self.queue_dir)
        LOG.debug(
            "Message received from Peer: %r, From: %r, to To %r.",
            message.Peer,
            message.From,
            message.route_to,
        )
        if self.deliver is not None:
            return Call(self.deliver, message.To), message
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

    def _split(self, job: Job, calls: list[Call], left: list[MailRequest]) -> None:
        """Replace a job by one for each call of its plan (rule 2), and one for each part that nothing takes."""
        store = self.queue.backend
        puts = [Put(store, _bound(job, call, n)) for n, call in enumerate(calls, 1)]
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
        self._settle_job(job, DONE, puts)

    def _settle(self, job: Job, call: Call, outcome: Outcome, puts: list[Put]) -> None:
        if isinstance(outcome, Done):
            self._settle_job(job, outcome, puts)
        else:
            self._settle_failure(job, call, outcome)

    def _settle_failure(self, job: Job, call: Call | None, outcome: Later | Dead) -> None:
        """Keep what failed, bound to what it failed at."""
        if isinstance(outcome, Later) and not outcome.counted:
            self._settle_job(job, outcome)
            return
        LOG.error("Job %s of %s failed: %s", job.key, self.queue_dir, reason_of(outcome))
        store = self.queue.backend
        refused = outcome.__cause__ if call is not None and call.name is None else None
        if isinstance(refused, Undelivered) and refused.failures:
            self._keep_refused(job, refused.failures)
        elif call is not None and call.name is not None and job.target is None:
            self._settle_job(job, DONE, [Put(store, _failed(_bound(job, call, 1)), outcome)])
        else:
            self._settle_job(job, outcome)

    def _keep_refused(self, job: Job, failures: Sequence[Failure]) -> None:
        """Keep those for whom our own `deliver` has failed; the others have got the message."""
        if len(job.recipients) == 1:
            self._settle_job(job, failures[0].outcome())
            return
        kept = [_failed(_for_recipient(job, failure.recipient, n)) for n, failure in enumerate(failures, 1)]
        store = self.queue.backend
        puts = [Put(store, part, failure.outcome()) for part, failure in zip(kept, failures, strict=True)]
        self._settle_job(job, DONE, puts)

    def _settle_job(self, job: Job, outcome: Outcome, puts: list[Put] | None = None) -> None:
        """Raises LeaseLost, and _Owed: then the job comes again, and has to be routed as it was this time."""
        store = self.queue.backend
        try:
            store.settle(job, outcome, puts or [])
        except LeaseLost:
            raise
        except Exception as error:  # a full disk, most often: nothing was published, and giving back needs no space
            LOG.error("Job %s of %s could not be settled: %s", job.key, self.queue_dir, reason_of(error))
            self._owed.append((job, f"it could not be settled: {reason_of(error)}"))
            store.wake()  # the fetcher tries to give it back
            raise _Owed(job.key) from error

    def _give_back_owed(self) -> None:
        """Give back what could not be settled, uncounted; as often as it takes."""
        for job, reason in [self._owed.popleft() for _ in range(len(self._owed))]:
            try:
                self.queue.backend.settle(job, Later(reason, time.time() + RETRY_AFTER, counted=False))
            except LeaseLost:
                pass
            except Exception:  # still the same trouble, which was logged
                self._owed.append((job, reason))

    def _forget(self, attempt: Attempt) -> None:
        with self._changed:
            self._running.pop(attempt, None)
            self._changed.notify_all()


def _bound(job: Job, call: Call, number: int) -> Job:
    """The job that stands for one call of another job's plan."""
    child = _for_recipient(job, call.recipient, number)
    return replace(child, target=call.name, metadata={**job.metadata, "route": call.route})


def _part(job: Job, message: MailRequest, number: int) -> Job:
    """The job for those recipients of a job that nothing takes."""
    recipients = tuple(r for r in job.recipients if r.lower() in message.route_to) or tuple(message.route_to)
    return replace(_for_recipient(job, message.To, number), recipients=recipients)


def _for_recipient(job: Job, recipient: str, number: int) -> Job:
    key = derived_key(job.key, number)
    return replace(job, key=key, recipients=(recipient,), deliveries=0, due=None, claim="")


def _failed(job: Job) -> Job:
    return replace(job, attempts=job.attempts + 1)
