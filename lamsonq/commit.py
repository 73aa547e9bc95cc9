"""From the last dot of a message to the reply that answers for it.

Rules:

1. 250 is a promise. It is said when every function that the message asks for has finished, or when what failed is
   durably kept, bound to the function that failed. In every other case the client is told 4xx or 5xx, and keeps it.
2. Calls run in the threads of a pool, one after another; the event loop only waits for them. A call has a time limit
   in its function, and another one in the line for its conversation.
3. A reply never carries the text of an exception, only what a handler chose to say by SMTPError, Later or Dead.
4. A reply answers for a group of the message's recipients: over SMTP for all of them, over LMTP for one. What fails
   for one group is said or kept for that group alone, and its reply does not wait for the groups behind it. Every
   call runs once, whoever asks for its outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, TypeVar

from lamsonq import about, mail
from lamsonq.address import canonical
from lamsonq.attempt import PATIENCE, Attempt, Call, key_of, publishing
from lamsonq.backends.maildir_names import new_key as new_id
from lamsonq.errors import Dead, Failure, Later, SMTPError, Undelivered, outcome_of, reason_of
from lamsonq.jobs import Done, Job, Put, Result
from lamsonq.queue import job_of, new_key
from lamsonq.routing import RoutingBase, unplanned

LOG = logging.getLogger()
"""The root logger: the names before these lines are part of what users of Lamson grep for."""

LOOK_EVERY = 1.0
"""Seconds between two looks at a call that waits for a thread or for its conversation."""

_T = TypeVar("_T")

Group = tuple[str, ...]
"""The recipients that one reply answers for, as routes see them: all of a message's, or one."""

Inspect = Callable[[mail.Envelope, bytes, str], Awaitable[tuple[mail.Envelope, bytes]]]

_Answer = Callable[[Group], Awaitable[str]]


class _Unkept(Later):
    """Nothing was kept of a call that did not succeed: the client must send the message again."""


