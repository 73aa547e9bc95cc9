"""What the sendmail command submits: a message from standard input, made complete, and its envelope.

Rules:

1. Every recipient counts: one that cannot be read stops the whole, before anything is sent.
2. A name without a domain is a user of this machine (RFC 6409 section 8 lets a submission agent complete it).
3. What is missing is added: Date, Message-ID, From (RFC 6409 section 8). Bcc is removed. Every other byte
   stays, but for a separator line of an mbox in front, and line ends where both kinds are mixed.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from email.utils import format_datetime, localtime
from pathlib import Path
from typing import BinaryIO

from lamsonq.address import is_path_address, mailboxes_in
from lamsonq.headers import TOO_LARGE, HeaderBlock, undecoded
from lamsonq.mail import MailRequest

RECIPIENT_HEADERS = ("to", "cc", "bcc")
MAILNAME = Path("/etc/mailname")
"""Debian's file with the domain that local mail comes from."""


def read_message(stream: BinaryIO, *, dot_ends: bool) -> bytes:
    """What stands on standard input, up to its end or, as sendmail has it, up to a line with only a dot."""
    return b"".join(_before_dot(stream)) if dot_ends else stream.read()


def _before_dot(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line in (b".\n", b".\r\n", b"."):
            return
        yield line


def request_of(data: bytes) -> MailRequest:
    """The message with an empty line between header and body. Raises ValueError for a header that is too large."""
    if data.startswith(b"From "):
        data = data.partition(b"\n")[2]
    if data.count(b"\r\n") != data.count(b"\n"):
        data = data.replace(b"\r\n", b"\n")
    block = HeaderBlock(data)
    if TOO_LARGE in block.defects:
        raise ValueError("the header is too large to be read")
    end = block.fields_end
    if not data.startswith((b"\n", b"\r\n"), end):
        gap = block.line_end().encode()
        data = data[:end] + (gap if data[:end].endswith(b"\n") or not end else gap * 2) + data[end:]
    return MailRequest(None, None, None, data)


def addresses_of(texts: Iterable[str], host: str) -> list[str]:
    """The addresses in these lists, complete, once each. Raises ValueError that names what is none."""
    found = [_complete(mailbox.path, mailbox.address, mailbox.name, host) for t in texts for mailbox in mailboxes_in(t)]
    return list(dict.fromkeys(found))


def _complete(path: str, address: str, name: str, host: str) -> str:
    local = f"{path}@{host}"
    if not address and "@" not in path and is_path_address(local):
        return local
    if not address:
        raise ValueError(f"{' '.join(filter(None, (name, path)))!r} is no address")
    return address


def recipients_in_header(request: MailRequest, host: str) -> list[str]:
    """Who stands in To, Cc and Bcc; in a message that was sent on, in Resent-To, Resent-Cc and Resent-Bcc (RFC 5322
    section 3.6.6). Raises ValueError."""
    block = HeaderBlock(request.Data)
    resent = any(field.name.lower().startswith("resent-") for field in block.fields)
    names = [f"resent-{name}" for name in RECIPIENT_HEADERS] if resent else RECIPIENT_HEADERS
    fields = [field for name in names for field in block.named(name)]
    if any(field.end - field.value > len(block.raw(field)) + 1024 for field in fields):
        raise ValueError("a list of recipients is too long to be read")
    return addresses_of((undecoded(block.raw(field)) for field in fields), host)


def make_complete(request: MailRequest, sender: str, name: str) -> None:
    """Add what a message has to have, and take out whom it must not name. Raises ValueError for a name with a control
    character in it."""
    if "from" not in request:
        quoted = re.sub(r'(["\\\\])', r"\\\1", name)
        request["From"] = f'"{quoted}" <{sender}>' if name else sender
    if "date" not in request:
        request["Date"] = format_datetime(localtime())
    if "message-id" not in request:
        request["Message-ID"] = f"<{secrets.token_hex(16)}@{sender.rpartition('@')[2]}>"
    for field in ("bcc", "resent-bcc"):
        if field in request:
            del request[field]


def host_name() -> str:
    """The domain of this machine's users."""
    try:
        named = MAILNAME.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    return next((name for name in (named, socket.gethostname()) if is_path_address(f"root@{name}")), "localhost")


def user_name() -> str:
    """Who runs us."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid{os.getuid()}"


def full_name() -> str:
    """The full name of who runs us: of the environment, or of the user's entry ("&" is the name, as in finger)."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        return _readable(os.environ.get("NAME", ""))
    gecos = entry.pw_gecos.partition(",")[0].replace("&", entry.pw_name.capitalize())
    return _readable(os.environ.get("NAME") or gecos)


def _readable(name: str) -> str:
    """A name that nobody gave for this message must not keep it from being sent, whatever character set it is in."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(letter for letter in text if letter.isprintable())
