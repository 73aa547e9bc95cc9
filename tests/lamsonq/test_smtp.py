"""What `SMTPReceiver` answers and what becomes of the mail, seen from real sockets."""

from __future__ import annotations

import asyncio
import os
import re
import smtplib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd import smtp

from lamsonq import mail as mail_module
from lamsonq.errors import Dead, Failure, Later, QueueError, Refusal, SettingsError, SMTPError, Undelivered
from lamsonq.limits import Limits
from lamsonq.logs import LineFormatter
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.session import Session
from lamsonq.smtp import SMTPReceiver
from lamsonq.tally import TALLY

from .clients import MESSAGE, Client
from .offline import Taker, Transport
from .waiting import PATIENCE, clock_ahead, until

Start = Callable[..., SMTPReceiver]
Write = Callable[..., str]


@pytest.fixture
def start(router: RoutingBase, here: Path) -> Iterator[Start]:
    """`start(...)` starts a receiver on a free port."""
    assert here
    started: list[SMTPReceiver] = []

    def begin(**options: Any) -> SMTPReceiver:
        if "deliver" not in options and router.UNDELIVERABLE_QUEUE is None:
            router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
        receiver = SMTPReceiver("127.0.0.1", 0, router=router, **options)
        receiver.start()
        started.append(receiver)
        return receiver

    yield begin
    for receiver in started:
        receiver.stop(0)
    for receiver in started:
        receiver.join()


@pytest.fixture
def handlers(module: Write, router: RoutingBase) -> Callable[[str], Any]:
    """`handlers(source)` loads a module with routes; the module, whose `calls` list it may fill."""

    def load(source: str) -> Any:
        name = module("import threading\ncalls = []\ngate = threading.Event()\n" + source)
        router.load([name])
        return sys.modules[name]

    return load


NOTES = """
@route("(who)@y.test", who=".+")
@stateless
def NOTE(message, who=None):
    calls.append((message.From, message.To, message.route_to, message.Data))
"""


def dead_letters(router: RoutingBase) -> Any:
    assert router.UNDELIVERABLE_QUEUE is not None
    store = router.UNDELIVERABLE_QUEUE.backend
    return [store.get(key) for key in store.keys("dead")]


# -- what is taken ------------------------------------------------------------------------------------------------


def test_every_recipient_gets_a_call_of_its_own(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES)
    with Client(start()) as client:
        assert client.mail("One@y.test", "two@y.test").startswith("250 2.0.0 Ok")
    assert noted.calls == [
        ("a@x.test", "one@y.test", ["one@y.test"], MESSAGE),
        ("a@x.test", "two@y.test", ["two@y.test"], MESSAGE),
    ]


def test_a_recipient_that_no_route_takes_is_refused_and_the_others_are_not(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES)
    with Client(start()) as client:
        replies = client.begin("one@elsewhere.test", "two@y.test")
        assert replies == ["250 2.1.0 Ok", "550 5.1.1 No such recipient here", "250 2.1.5 Ok"]
        client.say("DATA")
        assert client.say(MESSAGE + b".").startswith("250")
    assert [call[1] for call in noted.calls] == ["two@y.test"]


