"""From the last dot of a message to the reply that answers for it.

Rules:

1. 250 is a promise. It is said when every function that the message asks for has finished, or when what failed is
   durably kept, bound to the function that failed. In every other case the client is told 4xx or 5xx, and keeps it.
2. The event loop hands a message to a pool of threads and hears of the replies; in between it is not asked. In the
   pool calls run one after another. A call has a time limit in its function, and another one in the line for its
   conversation: one timer of the loop looks after all of them.
3. A reply never carries the text of an exception, only what a handler chose to say by SMTPError, Later or Dead.
4. A reply answers for a group of the message's recipients: over SMTP for all of them, over LMTP for one. What fails
   for one group is said or kept for that group alone, and its reply is written before a function of the groups behind
   it runs, which may end this process. Every call runs once, whoever asks for its outcome.
5. Where `deliver` is a queue's push there is no function to run: the message goes to `spool`, and shares its sync with
   those that come at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

from lamsonq import about, mail
from lamsonq.address import canonical
from lamsonq.attempt import PATIENCE, Attempt, Call, end, key_of
from lamsonq.content import Content, Spilled
from lamsonq.delivery import carried, reported_once
from lamsonq.errors import Dead, Failure, Later, QueueError, SMTPError, Undelivered, outcome_of, reason_of
from lamsonq.jobs import Done, Job, Put, Result
from lamsonq.keys import new_key as new_id
from lamsonq.queue import job_of, new_key, queue_of
from lamsonq.routing import RoutingBase, unplanned
from lamsonq.spool import Spool
from lamsonq.threads import Standstill, Threads, Together

LOG = logging.getLogger()
"""The root logger: the names before these lines are part of what users of Lamson grep for."""

LOOK_EVERY = 1.0
"""Seconds between two looks at what is under way, at most."""

Group = tuple[str, ...]
"""The recipients that one reply answers for, as routes see them: all of a message's, or one."""

Tell = Callable[[str], None]

Inspect = Callable[[mail.Envelope, bytes, str], tuple[mail.Envelope, bytes]]
"""From the envelope, the message and its id, what everybody sees of the two."""


class _Unkept(Later):
    """Nothing was kept of a call that did not succeed: the client must send the message again."""


