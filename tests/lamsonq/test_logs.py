"""Log lines: as JSON whatever is logged, the one id of a message in every line about it, and files that are moved."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import smtplib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from lamsonq import about, settings
from lamsonq.about import About
from lamsonq.commands.project import generate
from lamsonq.jobs import Done, Outcome
from lamsonq.keys import derived_key
from lamsonq.logs import JSONFormatter, LineFormatter
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.smtp import SMTPReceiver
from lamsonq.worker import QueueReceiver

from .waiting import PATIENCE, until

SHIPPED = Path(__file__).parents[2] / "config/logging.toml"
Write = Callable[..., str]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in ("mail.log", "asyncio")}
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers, root.level = handlers, level
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


# ---- JSON ------------------------------------------------------------------------------------------------------


def written(message: object, *args: object, **extra: Any) -> dict[str, Any]:
    """The one line that becomes of a call of the logger."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    logger = logging.Logger("desk")
    logger.addHandler(handler)
    logger.error(message, *args, **extra)
    line = stream.getvalue()
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert line.isascii()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


def test_a_line_tells_when_where_and_what() -> None:
    before = datetime.now(UTC)
    found = written("Got %d messages\nfrom %s", 3, "Jürg\u2028")
    moment = found.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)
    assert abs((datetime.fromisoformat(moment) - before).total_seconds()) < 5
    assert found == {
        "level": "ERROR",
        "logger": "desk",
        "message": "Got 3 messages\nfrom Jürg\u2028",
        "process": os.getpid(),
    }


def test_what_the_line_is_about_is_told_as_far_as_it_is_known() -> None:
    with about.about(About("1.M2P3Q4.host", "run/posts")):
        found = written("hello")
    assert (found["id"], found["queue"]) == ("1.M2P3Q4.host", "run/posts")
    assert "handler" not in found
    assert "id" not in written("hello")


def test_an_exception_is_told_in_a_word_and_whole() -> None:
    try:
        raise ValueError("no\nsuch thing")
    except ValueError:
        found = written("failed", exc_info=True, stack_info=True)
    assert found["error"] == "ValueError: no\nsuch thing"
    assert found["traceback"].startswith("Traceback (most recent call last):\n")
    assert found["stack"].startswith("Stack (most recent call last):\n")
    assert "error" not in written("failed", exc_info=True)


def test_extra_fields_are_carried_and_take_no_name_of_ours() -> None:
    extra = {
        "ticket": 7,
        "tags": ["a", {"b": None}],
        "time": "now",
        "error": "none",
        "id": "mine",
        "when": datetime.min,
    }
    found = written("hello", extra=extra)
    assert (found["ticket"], found["tags"], found["time_"], found["id"]) == (7, ["a", {"b": None}], "now", "mine")
    assert found["when"] == "datetime.datetime(1, 1, 1, 0, 0)"
    assert found["time"] != "now"
    assert found["error"] == "none"


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("str")

    def __repr__(self) -> str:
        raise RuntimeError("repr")


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("str")


def test_what_cannot_be_written_does_not_lose_the_line() -> None:
    itself: list[object] = []
    itself.append(itself)
    hostile = {
        "a": Hostile(),
        "b": itself,
        "c": {Hostile(): 1},
        "d": float("nan"),
        "e": 10**6000,
        "f": b"\xff",
        "g": {1},
    }
    found = written("hello", extra=hostile)
    assert found["message"] == "hello"
    assert (found["a"], found["d"], found["f"], found["g"]) == ("<Hostile>", "nan", "b'\\xff'", "{1}")
    assert found["e"].startswith("0x")
    assert written(Hostile())["message"].startswith("<Hostile>")
    assert written("%d", "x")["message"].startswith("%d ('x',)")
    assert written("\udce4")["message"] == "\udce4"
    try:
        raise HostileError
    except HostileError:
        assert written("hello", exc_info=True)["message"] == "hello"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.builds(object),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.binary(), inner) | st.tuples(inner),
)


@settings_of(max_examples=50)
@given(st.text(), st.lists(VALUES, max_size=3), st.dictionaries(st.text(max_size=20), VALUES, max_size=3))
def test_every_call_of_a_logger_is_one_line_of_json(message: str, args: list[object], extra: dict[str, object]) -> None:
    extra = {key: value for key, value in extra.items() if key not in vars(logging.makeLogRecord({}))}
    extra.pop("message", None)
    extra.pop("asctime", None)
    assert written(message, *args, extra=extra)["level"] == "ERROR"


