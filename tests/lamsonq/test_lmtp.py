"""What `LMTPReceiver` answers for each recipient, seen from real sockets and real clients."""

from __future__ import annotations

import inspect
import os
import select
import shutil
import smtplib
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lamsonq import settings
from lamsonq.errors import Dead, Failure, Later, QueueError, Refusal, SettingsError, SMTPError, Undelivered
from lamsonq.limits import Limits
from lamsonq.lmtp import ReceiverOptions
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, SMTPReceiver
from lamsonq.session import enhanced

from .waiting import PATIENCE, until

MESSAGE = b"From: a@x.test\r\nTo: desk@y.test\r\nSubject: hi\r\n\r\nbody\r\n"
Start = Callable[..., LMTPReceiver]
T = TypeVar("T")

NOTES = """
@route("(who)@y.test", who=".+")
@stateless
def NOTE(message, who=None):
    calls.append((message.From, message.To, message.Data))
"""


class Client:
    """A raw client: `say` sends a line and gives the reply, its lines joined by "|"."""

    def __init__(self, receiver: SMTPReceiver, *, greet: str = "LHLO client.test") -> None:
        self.socket = socket.socket(socket.AF_UNIX if receiver.socket else socket.AF_INET)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(receiver.socket or (receiver.host, receiver.port))
        self.lines = self.socket.makefile("rb")
        self.greeting = self.reply()
        if greet:
            self.say(greet)

    def reply(self) -> str:
        lines = []
        while True:
            line = self.lines.readline().decode("ascii")
            lines.append(line.rstrip("\r\n").partition(": handled as ")[0])  # the id is another one each time
            if line[3:4] != "-":
                return "|".join(lines)

    def say(self, line: str | bytes) -> str:
        self.socket.sendall((line if isinstance(line, bytes) else line.encode()) + b"\r\n")
        return self.reply()

    def begin(self, *recipients: str, sender: str = "a@x.test") -> list[str]:
        return [self.say(f"MAIL FROM:<{sender}>"), *(self.say(f"RCPT TO:<{to}>") for to in recipients)]

    def data(self, data: bytes = MESSAGE) -> None:
        """Send a message; the replies to it are left to be read."""
        assert self.say("DATA").startswith("354")
        self.socket.sendall(data + b".\r\n")

    def mail(self, *recipients: str, sender: str = "a@x.test", data: bytes = MESSAGE) -> list[str]:
        """The replies to a whole message, one for each RCPT that was taken; and no more than these."""
        accepted = [reply for reply in self.begin(*recipients, sender=sender)[1:] if reply.startswith("250")]
        self.data(data)
        replies = [self.reply() for _ in accepted]
        assert self.say("NOOP") == "250 2.0.0 OK"
        return replies

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()


@pytest.fixture
def start(router: RoutingBase, here: Path) -> Iterator[Start]:
    """`start(...)` starts a receiver on a free port, or on a unix socket."""
    assert here
    started: list[LMTPReceiver] = []

    def begin(**options: Any) -> LMTPReceiver:
        if "deliver" not in options and router.UNDELIVERABLE_QUEUE is None:
            router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
        receiver = LMTPReceiver(port=0, router=router, **options)
        receiver.start()
        started.append(receiver)
        return receiver

    yield begin
    for receiver in started:
        receiver.stop(0)
    for receiver in started:
        receiver.join()


@pytest.fixture
def handlers(module: Callable[..., str], router: RoutingBase) -> Callable[[str], Any]:
    """`handlers(source)` loads a module with routes; the module, whose `calls` list it may fill."""

    def load(source: str) -> Any:
        name = module("import threading\ncalls = []\ngate = threading.Event()\n" + source)
        router.load([name])
        return sys.modules[name]

    return load


