"""A client's octets, cut anywhere, go into a session on a transport that is none: what must hold whatever they are.

The first octet of an input is a set of flags, the second says where the rest is cut; the rest is what the client sends.

1. Nothing raises, and nothing waits for ever: when the client has sent everything, it has been answered.
2. What is kept in memory is bounded, and none of it is left on the account when the client has gone.
3. Replies are lines of printable ASCII, of 512 octets at most (RFC 5321 section 4.5.3.1.5).
4. There are at most as many messages as there are ends of one: CRLF.CRLF (section 4.1.1.4) and BDAT LAST (RFC 3030).
5. How the octets are cut changes nothing, nor whether a message spills: the same replies, the same messages.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from lamsonq import session as sessions
from lamsonq.content import Content, Spilled
from lamsonq.envelope import Envelope
from lamsonq.errors import SMTPError
from lamsonq.limits import Limits, Traffic
from lamsonq.lmtp import LMTPSession
from lamsonq.session import Check, Dialogue, Session
from lamsonq.wire import AHEAD_MAX, COMMAND_MAX

LMTP, STRICT, WAITS, LOGINS, CLOSES, CHECKED, PROXIED, LIMITED = (1 << bit for bit in range(8))
"""The flags. CLOSES: the client closes its sending side at the end. LIMITED: three bad commands, two recipients."""

SIZE_LIMIT = 600
PIECE_MAX = 1 << 16
"""Octets that a transport gives at once: asyncio's reads are that long."""

_END = re.compile(rb"(?=\r\n\.\r\n)")
_LAST = re.compile(rb"(?i)\bbdat +\d+ +last\b")
_REPLY = re.compile(rb"[2-5]\d\d(-|$| )[ -~]*\Z")
_TURNS = 2000
"""Turns of the loop after which a session that still works hangs."""


class Transport(asyncio.Transport):
    """What a session writes."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = bytearray()
        self.closed = False
        self.reads = True

    def write(self, data: Any) -> None:
        if not self.closed:  # asyncio's drops it then, too
            self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def get_write_buffer_size(self) -> int:
        return 0


def _answer(future: asyncio.Future[Any], answer: Any) -> None:
    if not future.done():
        future.set_result(answer)


class Taker:
    """A receiver that notes what it was given."""

    hostname = "mx.test"
    size_limit = SIZE_LIMIT
    draining = login_required = offers_dsn = tls_required = tls_implicit = False
    certificate = None
    on_connect: Check | None = None

    def __init__(self, flags: int, loop: asyncio.AbstractEventLoop) -> None:
        self._flags = flags
        self._loop = loop
        limits = Limits(bad_commands=3, recipients=2, memory=2 * SIZE_LIMIT) if flags & LIMITED else Limits()
        self.traffic = Traffic(limits)
        self.carries_bare = not flags & STRICT
        self.has_logins = bool(flags & LOGINS)
        self.hosts = frozenset(("y.test",)) if flags & LIMITED else None
        self.on_mail: Check | None = self._checks if flags & CHECKED else None
        self.on_rcpt: Check | None = self.on_mail
        self.taken: list[tuple[bytes, str | None, tuple[str, ...]]] = []
        self.errors: list[BaseException] = []

    def opened(self, session: Session) -> None: ...

    def closed(self, session: Session) -> None: ...

    def make_room(self) -> None: ...

    def is_proxy(self, _address: str) -> bool:
        return bool(self._flags & PROXIED)

    def full(self, _size: int) -> bool:
        return False

    def takes(self, address: str) -> bool | asyncio.Future[bool]:
        answer = not address.startswith("no")
        return self._later(answer) if self._flags & WAITS else answer

    def _checks(self, dialogue: Dialogue) -> None:
        if "evil" in (dialogue.sender or "") + dialogue.recipient:
            raise SMTPError(554, "Checked\r\n250 and\0 refused")

    async def asks(self, check: Check, dialogue: Dialogue) -> str | None:
        await asyncio.sleep(0)
        try:
            check(dialogue)
        except SMTPError as refusal:
            return f"{refusal.code} {refusal.message}"
        return None

    async def logs_in(self, _name: str, password: str) -> bool | None:
        await asyncio.sleep(0)
        return {"right": True, "wrong": False}.get(password)

    def commit(
        self, envelope: Envelope, content: Content, groups: Sequence[tuple[str, ...]], tell: Callable[[str], None]
    ) -> None:
        content = content.read() if isinstance(content, Spilled) else content
        assert len(content) <= SIZE_LIMIT, len(content)
        assert envelope.rcpt_tos
        assert all(groups)
        self.taken.append((content, envelope.mail_from, envelope.rcpt_tos))
        for _ in groups:
            if self._flags & WAITS:
                self._loop.call_soon(tell, "250 Ok")
            else:
                tell("250 Ok")

    def trouble(self, error: BaseException) -> str:
        self.errors.append(error)
        return "451 4.3.0 Trouble"

    def _later(self, answer: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._flags & WAITS:
            self._loop.call_soon(_answer, future, answer)
        else:
            future.set_result(answer)
        return future


class _TLS(ssl.SSLObject):
    """Stands for a handshake that is done: who wants to log in needs one."""

    def __new__(cls) -> _TLS:
        return object.__new__(cls)

    def __init__(self) -> None: ...

    def version(self) -> str:
        return "TLSv1.3"


class Run:
    """One client's whole visit."""

    def __init__(self, flags: int, loop: asyncio.AbstractEventLoop) -> None:
        self.taker = Taker(flags, loop)
        self.transport = Transport()
        self.flags = flags
        self.session = (LMTPSession if flags & LMTP else Session)(self.taker, loop)

    async def visit(self, pieces: Sequence[bytes]) -> None:
        session, transport = self.session, self.transport
        if self.flags & LOGINS:
            session._tls_protocol = _TLS()  # type: ignore[assignment]
        session.connection_made(transport)
        await self._settle()
        for piece in pieces:
            if transport.closed:
                break
            assert transport.reads, "a client is not read from, and nothing of it is worked on"
            session.data_received(piece)
            self._look_at_memory()
            await self._settle()
        if self.flags & CLOSES and not transport.closed:
            if not session.eof_received():
                transport.close()
            await self._settle()
            assert transport.closed, "the client has sent its last, and is kept"
        session.connection_lost(None)
        await asyncio.sleep(0)
        if session._timeout_handle is not None:
            session._timeout_handle.cancel()
        self._look_at_the_end()

    async def _settle(self) -> None:
        """Until nothing is left to do before the client says more."""
        ready = vars(asyncio.get_running_loop())["_ready"]
        for _ in range(_TURNS):
            await asyncio.sleep(0)
            if not ready:
                return
        raise AssertionError(f"the session goes on for ever: {self.session._work}")

    def _look_at_memory(self) -> None:
        session = self.session
        read = len(getattr(session._reader, "_buffer", b"")) if session._feeding else 0
        held = len(session._held) + read + len(session._chunks or b"")
        most = AHEAD_MAX + PIECE_MAX + COMMAND_MAX + 2 * SIZE_LIMIT
        assert held <= most, f"{held} octets are held"

    def _look_at_the_end(self) -> None:
        assert not self.taker.errors, repr(self.taker.errors[0])
        traffic = self.taker.traffic
        assert (traffic.memory, traffic.open) == (0, 0), "what is left on the account"
        assert not self.transport.written or self.transport.written.endswith(b"\r\n")
        for line in self.replies():
            assert len(line) <= 510, line
            assert _REPLY.match(line), line

    def replies(self) -> list[bytes]:
        return bytes(self.transport.written).split(b"\r\n")[:-1]


