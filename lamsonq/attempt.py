"""One attempt: one call of a function on a message, from taking its conversation to settling what came of it.

    enter the conversation -> choose by its state -> run -> judge -> commit the state -> settle -> leave

Rules:

1. This pipeline is the only one. A receiver of any kind, and `Router.deliver`, differ only in their `settle`.
2. `settle(outcome, puts)` is called exactly once, unless the attempt was given up from outside; then never, and
   whatever the function still does is dropped. What an attempt without a job pushed is in its queue by then.
3. What the function pushed waits in `puts` until it has returned, and is dropped when it raises. A `Later` or `Dead`
   that it *returns* is its outcome too, but what it pushed leaves: an answer that says why not, for example.
4. No thread waits for its turn in a conversation within this process, nor for an `async def` function: the attempt
   lets its thread go, and goes on in another that `spawn` finds for it. For another process that has the conversation
   a thread waits, up to `patience` seconds.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import inspect
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import FrameType
from typing import Any

from lamsonq import about, clock, events
from lamsonq.errors import Dead, Later, LeaseLost, QueueError, SMTPError, Undelivered, reason_of
from lamsonq.jobs import DONE, Done, Job, Put, Result
from lamsonq.mail import MailRequest
from lamsonq.policy import DEFAULT, Policy
from lamsonq.state import Conversation, Conversations, StateStorage
from lamsonq.tally import TALLY
from lamsonq.threads import Together

LOG = logging.getLogger()
"""The root logger: the names before these lines are part of what users of Lamson grep for."""

ROUTING = logging.getLogger("routing")
"""Lamson's logger for a function that has crashed."""

Settle = Callable[[Result, list[Put]], None]
Spawn = Callable[[Callable[[], None]], object]

PATIENCE = 10.0
"""Seconds that somebody who waits for the answer lets a message wait for its conversation."""

ELSEWHERE_PATIENCE = 0.2
"""Seconds that an attempt waits for another process to leave the conversation."""

RESPONDS_WITHIN = 0.5
"""Seconds in which the loop of the async functions takes its next turn, unless one of them blocks it."""

_current: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar("lamsonq_attempt", default=None)


def current() -> Attempt | None:
    """The attempt that the calling code is part of, in a handler's own thread or task; None outside."""
    attempt = _current.get()
    return attempt if attempt is not None and (attempt.open or attempt.given_up) else None


@dataclass(frozen=True, slots=True)
class Stateful:
    """What a call that has a conversation needs of its router."""

    conversation: Conversation
    store: StateStorage
    conversations: Conversations
    locked: bool
    choose: Callable[[MailRequest, str], Call]
    """(message, job key) -> the call that the conversation's state asks for now."""
    next_states: Callable[[Call, MailRequest, object, Attempt], dict[Conversation, str]]
    """(call, message, what the function returned, attempt) -> the states to commit. Raises TypeError."""


@dataclass(frozen=True, slots=True)
class Call:
    """One function to be run on a message for one recipient: a line of a plan.

    `name` is the function's dotted name, None for a plain `deliver` that is no state function. `route` is the
    expression that matched.
    """

    function: Callable[..., Any]
    recipient: str
    name: str | None = None
    captures: Mapping[str, str] = field(default_factory=dict)
    route: str = ""
    stateful: Stateful | None = None
    policy: Policy = DEFAULT


