"""One SMTP session: what a client may say, and what it is answered.

Rules:

1. Nothing of what a client sends is trusted: addresses pass our own strict grammar before anything else sees them, a
   message is kept only up to the size limit, a large one in a file, and no reply repeats a control character.
2. A transaction's replies come from here, until its last octet; then the receiver's `commit` takes the message and
   answers for it. Its answers are awaited, never cancelled: a client that goes away loses a reply, not its mail.
3. Which recipients each of these answers is for, `groups` says: over SMTP there is one, for all of them.
4. A client that closes its sending side early is still answered for everything that it has sent.
5. A password is asked for only through TLS (RFC 4954 section 4), and mail of a stranger is taken only for whom the
   receiver takes mail: what a client may do more because it has logged in, `hosts` says.
6. What a user's own checks say is asked in their place: at the connection, at MAIL and at RCPT, each after our own.

How octets become commands, and all timers: `wire`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol, cast

from aiosmtpd import smtp
from aiosmtpd.proxy_protocol import V2_CMD, get_proxy

from lamsonq import mail
from lamsonq.address import canonical
from lamsonq.content import Content, Spilled, has_bare_line_end
from lamsonq.envelope import UNASKED, Envelope, Notify
from lamsonq.limits import Client, Refused, Traffic
from lamsonq.trace import HOPS_MAX, hops, protocol_word
from lamsonq.wire import Command, Wire, Work, reply_line

LOG = logging.getLogger()
"""The root logger, where the other lines about a message go."""

PROXY_TIMEOUT = 5.0
"""Seconds for the line or block of the PROXY protocol, which its sender has ready."""

LOGINS_MAX = 3
"""Logins of one connection that may fail."""

LOGIN_DELAY = 1.0
"""Seconds that a login which failed waits for its answer."""

HELO_MAX = 255
"""Octets of a domain (RFC 5321 section 4.5.3.1.2)."""

_WORDS_OF_THE_WEB = frozenset({"GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "CONNECT"})
"""What another protocol begins with, whose client somebody has sent here."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a client has said so far: for a check at the connection, at MAIL or at RCPT.

    `address` is its IP address ("" on a unix socket), `helo` what it calls itself, `login` who has logged in, `tls` the
    version of TLS; "" where there is none. `sender` is None before MAIL and "" for the null sender, `recipient` the one
    of this RCPT, `recipients` those that were taken before it; all as the client wrote them.
    """

    address: str
    helo: str = ""
    login: str = ""
    tls: str = ""
    sender: str | None = None
    recipient: str = ""
    recipients: tuple[str, ...] = ()


Check = Callable[[Dialogue], object]
"""A check of the user's own, plain or `async def`: it raises SMTPError to refuse; what it returns does not matter."""

Certificate = Callable[[], ssl.SSLContext]


class Server(Protocol):
    """What a session needs of its receiver."""

    hostname: str
    size_limit: int
    draining: bool
    traffic: Traffic
    login_required: bool
    carries_bare: bool
    hosts: frozenset[str] | None
    on_connect: Check | None
    on_mail: Check | None
    on_rcpt: Check | None

    @property
    def certificate(self) -> Certificate | None: ...

    @property
    def tls_required(self) -> bool: ...

    @property
    def tls_implicit(self) -> bool: ...

    @property
    def has_logins(self) -> bool: ...

    @property
    def offers_dsn(self) -> bool: ...

    def opened(self, session: Session) -> None:
        """A client has connected."""

    def closed(self, session: Session) -> None:
        """It has gone."""

    def is_proxy(self, address: str) -> bool:
        """Whether who connects from here says by the PROXY protocol whom he connects for."""

    def make_room(self) -> None:
        """There are too many connections: who waits for the longest time may have to go."""

    def takes(self, address: str) -> bool | asyncio.Future[bool]:
        """Whether mail to this address would reach anybody."""

    async def asks(self, check: Check, dialogue: Dialogue) -> str | None:
        """The reply by which a check refuses; None when it does not."""

    async def logs_in(self, name: str, password: str) -> bool | None:
        """Whether this is the name's password; None when that cannot be known now."""

    def full(self, size: int) -> bool:
        """Whether there is no room for a message of so many octets; 0 where that is not known."""

    def commit(
        self, envelope: Envelope, content: Content, groups: Sequence[tuple[str, ...]], tell: Callable[[str], None]
    ) -> None:
        """Begin to keep or handle a message; `tell` gets the replies, one for each group of its recipients, in this
        order and from the loop.

        The traffic's memory counts it until it is done with.
        """

    def trouble(self, error: BaseException) -> str:
        """Log an error that the client must not see; the reply."""


