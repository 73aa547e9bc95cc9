"""Clients that want something else than to send mail. docs/edge.md has the list."""

from __future__ import annotations

import asyncio
import resource
import smtplib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lamsonq import wire
from lamsonq.limits import Limits
from lamsonq.mail import MailRequest
from lamsonq.smtp import SMTPReceiver

from .clients import MESSAGE, Client
from .offline import Taker, Transport, cut, ours, talk
from .waiting import PATIENCE, until

Serve = Any

# -- smuggling ----------------------------------------------------------------------------------------------------

ENDS = [
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\n.\r",
    b"\r.\n",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\r\n",
    b"\r\n\r.\r\n",
    b"\n\n.\r\n",
    b"\r\n.\n\r\n",
    b"\r\n. \r\n",
    b"\r\n..\r\n",
    b"\r\n.\x0b\r\n",
    b"\r\n.\x85\r\n",
]
"""What other servers have taken for the end of a message, and what we might."""

EVIL = b"MAIL FROM:<evil@b.test>\r\nRCPT TO:<victim@e.test>\r\nDATA\r\nevil"
BEGIN = b"EHLO a\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<desk@y.test>\r\n"


def unstuffed(content: bytes) -> bytes:
    return (b"\r\n" + content).replace(b"\r\n.", b"\r\n")[2:]


def is_refused(content: bytes) -> bool:
    """By `refuse_bare`."""
    rest = content.replace(b"\r\n", b"")
    return b"\r" in rest or b"\n" in rest or b"\0" in rest


async def _taken(octets: bytes, places: list[list[int]], *, carries_bare: bool) -> list[tuple[list[bytes], Any]]:
    found = []
    for each in places:
        taker = Taker(carries_bare=carries_bare)
        taker.size_limit = 4000
        transport = await talk(ours(taker), cut(octets, each), turns=1)
        found.append((transport.codes, taker.taken))
    return found


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_one_message_in_is_one_message_out_whatever_looks_like_its_end(end: bytes, refuses: bool) -> None:
    body = b"Subject: s\r\n\r\nhead" + end + EVIL + b"\r\n"
    octets = BEGIN + b"DATA\r\n" + body + b".\r\nQUIT\r\n"
    begin = len(BEGIN)
    places = [[], list(range(len(octets))), *([place] for place in range(begin, len(octets)))]
    whole = asyncio.run(_taken(octets, places, carries_bare=not refuses))
    assert all(each == whole[0] for each in whole)
    codes, taken = whole[0]
    content = unstuffed(body)
    if refuses and is_refused(content):
        assert codes == [b"220", b"250", b"250", b"250", b"354", b"550", b"221"]
        assert taken == []
    else:
        assert codes == [b"220", b"250", b"250", b"250", b"354", b"250", b"221"]
        assert taken == [("a@x.test", ["desk@y.test"], content)]


@pytest.mark.parametrize("end", [*ENDS, b"\r\n.\r\n"])
def test_nothing_ends_a_message_that_says_its_length(end: bytes) -> None:
    body = b"head" + end + EVIL + end
    octets = BEGIN + b"BDAT %d\r\n" % (len(body) - 5) + body[:-5] + b"BDAT 5 LAST\r\n" + body[-5:] + b"QUIT\r\n"
    places = [[], list(range(len(octets))), *([place] for place in range(len(BEGIN), len(octets)))]
    whole = asyncio.run(_taken(octets, places, carries_bare=True))
    assert all(each == whole[0] for each in whole)
    assert whole[0] == (
        [b"220", b"250", b"250", b"250", b"250", b"250", b"221"],
        [("a@x.test", ["desk@y.test"], body)],
    )


def test_a_cr_before_the_true_end_is_content() -> None:
    octets = BEGIN + b"DATA\r\nhead\r\r\n.\r\n" + EVIL + b"\r\n.\r\n"
    [(_, taken)] = asyncio.run(_taken(octets, [[]], carries_bare=True))
    assert [content for *_, content in taken] == [b"head\r\r\n", b"evil\r\n"]


def test_what_is_left_of_a_message_that_is_too_large_is_no_command(serve: Serve) -> None:
    with Client(serve(size_limit=1000)) as client:
        client.begin("desk@y.test")
        client.say("DATA")
        client.send(b"x" * 5000 + b"\r\nQUIT\r\n" * 1000 + b"\r\n.\n\r\n.\r\nNOOP\r\n")
        assert client.replies(2) == ["552", "250"]
    assert serve.taken == []


