"""What people are told in a bounce: the failed recipients where no delivery report names them.

Rules:

1. Only what a mail system says is read: the returned message below is cut off, and gives no more than its recipient.
2. The detectors of flufl.bounce come first, as each knows one mail system; then what all of them have in common: an
   address that a line begins with or that is called recipient, user or mailbox, in a text that speaks of a failure.
3. Whom the bounce is for, whom it is from and who wrote the returned message are not its failed recipients.
4. Where the headers do not say that a mail system wrote it, the text has to: `speaks_of_failure`.
5. At most TEXT_MAX octets in LINES_MAX lines of LINE_MAX and PARTS_MAX parts are read; nothing raises.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from email.iterators import body_line_iterator
from itertools import islice
from typing import TYPE_CHECKING

from lamsonq.address import addresses_in, bare_address, is_path_address
from lamsonq.dsn import ADDRESS, Recipient, content, leaves
from lamsonq.headers import HeaderBlock, decode
from lamsonq.mime import Part, Tree, parse
from lamsonq.plaintext import tags, unescaped
from lamsonq.statuscodes import find_reply, find_status

if TYPE_CHECKING:
    from lamsonq.mail import MailRequest

TEXT_MAX = 64 * 1024
LINES_MAX = 5000
LINE_MAX = 500
PARTS_MAX = 20
NAMED_MAX = 500
"""Recipients that a text may name."""
CONTEXT_MAX = 1500
"""Characters behind an address in which its reason is looked for."""

_returned = re.compile(
    r"(?im)^(?:(?:return-path|received|message-id|delivered-to|x-[\w-]+):\s.*"
    r"|[-=_*#> \t]*(?:(?:original|(?:begin )?forwarded|returned) (?:message|mail)|undelivered message|on .{8,80} wrote"
    r"|(?:this|here|below|included|the following|attached)\b.{0,40}\bcopy of|copy of the"
    r"|(?:message|mail) (?:header|text|content)s?|headers? of)\b.*)$"
)
_address = re.compile(ADDRESS)
_leading = re.compile(r"^[\s>*\-\u2022]*(?:smtp:|mailto:)?[<\[(\"']*$", re.IGNORECASE)
_called = re.compile(
    r"\b(?:rcpt to|recipients?|user(?:name)?|mailbox|account|address(?:es|\(es\))?|deliver\w*|sent|message|mail|reach"
    r"|to)\b[^@\n.;]{0,30}$",
    re.IGNORECASE,
)
_quoted_header = re.compile(r"\s*(?:to|cc|from|sender|reply-to)\s*:", re.IGNORECASE)
_failure = re.compile(
    r"\b(?:fail(?:ed|ure|s)?|undeliver\w*|could ?n[o']t|cannot|can't|unable|unknown|reject(?:ed|s)?|refused?|denied"
    r"|no such|(?:does|did|was|were|has|have|is)(?: not|n't)|not (?:found|exist|deliver\w*|accept\w*|known|reach\w*)"
    r"|invalid|disabled|inactive|exceed\w*|over ?quota|full|bounced?|expired|returned|blocked|delayed|sorry|problem)\b",
    re.IGNORECASE,
)
_waiting = re.compile(
    r"\b(?:delayed|will (?:be retried|keep trying|retry|continue)|still being retried|no action is required"
    r"|not yet been delivered|do not need to (?:resend|do|take)|only a warning|just a warning|has been postponed)\b",
    re.IGNORECASE,
)
_undelivered = re.compile(
    r"\b(?:undeliver\w*|non-?deliver\w*|deliver\w* (?:\w+ ){0,8}(?:fail|delay|reject|abort|refus)\w*"
    r"|(?:\w*n[o']t|never|unable|unsuccessful|fail\w*) (?:to |yet |been |be |get ){0,3}(?:deliver|reach)\w*"
    r"|fail\w* (?:\w+ ){0,3}deliver\w*|failed (?:address|recipient)\w*|(?:address|recipient)\S{0,5} (?:\w+ )?failed"
    r"|not receive (?:this|a copy of your|your) message|(?:returned|bounced) (?:mail|message)"
    r"|(?:no such|unknown|invalid|bad) (?:user|mailbox|recipient|address|account)"
    r"|(?:user|mailbox|recipient|address|account)\W{1,9}(?:\S{1,80} ){0,3}?"
    r"(?:unknown|unavailable|reject\w*|disabled|not found|full|over ?quota|does(?: not|n't) exist)"
    r"|relay(?:ing)? (?:access )?denied|over ?quota)\b"
    r"|\b[45]\d\d[ -]#?[45]\.\d{1,3}\.\d{1,3}\b|\(#[45]\.\d{1,3}\.\d{1,3}\)"
    r"|\b(?:said|response|replied|smtp error)\W{1,9}[45]\d\d\b",
    re.IGNORECASE,
)
"""What only a mail system says, its codes included; `_failure` is also what people say."""
_absence = re.compile(
    r"\b(?:out of (?:the |my )?office|vacation|holidays?|on (?:\w+ )?leave|away (?:from|until|on)"
    r"|(?:am|be) (?:away|back)|abwesen\w*|urlaub|nicht im (?:büro|hause)|absent\w*|congés?|vacaciones|ausente"
    r"|ferie|férias|afwezig|semester)\b",
    re.IGNORECASE,
)
_phone_number = re.compile(r"(?<![\w.-])[45]\d\d(?:-\d{2,4}|(?: \d{2,4}){2,3})(?!\w|[.-]\d)")
"""`550-1234` and `550 12 34`, which look like replies."""
_quoted_line = re.compile(r"(?m)^>(?!>).*$")
_address_in_brackets = re.compile(r"<(?=/?[^\s<>@]{1,64}@)")
_INLINE = frozenset({"a", "b", "i", "em", "strong", "span", "font", "code", "tt", "u"})
_UNSEEN = frozenset({"style", "script", "title"})
_charset = re.compile(r"charset\s*+=\s*+[\"']?([\w.:+-]{1,60})", re.IGNORECASE)
_long_line = re.compile(rb"([^\n]{%d})[^\n]+" % LINE_MAX)
_verp = re.compile(r"(?:prvs=[0-9a-f]{10}=)?[^@=]*[+-](?P<local>[^@=+]+)=(?P<domain>[a-z0-9-]+(?:\.[a-z0-9-]+)+)@")
_SYSTEMS = re.compile(r"(?:mailer-daemon|postmaster|mdaemon|no-?reply|abuse|support|help(?:desk)?)@", re.IGNORECASE)


def read_text(message: MailRequest, *, by_form_only: bool = False, trusted: bool = True) -> list[Recipient]:
    """The recipients that the text of a bounce names, with what it says of each.

    `by_form_only` guesses nothing; `trusted` says that a mail system wrote it, in whatever words.
    """
    text = _phone_number.sub("", notice(message.base))
    if not trusted and not speaks_of_failure(text):
        return []
    found: list[tuple[str, bool | None]] = [*known_forms(message)]
    if not found and not by_form_only:
        found = [(address, None) for address in named(message, text)]
    return _told(found[:NAMED_MAX], text)


def speaks_of_failure(text: str) -> bool:
    """Whether a text says in its own words, and not in a quotation, that mail was not delivered."""
    own = " ".join(_quoted_line.sub("", text).split())
    return bool(_undelivered.search(own)) and not _absence.search(own)


def known_forms(message: MailRequest) -> list[tuple[str, bool]]:
    """(address, permanent) of what a detector of flufl.bounce finds."""
    from flufl.bounce import all_failures  # when it is used: it compiles some hundred expressions

    log = logging.getLogger("flufl.bounce")
    if log.level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)  # else it tells of each detector, and gives a traceback of a stranger's bytes
    tree = _reduced(message.Data)
    try:
        delayed, failed = all_failures(tree)
    except Exception:  # a stranger's bytes in another's regular expressions: what it cannot read it has not found
        return []
    if len(failed) == 1 and _stands_between_commas(tree, *failed):
        return []
    found = {**dict.fromkeys(delayed, False), **dict.fromkeys(failed, True)}
    read = {bare_address(octets.decode("ascii", "replace")): permanent for octets, permanent in found.items()}
    return sorted((address, permanent) for address, permanent in read.items() if address)


def _stands_between_commas(tree: Tree, address: bytes) -> bool:
    """Whether that is all that made an address a failed recipient: true at one site, anywhere else it is anybody's."""
    if "@llnl.gov" in str(tree["from"]).lower():
        return False
    enclosed = re.compile(rf",\s{{0,9}}{re.escape(address.decode('ascii', 'replace'))}\s{{0,9}},")
    return any(enclosed.search(line) for line in body_line_iterator(tree))


