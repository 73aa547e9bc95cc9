"""From the last dot to the reply: whatever fails on the way, every client is told, once, and no other notices."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from lamsonq import about
from lamsonq.authentication import Verifier
from lamsonq.commit import LOG, Committer
from lamsonq.envelope import Envelope
from lamsonq.errors import QueueError
from lamsonq.jobs import Job
from lamsonq.lmtp import LMTPReceiver
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.smtp import SMTPReceiver
from lamsonq.state import SQLiteStorage
from lamsonq.threads import Threads

from .clients import MESSAGE, Client
from .waiting import PATIENCE, until

Serve = Callable[..., SMTPReceiver]


class Gated(Queue):
    """A queue whose puts wait for a gate."""

    def __init__(self, directory: str = "memory:gated") -> None:
        super().__init__(directory)
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)

    def keep(self, jobs: Sequence[Job]) -> None:
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        super().keep(jobs)


@pytest.fixture
def gated() -> Iterator[Gated]:
    queue = Gated()
    queue.clear()
    yield queue
    queue.gate.set()


@pytest.fixture
def handlers(module: Callable[..., str], router: RoutingBase) -> Callable[[str], Any]:
    """Routes of this source; its module."""

    def load(source: str) -> Any:
        router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
        name = module(source)
        router.load([name])
        return __import__(name)

    return load


class Once:
    """A function whose first call raises this."""

    def __init__(self, error: BaseException, real: Callable[..., Any]) -> None:
        self.error: BaseException | None = error
        self.real = real

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.real(*arguments, **options)


def sent(client: Client, *recipients: str) -> None:
    """A whole message, whose replies are still to be read."""
    client.begin(*recipients)
    assert client.say("DATA").startswith("354")
    client.send(MESSAGE + b".\r\n")


def lmtp(receiver: SMTPReceiver) -> Client:
    client = Client(receiver, greet=False)
    client.say("LHLO client.test")
    return client


# -- what ends together -------------------------------------------------------------------------------------------

DESK = """
from lamsonq.queue import Queue
from lamsonq.routing import route

@route("(n)@(host)", n="[0-9]+", host=".+")
def START(message, n, host):
    Queue("memory:together").push(message)
    return NEXT

@route("(n)@(host)", n="[0-9]+", host=".+")
def NEXT(message, n, host):
    return START
