"""Delivery status notifications as we write them (RFC 3464, RFC 6522, RFC 6533). lamsonq/dsn.py reads other people's.

Rules:

1. What a server, a sender or a message says may hold anything: each text becomes one printable line with an end, so
   that it can be no field of its own, and no part of the report but its own.
2. The report itself is ASCII: an address that is not stands in the form of RFC 6533 section 3 (`utf-8; j\\x{F6}@x`),
   which every mail system can pass on. The text for people is UTF-8.
3. The header of the message comes back, or all of it where RET=FULL asks for that (RFC 3461 section 4.3) and something
   has failed; never more than RETURNED_MAX octets.
4. It says that a program wrote it (Auto-Submitted, RFC 3834 section 5), and goes out from the null sender.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime

from lamsonq.headers import HeaderBlock, message_ids, undecoded, written

RETURNED_MAX = 1024 * 1024
HEADER_MAX = 64 * 1024
DIAGNOSTIC_MAX = 900
"""Characters of what a server said; a line of a message takes 998 octets."""

LINE_MAX = 998

FAILED, DELAYED, RELAYED, DELIVERED = "failed", "delayed", "relayed", "delivered"

_xtext = re.compile(r"\+([0-9A-Fa-f]{2})")
_not_qchar = re.compile(r"[^!-*,-<>-\[\]-~]")
_SUBJECTS = {
    FAILED: "Undelivered mail returned to sender",
    DELAYED: "Delayed mail (still being retried)",
    RELAYED: "Successful mail delivery report",
}
_OPENINGS = {
    FAILED: "Your message could not be delivered to",
    DELAYED: "Your message could not be delivered yet. It is tried again; you need not send it anew.\n\nIt waits for",
    DELIVERED: "Your message was delivered to",
    RELAYED: "Your message was passed on, to a mail system that may send no further reports, for",
}


@dataclass(frozen=True, slots=True)
class Fate:
    """What is reported of one recipient: a block of the report (RFC 3464 section 2.3).

    `action` is a word of section 2.3.3, `status` an enhanced code, `diagnostic` what was said: by the mail system
    `server`, or by ourselves where that is "". `original` is ORCPT as it was given. `retry_until` is seconds since the
    epoch, None where it is not tried again.
    """

    recipient: str
    action: str
    status: str
    diagnostic: str = ""
    server: str = ""
    original: str = ""
    retry_until: float | None = None


def notification(
    data: bytes,
    to: str,
    fates: Sequence[Fate],
    *,
    author: str,
    reporting: str,
    arrived: float,
    now: float,
    envid: str = "",
    full: bool = False,
    key: str = "",
) -> bytes:
    """The report about the message `data` to its sender `to`, as it goes over the wire.

    `author` is the address of its From, `reporting` the name of this mail system; `arrived` and `now` are seconds since
    the epoch, `envid` is ENVID as it was given, `full` returns the whole message, `key` is what our logs call it.
    """
    worst = next(action for action in (FAILED, DELAYED, RELAYED, DELIVERED) if any(f.action == action for f in fates))
    boundary = f"=_{secrets.token_hex(12)}"
    returned_type, returned = _returned(data, full=full and worst == FAILED)
    parts = [
        ("text/plain; charset=utf-8", "Notification", _text(fates, reporting).encode()),
        ("message/delivery-status", "Delivery report", _status(fates, reporting, arrived, now, envid, key)),
        (returned_type, "Undelivered message" if worst in (FAILED, DELAYED) else "Delivered message", returned),
    ]
    eight_bit = any(not content.isascii() for _, _, content in parts) or not to.isascii()
    header = [
        written("From", f"Mail Delivery System <{author}>"),
        written("To", to),
        written("Subject", _SUBJECTS.get(worst, _SUBJECTS[RELAYED])),
        written("Date", _date(now)),
        written("Message-ID", f"<{secrets.token_hex(12)}@{reporting if reporting.isascii() else 'localhost'}>"),
        *_thread(data),
        written("Auto-Submitted", "auto-replied"),
        written("MIME-Version", "1.0"),
        written("Content-Type", f'multipart/report; report-type=delivery-status; boundary="{boundary}"'),
        *([written("Content-Transfer-Encoding", "8bit")] if eight_bit else []),
    ]
    body = [b"\r\nThis is a MIME-encapsulated message.\r\n"]
    for kind, description, content in parts:
        encoding = "7bit" if content.isascii() else "8bit"
        body.append(
            f"\r\n--{boundary}\r\nContent-Description: {description}\r\nContent-Type: {kind}\r\n"
            f"Content-Transfer-Encoding: {encoding}\r\n\r\n".encode()
        )
        body.append(content)
    return b"".join([*(line.encode() for line in header), *body, f"\r\n--{boundary}--\r\n".encode()])


def typed_address(address: str) -> str:
    """An address with its type, as the fields of a report have it (RFC 3464 section 2.3, RFC 6533 section 3)."""
    if address.isascii():
        return f"rfc822; {_line(address, LINE_MAX // 2)}"
    escaped = _not_qchar.sub(lambda found: f"\\x{{{ord(found[0]):X}}}", _line(address, 400))
    return f"utf-8; {escaped}"


def _status(fates: Sequence[Fate], reporting: str, arrived: float, now: float, envid: str, key: str) -> bytes:
    message = [("Original-Envelope-Id", _decoded(envid)), ("Reporting-MTA", f"dns; {reporting}")]
    message += [("X-Lamsonq-Queue-Id", key), ("Arrival-Date", _date(arrived) if arrived else "")]
    blocks = [_fields(message)]
    for fate in fates:
        kind, said = ("smtp" if fate.server else "x-lamsonq"), fate.diagnostic
        blocks.append(
            _fields(
                [
                    ("Original-Recipient", _original(fate.original)),
                    ("Final-Recipient", typed_address(fate.recipient)),
                    ("Action", fate.action),
                    ("Status", fate.status),
                    ("Remote-MTA", f"dns; {fate.server}" if fate.server and not fate.server.startswith("/") else ""),
                    ("Diagnostic-Code", f"{kind}; {said}" if said else ""),
                    ("Last-Attempt-Date", _date(now)),
                    ("Will-Retry-Until", _date(fate.retry_until) if fate.retry_until is not None else ""),
                ]
            )
        )
    return "\r\n".join(blocks).encode("ascii")


def _fields(fields: Iterable[tuple[str, str]]) -> str:
    return "".join(written(name, _ascii(value)) for name, value in fields if value)


def _text(fates: Sequence[Fate], reporting: str) -> str:
    lines = [f"This is the mail system at {_line(reporting, 255)}.", ""]
    for action in (FAILED, DELAYED, DELIVERED, RELAYED):
        told = [fate for fate in fates if fate.action == action]
        if not told:
            continue
        lines += [*f"{_OPENINGS[action]}:".split("\n"), ""]
        for fate in told:
            by = f"{_line(fate.server, 255)} said: " if fate.server and not fate.server.startswith("/") else ""
            said = _line(fate.diagnostic, DIAGNOSTIC_MAX // 4) if fate.diagnostic else ""
            lines.append(f"    <{_line(fate.recipient, 330)}>{f': {by}{said}' if said else ''}")
        if action == FAILED and any(fate.status.startswith("4") for fate in told):
            lines += ["", "It was tried for as long as we try; this was the last time."]
        until = max((fate.retry_until for fate in told if fate.retry_until is not None), default=None)
        if until is not None:
            lines += ["", f"It is tried until {_date(until)}."]
        lines.append("")
    lines.append("A report for programs, and what is returned of the message, are attached.")
    return "\r\n".join(lines) + "\r\n"


def _returned(data: bytes, *, full: bool) -> tuple[str, bytes]:
    """The type and the octets of what comes back (rule 3)."""
    block = HeaderBlock(data)
    if full and len(data) <= RETURNED_MAX and b"\0" not in data and not _has_long_line(data):
        header = _with_crlf(data[: block.fields_end], b" ")
        whole = header + b"\r\n" + _with_crlf(data[block.body :], b"\n")
        return ("message/rfc822" if header.isascii() else "message/global"), whole
    kept, size = [], 0
    for field in block.fields:
        piece = data[field.start : field.end]
        if size + len(piece) > HEADER_MAX or _has_long_line(piece):
            continue
        kept.append(piece if piece.endswith(b"\n") else piece + b"\r\n")
        size += len(piece)
    header = _with_crlf(b"".join(kept), b" ").replace(b"\0", b"?")
    try:
        header.decode()
    except UnicodeDecodeError:
        header = header.decode("ascii", "replace").replace("\ufffd", "?").encode()
    return ("text/rfc822-headers" if header.isascii() else "message/global-headers"), header


def _has_long_line(data: bytes) -> bool:
    return re.search(rb"[^\n]{999}", data) is not None


def _with_crlf(data: bytes, bare: bytes) -> bytes:
    """The lines with CRLF; a bare CR becomes `bare`, so that no reader takes it for the end of a field."""
    return data.replace(b"\r\n", b"\n").replace(b"\r", bare).replace(b"\n", b"\r\n")


def _thread(data: bytes) -> Iterator[str]:
    block = HeaderBlock(data)
    for field in block.named("message-id")[:1]:
        for found in message_ids(undecoded(block.raw(field)[:LINE_MAX])):
            yield written("In-Reply-To", found)
            yield written("References", found)
            return


def _original(orcpt: str) -> str:
    """The original recipient as the report has it: its type, and its xtext undone (RFC 3461 section 5.3.1)."""
    kind, _, address = orcpt.partition(";")
    return f"{kind}; {_decoded(address)}" if address else ""


def _decoded(xtext: str) -> str:
    return _line(_xtext.sub(lambda found: chr(int(found[1], 16)), xtext), 500)


def _line(text: str, limit: int) -> str:
    """Rule 1: one printable line."""
    words = " ".join(text[: 4 * limit].split())
    return "".join(c if c.isprintable() else "?" for c in words)[:limit]


def _ascii(text: str) -> str:
    """Rules 1 and 2."""
    return _line(text, DIAGNOSTIC_MAX).encode("ascii", "replace").decode()


def _date(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(seconds, UTC))
