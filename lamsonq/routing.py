"""From an address to a state function.

Rules:

1. Decorators only mark (marks.py); `Router.load` imports modules, resolves their routes into a new table, and swaps it
   in when all of them are good. A table never changes; who has one may go on using it.
2. `plan` says what a message asks for: for each recipient every stateless function whose route matches, and the first
   stateful one that is in state. It runs nothing. `deliver` runs a plan.
3. An expression matches the whole address, in any case. A `(name)` that neither the route nor `Router.defaults`
   defines fails the load, with file and line.
4. A state whose name is no state function of its module counts as START: the recorded ERROR too.
5. A conversation that moved to another module is no longer in its old one, until it is handed back; when nothing at
   all takes the message, the old one begins anew at START. One that moved to a queue's handlers goes to that queue.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lamsonq import clock
from lamsonq.address import canonical
from lamsonq.attempt import ELSEWHERE_PATIENCE, PATIENCE, Attempt, Call, Settle, Stateful, key_of, run_here
from lamsonq.errors import Dead, Failure, Later, Refusal, Undelivered, reason_of
from lamsonq.jobs import Done, Job, Put, Result
from lamsonq.mail import MailRequest
from lamsonq.marks import (
    MODULES,
    Marks,
    StateKeyGenerator,
    marks_of,
    nolocking,
    route,
    route_like,
    state_key_generator,
    stateless,
)
from lamsonq.modules import changed_at, load_handlers, reread
from lamsonq.policy import DEFAULT
from lamsonq.queue import Queue, job_of, new_key
from lamsonq.state import START, Conversation, Conversations, MemoryStorage, StateStorage
from lamsonq.table import Handler, Route, Table, build_table

__all__ = [
    "DEFAULT_STATE_KEY",
    "ROUTE_FIRST_STATE",
    "MemoryStorage",
    "Router",
    "RoutingBase",
    "StateStorage",
    "nolocking",
    "route",
    "route_like",
    "state_key_generator",
    "stateless",
]

LOG = logging.getLogger("routing")

ROUTE_FIRST_STATE = START
"""Lamson's name for the state of a sender of whom nothing is kept."""

Candidate = tuple[Handler, Route, dict[str, str]]
"""A stateful function whose route matches, with what the route captured."""

UNKNOWN_AFTER = 60.0
"""Seconds after which a job comes again whose function this process does not know: a deploy may bring it."""

CONVERSATION = "lamsonq.routing.CONVERSATION"
"""The target of a job that is bound to no function yet, but to the sender's conversation: to whichever stateful
function that asks for when the job is run."""

STEPS_AT_ONCE = 100_000
"""Steps of matching that are a moment: a third of a millisecond, on an address that is made to need them all."""

RELOAD_INTERVAL = 1.0
"""Seconds between two looks at the handlers' files, with `RELOAD = True`."""


