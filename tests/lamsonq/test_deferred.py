"""Functions that are called later: what travels, what is refused, and what runs."""

from __future__ import annotations

import asyncio
import enum
import itertools
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict
from zoneinfo import ZoneInfo

import pytest

from lamsonq import attempt, clock, deferred, events, worker
from lamsonq.conformance import Clock
from lamsonq.deferred import (
    Dead,
    Later,
    autodiscover,
    carries,
    current_job,
    deferrable,
    deferrable_backoff,
    eager,
    periodic,
    publish,
    queue_command,
    request_types,
)
from lamsonq.errors import QueueError, RouteError, UsageError
from lamsonq.jobs import Job, Put
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.worker import QueueReceiver

from .waiting import PATIENCE, until

Module = Callable[..., str]
_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def frozen() -> Iterator[Clock]:
    """The clock of all jobs in this file, standing still."""
    standing = Clock()
    with clock.replaced(standing):
        yield standing


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """The queue that deferred calls go to, in memory."""
    queue = Queue(f"memory:deferred{next(_numbers)}")
    monkeypatch.setenv("LAMSONQ_QUEUE", queue.dir)
    return queue


@pytest.fixture
def work(jobs: Queue) -> Callable[[], int]:
    """`work()` runs what is ready, and tells how many jobs that were."""
    receiver = QueueReceiver(jobs, router=RoutingBase())

    def run() -> int:
        count = 0
        while receiver.run_once():
            count += 1
        return count

    return run


def in_module(module: Module, source: str) -> Any:
    """Write a module of functions and import it."""
    name = module("from lamsonq.deferred import *\n" + source)
    __import__(name)
    return sys.modules[name]


def told(queue: Queue) -> list[Any]:
    """The arguments of the waiting calls."""
    return [json.loads(job.body) for job in map(queue.backend.get, queue.keys()) if job is not None]


# -- calling later -----------------------------------------------------------------------------------------------

SEEN: list[Any] = []


@pytest.fixture(autouse=True)
def seen() -> Iterator[list[Any]]:
    SEEN.clear()
    yield SEEN
    SEEN.clear()


@deferrable
def note(value: Any, *rest: int, more: str = "") -> None:
    SEEN.append((value, *rest, more))


def test_a_function_is_called_later_and_still_callable_now(jobs: Queue, work: Callable[[], int]) -> None:
    key = note.later(1, 2, 3, more="x")
    assert (key, SEEN, jobs.count()) == (jobs.keys()[0], [], 1)
    note("now")
    assert work() == 1
    assert SEEN == [("now", ""), (1, 2, 3, "x")]
    assert jobs.backend.counts()["ready"] == 0


def test_the_arguments_travel_by_name_in_json(jobs: Queue) -> None:
    note.later({"a": [1, None]}, 5, more="ü")
    assert told(jobs) == [{"value": {"a": [1, None]}, "rest": [5], "more": "ü"}]


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: float = 0.5


TYPED: list[tuple[Any, ...]] = []


@deferrable
def typed(
    number: int,
    amount: Decimal,
    at: datetime,
    day: date,
    who: uuid.UUID,
    raw: bytes,
    point: Point,
    colour: Colour,
    span: timedelta,
    pair: tuple[int, str],
    table: dict[int, Point],
    maybe: int | None = None,
) -> None:
    TYPED.append((number, amount, at, day, who, raw, point, colour, span, pair, table, maybe))


def test_annotated_arguments_arrive_as_what_they_were(jobs: Queue, work: Callable[[], int]) -> None:
    given = (
        2**70,
        Decimal("0.10"),
        datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        date(2026, 1, 2),
        uuid.uuid4(),
        b"\x00\xff",
        Point(1),
        Colour.RED,
        timedelta(days=1, seconds=0.25),
        (1, "a"),
        {7: Point(3, 4.0)},
        None,
    )
    TYPED.clear()
    typed.later(*given)
    work()
    assert [given] == TYPED


class Team:
    def __init__(self, key: int) -> None:
        self.key = key


@deferrable
def of_team(team: Team, others: list[Team]) -> None:
    SEEN.append((team.key, [other.key for other in others]))


def test_a_type_of_ones_own_travels_as_it_was_taught(jobs: Queue, work: Callable[[], int]) -> None:
    with pytest.raises(TypeError, match=r"carries\(Team"):
        of_team.later(Team(1), [])
    carries(Team, lambda team: team.key, Team)
    of_team.later(Team(1), [Team(2), Team(3)])
    assert told(jobs) == [{"team": 1, "others": [2, 3]}]
    work()
    assert SEEN == [(1, [2, 3])]


@deferrable
def plain(value, other=None) -> None:  # type: ignore[no-untyped-def]  # as most functions of a Deferrable user are
    SEEN.append(value)


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, b"x", datetime(2026, 1, 1), object(), {1}, float("nan"), float("inf"), [(1,)]]
)
def test_what_could_not_arrive_as_it_is_is_refused_where_it_is_given(jobs: Queue, value: Any) -> None:
    with pytest.raises(TypeError, match=r"plain"):
        plain.later(value)
    assert jobs.count() == 0


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


class Loose(TypedDict):
    rest: Any


@deferrable
def loosely(
    text: str = "",
    table: dict = {},  # type: ignore[type-arg]  # noqa: B006 - as people write it
    items: list[Any] | None = None,
    at: datetime | None = None,
    point: Point | None = None,
    loose: Loose | None = None,
    team: Any = None,
) -> None: ...