class Attempt:
    """A call on its way. `key` is the job's: the same message after a crash has the same key. `job` is None for mail
    straight from SMTP. `touched` is told when the function asks for more time; it raises LeaseLost.

    `unkept` is for attempts that no queue settles: what the function pushed is put before `settle` is told, and this is
    what the attempt comes to where that fails. Without it, `settle` sees to the puts.
    """

    def __init__(
        self,
        call: Call,
        message: MailRequest,
        *,
        key: str,
        settle: Settle,
        patience: float = ELSEWHERE_PATIENCE,
        job: Job | None = None,
        touched: Callable[[], object] = lambda: None,
        unkept: type[Later] | None = None,
    ) -> None:
        self.job = job
        self.call = call
        self.message = message
        self.key = key
        self.open = True
        self.given_up = False
        self.started: float | None = None
        """When the function began, by the monotonic clock; None while it waits for its conversation."""
        self.about = about.current().for_call(call.name, call.recipient)
        """What every line says that is logged on the way."""
        self.states: dict[Conversation, str] = {}
        self.outer = current()
        self._touched = touched
        self._puts: list[Put] = []
        self._afterwards: list[Callable[[], object]] = []
        self._otherwise: list[Callable[[], object]] = []
        self._settle = settle
        self._unkept = unkept
        self._patience = patience
        self._once = threading.Lock()
        self._entered: Stateful | None = None
        self._thread: int | None = None
        self._task: asyncio.Task[Any] | None = None
        self._awaited: object = None
        self._spawn: Spawn = _run_here
        self._together: Together[Attempt] | None = None
        self._outcome: Result = DONE
        self._leaving: list[Put] = []
        """Those of the puts that leave with the outcome."""
        self._error: BaseException | None = None
        """Why they could not be kept."""

    def put(self, put: Put) -> None:
        """Hold a job until this attempt succeeds. Raises LeaseLost when it was given up: what it does is dropped."""
        if self.given_up:
            raise LeaseLost(f"{self.call.name} took too long; this attempt was given up, and what it pushes is dropped")
        self._puts.append(put)

    def touch(self) -> None:
        """The function needs more time: its time-out begins anew. Raises LeaseLost when it was given up."""
        if not self.open:
            raise LeaseLost(f"{self.call.name} took too long; this attempt was given up")
        self._touched()
        if self.started is not None:
            self.started = time.monotonic()

    def excuse(self, seconds: float) -> None:
        """This process stood still for so long: that time is not the function's."""
        started = self.started
        if started is not None:
            self.started = min(started + seconds, time.monotonic())

    @property
    def awaits(self) -> bool:
        """Whether the function is an `async def` that holds no thread."""
        return self._awaited is not None

    def can_be_cancelled(self) -> bool:
        """Whether giving up stops it: it awaits, on a loop that nobody blocks."""
        return self._awaited is not None and _handler_loop().responds()

    def afterwards(self, act: Callable[[], object]) -> None:
        """Do this when the attempt has succeeded and is settled, or, inside another attempt, when that one has.

        For tidying up what the attempt has used: when the process dies before it, it is not done.
        """
        self._afterwards.append(act)

    def otherwise(self, act: Callable[[], object]) -> None:
        """Do this when the attempt, or one that it is inside of, ends without success: before that is settled, because
        whoever hears of it may come at once. Not when it is given up, or its process dies."""
        attempt: Attempt | None = self
        while attempt is not None:
            attempt._otherwise.append(act)
            attempt = attempt.outer

    @property
    def puts(self) -> list[Put]:
        return list(self._puts)

    def start(
        self, spawn: Spawn | None = None, *, here: bool = True, together: Together[Attempt] | None = None
    ) -> None:
        """Get in line in this thread, and run in it as far as it goes; the rest in threads that `spawn` provides.

        With `here=False` this thread only gets in line: who starts attempts one by one keeps their order. `together` is
        where it ends with others.
        """
        self._together = together
        threads = spawn or _run_here
        at = self.about  # not `self`, which would hold itself, and the message, until the garbage is collected
        self._spawn = lambda function: threads(about.within(at, function))
        with about.about(self.about):
            self._enter(_run_here if here else self._spawn)

    def give_up(self) -> bool:
        """Close the attempt from outside; False when it was settled already. Nothing is settled: the caller does."""
        if not self._close():
            return False
        self.given_up = True
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        stateful = self.call.stateful
        if self.started is None and stateful is not None:
            stateful.conversations.withdraw(stateful.conversation, self._resume)
        elif self._entered is not None and self.started is not None:
            # A function that hangs must not keep its sender out for ever: its result is dropped anyway.
            self._leave()
        return True

    def hung(self, seconds: float) -> Later | Dead:
        """What becomes of a function that did not return in time, with the place where it was: as its policy says, and
        dead without one.

        An `async def` function that only waits for its turn on the loop, because another one blocks that, is not at
        fault: later, uncounted.
        """
        if self._awaited is not None and _handler_loop().is_blocked_by_another(self._task):
            return Later("another async function blocks the event loop", counted=False)
        reason = f"{self.call.name or 'deliver'} did not return within {seconds:g} seconds"
        where = f"Where it was:\n{''.join(self._where())}"
        if self.call.policy is DEFAULT:
            dead = Dead(reason)
            dead.add_note(where)
            return dead
        error = TimeoutError(reason)
        error.add_note(where)
        return self._judge(error)

    def _judge(self, error: BaseException) -> Later | Dead:
        job = self.job
        failures, received = (job.attempts, job.received) if job is not None else (0, 0.0)
        return self.call.policy.judge(error, failures, received, clock.now())

    def _where(self) -> list[str]:
        thread = self._thread
        if self._task is not None and _handler_loop().runs(self._task):
            thread = _handler_loop().thread.ident
        if (running := _frame_of(thread)) is not None:
            return traceback.format_stack(running)
        lines: list[str] = []
        waiting = self._awaited
        while (frame := getattr(waiting, "cr_frame", None)) is not None:
            lines += traceback.format_stack(frame, limit=1)
            waiting = getattr(waiting, "cr_await", None)
        return lines

    def _enter(self, run: Spawn) -> None:
        stateful = self.call.stateful
        if stateful is None or not stateful.locked or self._is_inside(stateful.conversation):
            run(self._choose)
        elif stateful.conversations.enter(stateful.conversation, self._resume):
            run(self._turn)

    def _is_inside(self, conversation: Conversation) -> bool:
        """Whether a function that has this conversation is delivering to it itself."""
        outer = self.outer
        while outer is not None:
            if outer._entered is not None and outer._entered.conversation == conversation:
                return True
            outer = outer.outer
        return False

    def _resume(self) -> None:
        self._spawn(self._turn)

    def _turn(self) -> None:
        """The conversation is ours within this process; now the other processes."""
        stateful = self.call.stateful
        assert stateful is not None
        self._entered = stateful
        if not self.open:
            self._leave()
            return
        give_up_at = time.monotonic() + self._patience
        try:
            while not stateful.conversations.lock(stateful.conversation):
                if time.monotonic() >= give_up_at:
                    self._finish(Later("the conversation is busy in another process", clock.now() + 1, counted=False))
                    return
                time.sleep(0.005)  # fcntl(2) has no wait with a time limit
        except OSError as error:  # no descriptor, no space: this machine is short of something just now
            self._finish(_later_for(error))
            return
        self._choose()

    def _choose(self) -> None:
        stateful = self.call.stateful
        if stateful is not None:
            try:
                chosen = stateful.choose(self.message, self.key)
            except (Later, Dead) as outcome:
                self._finish(outcome)
                return
            except Exception as error:  # a state store that fails is a failure of this attempt
                self._finish(_later_for(error))
                return
            stay = self._may_run(chosen, stateful.conversation)
            self.call = chosen
            self.about.handler, self.about.recipient = chosen.name or "", chosen.recipient
            if not stay:
                self._leave()
                self._enter(_run_here)
                return
        self._run()

    def _may_run(self, chosen: Call, conversation: Conversation) -> bool:
        """Whether what was chosen runs under the lock that we have, if any; else it has to enter its own."""
        wanted = chosen.stateful
        if wanted is None or wanted.conversation != conversation:
            return False
        return self._entered is not None or not wanted.locked or self._is_inside(conversation)

    def _run(self) -> None:
        if not self.open:
            self._leave()
            return
        context = contextvars.copy_context()
        context.run(_current.set, self)
        self._thread = threading.get_ident()
        self.started = time.monotonic()
        try:
            if self.job is not None and self.job.metadata:  # anybody's code: its time is the function's
                context.run(events.consume, self.job.metadata)
            value = context.run(self.call.function, self.message, **self.call.captures)
        except BaseException as error:  # SystemExit and the like are a handler's failure too, not the server's end
            self._raised(error)
            return
        finally:
            self._thread = None
        if value is not None and inspect.isawaitable(value):
            self._await(value, context)
        else:
            self._returned(value)

    def _await(self, value: Awaitable[Any], context: contextvars.Context) -> None:
        loop = _handler_loop()
        if threading.current_thread() is loop.thread:
            if inspect.iscoroutine(value):
                value.close()
            self._raised(RuntimeError("an async function delivers to another: use await asyncio.to_thread(...)"))
            return
        self._awaited = value
        loop.run(self, value, context)

    def _async_done(self, task: asyncio.Task[Any]) -> None:
        self._task = None  # its context holds this attempt

        def judge() -> None:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                self._raised(error)
            else:
                self._returned(task.result())

        self._spawn(judge)

    def _returned(self, value: object) -> None:
        if isinstance(value, type) and issubclass(value, Later | Dead):
            value = value()  # `return Dead`, as `raise Dead` is allowed
        if isinstance(value, Later | Dead):
            self._finish(self._judge(value), keep=True)
            return
        stateful = self.call.stateful
        if stateful is not None:
            try:
                self.states |= stateful.next_states(self.call, self.message, value, self)
            except Exception as error:  # nonsense for a return value is the function's failure
                self._raised(error)
                return
        self._finish(DONE)

    def _raised(self, error: BaseException) -> None:
        outcome = self._judge(error)
        self.states.clear()
        stateful = self.call.stateful
        if stateful is not None and not isinstance(error, Later | Dead | SMTPError | Undelivered):
            self.states[stateful.conversation] = "ERROR"
        if self.open and self.call.name is not None and not isinstance(error, Later | SMTPError):
            ROUTING.error("!!! ERROR handling %s: %s", self.call.name, outcome.reason, exc_info=error)
        self._finish(outcome)

    def _finish(self, outcome: Result, *, keep: bool = False) -> None:
        if not self._close():
            self._leave()
            return
        self._outcome = outcome
        self._leaving = self._puts if keep or isinstance(outcome, Done) else []
        if self._together is not None and self.outer is None and (self.states or self._leaving):
            self._together.submit(self)
        else:
            end([self])

    def _tell(self) -> bool:
        """Whether the attempt is settled."""
        outcome = self._outcome
        try:
            if not isinstance(outcome, Done):
                self._act(self._otherwise)
            try:
                self._settle(outcome, self._leaving)
            except BaseException:
                self._act(self._otherwise)
                raise
            if self._error is not None:
                raise self._error
        except LeaseLost:
            LOG.warning("job %s was taken away while it was handled; this attempt's result is dropped", self.key)
            return False
        except QueueError as error:  # it says in a line what to do; thousands of tracebacks would fill the disk
            LOG.error("job %s could not be settled: %s", self.key, error)
            return False
        except BaseException:  # the settler has answered for itself; others are to be settled yet
            LOG.exception("job %s could not be settled", self.key)
            return False
        if self.outer is None and (not isinstance(outcome, Later) or outcome.counted):
            TALLY.count(isinstance(outcome, Done))
        return True

    def _depart(self) -> None:
        if isinstance(self._outcome, Done):
            if self.call.name is not None:
                self._say_handled(self.call.name)
            self._tidy_up()

    def _say_handled(self, name: str) -> None:
        if self.call.recipient:
            LOG.debug("Message to %s was handled by %s", self.call.recipient, name)
        else:  # a deferred call is to nobody
            LOG.debug("Job %s was handled by %s", self.key, name)

    def _tidy_up(self) -> None:
        if self.outer is not None and self.outer.open:
            self.outer._afterwards += self._afterwards
            return
        self._act(self._afterwards)

    def _act(self, acts: Iterable[Callable[[], object]]) -> None:
        for act in acts:
            try:
                act()
            except Exception:  # any code: the message is dealt with all the same
                LOG.exception("after %s had ended", self.call.name)

    def _could_not_keep(self, error: BaseException) -> None:
        assert self._unkept is not None
        self._outcome = self._unkept(f"what the handler pushed could not be kept: {reason_of(error)}")
        self._outcome.__cause__ = self._error = error

    def _keep_nothing(self, outcome: Later) -> None:
        """Its state could not be kept: it is to be tried again, and nothing of it leaves."""
        if isinstance(self._outcome, Done):
            self._leaving = []
        if not isinstance(self._outcome, Dead):
            self._outcome = outcome
        self.states.clear()

    def _close(self) -> bool:
        with self._once:
            was_open, self.open = self.open, False
            return was_open

    def _leave(self) -> None:
        with self._once:
            entered, self._entered = self._entered, None
        if entered is not None:
            entered.conversations.leave(entered.conversation)