def test_only_an_expression_that_may_take_its_time_is_asked_in_another_thread(
    start: Start, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expression in (r"(?P<who>[a-z]+)@quick\.test", r"(?P<who>([a-z]+)+)@slow\.test"):
        router.register_route(expression, lambda _message, who: who)
    asked: dict[str, str] = {}
    takes = router.takes

    def watched(address: str) -> bool:
        asked[address] = threading.current_thread().name.partition("_")[0]
        return takes(address)

    monkeypatch.setattr(router, "takes", watched)
    with Client(start()) as client:
        replies = client.begin("joe@quick.test", "joe@slow.test", "0@quick.test", "0@slow.test")
    assert [reply[:3] for reply in replies] == ["250", "250", "250", "550", "550"]
    assert asked == {
        "joe@quick.test": "lamsonq-smtp",
        "joe@slow.test": "lamsonq-rcpt",
        "0@quick.test": "lamsonq-smtp",
        "0@slow.test": "lamsonq-rcpt",
    }


def test_without_routes_every_recipient_is_taken(start: Start) -> None:
    taken: list[MailRequest] = []
    with Client(start(deliver=taken.append)) as client:
        assert client.mail("anybody@anywhere.test").startswith("250")
    assert taken[0].envelope.rcpt_tos == ("anybody@anywhere.test",)


def test_routes_refuse_recipients_before_a_spool_too(start: Start, handlers: Any) -> None:
    handlers(NOTES)
    with Client(start(deliver=lambda _: None)) as client:
        assert client.begin("one@elsewhere.test")[1].startswith("550 5.1.1")


def test_the_postmaster_is_always_taken(start: Start, handlers: Any, router: RoutingBase) -> None:
    handlers(NOTES)
    with Client(start()) as client:
        assert client.mail("Postmaster").startswith("250")
    assert router.UNDELIVERABLE_QUEUE is not None
    assert router.UNDELIVERABLE_QUEUE.count() == 1


def test_the_null_sender_reaches_the_handler_as_an_empty_string(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES)
    with Client(start()) as client:
        assert client.mail(sender="").startswith("250")
    assert noted.calls[0][0] == ""


def test_the_envelope_keeps_case_peer_and_all_recipients(start: Start) -> None:
    taken: list[MailRequest] = []
    with Client(start(deliver=taken.append)) as client:
        client.mail("One@Y.test", "two@y.test", sender="A@X.test")
        name = client.socket.getsockname()
    envelope = taken[0].envelope
    assert (envelope.mail_from, envelope.rcpt_tos, envelope.peer) == ("A@X.test", ("One@Y.test", "two@y.test"), name)
    assert abs(envelope.received - time.time()) < 60
    assert (taken[0].Peer, taken[0].From, taken[0].route_to) == (name, "a@x.test", ["one@y.test", "two@y.test"])


def test_the_same_recipient_twice_is_one_recipient(start: Start) -> None:
    taken: list[MailRequest] = []
    with Client(start(deliver=taken.append)) as client:
        assert client.begin("one@y.test", "ONE@y.test")[1:] == ["250 2.1.5 Ok", "250 2.1.5 Ok"]
        client.say("DATA")
        client.say(MESSAGE + b".")
    assert taken[0].envelope.rcpt_tos == ("one@y.test",)


def test_too_many_recipients_are_told_to_come_in_another_message(start: Start) -> None:
    with Client(start(deliver=lambda _: None, limits=Limits(recipients=2))) as client:
        assert client.begin("a@y.test", "b@y.test", "c@y.test")[-1].startswith("452 4.5.3")


# -- what is refused ----------------------------------------------------------------------------------------------

BAD_PATHS = [
    b"<=?utf-8?q?x=40evil?=@b.c>x",
    b'<"a\rb"@c.d>',
    b"<a@b.c\x00>",
    b"<a",
    b"<a b@c>",
    b"<\xff@b.c>",
    b"<",
    b"a@b.c",
    b"<a@b@c>",
    b"<a@b.c>evil",
    b"<" + b"l" * 65 + b"@b.c>",
    b"<a@" + b".".join([b"d" * 60] * 5) + b">",
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_is_no_address_is_refused_as_sender_and_recipient(start: Start, path: bytes) -> None:
    with Client(start(deliver=lambda _: None)) as client:
        assert client.say(b"MAIL FROM:" + path).startswith(("553 5.1.7", "500 5.5.2"))
        client.say("MAIL FROM:<a@x.test>")
        assert client.say(b"RCPT TO:" + path).startswith(("553 5.1.3", "500 5.5.2"))
        assert client.say("DATA").startswith("503")


def test_an_encoded_word_in_an_address_is_never_decoded(start: Start) -> None:
    with Client(start(deliver=lambda _: None)) as client:
        assert client.say("MAIL FROM:<=?utf-8?q?x=40evil?=@b.c>").startswith("553 5.1.7")


def test_the_null_path_is_no_recipient(start: Start) -> None:
    with Client(start(deliver=lambda _: None)) as client:
        assert client.begin("")[1].startswith("553 5.1.3")


@pytest.mark.parametrize(
    ("parameters", "reply"),
    [
        ("SIZE=100 BODY=8BITMIME SMTPUTF8", "250"),
        ("size=100 body=7bit", "250"),
        ("SIZE=2000", "552 5.3.4"),
        ("SIZE=" + "9" * 20, "552 5.3.4"),
        ("SIZE=x", "501 5.5.4"),
        ("BODY=BINARYMIME", "501 5.5.4"),
        ("SMTPUTF8=yes", "501 5.5.4"),
        ("FOO=bar", "555 5.5.4"),
        ("SIZE", "501 5.5.4"),
        ("AUTH=<>", "555 5.5.4"),
    ],
)
def test_mail_parameters(start: Start, parameters: str, reply: str) -> None:
    with Client(start(deliver=lambda _: None, size_limit=1000)) as client:
        assert client.say(f"MAIL FROM:<a@x.test> {parameters}").startswith(reply)


def test_commands_out_of_order_are_refused(start: Start) -> None:
    with Client(start(deliver=lambda _: None), greet=False) as client:
        assert client.say("MAIL FROM:<a@x.test>").startswith("503")
        client.say("EHLO me")
        assert client.say("RCPT TO:<a@x.test>").startswith("503 5.5.1")
        assert client.say("DATA").startswith("503 5.5.1")
        client.say("MAIL FROM:<>")
        assert client.say("MAIL FROM:<>").startswith("503 5.5.1")
        assert client.say("DATA").startswith("503 5.5.1")
        assert client.say("MAIL TO:<a@b.test>").startswith("503 5.5.1")
        client.say("RSET")
        assert client.say("MAIL TO:<a@b.test>").startswith("501 5.5.4")


def test_a_message_that_is_too_large_is_refused_and_the_session_goes_on(start: Start) -> None:
    taken: list[MailRequest] = []
    with Client(start(deliver=taken.append, size_limit=1000)) as client:
        for size in (1001, 1005, 300_000):
            assert client.mail(data=b"x" * (size - 2) + b"\r\n").startswith("552 5.3.4")
        assert client.mail(data=b"x" * 998 + b"\r\n").startswith("250")
    assert [len(message.Data) for message in taken] == [1000]


@pytest.mark.parametrize(("line", "count"), [(b".\r\n", 333), (b"...\r\n", 200), (b".x" * 49 + b"\r\n", 10)])
def test_doubled_dots_do_not_count_towards_the_size(start: Start, line: bytes, count: int) -> None:
    taken: list[MailRequest] = []
    with Client(start(deliver=taken.append, size_limit=1000)) as client:
        assert client.mail(data=(b"." + line) * count).startswith("250")
        assert client.mail(data=(b"." + line) * (count + 1)).startswith("552")
    assert [message.Data for message in taken] == [line * count]


def test_a_flood_of_empty_lines_costs_little(start: Start) -> None:
    taken: list[MailRequest] = []
    data = b"\r\n" * (4 << 20)
    with Client(start(deliver=taken.append)) as client:
        begun = time.process_time()
        assert client.mail(data=data).startswith("250")
        assert time.process_time() - begun < 2.0
    assert taken[0].Data == data


def test_the_greeting_names_no_version_and_ehlo_what_is_offered(start: Start) -> None:
    with Client(start(deliver=lambda _: None, hostname="mx.test", size_limit=1000), greet=False) as client:
        assert client.greeting == "220 mx.test ESMTP lamsonq"
        assert client.say("EHLO me") == (
            "250-mx.test|250-SIZE 1000|250-8BITMIME|250-SMTPUTF8|250-PIPELINING|250-ENHANCEDSTATUSCODES"
            "|250-CHUNKING|250 DSN"
        )
        assert client.say("EHLO") == "501 5.5.4 Syntax: EHLO hostname"
        assert client.say("VRFY root").startswith("252")
        assert client.say("VRFY").startswith("501 5.5.4")
        assert client.say("EXPN staff").startswith("502 5.5.1")
        assert client.say("HELP").startswith("214")


# -- replies ------------------------------------------------------------------------------------------------------


def test_an_smtp_error_of_the_handler_is_the_reply(start: Start, handlers: Any, router: RoutingBase) -> None:
    handlers("""
@route("(code)@y.test", code="[0-9]+")
@stateless
def REFUSE(message, code=None):
    raise SMTPError(int(code), "4.7.1 not now" if code[0] == "4" else None)
""")
    with Client(start()) as client:
        assert client.mail("450@y.test") == "450 4.7.1 not now"
        assert client.mail("550@y.test") == "550 5.0.0 Permanent Failure Mail Delivery Protocol Status"
        assert client.mail("550@y.test", "554@y.test").startswith("550 ")
        assert dead_letters(router) == []
        assert client.mail("550@y.test", "450@y.test").startswith("250")
    assert {job.recipients for job in dead_letters(router)} == {("550@y.test",)}


REFUSED = """
@route("(who)@y.test", who="no|yes")
@stateless
def REFUSE(message, who=None):
    if who == "no":
        raise SMTPError(550, "5.7.1 You\\nare out")
"""


def test_a_handlers_refusal_is_a_line_with_the_id_of_the_message_and_counts_as_failed(
    start: Start, handlers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    handlers(REFUSED)
    caplog.handler.setFormatter(LineFormatter("%(levelname)s %(name)s %(id)s %(message)s"))
    before = (TALLY.handled, TALLY.failed)
    with caplog.at_level("INFO"), Client(start()) as client:
        client.mail("yes@y.test")
        client.mail("no@y.test", sender="A@x.test")
        peer = client.socket.getsockname()
    [line] = [line for line in caplog.text.splitlines() if "Refused" in line]
    told = f"Refused message from Peer: {peer}, From: 'A@x.test', to To ['no@y.test']: '550 5.7.1 You\\nare out'"
    assert re.fullmatch(rf"INFO root \d+\.M\S+ {re.escape(told)}", line), line
    until(lambda: (TALLY.handled, TALLY.failed) == (before[0] + 1, before[1] + 1))


def test_a_recipient_that_is_refused_is_a_line(start: Start, handlers: Any, caplog: pytest.LogCaptureFixture) -> None:
    handlers(REFUSED)
    with caplog.at_level("INFO"), Client(start()) as client:
        client.say("RCPT TO:<too.early@y.test>")
        client.begin("nobody@y.test", "yes@y.test", "no address", sender="")
        peer = client.socket.getsockname()
    assert [record.getMessage() for record in caplog.records if "Refused" in record.getMessage()] == [
        f"Refused recipient from Peer: {peer}, From: '', to To 'nobody@y.test': '550 5.1.1 No such recipient here'",
        f"Refused recipient from Peer: {peer}, From: '', to To 'no address':"
        " '553 5.1.3 Bad recipient address: that is no address (RFC 5321 section 4.1.2)'",
    ]


def test_dsn_is_offered_where_deliveries_can_be_reported_and_a_success_is(start: Start, handlers: Any) -> None:
    handlers(NOTES)
    reports: list[MailRequest] = []
    with Client(start()) as client:
        assert "DSN" not in client.say("EHLO me")
    with Client(start(reports=reports.append)) as client:
        assert client.say("EHLO me").endswith("250 DSN")
        assert client.say("MAIL FROM:<Ann@x.test> ENVID=QQ314 RET=HDRS").startswith("250")
        assert client.say("RCPT TO:<one@y.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;old@y.test").startswith("250")
        assert client.say("RCPT TO:<two@y.test> NOTIFY=NEVER").startswith("250")
        client.say("DATA")
        client.send(MESSAGE + b".\r\n")
        assert client.reply().startswith("250")
        assert client.say("MAIL FROM:<>").startswith("250")
        assert client.say("RCPT TO:<one@y.test> NOTIFY=SUCCESS").startswith("250")
        client.say("DATA")
        client.send(MESSAGE + b".\r\n")
        assert client.reply().startswith("250")
    until(lambda: len(reports) == 1)
    (report,) = reports
    assert (report.From, report.route_to) == ("", ["ann@x.test"])
    assert b"Original-Envelope-Id: QQ314" in report.Data
    assert re.search(rb"Original-Recipient: rfc822; ?old@y\.test", report.Data)
    assert b"Action: delivered" in report.Data
    assert b"two@y.test" not in report.Data


def test_a_receiver_that_is_told_to_stop_ends_when_its_reports_are_sent(start: Start, handlers: Any) -> None:
    handlers(NOTES)
    ended = threading.Event()
    ended_before: list[bool] = []

    def join() -> None:
        receiver.join()
        ended.set()

    def report(_: MailRequest) -> None:
        receiver.stop()
        threading.Thread(target=join).start()
        ended_before.append(ended.wait(0.5))

    receiver = start(reports=report)
    with Client(receiver) as client:
        client.say("MAIL FROM:<ann@x.test>")
        client.say("RCPT TO:<one@y.test> NOTIFY=SUCCESS")
        client.say("DATA")
        assert client.say(MESSAGE + b".").startswith("250")
    assert ended.wait(20)
    assert ended_before == [False]


def test_a_report_that_is_not_sent_in_time_is_a_line_in_the_log(
    start: Start, handlers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    handlers(NOTES)
    ended = threading.Event()
    receiver = start(reports=lambda _: ended.wait(20))
    with Client(receiver) as client:
        client.say("MAIL FROM:<ann@x.test>")
        client.say("RCPT TO:<one@y.test> NOTIFY=SUCCESS")
        client.say("DATA")
        assert client.say(MESSAGE + b".").startswith("250")
        receiver.stop(0)
        receiver.join()
    ended.set()
    assert "1 report(s) of deliveries have not been sent in time" in caplog.text


def test_a_delivery_that_had_to_be_kept_is_not_reported_as_one(start: Start, handlers: Any) -> None:
    handlers("""
@route("(who)@y.test", who="well|ill")
@stateless
def CRASH(message, who=None):
    if who == "ill":
        raise ValueError("ill")
""")
    reports: list[MailRequest] = []
    with Client(start(reports=reports.append)) as client:
        client.say("MAIL FROM:<ann@x.test>")
        for who in ("well", "ill"):
            assert client.say(f"RCPT TO:<{who}@y.test> NOTIFY=SUCCESS").startswith("250")
        client.say("DATA")
        assert client.say(MESSAGE + b".").startswith("250")
    until(lambda: reports)
    assert b"well@y.test" in reports[0].Data
    assert b"ill@y.test" not in reports[0].Data.replace(b"well@y.test", b"")


def test_a_delivery_that_was_kept_is_reported_once_when_its_functions_have_handled_it(
    start: Start, handlers: Any, router: RoutingBase
) -> None:
    queue = router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    module = handlers("""
@route("ann@y.test")
@stateless
def FIRST(message):
    calls.append("first")
    if calls.count("first") == 1:
        raise Later("soon", at=1.0)

@route("ann@y.test")
@stateless
def SECOND(message):
    calls.append("second")
    if calls.count("second") == 1:
        raise Later("soon", at=1.0)
""")
    reports: list[MailRequest] = []
    with Client(start(reports=reports.append)) as client:
        client.say("MAIL FROM:<joe@x.test>")
        assert client.say("RCPT TO:<ann@y.test> NOTIFY=SUCCESS").startswith("250")
        client.say("DATA")
        assert client.say(MESSAGE + b".").startswith("250")
        until(lambda: sorted(module.calls) == ["first", "first", "second", "second"])
        until(lambda: queue.backend.counts()["ready"] + queue.backend.counts()["reserved"] == 0)
    assert len(reports) == 1
    assert b"Action: delivered" in reports[0].Data


def test_a_message_that_a_function_pushes_on_is_not_reported_as_delivered(
    start: Start, handlers: Any, here: Path
) -> None:
    handlers("""
from lamsonq.queue import Queue
@route("(who)@y.test", who="on|here")
@stateless
def ON(message, who=None):
    if who == "on":
        Queue("run/elsewhere").push(message)
""")
    reports: list[MailRequest] = []
    with Client(start(reports=reports.append)) as client:
        client.say("MAIL FROM:<joe@x.test>")
        for who in ("on", "here"):
            assert client.say(f"RCPT TO:<{who}@y.test> NOTIFY=SUCCESS").startswith("250")
        client.say("DATA")
        assert client.say(MESSAGE + b".").startswith("250")
    until(lambda: reports)
    assert b"here@y.test" in reports[0].Data
    assert b"on@y.test" not in reports[0].Data
    assert Queue("run/elsewhere").count() == 1


@pytest.mark.parametrize("text", ["no\r\n250 ok", "no\n250 ok", "no\x00\x1b[2J", "n\u00f6\u2028", "x" * 5000])
def test_no_reply_can_be_injected(start: Start, text: str) -> None:
    def refuse(_message: MailRequest) -> None:
        raise SMTPError(554, text)

    with Client(start(deliver=refuse)) as client:
        reply = client.mail()
        assert reply.startswith("554 5.0.0 n" if text[0] == "n" else "554 5.0.0 x")
        assert reply.isprintable()
        assert len(reply) < 500
        assert client.say("NOOP") == "250 2.0.0 OK"
        assert client.say(b"FOO\rBAR\x00").isprintable()
        assert client.say("NOOP") == "250 2.0.0 OK"


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (Later("the disk is resting"), "451 4.3.0 the disk is resting"),
        (Dead("we do not want it"), "554 5.3.0 we do not want it"),
        (SMTPError(452, "4.2.2 full"), "452 4.2.2 full"),
        (SMTPError(250, "ok"), "451 4.3.0 "),
        (ValueError("secret"), "451 4.3.0 "),
        (OSError(28, "secret"), "451 4.3.0 "),
        (QueueError("secret"), "451 4.3.0 "),
        (SystemExit("secret"), "451 4.3.0 "),
        (StopIteration("secret"), "451 4.3.0 "),
        (Undelivered([Failure("b@y.test", None, SMTPError(550, "5.1.1 who?"))]), "550 5.1.1 who?"),
        (Undelivered([Failure("b", None, Dead("x")), Failure("c", None, Later("wait"))]), "451 4.3.0 wait"),
    ],
)
def test_what_deliver_raises_is_refused_without_the_text_of_an_exception(
    start: Start, error: BaseException, reply: str
) -> None:
    def fail(_message: MailRequest) -> None:
        raise error

    with Client(start(deliver=fail)) as client:
        said = client.mail()
        assert said.startswith(reply)
        assert "secret" not in said
        assert client.say("NOOP") == "250 2.0.0 OK"


def test_a_fault_of_ours_is_451_and_tells_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(mail_module, "parse_path", broken)
    with Client(start(deliver=lambda _: None)) as client:
        reply = client.say("MAIL FROM:<a@x.test>")
        assert reply.startswith("451 4.3.0")
        assert "secret" not in reply


# -- what fails is kept -------------------------------------------------------------------------------------------


def test_a_handler_that_crashes_is_tried_again_by_the_process_itself(
    start: Start, handlers: Any, router: RoutingBase
) -> None:
    noted = handlers(
        """
@route("a@y.test")
@stateless
@deferrable(backoff=lambda _: 0.0)
def CRASH(message):
    calls.append(message.Data)
    if len(calls) < 3:
        raise RuntimeError("secret")
"""
    )
    with Client(start()) as client:
        reply = client.mail("a@y.test")
    assert reply.startswith("250 2.0.0 Ok: queued as ")
    until(lambda: len(noted.calls) == 3)
    assert noted.calls == [MESSAGE] * 3
    assert dead_letters(router) == []


def test_a_handler_that_crashes_for_good_leaves_a_dead_letter_bound_to_it(
    start: Start, handlers: Any, router: RoutingBase
) -> None:
    noted = handlers(
        NOTES
        + """
@route("two@y.test")
@stateless
@never_again
def CRASH(message):
    raise RuntimeError("secret")
"""
    )
    with Client(start()) as client:
        reply = client.mail("one@y.test", "two@y.test")
    (job,) = dead_letters(router)
    assert reply == f"250 2.0.0 Ok: queued as {job.key}"
    assert job.target == f"{noted.__name__}.CRASH"
    assert (job.sender, job.recipients, job.body) == ("a@x.test", ("two@y.test",), MESSAGE)
    assert router.UNDELIVERABLE_QUEUE is not None
    assert "RuntimeError: secret" in router.UNDELIVERABLE_QUEUE.backend.report(job.key)
    assert len(noted.calls) == 2


def test_what_has_to_wait_is_worked_off_by_the_same_process(start: Start, handlers: Any, router: RoutingBase) -> None:
    noted = handlers("""
@route("later@y.test")
@stateless
@deferrable(backoff=lambda failures: 0.05)
def LATER(message):
    calls.append(message.To)
    if len(calls) == 1:
        raise Later("wait")

@route("later@y.test")
@stateless
def ONCE(message):
    calls.append("once")
""")
    with Client(start()) as client:
        assert client.mail("later@y.test").startswith("250")
    until(lambda: len(noted.calls) == 3)
    assert noted.calls == ["later@y.test", "once", "later@y.test"]
    assert router.UNDELIVERABLE_QUEUE is not None
    counts = router.UNDELIVERABLE_QUEUE.backend.counts
    until(lambda: not any(counts().values()))


def test_a_failure_that_cannot_be_kept_is_refused(
    start: Start, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers('@route("a@y.test")\n@stateless\n@never_again\ndef CRASH(message):\n    raise RuntimeError("secret")\n')
    receiver = start()

    def full(_puts: object) -> None:
        raise OSError(28, "no space")

    assert router.UNDELIVERABLE_QUEUE is not None
    monkeypatch.setattr(router.UNDELIVERABLE_QUEUE.backend, "put", full)
    with Client(receiver) as client:
        assert client.mail("a@y.test").startswith("451 4.3.0")


def test_a_push_that_cannot_be_kept_is_refused(start: Start, handlers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = handlers("""
from lamsonq.queue import Queue
posts = Queue("run/posts")
@route("a@y.test")
@stateless
def PUSH(message):
    posts.push(message)
""")

    def full(_puts: object) -> None:
        raise OSError(28, "no space")

    with Client(start()) as client:
        assert client.mail("a@y.test").startswith("250")
        assert noted.posts.count() == 1
        monkeypatch.setattr(noted.posts.backend, "put", full)
        assert client.mail("a@y.test").startswith("451 4.3.0")


def test_a_spool_keeps_the_message_with_all_its_recipients_before_250(start: Start) -> None:
    spool = Queue("run/incoming")
    with Client(start(deliver=spool.push)) as client:
        reply = client.mail("One@y.test", "two@y.test", sender="")
    (key,) = spool.keys()
    assert reply == f"250 2.0.0 Ok: queued as {key}"
    job = spool.backend.get(key)
    assert job is not None
    assert (job.sender, job.recipients, job.body) == ("", ("One@y.test", "two@y.test"), MESSAGE)


def test_a_function_that_hangs_leaves_its_stack_and_asks_for_a_new_process(
    start: Start, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.commit.LOOK_EVERY", 0.1)
    noted = handlers('@route("a@y.test")\n@stateless\ndef HANG(message):\n    gate.wait()\n')
    receiver = start(timeout=0.2)
    with Client(receiver) as client:
        assert client.mail("a@y.test").startswith("250")
    assert receiver.stuck
    receiver.join()
    (job,) = dead_letters(router)
    assert router.UNDELIVERABLE_QUEUE is not None
    report = router.UNDELIVERABLE_QUEUE.backend.report(job.key)
    noted.gate.set()
    assert "did not return within 0.2 seconds" in report
    assert "gate.wait()" in report


def test_while_the_process_was_stopped_no_function_has_hung(
    start: Start, handlers: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.commit.LOOK_EVERY", 0.1)
    noted = handlers("""
@route("a@y.test")
@stateless
def WAIT(message):
    calls.append(1)
    gate.wait(10)
""")
    receiver = start(timeout=60)
    ahead = clock_ahead(monkeypatch, "lamsonq.attempt", "lamsonq.commit", "lamsonq.threads")
    with Client(receiver) as client:
        client.begin("a@y.test")
        client.say("DATA")
        client.send(MESSAGE + b".\r\n")
        until(lambda: noted.calls)
        ahead(3600)
        timers = [receiver._committer._looks]

        def has_looked() -> bool:
            if receiver._committer._looks is not timers[-1]:
                timers.append(receiver._committer._looks)
            return len(timers) > 2

        until(has_looked)
        noted.gate.set()
        assert client.reply().startswith("250 2.0.0 Ok: handled")
    assert not receiver.stuck
    assert dead_letters(router) == []


def test_a_deliver_that_hangs_is_refused(start: Start) -> None:
    gate = threading.Event()
    receiver = start(deliver=lambda _: gate.wait(), timeout=0.2)
    with Client(receiver) as client:
        reply = client.mail()
    gate.set()
    assert reply.startswith("451 4.3.0")
    assert receiver.stuck


def test_who_waits_too_long_for_his_conversation_comes_again(
    start: Start, handlers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.commit.PATIENCE", 0.2)
    monkeypatch.setattr("lamsonq.commit.LOOK_EVERY", 0.1)
    noted = handlers("""
@route("a@y.test")
def START(message):
    calls.append(message.From)
    gate.wait(10)
""")
    receiver = start()
    with Client(receiver) as first, Client(receiver) as second:
        first.begin("a@y.test")
        first.say("DATA")
        first.send(MESSAGE + b".\r\n")
        until(lambda: noted.calls)
        assert second.mail("a@y.test").startswith("451 4.3.2")
        noted.gate.set()
        assert first.reply().startswith("250")
        assert second.mail("a@y.test").startswith("250")
    assert len(noted.calls) == 2


def test_an_async_handler_is_waited_for(start: Start, handlers: Any) -> None:
    noted = handlers("""
import asyncio
@route("a@y.test")
@stateless
async def SLOW(message):
    await asyncio.sleep(0.05)
    calls.append(message.To)
""")
    with Client(start(workers=1)) as client:
        assert client.mail("a@y.test").startswith("250")
    assert noted.calls == ["a@y.test"]


# -- clients that wait, and clients that do not -------------------------------------------------------------------


def test_handlers_that_fill_every_thread_delay_no_greeting_and_no_refusal(start: Start, handlers: Any) -> None:
    noted = handlers('@route("a@y.test")\n@stateless\ndef WAIT(message):\n    calls.append(1)\n    gate.wait(10)\n')
    receiver = start(workers=2)
    clients = [Client(receiver) for _ in range(4)]
    for client in clients:
        client.begin("a@y.test")
        client.say("DATA")
        client.send(MESSAGE + b".\r\n")
    until(lambda: len(noted.calls) == 2)
    with Client(receiver) as other:
        assert other.begin("b@elsewhere.test")[1].startswith("550")
    assert len(noted.calls) == 2, "a thread has become free"
    noted.gate.set()
    assert [client.reply()[:3] for client in clients] == ["250"] * 4
    for client in clients:
        client.__exit__()


def has_seen_the_end(receiver: SMTPReceiver) -> bool:
    """Whether every client that is still there has closed its sending side, and the receiver knows."""
    return all(session._ended for session in list(receiver._sessions))


@pytest.mark.parametrize("goodbye", ["close", "reset"])
def test_a_client_that_goes_after_the_last_dot_loses_only_the_reply(start: Start, handlers: Any, goodbye: str) -> None:
    noted = handlers(
        "begun = threading.Event()\n"
        '@route("a@y.test")\n@stateless\n'
        "def WAIT(m):\n    begun.set()\n    gate.wait(10)\n    calls.append(m.Data)\n"
    )
    receiver = start()
    with Client(receiver) as client:
        client.begin("a@y.test")
        client.say("DATA")
        client.send(MESSAGE + b".\r\n")
        assert noted.begun.wait(PATIENCE)
        if goodbye == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: has_seen_the_end(receiver))
    assert noted.calls == []
    noted.gate.set()
    until(lambda: noted.calls == [MESSAGE])


def test_a_client_that_closes_its_sending_side_is_still_answered(start: Start) -> None:
    taken: list[MailRequest] = []
    gate = threading.Event()

    def take(message: MailRequest) -> None:
        gate.wait(10)
        taken.append(message)

    receiver = start(deliver=take)
    with Client(receiver, greet=False) as client:
        one = b"MAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n" + MESSAGE + b".\r\n"
        client.send(b"EHLO me\r\n" + one + one)
        client.socket.shutdown(socket.SHUT_WR)
        until(lambda: has_seen_the_end(receiver))
        assert taken == []
        gate.set()
        replies = [reply[:3] for reply in iter(client.reply, "")]
    assert replies == ["250", *["250", "250", "354", "250"] * 2]
    assert len(taken) == 2


def test_a_client_that_goes_in_the_middle_of_a_message_leaves_nothing(start: Start) -> None:
    taken: list[MailRequest] = []
    receiver = start(deliver=taken.append)
    with Client(receiver) as client:
        client.begin("b@y.test")
        client.say("DATA")
        client.send(MESSAGE)
    with Client(receiver) as client:
        assert client.mail().startswith("250")
    assert len(taken) == 1
    until(lambda: not receiver._sessions)


def test_a_silent_client_is_told_and_dropped(start: Start) -> None:
    receiver = start(deliver=lambda _: None, limits=Limits(command_timeout=0.1))
    with Client(receiver, greet=False) as client:
        assert client.reply().startswith("421 4.4.2")
        assert client.reply() == ""


def test_a_handler_may_take_longer_than_a_client_may_be_silent(start: Start) -> None:
    receiver = start(deliver=lambda _: time.sleep(0.5), limits=Limits(command_timeout=0.3, data_timeout=0.3))
    with Client(receiver, greet=False) as client:
        # All at once, so that this client is never late itself.
        client.send(b"EHLO me\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n" + MESSAGE + b".\r\n")
        assert [client.reply()[:3] for _ in range(5)] == ["250", "250", "250", "354", "250"]


# -- starting and stopping ----------------------------------------------------------------------------------------


def test_a_port_in_use_is_refused_in_one_line(start: Start, router: RoutingBase) -> None:
    taken = start(deliver=lambda _: None).port
    with pytest.raises(Refusal) as raised:
        SMTPReceiver("127.0.0.1", taken, deliver=lambda _: None, router=router).bind()
    assert raised.value.exit_code == 1
    assert str(raised.value) == (
        f"cannot listen on 127.0.0.1:{taken}: Address already in use; stop what uses it, or take another port"
    )


def test_a_router_without_a_queue_for_what_fails_is_refused(router: RoutingBase) -> None:
    with pytest.raises(SettingsError, match=r"Router\.UNDELIVERABLE_QUEUE = "):
        SMTPReceiver("127.0.0.1", 0, router=router).bind()


def test_a_host_that_is_not_ours_is_refused(router: RoutingBase) -> None:
    with pytest.raises(Refusal, match=r"cannot listen on 192\.0\.2\.1:0: .*; change receiver\.host"):
        SMTPReceiver("192.0.2.1", 0, deliver=lambda _: None, router=router, hosts=["y.test"]).bind()


def test_bind_twice_is_one_port(router: RoutingBase) -> None:
    receiver = SMTPReceiver("127.0.0.1", 0, deliver=lambda _: None, router=router)
    receiver.bind()
    port = receiver.port
    receiver.bind()
    assert receiver.port == port != 0
    assert str(port) in receiver.listening()
    receiver.stop()


def test_no_reply_waits_for_a_delayed_acknowledgement(start: Start) -> None:
    receiver = start(deliver=lambda _: None)
    with Client(receiver):
        [session] = receiver._sessions
        assert session.transport is not None
        connection = session.transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_the_start_is_logged_as_it_always_was(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        receiver = start(deliver=lambda _: None)
    assert ("root", 20, f"SMTPReceiver started on 127.0.0.1:{receiver.port}.") in caplog.record_tuples


def test_stop_sends_idle_clients_away_and_answers_who_is_in_a_transaction(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.smtp.LEAVE_AFTER", 0.0)
    gate = threading.Event()
    receiver = start(deliver=lambda _: gate.wait(10))
    with Client(receiver) as idle, Client(receiver) as waiting, Client(receiver) as writing:
        waiting.begin("b@y.test")
        waiting.say("DATA")
        waiting.send(MESSAGE + b".\r\n")
        writing.begin("b@y.test")
        receiver.stop()
        assert idle.reply() == "421 4.3.2 Service shutting down"
        with pytest.raises(OSError, match="refused"):
            Client(receiver)
        gate.set()
        assert waiting.reply().startswith("250")
        assert waiting.reply().startswith("421 4.3.2")
        writing.say("DATA")
        assert writing.say(MESSAGE + b".").startswith("250")
        assert writing.reply().startswith("421 4.3.2")
    receiver.join()


def test_who_has_just_connected_when_it_stops_still_gets_a_message_through(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.smtp.LEAVE_AFTER", 30.0)
    receiver = start(deliver=lambda _: None)
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=PATIENCE) as client:
        lines = client.makefile("rb")
        assert lines.readline().startswith(b"220 ")
        receiver.stop()
        for line in (b"HELO me", b"MAIL FROM:<a@x.test>", b"RCPT TO:<b@y.test>", b"DATA", b"Subject: hi\r\n."):
            client.sendall(line + b"\r\n")
            reply = lines.readline()
        assert reply.startswith(b"250 ")
        monkeypatch.setattr("lamsonq.smtp.LEAVE_AFTER", 0.0)
        assert lines.readline().startswith(b"421 4.3.2")
    receiver.join()


def test_a_receiver_that_is_stopped_while_it_starts_ends(start: Start) -> None:
    receiver = SMTPReceiver("127.0.0.1", 0, deliver=lambda _: None)
    receiver.bind()
    starting = threading.Thread(target=receiver.start)
    starting.start()
    receiver.stop()
    starting.join(PATIENCE)
    assert not starting.is_alive()
    receiver.join()


def test_what_is_cut_when_the_grace_is_over_is_a_warning_that_names_it(
    start: Start, handlers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    desk = handlers("""
@route("desk@y.test")
@stateless
def SLOW(message):
    calls.append(message.To)
    gate.wait(60)
""")
    receiver = start()
    with caplog.at_level("INFO"), Client(receiver) as waiting:
        waiting.begin("desk@y.test")
        waiting.say("DATA")
        waiting.send(MESSAGE + b".\r\n")
        until(lambda: desk.calls)
        receiver.stop(0.1)
        receiver.join()
        assert waiting.reply().startswith("421")
    desk.gate.set()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "1 function(s) have not finished in time and are cut; their clients send the message again:"
        f" {desk.__name__}.SLOW for desk@y.test"
    ]


def test_stop_waits_no_longer_than_its_grace(start: Start) -> None:
    gate = threading.Event()
    receiver = start(deliver=lambda _: gate.wait(60))
    with Client(receiver) as waiting:
        waiting.begin("b@y.test")
        waiting.say("DATA")
        waiting.send(MESSAGE + b".\r\n")
        begun = time.monotonic()
        receiver.stop(0.1)
        receiver.join()
        assert time.monotonic() - begun < 20
        assert not waiting.reply().startswith("250")
    gate.set()


def test_children_that_are_forked_after_bind_share_the_port(router: RoutingBase, here: Path) -> None:
    receiver = SMTPReceiver("127.0.0.1", 0, deliver=lambda _: (here / "taken").touch(), router=router)
    receiver.bind()
    child = os.fork()
    if child == 0:
        try:
            receiver.start()
            receiver.join()
        finally:
            os._exit(0)
    try:
        with Client(receiver) as client:
            assert client.mail().startswith("250")
        assert (here / "taken").exists()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        receiver.stop()


# -- against aiosmtpd (its sessions beside ours: test_session_differential) -----------------------------------------


def test_the_private_names_of_aiosmtpd_that_we_touch_exist() -> None:
    async def look() -> Session:
        session = Session(Taker(), asyncio.get_running_loop())
        session.connection_made(Transport())
        session._begin(asyncio.sleep(0), feeding=True)
        await asyncio.sleep(0)
        assert session._timeout_handle is not None
        session._timeout_handle.cancel()
        return session

    session = asyncio.run(look())
    assert {"_reader", "_timeout_handle", "_original_transport", "transport", "envelope"} <= set(vars(session))
    assert isinstance(vars(session._reader)["_buffer"], bytearray)
    theirs = {"_timeout_cb", "_reset_timeout", "_set_rset_state", "push", "auth_PLAIN", "auth_LOGIN", "_drain_helper"}
    assert theirs <= set(dir(smtp.SMTP))


# -- load ---------------------------------------------------------------------------------------------------------


def send_many(port: int, number: int, count: int) -> None:
    with smtplib.SMTP("127.0.0.1", port, f"client{number}.test", timeout=60) as client:
        for turn in range(count):
            body = f"Subject: {number}.{turn}\r\n\r\nbody\r\n"
            assert client.sendmail(f"c{number}@x.test", ["one@y.test", "two@y.test"], body) == {}


def load(receiver: SMTPReceiver, clients: int, count: int) -> None:
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            send_many(receiver.port, number, count)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_ten_clients_at_once_get_250_for_everything(start: Start, handlers: Any) -> None:
    noted = handlers(NOTES)
    load(start(), 10, 5)
    assert len(noted.calls) == 100


@pytest.mark.slow
def test_a_hundred_clients_at_once_get_250_for_everything_and_it_is_on_disk(start: Start) -> None:
    spool = Queue("run/incoming")
    load(start(deliver=spool.push), 100, 20)
    assert spool.count() == 2000
