"""Mail on its way out: `Relay` hands messages to a mail server over SMTP or LMTP.

Rules:

1. A message leaves with its envelope, not with what its headers say: a `MailRequest` with the sender and the
   recipient that it was received with, a `MailResponse` to everyone in To, Cc and Bcc.
2. Nothing is swallowed. Who did not get the message stands in the `Undelivered` that `deliver` raises;
   everyone else has got it. What the server refused is an `SMTPError` with its words; whatever went wrong on
   the way there (connection, TLS, login, time-out) is a `Later`, because the message is not at fault.
3. Connections are kept for the next message. One that died while it waited is replaced, once, before the
   server has accepted anything of this message; never afterwards.
4. Without a host each recipient's own mail servers get the message, one transaction per domain. The next one is asked
   (RFC 5321 section 5.1) when a server cannot be reached, does not greet with 220 or breaks TLS; and when, before the
   final dot is sent, the connection is lost or nobody was taken and somebody was put off (4xx). A 5xx to MAIL, RCPT or
   DATA is final. Once the final dot is sent no other server is asked: what is unclear then is a `Later`.
5. Other people's mail servers get TLS where they offer it, of any certificate (RFC 7435: better than none), and none
   where their handshake fails. `starttls` there means a certificate for the server's name, or nothing is sent.
6. A password goes only through TLS or to this machine itself, unless `clear_login` says that the network is trusted.
7. What a program writes does not go to who wrote a message that no program may answer (`MailRequest.may_be_answered`):
   two of them would go on for ever.
8. What is signed is signed at the last moment, over the bytes that leave. Who is suppressed gets nothing, and counts as
   refused for good; whose address does not exist, as a server says at RCPT (5.1.x), is suppressed from then on. Mail
   from the null sender suppresses nobody: a report goes back to who wrote, mostly an address of ours, and that it
   could not reach him is no reason to send him nothing any more.
9. A message that is handed to a queue keeps its session beside it: whether its sender had logged in, and what he wants
   to be told. Whoever gives it another sender (`From=`) has made it his own, and it keeps nothing.
"""

from __future__ import annotations

import functools
import logging
import smtplib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.message import Message
from ssl import CERT_NONE, PROTOCOL_TLS_CLIENT, SSLCertVerificationError, SSLContext, create_default_context
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

from lamsonq import clock, mail
from lamsonq.address import canonical, domain_of
from lamsonq.connection import Client, HandshakeError, Pool, Server, own_name
from lamsonq.envelope import UNASKED, Notify
from lamsonq.errors import Dead, Failure, Later, QueueError, Receipt, SettingsError, SMTPError, Undelivered
from lamsonq.signing import DKIM, signed
from lamsonq.sockets import is_this_machine
from lamsonq.transaction import Stale, Transaction, for_the_wire, one_line

if TYPE_CHECKING:
    import dns.resolver

    from lamsonq.mx import MailServers
    from lamsonq.suppression import Suppressions

OPENING_FACTOR = 3
"""So many time-outs may pass before a server of a domain is ready for MAIL; then no other one is tried."""

RECIPIENTS_MAX = 100
"""Recipients of one transaction: so many every server takes (RFC 5321 section 4.5.3.1.8)."""

LOG = logging.getLogger()

Deliverable = mail.MailRequest | mail.MailResponse | Message | bytes | str


class Sent(NamedTuple):
    """What became of a message for each recipient: who did not get it, and who has got it."""

    failures: list[Failure]
    receipts: list[Receipt]


