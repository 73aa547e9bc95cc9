"""For the tests of those who write handlers: conversations with the real router, and nothing running.

    alice = RouterConversation("alice@example.com", "hello")
    alice.begin()
    alice.say("my.blog@osb.test.com", "the post", expect="Your post is up")

`relay()` gives a boot a relay that puts all mail into the queue run/queue, which `delivered` and `expect` look into.

For queues and deferred calls:

    assert_enqueued("run/jobs", run_some_stats, team_id=42)     # the call waits there
    drain("run/jobs")                                           # a real worker runs all that is ready
    with frozen_clock() as time_now: time_now.tick(60)          # what is delayed by a minute is due

BackendConformance (lamsonq.conformance) is for backends of one's own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, Protocol

from lamsonq import arguments, clock, deferred
from lamsonq.attempt import Call
from lamsonq.conformance import BackendConformance
from lamsonq.errors import Dead, Later
from lamsonq.jobs import Job, Outcome, Put
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.routing import Router, RoutingBase
from lamsonq.source import Source
from lamsonq.worker import QueueReceiver

__all__ = [
    "BackendConformance",
    "FrozenClock",
    "RouterConversation",
    "TestConversation",
    "assert_enqueued",
    "assert_in_state",
    "assert_not_enqueued",
    "clear_queue",
    "delivered",
    "drain",
    "enqueued",
    "frozen_clock",
    "queue",
    "relay",
]

TEST_QUEUE = "run/queue"
"""Where `relay()` delivers, and `lamsonq log` keeps what it was sent."""


class Takes(Protocol):
    """Whatever takes mail: a relay, or a router."""

    def deliver(self, message: Any) -> object: ...


def relay(hostname: str = "127.0.0.1", port: int | None = None) -> Relay:
    """A relay for tests: into run/queue, or, with a port, to a server that listens there."""
    if port is None:
        return Relay(deliver=queue().push)
    return Relay(host=hostname, port=port)


def queue(queue_dir: str = TEST_QUEUE) -> Queue:
    """The queue that the tests look into."""
    return Queue(queue_dir)


def clear_queue(queue_dir: str = TEST_QUEUE) -> None:
    """Empty a queue."""
    queue(queue_dir).clear()


def delivered(pattern: str, to_queue: Queue | None = None) -> MailRequest | Literal[False]:
    """The first message in the queue (run/queue) that the regular expression is found in, False when there is none."""
    for message in _messages(to_queue if to_queue is not None else queue()):
        if re.search(pattern, _as_read(message)):
            return message
    return False


def assert_in_state(module: str, To: str, From: str, state: str, router: RoutingBase = Router) -> None:
    """Assert where the sender is in the conversation that mail to `To` belongs to."""
    known = {*router.table.modules, *router.queues, *(handler.module for handler in router.table.handlers.values())}
    if module not in known:  # everybody is in START of a module that there is not
        raise AssertionError(f"{module} is no module of handlers; loaded are {', '.join(sorted(known)) or 'none'}")
    message = MailRequest("testing", From, To, f"To: {To}\nFrom: {From}\n\n")
    found = router.get_state(module, message)
    assert found == state, f"{From} is in state {found} of {module}, not in {state}"


class TestConversation:
    """One sender who talks to a server through a relay."""

    __test__ = False  # for pytest: this is a tool, not a test

    def __init__(self, relay_to_mail_server: Takes, From: str, Subject: str, router: RoutingBase = Router) -> None:
        if isinstance(relay_to_mail_server, Relay) and not relay_to_mail_server.sends:
            raise ValueError(
                "this relay keeps its mail in a queue, so nobody would answer:"
                " give it the port of a server, relay(port=8823), or use RouterConversation"
            )
        self.relay = relay_to_mail_server
        self.router = router
        self.From = From
        self.Subject = Subject

    def begin(self) -> None:
        """Start from nothing: no mail in run/queue, everybody in START."""
        clear_queue()
        self.router.clear_states()

    def deliver(self, To: str, From: str, Subject: str, Body: str) -> None:
        """Send one message."""
        self.relay.deliver(MailResponse(To=To, From=From, Subject=Subject, Body=Body))

    def say(self, To: str, Body: str, expect: str | None = None, Subject: str | None = None) -> MailRequest | None:
        """Send a message, and assert that it is answered by one in which the regular expression `expect` is found."""
        self.deliver(To, self.From, Subject or self.Subject, Body)
        if expect is None:
            return None
        found = delivered(expect)
        if not found:
            if not self.router.table.routes:
                raise AssertionError("no handlers are loaded: boot the project, settings.boot('config.testing')")
            there = "\n---\n".join(map(str, _messages(queue()))) or "(nothing)"
            raise AssertionError(f"no message in {TEST_QUEUE} matches {expect!r}. There is:\n{there}")
        return found


class RouterConversation(TestConversation):
    """One sender whose mail goes straight to the router, in this thread. Errors of handlers come out as Undelivered."""

    __test__ = False

    def __init__(self, From: str, Subject: str, router: RoutingBase = Router) -> None:
        super().__init__(router, From, Subject, router)

    def deliver(self, To: str, From: str, Subject: str, Body: str) -> None:
        response = MailResponse(To=To, From=From, Subject=Subject, Body=Body)
        self.relay.deliver(MailRequest("localhost", From, To, response.to_bytes()))


def _messages(searched: Queue) -> list[MailRequest]:
    keys = searched.keys()
    return [message for message in map(searched.get, keys) if message is not None]


def _as_read(message: MailRequest) -> str:
    """What a reader sees: the source, and the decoded headers and text; From and To of the envelope, where there is no
    header that tells them."""
    parties = [("From", message["from"]), ("To", message["to"])]
    headers = "\n".join(f"{name}: {value}" for name, value in [*message.items(), *parties] if value)
    body = message.body()
    return f"{message}\n{headers}\n\n{body if isinstance(body, str) else ''}"


# -- queues and deferred calls -------------------------------------------------------------------------------------


class FrozenClock:
    """A clock that stands still until it is told; `now` is seconds since the epoch."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float | timedelta) -> None:
        """Let this much time pass."""
        self.now += seconds.total_seconds() if isinstance(seconds, timedelta) else seconds