def test_the_plain_line_may_show_the_id_too() -> None:
    formatter = LineFormatter("%(id)s|%(queue)s|%(handler)s|%(recipient)s|%(message)s")
    with about.about(About("7", "run/posts").for_call("desk.START", "desk@y.test")):
        assert formatter.format(logging.makeLogRecord({"msg": "hi"})) == "7|run/posts|desk.START|desk@y.test|hi"
    assert formatter.format(logging.makeLogRecord({"msg": "hi"})) == "||||hi"


# ---- one id for each message -----------------------------------------------------------------------------------


class Lines(logging.Handler):
    """Every line of the framework and of handlers, as programs read it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.setFormatter(JSONFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(json.loads(self.format(record)))

    def about(self, id: str) -> list[str]:
        """What is said about a message, but for the routes that were tried."""
        return [line["message"] for line in self.found if line.get("id") == id and line["logger"] == "root"]

    def received(self) -> list[str]:
        """The ids of the messages that came in."""
        return [line["id"] for line in self.found if line["message"].startswith("Message received from Peer")]

    def line(self, beginning: str) -> dict[str, Any]:
        (line,) = (line for line in self.found if line["message"].startswith(beginning))
        return line


@pytest.fixture
def lines() -> Lines:
    handler = Lines()
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.INFO)
    return handler


@pytest.fixture
def start(router: RoutingBase) -> Iterator[Callable[..., int]]:
    """`start(...)` starts a receiver; its port."""
    started: list[SMTPReceiver] = []
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")

    def begin(**options: Any) -> int:
        receiver = SMTPReceiver("127.0.0.1", 0, router=router, **options)
        receiver.start()
        started.append(receiver)
        return receiver.port

    yield begin
    for receiver in started:
        receiver.stop(0)
        receiver.join()


def send(port: int, *recipients: str) -> str:
    """The reply to a message."""
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as client:
        client.ehlo()
        client.mail("a@x.test")
        for to in recipients:
            assert client.rcpt(to)[0] == 250
        return client.data(b"Subject: hi\r\n\r\nhello\r\n")[1].decode()


def queued_as(reply: str) -> str:
    found = re.search(r"queued as (\S+)", reply)
    assert found, reply
    return found[1]


HANDLERS = """
import asyncio, logging, threading
from lamsonq.queue import Queue

@route("desk@y.test")
@stateless
def DESK(message):
    logging.info("in the desk")
    Queue("run/posts").push(message)
    Queue("run/posts").push(message)

@route("slow@y.test")
@stateless
async def SLOW(message):
    logging.info("before the wait")
    await asyncio.sleep(0.01)
    logging.info("after the wait")
    await asyncio.to_thread(logging.info, "in a thread")
    Queue("run/posts").push(message)

@route("talk@y.test")
def START(message):
    logging.info("beginning to talk")
    Queue("run/posts").push(message)
    return TALKING

@route("talk@y.test")
def TALKING(message):
    logging.info("talking on")
    Queue("run/posts").push(message)
    return TALKING

@route("broken@y.test")
@stateless
def BROKEN(message):
    raise RuntimeError("it is broken")