def run_here(attempt: Callable[[Settle], Attempt]) -> Result:
    """Run the attempt that is to be settled so, in this thread to its end; what it came to."""
    outcomes: list[Result] = []
    steps: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def tell(outcome: Result, _puts: list[Put]) -> None:
        outcomes.append(outcome)
        steps.put(outcomes.copy)  # nothing to do, but to wake up

    attempt(tell).start(steps.put)
    while not outcomes:
        steps.get()()  # what has to go on after a wait goes on in this thread
    return outcomes[0]


def collected(deliver: Callable[[MailRequest], object], message: MailRequest) -> list[Put]:
    """What `deliver` pushes of this message, for who settles it with something else. Raises what `deliver` raises."""
    collecting = Attempt(Call(deliver, message.To), message, key="", settle=lambda *_: None)
    context = contextvars.copy_context()
    context.run(_current.set, collecting)
    context.run(deliver, message)
    return collecting.puts


def end(attempts: Sequence[Attempt]) -> None:
    """End attempts whose functions have returned: keep their states, then what they pushed (or undo the states), then
    tell what has become of them. Each fails alone."""
    try:
        if changing := [attempt for attempt in attempts if attempt.states]:
            _commit_states(changing)
        if leaving := [attempt for attempt in attempts if attempt._leaving and attempt._unkept is not None]:
            _publish(leaving)
        if undone := [attempt for attempt in attempts if attempt.states and attempt._error is not None]:
            _undo_states(undone)
        settled = []
        for attempt in attempts:
            with about.about(attempt.about):
                if attempt._tell():
                    settled.append(attempt)
        if changed := [attempt for attempt in settled if attempt.states]:
            _forget_states(changed)
        for attempt in settled:
            with about.about(attempt.about):
                attempt._depart()
    finally:
        for attempt in attempts:
            attempt._leave()


