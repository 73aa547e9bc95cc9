"""Sessions without a socket: what a client sends comes in pieces as a test cuts them, and time is the test's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from aiosmtpd import smtp

from lamsonq.content import Content, Spilled
from lamsonq.limits import Limits, Traffic
from lamsonq.session import Session


class Transport(asyncio.Transport):
    """What a session writes."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    @property
    def codes(self) -> list[bytes]:
        """Of every reply."""
        return [line[:3] for line in self.written.split(b"\r\n") if line[3:4] == b" "]


class Taker:
    """The handler of aiosmtpd's session and the receiver of ours: both note what was taken, and from whom for whom."""

    hostname, size_limit, draining = "mx.test", 400, False
    certificate: Any = None
    hosts: Any = None
    on_connect: Any = None
    on_mail: Any = None
    on_rcpt: Any = None
    offers_dsn = tls_required = tls_implicit = login_required = has_logins = False
    carries_bare = True

    def __init__(self, limits: Limits | None = None, *, carries_bare: bool = True) -> None:
        self.traffic = Traffic(limits or Limits(bad_commands=0))
        self.carries_bare = carries_bare
        self.taken: list[tuple[str, list[str], bytes]] = []

    async def handle_DATA(self, _server: object, _session: object, envelope: smtp.Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        sender = "" if envelope.mail_from == "<>" else envelope.mail_from or ""
        self.taken.append((sender, list(dict.fromkeys(envelope.rcpt_tos)), envelope.content))  # ours: each once
        return "250 ok"

    def opened(self, session: Session) -> None: ...

    def closed(self, session: Session) -> None: ...

    def is_proxy(self, _address: str) -> bool:
        return False

    def make_room(self) -> None: ...

    async def asks(self, _check: object, _dialogue: object) -> str | None: ...

    async def logs_in(self, _name: str, _password: str) -> bool | None: ...

    def takes(self, _address: str) -> bool:
        return True

    def full(self, _size: int) -> bool:
        return False

    def commit(self, envelope: Any, content: Content, _groups: object, tell: Callable[[str], None]) -> None:
        octets = content.read() if isinstance(content, Spilled) else content
        self.taken.append((envelope.mail_from, list(envelope.rcpt_tos), octets))
        tell("250 ok")

    def trouble(self, error: BaseException) -> str:
        raise AssertionError from error


async def talk(session: smtp.SMTP, pieces: list[bytes], turns: int = 3) -> Transport:
    """Send these pieces, with so many turns of the event loop behind each."""
    transport = Transport()
    session.connection_made(transport)
    for piece in pieces:
        if transport.closed:
            break
        session.data_received(piece)
        for _ in range(turns):
            await asyncio.sleep(0)
    lines = 0 if isinstance(session, Session) else sum(map(len, pieces))  # aiosmtpd has turns between lines
    for _ in range(40 + lines):
        await asyncio.sleep(0)
    if session._handler_coroutine is not None:  # aiosmtpd's read loop
        session._handler_coroutine.cancel()
    assert session._timeout_handle is not None
    session._timeout_handle.cancel()
    return transport


def ours(taker: Taker) -> Session:
    return Session(taker, asyncio.get_running_loop())


def theirs(taker: Taker) -> smtp.SMTP:
    loop = asyncio.get_running_loop()
    return smtp.SMTP(taker, data_size_limit=taker.size_limit, enable_SMTPUTF8=True, hostname="mx.test", loop=loop)


def cut(octets: bytes, places: list[int]) -> list[bytes]:
    """These octets in pieces."""
    edges = [0, *sorted(set(places)), len(octets)]
    return [octets[start:end] for start, end in itertools.pairwise(edges) if start != end]