@pytest.fixture
def program() -> Callable[..., str]:
    """`program(name, *arguments)` runs a program that has to succeed, and gives its output."""

    def run(name: str, *arguments: str) -> str:
        if shutil.which(name) is None:
            message = f"{name} is not installed"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        done = subprocess.run([name, *arguments], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def dead_letters(router: RoutingBase) -> Any:
    assert router.UNDELIVERABLE_QUEUE is not None
    store = router.UNDELIVERABLE_QUEUE.backend
    return [store.get(key) for key in store.keys("dead")]


# -- the protocol -------------------------------------------------------------------------------------------------


def test_the_greeting_says_lmtp_and_lhlo_what_is_offered(start: Start) -> None:
    with Client(start(deliver=lambda _: None, hostname="mx.test", size_limit=1000), greet="") as client:
        assert client.greeting == "220 mx.test LMTP lamsonq"
        assert client.say("LHLO me") == (
            "250-mx.test|250-SIZE 1000|250-8BITMIME|250-SMTPUTF8|250-PIPELINING|250-ENHANCEDSTATUSCODES"
            "|250-CHUNKING|250 DSN"
        )
        assert client.say("LHLO") == "501 5.5.4 Syntax: LHLO hostname"


@pytest.mark.parametrize("greeting", ["EHLO me", "HELO me", "EHLO", "helo"])
def test_the_greetings_of_smtp_are_refused_and_greet_nobody(start: Start, greeting: str) -> None:
    with Client(start(deliver=lambda _: None), greet=greeting) as client:
        assert client.say(greeting) == "500 5.5.1 This is LMTP (RFC 2033): greet with LHLO"
        for say in ("MAIL FROM:<a@x.test>", "RCPT TO:<a@y.test>", "DATA", "AUTH PLAIN"):
            assert client.say(say) == "503 5.5.1 Send LHLO first"
        client.say("LHLO me")
        assert client.say("MAIL FROM:<a@x.test>") == "250 2.1.0 Ok"


def test_over_smtp_lhlo_greets_nobody(router: RoutingBase) -> None:
    receiver = SMTPReceiver(port=0, deliver=lambda _: None, router=router)
    receiver.start()
    with Client(receiver, greet="") as client:
        assert "ESMTP" in client.greeting
        assert client.say("LHLO me").startswith("500")
        assert client.say("EHLO me").startswith("250")
    receiver.stop(0)
    receiver.join()


def test_data_without_a_recipient_is_503(start: Start, handlers: Any) -> None:
    handlers(NOTES)
    with Client(start()) as client:
        assert client.say("DATA").startswith("503 5.5.1")
        client.begin()
        assert client.say("DATA").startswith("503 5.5.1")
        assert client.say("RCPT TO:<one@elsewhere.test>") == "550 5.1.1 No such recipient here"
        assert client.say("DATA").startswith("503 5.5.1")


def test_every_reply_says_an_enhanced_status_code(start: Start) -> None:
    with Client(start(deliver=lambda _: None), greet="") as client:
        says = [
            "NOOP",
            "RSET",
            "HELP",
            "VRFY a",
            "EXPN a",
            "NONSENSE",
            "AUTH PLAIN",
            "DATA x",
            "RCPT",
            "MAIL",
            "RSET x",
        ]
        client.say("LHLO me")
        for say in (*says, "QUIT x", "\xff", "x" * 2000, "QUIT"):
            code, status, _ = client.say(say).split(" ", 2)
            assert status.split(".")[0] == code[0], say


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("250 OK", "250 2.0.0 OK"),
        ("550 5.1.1 who?", "550 5.1.1 who?"),
        ("550 5.1.1", "550 5.1.1"),
        ("550", "550 5.0.0"),
        ("450 5.1.1 x", "450 4.0.0 5.1.1 x"),
        ("550 5.1.1234 x", "550 5.0.0 5.1.1234 x"),
        ("550  no\r\n250 ok", "550 5.0.0 no 250 ok"),
        ("354 go on", "354 go on"),
        ("220 mx.test LMTP", "220 mx.test LMTP"),
        ("500 what?", "500 5.5.2 what?"),
    ],
)
def test_an_enhanced_status_code_is_added_where_none_is(reply: str, said: str) -> None:
    assert enhanced(reply) == said


# -- one reply for each recipient ---------------------------------------------------------------------------------


def test_every_recipient_has_its_own_reply_in_the_order_of_the_rcpts(
    start: Start, handlers: Any, router: RoutingBase
) -> None:
    noted = handlers(
        NOTES
        + """
@route("(code)@z.test", code="[0-9]+")
@stateless
def SAY(message, code=None):
    raise SMTPError(int(code), "no")

@route("crash@y.test")
@stateless
@never_again
def CRASH(message):
    raise RuntimeError("secret")
"""
    )
    with Client(start()) as client:
        taken = ["one@y.test", "crash@y.test", "550@z.test", "two@y.test", "451@z.test"]
        replies = client.mail(*taken)
    (job,) = dead_letters(router)
    assert replies == [
        "250 2.0.0 Ok",
        f"250 2.0.0 Ok: queued as {job.key}",
        "550 5.0.0 no",
        "250 2.0.0 Ok",
        "451 4.0.0 no",
    ]
    assert (job.target, job.recipients, job.body) == (f"{noted.__name__}.CRASH", ("crash@y.test",), MESSAGE)
    assert [to for _, to, _ in noted.calls] == ["one@y.test", "crash@y.test", "two@y.test"]