def _by_store(attempts: Iterable[Attempt]) -> Iterable[tuple[StateStorage, list[Attempt]]]:
    of: dict[int, tuple[StateStorage, list[Attempt]]] = {}
    for attempt in attempts:
        if attempt.call.stateful is not None:
            store = attempt.call.stateful.store
            of.setdefault(id(store), (store, []))[1].append(attempt)
    return of.values()


def _commit_states(attempts: Sequence[Attempt]) -> None:
    for store, own in _by_store(attempts):
        try:
            store.commit_all([(attempt.states, attempt.key) for attempt in own])
        except BaseException as error:  # any store
            if len(own) > 1:  # one of them alone may be at fault
                for attempt in own:
                    _commit_states([attempt])
                continue
            own[0]._keep_nothing(_later_for(error))


def _undo_states(attempts: Sequence[Attempt]) -> None:
    """What they pushed could not be kept, so they come to nothing."""
    for attempt in attempts:
        assert attempt.call.stateful is not None
        try:
            attempt.call.stateful.store.undo(attempt.states, attempt.key)
        except BaseException:  # the same words again still find what these found
            LOG.exception("%s: its conversation could not be put back", attempt.key)
        attempt.states.clear()


def _forget_states(attempts: Sequence[Attempt]) -> None:
    for store, own in _by_store(attempts):
        try:
            store.forget_all([(attempt.states, attempt.key) for attempt in own])
        except BaseException:  # they are settled all the same: it only stays remembered
            LOG.exception("%s could not be forgotten", ", ".join(attempt.key for attempt in own))


