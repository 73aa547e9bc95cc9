"""Exim in front of us: its messages come in pieces, by BDAT (RFC 3030)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq.errors import SMTPError
from lamsonq.lmtp import LMTPSession
from lamsonq.logins import Logins
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, Receiver, SMTPReceiver
from lamsonq.session import Session
from lamsonq.wire import Command, Work

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


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of BDAT that our sessions were given."""
    given: list[str] = []
    for kind in (Session, LMTPSession):
        commands = dict(kind.commands)
        take = commands["BDAT"]

        def noted(session: Session, argument: str | None, take: Command = take) -> Work | None:
            given.append(argument or "")
            return take(session, argument)

        monkeypatch.setattr(kind, "commands", {**commands, "BDAT": noted})
    return given


def messages_in(pieces: list[str]) -> int:
    """How many messages came by BDAT."""
    return sum(piece.endswith("LAST") for piece in pieces)


def test_a_message_in_pieces_arrives_byte_for_byte(
    protocol: str, folder: Path, receiver: SMTPReceiver, handled: Handled, pieces: list[str]
) -> None:
    exim = Exim(folder, receiver.port, protocol)
    exim.send(mail_named("pieces"), "bob@y.test")
    assert handled.messages, exim.log()
    (message,) = handled.messages
    assert as_sent(message.Data) == mail_named("pieces")
    assert (message.From, message.To) == ("ann@x.test", "bob@y.test")
    assert messages_in(pieces) == 1


@pytest.mark.parametrize("octets", [4_000, 8_192, 300_000, 3_000_000])
def test_a_large_message_comes_in_many_pieces(
    octets: int, protocol: str, folder: Path, receiver: SMTPReceiver, handled: Handled, pieces: list[str]
) -> None:
    large = mail_named("large") + (b"." * 63 + b"\r\n") * (octets // 65)
    exim = Exim(folder, receiver.port, protocol)
    exim.send(large, "bob@y.test")
    assert handled.messages, exim.log()
    (message,) = handled.messages
    assert as_sent(message.Data) == large
    assert messages_in(pieces) == 1


def test_whom_we_refuse_and_put_off_exim_keeps_apart(
    protocol: str, folder: Path, receiver: SMTPReceiver, handled: Handled, pieces: list[str]
) -> None:
    exim = Exim(folder, receiver.port, protocol)
    handled.refusals["eve@y.test"] = SMTPError(451, "Come back tomorrow")
    exim.send(mail_named("apart"), *(["bob@y.test"] if protocol == "lmtp" else []), "eve@y.test", "no-body@y.test")
    assert [message.To for message in handled.messages] == (["bob@y.test"] if protocol == "lmtp" else [])
    handled.refusals.clear()
    handled.messages.clear()
    exim.try_again()
    again = [message.To for message in handled.messages if message.From == "ann@x.test"]
    assert again == ["eve@y.test"]  # who was refused for good is not tried again, nor who has it


def test_exim_verifies_our_certificate_and_logs_in(
    protocol: str, folder: Path, papers: Papers, handled: Handled, serve: Serve, pieces: list[str]
) -> None:
    made = LMTPReceiver if protocol == "lmtp" else SMTPReceiver
    tls, logins = papers.tls(required=True), Logins(papers.logins)
    receiver = made("127.0.0.1", 0, deliver=handled, router=RoutingBase(), tls=tls, logins=logins, login_required=True)
    serve(receiver)
    exim = Exim(folder, receiver.port, protocol, NAME, PASSWORD, SAFE.format(authority=papers.authority))
    exim.send(mail_named("safe"), "bob@y.test")
    assert handled.messages, exim.log()
    (message,) = handled.messages
    assert as_sent(message.Data) == mail_named("safe")
    assert message.envelope.login == NAME
    assert message.envelope.tls
    assert messages_in(pieces) == 1
