"""The tools for the tests of those who use queues: they use the worker of earnest, and say what is missing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from lamsonq.deferred import deferrable, publish
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.testing import (
    FrozenClock,
    assert_enqueued,
    assert_in_state,
    assert_not_enqueued,
    delivered,
    drain,
    enqueued,
)

SEEN: list[int] = []


@deferrable(delay_seconds=60)
def later(number: int, *, colour: str = "red") -> None:
    SEEN.append(number)
    if number > 0:
        again.later(number - 1)


@deferrable
def again(number: int) -> None:
    SEEN.append(number)
    if number < 0:
        raise ArithmeticError(number)


def test_a_call_that_waits_is_found_by_its_function_and_arguments(jobs: Queue) -> None:
    later.later(3)
    assert assert_enqueued(jobs, later, number=3, colour="red").target == f"{__name__}.later"
    assert len(enqueued(jobs)) == 1
    assert_not_enqueued(jobs, again)
    with pytest.raises(AssertionError, match=r"later with \{'number': 4\} waits. There is:\n.*number.*3"):
        assert_enqueued(jobs, later, number=4)
    with pytest.raises(AssertionError, match="1 calls of"):
        assert_not_enqueued(jobs, later)


def test_a_message_is_found_by_the_envelope_that_no_header_tells(here: Path) -> None:
    Queue("run/queue").push(MailRequest("peer", "joe@x.example", "list@y.example", b"Subject: hi\r\n\r\nbody\r\n"))
    assert delivered("(?m:^From: joe@x.example$)")
    assert delivered("(?m:^To: list@y.example$)")
    assert not delivered("ann@y.example")


def test_a_published_request_is_found_by_its_type(jobs: Queue) -> None:
    publish(jobs, "send_email", {"to": "a@b.example"})
    assert_enqueued(jobs, "send_email", to="a@b.example")
    assert_not_enqueued(jobs, "send_email", to="c@b.example")


def test_a_queue_is_drained_by_a_real_worker_when_the_time_has_come(jobs: Queue, time_now: FrozenClock) -> None:
    SEEN.clear()
    later.later(1)
    assert drain(jobs) == 0
    time_now.tick(timedelta(minutes=1, seconds=1))
    assert drain(jobs) == 2
    assert SEEN == [1, 0]


def test_an_error_comes_out_of_a_drain_and_its_job_is_settled(jobs: Queue) -> None:
    again.later(-1)
    with pytest.raises(ArithmeticError):
        drain(jobs)
    assert jobs.backend.counts()["delayed"] == 1
    again.later(-2)
    assert drain(jobs, raising=False) == 1


def test_a_state_is_asserted_of_a_module_that_there_is_and_of_no_other(module: Callable[..., str]) -> None:
    router = RoutingBase()
    name = module("@route('desk@example.com')\ndef START(message): ...\n")
    router.load([name])
    router.hand_over(["app.handlers.slow"], "memory:slow")
    for known in (name, "app.handlers.slow"):
        assert_in_state(known, "desk@example.com", "joe@example.com", "START", router)
    with pytest.raises(AssertionError, match=f"app.handlers.post is no module of handlers; loaded are .*{name}"):
        assert_in_state("app.handlers.post", "desk@example.com", "joe@example.com", "START", router)
    with pytest.raises(AssertionError, match=r"in state START of .*, not in POSTING"):
        assert_in_state(name, "desk@example.com", "joe@example.com", "POSTING", router)


def test_messages_are_drained_by_a_router(jobs: Queue, mail: Callable[..., MailRequest]) -> None:
    seen: list[MailRequest] = []
    jobs.push(mail())
    assert drain(jobs, deliver=seen.append) == 1
    assert seen[0].To == "desk@example.com"
    jobs.push(mail())
    assert drain(jobs, RoutingBase(), raising=False) == 1
    assert jobs.backend.counts()["dead"] == 1
