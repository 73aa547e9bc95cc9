"""Exim in front of us: its messages come in pieces, by BDAT (RFC 3030)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq.errors import SMTPError
from lamsonq.logins import Logins
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, Receiver, SMTPReceiver

from .conftest import NAME, PASSWORD, Handled, Papers, mail_named
from .exim import Exim
from .programs import open_folder

Serve = Callable[[Receiver], None]

SAFE = """\
  hosts_require_tls = *
  tls_verify_certificates = {authority}
  tls_verify_hosts = *
  tls_verify_cert_hostnames =
  hosts_require_auth = *"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture(params=["smtp", "lmtp"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def receiver(protocol: str, routed: RoutingBase, serve: Serve) -> SMTPReceiver:
    receiver = (LMTPReceiver if protocol == "lmtp" else SMTPReceiver)("127.0.0.1", 0, router=routed)
    serve(receiver)
    return receiver


def as_sent(received: bytes) -> bytes:
    """Without the fields that Exim puts in front (RFC 5321 section 4.4)."""
    return re.sub(rb"\A(Received: .*\r\n([ \t].*\r\n)*)+", b"", received)


def sent_by_bdat(exim: Exim) -> int:
    """How many recipients' message was taken by BDAT: their lines have a K."""
    return sum(bool(re.search(r" [=-]> .* K C=", line)) for line in exim.log())


def test_a_message_in_pieces_arrives_byte_for_byte(
    protocol: str, folder: Path, receiver: SMTPReceiver, handled: Handled
) -> None:
    exim = Exim(folder, receiver.port, protocol)
    exim.send(mail_named("pieces"), "bob@y.test")
    assert handled.messages, exim.log()
    (message,) = handled.messages
    assert as_sent(message.Data) == mail_named("pieces")
    assert (message.From, message.To) == ("ann@x.test", "bob@y.test")
    assert sent_by_bdat(exim) == 1, exim.log()


@pytest.mark.parametrize("octets", [4_000, 8_192, 300_000, 3_000_000])
def test_a_large_message_comes_in_many_pieces(
    octets: int, protocol: str, folder: Path, receiver: SMTPReceiver, handled: Handled
) -> None:
    large = mail_named("large") + (b"." * 63 + b"\r\n") * (octets // 65)
    exim = Exim(folder, receiver.port, protocol)
    exim.send(large, "bob@y.test")
    assert handled.messages, exim.log()
    (message,) = handled.messages
    assert as_sent(message.Data) == large
    assert sent_by_bdat(exim) == 1, exim.log()


def test_whom_we_refuse_and_put_off_exim_keeps_apart(
    protocol: str, folder: Path, receiver: SMTPReceiver, handled: Handled
) -> None:
    exim = Exim(folder, receiver.port, protocol)
    handled.refusals["eve@y.test"] = SMTPError(451, "Come back tomorrow")
    exim.send(mail_named("apart"), *(["bob@y.test"] if protocol == "lmtp" else []), "eve@y.test", "no-body@y.test")
    assert [message.To for message in handled.messages] == (["bob@y.test"] if protocol == "lmtp" else [])
    assert [line for line in exim.log() if "** no-body@y.test" in line and "550 5.1.1" in line], exim.log()
    assert [line for line in exim.log() if "== eve@y.test" in line and "Come back tomorrow" in line], exim.log()
    handled.refusals.clear()
    handled.messages.clear()
    exim.try_again()
    assert "eve@y.test" in [message.To for message in handled.messages if message.From == "ann@x.test"]


def test_exim_verifies_our_certificate_and_logs_in(
    protocol: str, folder: Path, papers: Papers, handled: Handled, serve: Serve
) -> None:
    made = LMTPReceiver if protocol == "lmtp" else SMTPReceiver
    tls, logins = papers.tls(required=True), Logins(papers.logins)
    receiver = made("127.0.0.1", 0, deliver=handled, router=RoutingBase(), tls=tls, logins=logins, login_required=True)
    serve(receiver)
    exim = Exim(folder, receiver.port, protocol, NAME, PASSWORD, SAFE.format(authority=papers.authority))
    exim.send(mail_named("safe"), "bob@y.test")
    assert handled.messages, exim.log()
    assert handled.messages, exim.log()
    (message,) = handled.messages
    assert as_sent(message.Data) == mail_named("safe")
    assert message.envelope.login == NAME
    assert message.envelope.tls
    assert sent_by_bdat(exim) == 1, exim.log()
