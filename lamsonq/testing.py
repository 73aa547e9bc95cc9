"""For the tests of those who write handlers: conversations with the real router, and nothing running.

    alice = RouterConversation("alice@example.com", "hello")
    alice.begin()
    alice.say("my.blog@osb.test.com", "the post", expect="Your post is up")

`relay()` gives a boot a relay that puts all mail into the queue run/queue, which `delivered` and `expect` look into.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Protocol

from lamsonq.mail import MailRequest, MailResponse
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.routing import Router, RoutingBase

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
    """What a reader sees: the source, and the decoded headers and text."""
    headers = "\n".join(f"{name}: {value}" for name, value in message.items())
    body = message.body()
    return f"{message}\n{headers}\n\n{body if isinstance(body, str) else ''}"
