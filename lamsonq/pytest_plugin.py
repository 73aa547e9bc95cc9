"""The pytest plugin, active wherever lamsonq is installed.

    [tool.pytest.ini_options]
    lamsonq_boot = "config.testing"     # boots the project once, before the first test is collected

`conversation` is a fixture that makes a RouterConversation which begins from nothing; `mailbox` is the queue that
`testing.relay()` delivers into, emptied. `jobs` is a queue in memory, to which deferred calls go that name no queue;
`time_now` stops the clock of all jobs: `time_now.tick(60)`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lamsonq.queue import Queue
    from lamsonq.testing import FrozenClock, RouterConversation


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("lamsonq_boot", "the boot module that the tests run under, for example config.testing", default="")


def pytest_collection(session: pytest.Session) -> None:
    boot = session.config.getini("lamsonq_boot")
    if boot:
        from lamsonq import settings
        from lamsonq.errors import Refusal

        try:
            settings.boot(boot)
        except Refusal as error:
            raise pytest.UsageError(f"lamsonq_boot = {boot!r}: {error}") from error


@pytest.fixture
def mailbox() -> Queue:
    """The queue run/queue, emptied: what the application has sent in this test."""
    from lamsonq import testing

    testing.clear_queue()
    return testing.queue()


@pytest.fixture
def conversation(mailbox: Queue) -> Callable[..., RouterConversation]:  # noqa: ARG001 - emptied before the first word
    """`conversation(From, Subject)` makes a sender; nobody has said anything yet."""
    from lamsonq.testing import RouterConversation

    def begin(From: str = "sender@example.com", Subject: str = "test") -> RouterConversation:
        sender = RouterConversation(From, Subject)
        sender.begin()
        return sender

    return begin


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue in memory that deferred calls go to, if they name no other: `testing.drain(jobs)` runs them."""
    from lamsonq.queue import Queue

    queue = Queue(f"memory:test-{uuid.uuid4().hex}")
    monkeypatch.setenv("LAMSONQ_QUEUE", queue.dir)
    return queue


@pytest.fixture
def time_now() -> Iterator[FrozenClock]:
    """The clock of all jobs, standing still."""
    from lamsonq.testing import frozen_clock

    with frozen_clock() as standing:
        yield standing