@contextmanager
def frozen_clock(at: float | None = None) -> Iterator[FrozenClock]:
    """In this block the clock of all jobs stands still (see lamsonq.clock), at a moment or at this one."""
    standing = FrozenClock(time.time() if at is None else at)
    with clock.replaced(standing):
        yield standing


def enqueued(
    in_queue: Queue | str, function: Callable[..., Any] | str | None = None, **with_arguments: Any
) -> list[Job]:
    """The jobs that wait, ready or delayed: all, or those that call this function (or request type), and among them
    those with these arguments by name."""
    backend = deferred.queue_of(in_queue).backend
    jobs = [backend.get(key) for state in ("ready", "delayed") for key in backend.keys(state)]
    target = _target(function)
    return [
        job
        for job in jobs
        if job is not None and (target is None or job.target == target) and _has_arguments(job, with_arguments)
    ]


def _target(function: Callable[..., Any] | str | None) -> str | None:
    return deferred.request_type_of(function) if callable(function) else function


def _has_arguments(job: Job, wanted: dict[str, Any]) -> bool:
    if not wanted:
        return True
    function = deferred.find(job.target or "")
    if function is None:
        given = json.loads(job.body)
    else:
        args, kwargs = arguments.decode(function, job.body)
        given = arguments.by_name(function, args, kwargs)
    return all(name in given and given[name] == value for name, value in wanted.items())


def assert_enqueued(
    in_queue: Queue | str, function: Callable[..., Any] | str | None = None, **with_arguments: Any
) -> Job:
    """Assert that a call waits in a queue, with these arguments (by name) among its own; the first such job."""
    found = enqueued(in_queue, function, **with_arguments)
    if not found:
        there = [f"{job.target}: {job.body!r:.200}" for job in enqueued(in_queue)]
        raise AssertionError(
            f"no call of {_target(function)} with {with_arguments} waits. There is:\n"
            + ("\n".join(there) or "(nothing)")
        )
    return found[0]


def assert_not_enqueued(
    in_queue: Queue | str, function: Callable[..., Any] | str | None = None, **with_arguments: Any
) -> None:
    """Assert that no such call waits."""
    found = enqueued(in_queue, function, **with_arguments)
    assert not found, f"{len(found)} calls of {_target(function)} wait: {found[0].body!r:.200}"


def drain(
    in_queue: Queue | str,
    router: RoutingBase = Router,
    *,
    deliver: Callable[[MailRequest], object] | None = None,
    raising: bool = True,
    most: int = 10_000,
) -> int:
    """Run what is ready in a queue, and what that puts there, with the worker of earnest and in this thread; how many.

    The first error of a function comes out, unless `raising` is False; its job is settled as its policy says, too.
    """
    receiver = QueueReceiver(deferred.queue_of(in_queue), router=router, deliver=deliver, periodic=False)
    watched = _Watched(receiver.queue, deliver, router)
    receiver.sources = [watched]
    count = 0
    while receiver.run_once(here=True):
        count += 1
        if watched.errors and raising:
            raise watched.errors[0]
        assert count < most, f"after {most} jobs the queue is still not empty: do they put each other?"
    return count


class _Watched(Source):
    """A queue whose failures are remembered."""

    def __init__(self, watched: Queue, deliver: Callable[[MailRequest], object] | None, router: RoutingBase) -> None:
        super().__init__(watched, deliver, router)
        self.errors: list[BaseException] = []

    def settle(self, job: Job, call: Call | None, outcome: Outcome, puts: Sequence[Put] = ()) -> None:
        super().settle(job, call, outcome, puts)
        if isinstance(outcome, Dead) or (isinstance(outcome, Later) and outcome.counted):
            self.errors.append(outcome.__cause__ or outcome)
