"""The read loop of an SMTP session: octets from a client, cut into commands and messages; replies, in their order.

Rules:

1. What a client sends is taken in whole chunks, through one buffer for all sessions of a thread, and worked off in
   order. Commands are plain functions that run at once; what takes its time, they return. While that runs nothing else
   of this session does, and a reply is never overtaken.
2. A command ends with CRLF and holds no control character (RFC 5321 section 2.3.8); anything else is refused and not
   executed. A message ends with CRLF.CRLF and with nothing else (section 4.1.1.4).
3. Memory is bounded: a command by COMMAND_MAX, what is sent ahead by AHEAD_MAX, a message by SPILL_AFTER; what is
   larger `spills`. A client that does not read its replies is not read from.
4. Time is bounded: a command has to arrive whole within `command_timeout`; a message may pause for `data_timeout`, and
   has to keep up RATE_MIN besides. While we work there is no clock for the client. A connection that is closed is
   gone after CLOSE_TIMEOUT, also when the client reads nothing.
5. What is sent ahead of a TLS handshake is dropped unread (RFC 3207 section 6).

Of aiosmtpd stay the session, the envelope and AUTH's mechanisms; neither its read loop nor its commands run, and it
calls no hooks. Its private names that are touched: `_reader` (and its `_buffer`), `_tls_protocol`,
`_original_transport`, `_reset_timeout`, `_timeout_handle`, `_timeout_cb`, `_set_rset_state`; and asyncio's
`_drain_helper`, which it derives from. A test holds all this to what aiosmtpd does.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import lru_cache
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, ClassVar

from aiosmtpd import smtp

COMMAND_MAX = 2048
"""Octets of a command line: 512 of RFC 5321 section 4.5.3.1.4, and what its extensions add (RFC 3461 section 5)."""

AUTH_LINE_MAX = 12_288
"""Octets of a line in an AUTH exchange (RFC 4954 section 4)."""

AHEAD_MAX = 1 << 18
"""Octets that are read ahead while something else is worked on."""

TURN_MAX = 100
"""Commands of one client that are worked off before the others get their turn."""

RATE_MIN = 500
"""Octets per second that a message has to come with, all in all: Postfix's smtpd_min_data_rate."""

REPLY_MAX = 480
"""Octets of a reply's text; RFC 5321 section 4.5.3.1.5 allows 512 with the code and the CRLF."""

HANDSHAKE_TIMEOUT = 30.0
"""Seconds for a TLS handshake."""

CLOSE_TIMEOUT = 10.0
"""Seconds in which a client has to read the last of its replies: then the connection is cut."""

MAIL_LOG = logging.getLogger("mail.log")
"""aiosmtpd's logger: every line of every dialogue, at INFO."""

SPILL_AFTER = 1 << 20
"""Octets of one message that wait in memory for the rest of it."""

CHUNK = 1 << 18
"""Octets that are taken from a socket at once, at most."""

_END = b"\r\n.\r\n"
_COMMAND = re.compile(rb"([^\x00-\x1f\x7f]*+)\r\n")
_UNPRINTABLE = re.compile(r"[^ -~]")

Work = Coroutine[Any, Any, None]
"""What takes its time."""

Command = Callable[[Any, str | None], Work | None]
"""A command runs at once. What takes its time, it returns as a coroutine."""


class _Inbox(threading.local):
    """Where a thread's sessions are given what has come; each takes it out before another is given something.

    asyncio would make a new object of CHUNK octets for every read, and the kernel map and unmap it. Of this one only
    those pages are in memory that have been written to, which is none in a thread that has no sessions.
    """

    def __init__(self) -> None:
        self.view = memoryview(mmap(-1, CHUNK, flags=MAP_PRIVATE | MAP_ANONYMOUS))


_inbox = _Inbox()


class _NoHandler:
    """aiosmtpd's handler: it has no hooks, and none are looked for."""

    def __dir__(self) -> Iterable[str]:
        return ()


_NO_HANDLER = _NoHandler()