class Relay:
    """Gives messages to the mail server at `host`:`port`; with `deliver=`, to that callable instead.

    Without a host (None or "") each recipient's own mail servers get them, found in the DNS by `resolver` (a
    `dns.resolver.Resolver`; None: the system's), on `port`. `lmtp` speaks LMTP (RFC 2033); a host that begins with
    "/" is a unix socket, and speaks it too.

    `ssl` speaks TLS from the start, `starttls` upgrades; both check the server's certificate against the
    system's authorities, or against the `SSLContext` that is given in place of True. `clear_login` lets username and
    password go without TLS to another machine. `debug` above 0 prints the session to stderr, but for the login.
    `timeout` is in seconds, for connecting and for each reply.

    `sign` are the keys for DKIM signatures (see lamsonq.signing), `suppressions` the addresses that get nothing (see
    lamsonq.suppression).

    Raises TypeError for `ssl` together with `starttls` or LMTP, and SettingsError for what else cannot work.

    Source: Salmon's Relay and its lmtp; Lamson's Relay(host=None).
    """

    def __init__(
        self,
        host: str | None = "127.0.0.1",
        port: int = 25,
        username: str | None = None,
        password: str | None = None,
        ssl: bool | SSLContext = False,
        starttls: bool | SSLContext = False,
        debug: int = 0,
        lmtp: bool = False,
        *,
        deliver: Callable[[mail.MailRequest], object] | None = None,
        timeout: float = 30.0,
        resolver: dns.resolver.Resolver | None = None,
        clear_login: bool = False,
        sign: DKIM | Iterable[DKIM] = (),
        suppressions: Suppressions | None = None,
    ) -> None:
        self.hostname = host or ""
        self.port = port
        self.username = username
        self.password = password
        self.ssl = ssl
        self.starttls = starttls
        self.debug = debug
        self.lmtp = lmtp or self.hostname.startswith("/")
        self.timeout = timeout
        self.sign = (sign,) if isinstance(sign, DKIM) else tuple(sign)
        self.suppressions = suppressions
        self._hand_over = deliver
        self._pool = Pool()
        self._check_host()
        self._check_encryption()
        self._check_login(clear_login)
        self._finder = None if host or deliver else self._mail_servers(resolver)

    def _check_host(self) -> None:
        try:
            self.hostname.encode("idna")  # as the system's resolver does, in the middle of a delivery
        except UnicodeError as error:
            if not self.hostname.startswith("/"):
                raise SettingsError(f"Relay: {self.hostname!r} is no name of a host") from error

    def _check_encryption(self) -> None:
        if self.ssl and self.starttls:
            raise TypeError("Relay takes ssl or starttls, not both: ssl is TLS from the first byte")
        if self.ssl and self.lmtp:
            raise TypeError("Relay takes ssl or lmtp, not both: LMTP has only starttls")
        if self.starttls and self.hostname.startswith("/"):
            raise SettingsError(f"Relay: starttls is of no use on the unix socket {self.hostname}")

    def _check_login(self, clear_login: bool) -> None:
        if (self.username is None) != (self.password is None):
            given, missing = ("username", "password") if self.password is None else ("password", "username")
            raise SettingsError(f"Relay has a {given} and no {missing}: give both, or neither")
        if self.username is not None and not (
            self.ssl or self.starttls or clear_login or not self.hostname or is_this_machine(self.hostname)
        ):
            raise SettingsError(
                f"Relay would send the password to {self.hostname} unencrypted: "
                "starttls=True or ssl=True, or clear_login=True in a network that you trust"
            )

    def _mail_servers(self, resolver: dns.resolver.Resolver | None) -> MailServers:
        for name in ("ssl", "lmtp", "username"):
            if getattr(self, name):
                raise SettingsError(f"Relay has {name}, which is for one server, and no host: name it, host='...'")
        if self.port != 25:
            LOG.warning("Relay without a host and port %d: the world's mail servers listen on port 25.", self.port)
        if not own_name():
            LOG.warning("Relay without a host: this machine's name has no domain; many mail servers will refuse it.")
        from lamsonq.mx import MailServers  # when it is used: most relays have one server

        return MailServers(self.port, resolver)

    def __repr__(self) -> str:
        if self.hostname.startswith("/"):
            return f"<Relay to ({self.hostname})>"
        return f"<Relay to ({self.hostname or 'the mail servers of each domain'}:{self.port})>"

    def deliver(self, message: Deliverable, To: str | Iterable[str] | None = None, From: str | None = None) -> None:
        """Send a message to `To` from `From`, or else to and from whom its envelope names.

        An answer that rule 7 forbids is dropped, and logged. Raises Undelivered, which names everyone who did not get
        it, and Dead for a message without recipients.
        """
        failures, receipts = self.transfer(message, To, From)
        if failures:
            raise Undelivered(failures, receipts)

    def transfer(self, message: Deliverable, To: str | Iterable[str] | None = None, From: str | None = None) -> Sent:
        """As `deliver`, and tells of each recipient what became of the message. Raises Dead.

        Of what is handed to a callable it tells nothing.
        """
        sender, recipients, data = _envelope(message, To, From)
        original = _not_to_be_answered(message)
        if original is not None:
            recipients = _others(original, recipients)
            if not recipients:
                return Sent([], [])
        if not recipients:
            raise Dead("the message has no recipient: nothing in To, Cc or Bcc is an address")
        kept = message.envelope if isinstance(message, mail.MailRequest) and From is None else None
        trace = message.envelope.trace if isinstance(message, mail.MailRequest) else ""
        if self._hand_over is not None:
            self._hand_over(_request(sender, recipients, data, kept, trace))
            return Sent([], [])
        # RFC 5321 section 4.4: who passes a message on tells whom it has it from; so a circle is found out.
        data = trace.encode("utf-8", "replace") + data
        return self._send(sender, recipients, for_the_wire(data), kept.notify if kept else UNASKED)

    def send(self, To: str, From: str, Subject: str, Body: str) -> None:
        """Build a plain message and deliver it."""
        self.deliver(mail.MailResponse(To=To, From=From, Subject=Subject, Body=Body))

    def reply(self, original: mail.MailRequest, From: str, Subject: str, Body: str) -> None:
        """Answer a message, in its thread, under this very subject.

        No person wrote the answer, and it says so; what may not be answered (rule 7) is not. Whether a list or other
        bulk mail (`original.is_automatic`) is answered is up to the caller.
        """
        response = mail.MailResponse(To=original.From, From=From, Subject=Subject, Body=Body)
        response.original = original
        self.deliver(response)

    @property
    def sends(self) -> bool:
        """Whether messages go out over the network, and not to a callable."""
        return self._hand_over is None

    def resolve_relay_host(self, To: str) -> list[str]:
        """The names of the hosts that a message to this address goes to, the best first.

        Raises Later when the DNS does not answer, SMTPError when the domain takes no mail, Dead for what is no address.
        """
        if self._finder is None:
            return [self.hostname]
        address = mail.bare_address(To)
        if not address:
            raise Dead(f"not an address: {To!r}")
        return self._finder.names(domain_of(address))

    def configure_relay(self, hostname: str) -> smtplib.SMTP:
        """A new connection to `hostname`, greeted, encrypted and logged in as this relay is configured.

        Raises OSError or smtplib.SMTPException.
        """
        return self._connect(Server(hostname, self.port), None)

    def close(self) -> None:
        """Say goodbye on the connections that wait. The relay can be used again afterwards."""
        self._pool.close()

    def _send(self, sender: str, recipients: Sequence[str], data: bytes, notify: Notify) -> Sent:
        """One message to everybody."""
        if sender and not mail.is_path_address(sender):
            return Sent([Failure(to, None, Dead(f"not an address to send from: {sender!r}")) for to in recipients], [])
        good = [to for to in recipients if mail.is_path_address(to)]
        failures = [Failure(to, None, Dead(f"not an address: {to!r}")) for to in recipients if to not in good]
        if self.suppressions is not None:
            suppressed = self.suppressions.among(good)
            failures += [
                Failure(to, None, SMTPError(550, f"5.1.1 suppressed: {why}")) for to, why in suppressed.items()
            ]
            good = [to for to in good if to not in suppressed]
        receipts: list[Receipt] = []
        data = signed(data, self.sign) if good and self.sign else data
        for servers, group in self._routes(good):
            transaction = Transaction(sender, group, data, self.timeout, self.lmtp, notify=notify)
            if self._finder is not None:
                transaction.spelled = self._finder.spelled
            self._transfer(servers, transaction)
            failures += transaction.failures
            receipts += transaction.receipts
            if sender:
                self._suppress(transaction.unknown)
        return Sent(failures, receipts)

    def _suppress(self, unknown: dict[str, str]) -> None:
        """Rule 8. What cannot be kept is learned again with the next message."""
        if self.suppressions is None:
            return
        try:
            for recipient, reply in unknown.items():
                self.suppressions.add(recipient, reply)
        except QueueError as error:
            LOG.error("%s", error)

    def _routes(self, recipients: Sequence[str]) -> Iterator[tuple[Iterable[Server], list[str]]]:
        """The recipients of one transaction each, and the servers that may take it."""
        domains: dict[str, list[str]] = {}
        for recipient in recipients:
            domains.setdefault("" if self._finder is None else domain_of(recipient), []).append(recipient)
        for domain, group in domains.items():
            for start in range(0, len(group), RECIPIENTS_MAX):
                servers = [Server(self.hostname, self.port)] if self._finder is None else self._finder.servers(domain)
                yield servers, group[start : start + RECIPIENTS_MAX]

    def _transfer(self, servers: Iterable[Server], transaction: Transaction) -> None:
        """Rule 4: one server after the other, until one has decided."""
        until = time.monotonic() + OPENING_FACTOR * self.timeout
        try:
            for server in servers:
                if not transaction.reopen():
                    return
                self._try(server, transaction, until)
                if time.monotonic() > until:
                    return
        except (Later, SMTPError) as error:  # the DNS has found none
            transaction.refuse_pending(error)

    def _try(self, server: Server, transaction: Transaction, until: float) -> None:
        try:
            kept = self._pool.take(server)
            if kept is not None:
                try:
                    return self._run(kept, transaction, kept=True)
                except Stale:
                    pass  # what else waits is probably dead as well: a fresh one decides
            return self._run(self._connect(server, until), transaction, kept=False)
        except (OSError, smtplib.SMTPException) as error:
            later = Later(f"relay {server}: {_trouble(error)}")
            later.__cause__ = error
            transaction.refuse_pending(later)

    def _run(self, client: Client, transaction: Transaction, *, kept: bool) -> None:
        usable = False
        try:
            transaction.run(client, kept=kept)
            usable = transaction.clean or client.forget()
        finally:
            if usable:
                self._pool.keep(client)
            else:
                client.close()

    def _connect(self, server: Server, until: float | None) -> Client:
        """A connection that is ready for MAIL."""
        if self._finder is None or self.starttls:
            return self._open(server, until, _context(self.starttls))
        try:
            return self._open(server, until, _unverified())
        except HandshakeError as error:
            LOG.info("relay %s: %s; sending without TLS.", server, _trouble(error))
            return self._open(server, until, None)

    def _open(self, server: Server, until: float | None, starttls: SSLContext | None) -> Client:
        client = Client(server, self.timeout, self.debug, lmtp=self.lmtp, until=until)
        try:
            client.open(_context(self.ssl))
            client.hello()
            if starttls is not None:
                self._upgrade(client, starttls)
            if self._finder is not None and client.greets_as() == client.local_hostname.lower():
                raise SMTPError(554, f"5.4.6 {server} is this host itself, which has no route for it")
            if self.username is not None and self.password is not None:
                client.log_in(self.username, self.password)
        except BaseException:
            client.close()
            raise
        client.until = None
        return client

    def _upgrade(self, client: Client, context: SSLContext) -> None:
        """TLS; where it is not a must, only if the server has it."""
        if self.starttls:
            return client.upgrade(context)
        if client.has_extn("starttls"):
            try:
                return client.upgrade(context)
            except smtplib.SMTPResponseException as error:
                LOG.info("relay %s: %s; sending without TLS.", client.server, _trouble(error))
        return None