def test_two_recipients_whose_functions_crash_are_two_dead_letters(
    start: Start, handlers: Any, router: RoutingBase
) -> None:
    handlers(
        '@route("(who)@y.test", who=".")\n@stateless\n@never_again\ndef CRASH(message, who):\n'
        '    raise RuntimeError("secret")\n'
    )
    with Client(start()) as client:
        replies = client.mail("a@y.test", "b@y.test")
    kept = {job.recipients: f"250 2.0.0 Ok: queued as {job.key}" for job in dead_letters(router)}
    assert replies == [kept["a@y.test",], kept["b@y.test",]]
    assert len(set(replies)) == 2


def test_a_recipient_whose_functions_disagree_is_250_and_the_failure_is_kept(
    start: Start, handlers: Any, router: RoutingBase
) -> None:
    handlers(
        NOTES
        + """
@route("(who)@(host)", who="refused|mixed", host="[yz].test")
@stateless
def REFUSE(message, who=None, host=None):
    raise SMTPError(550, "5.7.1 not you")
"""
    )
    with Client(start()) as client:
        replies = client.mail("mixed@y.test", "refused@z.test")
    (job,) = dead_letters(router)
    assert replies == [f"250 2.0.0 Ok: queued as {job.key}", "550 5.7.1 not you"]
    assert job.recipients == ("mixed@y.test",)