# -- what is no command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"MAIL FROM:<a@x.test>\n",
        b"MAIL FROM:<a@x.test>\r\r\n",
        b"MAIL\tFROM:<a@x.test>\r\n",
        b"NOOP\0\r\n",
        b"\0\r\n",
        b"EHLO x\rX-Evil: 1\r\n",
        b"NOOP\rRSET\r\n",
        b"\n",
        b"\r\n",
        b" NOOP\r\n",
        b"\xff\xfe\r\n",
        b"NO\xc2\x85OP\r\n",
        b"FOO\x1b[2J\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n",
        b"NOOP" + b"x" * (wire.COMMAND_MAX - 5) + b"\r\n",
        b"NOOP " + b"x" * wire.COMMAND_MAX + b"\r\n",
        b"x" * 1_000_000 + b"\r\n",
        b"MAIL FROM:<" + b"a" * 1900 + b"@x.test>\r\n",
    ],
)
def test_what_is_no_command_is_refused_in_one_line_that_repeats_nothing(serve: Serve, line: bytes) -> None:
    with Client(serve()) as client:
        client.send(line)
        reply = client.reply()
        assert reply.startswith("5")
        assert reply.isascii()
        assert reply.isprintable()
        assert len(reply) < 200
        assert not any(word in reply for word in ("Evil", "FOO", "xxx"))
        assert client.say("RCPT TO:<a@y.test>") == "503 5.5.1 Need MAIL command"
        assert client.mail().startswith("250")


def test_a_command_may_be_as_long_as_the_limit(serve: Serve) -> None:
    with Client(serve()) as client:
        assert client.say(b"NOOP " + b"x" * (wire.COMMAND_MAX - 7)) == "250 2.0.0 OK"
        assert client.say(b"NOOP " + b"x" * (wire.COMMAND_MAX - 6)) == "500 5.5.6 Command line too long"


