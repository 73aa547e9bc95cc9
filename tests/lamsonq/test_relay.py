"""What `Relay` does, against a server that answers as the test says."""

from __future__ import annotations

import base64
import grp
import hmac
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from lamsonq.connection import own_name
from lamsonq.errors import Dead, Failure, Later, SettingsError, SMTPError, Undelivered, outcome_of
from lamsonq.lmtp import LMTPReceiver
from lamsonq.mail import Envelope, MailRequest, MailResponse
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.routing import RoutingBase, stateless
from lamsonq.settings import RelayTable
from lamsonq.transaction import for_the_wire

from .ports import free_port
from .servers import HANG_UP, Server
from .waiting import PATIENCE, until

MESSAGE = b"From: a@x.test\r\nTo: b@y.test\r\nSubject: hi\r\n\r\nbody\r\n"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    relay = Relay("127.0.0.1", server.port, timeout=PATIENCE)
    yield relay
    relay.close()


def received(sender: str = "a@x.test", *recipients: str, data: bytes = MESSAGE) -> MailRequest:
    to = recipients or ("b@y.test",)
    return MailRequest("peer", sender, to, data, envelope=Envelope(sender, to, "peer", 1.0))


def failures_of(relay: Relay, message: MailRequest | MailResponse) -> dict[str, Exception]:
    with pytest.raises(Undelivered) as raised:
        relay.deliver(message)
    assert all(failure.target is None for failure in raised.value.failures)
    return {failure.recipient: failure.error for failure in raised.value.failures}


# -- the envelope -------------------------------------------------------------------------------------------------


def test_a_request_leaves_with_its_envelope_and_not_with_its_headers(server: Server, relay: Relay) -> None:
    relay.deliver(received("Bounce@list.test", "Member@z.test"))
    assert server.said("MAIL")[0].startswith("MAIL FROM:<Bounce@list.test> ")
    assert server.said("RCPT") == ["RCPT TO:<Member@z.test>"]


def test_a_request_leaves_with_the_trace_fields_of_the_receiver_that_took_it(server: Server, relay: Relay) -> None:
    envelope = Envelope("a@x.test", ("b@y.test",), "peer", 1.0, trace="Received: from c by us;\r\n now\r\n")
    relay.deliver(MailRequest("peer", "a@x.test", ("b@y.test",), b"Subject: hi\r\n\r\nhi\r\n", envelope=envelope))
    passed_on: list[MailRequest] = []
    Relay(deliver=passed_on.append).deliver(
        MailRequest("peer", "a@x.test", ("b@y.test",), b"Subject: hi\r\n\r\nhi\r\n", envelope=envelope)
    )
    relay.deliver(passed_on[0])
    assert server.messages == [b"Received: from c by us;\r\n now\r\nSubject: hi\r\n\r\nhi\r\n"] * 2


def test_an_addressed_request_goes_to_its_one_recipient(server: Server, relay: Relay) -> None:
    relay.deliver(received("a@x.test", "b@y.test", "c@y.test").addressed("c@y.test"))
    assert server.said("RCPT") == ["RCPT TO:<c@y.test>"]


def test_a_spooled_request_goes_to_all_its_recipients(server: Server, relay: Relay) -> None:
    relay.deliver(received("a@x.test", "b@y.test", "c@y.test"))
    assert server.said("RCPT") == ["RCPT TO:<b@y.test>", "RCPT TO:<c@y.test>"]
    assert len(server.messages) == 1


def test_the_null_sender_stays_the_null_sender(server: Server, relay: Relay) -> None:
    relay.deliver(received(""))
    assert server.said("MAIL")[0].startswith("MAIL FROM:<> ")


def test_to_and_from_given_to_deliver_win(server: Server, relay: Relay) -> None:
    relay.deliver(received(), To="Joe <joe@y.test>, ann@y.test", From="Me <me@x.test>")
    assert server.said("MAIL")[0].startswith("MAIL FROM:<me@x.test>")
    assert server.said("RCPT") == ["RCPT TO:<joe@y.test>", "RCPT TO:<ann@y.test>"]


def test_a_response_goes_to_everyone_in_to_cc_and_bcc_and_shows_no_bcc(server: Server, relay: Relay) -> None:
    response = MailResponse(To="b@y.test", From="Joe <a@x.test>", Subject="hi", Body="body")
    response["Cc"] = "c@y.test"
    response["Bcc"] = "d@y.test"
    relay.deliver(response)
    assert server.said("MAIL")[0].startswith("MAIL FROM:<a@x.test>")
    assert server.said("RCPT") == [f"RCPT TO:<{name}@y.test>" for name in "bcd"]
    assert b"d@y.test" not in server.messages[0]