class Session(Wire):
    """An SMTP session with strict paths, bounded memory and commits that nothing interrupts."""

    protocol = "ESMTP"
    """What the greeting says that is spoken here."""

    extensions: ClassVar[tuple[str, ...]] = (
        "8BITMIME",
        "SMTPUTF8",
        "PIPELINING",
        "ENHANCEDSTATUSCODES",
        "CHUNKING",
    )
    """What is offered besides SIZE, DSN, STARTTLS and AUTH."""

    greeting: ClassVar[str] = "EHLO"
    """The command that a session begins with."""

    parting = False
    """Whether the server ends and has taken this client's last message; now he may say QUIT, but not MAIL."""

    owed = 0
    """How many replies the client waits for, to a message that it has sent whole."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            data_size_limit=server.size_limit,
            enable_SMTPUTF8=True,
            hostname=server.hostname,
            ident=f"{self.protocol} lamsonq",
            loop=loop,
        )
        self.server = server
        limits = server.traffic.limits
        self.command_timeout = limits.command_timeout or float("inf")
        self.data_timeout = limits.data_timeout or float("inf")
        self.peer: Any = None
        self.address = ""
        self.login = ""
        self._client: Client | None = None
        self._faults = 0
        self._failed_logins = 0
        self._messages = 0
        self._reserved = 0
        self._chunks: bytearray | None = None
        """What the BDATs of this transaction have brought and did not spill; None before the first."""
        self._spilled: Spilled | None = None
        """What has spilled of the message that comes."""
        self._piece = 0
        self._last_piece = False
        self._no_room = ""
        """The reply to a message that was dropped because there was no room for it."""
        self._notify = UNASKED

    # -- the connection ----------------------------------------------------------------------------------------

    def _create_session(self) -> smtp.Session:
        self._state = super()._create_session()
        return self._state

    def welcome(self) -> Work | None:
        assert self.transport is not None
        peer = self.transport.get_extra_info("peername")
        self.server.opened(self)
        if not isinstance(peer, tuple):  # the client of a unix socket has no name, or one that it chose
            self.peer = self.transport.get_extra_info("sockname")
            return self._admit("")
        self.peer = peer[:2]
        if self.server.is_proxy(peer[0]):
            self._begin(self._welcome_by_proxy(), feeding=True)
            return None
        return self._admit(peer[0])

    async def _welcome_by_proxy(self) -> None:
        """The PROXY protocol, version 1 or 2: a load balancer says whom it connects for."""
        try:
            async with asyncio.timeout(PROXY_TIMEOUT):
                said = await get_proxy(self._reader)
        except Exception as error:  # aiosmtpd's parser raises what it happens to stumble over
            LOG.debug("No PROXY header from Peer: %r: %r", self.peer, error)
            said = None
        if not said:
            LOG.warning("%s is among receiver.proxies and does not speak the PROXY protocol: closed", self.peer)
            self._close()
            return
        address = ""
        named = said.src_addr is not None and said.src_port is not None
        if named and said.command != V2_CMD.LOCAL:  # LOCAL, as UNKNOWN: the proxy speaks for itself
            address = str(said.src_addr)
            self.peer = (address, int(said.src_port or 0))
        elif isinstance(self.peer, tuple):
            address = self.peer[0]
        self._stop_feeding()
        if (work := self._admit(address)) is not None:
            await work

    def _admit(self, address: str) -> Work | None:
        """Let the client in, unless there are too many of them or a check is against it."""
        self.address = address
        traffic = self.server.traffic
        self._state.peer = self.peer
        if traffic.limits.connections and traffic.open >= traffic.limits.connections:
            self.server.make_room()
        try:
            self._client = traffic.enter(address, self.loop.time())
        except Refused as refused:
            self.dismiss(f"421 4.7.0 {refused}, try again later")
            return None
        if self.server.tls_implicit or self.server.on_connect is not None:
            return self._prepare()
        self.say(f"220 {self.hostname} {self.__ident__}")
        return None

    async def _prepare(self) -> None:
        """What takes its time before the greeting: TLS from the first byte, and the user's check."""
        if self.server.tls_implicit and not await self._encrypt(bytes(self._held)):
            return
        if self.server.on_connect is not None:
            refusal = await self.server.asks(self.server.on_connect, self._dialogue())
            if refusal is not None:
                # RFC 5321 section 3.1: 554 in place of the greeting; later, 421.
                code = "421" if refusal.startswith("4") else "554"
                self.dismiss(f"{code}{refusal[3:]}")
                return
        if self._held and not self._is_encrypted:
            self.dismiss("554 5.5.1 You spoke before the greeting")  # RFC 5321 section 4.3.1
            return
        self.say(f"220 {self.hostname} {self.__ident__}")

    def connection_lost(self, error: Exception | None) -> None:
        if self.transport is None:
            return
        self.server.closed(self)
        self._release()
        self._leave()
        super().connection_lost(error)

    def _timeout_cb(self) -> None:
        if self._blocked and isinstance(self.transport, asyncio.Transport):
            self.transport.abort()  # it does not read what it was told before
        else:
            self.dismiss("421 4.4.2 Timeout, closing connection")

    @property
    def idle_for(self) -> float:
        """Seconds since the client's last sign of life; 0.0 while a transaction is under way.

        Who is in the middle of a handshake or a login is waited for like everybody else."""
        we_work = self._waiting and not self._feeding and not self._shaking
        return 0.0 if we_work or self._under_way else self.loop.time() - self._heard

    @property
    def has_place(self) -> bool:
        """Whether it counts among the connections that are open."""
        return self._client is not None

    def dismiss(self, reply: str) -> None:
        """Say why, in place of every reply that is owed, and close, if it is still open; from the event loop."""
        if self._shaking and isinstance(self.transport, asyncio.Transport):
            self.transport.abort()  # in clear nothing more is said
        elif self._is_open:
            self._flush()
            for _ in range(max(1, self.owed)):
                self.say(reply)
            self._close()

    def give_way(self, reply: str) -> None:
        """Go, so that another client may come; its place is free at once."""
        self._leave()
        self.dismiss(reply)

    def _leave(self) -> None:
        if self._client is not None:
            self.server.traffic.leave(self._client)
            self._client = None

    def failure(self, error: BaseException) -> str:
        """The reply to a command that failed, in place of aiosmtpd's, which tells the client the exception."""
        reply = self.server.trouble(error)
        if self.owed:
            for _ in range(self.owed - 1):  # the last one goes the usual way
                self.say(reply)
            self.owed = 0
            self._forget()
        return reply

    def _misspoken(self, reply: str) -> None:
        self.say(reply)
        self._fault()

    def _fault(self) -> None:
        """Count what no honest client does."""
        self._faults += 1
        most = self.server.traffic.limits.bad_commands
        if most and self._faults >= most:
            self.dismiss("421 4.7.0 Too many errors, closing connection")

    def _unknown(self, command: str) -> None:
        if command in _WORDS_OF_THE_WEB:
            self.dismiss("421 4.7.0 This is a mail server")
        else:
            super()._unknown(command)

    def _forbids(self, command: str) -> bool:
        if command in _BEFORE_TLS or not self.server.tls_required or self._is_encrypted:
            return False
        self.say("530 5.7.0 Must issue a STARTTLS command first")
        return True

    @property
    def _tls_version(self) -> str:
        return (self._tls_protocol.version() or "") if isinstance(self._tls_protocol, ssl.SSLObject) else ""

    def _dialogue(self) -> Dialogue:
        session, envelope = self._state, self.envelope
        sender = None if envelope is None or envelope.mail_from is None else _unmarked(envelope.mail_from)
        return Dialogue(
            address=self.address,
            helo=session.host_name or "",
            login=self.login,
            tls=self._tls_version,
            sender=sender,
            recipients=tuple(envelope.rcpt_tos) if envelope is not None else (),
        )

    # -- greetings, TLS and logins -----------------------------------------------------------------------------

    def _greet(self, verb: str, hostname: str | None) -> None:
        if not hostname or len(hostname) > HELO_MAX or not hostname.isprintable():
            self.say(f"501 5.5.4 Syntax: {verb} hostname")
            return
        self._forget()
        session = self._state
        session.extended_smtp = verb != "HELO"
        session.host_name = hostname
        if verb == "HELO":
            self.write(_lines(self.hostname))
        else:
            self.write(_lines(*self._offers()))

    def _offers(self) -> list[str]:
        offers = [self.hostname, f"SIZE {self.server.size_limit}", *self.extensions]
        if self.server.offers_dsn:
            offers.append("DSN")
        if self.server.certificate is not None and not self._is_encrypted:
            offers.append("STARTTLS")
        if self.server.has_logins and self._is_encrypted:
            offers.append("AUTH LOGIN PLAIN")
        return offers

    def _ehlo(self, hostname: str | None) -> None:
        self._greet("EHLO", hostname)

    def _helo(self, hostname: str | None) -> None:
        self._greet("HELO", hostname)

    def _out_of_order(self) -> bool:
        """Answer a client that has not greeted; False when it has."""
        if self._state.host_name:
            return False
        self.say(f"503 5.5.1 Send {self.greeting} first")
        return True

    def _starttls(self, argument: str | None) -> Work | None:
        if argument:
            self.say("501 5.5.4 Syntax: STARTTLS")
        elif self.server.certificate is None:
            self.say("502 5.5.1 STARTTLS is not offered")
        elif self._is_encrypted:
            self.say("503 5.5.1 TLS is spoken already")
        else:
            return self._upgrade()
        return None

    async def _upgrade(self) -> None:
        """RFC 3207: another session begins with the handshake; what was sent ahead of it is gone."""
        if isinstance(self.transport, asyncio.Transport):
            self._held.clear()
            self.say("220 2.0.0 Ready to start TLS")
            await self._encrypt(b"")

    async def _encrypt(self, ahead: bytes) -> bool:
        assert self.server.certificate is not None
        try:
            await self.encrypt(self.server.certificate(), ahead)
        except OSError as error:  # ssl.SSLError and TimeoutError are some
            LOG.info("No TLS with Peer: %r: %s", self.peer, error.strerror or error)
            return False
        self._forget()
        self._state.peer = self.peer
        self.login = ""
        return True

    def _auth(self, argument: str | None) -> None:
        """AUTH (RFC 4954), with aiosmtpd's PLAIN and LOGIN; the password is looked at in a thread."""
        if self._out_of_order():
            return
        words = (argument or "").split()
        if not self.server.has_logins:
            self.say("502 5.5.1 AUTH is not offered")
        elif not self._is_encrypted:
            self.say("538 5.7.11 Encryption required for requested authentication mechanism")
        elif self.login or self._under_way:
            self.say("503 5.5.1 " + ("Already logged in" if self.login else "Not in the middle of a transaction"))
        elif not 1 <= len(words) <= 2:
            self.say("501 5.5.4 Syntax: AUTH mechanism")
        elif words[0].upper() not in _MECHANISMS:
            self.say("504 5.5.4 Unrecognized authentication type")
        else:
            self._begin(self._log_in(words), feeding=True)

    async def _log_in(self, words: list[str]) -> None:
        mechanism = words[0].upper()
        if words[1:] == ["="]:
            words[1] = ""  # RFC 4954 section 4: an initial response of no octets
        method = self.auth_PLAIN if mechanism == "PLAIN" else self.auth_LOGIN
        try:
            given = await method(self, [mechanism, *words[1:]])
        except ValueError:
            self.dismiss("500 5.5.6 Line too long")  # where it ends, and a command begins, nobody knows
            return
        self._stop_feeding()
        if not given.success:  # what was wrong with it has been said
            self._fault()
            return
        credentials = cast(smtp.LoginPassword, given.auth_data)
        name, password = (octets.decode("utf-8", "surrogateescape") for octets in credentials)
        right = await self.server.logs_in(name, password)
        if right is None:
            self.say("454 4.7.0 Temporary authentication failure")
        elif right:
            self.login = name
            self._state.authenticated = True
            self.say("235 2.7.0 Authentication successful")
        else:
            await self._refuse_login(name)

    async def _refuse_login(self, name: str) -> None:
        self._failed_logins += 1
        LOG.warning("Login failed from Peer: %r, as %r", self.peer, name[:100])
        await asyncio.sleep(LOGIN_DELAY)
        if self._failed_logins >= LOGINS_MAX:
            self.dismiss("421 4.7.0 Too many logins failed, closing connection")
        else:
            self.say("535 5.7.8 Authentication credentials invalid")

    def _authenticate(self, mechanism: str, auth_data: object) -> smtp.AuthResult:  # noqa: ARG002
        # aiosmtpd asks from the event loop; we take the credentials from it, and ask elsewhere.
        return smtp.AuthResult(success=True, auth_data=auth_data)

    # -- transactions ------------------------------------------------------------------------------------------

    @property
    def _under_way(self) -> bool:
        return self.envelope is not None and self.envelope.mail_from is not None

    def _forget(self) -> None:
        """No transaction is under way (RFC 5321 section 4.1.1.5)."""
        self._set_rset_state()
        self._chunks = None
        self._notify = UNASKED
        self._no_room = ""
        self._release()

    def _rset(self, argument: str | None) -> None:
        if argument:
            self.say("501 5.5.4 Syntax: RSET")
            return
        self._forget()
        self.say("250 2.0.0 OK")

    def _noop(self, argument: str | None) -> None:  # noqa: ARG002 - RFC 5321 section 4.1.1.9 ignores it
        self.say("250 2.0.0 OK")

    def _quit(self, argument: str | None) -> None:
        if argument:
            self.say("501 5.5.4 Syntax: QUIT")
            return
        self.say("221 2.0.0 Bye")
        self._close()

    def _help(self, argument: str | None) -> None:  # noqa: ARG002
        self.say("214 2.0.0 See RFC 5321")

    def _vrfy(self, argument: str | None) -> None:
        if argument:
            # RFC 5321 section 3.5.3: this reply says nothing about who exists.
            self.say("252 2.5.0 Cannot VRFY user, but will accept message and attempt delivery")
        else:
            self.say("501 5.5.4 Syntax: VRFY address")

    def _expn(self, argument: str | None) -> None:  # noqa: ARG002
        self.say("502 5.5.1 EXPN is not offered")  # RFC 5321 section 4.2.4: known, and not implemented

    def _mail(self, argument: str | None) -> Work | None:
        if self.parting:
            self.dismiss("421 4.3.2 Service shutting down")
            return None
        if self._out_of_order():
            return None
        reply = self._begun(argument or "")
        if reply.startswith("250") and self.server.on_mail is not None:
            return self._checked_mail(self.server.on_mail, reply)
        self.say(reply)
        return None

    async def _checked_mail(self, check: Check, reply: str) -> None:
        refusal = await self.server.asks(check, self._dialogue())
        if refusal is not None:
            LOG.info("Refused sender from Peer: %r, From: %r: %r", self.peer, self._dialogue().sender, refusal)
            self._forget()
        self.say(refusal or reply)

    def _begun(self, argument: str) -> str:
        """Begin a transaction: the reply to MAIL."""
        if self._under_way:
            return "503 5.5.1 Nested MAIL command"
        if self.server.login_required and not self.login:
            return "530 5.7.0 Authentication required"
        if argument[:5].upper() != "FROM:":
            return "501 5.5.4 Syntax: MAIL FROM:<address>"
        try:
            address, rest = mail.parse_path(argument[5:], null=True)
        except ValueError as reason:
            return f"553 5.1.7 Bad sender address: {reason}"
        options = rest.split()
        parameters = _parameters(options)
        if refusal := self._objection(parameters) or self._excess(_declared_size(parameters)):
            return refusal
        assert self.envelope is not None
        self.envelope.mail_from = address or "<>"  # aiosmtpd takes "" for no MAIL at all
        self.envelope.mail_options = options
        self._notify = Notify(ret=(parameters.get("RET") or "").upper(), envid=parameters.get("ENVID") or "")
        return "250 2.1.0 Ok"

    def _objection(self, parameters: Mapping[str, str | None]) -> str | None:
        """Why MAIL with these parameters is refused; None when it is not."""
        for name, value in parameters.items():
            if name == "SIZE":
                if not _is_size(value):
                    return "501 5.5.4 SIZE is a number of octets"
                if _declared_size(parameters) > self.server.size_limit:
                    return self._too_large()
            elif name == "BODY":
                if (value or "").upper() not in ("7BIT", "8BITMIME"):
                    return "501 5.5.4 BODY is 7BIT or 8BITMIME"
            elif name == "RET":
                if (value or "").upper() not in ("FULL", "HDRS"):  # RFC 3461 section 4.3
                    return "501 5.5.4 RET is FULL or HDRS"
            elif name == "ENVID":
                if not value or len(value) > 100 or not _is_xtext(value):  # RFC 3461 section 4.4
                    return "501 5.5.4 ENVID is xtext of at most 100 characters"
            elif name == "AUTH" and self.server.has_logins and value:
                pass  # RFC 4954 section 5: who the message was first taken from; we know better
            elif name == "SMTPUTF8":
                if value is not None:
                    return "501 5.5.4 SMTPUTF8 takes no value"
            else:
                return "555 5.5.4 MAIL FROM parameter not recognized or not implemented"
        return None

    def _excess(self, size: int) -> str | None:
        """Why no further message may come now; None when it may."""
        client = self._client
        most = client.may.messages_per_connection if client is not None else 0
        if most and self._messages >= most:
            return "452 4.7.0 Too many messages on this connection, open another one"
        if self.server.full(size) or not self.server.traffic.has_room(size):
            return _NO_STORAGE  # RFC 1870 section 6.1: too little room at the moment for the declared size
        if client is not None and not client.message(self.loop.time()):
            return "450 4.7.1 Too many messages from your address in this minute, try again later"
        return None

    def _too_large(self) -> str:
        return f"552 5.3.4 Message size exceeds the limit of {self.server.size_limit} octets"

    def _rcpt(self, argument: str | None) -> Work | None:
        if self._out_of_order():
            return None
        reply = self._named(argument or "")
        if isinstance(reply, str):
            self._answer_rcpt(argument or "", reply)
            return None
        return self._checked_rcpt(argument or "", *reply)

    async def _checked_rcpt(self, argument: str, address: str, notify: Notify, taken: object) -> None:
        """What has to be waited for: whether a route takes the address, and the user's check."""
        if isinstance(taken, asyncio.Future):
            taken = await taken
        reply = None if taken else "550 5.1.1 No such recipient here"
        if reply is None and self.server.on_rcpt is not None:
            reply = await self.server.asks(self.server.on_rcpt, replace(self._dialogue(), recipient=address))
        self._answer_rcpt(argument, reply or self._accept(address, notify))

    def _answer_rcpt(self, argument: str, reply: str) -> None:
        if not reply.startswith(("25", "50")):  # a command out of order is no refusal of a recipient
            assert self.envelope is not None
            sender = _unmarked(self.envelope.mail_from or "")
            recipient = argument[3:].strip(" <>")
            LOG.info("Refused recipient from Peer: %r, From: %r, to To %r: %r", self.peer, sender, recipient, reply)
        self.say(reply)

    def _named(self, argument: str) -> str | tuple[str, Notify, object]:
        """The reply to RCPT, or what is still to be asked: about whom, with which wishes, and whether a route takes
        him."""
        assert self.envelope is not None
        if self.envelope.mail_from is None or self._chunks is not None:
            return "503 5.5.1 Need MAIL command"
        if argument[:3].upper() != "TO:":
            return "501 5.5.4 Syntax: RCPT TO:<address>"
        try:
            address, rest = mail.parse_path(argument[3:], postmaster=True)
        except ValueError as reason:
            return f"553 5.1.3 Bad recipient address: {reason}"
        try:
            notify = _wishes(self._notify, address, rest.split()) if rest else self._notify
        except ValueError as refusal:
            return str(refusal)
        if 0 < self.server.traffic.limits.recipients <= len(self.envelope.rcpt_tos):
            return "452 4.5.3 Too many recipients"
        if self._client is not None and not self._client.recipient(self.loop.time()):
            return "450 4.7.1 Too many recipients from your address in this minute, try again later"
        if not self._serves(address):
            return "550 5.7.1 Relaying denied: no mail is taken for that domain"
        taken = address.lower() == "postmaster" or self.server.takes(address)
        if taken is False:
            return "550 5.1.1 No such recipient here"
        if taken is True and self.server.on_rcpt is None:
            return self._accept(address, notify)
        return address, notify, taken

    def _serves(self, address: str) -> bool:
        """Whether mail for this domain is taken of this client (rule 5)."""
        hosts = self.server.hosts
        return hosts is None or bool(self.login) or address.rpartition("@")[2].lower() in hosts or "@" not in address

    def _accept(self, address: str, notify: Notify) -> str:
        assert self.envelope is not None
        self.envelope.rcpt_tos.append(address)  # also when it stands there already: RFC 2033 answers for each
        self._notify = notify
        return "250 2.1.5 Ok"

    # -- messages ----------------------------------------------------------------------------------------------

    def _data(self, argument: str | None) -> None:
        assert self.envelope is not None
        if self._out_of_order():
            return
        if not self.envelope.rcpt_tos:
            self.say("503 5.5.1 Need RCPT command")
        elif argument:
            self.say("501 5.5.4 Syntax: DATA")
        elif self._chunks is not None:
            self.say("503 5.5.1 DATA cannot follow BDAT")  # RFC 3030 section 2
        else:
            self.say("354 End data with <CR><LF>.<CR><LF>")
            self.read_message(self.server.size_limit, self._take_whole)

    def _bdat(self, argument: str | None) -> None:
        """One piece of a message (RFC 3030 section 2): its octets come at once, whatever is answered."""
        size, _, last = (argument or "").partition(" ")
        if not _is_size(size) or last.upper() not in ("", "LAST"):
            self.dismiss("501 5.5.4 Syntax: BDAT size [LAST]")  # how much of what comes is no command, nobody knows
            return
        self._piece = int(size)
        self._last_piece = bool(last)
        before = len(self._chunks or b"") + (0 if self._spilled is None else len(self._spilled))
        fits = before + self._piece <= self.server.size_limit
        if not fits:
            # RFC 3030 section 2: what is refused is read all the same, however much it is, and dropped; who is told
            # no before he has sent it may be cut off before he reads it, and comes again.
            self.drops()
        self.read_octets(self._piece, self._take_piece, keep=fits)

    def _take_piece(self, piece: bytes | None) -> None:
        assert self.envelope is not None
        if not self._state.host_name or not self.envelope.rcpt_tos:
            self.say("503 5.5.1 Need RCPT command")
            return
        chunks = self._chunks if self._chunks is not None else bytearray()
        self._chunks = chunks
        chunks += piece or b""
        if self._last_piece:
            content = None if piece is None else bytes(chunks)
            chunks.clear()
            self._take_whole(content)
            return
        if len(chunks) > self.spill_after:
            piece = piece if self.spills(b"") and self.keeps(0) else None
        if piece is None:
            # One reply, whoever would be answered for at the end; the pieces behind it come to no transaction.
            self.say(self._fault_of(None) or "")
            self._forget()
        else:
            self.say(f"250 2.0.0 {self._piece} octets received")

    def keeps(self, octets: int) -> bool:
        """Count what is kept in memory, for all sessions together."""
        assert self.envelope is not None
        if not self.envelope.rcpt_tos:
            return False  # BDAT without a transaction
        more = octets + len(self._chunks or b"") - self._reserved
        traffic = self.server.traffic
        if more > 0 and not traffic.has_room(more):
            self._no_room = _NO_MEMORY
            return False
        traffic.memory += more
        self._reserved += more
        return True

    def spills(self, piece: bytes) -> bool:
        """Write it to the message's file, behind what BDATs have brought."""
        if self._chunks:
            piece = bytes(self._chunks) + piece
            self._chunks.clear()
        try:
            if self.server.full(len(piece)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._spilled is None:
                self._spilled = Spilled(checked=not self.server.carries_bare)
            self._spilled.write(piece)
        except OSError as error:
            LOG.error("A large message from Peer: %r is put off, there is no room for it: %s", self.peer, error)
            self._no_room = _NO_STORAGE
            return False
        return True

    def drops(self) -> None:
        if self._chunks is not None:
            self._chunks.clear()
        self._release()

    def _release(self) -> None:
        """Nothing of the message that comes is kept by this session any more."""
        self.server.traffic.memory -= self._reserved
        self._reserved = 0
        if self._spilled is not None:
            self._spilled.close()
            self._spilled = None

    def groups(self, accepted: Sequence[str]) -> list[tuple[str, ...]]:
        """Which recipients each reply to a message answers for: one for all (RFC 5321 section 3.3).

        `accepted` are the recipients of the RCPTs that were answered 250, in order, as routes see them.
        """
        return [tuple(dict.fromkeys(accepted))]

    def _fault_of(self, content: Content | None) -> str | None:
        """Why a message that has come is refused unseen; None when it is not."""
        if content is None:
            return self._no_room or self._too_large()
        if isinstance(content, Spilled):
            if not self.server.traffic.has_room(0):  # what is in a file was let in before it counted (BDAT 0 LAST)
                return _NO_MEMORY
            passed, bare, nul = content.hops, content.has_bare_line_end, content.has_nul
        else:
            strict = not self.server.carries_bare
            passed, bare, nul = hops(content), strict and has_bare_line_end(content), strict and b"\0" in content
        if passed > HOPS_MAX:
            return "554 5.4.6 Too many hops: this message goes round in circles"
        if bare:
            return "550 5.6.0 Lines end in <CR><LF>: a bare <CR> or <LF> is refused (RFC 5321 section 2.3.8)"
        if nul:
            return "550 5.6.0 A message holds no <NUL> (RFC 2045 section 2.8)"
        return None

    def _take_whole(self, last: bytes | None) -> None:
        """A message has come, and this is what did not spill: have it taken; each reply to it goes out as soon as it is
        known."""
        assert self.envelope is not None
        content: Content | None = last
        if last is not None and self._spilled is not None:
            content = self._spilled if self.spills(last) else None
        accepted = [canonical(path) for path in self.envelope.rcpt_tos]
        groups = self.groups(accepted)
        self.owed = len(groups)
        refusal = self._fault_of(content)
        if content is None or refusal is not None:
            for _ in groups:
                self._pay(refusal or "")
            return
        paths: dict[str, str] = {}  # each recipient once, as it was first written
        for recipient, path in zip(accepted, self.envelope.rcpt_tos, strict=True):
            paths.setdefault(recipient, path)
        envelope = Envelope(
            _unmarked(self.envelope.mail_from or ""),
            tuple(paths.values()),
            self.peer,
            time.time(),
            helo=self._state.host_name or "",
            login=self.login,
            tls=self._tls_version,
            notify=self._notify,
            protocol=self._word(),
        )
        self._spilled = None
        self._release()  # the receiver counts it now
        self.server.commit(envelope, content, groups, self._pay)
        if self.owed:
            self.wait()

    def _pay(self, reply: str) -> None:
        """One of the replies that are owed; the last one ends the transaction."""
        if not self.owed:
            return  # it was told something else, and sent away
        self.owed -= 1
        self.say(reply)
        if not self.owed:
            self._messages += 1
            self._forget()
            self.parting = self.server.draining
            if self._waiting:
                self.resume()

    def say(self, reply: str) -> None:
        super().say(enhanced(reply))

    def _word(self) -> str:
        """How the message came (RFC 3848)."""
        base = self.protocol if self._state.extended_smtp else "SMTP"
        utf8 = any(option.upper() == "SMTPUTF8" for option in self.envelope.mail_options) if self.envelope else False
        return protocol_word(base, tls=self._is_encrypted, login=bool(self.login), utf8=utf8)

    commands: ClassVar[Mapping[str, Command]] = {
        "MAIL": _mail,
        "RCPT": _rcpt,
        "DATA": _data,
        "BDAT": _bdat,
        "EHLO": _ehlo,
        "HELO": _helo,
        "RSET": _rset,
        "NOOP": _noop,
        "QUIT": _quit,
        "HELP": _help,
        "VRFY": _vrfy,
        "EXPN": _expn,
        "STARTTLS": _starttls,
        "AUTH": _auth,
    }


_NO_MEMORY = "452 4.3.1 Too many messages at the moment, try again later"
_NO_STORAGE = "452 4.3.1 Insufficient system storage, try again later"
_MECHANISMS = ("PLAIN", "LOGIN")
_BEFORE_TLS = frozenset({"NOOP", "EHLO", "LHLO", "STARTTLS", "QUIT"})  # RFC 3207 section 4


@lru_cache(64)
def _lines(*texts: str) -> bytes:
    """A reply of several lines (RFC 5321 section 4.2.1) that accepts a greeting."""
    *first, last = texts
    return b"".join(map(reply_line, [*(f"250-{text}" for text in first), f"250 {last}"]))


_STATUS = re.compile(r"([245])\d\d(?: |$)(?!\1\.\d{1,3}\.\d{1,3}(?: |$))")
_DEFAULTS = {"500": "5.5.2", "501": "5.5.4", "502": "5.5.1", "503": "5.5.1"}  # RFC 3463 section 3.6


@lru_cache(256)
def enhanced(reply: str) -> str:
    """A reply with an enhanced status code (RFC 2034), if it has to have one and does not; never the greeting."""
    if "  " in reply or not reply.isprintable():
        reply = " ".join(reply.split())
    if not _STATUS.match(reply):
        return reply
    code, _, words = reply.partition(" ")
    return reply if code == "220" else f"{code} {_DEFAULTS.get(code, f'{code[0]}.0.0')} {words}".rstrip()


def _unmarked(sender: str) -> str:
    """aiosmtpd's sender, as everybody else has it: "" for the null sender."""
    return "" if sender == "<>" else sender


def _parameters(options: Sequence[str]) -> dict[str, str | None]:
    """`SIZE=3 SMTPUTF8` as {"SIZE": "3", "SMTPUTF8": None}."""
    split = [option.partition("=") for option in options]
    return {name.upper(): value if equals else None for name, equals, value in split}


def _wishes(notify: Notify, address: str, options: Sequence[str]) -> Notify:
    """What the sender wants to be told, with the parameters of this RCPT (RFC 3461). Raises ValueError, the reply."""
    wanted, original = dict(notify.notify), dict(notify.orcpt)
    for name, value in _parameters(options).items():
        if name == "NOTIFY":
            words = (value or "").upper().split(",")
            if not set(words) <= {"NEVER", "SUCCESS", "FAILURE", "DELAY"} or ("NEVER" in words and len(words) > 1):
                raise ValueError("501 5.5.4 NOTIFY is NEVER, or some of SUCCESS, FAILURE and DELAY")
            wanted[address] = ",".join(words)
        elif name == "ORCPT":
            kind, separator, path = (value or "").partition(";")
            if not separator or not _ATOM.fullmatch(kind) or len(value or "") > 500 or not _is_xtext(path):
                raise ValueError("501 5.5.4 ORCPT is a type and an address in xtext")
            original[address] = value or ""
        else:
            raise ValueError("555 5.5.4 RCPT TO parameter not recognized or not implemented")
    return Notify(notify.ret, notify.envid, wanted, original)


_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+")
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2}|[^\x00-\x7f])+")


def _is_xtext(text: str) -> bool:
    """RFC 3461 section 4, and the characters beyond ASCII of RFC 6533 section 3."""
    return text.isprintable() and _XTEXT.fullmatch(text) is not None


def _is_size(value: str | None) -> bool:
    """Whether this is a size-value of RFC 1870 section 3."""
    return bool(value and value.isascii() and value.isdigit() and len(value) <= 20)


def _declared_size(parameters: Mapping[str, str | None]) -> int:
    """How many octets the client says that it will send; 0 when it does not."""
    value = parameters.get("SIZE")
    return int(value) if value and _is_size(value) else 0
