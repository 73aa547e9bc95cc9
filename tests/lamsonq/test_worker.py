"""The queue receiver: reserve, attempt, settle; and what becomes of what fails."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lamsonq.errors import (
    Dead,
    Failure,
    Later,
    QueueError,
    Refusal,
    SettingsError,
    SMTPError,
    Undelivered,
    report_of,
)
from lamsonq.jobs import Done, Job
from lamsonq.mail import MailRequest
from lamsonq.policy import MAX_ATTEMPTS
from lamsonq.queue import Queue
from lamsonq.reports import entries
from lamsonq.routing import RoutingBase
from lamsonq.state import MemoryStorage, SQLiteStorage
from lamsonq.testing import frozen_clock
from lamsonq.worker import QueueReceiver

from .waiting import PATIENCE, clock_ahead, until

Mail = Callable[..., MailRequest]
Module = Callable[..., str]


def calls_of(name: str) -> list[object]:
    return sys.modules[name].CALLS  # type: ignore[no-any-return]


def work(router: RoutingBase, **options: object) -> QueueReceiver:
    """Work run/posts until it is empty."""
    receiver = QueueReceiver("run/posts", router=router, **options)  # type: ignore[arg-type]
    receiver.start(one_shot=True)
    return receiver


def dead(queue: Queue) -> list[tuple[str | None, str]]:
    """(target, reason) of each dead letter."""
    store = queue.backend
    found = []
    for key in store.keys("dead"):
        job = store.get(key)
        assert job is not None
        found.append((job.target, entries(store.report(key))[-1].reason))
    return found


def details(queue: Queue) -> str:
    """All that is told of the first dead letter."""
    return queue.backend.report(queue.backend.keys("dead")[0])


@pytest.fixture
def posts(here: Path) -> Queue:
    return Queue("run/posts")


def test_each_message_is_handled_once_in_order_and_is_gone(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(message.body())\n")
    router.load([name])
    for n in range(5):
        posts.push(mail(body=str(n)))
    work(router, workers=1)
    assert [str(c).strip() for c in calls_of(name)] == ["0", "1", "2", "3", "4"]
    assert sum(posts.backend.counts().values()) == 0


def test_the_handler_sees_the_envelope_as_it_was_received(router: RoutingBase, module: Module, posts: Queue) -> None:
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(message)\n")
    router.load([name])
    posts.push(MailRequest(("127.0.0.1", 1), "", "Desk@Example.com", b"To: somebody@else.com\n\nhello\x00\xff"))
    work(router)
    (message,) = calls_of(name)
    assert isinstance(message, MailRequest)
    assert (message.Peer, message.From, message.To) == ("run/posts", "", "desk@example.com")
    assert message.Data == b"To: somebody@else.com\n\nhello\x00\xff"


def test_a_handler_that_raises_is_tried_again_and_then_a_dead_letter_bound_to_it_with_the_tracebacks(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): raise RuntimeError('no index today')\n")
    router.load([name])
    posts.push(mail())
    with frozen_clock() as clock:
        for _ in range(MAX_ATTEMPTS):
            assert dead(posts) == []
            work(router)
            clock.tick(3600)
    assert dead(posts) == [(f"{name}.START", "RuntimeError: no index today")]
    told = entries(posts.backend.report(posts.backend.keys("dead")[0]))
    assert [entry.attempt for entry in told] == list(range(1, MAX_ATTEMPTS + 1))
    assert all(f"{name}.py" in entry.details and "Traceback" in entry.details for entry in told)


def test_nonsense_is_a_dead_letter_too(router: RoutingBase, module: Module, mail: Mail, posts: Queue) -> None:
    name = module("@route('desk@example.com')\n@never_again\ndef START(message): return 'POSTING'\n")
    router.load([name])
    posts.push(mail())
    work(router)
    ((target, report),) = dead(posts)
    assert target == f"{name}.START"
    assert "returned 'POSTING'" in report


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("ValueError('x' * 10_000_000)", "ValueError: xxxx"),
        ("BadText()", "BadText: (an error whose text cannot be told)"),
    ],
)
def test_whatever_an_error_tells_its_job_is_settled_and_its_report_is_short(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, error: str, told: str
) -> None:
    name = module(
        f"""
        class BadText(Exception):
            def __str__(self): raise SystemExit
        @route('desk@example.com')
        @stateless
        @deferrable(max_attempts=1)
        def START(message): raise {error}
        """
    )
    router.load([name])
    posts.push(mail())
    work(router)
    ((_, reason),) = dead(posts)
    assert reason.startswith(told)
    assert len(reason) < 1100
    assert len(details(posts)) < 70_000


def test_a_failure_whose_traceback_cannot_be_told_has_a_report() -> None:
    class Bad(Exception):
        __notes__ = property(lambda _: 1 / 0)

    outcome = Dead("gave up")
    outcome.__cause__ = Bad()
    assert report_of(outcome) == "gave up\n\n(its traceback cannot be told: ZeroDivisionError)\n"


def test_even_a_handler_that_exits_is_only_a_failure(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    router.load([module("@route('desk@example.com')\n@stateless\ndef START(message): raise SystemExit(3)\n")])
    posts.push(mail())
    work(router)
    assert "SystemExit" in dead(posts)[0][1]


def test_of_three_calls_one_fails_and_only_that_one_runs_again(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module(
        """
        @route('desk@example.com')
        @stateless
        def ONE(message): CALLS.append('ONE')
        @route('desk@example.com')
        @stateless
        @never_again
        def TWO(message):
            CALLS.append('TWO')
            if CALLS.count('TWO') == 1: raise RuntimeError('boom')
        @route('desk@example.com')
        def START(message):
            CALLS.append('START')
            return START
        """
    )
    router.load([name])
    posts.push(mail())
    work(router)
    assert sorted(map(str, calls_of(name))) == ["ONE", "START", "TWO"]
    assert [target for target, _ in dead(posts)] == [f"{name}.TWO"]
    assert posts.backend.kick(posts.backend.keys("dead")[0])
    work(router)
    assert sorted(map(str, calls_of(name))) == ["ONE", "START", "TWO", "TWO"]
    assert dead(posts) == []


def test_a_message_for_several_recipients_is_one_delivery_for_each(
    router: RoutingBase, module: Module, posts: Queue, mail: Mail
) -> None:
    name = module(
        """
        @route('(who)@example.com', who='a|b|c')
        @stateless
        def START(message, who):
            CALLS.append(message.To)
            if who == 'b': raise Dead('not b')
        """
    )
    router.load([name])
    posts.push(mail(["a@example.com", "b@example.com", "c@example.com"]))
    work(router)
    assert sorted(map(str, calls_of(name))) == ["a@example.com", "b@example.com", "c@example.com"]
    store = posts.backend
    (key,) = store.keys("dead")
    job = store.get(key)
    assert job is not None
    assert job.recipients == ("b@example.com",)
    assert entries(store.report(key))[0].reason == "not b"


def test_more_than_nine_recipients_are_worked_in_their_order(
    router: RoutingBase, module: Module, posts: Queue, mail: Mail
) -> None:
    name = module("@route('(who)@y.test', who='.+')\n@stateless\ndef START(message, who): CALLS.append(who)\n")
    router.load([name])
    everybody = [f"r{number}" for number in range(101)]
    posts.push(mail([f"{who}@y.test" for who in everybody]))
    work(router, workers=1)
    assert calls_of(name) == everybody


def test_what_one_handler_pushes_is_worked_in_the_order_in_which_it_was_pushed(
    router: RoutingBase, module: Module, posts: Queue
) -> None:
    name = module(
        """
        from lamsonq.queue import Queue
        from lamsonq.mail import MailRequest
        @route('desk@example.com')
        @stateless
        def START(message):
            if message.body() == 'all':
                for number in range(101):
                    data = f'To: desk@example.com\\r\\n\\r\\n{number}'.encode()
                    Queue('run/posts').push(MailRequest(None, 'a@x.test', 'desk@example.com', data))
            else:
                CALLS.append(int(message.body()))
        """
    )
    router.load([name])
    router.deliver(MailRequest(None, "a@x.test", "desk@example.com", b"To: desk@example.com\r\n\r\nall"))
    work(router, workers=1)
    assert calls_of(name) == list(range(101))


@pytest.mark.parametrize("error", ["Later('the archive is down')", "SMTPError(450, 'later')"])
def test_later_is_delayed_with_its_reason(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, error: str
) -> None:
    name = module(f"@route('desk@example.com')\n@stateless\ndef START(message): raise {error}\n")
    router.load([name])
    posts.push(mail())
    work(router)
    store = posts.backend
    assert store.counts()["delayed"] == 1
    job = store.get(store.keys("delayed")[0])
    assert job is not None
    assert (job.target, job.attempts) == (f"{name}.START", 1)
    assert job.due is not None
    assert job.due > time.time()
    assert "later" in store.report(job.key) or "archive" in store.report(job.key)


def test_an_smtp_error_of_the_500s_is_never(router: RoutingBase, module: Module, mail: Mail, posts: Queue) -> None:
    router.load([module("@route('desk@example.com')\n@stateless\ndef START(message): raise SMTPError(550, 'gone')\n")])
    posts.push(mail())
    work(router)
    assert dead(posts)[0][1].startswith("550 gone")


def test_an_smtp_error_that_is_no_error_is_a_bug_and_not_tried_again(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    router.load([module("@route('desk@example.com')\n@stateless\ndef START(message): raise SMTPError(250, 'fine')\n")])
    posts.push(mail())
    work(router)
    assert dead(posts)[0][1].startswith("250 fine")


def test_what_no_route_takes_is_a_dead_letter_or_undeliverable(router: RoutingBase, mail: Mail, posts: Queue) -> None:
    posts.push(mail())
    work(router)
    assert dead(posts) == [(None, "no route takes desk@example.com")]
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    posts.push(mail())
    work(router)
    assert len(router.UNDELIVERABLE_QUEUE) == 1


def test_of_several_recipients_those_that_nothing_takes_are_kept(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(message.To)\n")
    router.load([name])
    posts.push(mail(["desk@example.com", "typo@example.com"]))
    work(router)
    assert dead(posts) == [(None, "no route takes typo@example.com")]
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    posts.push(mail(["desk@example.com", "typo@example.com"]))
    work(router)
    _, kept = router.UNDELIVERABLE_QUEUE.pop()
    assert kept is not None
    assert kept.route_to == ["typo@example.com"]
    assert calls_of(name) == ["desk@example.com"] * 2


def test_a_job_that_cannot_be_begun_comes_again_uncounted(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    class Down(MemoryStorage):
        down = False

        def get(self, key: str, sender: str) -> str:
            if self.down:
                raise ConnectionError("the state server does not answer")
            return super().get(key, sender)

    router.STATE_STORE = store = Down()
    router.load([module("@route('desk@example.com')\ndef START(message): CALLS.append(1)\n")])
    posts.push(mail())
    receiver = QueueReceiver("run/posts", router=router)
    receiver.bind()
    store.down = True
    receiver.run_once()
    (key,) = posts.backend.keys("delayed")
    job = posts.backend.get(key)
    assert job is not None
    assert (job.attempts, job.deliveries, job.target) == (0, 0, None)
    with pytest.raises(Refusal, match="the state server does not answer"):
        QueueReceiver("run/posts", router=router).bind()


def test_a_conversation_that_cannot_be_locked_is_free_again_later(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, here: Path
) -> None:
    name = module("@route('desk@example.com')\ndef START(message): CALLS.append(1)\n")
    router.STATE_STORE = SQLiteStorage("state.db")
    router.load([name])
    (here / "state.db-conversations").mkdir()
    posts.push(mail())
    work(router)
    assert posts.backend.counts()["delayed"] == 1
    (here / "state.db-conversations").rmdir()
    posts.backend.kick(posts.backend.keys("delayed")[0])
    work(router)
    assert calls_of(name) == [1]


def test_what_could_not_be_settled_is_given_back_as_soon_as_that_is_possible(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.source.RETRY_AFTER", 0.0)
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(1)\n")
    router.load([name])
    posts.push(mail())
    settle, refusals = posts.backend.settle, [2]

    def refused_twice(*arguments: object) -> list[bool]:
        if refusals[0]:
            refusals[0] -= 1
            raise OSError("Read-only file system")
        return settle(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(posts.backend, "settle", refused_twice)
    receiver = QueueReceiver(posts, 0.1, router=router)
    thread = threading.Thread(target=receiver.start)
    thread.start()
    until(lambda: len(calls_of(name)) == 2 and not any(posts.backend.counts().values()))
    receiver.stop()
    thread.join(PATIENCE)
    assert calls_of(name) == [1, 1]
    assert sum(posts.backend.counts().values()) == 0


def test_a_job_that_could_not_be_settled_is_routed_again_by_the_state_that_it_found(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.source.RETRY_AFTER", 0.0)
    name = module(
        """
        @route('desk@example.com')
        def START(message):
            CALLS.append('START')
            return CONFIRM
        @route('desk@example.com')
        def CONFIRM(message): CALLS.append('CONFIRM')
        """
    )
    router.load([name])
    posts.push(mail())
    settle, refusals = posts.backend.settle, [1]

    def refused_once(*arguments: object) -> list[bool]:
        if refusals[0]:
            refusals[0] -= 1
            raise OSError("No space left on device")
        return settle(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(posts.backend, "settle", refused_once)
    QueueReceiver(posts, router=router).start(one_shot=True)
    assert calls_of(name) == ["START", "START"]
    posts.push(mail())
    QueueReceiver(posts, router=router).start(one_shot=True)
    assert calls_of(name) == ["START", "START", "CONFIRM"]


def test_a_relay_that_is_down_leaves_the_job_bound_to_its_function(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module(
        """
        @route('(who)@example.com', who='a|b')
        @stateless
        def START(message, who):
            CALLS.append(message.To)
            raise Undelivered([Failure('out@elsewhere.org', None, Later('the relay is down'))])
        """
    )
    router.load([name])
    posts.push(mail("a@example.com"))
    work(router)
    job = posts.backend.get(posts.backend.keys("delayed")[0])
    assert job is not None
    assert (job.target, job.recipients) == (f"{name}.START", ("a@example.com",))


def test_async_functions_that_another_one_blocks_are_not_at_fault(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.attempt.RESPONDS_WITHIN", 0.1)
    name = module(
        """
        import threading
        HERE, GO = threading.Event(), threading.Event()
        @route('guilty@example.com')
        @stateless
        async def GUILTY(message):
            HERE.set()
            GO.wait(100)
        @route('innocent@example.com')
        @stateless
        async def INNOCENT(message): CALLS.append(1)
        """
    )
    router.load([name])
    posts.push(mail("guilty@example.com"))
    thread = threading.Thread(target=QueueReceiver("run/posts", router=router, timeout=0.5, sleep=0.05).start)
    thread.start()
    assert sys.modules[name].HERE.wait(PATIENCE)
    posts.push(mail("innocent@example.com"))
    thread.join(PATIENCE)  # it stops by itself, to be replaced
    sys.modules[name].GO.set()
    assert not thread.is_alive()
    ((target, _),) = dead(posts)
    assert target == f"{name}.GUILTY"
    assert "GO.wait(100)" in details(posts)
    assert calls_of(name) == []
    assert posts.backend.counts()["ready"] == 1


def test_what_a_hanging_handler_still_pushes_is_dropped(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module(
        """
        import threading
        from lamsonq.queue import Queue
        GO, GONE = threading.Event(), threading.Event()
        @route('desk@example.com')
        @stateless
        def START(message):
            GO.wait(100)
            try: Queue('run/out').push(message)
            except LeaseLost: CALLS.append('dropped')
            finally: GONE.set()
        """
    )
    router.load([name])
    posts.push(mail())
    work(router, timeout=0.1)
    sys.modules[name].GO.set()
    assert sys.modules[name].GONE.wait(PATIENCE)
    assert calls_of(name) == ["dropped"]
    assert Queue("run/out").count() == 0


def test_a_boot_that_would_feed_its_own_queue_for_ever_is_refused(router: RoutingBase) -> None:
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    with pytest.raises(SettingsError, match="UNDELIVERABLE_QUEUE = None"):
        QueueReceiver("run/undeliverable", router=router).bind()
    QueueReceiver("run/undeliverable", router=router, bound=True).bind()


@pytest.mark.parametrize("at", [float("nan"), float("inf"), "tomorrow"])
def test_later_takes_only_moments(at: object) -> None:
    with pytest.raises((TypeError, ValueError), match="at="):
        Later("soon", at)  # type: ignore[arg-type]
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    assert Later("soon", moment).at == moment.timestamp()


def test_what_a_handler_pushes_leaves_with_its_success(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module(
        """
        from lamsonq.queue import Queue
        @route('desk@example.com')
        @stateless
        @never_again
        def START(message):
            for queue in ('run/one', 'run/two', 'run/two'):
                Queue(queue).push(message)
            CALLS.append(1)
            if len(CALLS) == 1: raise RuntimeError('boom')
        """
    )
    router.load([name])
    posts.push(mail())
    work(router)
    assert (Queue("run/one").count(), Queue("run/two").count()) == (0, 0)
    posts.backend.kick(posts.backend.keys("dead")[0])
    work(router)
    assert (Queue("run/one").count(), Queue("run/two").count()) == (1, 2)


def test_a_handler_that_hangs_is_settled_without_it_and_the_process_asks_to_be_replaced(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module(
        """
        import threading
        GO = threading.Event()
        @route('desk@example.com')
        @stateless
        def START(message): GO.wait(100)
        """
    )
    router.load([name])
    posts.push(mail())
    receiver = work(router, timeout=0.1)
    sys.modules[name].GO.set()
    assert receiver.stuck
    ((target, report),) = dead(posts)
    assert target == f"{name}.START"
    assert "did not return within 0.1 seconds" in report
    assert "GO.wait" in details(posts)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_while_the_process_was_stopped_no_handler_has_hung(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = module(
        f"""
        import asyncio, threading, time
        STOPPED, LOOKED = threading.Event(), threading.Event()
        @route('desk@example.com')
        @stateless
        {kind} START(message):
            STOPPED.set()
            while not LOOKED.is_set(): {"await asyncio.sleep(0.01)" if kind != "def" else "time.sleep(0.01)"}
            CALLS.append(1)
        """
    )
    router.load([name])
    posts.push(mail())
    stopped, looked = sys.modules[name].STOPPED, sys.modules[name].LOOKED
    ahead = clock_ahead(monkeypatch, "lamsonq.attempt", "lamsonq.threads", "lamsonq.worker")
    receiver = QueueReceiver("run/posts", router=router, timeout=60)
    look = receiver._give_up_the_late

    def stop_and_look() -> None:
        if stopped.is_set() and not looked.is_set():
            ahead(3600)
            look()
            looked.set()
        look()

    monkeypatch.setattr(receiver, "_give_up_the_late", stop_and_look)
    receiver.start(one_shot=True)
    assert calls_of(name) == [1]
    assert not receiver.stuck
    assert not any(posts.backend.counts().values())


def test_while_it_looks_for_what_a_handler_hangs_at_no_garbage_is_collected() -> None:
    """In CPython 3.11 the process would hang, too."""
    look = """
        import gc, threading
        from lamsonq import attempt

        class Circle: pass

        for objects in range(1, 60):  # the garbage is collected after so many new ones: some of them are its list
            gc.collect(); gc.disable()
            circle = Circle()
            circle.itself, circle.own = circle, threading.local()
            del circle
            gc.set_threshold(objects); gc.enable()
            assert attempt._frame_of(threading.get_ident()) is not None
            assert gc.isenabled()
    """
    command = [sys.executable, "-c", textwrap.dedent(look)]
    assert subprocess.run(command, timeout=20, check=False).returncode == 0


def test_an_async_handler_that_hangs_is_cancelled(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module(
        """
        import asyncio
        @route('desk@example.com')
        @stateless
        async def START(message):
            try: await asyncio.sleep(60)
            except asyncio.CancelledError: CALLS.append('cancelled'); raise
        """
    )
    router.load([name])
    posts.push(mail())
    work(router, timeout=0.1)
    assert "did not return within" in dead(posts)[0][1]
    assert "await asyncio.sleep(60)" in details(posts), "with the line at which it waited"
    assert until(lambda: calls_of(name)) == ["cancelled"]


@pytest.mark.parametrize("beside", ["", "@route('desk@example.com')\n@stateless\ndef AUDIT(message): pass\n"])
def test_messages_of_one_sender_run_in_order_and_never_together(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, beside: str
) -> None:
    name = module(
        textwrap.dedent(
            """
            import threading
            ALONE = threading.Lock()
            @route('desk@example.com')
            def START(message):
                assert ALONE.acquire(blocking=False)
                CALLS.append(int(message.body()))
                ALONE.release()
            """
        )
        + beside
    )
    router.load([name])
    for n in range(60):
        posts.push(mail(body=str(n)))
    work(router, workers=8)
    assert calls_of(name) == list(range(60))


def test_a_conversation_that_another_process_has_is_put_back_uncounted(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module("@route('desk@example.com')\ndef START(message): CALLS.append(1)\n")
    router.STATE_STORE = SQLiteStorage("state.db")
    router.load([name])
    program = (
        "from lamsonq.state import Conversations; import sys\n"
        f"c = Conversations(sys.argv[1]); w = ({name!r}, 'alice@example.com')\n"
        "assert c.enter(w, lambda: None) and c.lock(w); print('locked', flush=True); sys.stdin.read()"
    )
    lock_file = str(router.STATE_STORE.lock_file)
    other = subprocess.Popen(
        [sys.executable, "-c", program, lock_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    posts.push(mail())
    work(router)
    other.kill()
    other.wait()
    assert calls_of(name) == []
    job = posts.backend.get(posts.backend.keys("delayed")[0])
    assert job is not None
    assert (job.attempts, job.deliveries) == (0, 0)


def test_a_receiver_may_be_given_another_deliver(posts: Queue, mail: Mail) -> None:
    taken: list[MailRequest] = []
    posts.push(mail(["a@example.com", "b@example.com"]))
    QueueReceiver("run/posts", deliver=taken.append).start(one_shot=True)
    assert [m.route_to for m in taken] == [["a@example.com", "b@example.com"]]
    assert posts.count() == 0


def test_recipients_that_a_relay_refused_are_kept_alone(posts: Queue, mail: Mail) -> None:
    def deliver(message: MailRequest) -> None:
        raise Undelivered(
            [
                Failure("a@example.com", None, SMTPError(550, "no such user")),
                Failure("b@example.com", None, Later("greylisted")),
            ]
        )

    posts.push(mail(["a@example.com", "b@example.com", "c@example.com"]))
    QueueReceiver("run/posts", deliver=deliver).start(one_shot=True)
    store = posts.backend
    kept = {state: [store.get(key) for key in store.keys(state)] for state in ("ready", "delayed", "dead")}
    assert kept["ready"] == []
    assert [j.recipients for j in kept["dead"] if j] == [("a@example.com",)]
    assert [j.recipients for j in kept["delayed"] if j] == [("b@example.com",)]


def test_run_once_serves_a_loop_of_ones_own(router: RoutingBase, module: Module, mail: Mail, posts: Queue) -> None:
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(1)\n")
    router.load([name])
    posts.push(mail())
    receiver = QueueReceiver(posts, router=router)
    assert receiver.run_once()
    assert not receiver.run_once()
    assert calls_of(name) == [1]


def test_run_once_gives_up_a_function_whose_time_is_over(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        import threading
        GO = threading.Event()
        @route('desk@example.com')
        @stateless
        def START(message): CALLS.append(GO.wait(60))
        """
    )
    router.load([name])
    posts = Queue("memory:run-once-hangs")
    posts.push(mail())
    receiver = QueueReceiver(posts, router=router, timeout=0.1)
    assert receiver.run_once()
    assert calls_of(name) == [], "it has not waited for the function"
    sys.modules[name].GO.set()
    assert receiver.stuck
    ((target, report),) = dead(posts)
    assert target == f"{name}.START"
    assert "did not return within 0.1 seconds" in report
    posts.push(mail())  # and goes on
    assert receiver.run_once()
    assert not receiver.run_once()