"""


@pytest.fixture
def handlers(module: Write, router: RoutingBase) -> str:
    name = module(HANDLERS)
    router.load([name])
    return name


def test_the_id_is_the_key_of_what_the_function_pushes(lines: Lines, start: Callable[..., int], handlers: str) -> None:
    send(start(), "desk@y.test")
    (id,) = lines.received()
    assert set(Queue("run/posts").keys()) == {id, derived_key(derived_key(id, 0), 1)}
    line = lines.line("in the desk")
    assert (line["id"], line["handler"], line["recipient"]) == (id, f"{handlers}.DESK", "desk@y.test")
    assert "queue" not in line
    until(lambda: f"Message to desk@y.test was handled by {handlers}.DESK" in lines.about(id))


def test_the_reply_names_the_id_also_where_nothing_is_kept(
    lines: Lines, start: Callable[..., int], module: Write, router: RoutingBase
) -> None:
    router.load([module('import logging\n@route("a@y.test")\n@stateless\ndef START(m):\n    logging.info("seen")\n')])
    reply = send(start(), "a@y.test")
    (id,) = lines.received()
    assert reply == f"2.0.0 Ok: handled as {id}"
    assert lines.line("seen")["id"] == id


def test_an_async_function_and_its_threads_are_logged_under_the_id(
    lines: Lines, start: Callable[..., int], handlers: str
) -> None:
    send(start(), "slow@y.test")
    (id,) = lines.received()
    said = [
        "before the wait",
        "after the wait",
        "in a thread",
        f"Message to slow@y.test was handled by {handlers}.SLOW",
    ]
    until(lambda: lines.about(id)[1:] == said)


def test_a_conversation_that_goes_on_is_logged_under_the_function_that_it_chose(
    lines: Lines, start: Callable[..., int], handlers: str
) -> None:
    port = start()
    for _ in range(2):
        send(port, "talk@y.test")
    ids = lines.received()
    assert lines.line("beginning to talk")["id"] == ids[0]
    line = lines.line("talking on")
    assert (line["id"], line["handler"]) == (ids[1], f"{handlers}.TALKING")


def test_messages_that_wait_for_each_other_keep_their_ids(
    lines: Lines, start: Callable[..., int], module: Write, router: RoutingBase
) -> None:
    name = module("""
    import logging, time
    from lamsonq.queue import Queue

    @route("talk@y.test")
    def START(message):
        time.sleep(0.05)
        return TALKING(message)

    @route("talk@y.test")
    def TALKING(message):
        logging.info("pushed %s", Queue("run/posts").push(message))
        return TALKING
    """)
    router.load([name])
    port = start(workers=3)
    senders = [threading.Thread(target=send, args=(port, "talk@y.test")) for _ in range(6)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    ids = lines.received()
    assert len(set(ids)) == 6
    until(lambda: all(len(lines.about(id)) == 3 for id in ids))
    for id in ids:
        assert lines.about(id)[1] == f"pushed {id}"
        function = lines.about(id)[2].removeprefix("Message to talk@y.test was handled by ")
        assert lines.line(f"pushed {id}")["handler"] == function


def test_what_fails_is_kept_and_logged_under_the_id(lines: Lines, start: Callable[..., int], handlers: str) -> None:
    id = queued_as(send(start(), "broken@y.test"))
    assert lines.received() == [id]
    error = lines.line("!!! ERROR handling")
    assert (error["id"], error["handler"], error["error"]) == (id, f"{handlers}.BROKEN", "RuntimeError: it is broken")
    assert "in BROKEN" in error["traceback"]
    assert lines.line("Failed to deliver message because of")["id"] == id


def test_every_recipient_and_a_message_that_nobody_takes_have_the_id(
    lines: Lines, start: Callable[..., int], handlers: str
) -> None:
    assert handlers
    port = start()
    send(port, "desk@y.test", "slow@y.test")
    (id,) = lines.received()
    parts = [derived_key(derived_key(id, 0), number) for number in (1, 2)]
    assert set(Queue("run/posts").keys()) == {id, *parts}
    assert {line["recipient"] for line in lines.found if line.get("id") == id and "handler" in line} == {
        "desk@y.test",
        "slow@y.test",
    }
    lines.found.clear()
    send(port, "postmaster")
    assert lines.received() == [lines.line("Message to 'postmaster' from 'a@x.test' undeliverable")["id"]]
    assert Queue("run/undeliverable").keys() == lines.received()


def test_a_spool_hands_the_id_on_to_the_process_behind_it(
    lines: Lines, start: Callable[..., int], handlers: str, router: RoutingBase
) -> None:
    id = queued_as(send(start(deliver=Queue("run/spool").push), "slow@y.test"))
    assert lines.received() == Queue("run/spool").keys() == [id]
    lines.found.clear()
    QueueReceiver("run/spool", router=router).start(one_shot=True)
    assert lines.about(id) == [
        f"Pulled message with key: {id!r} off",
        "Message received from Peer: 'run/spool', From: 'a@x.test', to To ['slow@y.test'].",
        "before the wait",
        "after the wait",
        "in a thread",
        f"Message to slow@y.test was handled by {handlers}.SLOW",
    ]
    assert {line["queue"] for line in lines.found if line.get("id")} == {"run/spool"}


def test_the_parts_of_a_job_and_what_fails_of_it_are_logged_under_their_keys(
    lines: Lines, handlers: str, router: RoutingBase, mail: Callable[..., MailRequest]
) -> None:
    id = Queue("run/spool").push(mail(["slow@y.test", "broken@y.test"]))
    QueueReceiver("run/spool", router=router).start(one_shot=True)
    slow, broken = derived_key(id, 1), derived_key(id, 2)
    assert lines.line("before the wait")["id"] == slow
    assert lines.line("!!! ERROR handling")["id"] == broken
    failed = lines.line(f"Job {broken} of run/spool failed")
    assert (failed["id"], failed["queue"], failed["handler"]) == (broken, "run/spool", f"{handlers}.BROKEN")


def test_a_job_that_no_function_takes_is_logged_under_its_key(
    lines: Lines, router: RoutingBase, mail: Callable[..., MailRequest]
) -> None:
    id = Queue("run/spool").push(mail("nobody@y.test"))
    QueueReceiver("run/spool", router=router).start(one_shot=True)
    assert lines.line("Message to 'nobody@y.test' from 'alice@example.com' didn't match any handlers.")["id"] == id


def test_keys_that_a_receiver_makes_never_meet_those_of_a_jobs_parts() -> None:
    message = about.received("1.M2P3Q4.host")
    assert [message.next_key() for _ in range(3)] == ["1.M2P3Q4.host", "1.M2P3Q4R0R1.host", "1.M2P3Q4R0R2.host"]
    assert message.for_call("x", "y").next_key() == "1.M2P3Q4R0R3.host"
    assert About("1.M2P3Q4.host").next_key() is None


def test_what_a_handler_delivers_itself_is_logged_under_the_message_that_it_handles(
    lines: Lines, router: RoutingBase, handlers: str, mail: Callable[..., MailRequest]
) -> None:
    outcomes: list[Outcome] = []
    attempt = router.attempt(
        next(iter(router.plan(mail("desk@y.test")))),
        mail("desk@y.test"),
        key="",
        settle=lambda o, _: outcomes.append(o),
    )
    with about.about(About("the job", "run/posts")):
        router.deliver(mail("slow@y.test"))
    attempt.start()
    assert [isinstance(outcome, Done) for outcome in outcomes] == [True]
    assert [line["id"] for line in lines.found if line.get("handler") == f"{handlers}.SLOW"] == ["the job"] * 4
    assert "id" not in lines.line("in the desk")


# ---- files -----------------------------------------------------------------------------------------------------


def test_one_word_in_the_shipped_file_makes_every_line_json(here: Path) -> None:
    text = SHIPPED.read_text()
    assert text.count('formatter = "line"') == 1
    (here / "logging.toml").write_text(text.replace('formatter = "line"', 'formatter = "json"'))
    settings.load_logging("logging.toml")
    with about.about(About("7")):
        logging.info("hello")
    found = json.loads((here / "logs/lamsonq.log").read_text())
    assert (found["id"], found["message"]) == ("7", "hello")


def test_the_shipped_file_writes_lines_as_lamson_did_and_follows_when_they_are_moved(here: Path) -> None:
    settings.load_logging(str(SHIPPED))
    log = here / "logs/lamsonq.log"
    logging.info("before")
    log.rename(here / "logs/lamsonq.log.1")
    logging.info("behind")
    assert re.fullmatch(rf"[-\d]+ [:,\d]+ \[{os.getpid()}\] INFO:root:behind\n", log.read_text())
    assert (here / "logs/lamsonq.log.1").read_text().endswith("INFO:root:before\n")


def test_the_log_of_lamsonq_log_follows_when_it_is_moved(here: Path, free_port: Callable[[], int]) -> None:
    for _ in generate(here / "blog"):
        pass
    port = free_port()
    command = [sys.executable, "-m", "lamsonq", "log", "--no-daemon", "-port", str(port)]
    with subprocess.Popen(command, cwd=here / "blog") as server:
        try:
            log = here / "blog/logs/logger.log"
            until(lambda: log.exists() and "process(es)" in log.read_text())
            log.rename(log.with_suffix(".1"))
            send(port, "anybody@anywhere.test")
            until(lambda: log.exists() and "MESSAGE to anybody@anywhere.test added to queue." in log.read_text())
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(20)