def test_send_builds_a_message(server: Server, relay: Relay) -> None:
    relay.send("b@y.test", "a@x.test", "The subject", "The body.")
    assert b"Subject: The subject\r\n" in server.messages[0]
    assert b"The body." in server.messages[0]


def test_a_reply_goes_to_the_sender_and_into_the_thread(server: Server, relay: Relay) -> None:
    relay.reply(received("a@x.test", data=b"Message-ID: <1@x.test>\r\n" + MESSAGE), "b@y.test", "Re: hi", "yes")
    assert server.said("RCPT") == ["RCPT TO:<a@x.test>"]
    assert b"In-Reply-To: <1@x.test>\r\n" in server.messages[0]
    assert b"References: <1@x.test>\r\n" in server.messages[0]
    assert b"Subject: Re: hi\r\n" in server.messages[0]
    assert b"Auto-Submitted: auto-replied\r\n" in server.messages[0]


def test_the_null_sender_gets_no_reply(server: Server, relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        relay.reply(received(""), "b@y.test", "Re: hi", "yes")
    assert "null sender" in caplog.text
    assert server.commands == []


def test_an_automatic_reply_gets_no_reply_but_other_automatic_mail_does(
    server: Server, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        relay.reply(received(data=b"Auto-Submitted: Auto-Replied; x=y\r\n" + MESSAGE), "b@y.test", "Re: hi", "yes")
    assert "an automatic reply" in caplog.text
    assert server.commands == []
    relay.reply(received(data=b"Auto-Submitted: auto-generated\r\n" + MESSAGE), "b@y.test", "Re: hi", "yes")
    assert len(server.messages) == 1


def test_a_message_without_a_recipient_is_not_silently_dropped(relay: Relay) -> None:
    with pytest.raises(Dead, match="no recipient"):
        relay.deliver(MailResponse(From="a@x.test", Subject="hi", Body="body"))


def test_a_response_without_from_does_not_leave_as_a_bounce(server: Server, relay: Relay) -> None:
    with pytest.raises(Dead, match="no From"):
        relay.deliver(MailResponse(To="b@y.test", Subject="hi", Body="body"))
    assert server.commands == []


@pytest.mark.parametrize(
    "address", ['"a\r\nRCPT TO:<evil@x>"@y.test', "a\n@y.test", "no-address", "a@b@c", "ü" * 40 + "@y.test"]
)
def test_an_address_that_is_none_never_reaches_the_wire(server: Server, relay: Relay, address: str) -> None:
    with pytest.raises(Undelivered) as raised:
        relay.deliver(received(), To=[address, "good@y.test"])
    assert [type(failure.error) for failure in raised.value.failures] == [Dead]
    assert server.said("RCPT") == ["RCPT TO:<good@y.test>"]
    with pytest.raises(Undelivered):
        relay.deliver(received(), From=address)
    assert len(server.said("MAIL")) == 1


# -- the bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        MESSAGE,
        b"Subject: dots\r\n\r\n.\r\n..\r\n.a\r\nb.\r\n\r\n.\r\n",
        b"Subject: 8 bit\r\n\r\n\xff\xfe\x00 \xc3\xbc\r\n" + b"x" * 5000 + b"\r\n",
        b"Subject: big\r\n\r\n" + b".line\r\n" * 50_000,
        b"Subject: bare\r\n\r\nLF\nCR\rLFCR\n\rdots\n.c\r\n..a\n.b\r\n",
    ],
)
def test_a_message_with_crlf_arrives_byte_for_byte(server: Server, relay: Relay, data: bytes) -> None:
    relay.deliver(received(data=data))
    lines = server.messages[0].split(b"\r\n")
    assert b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines) == data


@pytest.mark.parametrize(
    "end", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\r\n.\r\r\n", b"\r\n.\r\n"]
)
def test_no_end_of_data_can_be_smuggled_in_a_message(server: Server, relay: Relay, end: bytes) -> None:
    relay.deliver(received(data=b"Subject: x\r\n\r\nbody" + end + b"MAIL FROM:<evil@x.test>\r\n"))
    assert len(server.messages) == 1
    assert len(server.said("MAIL")) == 1
    wire = server.messages[0]
    assert wire.count(b"\r") == wire.count(b"\n") == wire.count(b"\r\n")
    assert b"\r\n..\r\n" in wire


@pytest.mark.parametrize(
    ("data", "wire"),
    [
        (b"a\nb", b"a\r\nb\r\n"),
        (b"a\nb\n", b"a\r\nb\r\n"),
        (b"a\n\rb", b"a\r\n b\r\n"),  # in the header, where a line of its own would be another field
        (b"a\rb\r\n", b"a\rb\r\n"),
        (b"a\r\r\nb\nc", b"a\r\r\nb\nc\r\n"),
        (b"a\r\nb\n", b"a\r\nb\r\n"),
        (b"a\r\n.\nb\nc\r\n", b"a\r\n.\r\nb\r\nc\r\n"),
        (b"", b""),
    ],
)
def test_line_ends_become_crlf_where_they_are_of_this_system_or_dangerous(data: bytes, wire: bytes) -> None:
    assert for_the_wire(data) == wire


