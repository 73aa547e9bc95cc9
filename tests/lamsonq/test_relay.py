"""What `Relay` does, against a server that answers as the test says."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq.errors import Dead, Failure, Later, SettingsError, SMTPError, Undelivered, outcome_of
from lamsonq.mail import Envelope, MailRequest, MailResponse
from lamsonq.relay import Relay
from lamsonq.transaction import for_the_wire

MESSAGE = b"From: a@x.test\r\nTo: b@y.test\r\nSubject: hi\r\n\r\nbody\r\n"
HANG_UP = "HANG UP"


class Server:
    """An SMTP server in threads. `answers` maps the beginning of a command to its reply, or to a list of replies of
    which the last one stays; "." answers the message. HANG_UP closes the connection, "" says nothing."""

    def __init__(self, answers: dict[str, str | list[str]] | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.answers = answers or {}
        self.tls = tls
        self.offers = ["fake.test", "SIZE 1000000", "8BITMIME", "SMTPUTF8"]
        self.commands: list[str] = []
        self.messages: list[bytes] = []
        self.connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _answer(self, command: str, default: str) -> str:
        for beginning, reply in self.answers.items():
            if command.upper().startswith(beginning):
                if isinstance(reply, str):
                    return reply
                return reply.pop(0) if len(reply) > 1 else reply[0]
        return default

    def _talk(self, connection: socket.socket) -> None:
        try:
            self._session(connection)
        except OSError:
            pass

    def _session(self, connection: socket.socket) -> None:
        connection.sendall(self._answer("GREETING", "220 fake.test").encode() + b"\r\n")
        lines = connection.makefile("rb")
        while line := lines.readline():
            command = line.decode().rstrip("\r\n")
            self.commands.append(command)
            reply = self._answer(command, self._default(command))
            if reply == HANG_UP:
                connection.shutdown(socket.SHUT_RDWR)
                return
            connection.sendall(reply.encode() + b"\r\n")
            if reply.startswith("354"):
                self._data(connection, lines.readline)
            if command.upper() == "STARTTLS" and reply.startswith("220") and self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
                self.connections.append(connection)
                lines = connection.makefile("rb")

    def _default(self, command: str) -> str:
        verb = command.upper()
        if verb.startswith("EHLO"):
            return "\r\n".join([f"250-{offer}" for offer in self.offers] + ["250 HELP"])
        return "354 go on" if verb == "DATA" else "235 ok" if verb.startswith("AUTH") else "250 ok"

    def _data(self, connection: socket.socket, readline: Callable[[], bytes]) -> None:
        wire = b""
        while (line := readline()) != b".\r\n":
            if not line:
                return
            wire += line
        self.messages.append(wire)
        reply = self._answer(".", "250 taken")
        if reply == HANG_UP:
            connection.shutdown(socket.SHUT_RDWR)
        elif reply:
            connection.sendall(reply.encode() + b"\r\n")

    def said(self, verb: str) -> list[str]:
        return [command for command in self.commands if command.upper().startswith(verb)]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    relay = Relay("127.0.0.1", server.port, timeout=5)
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


def test_the_null_sender_gets_no_reply(server: Server, relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        relay.reply(received(""), "b@y.test", "Re: hi", "yes")
    assert "null sender" in caplog.text
    assert server.commands == []


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
        (b"a\n\rb", b"a\r\n\r\nb\r\n"),
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
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
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


def test_a_connection_that_dies_after_mail_is_not_tried_again(server: Server, relay: Relay) -> None:
    server.answers = {"RCPT": ["250 ok", HANG_UP]}
    relay.deliver(received())
    assert isinstance(failures_of(relay, received())["b@y.test"], Later)
    assert len(server.connections) == 1


def test_a_connection_that_waited_too_long_is_not_used(
    server: Server, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.relay.IDLE_MAX", 0.0)
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


# -- encryption and login -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    pem = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(pem), "-out", f"{pem}.crt"],
        check=True,
        capture_output=True,
    )
    pem.write_bytes(pem.read_bytes() + Path(f"{pem}.crt").read_bytes())
    return pem


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(tls=context)
    server.offers += ["STARTTLS", "AUTH PLAIN"]
    server.answers = {"STARTTLS": "220 go"}
    yield server
    server.close()


def test_starttls_and_login(tls_server: Server, certificate: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    relay = Relay("127.0.0.1", tls_server.port, "joe", "secret", starttls=trusting, timeout=5)
    relay.deliver(received())
    relay.close()
    verbs = [command.split()[0].upper() for command in tls_server.commands]
    assert verbs[:4] == ["EHLO", "STARTTLS", "EHLO", "AUTH"]
    assert len(tls_server.messages) == 1


def test_an_unknown_certificate_is_not_trusted(tls_server: Server) -> None:
    relay = Relay("127.0.0.1", tls_server.port, "joe", "secret", starttls=True, timeout=5)
    error = failures_of(relay, received())["b@y.test"]
    assert isinstance(error, Later)
    assert "certificate" in str(error).lower()
    assert tls_server.said("AUTH") == tls_server.said("MAIL") == []


def test_without_the_starttls_that_was_asked_for_nothing_is_sent(server: Server) -> None:
    relay = Relay("127.0.0.1", server.port, "joe", "secret", starttls=True, timeout=5)
    assert isinstance(failures_of(relay, received())["b@y.test"], Later)
    assert server.said("AUTH") == server.said("MAIL") == []


def test_a_refused_login_keeps_the_mail_for_later(server: Server) -> None:
    server.offers += ["AUTH PLAIN"]
    server.answers = {"AUTH": "535 5.7.8 wrong"}
    relay = Relay("127.0.0.1", server.port, "joe", "secret", timeout=5)
    error = failures_of(relay, received())["b@y.test"]
    assert isinstance(error, Later)
    assert "535 5.7.8 wrong" in str(error)
    assert "secret" not in str(error)


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


def test_a_relay_needs_a_host() -> None:
    with pytest.raises(SettingsError, match="host"):
        Relay(host=None)


def test_a_relay_says_where_it_goes() -> None:
    assert repr(Relay("mail.test", 587)) == "<Relay to (mail.test:587)>"
