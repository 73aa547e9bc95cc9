"""Delivery status notifications (RFC 3464, RFC 6522, RFC 6533): what a mail system reports of each recipient.

Rules:

1. A report is read where it is declared, else wherever its fields stand: as text, in base64, behind a wrong boundary.
2. The returned message is never read as the report; a report that is attached to a message is, when that message is
   no report itself.
3. Blocks are forgiving: several recipients in one block, one recipient over two blocks, fields without a type.
4. Nothing raises; at most REPORT_MAX octets and RECIPIENTS_MAX recipients are read.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from email.message import Message

from lamsonq import mime
from lamsonq.address import bare_address
from lamsonq.headers import HeaderBlock, decode_words, undecoded
from lamsonq.mime import Part, Tree
from lamsonq.statuscodes import Status, find_reply, find_status

REPORT_MAX = 512 * 1024
RECIPIENTS_MAX = 2000
BLOCKS_MAX = 5000
VALUE_MAX = 4096
NESTING_MAX = 3

DELIVERED = frozenset({"relayed", "expanded", "delivered"})
"""Actions of RFC 3464 section 2.3.3 that tell of no failure."""

_STATUS_TYPES = frozenset({"message/delivery-status", "message/global-delivery-status"})
_OTHER_TYPES = frozenset({"message/rfc822", "message/disposition-notification", "message/feedback-report"})
"""Parts with fields of the same names that are no delivery status: the returned message, RFC 8098 and RFC 5965."""

_RECIPIENT_FIELDS = ("final-recipient", "original-recipient")
_TELLING = ("action", "status", "diagnostic-code")
_recipient_line = re.compile(rb"(?im)^(?:final|original)-recipient[ \t]*:")
_LOCAL = r"[^\s<>\"'()\[\]{},;:|@]"
ADDRESS = rf"(?<!{_LOCAL}){_LOCAL}++@[^\s<>\"'(),;:|@]*[^\s<>\"'(),;:|@.!?*]"
"""An expression for what looks like an address in a text, however it is written around it."""
_address_like = re.compile(ADDRESS)
_xtext = re.compile(r"\+([0-9A-Fa-f]{2})")
_utf8_xtext = re.compile(r"\\x\{([0-9A-Fa-f]{1,6})\}")

Fields = dict[str, list[str]]
"""Lower-case names with the values of a block."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """What became of a message for one recipient. Texts that nobody told are "".

    `address` is whom the message was sent to as far as that is known, bare and lower-cased: the original recipient,
    else the final one. `action` is a word of RFC 3464 section 2.3.3 (`failed`, `delayed`, ...), `status` the enhanced
    code or None, `diagnostic` what the other system said, without the type in front.
    """

    address: str = ""
    final: str = ""
    original: str = ""
    action: str = ""
    status: Status | None = None
    diagnostic: str = ""
    remote_mta: str = ""

    @property
    def permanent(self) -> bool | None:
        """Whether the recipient cannot be reached for good; None when nothing tells.

        The class of the status leads, also where a system that gave up on a 4.x.x says `failed`; then the code in
        the diagnostic (RFC 3463 section 2 has the same classes as RFC 5321's replies); then the action.
        """
        if self.action in DELIVERED or self.action == "delayed":
            return False
        for tells in (self.status, find_status(self.diagnostic)):
            if tells is not None and tells.primary != 2:
                return tells.primary == 5
        reply = find_reply(self.diagnostic)
        if reply is not None and reply >= 400:
            return reply >= 500
        return True if self.action == "failed" else None

    @property
    def failed(self) -> bool:
        """Whether this tells of a failure or a delay, not of a success."""
        success = self.status is not None and self.status.primary == 2 and self.action != "failed"
        return self.action not in DELIVERED and not success


@dataclass(slots=True)
class Report:
    """A delivery report: the fields of all its blocks, and its recipients."""

    fields: Fields = field(default_factory=dict)
    recipients: list[Recipient] = field(default_factory=list)


def read_report(tree: Tree, nesting: int = 0) -> Report:
    """The delivery report in a message; an empty one when there is none."""
    parts = list(leaves(tree))
    declared = [part for part in parts if Part(part).content_type in _STATUS_TYPES]
    undeclared = (part for part in parts if Part(part).content_type not in {*_STATUS_TYPES, *_OTHER_TYPES})
    for source in (declared, undeclared):
        report = _report(fields for part in source for fields in _blocks_of(part, declared=source is declared))
        if report.recipients:
            return report
    if nesting < NESTING_MAX and not declared and Part(tree).content_type != "multipart/report":
        for inner in filter(None, map(_inner_report, parts)):
            report = read_report(inner, nesting + 1)
            if report.recipients:
                return report
    return Report()


def is_report(tree: Tree) -> bool:
    """Whether this message itself is a delivery report (RFC 6522), not a letter that has one attached."""
    parts = tree.get_payload() if tree.is_multipart() and Part(tree).content_type == "multipart/report" else ()
    return any(Part(part).content_type in _STATUS_TYPES for part in parts if isinstance(part, Message))


def _inner_report(part: Tree) -> Tree | None:
    if Part(part).content_type != "message/rfc822" or not part.is_multipart():
        return None
    inner = part.get_payload(0)
    return inner if isinstance(inner, Tree) and Part(inner).content_type == "multipart/report" else None


def leaves(tree: Message) -> Iterator[Tree]:
    """The parts that are no containers, in order; messages and delivery reports inside are one part each."""
    return (part.message for part in mime.leaves(tree) if isinstance(part.message, Tree))


def content(part: Tree, limit: int) -> bytes:
    """The content of a part, its transfer encoding undone; of an encoded one a little less than `limit` octets."""
    start, end = part.span
    raw = part.source[start : min(end, start + limit)]
    encoding = (Part(part)["content-transfer-encoding"] or "").lower()
    if encoding == "quoted-printable":
        return binascii.a2b_qp(raw)
    if encoding == "base64":
        letters = re.sub(rb"[^A-Za-z0-9+/]", b"", raw)
        return binascii.a2b_base64(letters[: len(letters) // 4 * 4])
    return raw


def _blocks_of(part: Tree, *, declared: bool) -> Iterator[Fields]:
    data = content(part, REPORT_MAX)
    if declared:
        yield from blocks(data)
        return
    found = _recipient_line.search(data)
    if found is None:
        return
    # The block may begin before this field; what comes behind the report is the returned message.
    start = max(data.rfind(b"\n\n", 0, found.start()), data.rfind(b"\n\r\n", 0, found.start())) + 1
    seen = False
    for fields in blocks(data[start:]):
        is_status = any(name in fields for name in (*_RECIPIENT_FIELDS, "action", "reporting-mta"))
        if "disposition" in fields or "feedback-type" in fields:
            return
        if seen and not is_status and "diagnostic-code" not in fields:
            return
        seen = seen or is_status
        if is_status:
            yield fields


def blocks(data: bytes) -> Iterator[Fields]:
    """The blocks of header fields in these bytes, lines that are no field left out (RFC 3464 section 2.1)."""
    position = 0
    for _ in range(BLOCKS_MAX):
        if position >= len(data):
            return
        block = HeaderBlock(data, position, block_max=64 * 1024, fields_max=1000)
        if block.body <= position:
            position = data.find(b"\n", position) + 1 or len(data)
            continue
        position = block.body
        fields: Fields = {}
        for found in block.fields:
            name = found.name.lower()
            if name in _RECIPIENT_FIELDS and name in fields:
                yield fields  # the empty line between two recipients is missing
                fields = {}
            fields.setdefault(name, []).append(_value(block.raw(found)))
        if fields:
            yield fields


def _value(raw: bytes) -> str:
    return " ".join(decode_words(undecoded(raw[:VALUE_MAX])).split())


def _report(all_blocks: Iterable[Fields]) -> Report:
    report = Report()
    of_recipients: list[Fields] = []
    for fields in all_blocks:
        for name, values in fields.items():
            report.fields.setdefault(name, []).extend(values)
        named = any(name in fields for name in _RECIPIENT_FIELDS)
        telling = any(name in fields for name in _TELLING)
        before = of_recipients[-1] if of_recipients else {}
        if before and not named and telling and not any(name in before for name in _TELLING):
            before.update(fields)  # one recipient over two blocks
        elif named or (telling and "action" in fields):
            of_recipients.append(dict(fields))
        if len(of_recipients) >= RECIPIENTS_MAX:
            break
    report.recipients = list(dict.fromkeys(map(_recipient, of_recipients)))  # some say all of it several times
    return report


def _recipient(fields: Fields) -> Recipient:
    def first(name: str) -> str:
        return next(filter(None, fields.get(name, ())), "")

    final, original = address_in(first("final-recipient")), address_in(first("original-recipient"))
    diagnostic = untyped(first("diagnostic-code"))
    return Recipient(
        address=original if "@" in original else final or original or quoted_address(diagnostic),
        final=final,
        original=original,
        action=action_in(first("action")),
        status=find_status(first("status")),
        diagnostic=diagnostic,
        remote_mta=untyped(first("remote-mta")),
    )


def action_in(value: str) -> str:
    """The action, in the word of RFC 3464 section 2.3.3; some add a comment, OpenSMTPD says `error`."""
    word = re.match(r"[a-z]*", value.lower())
    assert word is not None
    if word[0].startswith(("fail", "error")):
        return "failed"
    return "delayed" if word[0].startswith("delay") else word[0]


def untyped(value: str) -> str:
    """What stands behind the type of a field: of `dns; mx.example.org` the name."""
    kind, semicolon, rest = value.partition(";")
    return rest.strip() if semicolon and re.fullmatch(r"\s*+[\w.+-]++\s*+(?:\(.*\))?\s*+", kind) else value.strip()


def address_in(value: str) -> str:
    """The address of `rfc822; joe@x.org`, bare and lower-cased; a name without a domain stays one."""
    text = untyped(value)
    if re.match(r"\s*utf-?8\s*;", value, re.IGNORECASE):
        text = _utf8_xtext.sub(_unescaped, text)  # RFC 6533 section 3
    if "@" not in text:
        text = _xtext.sub(lambda found: chr(int(found[1], 16)), text) if "+40" in text else text
    return bare_address(text) or quoted_address(text) or _name(text)


def _unescaped(found: re.Match[str]) -> str:
    number = int(found[1], 16)
    return chr(number) if number <= 0x10FFFF and not 0xD800 <= number < 0xE000 else "\ufffd"


def quoted_address(text: str) -> str:
    """The first thing in a text that looks like an address, lower-cased; "" when there is none."""
    found = _address_like.search(text[:VALUE_MAX])
    return found[0].lower() if found and found[0].isprintable() and len(found[0]) <= 320 else ""


def _name(text: str) -> str:
    name = text.strip(" <>\"'").lower()
    return name if name.isprintable() and 0 < len(name) <= 64 and " " not in name else ""