def _reduced(data: bytes) -> Tree:
    """The message cut down to what bounds the time of others' expressions: long lines end, and there are not too many.

    What was encoded is decoded, lest it has longer lines, and the returned message, which may be a bounce itself, is
    left out. Octets above 127 become one that no address holds, as flufl.bounce reads ASCII.
    """
    block = HeaderBlock(data)
    wanted = ("from", "subject", "x-mailer", "x-failed-recipients", "content-type", "content-transfer-encoding")
    fields = b"".join(data[f.start : f.end][:4096].rstrip() + b"\n" for f in block.fields if f.name.lower() in wanted)
    tree = parse(fields.translate(_ASCII) + b"\n" + _cut(data[block.body : block.body + TEXT_MAX]))
    for part in leaves(tree):
        kind = Part(part).content_type
        if kind.startswith("text/"):
            part.set_payload(_cut(content(part, TEXT_MAX)).decode("ascii"))
        elif kind == "message/rfc822":
            part.set_payload("")
        del part["content-transfer-encoding"]
    return tree


def _cut(text: bytes) -> bytes:
    lines = _long_line.sub(rb"\1", text).split(b"\n", LINES_MAX)
    return b"\n".join(lines[:LINES_MAX]).translate(_ASCII)


_ASCII = bytes(range(128)) + b"\x7f" * 128