class Committer:
    """Takes messages for one receiver: to `deliver` if there is one, else to the router.

    `pool` runs the functions, `timeout` is how many seconds one may take, `on_hang` is told when one takes longer.
    `inspect` completes the envelope of a message with this id before anybody sees it. `on_handled` is told a message
    and those of its recipients for whom every function has finished.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: Executor,
        router: RoutingBase,
        deliver: Callable[[mail.MailRequest], object] | None,
        timeout: float,
        on_hang: Callable[[], None],
        inspect: Inspect | None = None,
        on_handled: Callable[[mail.MailRequest, Sequence[str]], None] | None = None,
    ) -> None:
        self.loop = loop
        self.pool = pool
        self.router = router
        self.deliver = deliver
        self.timeout = timeout
        self.on_hang = on_hang
        self.inspect = inspect
        self.on_handled = on_handled
        self.running: set[_Run] = set()

    async def commit(
        self,
        envelope: mail.Envelope,
        content: bytes,
        groups: Sequence[Group],
        replies: Sequence[asyncio.Future[str]],
    ) -> None:
        """Take a message, and set the reply to each group as soon as it is known, one after another.

        A group that is named twice gets the same reply twice. Raises nothing but what cancels it.
        """
        with about.about(about.received(new_id())):
            await self._commit(envelope, content, groups, replies)

    async def _commit(
        self,
        envelope: mail.Envelope,
        content: bytes,
        groups: Sequence[Group],
        replies: Sequence[asyncio.Future[str]],
    ) -> None:
        try:
            answer = await self._take(envelope, content)
        except Exception as error:  # whatever it is, nothing was promised: the client keeps the message
            answer = _always(trouble(error))
        known: dict[Group, str] = {}
        for group, reply in zip(groups, replies, strict=True):
            if group not in known:
                known[group] = await _answered(answer, group)
            if not reply.done():  # else its client has gone: it was cancelled
                reply.set_result(known[group])
                await asyncio.sleep(0)  # the session hears of it,
                await asyncio.sleep(0)  # and writes it, before another function runs that may end this process

    async def _take(self, envelope: mail.Envelope, content: bytes) -> _Answer:
        """Begin with a message: what answers for each group of its recipients."""
        if self.inspect is not None:
            envelope, content = await self.inspect(envelope, content, about.current().id)
        message = mail.MailRequest(envelope.peer, envelope.mail_from, envelope.rcpt_tos, content, envelope=envelope)
        LOG.debug("Message received from Peer: %r, From: %r, to To %r.", message.Peer, message.From, message.route_to)
        if self.deliver is None:
            return await self._route(message)
        return await self._hand_over(message, self.deliver)

    def give_up(self) -> None:
        """Drop whatever the calls that still run will come to. Their clients were told nothing, and come again."""
        for run in list(self.running):
            run.give_up()

    async def _hand_over(self, message: mail.MailRequest, deliver: Callable[[mail.MailRequest], object]) -> _Answer:
        """Give the message to `deliver=`: nothing is kept here, so what fails is refused."""
        run = _Run(self, Call(deliver, message.To), message, Attempt)
        outcome = await run.outcome()
        if not isinstance(outcome, Done):
            LOG.error(
                "Exception while processing message from Peer: %r, From: %r, to To %r.",
                message.Peer,
                message.From,
                message.route_to,
                exc_info=outcome,
            )
        # What it pushed for those that it does not name is not kept: then nobody has got the message.
        failures = None if run.pushed else _shares(outcome, message.route_to)

        async def answer(group: Group) -> str:
            if isinstance(outcome, Done):
                return _accepted(run.keys)
            if failures is None:
                return _refusal(outcome)
            own = [failure for recipient in group for failure in failures.get(recipient, ())]
            return _refusal(outcome_of(Undelivered(own))) if own else _accepted(())

        return answer

    async def _route(self, message: mail.MailRequest) -> _Answer:
        """Plan what the routes ask for; it is run for one group after another."""
        calls: dict[str, list[Call]] = {}
        for call in await self._in_pool(self.router.plan, message):
            calls.setdefault(call.recipient, []).append(call)

        async def answer(group: Group) -> str:
            part = message if len(group) > 1 else message.addressed(group[0])
            return await self._run_or_keep(part, [call for recipient in group for call in calls.get(recipient, ())])

        return answer

    async def _run_or_keep(self, message: mail.MailRequest, calls: Sequence[Call]) -> str:
        """Run these calls, and keep what fails."""
        for left in unplanned(message, calls):
            await self._in_pool(self.router.keep_undeliverable, left)
        failures: list[tuple[Call, Later | Dead]] = []
        for call in calls:
            run = _Run(self, call, message, self.router.attempt)
            outcome = await run.outcome()
            if not isinstance(outcome, Done):
                failures.append((run.call, outcome))
        if reply := _common_refusal(failures, len(calls)):
            return reply
        keys = await self._in_pool(self._keep, message, failures)
        if self.on_handled is not None:
            kept = {call.recipient for call, _ in failures}
            self.on_handled(message, [to for to in dict.fromkeys(call.recipient for call in calls) if to not in kept])
        return _accepted(keys)

    def _keep(self, message: mail.MailRequest, failures: Sequence[tuple[Call, Later | Dead]]) -> list[str]:
        """Keep each failed call as a job bound to its function; their keys. Raises what the store raises."""
        queue = self.router.UNDELIVERABLE_QUEUE
        if not failures or queue is None:
            return []
        store = queue.backend
        puts = [Put(store, _bound(message, call, new_key(store)), outcome) for call, outcome in failures]
        store.put(puts)
        keys = [put.job.key for put in puts]
        for key, (_, outcome) in zip(keys, failures, strict=True):
            LOG.error(
                "Failed to deliver message because of %r, put it in undeliverable queue with key %r",
                reason_of(outcome),
                key,
            )
        return keys

    async def _in_pool(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run code that may take its time or be a user's own. Raises only Exception."""

        def run() -> _T:
            try:
                return function(*arguments)
            except (KeyboardInterrupt, SystemExit, StopIteration) as error:  # would end or confuse the loop
                raise RuntimeError(repr(error)) from error

        return await self.loop.run_in_executor(self.pool, about.within(about.current(), run))