def test_a_failure_that_cannot_be_kept_refuses_only_its_own_recipient(
    start: Start, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = handlers(
        NOTES + '@route("b@y.test")\n@stateless\n@never_again\ndef CRASH(message):\n    raise RuntimeError("secret")\n'
    )
    receiver = start()

    def full(_puts: object) -> None:
        raise OSError(28, "secret")

    assert router.UNDELIVERABLE_QUEUE is not None
    monkeypatch.setattr(router.UNDELIVERABLE_QUEUE.backend, "put", full)
    with Client(receiver) as client:
        replies = client.mail("a@y.test", "b@y.test", "postmaster", "c@y.test")
    assert [reply[:9] for reply in replies] == ["250 2.0.0", "451 4.3.0", "451 4.3.0", "250 2.0.0"]
    assert "secret" not in "".join(replies)
    assert [to for _, to, _ in noted.calls] == ["a@y.test", "b@y.test", "c@y.test"]


def test_a_recipient_that_no_route_takes_is_refused_at_rcpt_and_has_no_reply(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES)
    with Client(start()) as client:
        assert len(client.mail("one@y.test", "x@elsewhere.test", "two@y.test")) == 2
    assert [to for _, to, _ in noted.calls] == ["one@y.test", "two@y.test"]


def test_what_nothing_takes_is_kept_for_each_recipient(start: Start, router: RoutingBase, handlers: Any) -> None:
    handlers(NOTES)
    with Client(start()) as client:
        assert client.mail("postmaster", "one@y.test") == ["250 2.0.0 Ok"] * 2
    assert router.UNDELIVERABLE_QUEUE is not None
    (key,) = router.UNDELIVERABLE_QUEUE.keys()
    job = router.UNDELIVERABLE_QUEUE.backend.get(key)
    assert job is not None
    assert job.recipients == ("postmaster",)


def test_a_recipient_that_is_given_twice_has_two_replies_and_one_call(
    start: Start, handlers: Any, router: RoutingBase
) -> None:
    noted = handlers(
        NOTES + '@route("b@y.test")\n@stateless\n@never_again\ndef CRASH(message):\n    raise RuntimeError("secret")\n'
    )
    with Client(start()) as client:
        replies = client.mail("B@y.test", "a@y.test", "b@y.test", '"a"@y.test')
    (job,) = dead_letters(router)
    kept = f"250 2.0.0 Ok: queued as {job.key}"
    assert replies == [kept, "250 2.0.0 Ok", kept, "250 2.0.0 Ok"]
    assert [to for _, to, _ in noted.calls] == ["b@y.test", "a@y.test"]


def test_a_reply_does_not_wait_for_the_recipients_behind_it(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES + '@route("wait@y.test")\n@stateless\ndef WAIT(message):\n    gate.wait(10)\n')
    with Client(start()) as client:
        client.begin("one@y.test", "wait@y.test", "two@y.test")
        client.data()
        assert client.reply() == "250 2.0.0 Ok"
        noted.gate.set()
        assert [client.reply(), client.reply()] == ["250 2.0.0 Ok"] * 2


class AtOnce(ThreadPoolExecutor):
    """Whatever it is given has ended before the event loop goes on: the other thread is always the quicker one."""

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future = super().submit(function, *args, **kwargs)
        wait([future], 10)
        return future


def test_a_reply_is_written_before_the_next_recipients_function_runs(
    start: Start, handlers: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.smtp.ThreadPoolExecutor", AtOnce)
    noted = handlers(
        '@route("(who)@y.test", who=".")\n@stateless\ndef LOOK(message, who):\n    calls.append((who, replies()))\n'
    )

    def replies() -> int:
        """How many the client has not read yet. Over a unix socket what was written is there."""
        readable, _, _ = select.select([client.socket], [], [], 0)
        return client.socket.recv(4096, socket.MSG_PEEK).count(b"\r\n") if readable else 0

    noted.replies = replies
    with Client(start(socket="lmtp.sock")) as client:
        client.begin("a@y.test", "b@y.test", "a@y.test", "c@y.test", "d@y.test")
        client.data()
        until(lambda: len(noted.calls) == 4)
        assert [client.reply() for _ in range(5)] == ["250 2.0.0 Ok"] * 5
    assert noted.calls == [("a", 0), ("b", 1), ("c", 3), ("d", 4)]


def test_a_message_that_is_too_large_is_refused_once_for_each_recipient(start: Start) -> None:
    taken: list[MailRequest] = []
    with Client(start(deliver=taken.append, size_limit=1000)) as client:
        replies = client.mail("a@y.test", "b@y.test", "a@y.test", data=b"x" * 3000 + b"\r\n")
        assert replies == ["552 5.3.4 Message size exceeds the limit of 1000 octets"] * 3
        assert client.say("MAIL FROM:<a@x.test> SIZE=1001").startswith("552 5.3.4")
        assert client.mail("a@y.test") == ["250 2.0.0 Ok"]
    assert len(taken) == 1


def test_a_fault_of_ours_is_said_once_for_each_recipient_and_the_session_goes_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = start(deliver=lambda _: None)

    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    with Client(receiver) as client:
        monkeypatch.setattr(receiver, "commit", broken)
        replies = client.mail("a@y.test", "b@y.test", "c@y.test")
        assert [reply[:9] for reply in replies] == ["451 4.3.0"] * 3
        assert "secret" not in "".join(replies)
        monkeypatch.undo()
        assert client.mail("a@y.test", "b@y.test") == ["250 2.0.0 Ok"] * 2


def test_routes_that_cannot_be_read_are_451_for_everybody(
    start: Start, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers(NOTES)

    def broken(_message: object) -> None:
        raise RuntimeError("secret")

    with Client(start()) as client:
        monkeypatch.setattr(router, "plan", broken)
        replies = client.mail("a@y.test", "b@y.test")
    assert [reply[:9] for reply in replies] == ["451 4.3.0"] * 2


def test_too_many_recipients_are_told_to_come_in_another_message(start: Start) -> None:
    with Client(start(deliver=lambda _: None, limits=Limits(recipients=2))) as client:
        assert client.begin("a@y.test", "a@y.test", "a@y.test")[-1] == "452 4.5.3 Too many recipients"
        client.data()
        assert [client.reply(), client.reply()] == ["250 2.0.0 Ok"] * 2


# -- deliver= -----------------------------------------------------------------------------------------------------


def test_a_spool_keeps_one_message_for_all_recipients_and_says_its_key_to_each(start: Start) -> None:
    spool = Queue("run/incoming")
    with Client(start(deliver=spool.push)) as client:
        replies = client.mail("One@y.test", "two@y.test", "one@y.test", sender="")
    (key,) = spool.keys()
    assert replies == [f"250 2.0.0 Ok: queued as {key}"] * 3
    job = spool.backend.get(key)
    assert job is not None
    assert (job.sender, job.recipients, job.body) == ("", ("One@y.test", "two@y.test"), MESSAGE)


@pytest.mark.parametrize("error", [OSError(28, "secret"), Later("wait"), QueueError("secret"), SMTPError(452, "full")])
def test_a_deliver_that_fails_refuses_everybody(start: Start, error: Exception) -> None:
    def fail(_message: MailRequest) -> None:
        raise error

    with Client(start(deliver=fail)) as client:
        replies = client.mail("a@y.test", "b@y.test")
    assert replies == replies[:1] * 2
    assert replies[0].startswith("45")
    assert "secret" not in replies[0]


def test_what_deliver_names_as_undelivered_is_refused_and_nothing_else(start: Start) -> None:
    turns: list[MailRequest] = []

    def relay(message: MailRequest) -> None:
        turns.append(message)
        raise Undelivered(
            [Failure("b@y.test", None, SMTPError(550, "5.1.1 who?")), Failure("C@y.test", None, Later("wait"))]
        )

    with Client(start(deliver=relay)) as client:
        replies = client.mail("a@y.test", "B@y.test", "c@y.test", "d@y.test")
    assert replies == ["250 2.0.0 Ok", "550 5.1.1 who?", "451 4.3.0 wait", "250 2.0.0 Ok"]
    assert len(turns) == 1


@pytest.mark.parametrize("failed", [["list-member@z.test"], ["a@y.test", "list-member@z.test"]])
def test_an_undelivered_that_names_somebody_else_refuses_everybody(start: Start, failed: list[str]) -> None:
    def relay(_message: MailRequest) -> None:
        raise Undelivered([Failure(to, None, SMTPError(550, "5.1.1 who?")) for to in failed])

    with Client(start(deliver=relay)) as client:
        replies = client.mail("a@y.test", "b@y.test")
    assert [reply[0] for reply in replies] == ["5", "5"]


def test_a_dead_that_comes_from_an_undelivered_is_everybodys(start: Start) -> None:
    def relay(_message: MailRequest) -> None:
        raise Dead("not at all") from Undelivered([Failure("a@y.test", None, Dead("x"))])

    with Client(start(deliver=relay)) as client:
        replies = client.mail("a@y.test", "b@y.test")
    assert [reply[0] for reply in replies] == ["5", "5"]


def test_who_was_pushed_for_before_others_failed_is_refused_too_since_the_push_is_dropped(start: Start) -> None:
    spool = Queue("run/incoming")

    def part(message: MailRequest) -> None:
        spool.push(message.addressed("a@y.test"))
        raise Undelivered([Failure("b@y.test", None, SMTPError(450, "4.2.0 wait"))])

    with Client(start(deliver=part)) as client:
        replies = client.mail("a@y.test", "b@y.test")
    assert replies == ["450 4.2.0 wait"] * 2
    assert spool.count() == 0


# -- content ------------------------------------------------------------------------------------------------------


def test_dots_and_bytes_arrive_as_they_were_sent(start: Start) -> None:
    taken: list[MailRequest] = []
    data = b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\n\xff\x00 bare \n and \r\r\n. \r\n"
    with Client(start(deliver=taken.append)) as client:
        stuffed = data.replace(b"\r\n.", b"\r\n..")
        assert client.mail("a@y.test", "b@y.test", data=stuffed) == ["250 2.0.0 Ok"] * 2
    assert [message.Data for message in taken] == [data]


def test_the_null_sender_is_an_empty_string_to_every_handler(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES)
    with Client(start()) as client:
        assert client.mail("a@y.test", "b@y.test", sender="") == ["250 2.0.0 Ok"] * 2
    assert noted.calls == [("", "a@y.test", MESSAGE), ("", "b@y.test", MESSAGE)]


def test_an_address_beyond_ascii_is_taken(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES)
    with Client(start()) as client:
        assert client.say("MAIL FROM:<j\u00f6rg@x.test> SMTPUTF8 BODY=8BITMIME SIZE=50") == "250 2.1.0 Ok"
        client.say("RCPT TO:<gr\u00fc\u00dfe@y.test>")
        client.data()
        assert client.reply() == "250 2.0.0 Ok"
    assert noted.calls[0][1] == "gr\u00fc\u00dfe@y.test"


# -- clients that wait, and clients that do not -------------------------------------------------------------------


def test_two_messages_in_one_piece_are_answered_in_order(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES + '@route("b@y.test")\n@stateless\ndef REFUSE(message):\n    raise SMTPError(550, "no")\n')
    recipients = [b"a@y.test", b"x@elsewhere.test", b"c@y.test"]
    one = b"MAIL FROM:<a@x.test>\r\n" + b"".join(b"RCPT TO:<" + to + b">\r\n" for to in recipients)
    one += b"DATA\r\n" + MESSAGE + b".\r\n"
    with Client(start(), greet="") as client:
        client.socket.sendall(b"LHLO me\r\n" + one + one + b"QUIT\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        replies = [reply[:3] for reply in iter(client.reply, "")]
    assert replies == ["250", *["250", "250", "550", "250", "354", "250", "250"] * 2, "221"]
    assert len(noted.calls) == 4


@pytest.mark.parametrize("goodbye", ["close", "reset"])
def test_a_client_that_goes_after_the_last_dot_loses_only_the_replies(
    start: Start, handlers: Any, goodbye: str
) -> None:
    noted = handlers("""
@route("(who)@y.test", who=".")
@stateless
def WAIT(message, who):
    calls.append(who)
    gate.wait(10)
    calls.append(who)
""")
    receiver = start()
    with Client(receiver) as client:
        client.begin("a@y.test", "b@y.test")
        client.data()
        until(lambda: noted.calls)
        if goodbye == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: goodbye == "close" or not receiver._sessions)
    noted.gate.set()
    until(lambda: noted.calls == ["a", "a", "b", "b"])
    until(lambda: not receiver._committer.open and not receiver._sessions)


def test_stop_lets_a_message_have_all_its_replies(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamsonq.smtp.LEAVE_AFTER", 0.0)
    gate = threading.Event()
    receiver = start(deliver=lambda _: gate.wait(10))
    with Client(receiver) as idle, Client(receiver) as waiting:
        waiting.begin("a@y.test", "b@y.test", "c@y.test")
        waiting.data()
        until(lambda: receiver._committer.open)
        receiver.stop()
        assert idle.reply() == "421 4.3.2 Service shutting down"
        gate.set()
        assert [waiting.reply() for _ in range(3)] == ["250 2.0.0 Ok"] * 3
        assert waiting.reply().startswith("421 4.3.2")
    receiver.join()


def test_when_the_grace_is_over_every_reply_that_is_owed_is_421(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES + '@route("b@y.test")\n@stateless\ndef WAIT(message):\n    gate.wait(10)\n')
    receiver = start()
    with Client(receiver) as client:
        client.begin("a@y.test", "b@y.test", "c@y.test")
        client.data()
        assert client.reply() == "250 2.0.0 Ok"
        receiver.stop(0.1)
        assert [client.reply() for _ in range(3)] == ["421 4.3.2 Service shutting down"] * 2 + [""]
        receiver.join()
    noted.gate.set()
    assert "c@y.test" not in [to for _, to, _ in noted.calls]


KILLED = """
import sys, time
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver

router = RoutingBase()
router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")

def START(message):
    if message.To == "two@y.test":
        print("hangs", flush=True)
        time.sleep(60)
    Queue("run/posts").push(message)

router.register_route("(one|two|three)@y.test", START)
receiver = LMTPReceiver(socket="lmtp.sock", router=router)
receiver.start()
print("listens", flush=True)
receiver.join()
"""


def test_a_kill_in_the_middle_leaves_250_only_for_what_is_kept(here: Path, router: RoutingBase) -> None:
    (here / "server.py").write_text(textwrap.dedent(KILLED).replace("START(message):", "START(message, *_):"))
    server = subprocess.Popen([sys.executable, "server.py"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "listens\n"
        with Client(LMTPReceiver(socket="lmtp.sock", router=router)) as client:
            client.begin("one@y.test", "two@y.test", "three@y.test")
            client.data()
            assert server.stdout.readline() == "hangs\n"
            server.kill()
            server.wait()
            replies = list(iter(client.reply, ""))
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    posts = Queue("run/posts")
    kept = map(posts.backend.get, posts.keys())
    assert [job.recipients for job in kept if job] == [("one@y.test",)]
    assert replies == ["250 2.0.0 Ok"]


# -- where it listens ---------------------------------------------------------------------------------------------


def test_a_unix_socket_is_listened_on_and_is_the_peer_of_what_comes_in(
    start: Start, caplog: pytest.LogCaptureFixture, here: Path
) -> None:
    (here / "run").mkdir()
    taken: list[MailRequest] = []
    with caplog.at_level("INFO"):
        receiver = start(socket="run/lmtp.sock", deliver=taken.append)
    assert ("root", 20, "LMTPReceiver started on run/lmtp.sock.") in caplog.record_tuples
    assert receiver.listening() == "listening for LMTP on run/lmtp.sock"
    with Client(receiver) as client:
        assert client.mail("a@y.test", "b@y.test") == ["250 2.0.0 Ok"] * 2
    assert taken[0].Peer == taken[0].envelope.peer == "run/lmtp.sock"


def test_a_name_that_a_client_of_a_unix_socket_has_chosen_is_not_told(start: Start, here: Path) -> None:
    taken: list[MailRequest] = []
    start(socket="lmtp.sock", deliver=taken.append)
    with socket.socket(socket.AF_UNIX) as client:
        client.bind("bad\nname")
        client.connect("lmtp.sock")
        client.sendall(b"LHLO me\r\nMAIL FROM:<>\r\nRCPT TO:<a@y.test>\r\nDATA\r\n" + MESSAGE + b".\r\n")
        until(lambda: taken)
    assert (here / "bad\nname").exists()
    assert taken[0].envelope.peer == "lmtp.sock"


def test_smtp_listens_on_a_unix_socket_too(router: RoutingBase, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    receiver = SMTPReceiver(socket=str(here / "smtp.sock"), deliver=lambda _: None, router=router)
    with caplog.at_level("INFO"):
        receiver.start()
    assert f"SMTPReceiver started on {here}/smtp.sock." in caplog.messages
    with Client(receiver, greet="EHLO me") as client:
        client.begin("a@y.test", "b@y.test")
        client.data()
        assert client.reply() == "250 2.0.0 Ok"
        assert client.say("QUIT").startswith("221")
    receiver.stop(0)
    receiver.join()


def test_a_unix_socket_that_was_handed_to_us_is_the_one_that_is_told(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passed = socket.socket(socket.AF_UNIX)
    passed.bind("passed.sock")
    monkeypatch.setattr("lamsonq.smtp.listen", lambda *_: passed)
    with caplog.at_level("INFO"):
        receiver = start(socket="lmtp.sock", deliver=lambda _: None)
    assert "LMTPReceiver started on passed.sock." in caplog.messages
    with Client(receiver) as client:
        assert client.mail("a@y.test") == ["250 2.0.0 Ok"]


def test_a_port_is_listened_on_and_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        receiver = start(deliver=lambda _: None)
    assert f"LMTPReceiver started on 127.0.0.1:{receiver.port}." in caplog.messages


def test_a_unix_socket_that_was_left_behind_is_replaced(start: Start) -> None:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind("lmtp.sock")
        gone.listen()
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect("lmtp.sock")
    with Client(start(socket="lmtp.sock", deliver=lambda _: None)) as session:
        assert session.mail("a@y.test") == ["250 2.0.0 Ok"]


def test_a_file_under_the_name_of_the_socket_is_refused_and_left_alone(router: RoutingBase, here: Path) -> None:
    (here / "lmtp.sock").write_text("precious")
    with pytest.raises(Refusal, match=r"cannot listen on the socket lmtp\.sock: .*no socket"):
        LMTPReceiver(socket="lmtp.sock", deliver=lambda _: None, router=router).bind()
    assert (here / "lmtp.sock").read_text() == "precious"


def test_a_second_server_on_a_live_socket_is_refused_and_the_first_goes_on(start: Start, router: RoutingBase) -> None:
    receiver = start(socket="lmtp.sock", deliver=lambda _: None)
    with pytest.raises(Refusal, match=r"cannot listen on the socket lmtp\.sock: another server listens there"):
        LMTPReceiver(socket="lmtp.sock", deliver=lambda _: None, router=router).bind()
    with Client(receiver) as client:
        assert client.mail("a@y.test") == ["250 2.0.0 Ok"]


def test_the_port_of_smtp_is_refused_in_one_line(router: RoutingBase) -> None:
    with pytest.raises(SettingsError, match=r"LMTP must not use SMTP's port"):
        LMTPReceiver("127.0.0.1", 25)
    LMTPReceiver(port=25, socket="lmtp.sock", router=router)  # not listened on


def test_the_port_of_smtp_is_refused_when_it_is_handed_to_us(
    router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Passed(socket.socket):
        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", 25

    monkeypatch.setattr("lamsonq.smtp.listen", lambda *_: Passed())
    with pytest.raises(SettingsError, match=r"LMTP must not use SMTP's port"):
        LMTPReceiver(port=0, deliver=lambda _: None, router=router).bind()


def test_the_arguments_are_those_of_the_smtp_receiver() -> None:
    parameters = inspect.signature(SMTPReceiver).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert named == ReceiverOptions.__optional_keys__
    assert (LMTPReceiver().host, LMTPReceiver().port, LMTPReceiver().workers) == ("127.0.0.1", 8824, 10)
    with pytest.raises(ValueError, match="an LMTPReceiver needs at least one"):
        LMTPReceiver(workers=0)


def test_a_router_without_a_queue_for_what_fails_is_refused(router: RoutingBase) -> None:
    with pytest.raises(SettingsError, match=r"^LMTPReceiver gives mail to the router"):
        LMTPReceiver(port=0, router=router).bind()


@pytest.mark.parametrize("kind", [SMTPReceiver, LMTPReceiver])
def test_the_settings_name_a_socket_for_either_receiver(here: Path, kind: type[SMTPReceiver]) -> None:
    (here / "settings.toml").write_text('[receiver]\nsocket = "run/lmtp.sock"\nworkers = 3\n')
    config = settings.machine("settings.toml", {}).receiver.config()
    receiver = kind(**config)
    assert (receiver.socket, receiver.where, receiver.workers) == ("run/lmtp.sock", "run/lmtp.sock", 3)
    config = settings.machine("settings.toml", {"LAMSONQ_RECEIVER__SOCKET": ""}).receiver.config()
    assert LMTPReceiver(**config).socket is None
    assert LMTPReceiver(**config).where == "127.0.0.1:8823"
    (here / "settings.toml").write_text("[receiver]\nsocket = 3\n")
    with pytest.raises(SettingsError, match=r"receiver\.socket: expected a str, found the int 3"):
        settings.machine("settings.toml", {})


# -- real clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["port", "socket"])
def test_smtplib_speaks_with_it(start: Start, handlers: Any, place: str) -> None:
    noted = handlers(NOTES)
    receiver = start(socket=os.path.abspath("lmtp.sock")) if place == "socket" else start()
    with smtplib.LMTP(receiver.socket or "127.0.0.1", receiver.port, "me.test") as client:
        assert client.sendmail("a@x.test", ["one@y.test"], MESSAGE) == {}
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@x.test", ["one@elsewhere.test"], MESSAGE)
        assert client.sendmail("a@x.test", ["two@y.test"], b"\r\n.dots\r\n..\r\n") == {}
        assert client.has_extn("enhancedstatuscodes")
        assert client.has_extn("pipelining")
    assert noted.calls == [("a@x.test", "one@y.test", MESSAGE), ("a@x.test", "two@y.test", b"\r\n.dots\r\n..\r\n")]


def test_swaks_gets_a_reply_for_each_recipient(
    start: Start, handlers: Any, program: Callable[..., str], here: Path
) -> None:
    noted = handlers(NOTES + '@route("b@z.test")\n@stateless\ndef REFUSE(message):\n    raise SMTPError(550, "no")\n')
    receiver = start(socket=str(here / "lmtp.sock"))
    recipients = "a@y.test,b@z.test,c@y.test"
    said = program("swaks", "--protocol", "LMTP", "--socket", str(receiver.socket), "--to", recipients, "--from", "<>")
    behind = said.partition(" -> .\n")[2]
    assert [line[4:7] for line in behind.splitlines() if line[4:7].isdigit()] == ["250", "550", "250", "221"]
    assert [(sender, to) for sender, to, _ in noted.calls] == [("", "a@y.test"), ("", "c@y.test")]


def test_smtp_source_sends_to_three_recipients(start: Start, program: Callable[..., str]) -> None:
    spool = Queue("run/incoming")
    receiver = start(deliver=spool.push)
    where = f"inet:127.0.0.1:{receiver.port}"
    arguments = ["-L", "-s", "2", "-m", "6", "-r", "3", "-l", "2000", "-f", "a@x.test", "-t", "b@y.test"]
    program("smtp-source", *arguments, where)
    jobs = list(map(spool.backend.get, spool.keys()))
    assert len(jobs) == 6
    assert {len(job.recipients) for job in jobs if job} == {3}