def cut(octets: bytes, seed: int) -> list[bytes]:
    """The octets in pieces: 0 leaves them whole, as far as a transport does; 255 gives them one by one."""
    if seed == 255 and len(octets) < 2000:
        return [octets[at : at + 1] for at in range(len(octets))]
    chance = random.Random(seed)
    cuts = sorted(chance.randint(0, len(octets)) for _ in range(seed % 16))
    cuts = sorted({*cuts, *range(PIECE_MAX, len(octets), PIECE_MAX)})
    pieces = [octets[a:b] for a, b in zip([0, *cuts], [*cuts, len(octets)], strict=True)]
    return [piece for piece in pieces if piece]


_loop: asyncio.AbstractEventLoop | None = None


def check(data: bytes) -> None:
    """Raises AssertionError, or whatever else a session raises, when something of the above does not hold."""
    global _loop
    if len(data) < 3:
        return
    if _loop is None:
        sessions.LOGIN_DELAY = 0.0
        _loop = asyncio.new_event_loop()
    flags, seed, octets = data[0], data[1], data[2:]
    strays: list[dict[str, Any]] = []
    _loop.set_exception_handler(lambda _, context: strays.append(context))
    runs = [Run(flags, _loop), Run(flags, _loop)]
    runs[0].session.spill_after = SIZE_LIMIT // 10
    for run, pieces in zip(runs, (cut(octets, seed), cut(octets, 0)), strict=True):
        _loop.run_until_complete(run.visit(pieces))
        ends = len(_END.findall(octets)) + len(_LAST.findall(octets))
        assert len(run.taker.taken) <= ends, f"{len(run.taker.taken)} messages of {ends}"
    assert not strays, strays
    assert runs[0].replies() == runs[1].replies(), (runs[0].replies(), runs[1].replies())
    assert runs[0].taker.taken == runs[1].taker.taken