class _Run:
    """One call under way, as the event loop sees it.

    `make` is Attempt or what makes one.
    """

    def __init__(
        self,
        committer: Committer,
        call: Call,
        message: mail.MailRequest,
        make: Callable[..., Attempt],
    ) -> None:
        self.call = call
        self.keys: list[str] = []
        self._committer = committer
        self._message = message
        self._make = make
        self._attempt: Attempt | None = None
        self._begun = 0.0
        self._about = about.current()
        self._settled: asyncio.Future[Result] = committer.loop.create_future()

    async def outcome(self) -> Result:
        """Run the call and wait for it: in a conversation for PATIENCE, in its function for the time-out."""
        self._committer.running.add(self)
        try:
            self._spawn(self._begin)
            while (left := self._time_left()) > 0:
                await asyncio.wait({self._settled}, timeout=left)
                if self._settled.done():
                    return self._settled.result()
            return self._overdue() or await self._settled
        finally:
            self._committer.running.discard(self)
            if self._attempt is not None:
                self.call = self._attempt.call

    @property
    def pushed(self) -> bool:
        """Whether the function pushed anything, which is lost when it fails."""
        return self._attempt is not None and bool(self._attempt.puts)

    def give_up(self) -> None:
        if self._attempt is not None:
            self._attempt.give_up()

    def _spawn(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the receiver has stopped: nobody waits for this any more
            self._committer.pool.submit(about.within(self._about, function))

    def _begin(self) -> None:
        """In a thread of the pool."""
        try:
            key = key_of(self._message, self.call)
            settle = publishing(self._tell, failed=_Unkept)
            attempt = self._make(self.call, self._message, key=key, settle=settle, patience=PATIENCE)
            self._begun = time.monotonic()
            self._attempt = attempt
            attempt.start(self._spawn)
        except Exception as error:  # a fault of ours: nothing was promised, so the client keeps the message
            LOG.exception("%s could not be run", self.call.name)
            self._tell(_Unkept(reason_of(error)))

    def _tell(self, outcome: Result, puts: Sequence[Put] = ()) -> None:
        self.keys = [put.job.key for put in puts]

        def settle() -> None:
            if not self._settled.done():
                self._settled.set_result(outcome)

        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for this any more
            self._committer.loop.call_soon_threadsafe(settle)

    def _time_left(self) -> float:
        """Seconds until the next look; 0 or less when it is overdue."""
        if self._attempt is None:
            return LOOK_EVERY  # it waits for a thread
        started = self._attempt.started
        if started is None:
            return min(self._begun + PATIENCE - time.monotonic(), LOOK_EVERY)
        return started + self._committer.timeout - time.monotonic()

    def _overdue(self) -> Result | None:
        """The outcome of a call that took too long; None when it has just been settled."""
        attempt = self._attempt
        assert attempt is not None
        hung = attempt.hung(self._committer.timeout) if attempt.started is not None else None
        if not attempt.give_up():
            return None
        if hung is None:
            return Later("the conversation is busy", counted=False)
        LOG.error("%s hangs; this process will be replaced", attempt.call.name or "deliver")
        self._committer.on_hang()
        # Without a name nothing can be bound to it: the client has to keep the message.
        return hung if attempt.call.name is not None else _Unkept()


def trouble(error: BaseException) -> str:
    """Log an error that the client must not see; the reply names the log line."""
    mark = secrets.token_hex(6)
    LOG.error("Session error %s", mark, exc_info=error)
    return f"451 4.3.0 Internal error {mark}, please try again later"


async def _answered(answer: _Answer, group: Group) -> str:
    try:
        return await answer(group)
    except Exception as error:  # nothing was promised to this group
        return trouble(error)


def _always(reply: str) -> _Answer:
    async def answer(_group: Group) -> str:
        return reply

    return answer


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
