"""The fields that whoever takes a message puts on top of it (RFC 5321 section 4.4): Received, Return-Path,
Delivered-To.

Rules:

1. Pure functions: bytes come out, nothing is asked and nothing is changed.
2. Whatever a client said is reduced to characters that end no line, open no comment and close no bracket.
3. An address is written if it is one; what is none is left out.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache

from lamsonq.address import is_path_address
from lamsonq.envelope import Envelope, restored

HOPS_MAX = 100
"""A message with more Received fields goes round in circles (RFC 5321 section 6.3): 554 5.4.6."""

_WORD_MAX = 255
_not_in_word = re.compile(r"[^A-Za-z0-9._:+=/\[\]-]")
_received = re.compile(rb"\nreceived[ \t]*:")
_block_end = re.compile(rb"\n\r?\n")


def protocol_word(base: str = "ESMTP", *, tls: bool = False, login: bool = False, utf8: bool = False) -> str:
    """The word behind `with` (RFC 3848; with SMTPUTF8, RFC 6531 section 4.3): `base` is SMTP, ESMTP or LMTP.

    TLS and a login can only be had after EHLO or LHLO, so SMTP with either is ESMTP.
    """
    if base == "SMTP" and (tls or login or utf8):
        base = "ESMTP"
    if utf8:
        base = "UTF8LMTP" if base == "LMTP" else "UTF8SMTP"
    return base + "S" * tls + "A" * login


def received_field(envelope: Envelope, hostname: str, id: str, protocol_word: str) -> bytes:
    """Who gave us this message, how and when. `for` only where there is one recipient: no others are told of him."""
    peer = _literal(str(envelope.peer[0])) if isinstance(envelope.peer, tuple) and envelope.peer else ""
    lines = [f"Received: from {_word(envelope.helo)}" + (f" ({peer})" if peer else "")]
    lines.append(f" by {_word(hostname)} with {_word(protocol_word)} id {_word(id)}")
    if len(envelope.rcpt_tos) == 1 and _is_recipient(envelope.rcpt_tos[0]):
        lines.append(f" for <{envelope.rcpt_tos[0]}>")
    lines[-1] += ";"
    lines.append(f" {_date(int(envelope.received or time.time()))}")
    return "".join(f"{line}\r\n" for line in lines).encode()


def return_path_field(envelope: Envelope) -> bytes:
    """Where a message came from, for its final delivery; b"" where nobody recorded a sender."""
    if envelope.mail_from is None:
        return b""
    address = envelope.mail_from if is_path_address(envelope.mail_from) else ""
    return f"Return-Path: <{address}>\r\n".encode()


def delivered_to_field(recipient: str) -> bytes:
    """Whom a message was delivered to; b"" where that is no address."""
    return f"Delivered-To: {recipient}\r\n".encode() if _is_recipient(recipient) else b""


def trace_block(sender: str | None, recipients: tuple[str, ...], metadata: Mapping[str, str]) -> bytes:
    """The fields on top of a message where it lies, as its job's record has them; b"" where no receiver wrote any."""
    envelope = restored(sender, recipients, None, 0.0, metadata)
    if not envelope.trace:
        return b""
    delivered = delivered_to_field(recipients[0]) if len(recipients) == 1 else b""
    return return_path_field(envelope) + delivered + envelope.trace.encode("utf-8", "replace")


def hops(data: bytes) -> int:
    """How many Received fields stand in the header of a message (RFC 5321 section 6.3).

    Every message is looked through: in lower case and with a line end in front, that takes a tenth of the time.
    """
    if data.startswith((b"\n", b"\r\n")):
        return 0
    end = _block_end.search(data)
    return len(_received.findall(b"\n" + (data[: end.start()] if end else data).lower()))


def _word(text: str) -> str:
    """The text as one word in a Received field, whatever it was; `unknown` where it is empty."""
    return _not_in_word.sub("?", text[:_WORD_MAX]) or "unknown"


@lru_cache(256)
def _literal(address: str) -> str:
    """The address of a client as RFC 5321 section 4.1.3 writes it; "" for what is no address."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    mapped = getattr(known, "ipv4_mapped", None) or known
    return f"[{mapped}]" if mapped.version == 4 else f"[IPv6:{mapped}]"


@lru_cache(2)
def _date(second: int) -> str:
    return format_datetime(datetime.fromtimestamp(second, UTC))


def _is_recipient(address: str) -> bool:
    return is_path_address(address) or address.lower() == "postmaster"
