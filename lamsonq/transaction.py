"""One MAIL, RCPT..., DATA as a client (RFC 5321 section 3.3; RFC 2033 for LMTP), recipient by recipient.

Rules:

1. What goes out as an address was checked by our own grammar; smtplib's would rewrite it.
2. Bytes are not rewritten: a line that begins with a dot gets another (RFC 5321 section 4.5.2), and the last line its
   end. A bare CR or LF, which RFC 5321 section 2.3.8 forbids, goes out as it came in (a server that minds refuses
   it, and that is reported), with two exceptions: a message without any CRLF, which is in this system's form, and one
   with a lone dot that a lax server could take for the end of data. There each bare LF becomes CRLF; a bare CR becomes
   CRLF in the body, where some take it for a line end already, and a space in the header, so that no value makes a
   field.
3. Each recipient's fate is noted as soon as it is known, so that a connection that breaks later takes only
   the undecided with it. LMTP answers for each recipient by itself, and what it answers counts.
4. Until the final dot is sent, another server may be asked for those who were put off; from then on nobody may,
   because the message may have arrived (RFC 1047).
5. All from MAIL to the final dot has one deadline, so that a server that is always just in time holds nobody for long.
6. What the sender wants to be told goes on to a server that offers DSN (RFC 3461 section 5.2.1), which answers for it
   from then on. Only what has that RFC's grammar goes out.
"""

from __future__ import annotations

import re
import smtplib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lamsonq.connection import Client
from lamsonq.envelope import UNASKED, Notify
from lamsonq.errors import Failure, Later, Receipt, SMTPError

FINAL_REPLY_FACTOR = 4
"""The reply to a whole message may take this many time-outs: giving up early makes duplicates (RFC 1047)."""

SENDING_FACTOR = 20
"""Everything from MAIL to the final dot may take this many time-outs: ten minutes, with 30 seconds each."""

_CHUNK = 1 << 16
_HEADER_END = re.compile(rb"(?:\A|\n)\r?\n")
_LONE_DOT = re.compile(rb"(?:\A|[\r\n])\.(?:[\r\n]|\Z)")

# RFC 3461 sections 4.1 to 4.4: what these parameters may hold.
_XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+"
_ret = re.compile("FULL|HDRS", re.IGNORECASE)
_envid = re.compile(rf"(?=.{{1,100}}\Z){_XTEXT}")
_notify = re.compile("NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY))*", re.IGNORECASE)
_orcpt = re.compile(rf"(?=.{{1,500}}\Z)[A-Za-z0-9-]+;{_XTEXT}")
_unknown_status = re.compile(r"5\.1\.(?:1|2|3|6|10)\b")


class Stale(Exception):
    """A kept connection that the server has given up: nothing of the message was accepted on it."""


def _as_it_is(address: str) -> str:
    return address