class Committer:
    """Takes messages for one receiver: to `deliver` if there is one, else to the router.

    `pool` runs the functions, `timeout` is how many seconds one may take, `on_hang` is told when one takes longer.
    `inspect` completes the envelope of a message with this id before anybody sees it, in a thread of `inspecting`.
    `on_handled` is told a message and those of its recipients for whom every function has finished.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: Threads,
        router: RoutingBase,
        deliver: Callable[[mail.MailRequest], object] | None,
        timeout: float,
        on_hang: Callable[[], None],
        inspect: Inspect | None = None,
        inspecting: Executor | None = None,
        on_handled: Callable[[mail.MailRequest, Sequence[str]], None] | None = None,
    ) -> None:
        self.loop = loop
        self.pool = pool
        self.router = router
        self.deliver = deliver
        self.timeout = timeout
        self.on_hang = on_hang
        self.inspect = inspect
        self.inspecting = inspecting
        self.on_handled = on_handled
        self.open: set[_Commit] = set()
        """The messages that are not answered for yet."""
        self.running: set[_Run] = set()
        queue = queue_of(deliver)
        self.spool = None if queue is None else Spool(queue)
        self.together: Together[Attempt] = Together(end)
        self._standstill = Standstill()
        self._looks: asyncio.TimerHandle | None = None
        self._acts: deque[Callable[[], None]] = deque()
        self._is_told = False

    def commit(self, envelope: mail.Envelope, content: Content, groups: Sequence[Group], tell: Tell) -> None:
        """Take a message; `tell` gets the reply to each group, one after another, as soon as it is known.

        A group that is named twice gets the same reply twice. From the loop, where `tell` is called, too.
        """
        commit = _Commit(self, envelope, content, groups, tell)
        self.open.add(commit)
        if self._looks is None:
            self._looks = self.loop.call_later(min(self.timeout, LOOK_EVERY), self._look)
        commit.begin()

    def give_up(self) -> None:
        """Drop whatever the calls that still run will come to. Their clients were told nothing, and come again."""
        for run in list(self.running):
            run.give_up()

    def close(self) -> None:
        """Nothing more will be committed."""
        if self._looks is not None:
            self._looks.cancel()
        if self.spool is not None:
            self.spool.close()

    def spawn(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the receiver has stopped: nobody waits for this any more
            self.pool.submit(function)

    def on_loop(self, act: Callable[[], None]) -> None:
        """From any thread; what comes at the same time wakes the loop once."""
        self._acts.append(act)
        if not self._is_told:
            self._is_told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for this any more
                self.loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        self._is_told = False  # first: what is told from here on wakes the loop again
        while self._acts:
            act = self._acts.popleft()
            try:
                act()
            except Exception:  # a fault of one session is not the others'
                LOG.exception("A reply could not be told")

    def _look(self) -> None:
        """Rule 2: end what takes too long."""
        still = self._standstill.seconds()
        for run in list(self.running) if still else ():
            run.excuse(still)
        left = [LOOK_EVERY]
        for run in list(self.running):
            left.append(run.time_left())
            if left[-1] <= 0:
                try:
                    run.overdue()
                except Exception:  # one that cannot be ended does not keep the others
                    LOG.exception("%s could not be ended", run.call.name or "deliver")
        if self.together.hangs(self.timeout) or (self.spool is not None and self.spool.hangs(self.timeout)):
            LOG.error("Keeping messages takes longer than %g seconds; this process will be replaced", self.timeout)
            self.on_hang()
        self._looks = self.loop.call_later(max(min(left), 0.01), self._look) if self.open else None


class _Commit:
    """One message on its way to its replies."""

    def __init__(
        self, committer: Committer, envelope: mail.Envelope, content: Content, groups: Sequence[Group], tell: Tell
    ) -> None:
        self.about = about.received(new_id())
        self._committer = committer
        self._envelope = envelope
        self._content = content
        self._tell = tell
        self._owed = deque(groups)
        self._known: dict[Group, str] = {}
        self._planned: dict[str, list[Call]] = {}
        self._message: mail.MailRequest

    def begin(self) -> None:
        committer = self._committer
        try:
            if committer.inspecting is not None:
                committer.inspecting.submit(self._guarded(self._inspect_first))
            elif committer.spool is not None:
                committer.spool.keep(self)
            else:
                committer.spawn(self._guarded(self._take))
        except Exception as error:  # no thread is to be had
            self._answer_all(trouble(error))

    def _inspect_first(self) -> None:
        """What takes its time, and asks others, is not to hold a thread of the functions."""
        self._message = self._made()
        if self._committer.spool is not None:
            self._committer.spool.keep(self)
        else:
            self._committer.spawn(self._guarded(self._take))

    def _made(self) -> mail.MailRequest:
        """The message as everybody sees it."""
        envelope, content = self._envelope, self._content
        if isinstance(content, Spilled):
            content = content.read()
        if self._committer.inspect is not None:
            envelope, content = self._committer.inspect(envelope, content, self.about.id)
        self._content = b""
        message = mail.MailRequest(envelope.peer, envelope.mail_from, envelope.rcpt_tos, content, envelope=envelope)
        LOG.debug("Message received from Peer: %r, From: %r, to To %r.", message.Peer, message.From, message.route_to)
        return message

    @property
    def message(self) -> mail.MailRequest:
        if not hasattr(self, "_message"):  # no cached_property: before Python 3.12 all messages would share its lock
            self._message = self._made()
        return self._message

    def _take(self) -> None:
        committer = self._committer
        message = self.message
        if committer.deliver is not None:
            self._run_all([Call(committer.deliver, message.To)], message, Attempt, self._handed_over)
            return
        for call in committer.router.plan(message):
            self._planned.setdefault(call.recipient, []).append(call)
        self._take_group()

    # -- the spool ---------------------------------------------------------------------------------------------

    def job(self) -> Job:
        """For the spool: what it keeps."""
        with about.about(self.about):
            return job_of(self.message, self.about.id)

    def kept(self) -> None:
        """By the spool: the job is safe."""
        self._answer_all(f"250 2.0.0 Ok: queued as {self.about.id}")

    def lost(self, error: BaseException) -> None:
        """By the spool: nothing was kept."""
        with about.about(self.about):
            if hasattr(self, "_message"):  # else it is its making that has failed
                self._say_failed(error)
            self._answer_all(_refusal(_unkept(error)) if isinstance(error, QueueError) else trouble(error))

    # -- one callable ------------------------------------------------------------------------------------------

    def _handed_over(self, runs: Sequence[_Run]) -> None:
        """What `deliver=` came to: nothing is kept here, so what fails is refused."""
        [run] = runs
        outcome = run.outcome
        if isinstance(outcome, Done):
            self._answer_all(_accepted([put.job.key for put in run.puts]))
            return
        self._say_failed(outcome)
        # What it pushed for those that it does not name is not kept: then nobody has got the message.
        failures = None if run.pushed else _shares(outcome, self.message.route_to)
        if failures is None:
            self._answer_all(_refusal(outcome))
            return
        replies: dict[Group, str] = {}
        for group in self._owed:
            own = [failure for recipient in group for failure in failures.get(recipient, ())]
            replies[group] = _refusal(outcome_of(Undelivered(own))) if own else _accepted(())
        self._answer(replies)

    def _say_failed(self, error: BaseException) -> None:
        message = self.message
        told = (message.Peer, message.From, message.route_to)
        line = "Exception while processing message from Peer: %r, From: %r, to To %r."
        if isinstance(error, QueueError):  # it says in a line what to do; thousands of tracebacks would fill the disk
            LOG.error(f"{line} %s", *told, error)
        else:
            LOG.error(line, *told, exc_info=error)

    # -- the router --------------------------------------------------------------------------------------------

    def _take_group(self) -> None:
        """Run what the routes ask for, for the first group that waits for its reply."""
        group = self._owed[0]
        part = self.message if len(group) > 1 else self.message.addressed(group[0])
        calls = [call for recipient in group for call in self._planned.get(recipient, ())]
        for left in unplanned(part, calls):
            self._committer.router.keep_undeliverable(left)
        self._run_all(calls, part, self._committer.router.attempt, partial(self._conclude, group, part))

    def _conclude(self, group: Group, part: mail.MailRequest, runs: Sequence[_Run]) -> None:
        """Keep what has failed, and answer."""
        failures = [(run.call, run.outcome) for run in runs if not isinstance(run.outcome, Done)]
        reply = _common_refusal(failures, len(runs))
        if reply is None:
            reply = _accepted(self._keep(part, failures))
            if self._committer.on_handled is not None:
                elsewhere = {call.recipient for call, _ in failures}.union(*(carried(run.puts) for run in runs))
                recipients = dict.fromkeys(run.call.recipient for run in runs)
                try:
                    self._committer.on_handled(part, [to for to in recipients if to not in elsewhere])
                except Exception:  # the message is handled all the same: were it refused, it would be handled twice
                    LOG.exception("What has been handled could not be reported")
        self._answer({group: reply})

    def _keep(self, message: mail.MailRequest, failures: Sequence[tuple[Call, Later | Dead]]) -> list[str]:
        """Keep each failed call as a job bound to its function; their keys. Raises what the store raises."""
        queue = self._committer.router.UNDELIVERABLE_QUEUE
        if not failures or queue is None:
            return []
        store = queue.backend
        jobs = reported_once([_bound(message, call, new_key(store)) for call, _ in failures])
        puts = [Put(store, job, outcome) for job, (_, outcome) in zip(jobs, failures, strict=True)]
        store.put(puts)
        keys = [put.job.key for put in puts]
        for key, (_, outcome) in zip(keys, failures, strict=True):
            LOG.error(
                "Failed to deliver message because of %r, put it in undeliverable queue with key %r",
                reason_of(outcome),
                key,
            )
        return keys

    # -- calls and replies -------------------------------------------------------------------------------------

    def _run_all(
        self,
        calls: Sequence[Call],
        message: mail.MailRequest,
        make: Callable[..., Attempt],
        then: Callable[[Sequence[_Run]], None],
    ) -> None:
        """Run these calls one after another, and go on with `then` in whatever thread the last one has ended."""
        runs: list[_Run] = []
        if calls:
            self._run_next(runs, calls, message, make, then)
        else:
            then(runs)

    def _run_next(
        self,
        runs: list[_Run],
        calls: Sequence[Call],
        message: mail.MailRequest,
        make: Callable[..., Attempt],
        then: Callable[[Sequence[_Run]], None],
    ) -> None:
        def ended() -> None:
            if len(runs) < len(calls):
                go_on = partial(self._run_next, runs, calls, message, make, then)
                self._committer.spawn(self._guarded(go_on))  # not from here: calls would be nested in each other
            else:
                self._guarded(partial(then, runs))()

        run = _Run(self._committer, calls[len(runs)], message, make, ended)
        runs.append(run)
        run.begin()

    def _guarded(self, step: Callable[[], None]) -> Callable[[], None]:
        """A step in whatever thread: what is logged in it is about this message, and if it fails the client is told."""

        def run() -> None:
            with about.about(self.about):
                try:
                    step()
                except BaseException as error:  # whatever it is, nothing was promised: the client keeps the message
                    self._answer_all(trouble(error), first=bool(self._planned))

        return run

    def _answer_all(self, reply: str, *, first: bool = False) -> None:
        """The reply to every group that waits for one; with `first` only to the one whose turn it is."""
        self._answer(dict.fromkeys([self._owed[0]] if first else self._owed, reply))

    def _answer(self, replies: Mapping[Group, str]) -> None:
        self._committer.on_loop(partial(self._told, replies))

    def _told(self, replies: Mapping[Group, str]) -> None:
        """On the loop: tell what is known, then see to who is next (rule 4)."""
        self._known |= replies
        with about.about(self.about):
            while self._owed and self._owed[0] in self._known:
                try:
                    self._tell(self._known[self._owed.popleft()])
                except Exception:  # a fault of the session's: the other groups are still gone on with
                    LOG.exception("A reply could not be told")
        if self._owed:
            self._committer.spawn(self._guarded(self._take_group))
        else:
            self._committer.open.discard(self)


class _Run:
    """One call under way. `make` is Attempt or what makes one; `ended` is called once, in whatever thread it ends.

    What has ended holds nothing that holds it, but for the traceback of one that has failed: a message is gone with its
    last reply, not when garbage is collected.
    """

    outcome: Result
    pushed = False
    """Whether the function has pushed anything, which is lost when it fails."""

    def __init__(
        self,
        committer: Committer,
        call: Call,
        message: mail.MailRequest,
        make: Callable[..., Attempt],
        ended: Callable[[], None],
    ) -> None:
        self.call = call
        self.puts: Sequence[Put] = ()
        self._committer = committer
        self._message = message
        self._make = make
        self._ended: Callable[[], None] | None = ended
        self._attempt: Attempt | None = None
        self._begun = time.monotonic()
        self._about = about.current()

    def begin(self) -> None:
        """In a thread of the pool."""
        self._committer.running.add(self)
        try:
            key = key_of(self._message, self.call)
            self._attempt = self._make(
                self.call, self._message, key=key, settle=self._settle, patience=PATIENCE, unkept=_Unkept
            )
            self._attempt.start(self._committer.spawn, together=self._committer.together)
        except Exception as error:  # a fault of ours: nothing was promised, so the client keeps the message
            LOG.exception("%s could not be run", self.call.name)
            self.give_up()  # it may still stand in the line for its conversation, or have it
            self._end(_Unkept(reason_of(error)))

    def give_up(self) -> None:
        attempt = self._attempt
        if attempt is not None:
            attempt.give_up()

    def _settle(self, outcome: Result, puts: Sequence[Put]) -> None:
        self.puts = puts
        self._end(outcome)

    def _end(self, outcome: Result) -> None:
        ended, self._ended = self._ended, None
        if ended is None:
            return
        self._committer.running.discard(self)
        if self._attempt is not None:
            self.call = self._attempt.call
            self.pushed = bool(self._attempt.puts)
            self._attempt = None
        self.outcome = outcome
        ended()

    def time_left(self) -> float:
        """Seconds until the next look at it; 0 or less when it is overdue: in a conversation for PATIENCE, in its
        function for the time-out."""
        attempt = self._attempt
        started = None if attempt is None else attempt.started
        if started is None:
            return self._begun + PATIENCE - time.monotonic()
        return started + self._committer.timeout - time.monotonic()

    def excuse(self, seconds: float) -> None:
        """This process stood still for so long."""
        if self._attempt is not None:
            self._attempt.excuse(seconds)

    def overdue(self) -> None:
        """End a call that takes too long, unless it has just been settled; from the loop."""
        attempt = self._attempt
        if attempt is None:
            return
        hung = attempt.hung(self._committer.timeout) if attempt.started is not None else None
        if not attempt.give_up():
            return
        if hung is None:
            busy = Later("the conversation is busy", counted=False)
            self._committer.spawn(about.within(self._about, partial(self._end, busy)))
            return
        LOG.error("%s hangs; this process will be replaced", attempt.call.name or "deliver")
        self._committer.on_hang()
        # Without a name nothing can be bound to it: the client has to keep the message.
        outcome = hung if attempt.call.name is not None else _Unkept()
        # In a thread of its own: those of the pool may all hang.
        threading.Thread(target=about.within(self._about, partial(self._end, outcome)), daemon=True).start()


def trouble(error: BaseException) -> str:
    """Log an error that the client must not see; the reply names the log line."""
    mark = secrets.token_hex(6)
    if isinstance(error, QueueError):  # as in `_say_failed`
        LOG.error("Session error %s: %s", mark, error)
    else:
        LOG.error("Session error %s", mark, exc_info=error)
    return f"451 4.3.0 Internal error {mark}, please try again later"


def _shares(outcome: Result, recipients: Sequence[str]) -> dict[str, list[Failure]] | None:
    """Who of these failed and why, if `deliver=` has named them; None when the outcome is everybody's."""
    cause = outcome.__cause__ if isinstance(outcome, Later | Dead) else None
    if not isinstance(cause, Undelivered) or str(outcome) != str(outcome_of(cause)):
        return None  # a handler's own words, for the message as a whole
    shares: dict[str, list[Failure]] = {}
    for failure in cause.failures:
        shares.setdefault(canonical(failure.recipient), []).append(failure)
    return shares if shares and shares.keys() <= set(recipients) else None