def test_eight_bit_and_size_are_declared_where_they_are_offered(server: Server, relay: Relay) -> None:
    relay.deliver(received(data=b"Subject: x\r\n\r\n\xc3\xbc\r\n"))
    assert server.said("MAIL") == ["MAIL FROM:<a@x.test> SIZE=18 BODY=8BITMIME"]


def test_nothing_is_declared_that_is_not_offered(server: Server, relay: Relay) -> None:
    server.offers = ["fake.test"]
    relay.deliver(received(data=b"Subject: x\r\n\r\n\xc3\xbc\r\n"))
    assert server.said("MAIL") == ["MAIL FROM:<a@x.test>"]


def test_a_non_ascii_address_goes_with_smtputf8(server: Server, relay: Relay) -> None:
    relay.deliver(received("a@x.test", "jö@y.test"))
    assert server.said("MAIL")[0].endswith(" SMTPUTF8")
    assert server.said("RCPT") == ["RCPT TO:<jö@y.test>"]


def test_without_smtputf8_only_the_non_ascii_recipient_fails(server: Server, relay: Relay) -> None:
    server.offers = ["fake.test"]
    errors = failures_of(relay, received("a@x.test", "jö@y.test", "b@y.test"))
    assert [(to, error.code) for to, error in errors.items() if isinstance(error, SMTPError)] == [("jö@y.test", 553)]
    assert len(server.messages) == 1


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_refused_recipients_are_named_and_the_others_get_the_mail(server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<C@": "550 5.1.1 who?", "RCPT TO:<D@": "450-busy\r\n450 4.2.1 later"}
    errors = failures_of(relay, received("a@x.test", "b@y.test", "c@y.test", "d@y.test"))
    assert {to: str(error) for to, error in errors.items()} == {
        "c@y.test": "550 5.1.1 who?",
        "d@y.test": "450 busy 4.2.1 later",
    }
    assert len(server.messages) == 1


def test_when_all_recipients_are_refused_nothing_is_sent_and_the_connection_is_good_for_the_next(
    server: Server, relay: Relay
) -> None:
    server.answers = {"RCPT": ["550 5.1.1 who?", "250 ok"]}
    assert set(failures_of(relay, received())) == {"b@y.test"}
    assert server.said("DATA") == []
    relay.deliver(received())
    assert len(server.connections) == 1
    assert server.said("RSET") == ["rset"]


@pytest.mark.parametrize("verb", ["MAIL", "DATA", "."])
def test_a_refusal_of_the_message_fails_every_recipient(server: Server, relay: Relay, verb: str) -> None:
    server.answers = {verb: "552 5.3.4 too big"}
    errors = failures_of(relay, received("a@x.test", "b@y.test", "c@y.test"))
    assert {to: str(error) for to, error in errors.items()} == {
        "b@y.test": "552 5.3.4 too big",
        "c@y.test": "552 5.3.4 too big",
    }


@pytest.mark.parametrize("verb", ["GREETING", "EHLO", "MAIL", "RCPT", "DATA", "."])
def test_a_lost_connection_means_later(server: Server, relay: Relay, verb: str) -> None:
    server.answers = {verb: HANG_UP}
    if verb == "EHLO":
        server.answers["HELO"] = HANG_UP
    errors = failures_of(relay, received("a@x.test", "b@y.test", "c@y.test"))
    assert set(errors) == {"b@y.test", "c@y.test"}
    assert all(isinstance(error, Later) for error in errors.values())


def test_a_recipient_that_was_refused_before_the_connection_broke_stays_refused(server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<B@": "550 5.1.1 who?", "DATA": HANG_UP}
    errors = failures_of(relay, received("a@x.test", "b@y.test", "c@y.test"))
    assert isinstance(errors["b@y.test"], SMTPError)
    assert isinstance(errors["c@y.test"], Later)


def test_a_server_that_says_nothing_times_out(server: Server) -> None:
    server.answers = {".": ""}
    errors = failures_of(Relay("127.0.0.1", server.port, timeout=0.1), received())
    assert str(errors["b@y.test"]) == f"relay 127.0.0.1:{server.port}: timed out"


def test_a_refused_connection_says_so() -> None:
    port = free_port()
    errors = failures_of(Relay("127.0.0.1", port), received())
    assert isinstance(errors["b@y.test"], Later)
    assert str(errors["b@y.test"]) == f"relay 127.0.0.1:{port}: connection refused"


def test_a_handler_whose_relay_is_down_is_tried_again_and_one_that_was_refused_is_not() -> None:
    down, refused = Failure("b@y.test", None, Later("down")), Failure("c@y.test", None, SMTPError(550, "who?"))
    assert isinstance(outcome_of(Undelivered([refused, down])), Later)
    assert isinstance(outcome_of(Undelivered([refused])), Dead)


def test_a_greeting_that_refuses_service_means_later(server: Server, relay: Relay) -> None:
    server.answers = {"GREETING": "554 no service"}
    error = failures_of(relay, received())["b@y.test"]
    assert isinstance(error, Later)
    assert "554 no service" in str(error)


def test_a_reply_that_makes_no_sense_means_later(server: Server, relay: Relay) -> None:
    server.answers = {".": "what?"}
    assert isinstance(failures_of(relay, received())["b@y.test"], Later)


# -- connections --------------------------------------------------------------------------------------------------


def test_one_connection_carries_many_messages(server: Server, relay: Relay) -> None:
    for _ in range(5):
        relay.deliver(received())
    assert len(server.messages) == 5
    assert len(server.connections) == 1


def test_a_connection_that_died_while_it_waited_is_replaced(server: Server, relay: Relay) -> None:
    relay.deliver(received())
    server.hang_up()
    relay.deliver(received())
    assert len(server.messages) == 2


def test_a_connection_that_the_server_has_given_notice_on_is_replaced(server: Server, relay: Relay) -> None:
    server.answers = {"MAIL": ["250 ok", "421 4.4.2 idle too long", "250 ok"]}
    relay.deliver(received())
    relay.deliver(received())
    assert len(server.messages) == 2
    assert len(server.connections) == 2


@pytest.mark.parametrize("end", ["250 taken\r\n421 4.4.2 one is enough\r\n" + HANG_UP, "250 taken\r\n" + HANG_UP])
def test_a_server_that_ends_the_session_after_each_message_gets_all_messages(
    server: Server, relay: Relay, end: str
) -> None:
    server.answers = {".": end}
    for _ in range(3):
        relay.deliver(received())
    assert (len(server.messages), len(server.connections)) == (3, 3)


def test_more_recipients_than_a_server_must_take_go_in_several_transactions(server: Server, relay: Relay) -> None:
    relay.deliver(received("a@x.test", *(f"{n}@y.test" for n in range(250))))
    assert len(server.said("RCPT")) == 250
    assert len(server.messages) == 3


def test_a_connection_that_dies_after_mail_is_not_tried_again(server: Server, relay: Relay) -> None:
    server.answers = {"RCPT": ["250 ok", HANG_UP]}
    relay.deliver(received())
    assert isinstance(failures_of(relay, received())["b@y.test"], Later)
    assert len(server.connections) == 1


def test_a_connection_that_waited_too_long_is_not_used(
    server: Server, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.connection.IDLE_MAX", 0.0)
    relay.deliver(received())
    relay.deliver(received())
    assert len(server.connections) == 2


def test_close_says_goodbye(server: Server, relay: Relay) -> None:
    relay.deliver(received())
    relay.close()
    relay.deliver(received())
    assert server.said("QUIT") == ["QUIT"]
    assert len(server.connections) == 2


def test_a_forked_child_leaves_its_parents_connection_alone(server: Server, relay: Relay) -> None:
    relay.deliver(received())
    child = os.fork()
    if child == 0:
        try:
            relay.deliver(received())
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    relay.deliver(received())
    assert len(server.messages) == 3
    assert len(server.connections) == 2


def test_threads_share_a_relay(server: Server, relay: Relay) -> None:
    def send() -> None:
        for _ in range(20):
            relay.deliver(received())

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.messages) == 160
    assert len(server.connections) <= 8


# -- encryption ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


TlsServer = Callable[..., Server]


@pytest.fixture
def tls_server(authority: trustme.CA) -> Iterator[TlsServer]:
    """`tls_server()` offers STARTTLS and AUTH, with a certificate of the authority for 127.0.0.1."""
    running: list[Server] = []

    def start(*, implicit: bool = False, name: str = "127.0.0.1", ca: trustme.CA = authority, **how: Any) -> Server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(name, **how).configure_cert(context)
        running.append(Server({"STARTTLS": "220 go"}, tls=context, implicit=implicit))
        running[-1].offers += ["AUTH PLAIN LOGIN"] if implicit else ["STARTTLS", "AUTH PLAIN"]
        return running[-1]

    yield start
    for server in running:
        server.close()


def test_starttls_and_login(tls_server: TlsServer, trusting: ssl.SSLContext) -> None:
    server = tls_server()
    relay = Relay("127.0.0.1", server.port, "joe", "secret", starttls=trusting, timeout=PATIENCE)
    relay.deliver(received())
    relay.close()
    verbs = [command.split()[0].upper() for command in server.commands]
    assert verbs[:4] == ["EHLO", "STARTTLS", "EHLO", "AUTH"]
    assert len(server.messages) == 1


def test_tls_from_the_first_byte_and_login(tls_server: TlsServer, trusting: ssl.SSLContext) -> None:
    server = tls_server(implicit=True)
    relay = Relay("127.0.0.1", server.port, "joe", "secret", ssl=trusting, timeout=PATIENCE)
    relay.deliver(received())
    relay.close()
    assert [command.split()[0].upper() for command in server.commands[:2]] == ["EHLO", "AUTH"]
    assert len(server.messages) == 1


LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"name": "another.test"}, "IP address mismatch"),
        ({"not_before": LONG_AGO, "not_after": LONG_AGO + timedelta(days=9)}, "certificate has expired"),
        ({"ca": trustme.CA()}, "unable to get local issuer certificate"),
    ],
    ids=["wrong name", "expired", "unknown authority"],
)
def test_a_certificate_that_proves_nothing_gets_neither_password_nor_mail(
    tls_server: TlsServer, trusting: ssl.SSLContext, implicit: bool, how: dict[str, Any], reason: str
) -> None:
    server = tls_server(implicit=implicit, **how)
    tls: Any = {"ssl" if implicit else "starttls": trusting}
    relay = Relay("127.0.0.1", server.port, "joe", "secret", timeout=PATIENCE, **tls)
    error = failures_of(relay, received())["b@y.test"]
    assert isinstance(error, Later)
    assert "its certificate is not accepted: " in str(error)
    assert reason in str(error)
    assert server.said("AUTH") == server.said("MAIL") == []