class Wire(smtp.SMTP, asyncio.BufferedProtocol):
    """aiosmtpd's SMTP, with another way from the socket to its commands."""

    commands: ClassVar[Mapping[str, Command]] = {}
    """By their verb."""

    spill_after = SPILL_AFTER
    command_timeout = 300.0
    data_timeout = 180.0
    _ready = False

    def __init__(self, **options: Any) -> None:
        super().__init__(_NO_HANDLER, **options)
        self._ready = True
        self._held = bytearray()
        """What has come and is not worked off. While a message comes, it begins with the two octets before what is
        kept here of it, which tell whether a dot begins a line."""
        self._seen = 0
        """Up to where `_held` has been searched in vain."""
        self._take: Callable[[], bool] = self._take_command
        self._waiting = False
        """Whether something takes its time: nothing more is worked off until it has ended."""
        self._work: asyncio.Task[None] | None = None
        self._feeding = False
        """Whether the command that runs reads by itself, from `_reader`."""
        self._shaking = False
        """Whether a TLS handshake is under way: nothing may be written then."""
        self._skipping = False
        self._ended = False
        self._blocked = False
        self._stopped_reading = False
        self._replies: list[bytes] = []
        self._deadline = float("inf")
        self._heard = self.loop.time()
        """When the client has said something last, or we to it."""
        self._finish: Callable[[bytes | None], None]
        self._limit = 0
        self._too_much = False
        self._began = 0.0
        self._received = 0

    def __dir__(self) -> Iterable[str]:
        """While aiosmtpd looks for commands, which it does at every connection, there are no names: `commands` has
        ours, and to look through all names would cost more than a message."""
        return super().__dir__() if self._ready else ()

    # -- the connection ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Not aiosmtpd's, which begins its read loop, in a task."""
        self.transport = transport
        self._set_rset_state()
        self.session = self._create_session()
        self.session.peer = transport.get_extra_info("peername")
        MAIL_LOG.info("Peer: %r", self.session.peer)
        self._reset_timeout()
        work = self.welcome()
        if work is not None:
            self._begin(work)
        self._flush()

    def welcome(self) -> Work | None:
        """A client has connected."""
        self.say(f"220 {self.hostname} {self.__ident__}")
        return None

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        return _inbox.view

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(_inbox.view[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        if self._feeding:
            self._reader.feed_data(data)
            if len(vars(self._reader)["_buffer"]) > AHEAD_MAX:
                self._stop_reading()
            return
        self._held += data
        if not self._waiting:
            self._advance()
        elif len(self._held) > AHEAD_MAX:
            self._stop_reading()

    def eof_received(self) -> bool | None:
        """The client sends no more: what it has sent is still answered."""
        self._ended = True
        if self._feeding:
            self._reader.feed_eof()
        elif not self._waiting:
            self._advance()
        # A TLS session ends in both directions at once, and its end may come in one piece with that of the handshake,
        # before we know that there is one: to keep it open then would be a warning of asyncio, for each such client.
        return not (self._is_encrypted or self._shaking)

    def connection_lost(self, error: Exception | None) -> None:
        if self.transport is None:
            return
        if self._work is not None:
            self._work.cancel()
        self._held.clear()
        MAIL_LOG.info("%r connection lost", self._peer)
        if self._timeout_handle is not None:
            self._timeout_handle.cancel()
        if self._original_transport is not None:
            self._original_transport.close()
        super(smtp.SMTP, self).connection_lost(error)
        self.transport = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self._blocked = False
        if not self._waiting:
            self._advance()

    def _stop_reading(self) -> None:
        if not self._stopped_reading and isinstance(self.transport, asyncio.Transport):
            self._stopped_reading = True
            self.transport.pause_reading()

    def _go_on_reading(self) -> None:
        if self._stopped_reading and isinstance(self.transport, asyncio.Transport):
            self._stopped_reading = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    @property
    def _is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    @property
    def _is_encrypted(self) -> bool:
        return self._tls_protocol is not None

    # -- working off what has come -----------------------------------------------------------------------------

    def _advance(self) -> None:
        """Work off what has come, until something takes its time or more has to come."""
        turns = TURN_MAX
        while self._held and not self._waiting and not self._blocked and self._is_open:
            try:
                if not self._take():
                    break
            except Exception as error:
                self._failed(error)
            turns -= 1
            if not turns:
                self.loop.call_soon(self._go_on)
                break
        self._flush()
        if self._waiting:
            return
        if self._ended and turns and not self._blocked and self._is_open:
            self._close()  # what has not come whole never will
        elif len(self._held) > AHEAD_MAX and (self._blocked or self._take == self._take_command):
            self._stop_reading()
        elif self._stopped_reading:
            self._go_on_reading()

    def _go_on(self) -> None:
        if not self._waiting:
            self._advance()

    def wait(self) -> None:
        """Something takes its time: nothing more is worked off until `resume`."""
        self._flush()
        self._hold_clock()
        self._waiting = True

    def resume(self) -> None:
        """It has ended."""
        self._waiting = False
        if self._is_open:
            self._reset_timeout()
            self._advance()

    def _begin(self, work: Work, *, feeding: bool = False) -> None:
        """Run what takes its time; nothing else of this session runs until it has ended.

        With `feeding` it reads by itself what the client sends.
        """
        if feeding:
            self._feeding = True
            self._reader = asyncio.StreamReader(AUTH_LINE_MAX, self.loop)
            self._reader.feed_data(bytes(self._held))
            self._held.clear()
            if self._ended:
                self._reader.feed_eof()
            self._waiting = True
        else:
            self.wait()
        self._work = self.loop.create_task(work)
        self._work.add_done_callback(self._ended_work)

    def _ended_work(self, work: asyncio.Task[None]) -> None:
        self._work = None
        self._stop_feeding()
        if self.transport is None:
            return
        if work.cancelled():
            self._close()
        elif (error := work.exception()) is not None:
            self._failed(error)
        self.resume()

    def _stop_feeding(self) -> None:
        """The command that runs reads no more: what it has left is the next one's."""
        if self._feeding:
            self._feeding = False
            self._hold_clock()
            buffer: bytearray = vars(self._reader)["_buffer"]
            self._held[:0] = buffer
            buffer.clear()

    def _failed(self, error: BaseException) -> None:
        """A command has raised this. Whatever it is, the session goes on unless nobody is there any more."""
        if isinstance(error, asyncio.IncompleteReadError | ConnectionError):
            self._close()
        else:
            self.say(self.failure(error))

    def failure(self, error: BaseException) -> str:
        """The reply to a command that failed, which tells the client nothing of the error."""
        MAIL_LOG.error("%r SMTP session exception", self._peer, exc_info=error)
        return "451 4.3.0 Internal error, please try again later"

    def _close(self) -> None:
        if self._is_open:
            self._flush()
            assert isinstance(self.transport, asyncio.Transport)
            if self._is_encrypted or self.transport.get_write_buffer_size():
                self._reset_timeout(CLOSE_TIMEOUT)  # else nobody has to be waited for
            self.transport.close()

    @property
    def _peer(self) -> object:
        return None if self.session is None else self.session.peer

    # -- commands ----------------------------------------------------------------------------------------------

    def _take_command(self) -> bool:
        """Work off one command line, if there is one."""
        held = self._held
        end = held.find(b"\n", self._seen) + 1
        if not end:
            self._seen = len(held)
            if self._seen > COMMAND_MAX:  # its end is waited for, not kept
                self._skipping = True
                held.clear()
                self._seen = 0
            return False
        too_long = self._skipping or end > COMMAND_MAX
        line = None if too_long else _COMMAND.fullmatch(held, 0, end)
        command = line[1] if line else b""
        del held[:end]
        self._seen = 0
        self._reset_timeout()
        if line:
            self._obey(command)
        elif too_long:
            self._skipping = False
            self._misspoken("500 5.5.6 Command line too long")
        else:
            self._misspoken("500 5.5.2 A command is one line that ends with <CR><LF>")
        return True

    def _obey(self, line: bytes) -> None:
        if MAIL_LOG.isEnabledFor(logging.INFO):
            smtp.sanitized_log(MAIL_LOG.info, "%r >> %r", self._peer, line)
        verb, _, rest = line.partition(b" ")
        rest = rest.strip()
        argument = rest.decode("utf-8", "surrogateescape") if rest else None
        command = verb.decode("ascii", "replace").upper()
        act = self.commands.get(command)
        if act is None:
            self._unknown(command)
        elif not self._forbids(command) and (work := act(self, argument)) is not None:
            self._begin(work)

    def _unknown(self, command: str) -> None:  # noqa: ARG002 - for who derives from this
        """There is no such command."""
        self._misspoken("500 5.5.1 Command not recognized")

    def _forbids(self, command: str) -> bool:  # noqa: ARG002 - as above
        """Refuse a command before anything else; False when it may go on."""
        return False

    def _misspoken(self, reply: str) -> None:
        """The client has sent what is no command."""
        self.say(reply)

    # -- messages ----------------------------------------------------------------------------------------------

    def read_message(self, limit: int, finish: Callable[[bytes | None], None]) -> None:
        """What comes now is a message, up to CRLF.CRLF. `finish` gets what did not spill of it, without dot-stuffing
        (RFC 5321 section 4.5.2); or None when it is larger than `limit` octets, for which the doubled dots do not count
        (RFC 1870 section 5), or when `keeps` or `spills` did not let it in.

        One search over large chunks: aiosmtpd's own loop keeps an object for every line, so that a flood of empty lines
        costs gigabytes.
        """
        self._finish, self._limit, self._too_much = finish, limit, False
        self._held[:0] = b"\r\n"
        self._seen = 0
        self._start_clock()
        self._take = self._take_message

    def _take_message(self) -> bool:
        held = self._held
        end = held.find(_END, self._seen)
        # A line with a doubled dot has three octets besides it at least: this is the most that a message may come with.
        self._try_to_keep(end if end >= 0 else max(0, len(held) - 4), self._limit + self._limit // 3)
        if end < 0:
            if self._too_much:
                self._received += max(0, len(held) - 4)
                del held[:-4]
            elif len(held) > self.spill_after:
                piece = _without_stuffing(held, len(held) - 4)  # behind that, its end may have begun
                self._limit -= len(piece)
                self._spill(piece, len(held) - 4 - 2)
            self._seen = max(0, len(held) - 4)
            self._keep_clock(self._received + len(held))
            return False
        content = None if self._too_much else _without_stuffing(held, end + 2)
        del held[: end + len(_END)]
        self._deliver(None if content is None or len(content) > self._limit else content)
        return True

    def read_octets(self, count: int, finish: Callable[[bytes | None], None], *, keep: bool = True) -> None:
        """What comes now are `count` octets, as they are (RFC 3030 section 2). `finish` gets those that did not spill,
        or None without `keep` and when `keeps` or `spills` did not let them in: then they were dropped as they came."""
        self._finish, self._limit, self._too_much = finish, count, not keep
        self._seen = 0
        self._start_clock()
        self._take = self._take_octets
        if not count:  # nothing has to come
            self._take_octets()

    def _take_octets(self) -> bool:
        held = self._held
        missing = self._limit - self._received
        self._try_to_keep(min(len(held), missing), self._limit)
        if len(held) < missing:
            if self._too_much:
                self._received += len(held)
                held.clear()
            elif len(held) > self.spill_after:
                self._spill(bytes(held), len(held))
            self._keep_clock(self._received + len(held))
            return False
        content = None if self._too_much else bytes(held[:missing])
        del held[:missing]
        self._deliver(content)
        return True

    def _try_to_keep(self, octets: int, most: int) -> None:
        """So much of a message is here: drop what has come of it, and what will, if that is too much."""
        if not self._too_much and (octets > most or not self.keeps(octets)):
            self._too_much = True
            self.drops()

    def _spill(self, piece: bytes, octets: int) -> None:
        """Give away what comes next of a message; so many octets of what is held are done with then."""
        self._received += octets
        del self._held[:octets]
        if self.spills(piece):
            self.keeps(len(self._held))
        else:
            self._too_much = True
            self.drops()

    def spills(self, piece: bytes) -> bool:  # noqa: ARG002 - for who derives from this
        """Take a piece of the message that comes, behind those before it, out of memory; False when that cannot be."""
        return False

    def keeps(self, octets: int) -> bool:  # noqa: ARG002 - for who derives from this
        """Whether so many octets of the message that comes may be kept in memory."""
        return True

    def drops(self) -> None:
        """Nothing of the message that comes is kept any more."""

    def _deliver(self, content: bytes | None) -> None:
        self._seen = 0
        self._take = self._take_command
        self._reset_timeout()
        self._finish(content)

    # -- replies -----------------------------------------------------------------------------------------------

    def say(self, reply: str) -> None:
        """Reply with this line, as soon as what has come is worked off."""
        self.write(reply_line(reply))

    def write(self, reply: bytes) -> None:
        """Reply with these lines as they are."""
        self._replies.append(reply)
        if self._waiting:
            self._flush()

    async def push(self, status: str | bytes) -> None:
        """aiosmtpd's way to reply; waits while the client does not read."""
        self.say(status if isinstance(status, str) else status.decode("ascii", "replace"))
        if self._blocked and self.transport is not None:
            self._reset_timeout()
            await self._drain_helper()  # type: ignore[attr-defined]  # asyncio's, for its StreamWriter

    def _flush(self) -> None:
        if self._replies and isinstance(self.transport, asyncio.Transport):
            if MAIL_LOG.isEnabledFor(logging.DEBUG):
                MAIL_LOG.debug("%r << %r", self._peer, b"".join(self._replies))
            self.transport.write(b"".join(self._replies))
        self._replies.clear()

    # -- TLS ---------------------------------------------------------------------------------------------------

    async def encrypt(self, context: ssl.SSLContext, ahead: bytes = b"") -> None:
        """The handshake. `ahead` is what has come of it already. Raises OSError when there is none in time."""
        plain = self.transport
        assert isinstance(plain, asyncio.Transport)
        plain.pause_reading()  # at once: nothing of the handshake may come here; it goes on reading by itself
        self._held.clear()
        self._shaking = True
        try:
            encrypted = await self._shake_hands(plain, context, ahead)
        except OSError:
            plain.abort()
            self.loop.call_soon(self.connection_lost, None)  # asyncio does not tell it of every end of a handshake
            raise
        finally:
            self._shaking = False
        self._original_transport = plain
        self._tls_protocol = encrypted.get_extra_info("ssl_object")
        self.transport = encrypted
        self._set_rset_state()
        before = self.session
        self.session = self._create_session()  # RFC 3207 section 4.2: what was said before does not count
        self.session.peer = None if before is None else before.peer
        self.session.ssl = {"ssl_object": self._tls_protocol}

    async def _shake_hands(self, plain: asyncio.Transport, context: ssl.SSLContext, ahead: bytes) -> asyncio.Transport:
        handshake = self.loop.start_tls(plain, self, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_TIMEOUT)
        begun = self.loop.create_task(handshake)
        if ahead:
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # now the TLS protocol knows its transport
            _feed(plain.get_protocol(), ahead)
        encrypted = await begun
        if encrypted is None:
            raise ConnectionResetError("the client has gone")
        return encrypted

    def _set_rset_state(self) -> None:
        self.envelope = self._create_envelope()

    # -- time --------------------------------------------------------------------------------------------------

    def _reset_timeout(self, duration: float | None = None) -> None:
        """The client has as long as this for its next command. One timer looks, however often that is said."""
        self._heard = self.loop.time()
        self._deadline = self._heard + (duration or self.command_timeout)
        if self._timeout_handle is None or self._timeout_handle.when() > self._deadline:
            self._look_again()

    def _timeout_cb(self) -> None:
        self._close()

    def _hold_clock(self) -> None:
        self._deadline = float("inf")

    def _start_clock(self) -> None:
        self._began, self._received = self.loop.time(), 0
        self._reset_timeout(self.data_timeout)

    def _keep_clock(self, received: int) -> None:
        """More of a message has come: rule 4."""
        latest = self._began + self.data_timeout + received / RATE_MIN
        self._deadline = min(self.loop.time() + self.data_timeout, latest)

    def _look_again(self) -> None:
        if self._timeout_handle is not None:
            self._timeout_handle.cancel()
        wait = min(self._deadline, self.loop.time() + min(self.command_timeout, self.data_timeout))
        self._timeout_handle = self.loop.call_at(wait, self._look)

    def _look(self) -> None:
        self._timeout_handle = None
        if self.transport is None:
            return
        if self.loop.time() >= self._deadline:
            self._hold_clock()
            if self._is_open:
                self._timeout_cb()
            elif isinstance(self.transport, asyncio.Transport):
                self.transport.abort()
        if self.transport is not None:
            self._look_again()


def _without_stuffing(held: bytearray, end: int) -> bytes:
    """What is held up to `end`, without the two octets before it and without the dots that the client has doubled (RFC
    5321 section 4.5.2), copied as seldom as possible."""
    stuffed = held.find(b"\r\n.", 0, end) >= 0
    with memoryview(held) as view:
        return bytes(view[:end]).replace(b"\r\n.", b"\r\n")[2:] if stuffed else bytes(view[2:end])


@lru_cache(256)
def reply_line(reply: str) -> bytes:
    """One line of a reply: printable ASCII, and short enough for every client."""
    if len(reply) > REPLY_MAX or not reply.isprintable() or not reply.isascii() or "  " in reply:
        reply = _UNPRINTABLE.sub("?", " ".join(reply.split()))[: REPLY_MAX + 4]
    return reply.encode("ascii") + b"\r\n"


def _feed(protocol: object, octets: bytes) -> None:
    """Give a protocol what has come for it already."""
    assert isinstance(protocol, asyncio.BufferedProtocol)
    view = memoryview(octets)
    while view:
        buffer = memoryview(protocol.get_buffer(len(view)))
        taken = min(len(buffer), len(view))
        buffer[:taken] = view[:taken]
        protocol.buffer_updated(taken)
        view = view[taken:]