def _bound(message: mail.MailRequest, call: Call, key: str) -> Job:
    job = job_of(message.addressed(call.recipient), key)
    return replace(job, target=call.name, metadata={**job.metadata, "route": call.route}, attempts=1)


def _accepted(keys: Sequence[str]) -> str:
    """The reply names the id under which the message stands in the log and, if it was kept, in a queue."""
    return f"250 2.0.0 Ok: queued as {keys[0]}" if keys else f"250 2.0.0 Ok: handled as {about.current().id}"


def _common_refusal(failures: Sequence[tuple[Call, Later | Dead]], calls: int) -> str | None:
    """The one reply that says it all; None when each failure has to be kept for itself."""
    outcomes = [outcome for _, outcome in failures]
    if any(isinstance(outcome, _Unkept) or call.name is None for call, outcome in failures):
        return _refusal(Later())  # nothing can be bound to it: the client keeps all of it
    if not outcomes or len(outcomes) < calls:
        return None
    if all(isinstance(outcome, Later) and not outcome.counted for outcome in outcomes):
        return _refusal(outcomes[0])
    causes = [outcome.__cause__ for outcome in outcomes]
    kinds = {cause.code // 100 if isinstance(cause, SMTPError) else 0 for cause in causes}
    return _refusal(outcomes[0]) if kinds in ({4}, {5}) else None


def _refusal(outcome: Later | Dead) -> str:
    """What the client is told about a message that it keeps: in a handler's own words, or in none."""
    cause = outcome.__cause__
    if isinstance(cause, SMTPError) and 400 <= cause.code < 600:
        return f"{cause.code} {cause.message}"
    if isinstance(cause, Undelivered) and cause.failures:
        outcomes = [failure.outcome() for failure in cause.failures]
        return _refusal(next((o for o in outcomes if isinstance(o, Later)), outcomes[0]))
    crashed = cause is not None and outcome.reason == reason_of(cause)
    words = outcome.reason if cause is None else ""
    if isinstance(outcome, Dead) and not crashed:
        return f"554 5.3.0 {words or 'The message was refused'}"
    busy = isinstance(outcome, Later) and not outcome.counted
    return f"451 {'4.3.2' if busy else '4.3.0'} {words or 'The message was not taken, please try again later'}"


def _unkept(error: BaseException) -> _Unkept:
    unkept = _Unkept(f"the message could not be kept: {reason_of(error)}")
    unkept.__cause__ = error
    return unkept
