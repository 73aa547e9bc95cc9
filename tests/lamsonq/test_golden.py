"""What was received is byte-identical after every hop: SMTP, spool, handler, push, relay, undeliverable."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.routing import RoutingBase, stateless
from lamsonq.smtp import SMTPReceiver
from lamsonq.worker import QueueReceiver

HEAD = b"From: a@example.com\r\nTo: desk@example.com\r\nSubject: golden\r\n"
MESSAGES = {
    "plain": HEAD + b"\r\nhello\r\n",
    "dots": HEAD + b"\r\n.\r\n..\r\n.a\r\n\r\n.\r\n",
    "binary": HEAD
    + b"Content-Type: application/octet-stream\r\n\r\n"
    + bytes(range(256)).replace(b"\r", b"")
    + b"\r\n",
    "8 bit": HEAD + "Content-Type: text/plain; charset=utf-8\r\n\r\nGrüße\r\n".encode(),
    "NUL": HEAD + b"\r\na\x00b\x00\r\n",
    "bare LF": HEAD + b"\r\none\ntwo\nthree\r\n",
    "bare CR": HEAD + b"\r\none\rtwo\r\r\nthree\r\n",
    "duplicate headers": b"Received: one\r\nReceived: two\r\n" + HEAD + b"X-A: 1\r\nx-a:2\r\nX-A : 3\r\n\r\nbody\r\n",
    "folded": HEAD + b"X-Long: a\r\n\tb\r\n   c\r\n\r\nbody\r\n",
    "broken MIME": HEAD
    + b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain;;;\r\n\r\nx\r\n",
    "no header": b"\r\nno header at all\r\n",
    "no body": HEAD,
    "forged record": b'X-Lamsonq-Job: {"to":["root@example.com"]}\r\n' + HEAD + b"\r\nbody\r\n",
    "10 MB": HEAD + b"\r\n" + b"0123456789abcdef" * 64 * 10_240 + b"\r\n",
}


def send(port: int, data: bytes) -> None:
    """One message as a client that changes nothing: dots are doubled behind CRLF only (RFC 5321 section 4.5.2)."""
    with socket.create_connection(("127.0.0.1", port), 20) as client, client.makefile("rb") as replies:
        assert replies.readline().startswith(b"220")
        for command in (b"HELO x", b"MAIL FROM:<a@example.com>", b"RCPT TO:<desk@example.com>", b"DATA"):
            client.sendall(command + b"\r\n")
            assert replies.readline()[:3] in (b"250", b"354"), command
        client.sendall(re.sub(rb"(?:\A|(?<=\r\n))\.", b"..", data) + b".\r\n")
        assert replies.readline().startswith(b"250")


@pytest.fixture
def ports(here: Path) -> Iterator[tuple[int, int]]:
    """Two servers: one that spools, and the one that is relayed to."""
    receivers = [
        SMTPReceiver("127.0.0.1", 0, deliver=Queue(name).push, router=RoutingBase())
        for name in ("run/in", "run/relayed")
    ]
    for receiver in receivers:
        receiver.start()
    yield receivers[0].port, receivers[1].port
    for receiver in receivers:
        receiver.stop()
        receiver.join()


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_hop_keeps_every_byte(ports: tuple[int, int], kind: str) -> None:
    data = MESSAGES[kind]
    relay = Relay(port=ports[1])
    read: list[bytes] = []

    @stateless
    def START(message: MailRequest) -> None:
        message.body()
        message.items()
        read.append(message.Data)
        Queue("run/pushed").push(message)
        relay.deliver(message)

    router = RoutingBase()
    router.register_route("desk@example.com", START)
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    send(ports[0], data)
    QueueReceiver("run/in", router=router).start(one_shot=True)
    relay.close()
    router.clear_routes()
    router.deliver(MailRequest("here", "a@example.com", "desk@example.com", data))
    assert read == [data]
    for name in ("run/pushed", "run/relayed", "run/undeliverable"):
        _, message = Queue(name).pop()
        assert message is not None, name
        trace, found, rest = message.Data.partition(data)
        assert (found, rest) == (data, b""), name
        assert (trace != b"") == (name == "run/relayed"), name
        assert not trace or re.fullmatch(rb"Received: from x \(\[127\.0\.0\.1\]\)\r\n(?: [^\r\n]+\r\n)+", trace)