@pytest.mark.parametrize("implicit", [False, True])
def test_certificates_are_checked_unless_the_caller_brings_a_context(tls_server: TlsServer, implicit: bool) -> None:
    server = tls_server(implicit=implicit)
    tls: Any = {"ssl" if implicit else "starttls": True}
    error = failures_of(Relay("127.0.0.1", server.port, timeout=PATIENCE, **tls), received())["b@y.test"]
    assert "its certificate is not accepted: " in str(error)
    assert server.said("MAIL") == []


def test_without_the_starttls_that_was_asked_for_nothing_is_sent(server: Server) -> None:
    relay = Relay("127.0.0.1", server.port, "joe", "secret", starttls=True, timeout=PATIENCE)
    error = failures_of(relay, received())["b@y.test"]
    assert isinstance(error, Later)
    assert "does not offer the STARTTLS" in str(error)
    assert server.said("AUTH") == server.said("MAIL") == []


def test_what_is_said_before_the_handshake_does_not_count_behind_it(
    tls_server: TlsServer, trusting: ssl.SSLContext
) -> None:
    server = tls_server()
    server.answers = {"STARTTLS": "220 go\r\n250-evil.test\r\n250 AUTH LOGIN"}
    relay = Relay("127.0.0.1", server.port, "joe", "secret", starttls=trusting, timeout=PATIENCE)
    assert isinstance(failures_of(relay, received())["b@y.test"], Later)
    assert server.said("AUTH") == server.said("MAIL") == []


