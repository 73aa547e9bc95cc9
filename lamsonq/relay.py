"""Mail on its way out: `Relay` hands messages to a smarthost over SMTP.

Rules:

1. A message leaves with its envelope, not with what its headers say: a `MailRequest` with the sender and the
   recipient that it was received with, a `MailResponse` to everyone in To, Cc and Bcc.
2. Nothing is swallowed. Who did not get the message stands in the `Undelivered` that `deliver` raises;
   everyone else has got it. What the server refused is an `SMTPError` with its words; whatever went wrong on
   the way there (connection, TLS, login, time-out) is a `Later`, because the message is not at fault.
3. Connections are kept for the next message. One that died while it waited is replaced, once, before the
   server has accepted anything of this message; never afterwards.
"""

from __future__ import annotations

import logging
import os
import smtplib
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from ssl import SSLContext, create_default_context

from lamsonq import mail
from lamsonq.errors import Dead, Failure, Later, SettingsError, Undelivered
from lamsonq.transaction import Stale, Transaction, for_the_wire, one_line

IDLE_MAX = 30.0
"""Seconds for which a connection waits for the next message; servers close theirs after a few minutes."""

POOL_MAX = 10
"""How many connections wait for the next message."""

Deliverable = mail.MailRequest | mail.MailResponse | Message | bytes | str


@dataclass(frozen=True, slots=True)
class _Idle:
    client: smtplib.SMTP
    since: float
    pid: int