@dataclass(slots=True)
class Transaction:
    """A message (`data` as `for_the_wire` makes it) on its way to its recipients; `timeout` in seconds for a
    reply. `lmtp` expects a reply for each recipient; `spelled` gives an address as it goes over the wire. `notify` is
    what the sender wants to be told.

    `pending` are the recipients whose fate is open, `failures` those that were refused, `receipts` those who have got
    the message. `unknown` are the ones among the failures whose address does not exist, as the server said at RCPT (RFC
    3463, 5.1.x). `clean` says that the server needs no RSET afterwards, `handed_over` that the final dot was sent.
    """

    sender: str
    pending: list[str]
    data: bytes
    timeout: float
    lmtp: bool = False
    spelled: Callable[[str], str] = _as_it_is
    notify: Notify = UNASKED
    failures: list[Failure] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    clean: bool = False
    handed_over: bool = False
    _server: str = ""
    _reports: bool = False

    def run(self, client: Client, *, kept: bool) -> None:
        """Hand the message over. Raises Stale when a kept connection was dead from the start, and OSError or
        smtplib.SMTPException when a connection breaks later."""
        self.clean = False
        client.until = time.monotonic() + SENDING_FACTOR * self.timeout
        try:
            self._run(client, kept)
        finally:
            client.until = None

    def _run(self, client: Client, kept: bool) -> None:
        self._server = client.server.name
        self._reports = client.has_extn("dsn")
        utf8 = client.has_extn("smtputf8")
        if not utf8:
            self._refuse_non_ascii()
        if self.pending:
            client.command_encoding = "utf-8" if utf8 else "ascii"
            self._mail(client, kept)
        for recipient in list(self.pending):
            code, text = client.docmd("RCPT", f"TO:<{self.spelled(recipient)}>{self._wishes(recipient)}")
            if code not in (250, 251):
                self._refuse([recipient], error := _refusal_of_recipient(code, text), self._server)
                if 500 <= code < 600 and isinstance(error, SMTPError) and _unknown_status.match(error.message):
                    self.unknown[recipient] = str(error)
        if self.pending:
            self._content(client)

    def refuse_pending(self, error: Exception, server: str = "") -> None:
        """Nobody else gets it, for this reason; `server` is who said so."""
        self._refuse(list(self.pending), error, server)

    def reopen(self) -> bool:
        """Take up again those who were put off, for another server; False when there are none, or rule 4 forbids it."""
        if self.handed_over:
            return False
        put_off = [failure for failure in self.failures if isinstance(failure.outcome(), Later)]
        self.failures = [failure for failure in self.failures if failure not in put_off]
        self.pending += [failure.recipient for failure in put_off]
        return bool(self.pending)

    def _refuse(self, recipients: Sequence[str], error: Exception, server: str = "") -> None:
        self.failures += [Failure(recipient, None, error, server=server) for recipient in recipients]
        self.pending = [to for to in self.pending if to not in recipients]

    def _refuse_non_ascii(self) -> None:
        # RFC 6531 section 3.2: such a message cannot go to a server without the extension; the code is RFC
        # 6531's.
        for address in (self.sender, *self.pending):
            if not self.spelled(address).isascii():
                error = SMTPError(553, f"5.6.7 the relay does not offer SMTPUTF8, which {address} needs")
                self._refuse(self.pending if address is self.sender else [address], error)

    def _mail(self, client: Client, kept: bool) -> None:
        try:
            code, text = client.docmd("MAIL", f"FROM:<{self.spelled(self.sender)}>{self._options(client)}")
        except (OSError, smtplib.SMTPServerDisconnected):
            if kept:
                raise Stale from None
            raise
        if kept and code == 421:
            raise Stale
        if code != 250:
            self.refuse_pending(_refusal(code, text), self._server)

    def _options(self, client: Client) -> str:
        options = f" SIZE={len(self.data)}" if client.has_extn("size") else ""
        # A server without 8BITMIME gets the bytes as they are: it may well take them, and encoding them anew
        # would break signatures (RFC 6152 section 3 leaves only that or a bounce).
        if not self.data.isascii() and client.has_extn("8bitmime"):
            options += " BODY=8BITMIME"
        if not all(self.spelled(address).isascii() for address in (self.sender, *self.pending)):
            options += " SMTPUTF8"
        if self._reports and _ret.fullmatch(self.notify.ret):
            options += f" RET={self.notify.ret}"
        if self._reports and _envid.fullmatch(self.notify.envid):
            options += f" ENVID={self.notify.envid}"
        return options

    def _wishes(self, recipient: str) -> str:
        """The parameters of RCPT that rule 6 asks for."""
        notify, orcpt = self.notify.notify.get(recipient, ""), self.notify.orcpt.get(recipient, "")
        options = f" NOTIFY={notify}" if self._reports and _notify.fullmatch(notify) else ""
        return f"{options} ORCPT={orcpt}" if self._reports and _orcpt.fullmatch(orcpt) else options

    def _content(self, client: Client) -> None:
        code, text = client.docmd("DATA")
        if code != 354:
            return self.refuse_pending(_refusal(code, text), self._server)
        wire = _with_dots_doubled(self.data) + b".\r\n"
        for start in range(0, len(wire), _CHUNK):  # the socket's time-out is for one send, not for 30 MB
            last = start + _CHUNK >= len(wire)
            if last and not client.is_silent():  # else it would count as the reply to the whole message
                raise smtplib.SMTPServerDisconnected("the server broke in before the end of the message")
            self.handed_over = last
            client.send(wire[start : start + _CHUNK])
        client.until = None
        if not self.lmtp:
            self._settle(list(self.pending), *self._final_reply(client))
            return None
        for recipient in list(self.pending):  # RFC 2033 section 4.2: in the order of the RCPTs that were taken
            self._settle([recipient], *self._final_reply(client))
        self.clean = True
        return None

    def _settle(self, recipients: Sequence[str], code: int, text: bytes) -> None:
        self.clean = 200 <= code < 300
        if self.clean:
            self.pending = [to for to in self.pending if to not in recipients]
            self.receipts += [Receipt(to, self._server, self.lmtp, self._reports) for to in recipients]
        else:
            self._refuse(recipients, _refusal(code, text), self._server)

    def _final_reply(self, client: Client) -> tuple[int, bytes]:
        return client.getreply(self.timeout * FINAL_REPLY_FACTOR)


def for_the_wire(data: bytes) -> bytes:
    """The message with every line end that rule 2 asks for; dots are not doubled yet."""
    ends = data.count(b"\r\n")
    bare = not ends == data.count(b"\r") == data.count(b"\n")
    if bare and (not ends or _LONE_DOT.search(data)):
        data = _with_crlf(data)
    if not data or data.endswith(b"\r\n"):
        return data
    return (data[:-1] if data.endswith((b"\r", b"\n")) else data) + b"\r\n"


def _with_crlf(data: bytes) -> bytes:
    """Rule 2's exceptions. Whole-message replaces: a regex substitution would hold an object for each line."""
    found = _HEADER_END.search(data)
    start = found.start() if found else len(data)
    header = data[:start].replace(b"\r\n", b"\n").replace(b"\r", b" ")
    body = data[start:].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return (header + body).replace(b"\n", b"\r\n")


def _with_dots_doubled(data: bytes) -> bytes:
    data = data.replace(b"\r\n.", b"\r\n..")
    return b"." + data if data.startswith(b".") else data


def one_line(text: bytes | str) -> str:
    """A server's words, in one line; what is not printable, such as a terminal's controls, is shown as "?"."""
    words = " ".join((text.decode("utf-8", "replace") if isinstance(text, bytes) else text).split())
    return "".join(char if char.isprintable() else "?" for char in words)


def _refusal_of_recipient(code: int, text: bytes) -> Exception:
    # RFC 5321 section 4.5.3.1.10: 552 may mean "too many recipients", which passes. Not so where an enhanced code (RFC
    # 3463) says that the mailbox is full or the message too long.
    if code == 552 and not text.startswith((b"5.2.2", b"5.2.3", b"5.3.4")):
        return Later(f"{code} {one_line(text)}")
    return _refusal(code, text)


def _refusal(code: int, text: bytes) -> Exception:
    """What the server said, as an exception; a reply that makes no sense is worth another try."""
    if 400 <= code < 600:
        return SMTPError(code, one_line(text))
    return Later(f"unexpected reply: {code} {one_line(text)}")