# -- login --------------------------------------------------------------------------------------------------------


def test_a_refused_login_keeps_the_mail_for_later(server: Server) -> None:
    server.offers += ["AUTH PLAIN"]
    server.answers = {"AUTH": "535 5.7.8 wrong"}
    relay = Relay("127.0.0.1", server.port, "joe", "secret", timeout=PATIENCE)
    error = failures_of(relay, received())["b@y.test"]
    assert isinstance(error, Later)
    assert "the login was refused: 535 5.7.8 wrong" in str(error)
    assert "secret" not in str(error)
    assert server.said("MAIL") == []


def base64_of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


CHALLENGE = "<1896.697170952@postoffice.test>"
DIGEST = hmac.new("pässword".encode(), CHALLENGE.encode(), "md5").hexdigest()


@pytest.mark.parametrize(
    ("offer", "answers", "said"),
    [
        ("AUTH PLAIN LOGIN", {}, ["AUTH PLAIN " + base64_of("\0joe\0pässword")]),
        (
            "AUTH LOGIN",
            {"AUTH LOGIN": "334 VXNlcm5hbWU6", base64_of("joe").upper(): "334 UGFzc3dvcmQ6"},
            ["AUTH LOGIN", base64_of("joe"), base64_of("pässword")],
        ),
        (
            "AUTH CRAM-MD5 PLAIN",
            {"AUTH CRAM": "334 " + base64_of(CHALLENGE), base64_of("joe ")[:4].upper(): "235 ok"},
            ["AUTH CRAM-MD5", base64_of(f"joe {DIGEST}")],
        ),
        (
            "AUTH CRAM-MD5 PLAIN",
            {"AUTH CRAM": "334 A", "*": "501 given up"},
            ["AUTH CRAM-MD5", "*", "AUTH PLAIN " + base64_of("\0joe\0pässword")],
        ),
    ],
    ids=["PLAIN", "LOGIN", "CRAM-MD5", "PLAIN after a broken CRAM-MD5"],
)
def test_a_login_is_by_what_the_server_offers(
    server: Server, offer: str, answers: dict[str, str | list[str]], said: list[str]
) -> None:
    server.offers += [offer]
    server.answers = answers
    if offer == "AUTH LOGIN":
        server.answers[base64_of("pässword").upper()] = "235 ok"
    relay = Relay("127.0.0.1", server.port, "joe", "pässword", timeout=PATIENCE)
    relay.deliver(received())
    relay.close()
    assert server.commands[1 : 1 + len(said)] == said
    assert len(server.messages) == 1


