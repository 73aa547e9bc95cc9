"""One SMTP session: what a client may say, and what it is answered.

Rules:

1. Nothing of what a client sends is trusted: addresses pass our own strict grammar before anything else sees them,
   a message is kept in memory only up to the size limit, and no reply repeats a control character.
2. A transaction's replies come from here, until its last dot; then the receiver's `commit` takes the message and
   answers for it. Its answers are awaited, never cancelled: a client that goes away loses a reply, not its mail.
3. Which recipients each of these answers is for, `groups` says: over SMTP there is one, for all of them.
4. A client that closes its sending side early is still answered for everything that it has sent.

Of aiosmtpd this uses the connection, the command loop and the state of a transaction; EHLO, MAIL, RCPT and DATA are
our own. The private names that are touched: `_reader` (and its `_buffer`), `_writer`, `_timeout_handle`,
`_reset_timeout` and `_timeout_cb`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from aiosmtpd import smtp

from lamsonq import mail
from lamsonq.address import canonical

LOG = logging.getLogger()
"""The root logger, where the other lines about a message go."""

IDLE_TIMEOUT = 300.0
"""Seconds without a sign of the client that end a session (RFC 5321 section 4.5.3.2.7 asks for 5 minutes)."""

RECIPIENTS_MAX = 1000
"""Recipients of one message; RFC 5321 section 4.5.3.1.8 asks for at least 100."""

REPLY_MAX = 480
"""Octets of a reply's text; RFC 5321 section 4.5.3.1.5 allows 512 with the code and the CRLF."""

_CHUNK = 1 << 18
_END = b"\r\n.\r\n"
_UNPRINTABLE = re.compile(r"[^ -~]")


class Server(Protocol):
    """What a session needs of its receiver."""

    hostname: str
    size_limit: int
    draining: bool

    def opened(self, session: Session) -> None:
        """A client has connected."""

    def closed(self, session: Session) -> None:
        """It has gone."""

    async def takes(self, address: str) -> bool:
        """Whether mail to this address would reach anybody."""

    def full(self, size: int) -> bool:
        """Whether there is no room for a message of so many octets; 0 where that is not known."""

    def commit(
        self, envelope: mail.Envelope, content: bytes, groups: Sequence[tuple[str, ...]]
    ) -> Sequence[asyncio.Future[str]]:
        """Begin to keep or handle a message; the replies, one for each group of its recipients, in this order."""

    def trouble(self, error: BaseException) -> str:
        """Log an error that the client must not see; the reply."""