def _publish(attempts: Sequence[Attempt]) -> None:
    if len(attempts) == 1:
        try:
            publish(attempts[0]._leaving)
        except BaseException as error:  # any store: what was not kept was not done
            attempts[0]._could_not_keep(error)
        return
    shares = [(attempt, put) for attempt in attempts for put in attempt._leaving]
    for store in {id(put.store): put.store for _, put in shares}.values():
        own: dict[Attempt, list[Put]] = {}
        for attempt, put in shares:
            if put.store is store and attempt._error is None:
                own.setdefault(attempt, []).append(put)
        _publish_shares(own)


def _publish_shares(shares: Mapping[Attempt, list[Put]]) -> None:
    """Those of one store: one that cannot be put takes no other with it."""
    try:
        _put([put for share in shares.values() for put in share])
    except BaseException as error:
        for attempt, share in shares.items():
            if len(shares) > 1:
                _publish_shares({attempt: share})
            else:
                attempt._could_not_keep(error)


def publish(puts: Iterable[Put]) -> None:
    """Put what an attempt left behind into its stores, where there is no job to settle it with.

    Inside another attempt, it leaves with that one.
    """
    outer = current()
    if outer is not None:
        for put in puts:
            outer.put(put)
        return
    by_store: dict[int, list[Put]] = {}
    for put in puts:
        by_store.setdefault(id(put.store), []).append(put)
    for of_one_store in by_store.values():
        _put(of_one_store)