def notice(tree: Tree) -> str:
    """The text that comes before the returned message; of HTML the words."""
    texts: list[str] = []
    for part in islice(leaves(tree), PARTS_MAX):
        kind = Part(part).content_type
        if kind in ("message/rfc822", "text/rfc822-headers"):
            break
        if kind.startswith(("text/", "multipart/")):
            text, is_html = _decoded(part)
            before = _before_returned(_words(text) if is_html else text)
            texts.append(before)
            if len(before) < len(text) and not is_html:
                break
    return "\n\n".join(texts)[:TEXT_MAX]


def _decoded(part: Tree) -> tuple[str, bool]:
    """The text of a part, and whether it is HTML; lines of other text are cut."""
    named_charset = _charset.search(Part(part)["content-type"] or "")
    charset = named_charset[1] if named_charset else "utf-8"
    text = decode(content(part, TEXT_MAX), charset).replace("\r\n", "\n")
    if Part(part).content_type == "text/html" or text[:200].lstrip().lower().startswith(("<html", "<!doctype html")):
        return text, True
    return "\n".join(line[:LINE_MAX] for line in text.split("\n")), False


def _words(markup: str) -> str:
    """What HTML says; links and styles are dropped, an address in angle brackets is none of its tags."""
    pieces: list[str] = []
    for tag in tags(_address_in_brackets.sub("&lt;", markup)):
        if not (tag.closes and tag.name in _UNSEEN):
            pieces.append(unescaped(tag.before))
        pieces.append(" " if tag.name in _INLINE else "\n" if tag.name else "")
    return re.sub(r"[ \t\xa0]+", " ", "".join(pieces))


def _before_returned(text: str) -> str:
    found = _returned.search(text)
    return text[: found.start()] if found else text


