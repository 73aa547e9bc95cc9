"""The messages that users see: `MailRequest`, which came in, and `MailResponse`, which goes out.

Rules:

1. The bytes of a request are never rewritten: `to_bytes()` is what came in, except for the header fields that a handler
   set or deleted.
2. Nothing is parsed before somebody asks. The envelope decides where a message goes; headers are looked at only
   for what nobody recorded.
3. Reading a request never raises and is bounded in time, whatever a stranger put into it; what is wrong is listed in
   `defects`.
4. A header that cannot be written safely is refused when it is set, with ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from email.message import Message
from functools import cached_property
from typing import TYPE_CHECKING

from lamsonq.address import addresses_in, bare_address, canonical, is_path_address, parse_path, parseaddr
from lamsonq.envelope import Envelope
from lamsonq.headers import Field, HeaderBlock, check_name, check_value, shown, undecoded, written
from lamsonq.mime import Part, Tree, leaves, main_text, parse
from lamsonq.response import Attachment, MailResponse
from lamsonq.verdicts import Auth

if TYPE_CHECKING:
    from lamsonq.bounce import BounceAnalyzer

__all__ = [
    "ROUTABLE_TO_HEADER",
    "Attachment",
    "Envelope",
    "MailRequest",
    "MailResponse",
    "Part",
    "addresses_in",
    "bare_address",
    "is_path_address",
    "parse_path",
    "parseaddr",
]

ROUTABLE_TO_HEADER = "to"
"""The header that names the recipients of a message without an envelope; `delivered-to` behind Postfix."""


class _Source:
    """The bytes of one message and, once somebody asks, what is in them; shared by its copies for recipients."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.part_defects: list[str] = []
        self.undecodable: dict[str, None] = {}

    @cached_property
    def block(self) -> HeaderBlock:
        return HeaderBlock(self.data)

    @cached_property
    def tree(self) -> Tree:
        return parse(self.data, self.part_defects)

    def shown(self, field: Field) -> str:
        return self.checked(field.name, shown(field.name, self.block.raw(field)))

    def checked(self, name: str, text: str) -> str:
        """The text, which is a defect when something in it could not be decoded."""
        if "\ufffd" in text:
            self.undecodable[f"{name} holds characters that cannot be decoded"] = None
        return text