def _put(puts: Sequence[Put]) -> None:
    """All of one store."""
    if puts:
        events.tell_puts(puts, puts[0].store.put(puts))


def key_of(message: MailRequest, call: Call) -> str:
    """What names an attempt that has no job: the same message to the same recipient, sent again, has the same key.

    "" for a call without a conversation, which nothing has to be remembered of.
    """
    if call.stateful is None:
        return ""
    digest = hashlib.sha256(repr((message.From, call.recipient)).encode("utf-8", "surrogatepass"))
    digest.update(message.to_bytes())
    return digest.hexdigest()


def _later_for(error: BaseException) -> Later:
    outcome = Later(f"the conversation's state could not be read or kept: {error}")
    outcome.__cause__ = error
    return outcome


_collector = threading.Lock()


def _frame_of(thread: int | None) -> FrameType | None:
    """What this thread is at, by its ident; None when it has ended.

    The garbage has to wait: in CPython 3.11 whoever collects a thread-local while the frames are listed waits for
    himself, and with him the whole process (gh-106883).
    """
    with _collector:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(thread or -1)
        finally:
            if collects:
                gc.enable()


def _run_here(function: Callable[[], None]) -> None:
    function()


class _HandlerLoop:
    """The one event loop of this process on which `async def` functions run, in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="lamsonq-async", daemon=True)
        self.thread.start()

    def runs(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether this very task is executing now, not waiting."""
        return task is not None and asyncio.current_task(self.loop) is task

    def is_blocked_by_another(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether some other task executes and does not let go, so that this one cannot."""
        return not self.responds() and asyncio.current_task(self.loop) not in (None, task)

    def responds(self) -> bool:
        """Whether tasks come and go on the loop."""
        turn = threading.Event()
        self.loop.call_soon_threadsafe(turn.set)
        return turn.wait(RESPONDS_WITHIN)

    def run(self, attempt: Attempt, awaitable: Awaitable[Any], context: contextvars.Context) -> None:
        async def await_it() -> Any:
            try:
                return await awaitable
            except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the loop, and all others with it
                raise RuntimeError(f"an async function raised {error!r}") from error

        def begin() -> None:
            if not attempt.open:
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
                return
            task = self.loop.create_task(await_it(), context=context)
            attempt._task = task
            task.add_done_callback(attempt._async_done)

        self.loop.call_soon_threadsafe(begin)


_loops: dict[int, _HandlerLoop] = {}
_loops_lock = threading.Lock()


def _handler_loop() -> _HandlerLoop:
    with _loops_lock:
        pid = os.getpid()  # a forked child has no thread of its parent's loop
        if pid not in _loops or not _loops[pid].thread.is_alive():
            _loops[pid] = _HandlerLoop()
        return _loops[pid]