@pytest.mark.parametrize(
    "given",
    [
        {"text": b"bytes"},
        {"text": date(2026, 1, 2)},
        {"table": {1: 2}},
        {"table": {"at": date(2026, 1, 2)}},
        {"table": Point(1)},
        {"items": [b"bytes"]},
        {"items": [{"deep": (uuid.uuid4(),)}]},
        {"loose": {"rest": Colour.RED}},
        {"at": datetime(2026, 10, 25, 2, 30, fold=1)},
        {"at": datetime(2026, 1, 1, tzinfo=timezone(timedelta(seconds=30)))},
        {"team": 10**5000},
        {"team": nested(5000)},
    ],
)
def test_what_would_silently_become_something_else_is_refused_too(jobs: Queue, given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="loosely"):
        loosely.later(**given)
    assert jobs.count() == 0


def test_a_moment_travels_whatever_its_zone_is(jobs: Queue) -> None:
    twice = datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)
    assert loosely.later(at=twice, table={"a": [1, "b", None]}, items=[{"c": 1.5}], point=Point(1, 2))
    assert told(jobs)[0]["at"] == "2026-10-25T02:30:00+01:00"


@deferrable
def counted_in_ints(number: int) -> None: ...


@pytest.mark.parametrize("args", [("text",), (1.5,), (), (1, 2)])
def test_arguments_that_do_not_fit_are_refused_where_they_are_given(jobs: Queue, args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="counted_in_ints"):
        counted_in_ints.later(*args)
    assert jobs.count() == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"not json", "no JSON"),
        (b"[1]", "no JSON object"),
        (b"{}", "'number' is missing"),
        (b'{"number": "x"}', "'number' cannot be read"),
        (b'{"number": 1, "more": 2}', "has no parameter more; it takes number"),
    ],
)
def test_a_job_whose_arguments_do_not_fit_is_a_dead_letter_that_says_why(
    jobs: Queue, work: Callable[[], int], body: bytes, reason: str
) -> None:
    target = f"{__name__}.counted_in_ints"
    jobs.backend.put([Put(jobs.backend, Job(key=jobs.new_key(), body=body, target=target))])
    work()
    [key] = jobs.backend.keys("dead")
    assert reason in jobs.backend.report(key)