@pytest.mark.parametrize("offer", ["AUTH GSSAPI", "HELP"])
def test_a_server_that_offers_no_login_that_we_know_keeps_the_mail_for_later(server: Server, offer: str) -> None:
    server.offers += [offer]
    error = failures_of(Relay("127.0.0.1", server.port, "joe", "secret", timeout=PATIENCE), received())["b@y.test"]
    assert isinstance(error, Later)
    assert "no way to log in" in str(error)


@pytest.mark.parametrize("host", ["mail.test", "192.0.2.1", "2001:db8::1"])
def test_a_password_that_would_cross_the_network_in_clear_is_refused_when_the_relay_is_built(host: str) -> None:
    with pytest.raises(SettingsError, match=r"unencrypted: starttls=True .* clear_login=True"):
        Relay(host, 587, "joe", "secret")
    Relay(host, 587, "joe", "secret", starttls=True)
    Relay(host, 465, "joe", "secret", ssl=True)
    Relay(host, 587, "joe", "secret", clear_login=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost", "/run/lmtp"])
def test_a_password_for_this_machine_needs_no_encryption(host: str) -> None:
    Relay(host, 587, "joe", "secret")


def test_half_a_login_is_refused_when_the_relay_is_built() -> None:
    with pytest.raises(SettingsError, match="a username and no password"):
        Relay("127.0.0.1", username="joe")
    with pytest.raises(SettingsError, match="a password and no username"):
        Relay("127.0.0.1", password="secret")


# -- LMTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lmtp(server: Server) -> Iterator[Relay]:
    relay = Relay("127.0.0.1", server.port, lmtp=True, timeout=PATIENCE)
    yield relay
    relay.close()


def test_lmtp_has_a_reply_for_each_recipient_that_was_taken(server: Server, lmtp: Relay) -> None:
    server.answers = {
        "RCPT TO:<C@": "550 5.1.1 who?",
        ".": "250 2.0.0 kept\r\n452-4.2.2 full\r\n452 4.2.2 box\r\n250 2.0.0 kept\r\n554 5.6.0 no",
    }
    errors = failures_of(lmtp, received("a@x.test", *(f"{name}@y.test" for name in "bcdef")))
    assert {to: str(error) for to, error in errors.items()} == {
        "c@y.test": "550 5.1.1 who?",
        "d@y.test": "452 4.2.2 full 4.2.2 box",
        "f@y.test": "554 5.6.0 no",
    }
    assert server.said("LHLO")
    assert server.said("EHLO") == []
    server.answers = {}
    lmtp.deliver(received())  # on the same connection, whose replies are all read
    assert (len(server.messages), len(server.connections)) == (2, 1)
    assert server.said("RSET") == []


def test_an_lmtp_server_that_breaks_off_leaves_only_the_unanswered_for_later(server: Server, lmtp: Relay) -> None:
    server.answers = {".": f"250 2.0.0 kept\r\n550 5.2.2 full\r\n{HANG_UP}"}
    errors = failures_of(lmtp, received("a@x.test", "b@y.test", "c@y.test", "d@y.test"))
    assert [(to, type(error)) for to, error in errors.items()] == [("c@y.test", SMTPError), ("d@y.test", Later)]


def test_an_lmtp_server_is_not_greeted_as_an_smtp_server(server: Server, lmtp: Relay) -> None:
    server.answers = {"LHLO": "500 5.5.1 what?"}
    assert isinstance(failures_of(lmtp, received())["b@y.test"], Later)
    assert [command.split()[0].upper() for command in server.commands] == ["LHLO"]


def test_a_path_is_a_unix_socket_that_speaks_lmtp(tmp_path: Path) -> None:
    path = str(tmp_path / "lmtp")
    server = Server(path=path)
    relay = Relay(path, timeout=PATIENCE)
    relay.deliver(received())
    assert server.said("LHLO") == [f"lhlo {own_name() or 'localhost'}"]
    assert len(server.messages) == 1
    assert repr(relay) == f"<Relay to ({path})>"
    relay.close()
    server.close()


def test_a_unix_socket_that_is_not_there_means_later(tmp_path: Path) -> None:
    error = failures_of(Relay(str(tmp_path / "lmtp")), received())["b@y.test"]
    assert isinstance(error, Later)
    assert str(tmp_path / "lmtp") in str(error)


def test_lmtp_takes_starttls_and_no_ssl(tls_server: TlsServer, trusting: ssl.SSLContext) -> None:
    with pytest.raises(TypeError, match="not both"):
        Relay("127.0.0.1", ssl=True, lmtp=True)
    with pytest.raises(SettingsError, match="unix socket"):
        Relay("/run/lmtp", starttls=True)
    server = tls_server()
    relay = Relay("127.0.0.1", server.port, starttls=trusting, lmtp=True, timeout=PATIENCE)
    relay.deliver(received())
    relay.close()
    assert [command.split()[0].upper() for command in server.commands[:3]] == ["LHLO", "STARTTLS", "LHLO"]


def test_our_own_lmtp_receiver_and_relay_agree_about_each_recipient(router: RoutingBase, here: Path) -> None:
    taken: list[str] = []

    @stateless
    def START(message: MailRequest) -> None:
        if message.To == "c@y.test":
            raise SMTPError(550, "5.2.1 c has left")
        taken.append(message.To)

    router.register_route("[a-z]+@y.test", START)
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    receiver = LMTPReceiver("127.0.0.1", 0, router=router)
    receiver.start()
    relay = Relay("127.0.0.1", receiver.port, lmtp=True, timeout=PATIENCE)
    try:
        errors = failures_of(relay, received("a@x.test", "b@y.test", "c@y.test", "d@y.test", "e@nowhere.test"))
        relay.deliver(received("a@x.test", "f@y.test"))
    finally:
        relay.close()
        receiver.stop()
        receiver.join()
    assert {to: str(error)[:9] for to, error in errors.items()} == {
        "e@nowhere.test": "550 5.1.1",
        "c@y.test": "550 5.2.1",
    }
    assert sorted(taken) == ["b@y.test", "d@y.test", "f@y.test"]


DOVECOT = """
protocols = lmtp
base_dir = {here}/base
state_dir = {here}/state
log_path = {here}/log
ssl = no
mail_location = maildir:{here}/mail/%n
postmaster_address = postmaster@y.test
default_login_user = {user}
default_internal_user = {user}
default_internal_group = {group}
service lmtp {{
  user = {user}
  chroot =
  unix_listener {here}/lmtp {{
    mode = 0600
  }}
}}
service anvil {{
  chroot =
}}
service stats {{
  chroot =
}}
passdb {{
  driver = passwd-file
  args = {here}/users
}}
userdb {{
  driver = passwd-file
  args = {here}/users
}}
"""


@pytest.fixture
def dovecot(tmp_path: Path) -> Iterator[Path]:
    """A dovecot that takes mail for b@y.test and c@y.test over LMTP; the folder that it lives in."""
    if not (Path("/usr/sbin/dovecot").exists() and Path("/usr/lib/dovecot/lmtp").exists()):
        message = "dovecot-lmtpd is not installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    here = Path(tempfile.mkdtemp(prefix="lq", dir="/tmp"))  # the path of a unix socket has 107 octets
    user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    owner, owners = (os.getuid(), os.getgid()) if os.getuid() else (65534, 65534)  # mail is never root's
    (here / "users").write_text("".join(f"{name}@y.test::{owner}:{owners}::{here}::\n" for name in "bc"))
    (here / "mail").mkdir()
    for path in (here, here / "users", here / "mail"):
        os.chown(path, owner, owners)
    config = here / "dovecot.conf"
    config.write_text(DOVECOT.format(here=here, user=user, group=group))
    process = subprocess.Popen(["/usr/sbin/dovecot", "-F", "-c", str(config)])
    until(lambda: (here / "lmtp").exists() or process.poll() is not None)
    yield here
    process.terminate()
    process.wait(PATIENCE)
    shutil.rmtree(here, ignore_errors=True)


@pytest.mark.slow
def test_dovecot_takes_mail_over_lmtp_and_refuses_whom_it_does_not_know(dovecot: Path) -> None:
    relay = Relay(str(dovecot / "lmtp"), timeout=PATIENCE)
    errors = failures_of(relay, received("a@x.test", "b@y.test", "nobody@y.test", "c@y.test"))
    assert [(to, error.code) for to, error in errors.items() if isinstance(error, SMTPError)] == [
        ("nobody@y.test", 550)
    ]
    relay.deliver(received("", "c@y.test", data=MESSAGE + b".\r\n..dots\r\n"))
    relay.close()
    kept = {name: [path.read_bytes() for path in (dovecot / "mail" / name / "new").iterdir()] for name in "bc"}
    assert (len(kept["b"]), len(kept["c"])) == (1, 2)
    assert any(text.replace(b"\r\n", b"\n").endswith(b"\nbody\n.\n..dots\n") for text in kept["c"])


# -- a server that wears us down ----------------------------------------------------------------------------------


@pytest.mark.parametrize("endless", ["250-x\r\n" * 5000, "250-" + "x" * 100_000], ids=["lines", "line"])
def test_a_reply_that_does_not_end_means_later(server: Server, endless: str) -> None:
    server.answers = {"EHLO": endless}
    error = failures_of(Relay("127.0.0.1", server.port, timeout=PATIENCE), received())["b@y.test"]
    assert isinstance(error, Later)
    assert "does not end" in str(error)


def test_a_reply_that_drips_times_out_as_a_whole() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        try:
            while True:
                connection.sendall(b"220-\r\n")
                time.sleep(0.02)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    port = listener.getsockname()[1]
    error = failures_of(Relay("127.0.0.1", port, timeout=0.3), received())["b@y.test"]
    assert str(error) == f"relay 127.0.0.1:{port}: timed out"
    listener.close()


class Dawdler(Server):
    """Needs a quarter of a second for whatever it says."""

    def _answer(self, command: str, default: str) -> str:
        time.sleep(0.25)
        return super()._answer(command, default)


def test_a_server_that_takes_nearly_all_the_time_for_every_step_is_given_up_before_the_last() -> None:
    server = Dawdler({"AUTH": "504 5.5.4 not this one"})
    server.offers.append("AUTH CRAM-MD5 PLAIN LOGIN")
    # A greeting, a reply to EHLO and three to AUTH: 1.25 s, where 0.3 s are allowed for each and 0.9 s for all.
    error = failures_of(Relay("127.0.0.1", server.port, "u", "p", timeout=0.3), received())["b@y.test"]
    server.close()
    assert str(error) == f"relay 127.0.0.1:{server.port}: timed out"


# -- the object ---------------------------------------------------------------------------------------------------


def test_a_relay_with_deliver_hands_over_the_message_with_its_envelope() -> None:
    taken: list[MailRequest] = []
    relay = Relay(deliver=taken.append)
    relay.deliver(received("", "B@y.test"))
    relay.send("c@y.test", "a@x.test", "hi", "body")
    assert [(m.From, m.route_to) for m in taken] == [("", ["b@y.test"]), ("a@x.test", ["c@y.test"])]
    assert taken[0].envelope.rcpt_tos == ("B@y.test",)
    assert taken[0].Data == MESSAGE


def test_a_relay_with_deliver_lets_its_errors_through() -> None:
    def full(_message: MailRequest) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Relay(deliver=full).deliver(received())


def test_ssl_and_starttls_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="not both"):
        Relay(ssl=True, starttls=True)