def _envelope(message: Deliverable, To: str | Iterable[str] | None, From: str | None) -> tuple[str, list[str], bytes]:
    """Who sends which bytes to whom."""
    if isinstance(message, mail.MailResponse):
        sender, recipients, data = message.sender, message.recipients, message.to_bytes()
        if not sender and From is None:
            raise Dead("the message has no From; a bounce says From='' when it is delivered")
    else:
        request = message if isinstance(message, mail.MailRequest) else _parsed(message)
        received = request.envelope
        sender = _as_received(request.From, [received.mail_from or ""])
        recipients = [_as_received(to, received.rcpt_tos) for to in request.route_to]
        data = request.to_bytes()
    if From is not None:
        sender = "" if From in ("", "<>") else _addresses(From)[0]
    if To:
        recipients = [address for text in ([To] if isinstance(To, str) else To) for address in _addresses(text)]
    return sender, list(dict.fromkeys(recipients)), data


def _not_to_be_answered(message: Deliverable) -> mail.MailRequest | None:
    """The message that a program has written this one because of, if no program may answer that."""
    if not isinstance(message, mail.MailResponse) or message.original is None or not message.is_automatic:
        return None
    return None if message.original.may_be_answered else message.original


def _others(original: mail.MailRequest, recipients: Sequence[str]) -> list[str]:
    """Those of the recipients who did not write the original, which is not to be answered."""
    others = [to for to in recipients if canonical(to) not in original.writers]
    if not others or len(others) < len(recipients):
        why = "an automatic reply" if original.From else "the null sender"
        LOG.info("Not replying to a message from %s to %r.", why, original.To)
    return others