class MailRequest:
    """A message that came in.

    `Peer` is where from, `From` the sender and `To` this delivery's recipient, both bare and lower-cased; the null
    sender is "". `route_to` lists all recipients of this object, `envelope` is as received, `Data` the bytes.

    `From=None` takes the sender from Return-Path or From, no `To` takes the recipients from ROUTABLE_TO_HEADER.
    """

    def __init__(
        self,
        Peer: object,
        From: str | None,
        To: str | Sequence[str] | None,
        Data: bytes | str,
        *,
        envelope: Envelope | None = None,
    ) -> None:
        octets = Data.encode("utf-8", "surrogateescape") if isinstance(Data, str) else bytes(Data)
        recipients = (To,) if isinstance(To, str) and To else tuple(To or ())
        self.envelope = envelope or Envelope(From, recipients, Peer)
        self.Peer = Peer
        self._source = _Source(octets)
        self._edits: dict[str, tuple[str, str | None]] = {}
        sender = From if From is not None else self.envelope.mail_from
        self.From = self._header_sender() if sender is None else _sender(sender)
        self.route_to = _recipients(recipients or self.envelope.rcpt_tos) or self._addresses_of(ROUTABLE_TO_HEADER)
        self.To = self.route_to[0] if self.route_to else ""
        self.bounce: BounceAnalyzer | None = None

    def _header_sender(self) -> str:
        path = self["return-path"]
        if path is not None and re.sub(r"\s", "", path) == "<>":
            return ""
        written_in = [*self._addresses_of("return-path"), *self._addresses_of("from")]
        return next(iter(written_in), "")

    def _addresses_of(self, name: str) -> list[str]:
        block = self._source.block
        found = [address for field in block.named(name) for address in addresses_in(undecoded(block.raw(field)))]
        return list(dict.fromkeys(found))

    def addressed(self, recipient: str) -> MailRequest:
        """This message for one recipient: the same bytes, its own header edits."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        other._edits = dict(self._edits)
        other.route_to = [recipient] if recipient in self.route_to else _recipients((recipient,))
        other.To = other.route_to[0] if other.route_to else ""
        return other

    @property
    def Data(self) -> bytes:
        """The bytes as they came in."""
        return self._source.data

    @property
    def original(self) -> bytes:
        """Lamson's name for `Data`."""
        return self._source.data

    @property
    def route_from(self) -> str:
        """Lamson's name for `From`."""
        return self.From

    @property
    def auth(self) -> Auth:
        """What the receiver has found out about who really wrote this: `auth.dmarc == "pass"`, and so on."""
        return self.envelope.auth

    @property
    def defects(self) -> list[str]:
        """What is wrong with the message, as far as it has been read."""
        source = self._source
        return list(dict.fromkeys([*source.block.defects, *source.part_defects, *source.undecodable]))

    @property
    def base(self) -> Tree:
        """The standard library's view of the message as it came in; shared, so not to be changed."""
        return self._source.tree

    # Headers. `_edits` maps a lower-case name to (name, text), or (name, None) when it was deleted.

    def __getitem__(self, name: str) -> str | None:
        """The first header of this name, decoded, on one line; None when there is none.

        A message that came without From or To has the envelope's here, as Lamson wrote them into it.
        """
        text = next(self._texts(name), None)
        if text is None and (key := name.lower()) in ("from", "to") and key not in self._edits:
            return (self.From if key == "from" else self.To) or None
        return text

    def get_all(self, name: str) -> list[str]:
        """Every header of this name, decoded, in order."""
        return list(self._texts(name))

    def _texts(self, name: str) -> Iterator[str]:
        if name.lower() in self._edits:
            text = self._edits[name.lower()][1]
            yield from () if text is None else (text,)
            return
        yield from map(self._source.shown, self._source.block.named(name))

    def __setitem__(self, name: str, value: object) -> None:
        """Replace every header of this name by one, or add it; None deletes. Raises ValueError.

        One that is there keeps its place, and its name as it was written.
        """
        text = None if value is None else check_value(name, value)
        self._edits[check_name(name).lower()] = (name, text)

    def __delitem__(self, name: str) -> None:
        self[name] = None

    def __contains__(self, name: str) -> bool:
        if name.lower() in self._edits:
            return self._edits[name.lower()][1] is not None
        return bool(self._source.block.named(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The names of the headers as they are written, repeated ones repeated."""
        return [name for name, _ in self._edited_fields()]

    def items(self) -> list[tuple[str, str]]:
        """The headers in order, decoded."""
        return [
            (name, piece if isinstance(piece, str) else self._source.shown(piece))
            for name, piece in self._edited_fields()
        ]

    def _edited_fields(self) -> Iterator[tuple[str, Field | str]]:
        """The fields of the message as it leaves: those that came in, and the texts of those that were set."""
        pending = dict(self._edits)
        for found in self._source.block.fields:
            key = found.name.lower()
            if key not in self._edits:
                yield found.name, found
            elif key in pending:
                _, text = pending.pop(key)
                if text is not None:
                    yield found.name, text
        yield from ((name, text) for name, text in pending.values() if text is not None)

    # What is in it.

    def body(self) -> str | bytes:
        """The text (the first text/plain, else the first text) as str; a message without any: its first part."""
        text = main_text(self.base)
        return self._source.checked("the text", text) if isinstance(text, str) else text

    def all_parts(self) -> list[Part]:
        """The parts that hold content, in order; a message inside this one is a single part."""
        return list(leaves(self.base))

    def walk(self) -> Iterator[Part]:
        """Every part, the containers and the parts of messages inside this one included."""
        return map(Part, self.base.walk())

    def to_message(self) -> Message:
        """A parsed copy of the message, header edits included, as the standard library has it."""
        return parse(self.to_bytes())

    def to_bytes(self) -> bytes:
        """`Data` itself, or a copy in which only the headers that were set or deleted differ."""
        if not self._edits:
            return self.Data
        block = self._source.block
        start = block.fields[0].start if block.fields else block.fields_end
        before, behind = self.Data[:start], self.Data[block.fields_end :]
        line_end = block.line_end()
        lines = [
            written(name, piece, line_end).encode() if isinstance(piece, str) else self.Data[piece.start : piece.end]
            for name, piece in self._edited_fields()
        ]
        *earlier, last = [before, *lines]
        ended = [_ended(line, line_end) if line else line for line in earlier]
        if lines and not block.fields and not behind.startswith((b"\n", b"\r\n")):
            last += line_end.encode()
        return b"".join([*ended, last, behind])

    __bytes__ = to_bytes

    def __str__(self) -> str:
        return self.to_bytes().decode("utf-8", "replace")

    def __repr__(self) -> str:
        return f"From: {[self.Peer, self.From, self.To]!r}"

    # What kind of message it is.

    def is_bounce(self, threshold: float = 0.3) -> bool:
        """Whether this says that a message of ours could not be delivered, surer than `threshold` (0.0 to 1.0).

        `bounce` is then the BounceAnalyzer that tells of whom and why. Ordinary mail is not parsed for it.

        Source: Lamson's `MailRequest.is_bounce`.
        """
        if self.bounce is None:
            from lamsonq.bounce import detect_if_likely  # when it is used: it brings seven modules

            self.bounce = detect_if_likely(self)
        return self.bounce.probable(threshold)

    @property
    def is_automatic(self) -> bool:
        """Whether no person wrote this, so that nothing should answer by itself (RFC 3834 section 2)."""
        precedence = (self["precedence"] or "").strip().lower()
        listed = any(name.lower().startswith("list-") for name in self)
        return self.From == "" or self._submitted != "no" or precedence in ("bulk", "list", "junk") or listed

    @property
    def may_be_answered(self) -> bool:
        """Whether a program may answer this at all.

        Neither the null sender (RFC 5321 section 4.5.5) nor another program's answer or notice (RFC 3834 section 2,
        RFC 5436 section 2.7) gets one: that would go on for ever. Whether other automatic mail, as a monitor's
        or a list's, is answered is up to the application.
        """
        return self.From != "" and self._submitted in ("no", "auto-generated")

    @property
    def _submitted(self) -> str:
        """The keyword of Auto-Submitted (RFC 3834 section 5)."""
        return (self["auto-submitted"] or "no").partition(";")[0].strip().lower()

    @property
    def writers(self) -> frozenset[str]:
        """The addresses that an answer to this goes to, as its envelope, From and Reply-To have them."""
        texts = [*self.get_all("from"), *self.get_all("reply-to")]
        return frozenset(filter(None, [self.From, *(address for text in texts for address in addresses_in(text))]))


def _sender(text: str) -> str:
    return "" if text.strip() in ("", "<>") else _bare(text)


def _bare(text: str) -> str:
    """The bare address; a name without a domain, as `postmaster` on the envelope, stays what it is."""
    name = text.strip().strip("<>").lower()
    return bare_address(text) or (name if name.isprintable() and " " not in name else "")


def _recipients(addresses: Sequence[str]) -> list[str]:
    found: list[str] = []
    for address in addresses:
        many = [canonical(address)] if is_path_address(address) else addresses_in(address, None)
        found += many or [_bare(address)]
    return list(dict.fromkeys(filter(None, found)))


def _ended(line: bytes, line_end: str) -> bytes:
    return line if line.endswith(b"\n") else line + line_end.encode()