def returned_headers(tree: Tree) -> Tree | None:
    """The returned message, or its headers: a part of its own, or what stands below the notice."""
    for part in leaves(tree):
        kind = Part(part).content_type
        if kind == "message/rfc822" and part.is_multipart():
            inner = part.get_payload(0)
            return inner if isinstance(inner, Tree) else None
        if kind in ("message/rfc822", "text/rfc822-headers", "message/global", "message/global-headers"):
            return parse(content(part, TEXT_MAX))
        if kind.startswith("text/"):
            text, _ = _decoded(part)
            inline = re.search(r"(?im)^(?:return-path|received|message-id|from|date):\s", text)
            if inline and re.search(r"(?im)^to:\s", text[inline.start() :]):
                return parse(text[inline.start() :].encode("utf-8", "replace"))
    return None


def named(message: MailRequest, text: str) -> list[str]:
    """The failed recipients by what mail systems have in common; [] where that does not tell."""
    if not (_failure.search(text) or find_status(text) or find_reply(text)):
        return []
    original = returned_headers(message.base)
    sent_to = _addresses(original, ("to",)) if original is not None else []
    others = _others(message, original)
    candidates: dict[str, bool] = {}
    for found in _address.finditer(text):
        address = bare_address(found[0].strip(".*_!?"))
        if address and address not in others and (address in sent_to or not _SYSTEMS.match(address)):
            candidates[address] = candidates.get(address, False) or _is_told(text, found.start())
    told_of = [address for address, told in candidates.items() if told]
    sent_to = [address for address in sent_to if address not in others]
    if told_of or len(candidates) == 1:
        return told_of or list(candidates)
    return [address for address in sent_to if address in candidates] or (sent_to if len(sent_to) == 1 else [])


def _is_told(text: str, position: int) -> bool:
    """Whether the words before an address make it a failed recipient; after `To:` a list may stand."""
    line = text[max(0, position - 80) : position].rpartition("\n")[2]
    return bool(_leading.match(line) or (_called.search(line) and not _quoted_header.match(line)))


def _others(message: MailRequest, original: Tree | None) -> set[str]:
    """Who has a part in the bounce, but is not its failed recipient."""
    own = [
        address for name in ("from", "sender", "reply-to", "to") for address in addresses_in(message[name] or "", 20)
    ]
    written_by = _addresses(original, ("from", "sender", "reply-to", "return-path")) if original is not None else []
    return {*own, *written_by, message.From, *message.route_to}


def _addresses(tree: Tree, names: Iterable[str]) -> list[str]:
    found = [address for name in names for address in addresses_in(Part(tree)[name] or "", 20)]
    return list(dict.fromkeys(found))


def _told(found: Sequence[tuple[str, bool | None]], text: str) -> list[Recipient]:
    """The recipients with what stands behind each address, before the next; of a single one, anywhere."""
    lower, waiting = text.lower(), bool(_waiting.search(text))
    places = {address: lower.find(address) for address, _ in found}
    starts = sorted({place for place in places.values() if place >= 0})
    ends = dict(zip(starts, [*starts[1:], len(text)], strict=False))
    recipients = []
    for address, permanent in found:
        place = places[address]
        said = _said(text[place : min(ends[place], place + CONTEXT_MAX)]) if place >= 0 else ""
        said = said or (_said(text) if len(found) == 1 else "")
        status = find_status(said)
        status = status if status is not None and status.primary != 2 else None
        action = "delayed" if waiting or permanent is False else "failed" if permanent else ""
        recipients.append(Recipient(address=address, final=address, action=action, status=status, diagnostic=said))
    return recipients


def _said(text: str) -> str:
    """The first paragraph with a code: what the other system said; "" when there is none."""
    for paragraph in re.split(r"\n\s*\n", text):
        if find_reply(paragraph) or find_status(paragraph):
            said = " ".join(paragraph.split())
            at = re.search(r"(?<![\w.])[45]\d\d[ -]|(?<![\w.])[45]\.\d{1,3}\.\d{1,3}\b", said)
            return said[at.start() :][:500] if at else said[:500]
    return ""


def from_verp(recipients: Sequence[str]) -> str:
    """The address in `bounces+joe=x.org@lists.example`; "" when the bounce came to none like it."""
    for address in recipients:
        found = _verp.match(address[:LINE_MAX])
        if found and is_path_address(f"{found['local']}@{found['domain']}"):
            return f"{found['local']}@{found['domain']}".lower()
    return ""