"""


class Counted:
    """A method of a store behind a gate, which notes how much it is given, and refuses what holds this."""

    def __init__(self, real: Callable[[Sequence[Any]], Any], refuses: str = "") -> None:
        self.real, self.refuses = real, refuses
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.given: list[int] = []

    def __call__(self, things: Sequence[Any]) -> Any:
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        self.given.append(len(things))
        if self.refuses and any(self.refuses in repr(thing) for thing in things):
            raise QueueError(f"no {self.refuses}")
        return self.real(things)


@contextlib.contextmanager
def six_at_once(receiver: SMTPReceiver, gated: Counted) -> Iterator[list[str]]:
    """The replies to six messages, of which five end while the first one is being kept."""
    replies: list[str] = []
    with contextlib.ExitStack() as clients:
        opened = [clients.enter_context(Client(receiver)) for _ in range(6)]
        for number, client in enumerate(opened):
            client.begin(f"{number}@x.test", sender=f"{number}@y.test")
            assert client.say("DATA").startswith("354")
        opened[0].send(MESSAGE + b".\r\n")
        assert gated.begun.acquire(timeout=PATIENCE)
        for client in opened[1:]:
            client.send(MESSAGE + b".\r\n")
        until(lambda: len(receiver._committer.together._waiting) == 5)
        gated.gate.set()
        replies += [client.reply() for client in opened]
        yield replies


def test_functions_that_end_while_others_are_kept_share_the_next_put(
    serve: Serve, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue("memory:together")
    queue.clear()
    handlers(DESK)
    gated = Counted(queue.backend.put)
    monkeypatch.setattr(queue.backend, "put", gated)
    with six_at_once(serve(deliver=None), gated) as replies:
        assert [reply[:3] for reply in replies] == ["250"] * 6
    assert gated.given == [1, 5]
    assert queue.count() == 6


def test_they_share_the_next_commit_of_their_states_too(
    serve: Serve, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.STATE_STORE = SQLiteStorage("run/state.db")
    module = handlers(DESK)
    gated = Counted(router.STATE_STORE.commit_all)
    monkeypatch.setattr(router.STATE_STORE, "commit_all", gated)
    with six_at_once(serve(deliver=None), gated) as replies:
        assert [reply[:3] for reply in replies] == ["250"] * 6
    assert gated.given == [1, 5]
    states = [router.STATE_STORE.look(module.__name__, f"{n}@y.test", "anything") for n in range(6)]
    assert states == [("NEXT", None)] * 6


@pytest.mark.parametrize(("fails", "reply"), [("put", "451"), ("commit_all", "250")])
def test_one_that_cannot_be_kept_takes_no_other_with_it(
    serve: Serve, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch, fails: str, reply: str
) -> None:
    queue = Queue("memory:together")
    queue.clear()
    router.STATE_STORE = SQLiteStorage("run/state.db")
    handlers(DESK)
    store = queue.backend if fails == "put" else router.STATE_STORE
    gated = Counted(getattr(store, fails), refuses="3@y.test")
    monkeypatch.setattr(store, fails, gated)
    with six_at_once(serve(deliver=None), gated) as replies:
        assert [reply[:3] for reply in replies] == ["250", "250", "250", reply, "250", "250"]
    assert gated.given == [1, 5, 1, 1, 1, 1, 1]
    assert queue.count() == 5
    waiting = Queue("run/undeliverable").backend.counts()["delayed"]  # bound: its function runs once more, later
    assert waiting == (reply == "250")


def test_a_queue_that_has_no_room_for_what_a_function_pushes_is_one_line_for_each_message(
    serve: Serve, handlers: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handlers(DESK)
    monkeypatch.setattr(Queue("memory:together").backend, "put", Once(QueueError("no room"), print))
    with Client(serve(deliver=None)) as client:
        assert client.mail("1@x.test").startswith("451")
    [record] = until(lambda: [record for record in caplog.records if "could not be settled" in record.message])
    assert record.message.endswith(": no room")
    assert record.exc_info is None


def test_a_state_store_that_hangs_asks_for_a_new_process(
    serve: Serve, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers(DESK)
    gated = Counted(router.STATE_STORE.commit_all)
    monkeypatch.setattr(router.STATE_STORE, "commit_all", gated)
    receiver = serve(deliver=None, timeout=0.05)
    with Client(receiver) as client:
        sent(client, "1@x.test")
        until(lambda: receiver.stuck)
        gated.gate.set()
        assert client.reply().startswith("250")


# -- what fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, SystemExit, QueueError])
@pytest.mark.parametrize("store", ["memory:trace", "run/trace", "sqlite:run/q.db"])
def test_a_message_whose_envelope_cannot_be_completed_holds_up_no_other(
    serve: Serve, error: type[BaseException], store: str
) -> None:
    queue = Queue(store)
    queue.clear()
    receiver = serve(deliver=queue.push)

    def inspect(envelope: Envelope, content: bytes, id: str) -> tuple[Envelope, bytes]:
        if envelope.mail_from == "odd@x.test":
            raise error(id)
        return receiver._inspected(envelope, content, id)

    receiver._committer.inspect = inspect
    with Client(receiver) as client:
        assert client.mail(sender="odd@x.test").startswith("451")
        assert client.mail().startswith("250")
    assert queue.count() == 1
    until(lambda: not receiver._committer.open)
    assert receiver.traffic.memory == 0


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_verifier_that_fails_holds_up_no_other(serve: Serve, error: type[BaseException]) -> None:
    verifier = Verifier("mx.test")
    receiver = serve(deliver=Queue("memory:verified").push, verify=verifier)
    verify = Once(error("no"), verifier.verify)
    object.__setattr__(verifier, "verify", verify)
    with Client(receiver) as client:
        assert client.mail().startswith("451 4.3.0 Internal error")
        assert client.mail().startswith("250")


@pytest.mark.parametrize("error", [QueueError, OSError, SystemExit, MemoryError])
def test_a_store_that_fails_in_whatever_way_is_451_and_the_next_message_is_kept(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    queue = Queue("memory:fails")
    queue.clear()
    monkeypatch.setattr(queue.backend, "put", Once(error("no"), queue.backend.put))
    receiver = serve(deliver=queue.push)
    with Client(receiver) as client:
        assert client.mail().startswith("451 4.3.0")
        assert client.mail().startswith("250")
    assert queue.count() == 1


def test_a_store_that_has_no_room_is_one_line_for_each_message(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Full(Queue):
        def keep(self, jobs: Sequence[Job]) -> None:
            raise QueueError(f"no room for {len(jobs)}")

    receiver = serve(deliver=Full("memory:full").push)
    with Client(receiver) as client:
        assert client.mail().startswith("451 ")
    assert "]. no room for 1" in caplog.text
    assert "Exception while processing message from Peer: ('127.0.0.1'" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_plan_that_fails_is_451_for_each_recipient(serve: Serve, handlers: Any, router: RoutingBase) -> None:
    noted = handlers('@route("(who)@y.test", who=".+")\n@stateless\ndef TAKE(message, who):\n    CALLS.append(who)\n')
    receiver = serve(LMTPReceiver, deliver=None)
    router.plan = Once(ValueError("no"), router.plan)  # type: ignore[method-assign]
    with lmtp(receiver) as client:
        sent(client, "a@y.test", "b@y.test", "a@y.test")
        assert client.replies(3) == ["451"] * 3
        sent(client, "a@y.test", "b@y.test", "a@y.test")
        assert client.replies(3) == ["250"] * 3
    assert noted.CALLS == ["a", "b"]
    assert receiver.traffic.memory == 0


def test_what_cannot_be_kept_as_undeliverable_is_refused_for_its_recipient_alone(
    serve: Serve, handlers: Any, router: RoutingBase
) -> None:
    noted = handlers('@route("(who)@y.test", who=".+")\n@stateless\ndef TAKE(message, who):\n    CALLS.append(who)\n')
    receiver = serve(LMTPReceiver, deliver=None)
    router.keep_undeliverable = Once(OSError(28, "no space"), None)  # type: ignore[arg-type, method-assign]
    with lmtp(receiver) as client:
        sent(client, "a@y.test", "postmaster", "b@y.test")
        assert client.replies(3) == ["250", "451", "250"]
    assert noted.CALLS == ["a", "b"]


def test_an_undeliverable_queue_that_has_no_room_is_one_line_for_each_message(
    serve: Serve, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handlers('@route("a@y.test")\n@stateless\ndef FAIL(message):\n    raise ValueError("its own")\n')
    receiver = serve(deliver=None)
    assert router.UNDELIVERABLE_QUEUE is not None

    def full(_puts: object) -> None:
        raise QueueError("no room")

    monkeypatch.setattr(router.UNDELIVERABLE_QUEUE.backend, "put", full)
    with Client(receiver) as client:
        mark = client.mail("a@y.test").removeprefix("451 4.3.0 Internal error ").partition(",")[0]
    assert f"Session error {mark}: no room" in caplog.text
    assert caplog.text.count("Traceback") == 1  # the function's


def test_a_report_that_cannot_be_made_refuses_no_message_that_was_handled(
    serve: Serve, handlers: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noted = handlers('@route("a@y.test")\n@stateless\ndef TAKE(message):\n    CALLS.append(1)\n')
    monkeypatch.setattr("lamsonq.smtp.report_of", Once(ValueError("no report"), None))  # type: ignore[arg-type]
    with Client(serve(deliver=None, reports=lambda _: None)) as client:
        assert client.mail("a@y.test").startswith("250")
    assert noted.CALLS == [1]
    assert "no report" in caplog.text


# -- what is logged -------------------------------------------------------------------------------------------------


def test_what_is_logged_of_a_spooled_message_is_about_it(serve: Serve) -> None:
    seen: list[tuple[str, str]] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.getMessage(), about.current().id))

    noting = Noting()
    LOG.addHandler(noting)
    before = LOG.level
    LOG.setLevel(logging.DEBUG)
    try:
        with Client(serve(deliver=Queue("memory:logged").push)) as client:
            reply = client.mail()
    finally:
        LOG.setLevel(before)
        LOG.removeHandler(noting)
    [id] = [id for line, id in seen if line.startswith("Message received")]
    assert reply == f"250 2.0.0 Ok: queued as {id}"


# -- who is told ----------------------------------------------------------------------------------------------------


def test_a_reply_that_cannot_be_told_holds_up_no_group_behind_it(handlers: Any, router: RoutingBase) -> None:
    noted = handlers('@route("(who)@y.test", who=".+")\n@stateless\ndef TAKE(message, who):\n    CALLS.append(who)\n')
    envelope = Envelope("a@x.test", ("a@y.test", "b@y.test"), ("127.0.0.1", 1), 1.0)
    told: list[str] = []
    pool = Threads(2, "test")

    async def commit() -> None:
        committer = Committer(asyncio.get_running_loop(), pool, router, None, 10.0, lambda: None)
        tell = Once(ValueError("the session has a fault"), told.append)
        committer.commit(envelope, MESSAGE, [("a@y.test",), ("b@y.test",)], tell)
        while committer.open:
            await asyncio.sleep(0.001)
        committer.close()

    asyncio.run(asyncio.wait_for(commit(), 10))
    pool.close(wait=True)
    assert [reply[:3] for reply in told] == ["250"]
    assert noted.CALLS == ["a", "b"]


def test_where_no_thread_can_be_had_the_client_keeps_the_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unstarted(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    queue = Queue("memory:threads")
    queue.clear()
    spooling, calling = serve(deliver=queue.push), serve()
    for receiver, module in ((spooling, "spool"), (calling, "threads")):
        with monkeypatch.context() as short, Client(receiver) as client:
            short.setattr(f"lamsonq.{module}.threading.Thread", Unstarted)
            assert client.mail().startswith("451 4.3.0 Internal error")
            short.undo()
            assert client.mail().startswith("250")
        assert receiver.traffic.memory == 0
    assert queue.count() == 1


def test_each_group_of_a_spooled_message_is_told_and_its_memory_is_given_back(serve: Serve, gated: Gated) -> None:
    receiver = serve(LMTPReceiver, deliver=gated.push)
    with lmtp(receiver) as client:
        sent(client, "a@y.test", "b@y.test", "a@y.test")
        assert gated.begun.acquire(timeout=PATIENCE)
        assert receiver.traffic.memory == len(MESSAGE)
        gated.gate.set()
        assert {client.reply() for _ in range(3)} == {f"250 2.0.0 Ok: queued as {gated.keys()[0]}"}
        assert receiver.traffic.memory == 0
        assert client.say("NOOP").startswith("250")
    job = gated.backend.get(gated.keys()[0])
    assert job is not None
    assert job.recipients == ("a@y.test", "b@y.test")


def test_a_message_whose_client_has_gone_is_kept_and_forgotten(serve: Serve, gated: Gated) -> None:
    receiver = serve(deliver=gated.push)
    client = Client(receiver)
    sent(client, "a@y.test")
    assert gated.begun.acquire(timeout=PATIENCE)
    client.reset()
    until(lambda: not receiver._sessions)
    assert receiver.traffic.memory == len(MESSAGE)
    gated.gate.set()
    until(lambda: not receiver._committer.open)
    assert receiver.traffic.memory == 0
    assert gated.count() == 1


# -- the end ----------------------------------------------------------------------------------------------------------


def test_what_waits_in_the_spool_when_the_receiver_ends_is_kept_and_answered(serve: Serve, gated: Gated) -> None:
    receiver = serve(deliver=gated.push)
    clients = [Client(receiver) for _ in range(3)]
    for client in clients:
        sent(client, "a@y.test")
    assert gated.begun.acquire(timeout=PATIENCE)
    until(lambda: len(receiver._committer.open) == 3)
    receiver.stop(10)
    gated.gate.set()
    assert [client.reply()[:3] for client in clients] == ["250"] * 3
    for client in clients:
        client.close()
    receiver.join()
    assert gated.count() == 3


def test_who_waits_for_the_spool_longer_than_the_grace_is_sent_away(serve: Serve, gated: Gated) -> None:
    receiver = serve(deliver=gated.push)
    with Client(receiver) as client:
        sent(client, "a@y.test")
        assert gated.begun.acquire(timeout=PATIENCE)
        receiver.stop(0)
        assert client.rest() == "421 4.3.2 Service shutting down\r\n"
    receiver.join()
    gated.gate.set()  # nobody listens any more, and nothing comes of that
    until(lambda: gated.count() == 1)


def test_a_put_that_hangs_asks_for_a_new_process(serve: Serve, gated: Gated) -> None:
    receiver = serve(deliver=gated.push, timeout=0.05)
    with Client(receiver) as client:
        sent(client, "a@y.test")
        until(lambda: receiver.stuck)
        receiver.stop(0)
        assert client.rest().startswith("421")