def test_only_marked_functions_are_run(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    for target in ("os.system", "tests.lamsonq.test_deferred.told", "nothing", ""):
        jobs.backend.put([Put(jobs.backend, Job(key=jobs.new_key(), body=b"{}", target=target))])
    work()
    assert jobs.backend.counts()["delayed"] == 4
    frozen.now += 61
    assert work() == 4
    assert all(job is not None and job.attempts == 0 for job in map(jobs.backend.get, jobs.backend.keys("delayed")))


def test_methods_and_generators_cannot_be_called_later() -> None:
    class Thing:
        def method(self) -> None: ...

    with pytest.raises(TypeError, match="not of methods"):
        deferrable(Thing.method)
    with pytest.raises(TypeError, match="generator"):

        @deferrable
        def generator() -> Iterator[int]:
            yield 1


def test_a_module_that_holds_two_functions_of_one_name_is_refused(module: Module) -> None:
    name = module("from lamsonq.deferred import deferrable\n@deferrable\ndef f(): pass\n@deferrable\ndef f(): pass\n")
    with pytest.raises(RouteError, match="holds another f"):
        RoutingBase().load([name])


# -- policies ----------------------------------------------------------------------------------------------------


@deferrable(error_classes=[ZeroDivisionError], max_attempts=3, backoff=deferrable_backoff)
def divide(by: int) -> None:
    SEEN.append(1 / by)


def test_an_error_that_deserves_it_is_tried_again_and_then_dead(
    jobs: Queue, work: Callable[[], int], frozen: Clock
) -> None:
    key = divide.later(0)
    assert key is not None
    waited = []
    for _ in range(3):
        work()
        job = jobs.backend.get(key)
        assert job is not None
        waited.append((jobs.backend.state(key), job.due and job.due - frozen.now, job.attempts))
        frozen.now += 10
    assert waited == [("delayed", 4, 1), ("delayed", 6, 2), ("dead", None, 3)]
    assert jobs.backend.report(key).count("ZeroDivisionError: division by zero\n") >= 3


def test_an_error_that_does_not_deserve_it_is_dead_at_once(jobs: Queue, work: Callable[[], int]) -> None:
    narrow = deferrable(error_classes=[KeyError])(_raise_value_error)
    narrow.later()
    work()
    assert jobs.backend.counts()["dead"] == 1


def _raise_value_error() -> None:
    raise ValueError("no")


@deferrable(max_attempts=3, backoff=lambda _: 60.0)
def comes_again(at: float) -> None:
    if at:
        raise Later("busy", at=at)
    raise ConnectionError("nobody answers")


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (0.0, "ConnectionError: nobody answers; tried again at 2023-11-14T22:14:20Z"),
        (1_700_000_100.0, "busy; tried again at 2023-11-14T22:15:00Z"),
        (1e300, "busy; tried again at 9999-12-31T23:59:59Z"),
    ],
)
def test_the_line_of_a_failure_says_when_the_job_comes_again_and_that_of_the_last_one_does_not(
    at: float, told: str, jobs: Queue, work: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    key = comes_again.later(at)
    work()
    assert caplog.messages[-1] == f"Job {key} of {jobs.dir} failed: {told}"
    assert key is not None
    jobs.backend.purge("delayed")
    jobs.backend.put([Put(jobs.backend, replace(comes_again.using().job(at), attempts=2))])
    work()
    assert caplog.messages[-1].endswith((" failed: ConnectionError: nobody answers", " attempts: busy"))


@deferrable(error_classes=())
def never_again() -> None:
    raise ValueError("no")


@deferrable
def crashes() -> None:
    raise ValueError("no")


@deferrable(use_exponential_backoff=False)
def crashes_at_once() -> None:
    raise ValueError("no")


def test_no_error_classes_send_every_failure_to_the_dead_letters(jobs: Queue, work: Callable[[], int]) -> None:
    never_again.later()
    assert work() == 1
    assert jobs.backend.counts()["dead"] == 1


def test_by_default_a_crash_is_tried_five_times(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    crashes.later()
    runs = 0
    while jobs.backend.counts()["dead"] == 0:
        runs += work()
        frozen.now += 3600
    assert runs == 5


def test_without_backoff_it_is_tried_at_once(jobs: Queue, work: Callable[[], int]) -> None:
    crashes_at_once.later()
    assert work() == 5
    assert jobs.backend.counts()["dead"] == 1


def test_the_policy_of_now_decides_about_jobs_that_wait(
    jobs: Queue, work: Callable[[], int], frozen: Clock, module: Module
) -> None:
    mod = in_module(module, "@deferrable(error_classes=())\ndef job():\n    1 / 0\n")
    mod.job.later()
    deferrable(max_attempts=2)(mod.job)
    work()
    assert jobs.backend.counts()["delayed"] == 1
    frozen.now += 10
    work()
    assert jobs.backend.counts()["dead"] == 1


@deferrable(max_attempts=2)
def asks_for_later(how: str) -> Later | Dead | None:
    SEEN.append(how)
    note.later(how)
    if how == "raise later":
        raise Later("busy", clock.now() + 5)
    if how == "raise dead":
        raise Dead("never")
    if how == "return later":
        return Later("busy", clock.now() + 5)
    if how == "return dead":
        return Dead("never")
    return None


@pytest.mark.parametrize(
    ("how", "state", "pushed"),
    [
        ("raise later", "delayed", 0),
        ("raise dead", "dead", 0),
        ("return later", "delayed", 1),
        ("return dead", "dead", 1),
        ("return", None, 1),
    ],
)
def test_what_is_raised_takes_back_what_was_put_and_what_is_returned_does_not(
    jobs: Queue, how: str, state: str | None, pushed: int
) -> None:
    key = asks_for_later.later(how)
    assert key is not None
    QueueReceiver(jobs, router=RoutingBase()).run_once()
    assert (jobs.backend.state(key), jobs.count()) == (state, pushed)


def test_max_attempts_counts_what_asks_for_later_too(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    asks_for_later.later("raise later")
    work()
    frozen.now += 6
    work()
    [key] = jobs.backend.keys("dead")
    assert "gave up after 2 attempts: busy" in jobs.backend.report(key)


@deferrable(ttl_seconds=lambda: 10)
def in_time() -> None:
    SEEN.append("in time")


def test_what_comes_too_late_is_not_run(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    in_time.later()
    frozen.now += 11
    in_time.later()
    assert work() == 2
    assert SEEN == ["in time"]
    assert sum(jobs.backend.counts().values()) == 0


@deferrable(delay_seconds=timedelta(seconds=30))
def after_thirty_seconds() -> None:
    SEEN.append("ran")


def test_a_delayed_call_waits(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    after_thirty_seconds.later()
    after_thirty_seconds.using(delay=5).later()
    frozen.now += 6
    assert work() == 1
    frozen.now += 25
    assert work() == 1


@deferrable(debounce_seconds=30)
def debounced(who: str, number: int = 0) -> None:
    SEEN.append(who)


def test_like_calls_are_debounced_whatever_the_order_of_their_arguments(
    jobs: Queue, work: Callable[[], int], frozen: Clock
) -> None:
    keys = [debounced.later("a", 1), debounced.later("a", number=1), debounced.later(number=1, who="a")]
    debounced.later("b", 1)
    assert [key is None for key in keys] == [False, False, True]
    assert work() == 2
    frozen.now += 31
    assert work() == 1
    assert SEEN == ["a", "b", "a"]


@deferrable(unique=True)
def unique(who: str) -> None:
    SEEN.append(who)


def test_of_like_unique_calls_one_waits(jobs: Queue, work: Callable[[], int]) -> None:
    assert [unique.later(who) is not None for who in "aab"] == [True, False, True]
    work()
    assert unique.later("a") is not None


@deferrable(priority=5)
def less_urgent() -> None:
    SEEN.append("less")


def test_urgent_calls_come_first(jobs: Queue, work: Callable[[], int]) -> None:
    less_urgent.later()
    less_urgent.using(priority=9).later()
    note.later("urgent")
    work()
    assert SEEN == [("urgent", ""), "less", "less"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"delay_seconds": 1, "debounce_seconds": 1},
        {"debounce_always_delay": True},
        {"ttl_seconds": 5, "delay_seconds": 6},
        {"ttl_seconds": 5, "debounce_seconds": timedelta(seconds=6)},
        {"max_attempts": 0},
        {"timeout": 0},
        {"unique": True, "debounce_seconds": 1},
        {"use_exponential_backoff": False, "backoff": deferrable_backoff},
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"_|unique|backoff|timeout"):
        deferrable(**wrong)


def test_a_window_that_cannot_be_computed_loses_no_call(jobs: Queue, work: Callable[[], int]) -> None:
    errors: list[Job] = []

    class Watching:
        def on_debounce_error(self, job: Job) -> None:
            errors.append(job)

    events.register_event_consumer(Watching())
    try:
        broken = deferrable(debounce_seconds=lambda: float("nan"))(note)
        broken.later(1)
    finally:
        events.clear_event_consumers()
        deferrable(note)
    assert (work(), len(errors)) == (1, 1)


# -- a policy on a state function ------------------------------------------------------------------------------------


def test_of_three_handlers_one_fails_and_only_that_one_runs_again_for_that_recipient(
    jobs: Queue, module: Module, frozen: Clock, mail: Callable[..., Any]
) -> None:
    name = module(
        """
        from lamsonq.deferred import deferrable
        FAILS = ["bob@example.com"]

        @route("(who)@example.com", who="[a-z]+")
        @stateless
        def ONE(message, who):
            CALLS.append(("one", who))

        @route("(who)@example.com", who="[a-z]+")
        @stateless
        @deferrable(max_attempts=2, error_classes=[ConnectionError])
        def TWO(message, who):
            CALLS.append(("two", who))
            if message.To in FAILS:
                raise ConnectionError("down")

        @route("(who)@example.com", who="[a-z]+")
        @stateless
        def THREE(message, who):
            CALLS.append(("three", who))
        """
    )
    router = RoutingBase()
    router.load([name])
    calls = sys.modules[name].CALLS
    jobs.push(mail(["ann@example.com", "bob@example.com"]))
    QueueReceiver(jobs, router=router).start(one_shot=True)
    assert sorted(calls) == [(f, w) for f in ("one", "three", "two") for w in ("ann", "bob")]
    assert {state: n for state, n in jobs.backend.counts().items() if n} == {"delayed": 1}
    calls.clear()
    sys.modules[name].FAILS.clear()
    frozen.now += 60
    QueueReceiver(jobs, router=router).start(one_shot=True)
    assert calls == [("two", "bob")]
    assert sum(jobs.backend.counts().values()) == 0


def test_what_decides_when_a_job_is_put_is_refused_on_a_state_function(module: Module) -> None:
    name = module(
        """
        from lamsonq.deferred import deferrable

        @deferrable(delay_seconds=5)
        @route("a@example.com")
        @stateless
        def START(message):
            pass
        """
    )
    with pytest.raises(RouteError, match="delay is not for its @deferrable"):
        RoutingBase().load([name])


def test_a_state_function_cannot_be_called_later(module: Module) -> None:
    mod = in_module(module, '@route("a@example.com")\n@deferrable\ndef START(message): pass\n')
    with pytest.raises(TypeError, match="push a message"):
        mod.START.later("x")


# -- the outbox ----------------------------------------------------------------------------------------------------


@deferrable(error_classes=[RuntimeError], backoff=lambda _: 1.0)
def puts_three(fail: bool) -> None:
    for number in range(3):
        note.later(number)
    if fail and not SEEN:
        SEEN.append("failed")
        raise RuntimeError("after all")


def test_what_a_call_puts_leaves_with_its_success_and_once(jobs: Queue, frozen: Clock, work: Callable[[], int]) -> None:
    puts_three.later(True)
    receiver = QueueReceiver(jobs, router=RoutingBase())
    receiver.run_once()
    assert jobs.count() == 0
    frozen.now += 2
    receiver.run_once()
    assert jobs.count() == 3
    work()
    assert SEEN == ["failed", (0, ""), (1, ""), (2, "")]


@deferrable(error_classes=())
def puts_now() -> None:
    note.using(now=True).later("now")
    raise RuntimeError("no")


def test_what_is_put_now_leaves_whatever_happens(jobs: Queue, work: Callable[[], int]) -> None:
    puts_now.later()
    work()
    assert SEEN == [("now", "")]


# -- the current job -------------------------------------------------------------------------------------------------


@deferrable(error_classes=[KeyError], backoff=lambda _: 0.0)
def looks_at_itself() -> None:
    job = current_job()
    assert job is not None
    SEEN.append((job.key, job.attempts))
    job.touch()
    if job.attempts < 1:
        raise KeyError("again")


def test_a_function_knows_its_job(jobs: Queue, work: Callable[[], int]) -> None:
    assert current_job() is None
    key = looks_at_itself.later()
    work()
    assert [(key, 0), (key, 1)] == SEEN


@deferrable(error_classes=[TimeoutError], timeout=0.3, backoff=lambda _: 0.0, max_attempts=2)
async def sleeps(seconds: float) -> None:
    SEEN.append("begun")
    await asyncio.sleep(seconds)
    SEEN.append("ended")


def test_a_call_that_takes_too_long_is_settled_and_tried_again_as_its_policy_says(
    jobs: Queue, work: Callable[[], int]
) -> None:
    sleeps.later(30.0)
    receiver = QueueReceiver(jobs, router=RoutingBase(), timeout=60)
    receiver.start(one_shot=True)
    assert SEEN == ["begun", "begun"]
    assert not receiver.stuck
    [key] = jobs.backend.keys("dead")
    assert "did not return within 0.3 seconds" in jobs.backend.report(key)
    assert "asyncio.sleep(seconds)" in jobs.backend.report(key)


HOURS = SimpleNamespace(ahead=0.0, looks=0)


@deferrable(timeout=3600.0)
async def takes_hours() -> None:
    for _ in range(5):
        HOURS.ahead += 3000.0
        job = current_job()
        assert job is not None
        job.touch()
        looks = HOURS.looks
        while HOURS.looks < looks + 2:  # the second one has begun after the touch
            await asyncio.sleep(0.01)
    SEEN.append("ended")


def test_a_call_that_touches_its_job_may_take_longer(jobs: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attempt, worker):
        shifted = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + HOURS.ahead})
        monkeypatch.setattr(module, "time", shifted)
    receiver = QueueReceiver(jobs, router=RoutingBase())
    give_up = receiver._give_up_the_late

    def look() -> None:
        give_up()
        HOURS.looks += 1

    monkeypatch.setattr(receiver, "_give_up_the_late", look)
    takes_hours.later()
    receiver.start(one_shot=True)
    assert SEEN == ["ended"]


# -- other ways to put ---------------------------------------------------------------------------------------------


def test_later_async_is_awaited(jobs: Queue) -> None:
    assert asyncio.run(note.later_async(1)) == jobs.keys()[0]


@queue_command
def churn(value: int) -> None:
    SEEN.append(value)


def test_calling_a_queue_command_puts_it(jobs: Queue, work: Callable[[], int]) -> None:
    assert churn(1) == jobs.keys()[0]
    churn.run(2)
    work()
    assert SEEN == [2, 1]
    assert (churn.__name__, churn.__module__) == ("churn", __name__)


def test_commands_are_found_in_packages(
    here: Path, monkeypatch: pytest.MonkeyPatch, jobs: Queue, work: Callable[[], int]
) -> None:
    source = "from lamsonq.deferred import queue_command\nRUN = []\n@queue_command\ndef c(n: int):\n    RUN.append(n)\n"
    for folder in ("shop", "shop/cart", "shop/empty", "shop/cart/deep"):
        (here / folder).mkdir()
        (here / folder / "__init__.py").write_text("")
    (here / "shop/commands.py").write_text(source)
    (here / "shop/cart/deep/commands.py").write_text(source)
    monkeypatch.syspath_prepend(str(here))
    assert sorted(autodiscover("shop")) == ["shop.cart.deep.commands", "shop.commands"]
    sys.modules["shop.cart.deep.commands"].c(5)
    work()
    assert sys.modules["shop.cart.deep.commands"].RUN == [5]
    with pytest.raises(UsageError, match="there is no module nothing_here"):
        autodiscover("nothing_here")
    with pytest.raises(UsageError, match="no package"):
        autodiscover("shop.commands")


def test_eager_calls_run_at_once_with_arguments_that_have_travelled(jobs: Queue) -> None:
    with eager():
        note.later([1])
        with pytest.raises(ZeroDivisionError):
            divide.later(0)
        with pytest.raises(TypeError):
            plain.later((1,))
        churn(7)
    assert (SEEN, jobs.count()) == ([([1], ""), 7], 0)


def test_the_environment_makes_all_calls_eager(jobs: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMSONQ_EAGER", "1")
    note.later(1)
    assert (SEEN, jobs.count()) == ([(1, "")], 0)


# -- requests by name ----------------------------------------------------------------------------------------------


@deferrable(name="send_email")
def send_email(to: str, subject: str = "") -> None:
    job = current_job()
    assert job is not None
    SEEN.append((to, subject, dict(job.metadata)))


@deferrable(name="lower")
def lower(payload: str) -> None:
    SEEN.append(payload.lower())


def test_a_request_is_published_without_the_code(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    message = publish(jobs.dir, "send_email", {"to": "a@b.example"}, header={"source": "web"}, priority=-5, delay=10)
    assert message.id == jobs.backend.keys("delayed")[0]
    assert (message.request_type, message.header["priority"], message.header["delay"]) == (
        "send_email",
        0,
        frozen.now + 10,
    )
    publish(jobs, "lower", payload="ABC")
    assert work() == 1
    frozen.now += 11
    work()
    assert SEEN == ["abc", ("a@b.example", "", {"source": "web"})]


def test_a_request_expires_at_its_moment(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    publish(jobs, "lower", payload="A", expiration=datetime.fromtimestamp(frozen.now + 5, UTC))
    frozen.now += 6
    work()
    assert SEEN == []


@pytest.mark.parametrize("body", [{"a": object()}, {"a": b"x"}, {"a": float("nan")}])
def test_a_request_that_json_cannot_tell_is_refused(jobs: Queue, body: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="cannot be told in JSON"):
        publish(jobs, "lower", body)
    with pytest.raises(TypeError, match="is no text"):
        publish(jobs, "lower", header={"x": 1})  # type: ignore[dict-item]  # what is tested


@pytest.mark.parametrize(
    ("request_type", "wishes", "error"),
    [
        ("", {}, TypeError),
        (None, {}, TypeError),
        (5, {}, TypeError),
        ("type", {"body": [1]}, TypeError),
        ("type", {"header": [("name", "text")]}, TypeError),
        ("type", {"header": {1: "text"}}, TypeError),
        ("type", {"unique": 5}, TypeError),
        ("type", {"delay": 10, "expiration": 5}, ValueError),
    ],
)
def test_a_request_that_could_never_run_is_refused_where_it_is_published(
    jobs: Queue, request_type: Any, wishes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        publish(jobs, request_type, **wishes)
    assert (jobs.backend.keys("ready"), jobs.backend.keys("delayed")) == ([], [])


def test_request_types_are_mapped_in_settings(jobs: Queue, work: Callable[[], int], module: Module) -> None:
    mod = in_module(module, "RUN = []\n@deferrable\ndef ship(order: int):\n    RUN.append(order)\n")
    request_types({"ship_it": f"{mod.__name__}.ship"})
    publish(jobs, "ship_it", {"order": 3})
    work()
    assert mod.RUN == [3]
    with pytest.raises(UsageError, match="no @deferrable function"):
        request_types({"x": f"{mod.__name__}.RUN"})


# -- schedules -----------------------------------------------------------------------------------------------------


def test_a_periodic_function_runs_once_a_tick_whoever_works_the_queue(
    jobs: Queue, module: Module, frozen: Clock
) -> None:
    mod = in_module(
        module, f"RUN = []\n@periodic('*/5 * * * *', queue={jobs.dir!r})\ndef every():\n    RUN.append(1)\n"
    )
    frozen.now = datetime(2026, 3, 1, 12, 2).timestamp()
    receivers = [QueueReceiver(jobs, router=RoutingBase()) for _ in range(3)]
    for receiver in receivers:
        receiver.run_once()
    assert mod.RUN == []
    for _ in range(4):
        frozen.now += 150
        for receiver in receivers * 2:
            receiver.run_once()
    assert mod.RUN == [1, 1]
    del mod


@pytest.mark.parametrize("restarted", [False, True])
def test_periodic_functions_go_on_when_the_clock_that_was_wrong_is_put_back(
    jobs: Queue, module: Module, frozen: Clock, *, restarted: bool
) -> None:
    mod = in_module(
        module, f"RUN = []\n@periodic('*/5 * * * *', queue={jobs.dir!r})\ndef every():\n    RUN.append(1)\n"
    )
    right = datetime(2026, 3, 1, 12, 0, 30).timestamp()
    receiver = QueueReceiver(jobs, router=RoutingBase())
    frozen.now = right + 2 * 86400
    receiver.run_once()
    assert mod.RUN == [1]
    if restarted:
        receiver = QueueReceiver(jobs, router=RoutingBase())
    for minute in range(1, 20):
        frozen.now = right + minute * 60
        receiver.run_once()
    assert mod.RUN == [1] * 4


def test_a_clock_that_is_put_right_by_a_minute_or_two_repeats_no_periodic_job(
    jobs: Queue, module: Module, frozen: Clock
) -> None:
    mod = in_module(module, f"RUN = []\n@periodic('* * * * *', queue={jobs.dir!r})\ndef every():\n    RUN.append(1)\n")
    right = datetime(2026, 3, 1, 12, 0, 30).timestamp()
    receiver = QueueReceiver(jobs, router=RoutingBase())
    for seconds in (0, -60, -120, -60, 0):
        frozen.now = right + seconds
        receiver.run_once()
    assert mod.RUN == [1]


def test_what_lies_between_when_the_clock_is_set_forward_is_neither_run_nor_counted(
    jobs: Queue, module: Module, frozen: Clock
) -> None:
    mod = in_module(
        module, f"RUN = []\n@periodic('*/5 * * * *', queue={jobs.dir!r})\ndef every():\n    RUN.append(1)\n"
    )
    frozen.now = 130.0  # a machine whose clock has no battery begins in 1970
    receiver = QueueReceiver(jobs, router=RoutingBase())
    receiver.run_once()
    began = time.thread_time()
    frozen.now = datetime(2026, 3, 1, 12, 2).timestamp()
    receiver.run_once()
    assert mod.RUN == []
    assert time.thread_time() - began < 5


def test_a_periodic_job_that_cannot_be_made_keeps_no_other_from_its_moment(
    jobs: Queue, module: Module, frozen: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    mod = in_module(
        module,
        f"RUN = []\nqueue = {jobs.dir!r}\n"
        "@periodic('* * * * *', queue=queue, ttl_seconds=lambda: [][0])\ndef broken():\n    RUN.append('broken')\n"
        "@periodic('* * * * *', queue=queue)\ndef sound():\n    RUN.append('sound')\n",
    )
    frozen.now = datetime(2026, 3, 1, 12, 0, 30).timestamp()
    QueueReceiver(jobs, router=RoutingBase()).run_once()
    assert mod.RUN == ["sound"]
    assert ".broken could not be put: IndexError: list index out of range" in caplog.text


def test_a_schedule_that_is_none_is_refused_where_it_is_written() -> None:
    with pytest.raises(ValueError, match="minute, hour, day, month"):
        periodic("61 * * * *")
    with pytest.raises(TypeError, match="without arguments"):
        periodic("* * * * *")(counted_in_ints)


def test_a_periodic_function_needs_nothing_not_even_by_name() -> None:
    def report(*, since: int) -> None:
        del since

    with pytest.raises(TypeError, match="needs since"):
        periodic("* * * * *")(report)


# -- events and metadata -------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Callable[[Job | None], None]:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda _: self.told.append(name[3:])


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recording = Recorder()
    events.register_event_consumer(recording)
    yield recording
    events.clear_event_consumers()


def test_what_happens_to_a_job_is_told_in_order(
    jobs: Queue, work: Callable[[], int], recorder: Recorder, frozen: Clock
) -> None:
    note.later(1)
    work()
    assert recorder.told == ["push", "pop", "complete", "empty"]
    recorder.told.clear()
    divide.later(0)
    work()
    assert recorder.told == ["push", "pop", "retry", "complete", "empty"]
    recorder.told.clear()
    never_again.later()
    in_time.later()
    frozen.now += 1000
    QueueReceiver(jobs, router=RoutingBase()).run_once()
    assert recorder.told[:2] == ["push", "push"]
    work()
    ends = [event for event in recorder.told if event in ("error", "expire", "retry")]
    assert ends == ["retry", "error", "expire"]
    recorder.told.clear()
    for _ in range(3):
        debounced.later("x")
    assert recorder.told == ["debounce_miss", "push", "debounce_miss", "push", "debounce_hit"]


def test_a_consumer_that_fails_changes_nothing(jobs: Queue, work: Callable[[], int]) -> None:
    class Broken:
        def on_push(self, _job: Job) -> None:
            raise RuntimeError("broken")

        on_pop = on_complete = on_push

    events.register_event_consumer(Broken())
    try:
        note.later(1)
        work()
    finally:
        events.clear_event_consumers()
    assert SEEN == [(1, "")]


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError()])
def test_a_consumer_that_exits_or_has_no_attributes_changes_nothing(
    jobs: Queue, work: Callable[[], int], error: BaseException
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise error

    events.register_event_consumer(Broken())
    try:
        note.later(1)
        work()
    finally:
        events.clear_event_consumers()
    assert SEEN == [(1, "")]


class Consuming:
    NAMESPACE = "consuming"

    def __init__(self, consume: Callable[[], object]) -> None:
        self.consume = consume

    def produce_metadata(self) -> str:
        return "x"

    def consume_metadata(self, _metadata: str) -> None:
        self.consume()


@pytest.fixture
def consuming() -> Iterator[Callable[[Callable[[], object]], None]]:
    yield lambda consume: events.register_metadata_producer_consumer(Consuming(consume))
    events.clear_metadata_producer_consumers()


def test_a_job_runs_though_a_consumer_of_its_metadata_exits(
    jobs: Queue, work: Callable[[], int], consuming: Callable[[Callable[[], object]], None]
) -> None:
    consuming(sys.exit)
    note.later(1)
    work()
    assert SEEN == [(1, "")]


def test_a_consumer_of_metadata_that_hangs_is_cut_as_its_function_would_be(
    jobs: Queue, consuming: Callable[[Callable[[], object]], None]
) -> None:
    go = threading.Event()
    consuming(lambda: go.wait(PATIENCE))
    note.later(1)
    receiver = QueueReceiver(jobs, router=RoutingBase(), timeout=0.1)
    receiver.start(one_shot=True)
    assert receiver.stuck
    assert jobs.backend.counts()["reserved"] == 0
    go.set()
    until(lambda: SEEN)  # what was given up runs on, and is not to be seen by the next test


def test_what_a_job_puts_is_told_when_it_has_succeeded(jobs: Queue, recorder: Recorder) -> None:
    puts_three.later(True)
    receiver = QueueReceiver(jobs, router=RoutingBase())
    receiver.run_once()
    assert recorder.told.count("push") == 1


@pytest.fixture
def trace() -> Iterator[events.TraceContext]:
    tracing = events.TraceContext()
    events.register_metadata_producer_consumer(tracing)
    yield tracing
    events.clear_metadata_producer_consumers()


TRACES: list[str | None] = []
TRACING: list[events.TraceContext] = []


@deferrable
def traced(depth: int) -> None:
    TRACES.append(TRACING[0].current())
    if depth:
        traced.later(depth - 1)


def test_a_trace_goes_through_the_queue(jobs: Queue, work: Callable[[], int], trace: events.TraceContext) -> None:
    TRACING[:] = [trace]
    TRACES.clear()
    traced.later(2)
    work()
    parts = [(text or "").split("-") for text in TRACES]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert len({part[1] for part in parts}) == 1
    assert len({part[2] for part in parts}) == 3
    assert trace.current() is None


def test_metadata_that_is_no_text_travels_too_and_names_are_taken_once(jobs: Queue, work: Callable[[], int]) -> None:
    class Host:
        NAMESPACE = "host"

        def produce_metadata(self) -> Any:
            return {"name": "web1", "n": 1}

        def consume_metadata(self, metadata: Any) -> None:
            SEEN.append(metadata)

    class Nameless:
        NAMESPACE = ""

    events.register_metadata_producer_consumer(Host())
    try:
        with pytest.raises(ValueError, match="taken"):
            events.register_metadata_producer_consumer(Host())
        with pytest.raises(ValueError, match="NAMESPACE"):
            events.register_metadata_producer_consumer(Nameless())  # type: ignore[arg-type]  # what is tested
        note.later(1)
        work()
    finally:
        events.clear_metadata_producer_consumers()
    assert SEEN == [{"name": "web1", "n": 1}, (1, "")]


def test_a_queue_that_is_no_database_takes_no_connection(jobs: Queue) -> None:
    with pytest.raises(QueueError, match="conn"):
        note.using(conn=object()).later(1)


def test_threads_that_await_are_few(jobs: Queue) -> None:
    for _ in range(300):
        awaits_the_others.later()
    receiver = QueueReceiver(jobs, router=RoutingBase(), workers=4)
    before = threading.active_count()
    receiver.start(one_shot=True)
    [threads] = SEEN
    assert threads - before < 15


AWAITING: list[int] = []


@deferrable
async def awaits_the_others() -> None:
    AWAITING.append(1)
    if len(AWAITING) == 300:
        SEEN.append(threading.active_count())
    while len(AWAITING) < 300:
        await asyncio.sleep(0.05)


def test_a_function_found_by_its_own_name_or_its_request_type(jobs: Queue) -> None:
    assert deferred.find("send_email") is deferred.find(f"{__name__}.send_email") is not None
    assert deferred.find("os.system") is None


def test_a_request_type_means_one_function(module: Module, jobs: Queue) -> None:
    source = "from lamsonq.deferred import deferrable\n@deferrable(name='twice')\ndef {}(): pass\n"
    one, two = module(source.format("one")), module(source.format("two"))
    with pytest.raises(RouteError, match="is said of both"):
        RoutingBase().load([one, two])
    with pytest.raises(TypeError, match=r"'twice' means .*one: give .*two another name="):
        sys.modules[two].two.later()


@deferrable
def of_unknown_type(team: Unknown) -> None: ...


def test_an_argument_whose_type_cannot_travel_is_a_dead_letter(jobs: Queue, work: Callable[[], int]) -> None:
    publish(jobs, f"{__name__}.of_unknown_type", {"team": 1})
    assert work() == 1
    [key] = jobs.backend.keys("dead")
    assert "carries(Unknown" in jobs.backend.report(key)


class Unknown:
    """A type that nobody has said how it travels."""


def test_a_queue_in_memory_is_not_forgotten_while_others_are_used(jobs: Queue) -> None:
    note.later(1)
    name = jobs.dir
    for number in range(300):
        Queue(f"memory:other{number}")
    assert Queue(name).count() == 1


def test_an_eager_call_knows_its_job(jobs: Queue) -> None:
    with eager():
        send_email.later("a@b.example")
    assert SEEN == [("a@b.example", "", {})]


@pytest.mark.parametrize("url", ["run/q", "sqlite:run/q.db", "memory:at-once"])
def test_what_is_tried_again_at_once_is_tried_again_in_the_same_round(url: str, here: Path, frozen: Clock) -> None:
    one = Queue(url)
    frozen.now += 0.0004
    for _ in range(20):
        crashes_at_once.using(queue=one).later()
    QueueReceiver(one, router=RoutingBase()).start(one_shot=True)
    assert one.backend.counts()["dead"] == 20


# -- what a policy must not do -----------------------------------------------------------------------------------------


def broken_backoff(failures: int) -> float:
    raise KeyError(failures)


@deferrable(backoff=broken_backoff)
def with_a_broken_backoff() -> None:
    raise ValueError("no")


class Untellable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@deferrable(backoff=lambda _: timedelta(seconds=7))
def raises_what_cannot_be_told() -> None:
    raise Untellable


def test_a_backoff_that_fails_holds_no_job_up(jobs: Queue, work: Callable[[], int]) -> None:
    with_a_broken_backoff.later()
    raises_what_cannot_be_told.later()
    assert work() == 2
    assert jobs.backend.counts()["delayed"] == 2
    reports = [jobs.backend.report(key) for key in jobs.backend.keys("delayed")]
    assert "ValueError: no" in "".join(reports)
    assert "Untellable" in "".join(reports)


def test_a_backoff_may_be_a_timedelta(jobs: Queue, work: Callable[[], int], frozen: Clock) -> None:
    key = raises_what_cannot_be_told.later()
    assert key is not None
    work()
    job = jobs.backend.get(key)
    assert job is not None
    assert job.due == frozen.now + 7


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"error_classes": ["ConnectionError"]}, "exception classes, not 'ConnectionError'"),
        ({"error_classes": ConnectionError}, r"write \[ConnectionError\]"),
        ({"backoff": 3}, "backoff=3"),
        ({"ttl_seconds": -1}, "-1 is no number of seconds"),
        ({"delay_seconds": "soon"}, "not 'soon'"),
        ({"priority": "urgent"}, "priority='urgent': it is a whole number"),
        ({"priority": 1.5}, r"priority=1\.5: it is a whole number"),
    ],
)
def test_what_is_no_policy_is_refused_where_it_is_written(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        deferrable(**wrong)


def test_a_call_that_would_be_due_after_it_has_expired_is_refused(jobs: Queue) -> None:
    with pytest.raises(ValueError, match="never run"):
        note.using(delay=5, expires=1).later(1)


@deferrable
def returns_a_class() -> type[Dead]:
    return Dead


def test_dead_may_be_returned_as_it_may_be_raised_without_parentheses(jobs: Queue, work: Callable[[], int]) -> None:
    returns_a_class.later()
    work()
    assert jobs.backend.counts()["dead"] == 1


COUNT = [0]


@deferrable(unique=True)
def puts_itself() -> None:
    COUNT[0] += 1
    if COUNT[0] < 4:
        puts_itself.later()


@pytest.mark.parametrize("url", ["run/q", "sqlite:run/q.db", "memory:puts-itself"])
def test_a_unique_job_may_put_itself_again(url: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMSONQ_QUEUE", url)
    COUNT[0] = 0
    puts_itself.later()
    QueueReceiver(url, router=RoutingBase()).start(one_shot=True)
    assert COUNT == [4]


def test_with_reload_a_changed_function_is_read_anew_before_a_call(
    jobs: Queue, module: Module, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module("RUN = []\n@deferrable\ndef f():\n    RUN.append(1)\n")
    router = RoutingBase()
    router.load([name])
    router.RELOAD = True
    receiver = QueueReceiver(jobs, router=router)
    module("RUN = []\n@deferrable\ndef f():\n    RUN.append(2)\n", name=name)
    os.utime(here / f"{name}.py", (1, 1))
    monkeypatch.setattr(router, "_next_look", 0.0)
    publish(jobs, f"{name}.f")
    receiver.run_once()
    assert sys.modules[name].RUN == [2]