class Session(smtp.SMTP):
    """An aiosmtpd session with strict paths, bounded memory and commits that nothing interrupts."""

    protocol = "ESMTP"
    """What the greeting says that is spoken here."""

    extensions: tuple[str, ...] = ("8BITMIME", "SMTPUTF8", "PIPELINING")
    """What is offered besides SIZE."""

    parting = False
    """Whether the server ends and has taken this client's last message; now he may say QUIT, but not MAIL."""

    owed = 0
    """How many replies the client waits for, to a message that it has sent whole."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            None,
            data_size_limit=server.size_limit,
            enable_SMTPUTF8=True,
            hostname=server.hostname,
            ident=f"{self.protocol} lamsonq",
            timeout=IDLE_TIMEOUT,
            loop=loop,
        )
        self.server = server

    # -- the connection ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        # The client of a unix socket has no name, or one that it chose.
        self.peer = peer if isinstance(peer, tuple) else transport.get_extra_info("sockname")
        self.server.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.server.closed(self)
        super().connection_lost(error)

    def eof_received(self) -> bool | None:
        # aiosmtpd would cancel whatever is under way; here the session ends when it wants to read more.
        return asyncio.StreamReaderProtocol.eof_received(self)

    def _timeout_cb(self) -> None:
        if isinstance(self.transport, asyncio.Transport) and self.transport.get_write_buffer_size():
            self.transport.abort()  # it does not read what it was told before
        else:
            self.dismiss("421 4.4.2 Timeout, closing connection")

    def _reset_timeout(self, duration: float | None = None) -> None:
        self._heard = time.monotonic()
        super()._reset_timeout(duration)

    @property
    def idle_for(self) -> float:
        """Seconds since the client's last sign of life; 0.0 while a transaction is under way."""
        under_way = self.envelope is not None and self.envelope.mail_from is not None
        return 0.0 if under_way else time.monotonic() - self._heard

    def dismiss(self, reply: str) -> None:
        """Say why, in place of every reply that is owed, and close, if it is still open; from the event loop."""
        if isinstance(self.transport, asyncio.Transport) and not self.transport.is_closing():
            self.transport.write(_line(reply) * max(1, self.owed))
            self.transport.close()

    async def push(self, status: str | bytes | None) -> None:
        """Send one line of a reply; None where there is nobody any more to answer (see `handle_exception`)."""
        if status is not None:
            await self._write(status if isinstance(status, str) else status.decode("ascii", "replace"))

    async def _write(self, *lines: str) -> None:
        self._writer.write(b"".join(map(_line, lines)))
        await self._writer.drain()

    async def handle_exception(self, error: Exception) -> str:
        """The reply to a command that failed, in place of aiosmtpd's, which tells the client the exception."""
        if isinstance(error, asyncio.IncompleteReadError | ConnectionError):
            self._writer.close()  # the client has finished; what was written before still reaches it
            raise asyncio.CancelledError
        reply = self.server.trouble(error)
        if self.owed:
            self._writer.write(_line(reply) * (self.owed - 1))  # the last one goes the usual way
            self.owed = 0
            self.envelope = smtp.Envelope()
        return reply

    # -- commands ----------------------------------------------------------------------------------------------

    async def smtp_EHLO(self, hostname: str | None) -> None:
        await self._greet("EHLO", hostname)

    async def _greet(self, verb: str, hostname: str | None) -> None:
        if not hostname:
            await self.push(f"501 5.5.4 Syntax: {verb} hostname")
            return
        self.envelope = smtp.Envelope()
        assert self.session is not None
        self.session.extended_smtp = True
        self.session.host_name = hostname
        *offers, last = (self.hostname, f"SIZE {self.server.size_limit}", *self.extensions)
        await self._write(*(f"250-{offer}" for offer in offers), f"250 {last}")

    async def smtp_HELP(self, arg: str | None) -> None:  # noqa: ARG002 - aiosmtpd gives every command its argument
        await self.push("214 2.0.0 See RFC 5321")

    async def smtp_VRFY(self, arg: str | None) -> None:  # noqa: ARG002
        # RFC 5321 section 3.5.3: this reply says nothing about who exists.
        await self.push("252 2.5.0 Cannot VRFY user, but will accept message and attempt delivery")

    async def smtp_MAIL(self, arg: str | None) -> None:
        if self.parting:
            self.dismiss("421 4.3.2 Service shutting down")
        elif not await self.check_helo_needed():
            await self.push(self._mail(arg or ""))

    def _mail(self, arg: str) -> str:
        assert self.envelope is not None
        if self.envelope.mail_from is not None:
            return "503 5.5.1 Nested MAIL command"
        if arg[:5].upper() != "FROM:":
            return "501 5.5.4 Syntax: MAIL FROM:<address>"
        try:
            address, rest = mail.parse_path(arg[5:], null=True)
        except ValueError as reason:
            return f"553 5.1.7 Bad sender address: {reason}"
        options = rest.split()
        parameters = _parameters(options)
        if refusal := self._objection(parameters):
            return refusal
        if self.server.full(_declared_size(parameters)):
            # RFC 1870 section 6.1: too little room at the moment for a message of the declared size.
            return "452 4.3.1 Insufficient system storage, try again later"
        self.envelope.mail_from = address or "<>"  # aiosmtpd takes "" for no MAIL at all
        self.envelope.mail_options = options
        return "250 2.1.0 Ok"

    def _objection(self, parameters: Mapping[str, str | None]) -> str | None:
        """Why MAIL with these parameters is refused; None when it is not."""
        for name, value in parameters.items():
            if name == "SIZE" and _is_size(value):
                if _declared_size(parameters) > self.server.size_limit:
                    return self._too_large()
            elif name == "BODY":
                if (value or "").upper() not in ("7BIT", "8BITMIME"):
                    return "501 5.5.4 BODY is 7BIT or 8BITMIME"
            elif name != "SMTPUTF8" or value is not None:
                return "555 5.5.4 MAIL FROM parameter not recognized or not implemented"
        return None

    def _too_large(self) -> str:
        return f"552 5.3.4 Message size exceeds the limit of {self.server.size_limit} octets"

    async def smtp_RCPT(self, arg: str | None) -> None:
        if await self.check_helo_needed():
            return
        reply = await self._rcpt(arg or "")
        if not reply.startswith(("25", "50")):  # a command out of order is no refusal of a recipient
            assert self.envelope is not None
            sender = "" if self.envelope.mail_from == "<>" else self.envelope.mail_from
            recipient = (arg or "")[3:].strip(" <>")
            LOG.info("Refused recipient from Peer: %r, From: %r, to To %r: %r", self.peer, sender, recipient, reply)
        await self.push(reply)

    async def _rcpt(self, arg: str) -> str:
        assert self.envelope is not None
        if self.envelope.mail_from is None:
            return "503 5.5.1 Need MAIL command"
        if arg[:3].upper() != "TO:":
            return "501 5.5.4 Syntax: RCPT TO:<address>"
        try:
            address, rest = mail.parse_path(arg[3:], postmaster=True)
        except ValueError as reason:
            return f"553 5.1.3 Bad recipient address: {reason}"
        if rest.strip():
            return "555 5.5.4 RCPT TO parameter not recognized or not implemented"
        if len(self.envelope.rcpt_tos) >= RECIPIENTS_MAX:
            return "452 4.5.3 Too many recipients"
        if address.lower() != "postmaster" and not await self.server.takes(address):
            return "550 5.1.1 No such recipient here"
        self.envelope.rcpt_tos.append(address)  # also when it stands there already: RFC 2033 answers for each
        return "250 2.1.5 Ok"

    async def smtp_DATA(self, arg: str | None) -> None:
        assert self.envelope is not None
        if await self.check_helo_needed():
            return
        if not self.envelope.rcpt_tos:
            await self.push("503 5.5.1 Need RCPT command")
            return
        if arg:
            await self.push("501 5.5.4 Syntax: DATA")
            return
        await self.push("354 End data with <CR><LF>.<CR><LF>")
        await self._answer(await self._content())
        self.envelope = smtp.Envelope()
        self.parting = self.server.draining

    async def _content(self) -> bytes | None:
        """Read a message and undo its dot-stuffing (RFC 5321 section 4.5.2); None when it is larger than allowed.

        One search over large chunks: aiosmtpd's own loop keeps an object for every line, so that a flood of empty
        lines costs gigabytes.
        """
        limit = self.server.size_limit
        buffer, position, too_much = bytearray(b"\r\n"), 0, False
        while (end := buffer.find(_END, position)) < 0:
            too_much = too_much or len(buffer) > limit + len(_END)
            if too_much:
                del buffer[:-4]
            position = max(0, len(buffer) - 4)
            chunk = await self._reader.read(_CHUNK)
            if not chunk:
                raise asyncio.IncompleteReadError(b"", None)
            buffer += chunk
            self._reset_timeout()
        # What the client has sent ahead belongs to the next command.
        vars(self._reader)["_buffer"][:0] = buffer[end + len(_END) :]
        if too_much or end > limit:
            return None
        return bytes(buffer[: end + 2]).replace(b"\r\n.", b"\r\n")[2:]

    def groups(self, accepted: Sequence[str]) -> list[tuple[str, ...]]:
        """Which recipients each reply to a message answers for: one for all (RFC 5321 section 3.3).

        `accepted` are the recipients of the RCPTs that were answered 250, in order, as routes see them.
        """
        return [tuple(dict.fromkeys(accepted))]

    async def _answer(self, content: bytes | None) -> None:
        """Have a message taken and send the replies to it, each as soon as it is known."""
        assert self.envelope is not None
        accepted = [canonical(path) for path in self.envelope.rcpt_tos]
        groups = self.groups(accepted)
        self.owed = len(groups)
        if content is None:
            for _ in groups:
                await self._pay(self._too_large())
            return
        sender = "" if self.envelope.mail_from == "<>" else self.envelope.mail_from
        paths: dict[str, str] = {}  # each recipient once, as it was first written
        for recipient, path in zip(accepted, self.envelope.rcpt_tos, strict=True):
            paths.setdefault(recipient, path)
        envelope = mail.Envelope(sender, tuple(paths.values()), self.peer, time.time())
        for reply in self.server.commit(envelope, content, groups):
            await self._pay(await self._known(reply))

    async def _known(self, reply: asyncio.Future[str]) -> str:
        """Wait for a reply of the receiver's."""
        if self._timeout_handle is not None:
            self._timeout_handle.cancel()  # a handler has its own time limit
        try:
            return await reply
        finally:
            if self.transport is not None:
                self._reset_timeout()

    async def _pay(self, reply: str) -> None:
        self.owed -= 1
        await self.push(reply)


def _parameters(options: list[str]) -> dict[str, str | None]:
    """`SIZE=3 SMTPUTF8` as {"SIZE": "3", "SMTPUTF8": None}."""
    split = [option.partition("=") for option in options]
    return {name.upper(): value if equals else None for name, equals, value in split}


def _is_size(value: str | None) -> bool:
    """Whether this is a size-value of RFC 1870 section 3."""
    return bool(value and value.isascii() and value.isdigit() and len(value) <= 20)


def _declared_size(parameters: Mapping[str, str | None]) -> int:
    """How many octets the client says that it will send; 0 when it does not."""
    value = parameters.get("SIZE")
    return int(value) if value and _is_size(value) else 0


def _line(reply: str) -> bytes:
    """One line of a reply: printable ASCII, and short enough for every client."""
    return _UNPRINTABLE.sub("?", " ".join(reply.split()))[: REPLY_MAX + 4].encode("ascii") + b"\r\n"