class Relay:
    """Gives messages to the mail server at `host`:`port`; with `deliver=`, to that callable instead.

    `ssl` speaks TLS from the start, `starttls` upgrades; both check the server's certificate against the
    system's authorities, or against the `SSLContext` that is given in place of True. `debug` above 0 prints
    the session to stderr. `timeout` is in seconds, for connecting and for each reply. Raises TypeError for
    `ssl` together with `starttls`, and SettingsError without a host.
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
        *,
        deliver: Callable[[mail.MailRequest], object] | None = None,
        timeout: float = 30.0,
    ) -> None:
        if ssl and starttls:
            raise TypeError("Relay takes ssl or starttls, not both: ssl is TLS from the first byte")
        if not host and deliver is None:
            raise SettingsError("Relay has no host: name the server that takes your mail, host='127.0.0.1'")
        self.hostname = host or ""
        self.port = port
        self.username = username
        self.password = password
        self.ssl = ssl
        self.starttls = starttls
        self.debug = debug
        self.timeout = timeout
        self._hand_over = deliver
        self._idle: deque[_Idle] = deque()

    def __repr__(self) -> str:
        return f"<Relay to ({self.hostname}:{self.port})>"

    def deliver(self, message: Deliverable, To: str | Iterable[str] | None = None, From: str | None = None) -> None:
        """Send a message to `To` from `From`, or else to and from whom its envelope names.

        Raises Undelivered, which names everyone who did not get it, and Dead for a message without
        recipients.
        """
        sender, recipients, data = _envelope(message, To, From)
        if not recipients:
            raise Dead("the message has no recipient: nothing in To, Cc or Bcc is an address")
        if self._hand_over is not None:
            self._hand_over(_request(sender, recipients, data))
            return
        failures = self._send(sender, recipients, for_the_wire(data))
        if failures:
            raise Undelivered(failures)

    def send(self, To: str, From: str, Subject: str, Body: str) -> None:
        """Build a plain message and deliver it."""
        self.deliver(mail.MailResponse(To=To, From=From, Subject=Subject, Body=Body))

    def reply(self, original: mail.MailRequest, From: str, Subject: str, Body: str) -> None:
        """Answer a message, in its thread. The null sender gets no answer (RFC 5321 section 4.5.5)."""
        if not original.From:
            logging.info("Not replying to a message from the null sender to %r.", original.To)
            return
        response = mail.MailResponse(To=original.From, From=From, Subject=Subject, Body=Body)
        response.in_reply_to(original)
        self.deliver(response)

    def configure_relay(self, hostname: str) -> smtplib.SMTP:
        """A new connection to `hostname`, greeted, encrypted and logged in as this relay is configured.

        Raises OSError or smtplib.SMTPException.
        """
        # smtplib would ask the DNS for our name unless it is given one; the right one is known once
        # connected.
        if self.ssl:
            client: smtplib.SMTP = smtplib.SMTP_SSL(
                hostname, self.port, "localhost", timeout=self.timeout, context=_context(self.ssl)
            )
        else:
            client = smtplib.SMTP(hostname, self.port, "localhost", timeout=self.timeout)
        try:
            client.set_debuglevel(self.debug)
            client.local_hostname = _own_name(client)
            client.ehlo_or_helo_if_needed()
            if self.starttls:
                client.starttls(context=_context(self.starttls))
                client.ehlo_or_helo_if_needed()
            if self.username is not None and self.password is not None:
                client.login(self.username, self.password)
        except BaseException:
            client.close()
            raise
        return client

    def close(self) -> None:
        """Say goodbye on the connections that wait. The relay can be used again afterwards."""
        while (client := self._take()) is not None:
            _quit(client)

    def _send(self, sender: str, recipients: Sequence[str], data: bytes) -> list[Failure]:
        """One message to one server; what failed, per recipient."""
        if sender and not mail.is_path_address(sender):
            return [Failure(to, None, Dead(f"not an address to send from: {sender!r}")) for to in recipients]
        good = [to for to in recipients if mail.is_path_address(to)]
        failures = [Failure(to, None, Dead(f"not an address: {to!r}")) for to in recipients if to not in good]
        if good:
            transaction = Transaction(sender, good, data, self.timeout)
            try:
                self._transfer(transaction)
            except (OSError, smtplib.SMTPException) as error:
                later = Later(f"relay {self.hostname}:{self.port}: {_trouble(error)}")
                later.__cause__ = error
                transaction.refuse_pending(later)
            failures += transaction.failures
        return failures

    def _transfer(self, transaction: Transaction) -> None:
        kept = self._take()
        if kept is not None:
            try:
                return self._run(kept, transaction, kept=True)
            except Stale:
                pass  # what else waits is probably dead as well: a fresh one decides
        return self._run(self.configure_relay(self.hostname), transaction, kept=False)

    def _run(self, client: smtplib.SMTP, transaction: Transaction, *, kept: bool) -> None:
        usable = False
        try:
            transaction.run(client, kept=kept)
            usable = transaction.clean or _reset(client)
        finally:
            if usable:
                self._keep(client)
            else:
                client.close()

    def _take(self) -> smtplib.SMTP | None:
        """A connection that waits and is fresh enough, if there is one. A deque needs no lock, so a fork
        cannot leave one locked."""
        while self._idle:
            try:
                idle = self._idle.pop()
            except IndexError:  # another thread took it
                break
            if idle.pid == os.getpid() and time.monotonic() - idle.since < IDLE_MAX:
                return idle.client
            idle.client.close()  # a forked child closes its copy only: the parent's connection lives on
        return None

    def _keep(self, client: smtplib.SMTP) -> None:
        if len(self._idle) < POOL_MAX:
            self._idle.append(_Idle(client, time.monotonic(), os.getpid()))
        else:
            _quit(client)


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


def _parsed(message: Message | bytes | str) -> mail.MailRequest:
    data = message.as_bytes() if isinstance(message, Message) else message
    return mail.MailRequest(None, None, None, data)


def _as_received(address: str, spellings: Sequence[str]) -> str:
    """The address with its case as the envelope has it: the local part may mind (RFC 5321 section 2.4)."""
    return next((spelling for spelling in spellings if mail.bare_address(spelling) == address), address)


def _addresses(text: str) -> list[str]:
    """The addresses in what a caller gave; what is none stays, so that it is reported."""
    return [text] if mail.is_path_address(text) else (mail.addresses_in(text) or [text])


def _request(sender: str, recipients: Sequence[str], data: bytes) -> mail.MailRequest:
    envelope = mail.Envelope(sender, tuple(recipients), None, time.time())
    return mail.MailRequest(None, sender, list(recipients), data, envelope=envelope)


def _trouble(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    # smtplib hides a time-out behind "connection unexpectedly closed".
    if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):
        return "timed out"
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return "connection lost"
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {one_line(error.smtp_error)}"
    return one_line(str(error)) or type(error).__name__


def _context(given: bool | SSLContext) -> SSLContext:
    return given if isinstance(given, SSLContext) else create_default_context()


def _own_name(client: smtplib.SMTP) -> str:
    """How we greet (RFC 5321 section 4.1.4): the host's full name, else the address that we come from."""
    name = socket.gethostname()
    if "." in name or client.sock is None:
        return name
    address = str(client.sock.getsockname()[0])
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def _reset(client: smtplib.SMTP) -> bool:
    """Forget the transaction (RFC 5321 section 4.1.1.5); False when the connection is of no more use."""
    try:
        return client.rset()[0] == 250
    except (OSError, smtplib.SMTPException):
        return False


def _quit(client: smtplib.SMTP) -> None:
    """Say goodbye without waiting for the answer."""
    try:
        client.putcmd("QUIT")
    except (OSError, smtplib.SMTPException):
        pass  # it is gone already
    finally:
        client.close()