class RoutingBase:
    """A router. `Router` is the process's own; make more for tests or for several receivers in one process.

    Settable attributes: `STATE_STORE` (a StateStorage), `UNDELIVERABLE_QUEUE` (a Queue or None), `RELOAD` (look for
    changed handler files), `LOG_EXCEPTIONS` (False lets errors of a reload through instead of logging them).
    """

    def __init__(self) -> None:
        self.table = Table()
        self.DEFAULT_CAPTURES: dict[str, str] = {}
        self.UNDELIVERABLE_QUEUE: Queue | None = None
        self.RELOAD = False
        self.LOG_EXCEPTIONS = True
        self.queues: dict[str, Queue] = {}
        self._names: list[str] = []
        self._direct: list[tuple[str, Callable[..., Any]]] = []
        self._lock = threading.RLock()
        self._next_look = 0.0
        self._seen: dict[str, float] = {}
        self.STATE_STORE = MemoryStorage()

    @property
    def STATE_STORE(self) -> StateStorage:
        """Where the states are; a new one may be set before the first message."""
        return self._store

    @STATE_STORE.setter
    def STATE_STORE(self, store: StateStorage) -> None:
        self._store = store
        self._conversations = Conversations(store.lock_file)

    # -- the table ---------------------------------------------------------------------------------------------

    @property
    def REGISTERED(self) -> dict[str, tuple[re.Pattern[str], list[Callable[..., Any]]]]:
        """Each resolved expression with its compiled form and its functions, as Lamson's."""
        return {e: (r.compiled, [h.function for h in r.handlers]) for e, r in self.table.routes.items()}

    @property
    def ORDER(self) -> list[str]:
        """The resolved expressions in the order in which they are tried."""
        return list(self.table.routes)

    @property
    def HANDLERS(self) -> dict[str, StateKeyGenerator]:
        """The loaded modules with their state key generators."""
        return {name: generator or DEFAULT_STATE_KEY for name, generator in self.table.modules.items()}

    def defaults(self, **captures: str) -> None:
        """What `(name)` stands for in every route that does not say so itself. Call it before `load`, which wants to
        know them all; a later call changes them."""
        with self._lock:
            self.DEFAULT_CAPTURES.update(captures)
            self.table = self._new_table()

    def load(self, handlers: Iterable[str]) -> None:
        """Import these modules and add their state functions, in order of definition.

        Raises UsageError when one cannot be imported and RouteError when a route is wrong; the table is then
        what it was.
        """
        with self._lock:
            before = list(self._names)
            for name in handlers:
                load_handlers(name)
                self._seen.setdefault(name, changed_at(name))
                if name not in self._names:
                    self._names.append(name)
            try:
                self.table = self._new_table()
            except BaseException:
                self._names = before
                raise

    def register_route(self, format: str, func: Callable[..., Any]) -> None:
        """Add one function under one regular expression, without a decorator and captures of its own."""
        with self._lock:
            self._direct.append((format, func))
            self.table = self._new_table()

    def hand_over(self, modules: Iterable[str], queue: Queue | str) -> None:
        """Say that these modules are the handlers of a queue that another process works: a conversation that moves to
        one of their functions goes there, with its messages, until it is handed back."""
        target = Queue(queue) if isinstance(queue, str) else queue
        self.queues.update(dict.fromkeys(modules, target))

    def clear_routes(self) -> None:
        """Forget all routes; `load` brings modules back. What `defaults` has been told stays, as in Lamson: the module
        that said it is not imported again."""
        with self._lock:
            self._names.clear()
            self._direct.clear()
            self.queues.clear()
            self.table = Table()

    def check(self) -> None:
        """See whether the states can be read, before mail is taken. Raises Refusal."""
        try:
            self.STATE_STORE.get("", "")
        except Refusal:
            raise
        except Exception as error:  # a store may be a user's own, over anything
            raise Refusal(f"the states cannot be read: {reason_of(error)}") from error

    def clear_states(self) -> None:
        """Put every sender back to START."""
        self.STATE_STORE.clear()

    def reload(self) -> None:
        """Read all handler modules anew. When one of them is broken all stay as they were, and the error is
        logged (or raised, with LOG_EXCEPTIONS off)."""
        with self._lock:
            try:
                with reread(self._names):
                    self.table = self._new_table()
            except (Exception, SystemExit) as error:  # whatever a module's body raises: the old handlers go on
                if not self.LOG_EXCEPTIONS:
                    raise
                LOG.error("ERROR RELOADING %r MODULE: %s", self._names, reason_of(error))

    def _new_table(self) -> Table:
        table = build_table(self._names, self.DEFAULT_CAPTURES)
        for expression, function in self._direct:
            table.register(expression, Handler(function, function.__module__, marks_of(function)), "register_route")
        return table

    # -- from a message to a plan ------------------------------------------------------------------------------

    def match(self, address: str) -> Iterator[tuple[list[Callable[..., Any]], dict[str, str]]]:
        """(functions, captures) of each route that matches this bare address, in order."""
        for route_, captures in self.table.matches(address):
            yield [handler.function for handler in route_.handlers], captures

    def takes(self, address: str) -> bool:
        """Whether any route's expression matches, whatever the states: for the answer at RCPT."""
        self.reload_if_changed()
        return any(True for _ in self.table.matches(canonical(address)))

    def takes_at_once(self, address: str) -> bool | None:
        """What `takes` says, where it is sure to say so in a moment; None where an expression may take its time on an
        address that somebody has made for it, or files have to be read anew."""
        if self.RELOAD or self.table.steps(canonical(address)) > STEPS_AT_ONCE:
            return None
        return self.takes(address)

    def plan(self, message: MailRequest) -> list[Call]:
        """The calls that this message asks for, recipient by recipient, in the order of the routes. Runs nothing."""
        self.reload_if_changed()
        table = self.table
        calls: list[Call] = []
        for recipient in message.route_to:
            calls += self._plan_for(table, message, recipient)
        return calls

    def _plan_for(self, table: Table, message: MailRequest, recipient: str) -> list[Call]:
        calls: list[Call] = []
        candidates: list[Candidate] = []
        at = 0
        for route_, captures in table.matches(recipient):
            LOG.debug("Matched %r against %s.", recipient, route_.expression)
            for handler in route_.handlers:
                if handler.marks.stateless:
                    calls.append(_call(handler, route_, captures, recipient))
                else:
                    at = at if candidates else len(calls)
                    candidates.append((handler, route_, captures))
        if candidates:
            own = message.addressed(recipient)
            calls.insert(at, self._choose(table, own, recipient, candidates) or self._nobody(own, candidates[0]))
        return calls

    def _nobody(self, message: MailRequest, candidate: Candidate) -> Call:
        """Routes match, but no function is in state: a call that looks once more with the conversation's lock held, and
        then says that the message is undeliverable."""
        conversation = self._conversation(candidate[0].module, message)
        stateful = None if conversation is None else self._stateful(conversation, locked=True)
        return Call(self._keep_or_die, message.To, stateful=stateful)

    def _keep_or_die(self, message: MailRequest) -> None:
        if not self.keep_undeliverable(message):
            raise Dead(f"no function that takes {message.To} is in the sender's state")

    def _choose(
        self,
        table: Table,
        message: MailRequest,
        recipient: str,
        candidates: Sequence[Candidate],
        key: str = "",
    ) -> Call | None:
        """The one stateful call: the first candidate that is in state."""
        away: list[Candidate] = []
        states: dict[str, str | None] = {}  # each is read once: it may change while we look
        for handler, route_, captures in candidates:
            if handler.module not in states:
                states[handler.module] = self._state(table, handler.module, message, key)
            state = states[handler.module]
            if state is None:
                queue = self._queue_of(handler.module, message)
                if queue is not None:
                    return Call(_pusher(queue), recipient)
                away.append((handler, route_, captures))
            elif state == handler.state:
                return self._stateful_call(handler, route_, captures, message, recipient)
        for handler, route_, captures in away:
            if handler.state == START:
                return self._stateful_call(handler, route_, captures, message, recipient)
        return None

    def _stateful_call(
        self, handler: Handler, route_: Route, captures: dict[str, str], message: MailRequest, recipient: str
    ) -> Call:
        conversation = self._conversation(handler.module, message)
        stateful = None
        if conversation is not None:
            stateful = self._stateful(conversation, locked=not handler.marks.nolocking)
        return _call(handler, route_, captures, recipient, stateful)

    def _stateful(self, conversation: Conversation, *, locked: bool) -> Stateful:
        return Stateful(conversation, self.STATE_STORE, self._conversations, locked, self._rechoose, self._next_states)

    def _rechoose(self, message: MailRequest, key: str) -> Call:
        """What the recipient's conversation asks for now that its lock is held."""
        return self._in_state_now(message, key) or Call(self._keep_or_die, message.To)

    def _in_state_now(self, message: MailRequest, key: str) -> Call | None:
        table = self.table
        return self._choose(table, message, message.To, self._stateful_candidates(table, message.To), key)

    def _stateful_candidates(self, table: Table, recipient: str) -> list[Candidate]:
        return [
            (handler, route_, captures)
            for route_, captures in table.matches(recipient)
            for handler in route_.handlers
            if not handler.marks.stateless
        ]

    # -- jobs that are bound to one function ---------------------------------------------------------------------

    def bound(self, job: Job, message: MailRequest) -> Call:
        """The call that a job with a target asks for.

        Raises Later (uncounted) when this process does not know the function, and Dead when no route leads there.
        """
        self.reload_if_changed()
        table = self.table
        assert job.target is not None
        handler = table.handlers.get(job.target)
        if handler is None:
            raise Later(f"no handler {job.target} in this process", clock.now() + UNKNOWN_AFTER, counted=False)
        found = [(r, captures) for r, captures in table.matches(message.To) if handler in r.handlers]
        if not found:
            raise Dead(f"route gone: no route of {job.target} matches {message.To} any more")
        wanted = job.metadata.get("route")
        route_, captures = next((f for f in found if f[0].expression == wanted), found[0])
        if handler.marks.stateless:
            return _call(handler, route_, captures, message.To)
        call = self._stateful_call(handler, route_, captures, message, message.To)
        if call.stateful is None:
            return call
        return replace(call, stateful=replace(call.stateful, choose=partial(self._still, call, handler)))

    def in_conversation(self, message: MailRequest) -> Call:
        """The stateful call that the recipient's conversation asks for: what a job bound to CONVERSATION runs."""
        table, recipient = self.table, message.To
        candidates = self._stateful_candidates(table, recipient)
        if not candidates:
            return Call(self._keep_or_die, recipient)
        return self._choose(table, message, recipient, candidates) or self._nobody(message, candidates[0])

    def _still(self, call: Call, handler: Handler, message: MailRequest, key: str) -> Call:
        """A bound call, unless its conversation has moved on: then what that asks for. After a crash it has not."""
        if self._state(self.table, handler.module, message, key) == handler.state or self._in_error(call):
            return call
        chosen = self._in_state_now(message, key)
        if chosen is None:
            raise Dead(f"the conversation has left {call.name}, and nothing else takes {message.To}")
        return chosen

    def _in_error(self, call: Call) -> bool:
        return call.stateful is not None and self.STATE_STORE.get(*call.stateful.conversation) == "ERROR"

    # -- states -------------------------------------------------------------------------------------------------

    def state_key(self, module_name: str, message: Any) -> str:
        """Which conversation of a module a message belongs to: what its generator says, else the module's name."""
        generator = self.table.modules.get(module_name) or _generator_of(module_name) or DEFAULT_STATE_KEY
        return generator(module_name, message)

    def get_state(self, module_name: str, message: MailRequest) -> str:
        """The recorded state of the message's sender in this module, "START" when there is none."""
        conversation = self._conversation(module_name, message)
        return (self.STATE_STORE.get(*conversation) or START) if conversation else START

    def set_state(self, module_name: str, message: MailRequest, state_name: str) -> None:
        """Record a state at once; also the way to force another conversation."""
        conversation = self._conversation(module_name, message)
        if conversation is not None:
            self.STATE_STORE.set(*conversation, state_name)

    def in_state(self, func: Callable[..., Any], message: MailRequest) -> bool:
        """Whether the sender's conversation is at this function."""
        return self._state(self.table, func.__module__, message) == func.__name__

    def in_error(self, func: Callable[..., Any], message: MailRequest) -> bool:
        """Whether the last message of the sender to this function's module ended in a crash."""
        return self.get_state(func.__module__, message) == "ERROR"

    def _conversation(self, module_name: str, message: MailRequest) -> Conversation | None:
        sender = message.From  # the null sender has no conversation: bounces move nobody (RFC 5321 section 4.5.5)
        return (self.state_key(module_name, message), sender) if sender else None

    def _state(self, table: Table, module: str, message: MailRequest, key: str = "") -> str | None:
        """The state that counts for routing; None when the conversation is in another module."""
        conversation = self._conversation(module, message)
        if conversation is None:
            return START
        now, found = self.STATE_STORE.look(*conversation, key)
        state = found or now or START
        if state in table.states.get(module, ()):
            return state
        elsewhere = state.rpartition(".")[0]
        return None if elsewhere and (elsewhere in table.modules or elsewhere in self.queues) else START

    def _queue_of(self, module: str, message: MailRequest) -> Queue | None:
        return self.queues.get(self.get_state(module, message).rpartition(".")[0])

    def _next_states(
        self, call: Call, message: MailRequest, value: object, attempt: Attempt
    ) -> dict[Conversation, str]:
        """The states that a function's return value asks for (rule 5)."""
        if value is None:
            return {}
        marks = marks_of(value) if callable(value) else Marks()
        if not marks.routes:
            raise TypeError(f"{call.name} returned {value!r}: return None, or the state function that comes next")
        if marks.stateless:
            return {}
        module, name = value.__module__, getattr(value, "__name__", "")
        own_module, _, own_name = (call.name or "").rpartition(".")
        assert call.stateful is not None
        changes = {self._conversation(module, message) or ("", ""): name}
        if module != own_module:
            changes[call.stateful.conversation] = f"{module}.{name}"
            queue = self.queues.get(module)
            if queue is not None and all(put.store is not queue.backend for put in attempt.puts):
                attempt.put(Put(queue.backend, job_of(message, new_key(queue.backend))))
        # Who stays where he is has perhaps changed nothing; but a job that has changed it before is to be forgotten.
        look = self.STATE_STORE.look
        return {c: state for c, state in changes.items() if state != own_name or look(*c, attempt.key) != (state, None)}

    # -- running a plan -----------------------------------------------------------------------------------------

    def attempt(
        self,
        call: Call,
        message: MailRequest,
        *,
        key: str,
        settle: Settle,
        patience: float = ELSEWHERE_PATIENCE,
        unkept: type[Later] | None = None,
    ) -> Attempt:
        """One call of a plan, ready to start; see Attempt."""
        message = message.addressed(call.recipient)
        return Attempt(call, message, key=key, settle=settle, patience=patience, unkept=unkept)

    def deliver(self, message: Any) -> None:
        """Run everything that the message asks for, in this thread.

        What a function pushed is in its queue when this returns. A message that nothing takes goes to the
        UNDELIVERABLE_QUEUE. Raises Undelivered for the calls that failed; the others have succeeded.
        """
        request = message if isinstance(message, MailRequest) else _request_of(message)
        calls = self.plan(request)
        for left in unplanned(request, calls):
            self.keep_undeliverable(left)
        failures: list[Failure] = []
        for call in calls:
            outcome = self._run(call, request)
            if not isinstance(outcome, Done):
                failures.append(Failure(call.recipient, call.name, _error_of(outcome), outcome))
        if failures:
            raise Undelivered(failures) from failures[0].error

    def _run(self, call: Call, message: MailRequest) -> Result:
        key = key_of(message, call)
        return run_here(
            lambda settle: self.attempt(call, message, key=key, settle=settle, patience=PATIENCE, unkept=Later)
        )

    def keep_undeliverable(self, message: MailRequest) -> bool:
        """Push what no route takes into the UNDELIVERABLE_QUEUE; False when there is none, and nothing is kept."""
        queue = self.undeliverable_queue(message)
        if queue is not None:
            queue.push(message)
        return queue is not None

    def undeliverable_queue(self, message: MailRequest) -> Queue | None:
        """Say that no route takes a message; the queue that it belongs into, if there is one."""
        if self.UNDELIVERABLE_QUEUE is None:
            LOG.warning(
                "Message to %r from %r didn't match any handlers. (# recipients: %d)",
                message.To,
                message.From,
                len(message.route_to),
            )
            return None
        LOG.warning(
            "Message to %r from %r undeliverable, putting in undeliverable queue (# of recipients: %d).",
            message.To,
            message.From,
            len(message.route_to),
        )
        return self.UNDELIVERABLE_QUEUE

    def reload_if_changed(self) -> None:
        """With RELOAD: read handler modules anew that have changed, if nobody has looked in the last second."""
        if not self.RELOAD:
            return
        now = time.monotonic()
        if now < self._next_look:
            return
        with self._lock:
            self._next_look = now + RELOAD_INTERVAL
            newest = {name: changed_at(name) for name in self._names}
            known, self._seen = self._seen, newest
            if any(known.get(name, at) != at for name, at in newest.items()):
                self.reload()