@pytest.mark.parametrize("verb", ["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "CONNECT", "get"])
def test_who_speaks_http_is_sent_away_before_he_gets_to_his_body(serve: Serve, verb: str) -> None:
    with Client(serve(), greet=False) as client:
        body = "\r\n\r\nEHLO evil\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\nx\r\n.\r\n"
        client.send(f"{verb} / HTTP/1.1\r\nHost: 127.0.0.1{body}".encode())
        assert client.rest() == "421 4.7.0 This is a mail server\r\n"
    assert serve.taken == []


def test_a_browser_that_guesses_is_sent_away_by_its_headers(serve: Serve) -> None:
    with Client(serve(), greet=False) as client:
        client.send(b"TRACE / HTTP/1.1\r\n" + b"X-Header: 1\r\n" * 20)
        assert client.rest().splitlines()[-1] == "421 4.7.0 Too many errors, closing connection"


# -- floods -------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_files() -> Iterator[None]:
    """Descriptors for a thousand clients and their sessions in one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("too few descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def seconds_for_a_message(receiver: SMTPReceiver) -> float:
    begun = time.monotonic()
    with smtplib.SMTP("127.0.0.1", receiver.port, timeout=PATIENCE) as client:
        client.sendmail("a@x.test", ["desk@y.test"], MESSAGE)
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "begun",
    [
        BEGIN + b"DATA\r\nslow",
        *(
            pytest.param(octets, marks=pytest.mark.slow)
            for octets in (b"", b"EHLO a\r\nMAIL FR", BEGIN + b"BDAT 9\r\nx")
        ),
    ],
)
def test_a_thousand_clients_that_only_begin_keep_out_nobody(serve: Serve, many_files: None, begun: bytes) -> None:
    receiver = serve()
    clients = []
    try:
        for _ in range(1000):
            clients.append(socket.create_connection(("127.0.0.1", receiver.port), timeout=PATIENCE))
            clients[-1].sendall(begun)
        until(lambda: receiver.traffic.open == 1000)
        assert seconds_for_a_message(receiver) < PATIENCE / 2
    finally:
        for client in clients:
            client.close()
    until(lambda: receiver.traffic.open == 0)
    assert receiver.traffic.memory == 0


@pytest.mark.parametrize(
    "command",
    [
        b"NOOP\r\n",
        b"FOO\r\n",
        *(pytest.param(c, marks=pytest.mark.slow) for c in (b"RSET\r\n", b"EHLO a\r\n", b"VRFY x\r\n")),
    ],
)
def test_a_client_that_reads_no_replies_is_not_read_from(serve: Serve, command: bytes) -> None:
    receiver = serve(limits=Limits(bad_commands=0))
    with Client(receiver) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.socket.settimeout(0.2)
        [session] = receiver._sessions
        sent, stuck = 0, False
        while not stuck:
            assert sent < 100_000_000
            try:
                sent += client.socket.send(command * 10_000)
            except TimeoutError:
                stuck = session._blocked  # else the server was only slow
        assert isinstance(session.transport, asyncio.Transport)
        assert session.transport.get_write_buffer_size() < 1_000_000
        assert len(session._held) < 4 * wire.AHEAD_MAX
        assert seconds_for_a_message(receiver) < PATIENCE / 2


def test_a_hundred_thousand_commands_in_one_go_are_answered_one_by_one(serve: Serve) -> None:
    receiver = serve()
    with Client(receiver) as client:
        client.socket.settimeout(PATIENCE)
        for _ in range(100):
            client.send(b"NOOP\r\nRSET\r\n" * 500)
            assert set(client.replies(1000)) == {"250"}
        assert seconds_for_a_message(receiver) < PATIENCE / 2


@pytest.mark.slow
def test_a_storm_of_connections_leaves_nothing(serve: Serve) -> None:
    receiver = serve()
    for number in range(1500):
        client = socket.create_connection(("127.0.0.1", receiver.port), timeout=PATIENCE)
        if number % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert seconds_for_a_message(receiver) < PATIENCE / 2
    until(lambda: (receiver.traffic.open, receiver._sessions) == (0, set()))


@pytest.mark.parametrize(
    ("content", "limit"),
    [(b"\r\n" * 1_000_000, 4_000_000), (b"x" * 4_000_000, 8_000_000), (b"\r\n.." * 500_000, 4_000_000)],
)
def test_no_content_costs_more_than_its_size(serve: Serve, content: bytes, limit: int) -> None:
    receiver = serve()
    with Client(receiver) as client:
        client.begin("desk@y.test")
        client.say("DATA")
        begun = time.process_time()
        client.send(content)
        assert client.say(b"\r\n.").startswith("250")
        assert time.process_time() - begun < 2
    until(lambda: receiver.traffic.memory == 0)
    assert len(serve.taken[0].Data) <= limit


# -- slow clients, in the test's own time -------------------------------------------------------------------------


def _own_time() -> list[float]:
    """The loop's clock goes ahead by so many seconds."""
    loop = asyncio.get_running_loop()
    clock, ahead = loop.time, [0.0]
    loop.time = lambda: clock() + ahead[0]  # type: ignore[method-assign]
    return ahead


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def _drip(command: bytes, piece: bytes, every: float, times: int) -> tuple[Transport, float]:
    """Send a piece every so many seconds; what was written, and how long it took until the connection was closed."""
    ahead = _own_time()
    taker = Taker(Limits())
    taker.size_limit = 10_000_000
    session, transport = ours(taker), Transport()
    session.connection_made(transport)
    session.data_received(BEGIN + command)
    for _ in range(times):
        ahead[0] += every
        await _turns()
        if transport.closed:
            break
        session.data_received(piece)
    session.connection_lost(None)
    return transport, ahead[0]


@pytest.mark.parametrize("command", [b"DATA\r\n", b"BDAT 9000000\r\n"])
def test_a_message_that_drips_in_is_ended(command: bytes) -> None:
    transport, took = asyncio.run(_drip(command, b"x" * 100, every=30, times=100))
    assert transport.written.endswith(b"421 4.4.2 Timeout, closing connection\r\n")
    assert 180 <= took <= 240


@pytest.mark.parametrize("command", [b"DATA\r\n", b"BDAT 9000000\r\n"])
def test_a_message_that_comes_slowly_but_well_is_not(command: bytes) -> None:
    transport, _ = asyncio.run(_drip(command, b"x" * 30 * wire.RATE_MIN, every=30, times=100))
    assert not transport.closed


def test_a_command_that_drips_in_is_ended() -> None:
    transport, took = asyncio.run(_drip(b"", b"x", every=10, times=100))
    assert transport.written.endswith(b"421 4.4.2 Timeout, closing connection\r\n")
    assert 300 <= took <= 310


def test_who_does_not_read_in_a_login_and_then_reads_and_says_nothing_is_sent_away() -> None:
    async def visit() -> Transport:
        ahead = _own_time()
        taker = Taker(Limits())
        taker.has_logins = True
        session, transport = ours(taker), Transport()
        session.connection_made(transport)
        session._tls_protocol = object.__new__(ssl.SSLObject)  # type: ignore[assignment]
        session.data_received(b"EHLO me.test\r\nAUTH LOGIN\r\n")
        await _turns()
        session.pause_writing()
        session.data_received(b"am9l\r\n")
        await _turns()
        session.resume_writing()
        await _turns()
        assert transport.written.endswith(b"334 UGFzc3dvcmQA\r\n")
        ahead[0] += 301
        await _turns()
        session.connection_lost(None)
        return transport

    assert asyncio.run(visit()).written.endswith(b"421 4.4.2 Timeout, closing connection\r\n")


def test_who_reads_nothing_and_is_sent_away_is_gone_soon_also_when_his_message_is_taken_meanwhile() -> None:
    class Unread(Transport):
        aborted = False

        def get_write_buffer_size(self) -> int:
            return 1

        def abort(self) -> None:
            self.aborted = True

    class Slow(Taker):
        def commit(self, _envelope: Any, _content: object, _groups: object, tell: Callable[[str], None]) -> None:
            self.tell = tell

    async def visit() -> Unread:
        ahead = _own_time()
        taker = Slow(Limits())
        session, transport = ours(taker), Unread()
        session.connection_made(transport)
        session.data_received(BEGIN + b"DATA\r\nx\r\n.\r\n")
        session.dismiss("421 4.3.2 Service shutting down")
        taker.tell("250 2.0.0 Ok")
        await _turns()
        ahead[0] += wire.CLOSE_TIMEOUT + 1
        await _turns()
        session.connection_lost(None)
        return transport

    assert asyncio.run(visit()).aborted


# -- messages -----------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    opening = b"".join(
        b'Content-Type: multipart/mixed; boundary="b%d"\r\n\r\n--b%d\r\n' % (number, number) for number in range(depth)
    )
    return b"Subject: deep\r\nMIME-Version: 1.0\r\n" + opening + b"\r\nx\r\n"


BOMBS = {
    "depth": nested(1000),
    "messages": b"Subject: m\r\n" + b"Content-Type: message/rfc822\r\n\r\n" * 1000 + b"x\r\n",
    "parts": b'Subject: p\r\nContent-Type: multipart/mixed; boundary="b"\r\n\r\n'
    + b"--b\r\n\r\nx\r\n" * 100_000
    + b"--b--\r\n",
    "header": b"Subject: " + b"x" * 1_000_000 + b"\r\n\r\nx\r\n",
    "folded": b"Subject: a\r\n" + b" x\r\n" * 250_000 + b"\r\nx\r\n",
    "headers": b"X-A: b\r\n" * 100_000 + b"\r\nx\r\n",
    "words": b"Subject: " + b"=?utf-8?q?a?= " * 40_000 + b"\r\n\r\nx\r\n",
    "parameters": b"Content-Type: text/plain" + b"; a=b" * 32_000 + b"\r\n\r\nx\r\n",
    "addresses": b"To: " + b'"a" <a@b.test>, ' * 60_000 + b"\r\n\r\nx\r\n",
    "comments": b"From: " + b"(" * 100_000 + b"\r\n\r\nx\r\n",
    "boundary": b'Content-Type: multipart/mixed; boundary="' + b"b" * 70_000 + b'"\r\n\r\nx\r\n',
    "charset": b'Content-Type: text/plain; charset="\0nosuch"\r\n\r\n\xff\r\n',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_message_made_to_cost_is_read_within_a_second(serve: Serve, bomb: str) -> None:
    took: list[float] = []

    def read(message: MailRequest) -> None:
        begun = time.thread_time()
        try:
            for name in ("Subject", "From", "To", "Content-Type"):
                str(message[name])
            message.body()
            list(message.walk())
            message.all_parts()
            message.is_bounce()
        finally:
            took.append(time.thread_time() - begun)

    with Client(serve(deliver=read)) as client:
        assert client.mail(data=BOMBS[bomb])[:3] in ("250", "554", "550")
        assert client.say("NOOP").startswith("250")
    assert took[0] < 1