def test_run_once_here_runs_the_function_in_the_thread_of_its_caller(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    source = """
        import threading
        @route('desk@example.com')
        @stateless
        def START(message): CALLS.append(threading.get_ident())
    """
    name = module(source)
    router.load([name])
    posts = Queue("memory:run-once-here")
    receiver = QueueReceiver(posts, router=router)
    for here in (True, False):
        posts.push(mail())
        assert receiver.run_once(here=here)
    assert [ident == threading.get_ident() for ident in calls_of(name)] == [True, False]


def test_an_idle_receiver_wakes_at_once_and_stops_at_once(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    name = module(
        """
        import threading, time
        DONE, AT = threading.Event(), []
        @route('desk@example.com')
        @stateless
        def START(message):
            AT.append(time.monotonic())
            DONE.set()
        """
    )
    router.load([name])
    receiver = QueueReceiver("run/posts", 60, router=router)
    with caplog.at_level("DEBUG"):
        thread = threading.Thread(target=receiver.start)
        thread.start()
        until(lambda: "Sleeping for 60 seconds..." in caplog.text)
        pushed = time.monotonic()
        posts.push(mail())
        assert sys.modules[name].DONE.wait(PATIENCE)
        assert sys.modules[name].AT[0] - pushed < 30
        receiver.stop()
        thread.join(30)
    assert not thread.is_alive()
    lines = [record.getMessage() for record in caplog.records]
    assert "Queue receiver started on queue dir run/posts" in lines
    assert any(line.startswith("Pulled message with key: '") and line.endswith("' off") for line in lines)
    assert "Message received from Peer: 'run/posts', From: 'alice@example.com', to To ['desk@example.com']." in lines
    assert f"Message to desk@example.com was handled by {name}.START" in lines


def test_stopping_with_no_grace_gives_running_jobs_back_uncounted(
    router: RoutingBase, module: Module, mail: Mail, posts: Queue
) -> None:
    name = module(
        """
        import threading
        HERE, GO = threading.Event(), threading.Event()
        @route('desk@example.com')
        @stateless
        def START(message):
            HERE.set()
            GO.wait(100)
        """
    )
    router.load([name])
    posts.push(mail())
    receiver = QueueReceiver("run/posts", router=router)
    thread = threading.Thread(target=receiver.start)
    thread.start()
    assert sys.modules[name].HERE.wait(PATIENCE)
    receiver.stop(grace=0)
    thread.join(PATIENCE)
    sys.modules[name].GO.set()
    assert not thread.is_alive()
    (job,) = posts.backend.reserve(1)
    assert (job.deliveries, job.attempts) == (0, 0)


def test_a_handler_that_kills_its_process_is_dead_after_three_deliveries(here: Path, mail: Mail, posts: Queue) -> None:
    (here / "poison.py").write_text(
        textwrap.dedent(
            """
            import os
            from lamsonq.routing import route, stateless, RoutingBase
            from lamsonq.worker import QueueReceiver
            @route('(who)@example.com', who='.+')
            @stateless
            def START(message, who):
                open('started', 'a').write(who + '\\n')
                if who == 'poison': os._exit(9)
            if __name__ == '__main__':
                router = RoutingBase()
                router.load(['poison'])
                QueueReceiver('run/posts', router=router, workers=1).start(one_shot=True)
            """
        )
    )
    posts.push(mail("poison@example.com"))
    posts.push(mail("good@example.com"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    for _ in range(4):
        subprocess.run([sys.executable, "poison.py"], env=environment, cwd=here, timeout=30)
    started = (here / "started").read_text().split()
    assert started.count("poison") == 3
    assert "good" in started
    ((_, report),) = dead(posts)
    assert "worker" in report
    assert "3" in report


def test_a_stateless_function_runs_once_beside_a_stateful_one_that_is_not_in_state(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module(
        """
        @route("desk@example.com")
        def WAITING(message):
            CALLS.append("waiting")

        @route("desk@example.com")
        @stateless
        def COPY(message):
            CALLS.append("copy")
        """
    )
    posts, undeliverable = Queue("memory:posts-beside"), Queue("memory:undeliverable-beside")
    router.load([name])
    posts.push(mail())
    QueueReceiver(posts, router=router).start(one_shot=True)
    assert sys.modules[name].CALLS == ["copy"]
    assert posts.backend.counts()["dead"] == 1
    router.UNDELIVERABLE_QUEUE = undeliverable
    posts.push(mail())
    QueueReceiver(posts, router=router).start(one_shot=True)
    assert sys.modules[name].CALLS == ["copy", "copy"]
    assert (posts.backend.counts()["dead"], undeliverable.count()) == (1, 1)


def test_a_message_for_a_conversation_that_is_in_another_queue_goes_there_once(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    behind = module('@route("desk@example.com")\ndef WORKING(message):\n    CALLS.append("working")\n')
    front = module(
        f"""
        import {behind}

        @route("desk@example.com")
        def START(message):
            CALLS.append("start")
            return {behind}.WORKING

        @route("desk@example.com")
        @stateless
        def COPY(message):
            CALLS.append("copy")
        """
    )
    posts, other = Queue("memory:posts-front"), Queue("memory:posts-behind")
    router.load([front])
    router.hand_over([behind], other)
    for _ in range(2):
        posts.push(mail())
        QueueReceiver(posts, router=router).start(one_shot=True)
    assert sorted(sys.modules[front].CALLS) == ["copy", "copy", "start"]
    assert (posts.count(), other.count()) == (0, 2)


def test_what_functions_have_finished_is_settled_together(
    router: RoutingBase, module: Module, mail: Mail, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue("sqlite:run/q.db?queue=posts")
    together = threading.Barrier(4)
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS[0].wait(10)\n")
    router.load([name])
    sys.modules[name].CALLS.append(together)
    for _ in range(4):
        queue.push(mail())
    finished: list[int] = []
    finish = queue.backend.finish

    def noted(jobs: Sequence[Job], outcome: Done) -> list[Job]:
        finished.append(len(jobs))
        return finish(jobs, outcome)

    monkeypatch.setattr(queue.backend, "finish", noted)
    QueueReceiver(queue, router=router, workers=4).start(one_shot=True)
    assert sum(finished) == 4
    assert sum(queue.backend.counts().values()) == 0


def test_what_is_finished_is_settled_while_its_receiver_waits_for_more(
    router: RoutingBase, module: Module, mail: Mail, here: Path
) -> None:
    queue = Queue("sqlite:run/q.db?queue=posts")
    router.load([module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(1)\n")])
    receiver = QueueReceiver(queue, router=router, sleep=60)
    thread = threading.Thread(target=receiver.start)
    thread.start()
    try:
        for _ in range(3):
            queue.push(mail())
            until(lambda: sum(queue.backend.counts().values()) == 0)
    finally:
        receiver.stop()
        thread.join(PATIENCE)


def test_what_is_finished_and_cannot_be_settled_is_given_back(
    router: RoutingBase, module: Module, mail: Mail, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue("sqlite:run/q.db?queue=posts")
    router.load([module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(1)\n")])
    queue.push(mail())

    def full(_jobs: object, _outcome: object) -> list[Job]:
        raise QueueError("the disk is full")

    monkeypatch.setattr(queue.backend, "finish", full)
    QueueReceiver(queue, router=router).start(one_shot=True)
    assert queue.backend.counts()["delayed"] == 1