def test_a_host_that_is_no_name_is_refused_when_the_relay_is_built() -> None:
    with pytest.raises(SettingsError, match="no name of a host"):
        Relay("mail..test")


# -- its settings -------------------------------------------------------------------------------------------------


def test_the_settings_are_the_arguments() -> None:
    relay = Relay(**RelayTable(host="mail.test", username="joe", password="x", starttls=True).config())
    assert (relay.hostname, relay.port, relay.username, relay.starttls, relay.lmtp) == (
        "mail.test",
        25,
        "joe",
        True,
        False,
    )
    assert Relay(**RelayTable(host="/run/lmtp").config()).lmtp
    assert "mail servers of each domain" in repr(Relay(**RelayTable(host="").config()))


def test_a_private_authority_is_a_setting(tls_server: TlsServer, authority: trustme.CA, tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(pem))
    server = tls_server()
    table = RelayTable(port=server.port, starttls=True, ca_file=str(pem), timeout=PATIENCE)
    relay = Relay(**table.config())
    relay.deliver(received())
    relay.close()
    assert len(server.messages) == 1


def test_a_private_authority_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(SettingsError, match=r"relay\.ca_file: cannot use nowhere: No such file"):
        RelayTable(starttls=True, ca_file="nowhere").config()
    with pytest.raises(SettingsError, match=r"relay\.ca_file: cannot use .*: it holds no certificate"):
        RelayTable(ssl=True, ca_file=str(empty)).config()
    with pytest.raises(SettingsError, match="nothing is encrypted"):
        RelayTable(ca_file=str(empty)).config()


def test_a_relay_says_where_it_goes() -> None:
    assert repr(Relay("mail.test", 587)) == "<Relay to (mail.test:587)>"