def _error_of(outcome: Later | Dead) -> Exception:
    """What the function raised, where that is what the outcome is about."""
    cause = outcome.__cause__
    return cause if isinstance(cause, Exception) and reason_of(cause) == reason_of(outcome) else outcome


def unplanned(message: MailRequest, calls: Sequence[Call]) -> list[MailRequest]:
    """What a plan leaves: the message as a whole when it has no calls, else one for each recipient without any.

    Where only the headers tell who the recipients are, those that no route takes are other people's business.
    """
    if not calls:
        return [message]
    if not message.envelope.rcpt_tos:
        return []
    planned = {call.recipient for call in calls}
    return [message.addressed(recipient) for recipient in message.route_to if recipient not in planned]


def _request_of(message: Any) -> MailRequest:
    """A MailResponse, as the receiver of it would see it."""
    return MailRequest("localhost", message.sender, message.recipients, message.to_bytes())


def _call(
    handler: Handler, route_: Route, captures: dict[str, str], recipient: str, stateful: Stateful | None = None
) -> Call:
    policy = handler.marks.policy or DEFAULT
    return Call(handler.function, recipient, handler.name, captures, route_.expression, stateful, policy)


def _pusher(queue: Queue) -> Callable[[MailRequest], None]:
    def push(message: MailRequest) -> None:
        queue.push(message)

    return push


def DEFAULT_STATE_KEY(module_name: str, _message: Any) -> str:
    """Which conversation a message belongs to, where no @state_key_generator says so: the module's only one."""
    return module_name


def _generator_of(module_name: str) -> StateKeyGenerator | None:
    marked = MODULES.get(module_name)
    return marked.state_key if marked else None


Router = RoutingBase()
