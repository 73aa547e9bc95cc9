"""The PROXY protocol: a load balancer of ours says whom it connects for, and nobody else is asked."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any

import pytest

from lamsonq import session
from lamsonq.limits import Limits
from lamsonq.smtp import SMTPReceiver
from lamsonq.tls import TLS

from .clients import Client
from .waiting import until

Serve = Any
LOOPBACK = ["127.0.0.0/8"]
V1 = b"PROXY TCP4 192.0.2.7 192.0.2.1 40000 25\r\n"


def v2(command: int, family: int, body: bytes) -> bytes:
    return b"\r\n\r\n\0\r\nQUIT\n" + bytes([0x20 | command, family]) + struct.pack("!H", len(body)) + body


V2_IPV4 = socket.inet_aton("192.0.2.7") + socket.inet_aton("192.0.2.1") + struct.pack("!HH", 40000, 25)
V2_IPV6 = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + struct.pack("!HH", 40000, 25)
)


@pytest.mark.parametrize(
    ("header", "address"),
    [
        (V1, "192.0.2.7"),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 40000 25\r\n", "2001:db8::7"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
        (b"PROXY UNKNOWN ff:: ff:: 1 2\r\n", "127.0.0.1"),
        (v2(1, 0x11, V2_IPV4), "192.0.2.7"),
        (v2(1, 0x21, V2_IPV6), "2001:db8::7"),
        (v2(1, 0x11, V2_IPV4 + b"\x04\x00\x03abc"), "192.0.2.7"),
        (v2(0, 0x00, b""), "127.0.0.1"),
        (v2(0, 0x11, V2_IPV4), "127.0.0.1"),
        (v2(1, 0x00, b""), "127.0.0.1"),
    ],
)
def test_the_client_is_whom_the_proxy_names(serve: Serve, header: bytes, address: str) -> None:
    seen: list[str] = []
    receiver = serve(proxies=LOOPBACK, on_mail=lambda dialogue: seen.append(dialogue.address))
    with Client(receiver, header=header) as client:
        assert client.greeting.startswith("220")
        assert client.mail().startswith("250")
    assert seen == [address]
    assert serve.taken[0].Peer[0] == address
    until(lambda: receiver.traffic.open == 0)


@pytest.mark.parametrize("header", [V1, v2(1, 0x11, V2_IPV4)])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_header_and_what_comes_behind_it_may_be_cut_anywhere(serve: Serve, header: bytes, size: int) -> None:
    with Client(serve(proxies=LOOPBACK), wait=False) as client:
        octets = header + b"EHLO a\r\nMAIL FROM:<a@x.test>\r\nNOOP\r\n"
        for start in range(0, len(octets), size):
            client.send(octets[start : start + size])
        assert client.replies(4) == ["220", "250", "250", "250"]


@pytest.mark.parametrize("size", [0, 1, 30])
def test_a_handshake_may_come_with_the_header(
    serve: Serve, certificate: Callable[..., str], trusting: ssl.SSLContext, size: int
) -> None:
    """The first `size` octets of the ClientHello come in the segment of the header; 0: all of them."""
    receiver = serve(proxies=LOOPBACK, tls=TLS(certificate(), implicit=True))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    encrypted = trusting.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with Client(receiver, wait=False) as client:
        with pytest.raises(ssl.SSLWantReadError):
            encrypted.do_handshake()
        hello = outgoing.read()
        client.send(V1 + hello[: size or len(hello)])
        if size:
            client.send(hello[size:])
        for step in (encrypted.do_handshake, encrypted.read):
            while True:
                try:
                    done = step()
                    break
                except ssl.SSLWantReadError:
                    if octets := outgoing.read():
                        client.send(octets)
                    incoming.write(client.socket.recv(65536))
            if octets := outgoing.read():
                client.send(octets)
        assert done is not None
        assert done.startswith(b"220 mx.test")


@pytest.mark.parametrize(
    "garbage",
    [
        b"EHLO client.test\r\n",
        b"PROXY\r\n",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 192.0.2.7\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 40000\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 x 25\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 40000 99999\r\n",
        b"PROXY TCP4 2001:db8::7 192.0.2.1 40000 25\r\n",
        b"PROXY UDP4 192.0.2.7 192.0.2.1 40000 25\r\n",
        b"PROXY TCP4 999.0.2.7 192.0.2.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 40000 25\n",
        b"PROXY TCP4 " + b"1" * 200 + b"\r\n",
        b"PROXY TCP4 " + b"1" * 20_000,
        b"PROXY TCP4 " + b"1" * 300_000 + b"\r\n",
        v2(1, 0x11, V2_IPV4[:5]),
        v2(1, 0x11, b""),
        v2(9, 0x11, V2_IPV4),
        v2(1, 0xFF, V2_IPV4),
        v2(1, 0x21, V2_IPV4),
        b"\r\n\r\n\0\r\nQUIT\n\xff\xff\xff\xff",
        b"\r\n\r\n\0\r\nQUIX\n" + b"x" * 50,
        b"",
    ],
)
def test_what_is_no_header_ends_the_connection_without_a_word(
    serve: Serve, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    receiver = serve(proxies=LOOPBACK)
    with Client(receiver, wait=False) as client:
        try:
            client.send(garbage)
            client.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is closed already
        assert client.rest() == ""
    until(lambda: not receiver._sessions)
    assert "is among receiver.proxies and does not speak the PROXY protocol" in caplog.text


def test_a_proxy_that_says_nothing_is_dropped(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PROXY_TIMEOUT", 0.1)
    receiver = serve(proxies=LOOPBACK)
    with Client(receiver, wait=False) as client:
        client.send(V1[:9])
        assert client.rest() == ""
    until(lambda: not receiver._sessions)


def test_from_anybody_else_it_is_an_unknown_command(serve: Serve) -> None:
    for proxies in ([], ["10.0.0.0/8"]):
        with Client(serve(proxies=proxies), greet=False) as client:
            assert client.say(V1.rstrip()) == "500 5.5.1 Command not recognized"
            assert client.say("EHLO a").startswith("250")
            assert client.mail().startswith("250")
    assert {message.Peer[0] for message in serve.taken} == {"127.0.0.1"}


def test_a_second_header_is_an_unknown_command(serve: Serve) -> None:
    with Client(serve(proxies=LOOPBACK), header=V1) as client:
        assert client.say(V1.rstrip()).startswith("500")


def test_limits_are_for_whom_the_proxy_names(serve: Serve) -> None:
    receiver: SMTPReceiver = serve(proxies=LOOPBACK, limits=Limits(connections_per_address=1))
    other = V1.replace(b"192.0.2.7", b"192.0.2.8")
    with Client(receiver, header=V1) as first, Client(receiver, header=V1) as second:
        assert first.greeting.startswith("220")
        assert second.greeting == "421 4.7.0 too many connections from your address, try again later"
        with Client(receiver, header=other) as third:
            assert third.greeting.startswith("220")


def test_what_is_no_network_is_named(serve: Serve) -> None:
    with pytest.raises(ValueError, match=r"proxies: .*; a network is written as 10.0.0.0/8"):
        serve(proxies=["10.0.0.1/8"])