def _parsed(message: Message | bytes | str) -> mail.MailRequest:
    data = message.as_bytes() if isinstance(message, Message) else message
    return mail.MailRequest(None, None, None, data)


def _as_received(address: str, spellings: Sequence[str]) -> str:
    """The address with its case as the envelope has it: the local part may mind (RFC 5321 section 2.4)."""
    return next((spelling for spelling in spellings if mail.bare_address(spelling) == address), address)


def _addresses(text: str) -> list[str]:
    """The addresses in what a caller gave; what is none stays, so that it is reported."""
    return [text] if mail.is_path_address(text) else (mail.addresses_in(text) or [text])


def _request(
    sender: str, recipients: Sequence[str], data: bytes, kept: mail.Envelope | None, trace: str
) -> mail.MailRequest:
    """The message for a queue, by rule 9; it is there since now."""
    envelope = mail.Envelope(sender, tuple(recipients), None, clock.now(), trace=trace)
    if kept is not None:
        envelope = structs.replace(kept, mail_from=sender, rcpt_tos=tuple(recipients), received=clock.now())
    return mail.MailRequest(None, sender, list(recipients), data, envelope=envelope)


def _trouble(error: BaseException) -> str:
    """What happened, in a few words."""
    if isinstance(error, HandshakeError) and error.__cause__ is not None:
        return f"TLS: {_trouble(error.__cause__)}"
    if isinstance(error, SSLCertVerificationError):
        return f"its certificate is not accepted: {one_line(error.verify_message)}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    # smtplib hides a time-out behind "Server not connected".
    if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):
        return "timed out"
    if isinstance(error, smtplib.SMTPAuthenticationError):
        return f"the login was refused: {error.smtp_code} {one_line(error.smtp_error)}"
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {one_line(error.smtp_error)}"
    if isinstance(error, smtplib.SMTPServerDisconnected | ConnectionError):
        return "connection lost"
    return one_line(str(error)) or type(error).__name__


def _context(given: bool | SSLContext) -> SSLContext | None:
    return given if isinstance(given, SSLContext) else _verified() if given else None


@functools.cache
def _verified() -> SSLContext:
    """The system's authorities; read once, because that takes longer than a message."""
    return create_default_context()


@functools.cache
def _unverified() -> SSLContext:
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = CERT_NONE
    return context
