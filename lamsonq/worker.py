"""From queues to functions: reserve, attempt, settle.

Rules:

1. One thread per queue fetches, and all feed the same `workers` threads. Nothing is claimed that cannot start, except a
   few jobs that wait for their turn in a conversation.
2. Where several queues have something to do, they get threads in proportion to their weights: a queue has until a look
   at it finds nothing, and not only in the moments in which its fetcher asks for a thread.
3. A function that does not return in time is settled without it, and this process asks to be replaced. For how long
   the process itself stood still is not counted.
4. There is no scheduler: whoever works a queue puts the periodic jobs of that queue, each moment once (jobs.Tick).
5. TERM: first the claims no longer count as deliveries, so that a KILL which follows harms no job; then what runs is
   finished.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from queue import Empty, SimpleQueue

from lamsonq import clock, deferred, events
from lamsonq.about import About, about, within
from lamsonq.attempt import Attempt, Spawn
from lamsonq.delivery import Reports
from lamsonq.errors import Dead, Later, LeaseLost, QueueError, reason_of
from lamsonq.jobs import Job, Limit, Outcome, Put, Tick
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import Router, RoutingBase
from lamsonq.source import RETRY_AFTER, Owed, Source
from lamsonq.tally import TALLY
from lamsonq.threads import Standstill, Threads

LOG = logging.getLogger()
"""The root logger, as the tutorial shows these lines."""

TROUBLE_PAUSE = 1.0
"""Seconds between two tries while the queue cannot be used."""

IN_LINE = 100
"""How many claimed jobs may wait for their turn in a conversation."""

AWAITING = 1000
"""How many `async def` functions may be under way."""

RIVAL_PATIENCE = 0.05
"""Seconds that a free thread is kept for a queue whose turn it is and whose fetcher is just taking a job."""

FINISHED_PATIENCE = 0.005
"""Seconds for which what is finished may wait for company, to be settled."""

LOOK_EVERY = 5.0
"""Seconds between two looks for periodic functions that have been imported meanwhile."""

PURGE_EVERY = 600.0
"""Seconds between two looks for what has been kept long enough."""

QueueName = str | os.PathLike[str] | Queue


class QueueReceiver:
    """Works queues off. Many may work on one queue, in threads, processes or both.

    `queue_dir` names the queue (a folder or a URL) or is a Queue; or it is several, `["run/posts", "run/bulk"]`,
    also with weights, `{"run/posts": 3, "run/bulk": 1}`, or QueueReceivers, each with handlers of its own.

    - `sleep` is after how many seconds an idle receiver says so in the log again: a file that appears wakes it at once.
    - `size_limit` (bytes, 0 = none) and `oversize_dir` say what becomes of larger messages.
    - `workers` is how many functions run at once, `timeout` how many seconds one may take.
    - `deliver` takes each message instead of the router, as in `QueueReceiver("run/outbox", deliver=relay.deliver)`.
    - `bound=True` works only the jobs that are bound to a function which this process has.
    - `shutdown_after_number_of_empty_iterations` ends the receiver after so many rounds of `sleep` without a job, and
      `max_jobs` after so many jobs; a process that ends for the latter is replaced.
    - `limits` are kept between all processes that work the queue (see lamsonq.jobs.Limit).
    - `periodic=False` leaves it to other receivers to put the periodic jobs of these queues.
    - `reports` takes the report that a message was handled, where its sender asks for one (RFC 3461 NOTIFY=SUCCESS); it
      leaves with the job. `lamsonq start` gives a receiver without it the boot's `settings.relay`.
    - `archive` keeps what has succeeded for so many seconds, `keep_dead` the dead letters (None: until somebody
      deletes them).

    Source: Lamson's and Salmon's `server.QueueReceiver`; the empty iterations are pulpo-messaging's.
    """

    def __init__(
        self,
        queue_dir: QueueName | Iterable[QueueName | QueueReceiver] | Mapping[QueueName, int],
        sleep: float = 10,
        size_limit: int = 0,
        oversize_dir: str | None = None,
        workers: int = 10,
        *,
        deliver: Callable[[MailRequest], object] | None = None,
        router: RoutingBase = Router,
        timeout: float = 300.0,
        bound: bool = False,
        weight: int = 1,
        shutdown_after_number_of_empty_iterations: int | None = None,
        max_jobs: int | None = None,
        limits: Iterable[Limit] = (),
        archive: float | None = None,
        keep_dead: float | None = None,
        periodic: bool = True,
        reports: Reports | None = None,
    ) -> None:
        for name, number in (("workers", workers), ("weight", weight), ("max_jobs", max_jobs)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: a QueueReceiver needs at least one")
        if not sleep > 0:
            raise ValueError(f"sleep={sleep}: after how many seconds an idle receiver says so again")
        if deliver is not None and reports is not None:
            raise TypeError("a QueueReceiver takes deliver or reports: what `deliver` gets, it reports itself")
        self.deliver = deliver
        self.router = router
        self.bound = bound
        self.periodic = periodic
        limits = tuple(limits)
        if wrong := [limit for limit in limits if not isinstance(limit, Limit)]:
            raise TypeError(f"limits={wrong}: it takes Limit(...) records of lamsonq.jobs")
        self.sources: list[Source] = []
        for item, share in _shares(queue_dir, weight):
            if isinstance(item, QueueReceiver):
                self.sources += item._parts()
                continue
            if not isinstance(item, Queue):
                item = Queue(item, pop_limit=size_limit, oversize_dir=oversize_dir)
            elif size_limit or oversize_dir:
                raise TypeError("give pop_limit and oversize_dir to the Queue: this one is made already")
            self.sources.append(
                Source(
                    item,
                    deliver,
                    router,
                    bound=bound,
                    weight=share,
                    timeout=timeout,
                    limits=limits,
                    archive=archive,
                    keep_dead=keep_dead,
                    reports=reports,
                )
            )
        if not self.sources:
            raise ValueError("a QueueReceiver needs at least one queue")
        self.queue = self.sources[0].queue
        self.queue_dir = self.queue.dir
        self.sleep = sleep
        self.workers = workers
        self.timeout = timeout
        self.empty_rounds = shutdown_after_number_of_empty_iterations
        self.max_jobs = max_jobs
        self.stuck = False
        self.worn_out = False
        self.retired = False
        self._left_running = False
        self._stopping = threading.Event()
        self._drained = threading.Event()
        self._drained.set()
        self._give_back_at: float | None = None
        self._forgiven = False
        self._changed = threading.Condition()
        self._busy = 0
        self._granted = 0
        self._taken = 0
        self._asking: list[Source] = []
        self._hungry: set[Source] = set(self.sources)
        self._credit: dict[Source, float] = dict.fromkeys(self.sources, 0.0)
        self._idle: dict[Source, int] = dict.fromkeys(self.sources, 0)
        self._running: dict[Attempt, tuple[Source, Job]] = {}
        self._standstill = Standstill()
        self._in_trouble: set[Source] = set()
        self._purge_at = 0.0
        self._looked_at = 0.0
        self._next_tick: float | None = None
        self._ticked: dict[str, float] = {}
        self._failure: BaseException | None = None

    def _parts(self) -> list[Source]:
        """The queues of a receiver that is a part of another. Raises TypeError for what only the whole can have."""
        if self.max_jobs is not None or self.empty_rounds is not None:
            raise TypeError(
                "max_jobs and shutdown_after_number_of_empty_iterations are for a whole receiver: for the outer one"
            )
        return self.sources

    # -- the receiver's life -----------------------------------------------------------------------------------

    def bind(self) -> None:
        """Make the queues' folders, so that what cannot be used refuses the boot. Raises Refusal."""
        for source in self.sources:
            source.bind()

    def listening(self) -> str:
        queues = " and ".join(source.queue.dir for source in self.sources)
        return f"working the queue {queues}"

    def start(self, one_shot: bool = False) -> None:
        """Work the queues until `stop`; with `one_shot` until they are empty. Blocks."""
        self.bind()
        for source in self.sources:
            source.gathers = "batches" in source.queue.backend.capabilities
        self._drained.clear()
        for source in self.sources:
            LOG.info("Queue receiver started on queue dir %s", source.queue.dir)
        events.tell("start", None)
        pool = Threads(self.workers, "lamsonq-queue")
        try:
            if one_shot:
                self._work_off(pool)
            else:
                self._work(pool)
        finally:
            if self._left_running:
                pool.drop()
            else:
                pool.close(wait=True)
            events.tell("stop", None)
            self._drained.set()

    def run_once(self, *, here: bool = False) -> bool:
        """Take one job and see it through; False when none is ready. For loops of one's own.

        Its function runs in a thread of its own, as under `start`, so that it can be given up when its time is over;
        with `here` it runs in this thread, and a sync one takes the time that it takes. A message that asks for several
        calls is only split into them; the next calls run those.
        """
        self._put_periodic()
        for source in self.sources:
            jobs = source.reserve(1)
            for job in jobs:
                (self._see_through_here if here else self._see_through)(source, job)
            source.catch_up()
            if jobs:
                return True
        events.tell("empty", None)
        return False

    def _see_through(self, source: Source, job: Job) -> None:
        under_way = 0

        def spawn(function: Callable[[], None]) -> None:
            nonlocal under_way

            def step() -> None:
                nonlocal under_way
                self._in_thread(source, function)
                with self._changed:
                    under_way -= 1
                    self._changed.notify_all()

            with self._changed:
                self._busy += 1
                under_way += 1
            # A daemon: what hangs is not to keep the process.
            threading.Thread(target=step, name="lamsonq-queue", daemon=True).start()

        attempt = self._begin(source, job, spawn)
        while True:
            self._give_up_the_late()
            with self._changed:
                if attempt not in self._running and (not under_way or (attempt is not None and attempt.given_up)):
                    return
                self._changed.wait(0.2)

    def _see_through_here(self, source: Source, job: Job) -> None:
        steps: SimpleQueue[Callable[[], None]] = SimpleQueue()
        attempt = self._begin(source, job, steps.put)
        while attempt in self._running or not steps.empty():
            with contextlib.suppress(LeaseLost, Owed):  # dealt with where it was raised
                try:
                    steps.get(timeout=0.2)()
                except Empty:
                    self._give_up_the_late()

    def stop(self, grace: float = 30.0) -> None:
        """Take no more; finish what runs, and after `grace` seconds give the rest back uncounted. Returns at once."""
        self._give_back_at = time.monotonic() + grace
        self._stopping.set()
        for source in self.sources:
            source.queue.backend.wake()
        if self._changed.acquire(blocking=False):  # a signal handler may interrupt the thread that holds it
            self._changed.notify_all()
            self._changed.release()

    def join(self) -> None:
        """Wait until everything that was taken is settled."""
        self._drained.wait()

    def process_message(self, message: MailRequest) -> None:
        """Deliver one message that is in no queue. Raises Undelivered."""
        (self.deliver or self.router.deliver)(message)

    # -- the fetchers ------------------------------------------------------------------------------------------

    def _work(self, pool: Threads) -> None:
        fetchers = [threading.Thread(target=self._fetch_or_stop, args=(s, pool), daemon=True) for s in self.sources[1:]]
        for fetcher in fetchers:
            fetcher.start()
        try:
            self._fetch(self.sources[0], pool, chief=True)
        finally:
            self._stopping.set()
            for source in self.sources:
                source.queue.backend.wake()
        for fetcher in fetchers:
            fetcher.join()
        self._drain()
        if self._failure is not None:
            raise self._failure

    def _fetch_or_stop(self, source: Source, pool: Threads) -> None:
        try:
            self._fetch(source, pool, chief=False)
        except BaseException as error:  # raised again where `start` was called
            self._failure = error
            self.stop()

    def _fetch(self, source: Source, pool: Threads, *, chief: bool) -> None:
        """Keep the threads supplied from one queue; the chief also looks after what is under way."""
        idle_since: float | None = None
        while not self._stopping.is_set():
            if chief:
                self._look_after()
            source.catch_up()
            free = self._ask(source)
            if not free:
                continue
            quiet = self._quiet()
            jobs = self._reserve(source, free)
            for job in jobs:
                self._submit(source, pool, job)
            self._grant_back(source, free, found=bool(jobs))
            if jobs:
                idle_since, self._idle[source] = None, 0
                continue
            now = time.monotonic()
            if idle_since is None or now - idle_since >= self.sleep:
                if idle_since is not None:
                    self._idle[source] += 1
                if quiet and not self._stopping.is_set():
                    idle_since = now
                    events.tell("empty", None)
                    if self._has_waited_enough():
                        return
                    LOG.debug("Sleeping for %d seconds...", self.sleep)
            if not self._stopping.is_set():
                self._wait(source, self._patience(chief))

    def _work_off(self, pool: Threads) -> None:
        """Until all queues are empty and nothing is under way. Raises the QueueError of one that could not be used,
        when the others are."""
        broken: dict[Source, QueueError] = {}
        while not self._stopping.is_set():
            quiet, found = self._quiet(), False
            self._hungry.update(source for source in self.sources if source not in broken)
            while self._hungry and not self._stopping.is_set():
                self._look_after()
                source = self._first_of(self._rivals())
                source.catch_up()
                free = self._ask(source)
                found = found or not free
                if not free:
                    break
                jobs: list[Job] = []
                try:
                    jobs = source.reserve(free)
                except QueueError as error:
                    LOG.error("%s; the other queues are worked off", error)
                    broken[source] = error
                for job in jobs:
                    self._submit(source, pool, job)
                self._grant_back(source, free, found=bool(jobs))
                found = found or bool(jobs)
            if quiet and not found:
                break
            if not found:
                with self._changed:
                    if self._busy or self._running:
                        self._changed.wait(0.1)
        self._drain()
        for refusal in broken.values():
            raise refusal

    def _look_after(self) -> None:
        self._give_up_the_late()
        self._put_periodic()
        self._purge()

    def _reserve(self, source: Source, free: int) -> list[Job]:
        """Take jobs; while the queue cannot be used, wait and say so once."""
        try:
            jobs = source.reserve(free)
        except QueueError as error:
            self._bear(source, error)
            return []
        self._in_trouble.discard(source)
        return jobs

    def _wait(self, source: Source, seconds: float) -> None:
        """Sleep until something comes; a queue looks after its claims then, which may fail as taking jobs may."""
        try:
            source.wait(seconds)
        except QueueError as error:
            self._bear(source, error)

    def _bear(self, source: Source, error: QueueError) -> None:
        if source not in self._in_trouble:
            LOG.error("%s; trying on", error)
        self._in_trouble.add(source)
        self._stopping.wait(TROUBLE_PAUSE)

    def _quiet(self) -> bool:
        """Whether nothing is under way."""
        with self._changed:
            return not self._busy and not self._running and not any(source.behind for source in self.sources)

    def _patience(self, chief: bool) -> float:
        """Seconds to sleep while nothing comes: somebody must look at the clocks of functions that run."""
        patience = (
            min(self.sleep, 1.0) if self._running or any(source.behind for source in self.sources) else self.sleep
        )
        if chief and self._next_tick is not None:
            patience = min(patience, max(0.0, self._next_tick - clock.now()))
        return patience

    def _has_waited_enough(self) -> bool:
        """Whether this receiver is to end because nothing comes."""
        if self.empty_rounds is None or min(self._idle.values()) < self.empty_rounds:
            return False
        LOG.info("Nothing has come for %d rounds: ending.", self.empty_rounds)
        self.retired = True
        self.stop()
        return True

    # -- who gets the threads ----------------------------------------------------------------------------------

    def _ask(self, source: Source) -> int:
        """How many jobs of this queue may start now, until `_grant_back`; waits for a while when none may."""
        with self._changed:
            self._asking.append(source)
            try:
                if not self._wait_for_turn(source):
                    return 0
                granted = 1 if len(self._rivals()) > 1 else self._free()
                self._pay(source)
                self._granted += granted
                return granted
            finally:
                self._asking.remove(source)
                self._changed.notify_all()

    def _wait_for_turn(self, source: Source) -> bool:
        until = time.monotonic() + 1.0
        away_since: float | None = None
        while not self._stopping.is_set():
            now, wait = time.monotonic(), until
            if self._free() <= 0:
                away_since = None
            elif (first := self._first_of(self._rivals())) is source:
                return True
            elif first not in self._asking:
                away_since = away_since or now
                wait = away_since + RIVAL_PATIENCE
                if now >= wait:  # its store is slow: nobody waits for that
                    self._hungry.discard(first)
                    continue
            if now >= until:
                return False
            if source.finished:  # it is not to wait for long: if this process died it would run again
                wait = min(wait, now + FINISHED_PATIENCE)
                until = min(until, wait)
            self._changed.wait(wait - now)
        return False

    def _rivals(self) -> list[Source]:
        """Who has something to do, or may have."""
        return [source for source in self.sources if source in self._hungry or source in self._asking]

    def _free(self) -> int:
        awaiting = sum(attempt.awaits for attempt in self._running)
        in_line = len(self._running) - awaiting
        left = self.max_jobs - self._taken if self.max_jobs is not None else AWAITING
        return min(
            self.workers - self._busy - self._granted,
            self.workers + IN_LINE - in_line - self._granted,
            AWAITING - len(self._running) - self._granted,
            left,
        )

    def _first_of(self, rivals: Iterable[Source]) -> Source:
        """Smooth weighted round robin: the one with most credit."""
        return max(rivals, key=lambda rival: self._credit[rival] + rival.weight)

    def _pay(self, source: Source) -> None:
        rivals = self._rivals()
        for rival in rivals:
            self._credit[rival] += rival.weight
        self._credit[source] -= sum(rival.weight for rival in rivals)

    def _grant_back(self, source: Source, granted: int, *, found: bool) -> None:
        """The jobs have begun; a queue that had none is owed nothing, and owes nothing."""
        with self._changed:
            self._granted -= granted
            if found:
                self._hungry.add(source)
            else:
                self._hungry.discard(source)
                self._credit[source] = 0.0
            self._changed.notify_all()

    def _submit(self, source: Source, pool: Threads, job: Job) -> None:
        def spawn(function: Callable[[], None]) -> None:
            with self._changed:
                self._busy += 1
            pool.submit(partial(self._in_thread, source, function))

        self._taken += 1
        if self.max_jobs is not None and self._taken >= self.max_jobs and not self.worn_out:
            LOG.info("%d jobs are enough: this process ends and is replaced.", self.max_jobs)
            self.worn_out = True
            self.stop(float("inf"))
        self._begin(source, job, spawn)

    def _in_thread(self, source: Source, function: Callable[[], None]) -> None:
        try:
            function()
        except (LeaseLost, Owed):  # dealt with where it was raised
            pass
        except Exception:  # a thread of the pool must live on, whatever happens
            LOG.exception("Exception while working the queue %s", source.queue.dir)
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    # -- what is under way ---------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait for what runs; after the grace, and for what hangs, go without it."""
        if not self.worn_out:
            self._forgive()
        while True:
            self._give_up_the_late()
            for source in self.sources:
                source.catch_up()
            with self._changed:
                if not self._running and not any(source.behind for source in self.sources):
                    return
                if time.monotonic() >= (self._give_back_at or 0):
                    break
                self._changed.wait(0.2)
        for attempt, (source, job) in list(self._running.items()):
            if attempt.started is not None:
                self._left_running = True
                name = attempt.call.name or "deliver"
                LOG.warning("%s has not finished in time and is cut; job %s goes back into its queue", name, job.key)
            self._settle_instead(attempt, source, job, Later("the server was stopped", counted=False))

    def _forgive(self) -> None:
        for source in self.sources:
            try:
                source.queue.backend.forgive()
            except Exception as error:  # the jobs are counted as delivered then, no more
                LOG.warning("The claims on %s cannot be forgiven: %s", source.queue.dir, reason_of(error))

    def _give_up_the_late(self) -> None:
        still, now = self._standstill.seconds(), time.monotonic()
        for attempt in list(self._running) if still else ():
            attempt.excuse(still)
        for attempt, (source, job) in list(self._running.items()):
            timeout = attempt.call.policy.timeout or source.timeout
            if attempt.started is None or now - attempt.started <= timeout:
                continue
            cancelled = attempt.can_be_cancelled()  # a thread that hangs is lost
            with about(attempt.about):
                end = "it is cancelled" if cancelled else "this process will be replaced"
                LOG.error("%s hangs on job %s; %s", attempt.call.name, job.key, end)
            self._settle_instead(attempt, source, job, attempt.hung(timeout))
            if not cancelled:
                self.stuck = self._left_running = True
                TALLY.news()
                self.stop()

    def _settle_instead(self, attempt: Attempt, source: Source, job: Job, outcome: Outcome) -> None:
        if attempt.give_up():
            self._forget(attempt)
            with about(attempt.about), contextlib.suppress(LeaseLost, Owed):
                source.settle(job, attempt.call, outcome)  # taken away: nothing to settle; or given back later

    def _forget(self, attempt: Attempt) -> None:
        with self._changed:
            self._running.pop(attempt, None)
            self._changed.notify_all()

    # -- one job -----------------------------------------------------------------------------------------------

    def _begin(self, source: Source, job: Job, spawn: Spawn) -> Attempt | None:
        """Find out what a claimed job asks for, and start it. In the fetching thread: that keeps the order."""
        subject = About(job.key, source.queue.dir)
        with about(subject):
            return self._begin_with(source, job, lambda function: spawn(within(subject, function)))

    def _begin_with(self, source: Source, job: Job, spawn: Spawn) -> Attempt | None:
        LOG.debug("Pulled message with key: %r off", job.key)
        try:
            call, message = source.call_for(job, spawn)
        except (Later, Dead) as outcome:
            failure = outcome
            spawn(lambda: source.settle(job, None, failure))
            call = None
        except (LeaseLost, Owed):
            call = None
        except Exception as error:  # a state store, a disk, a reload: not the job's fault
            LOG.error("Job %s of %s cannot be begun: %s", job.key, source.queue.dir, reason_of(error))
            failure = Later(f"it could not be begun: {reason_of(error)}", clock.now() + RETRY_AFTER, counted=False)
            spawn(lambda: source.settle(job, None, failure))
            call = None
        if call is None:
            return None
        holder: list[Attempt] = []

        def settle(outcome: Outcome, puts: list[Put]) -> None:
            try:
                source.settle(job, holder[0].call, outcome, puts)
            finally:
                self._forget(holder[0])

        backend = source.queue.backend
        attempt = Attempt(call, message, key=job.key, settle=settle, job=job, touched=lambda: backend.touch(job))
        holder.append(attempt)
        with self._changed:
            self._running[attempt] = source, job
        attempt.start(spawn, here=False)
        return attempt

    # -- what nobody has asked for -------------------------------------------------------------------------------

    def _periodic(self) -> list[Callable[..., object]]:
        """The periodic functions whose queue is one of ours."""
        if self.bound or not self.periodic or not (found := deferred.periodic_functions()):
            return []
        ours = {id(source.queue.backend) for source in self.sources if source.deliver is None}
        return [function for function in found if id(deferred.queue_of_function(function).backend) in ours]

    def _put_periodic(self) -> None:
        """Put a job for each moment that has come, if nobody has."""
        now = clock.now()
        if self._looked_at <= now < min(self._next_tick or now + 1, self._looked_at + LOOK_EVERY):
            return
        since, self._looked_at = self._looked_at or now, now
        functions = self._periodic()
        if not functions:
            self._next_tick = None
            return
        from lamsonq import schedule  # when it is used: few servers have periodic functions, and it reads the time zone

        for function in functions:
            at = schedule.latest(deferred.schedule_of(function), since, now)
            if at is None or self._ticked.get(name := deferred.request_type_of(function)) == at:
                continue
            try:
                queue, job = deferred.queue_of_function(function), deferred.job_of_call(function)
                queue.enqueue(job, gate=Tick(f"periodic:{name}", at), now=True)
                self._ticked[name] = at
            except Exception as error:  # a ttl_seconds of the user's, say: the others' moments have come, too
                LOG.error("The periodic job %s could not be put: %s", name, reason_of(error))
        self._next_tick = min(schedule.next_after(deferred.schedule_of(f), now) for f in functions)

    def _purge(self) -> None:
        if time.monotonic() >= self._purge_at:
            self._purge_at = time.monotonic() + PURGE_EVERY
            for source in self.sources:
                source.purge()


def _shares(
    queues: QueueName | Iterable[QueueName | QueueReceiver] | Mapping[QueueName, int], weight: int
) -> Iterable[tuple[QueueName | QueueReceiver, int]]:
    if isinstance(queues, str | os.PathLike | Queue):
        return [(queues, weight)]
    if isinstance(queues, Mapping):
        for queue, share in queues.items():
            if isinstance(share, bool) or not isinstance(share, int) or share < 1:
                raise ValueError(f"{queue}: the weight {share!r} is no number from 1 on")
        return list(queues.items())
    return [(queue, weight) for queue in queues]
