"""The header block of a message: where its fields stand in the bytes, what they say, how a changed one is written.

Rules:

1. A field ends at LF or CRLF and nowhere else: a bare CR is part of the value, so it cannot begin another field.
2. What a stranger wrote never raises and costs linear time: at most BLOCK_MAX octets and FIELDS_MAX fields are
   looked at, what lies beyond is a defect. Text that cannot be decoded is shown with replacement characters.
3. What is shown holds no control characters, so that it can be put into another header.
4. What a handler sets is checked before it is kept: a value cannot begin another field, here or at a reader that
   decodes it.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import encodings
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from encodings.aliases import aliases

from lamsonq.address import mailboxes_in, unquoted

BLOCK_MAX = 128 * 1024
FIELDS_MAX = 1000
STRUCTURED_MAX = 8 * 1024
"""Octets of a structured field (addresses, Content-*) that are decoded."""
LINE_MAX = 900
"""A word longer than this is encoded, so that no line passes 998 octets (RFC 5322 section 2.1.1)."""

ADDRESS_HEADERS = frozenset(
    {
        *("from", "sender", "reply-to", "to", "cc", "bcc", "return-path", "errors-to", "mail-followup-to"),
        *("delivered-to", "envelope-to", "x-envelope-to", "x-original-to", "apparently-to"),
        *("resent-from", "resent-sender", "resent-to", "resent-cc", "resent-bcc", "disposition-notification-to"),
    }
)

TOO_LARGE = "the header block is too large: only its beginning was read"

_field_start = re.compile(rb"([!-9;-~]+)[ \t]*:")
_field_end = re.compile(rb"\n(?![ \t])")
_blank_line = re.compile(rb"\r?\n")
_blank_after = re.compile(rb"\n\r?\n")
_field_name = re.compile(r"[!-9;-~]{1,200}")
_UNSAFE = "\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_unsafe = re.compile(f"[{_UNSAFE}]")
_unshown = re.compile(f"[\t{_UNSAFE}]")
_surrogate = re.compile("[\ud800-\udfff]")

Reading = Callable[[bytes, str], str]
"""(octets, charset) -> the text."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field in the bytes: `data[start:end]` with its line end, the value from `value` on."""

    name: str
    start: int
    value: int
    end: int


class HeaderBlock:
    """The fields in `data[start:end]`: a message, or one part of one.

    `fields_end` is where a new field is inserted, `body` where the body begins, `defects` what is wrong.
    """

    def __init__(
        self,
        data: bytes,
        start: int = 0,
        end: int | None = None,
        *,
        block_max: int = BLOCK_MAX,
        fields_max: int = FIELDS_MAX,
    ) -> None:
        self.data, self.start, self.end = data, start, len(data) if end is None else end
        self.fields: list[Field] = []
        self._by_name: dict[str, list[Field]] = {}
        self.defects: list[str] = []
        self.fields_end = self._read_fields(min(self.end, start + block_max), fields_max)
        self.body = self._find_body()

    def _read_fields(self, limit: int, fields_max: int) -> int:
        """Fill `fields`; the position behind the last one."""
        position = self.start
        if self.data.startswith(b"From ", position) and not _field_start.match(self.data, position):
            position = self._line_end(position)  # the separator line of an mbox file
        while found := _field_start.match(self.data, position, self.end):
            if position >= limit or len(self.fields) >= fields_max:
                self.defects.append(TOO_LARGE)
                break
            last = _field_end.search(self.data, position, self.end)
            stop = last.end() if last else self.end
            name = found[1].decode("ascii")
            self.defects += _too_long(name, stop - position)
            field = Field(name, position, found.end(), stop)
            self.fields.append(field)
            self._by_name.setdefault(name.lower(), []).append(field)
            position = stop
        return position

    def _find_body(self) -> int:
        if TOO_LARGE in self.defects:
            blank = _blank_after.search(self.data, self.fields_end - 1, self.end)
            return blank.end() if blank else self.end
        if blank := _blank_line.match(self.data, self.fields_end, self.end):
            return blank.end()
        if self.fields_end < self.end:
            self.defects.append("the header block does not end in an empty line")
        return self.fields_end

    def _line_end(self, position: int) -> int:
        return self.data.find(b"\n", position, self.end) + 1 or self.end

    def named(self, name: str) -> list[Field]:
        """All fields of this name, in order."""
        return self._by_name.get(name.lower(), [])

    def raw(self, found: Field) -> bytes:
        """The value as it stands in the bytes, folded, without the line end; at most BLOCK_MAX octets."""
        return self.data[found.value : min(found.end, found.value + BLOCK_MAX)].strip(b" \t\r\n")

    def line_end(self) -> str:
        """The line end that this message uses."""
        first = self.data.find(b"\n", self.start, self.end)
        return "\r\n" if first < 0 or self.data[first - 1 : first] == b"\r" else "\n"


def _too_long(name: str, length: int) -> list[str]:
    if length > BLOCK_MAX:
        return [f"{name} is longer than {BLOCK_MAX} octets: it is cut"]
    if length > STRUCTURED_MAX and _is_structured(name):
        return [f"{name} is longer than {STRUCTURED_MAX} octets: it is not decoded"]
    return []


def _is_structured(name: str) -> bool:
    return name.lower() in ADDRESS_HEADERS or name[:8].lower() == "content-"


def shown(name: str, raw: bytes, reading: Reading | None = None) -> str:
    """The text of a field: unfolded, encoded words decoded, nothing in it that could end a line.

    In an address header only display names are decoded, and stand in quotes where they hold specials, so that
    none of them can become an address. `reading` is `decode`, or what stands for it; raises what that raises.
    """
    text = undecoded(raw)
    if name.lower() not in ADDRESS_HEADERS:
        text = decode_words(text, reading)
    elif "=?" in text and len(text) <= STRUCTURED_MAX:
        text = _addresses(text, lambda phrase: _quoted(decode_words(phrase, reading)))
    return _unshown.sub(" ", text).strip()


def undecoded(raw: bytes) -> str:
    """The text of a field with its encoded words as they stand: what addresses are read from."""
    return re.sub(r"\r?\n(?=[ \t])", "", decode(raw, "utf-8"))


def _addresses(text: str, render: Callable[[str], str]) -> str:
    """An address list with its display names rendered anew; what is no address stays, and does not become one."""
    elements = []
    for mailbox in mailboxes_in(text):
        name, path = unquoted(mailbox.name), mailbox.address or mailbox.path
        if mailbox.address or (name and _plain_path.fullmatch(path)):
            elements.append(f"{render(name)} <{path}>" if name else path)
        else:
            elements.append(render(f"{name} <{path}>" if name and path else name or unquoted(path)))
    return ", ".join(filter(None, elements))


# Of what stands in angle brackets: nothing that ends an element, begins another one or is an address.
_plain_path = re.compile(r"[!#-'*+\-./0-9=?A-Z^-~]+")


def _quoted(phrase: str) -> str:
    if not re.search(r'[()<>\[\]:;@\\,."]', phrase):
        return phrase
    return '"' + re.sub(r'(["\\])', r"\\\1", phrase) + '"'


# RFC 2047 section 2; a language may follow the charset (RFC 2231 section 5). Blanks inside are a common mistake.
_word = re.compile(r"=\?([^?*\s]{1,60})(?:\*[^?\s]{0,60})?\?([bBqQ])\?([^?\r\n]*)\?=")


def decode_words(text: str, reading: Reading | None = None) -> str:
    """Text with its RFC 2047 encoded words decoded; those that are broken stay as they are.

    Blanks between two encoded words vanish (section 6.2); a character may be split over words of one charset.
    """
    read = reading or decode
    pieces: list[str] = []
    run, charset, position = b"", "", 0
    for found in _word.finditer(text):
        octets = _word_octets(found[2], found[3])
        if octets is None:
            continue
        between = text[position : found.start()]
        adjacent = bool(charset) and not between.strip(" \t\r\n")
        if not (adjacent and found[1].lower() == charset):
            pieces += [read(run, charset), "" if adjacent else between]
            run, charset = b"", found[1].lower()
        run += octets
        position = found.end()
    return "".join([*pieces, read(run, charset), text[position:]])


def _word_octets(encoding: str, text: str) -> bytes | None:
    if encoding in "qQ":
        return binascii.a2b_qp(text.encode(), header=True)
    try:
        return binascii.a2b_base64(text.encode() + b"==")
    except binascii.Error:
        return None


# Codecs that are no charset of mail, take quadratic time, or never decode.
_NO_CHARSETS = {"idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "mbcs", "oem", "aliases"}
_CHARSETS = ({m.name for m in pkgutil.iter_modules(encodings.__path__)} | set(aliases)) - _NO_CHARSETS


def decode(octets: bytes, charset: str) -> str:
    """The text, by this charset, else as UTF-8, else with replacement characters; never raises."""
    text = decoded(octets, charset)
    if text is not None:
        return text
    try:
        return _surrogate.sub("\ufffd", octets.decode(codec_of(charset), "replace"))
    except (ValueError, LookupError):
        return octets.decode("utf-8", "replace")


def decoded(octets: bytes, charset: str) -> str | None:
    """The text, by this charset, else as UTF-8; None when it is neither."""
    for codec in (codec_of(charset), "utf-8"):
        try:
            text = octets.decode(codec)
        except (ValueError, LookupError):
            continue
        if not _surrogate.search(text):
            return text
    return None


def codec_of(charset: str) -> str:
    """Python's name of a charset: `ascii`, `utf-8`, `iso8859-1`; `utf-8` stands for what it does not know.

    Only charsets that Python has are looked up: the codec registry remembers every name that it was asked for.
    """
    name = encodings.normalize_encoding(charset).lower() if charset.isascii() and len(charset) < 64 else ""
    try:
        return codecs.lookup(name if name in _CHARSETS else "utf-8").name
    except LookupError:  # a codec of another system
        return "utf-8"


def check_name(name: str) -> str:
    """The name, if it is a field name of RFC 5322 section 2.2; else ValueError."""
    if not _field_name.fullmatch(name):
        raise ValueError(f"{name!r} is no header name (RFC 5322 section 2.2)")
    return name


def check_value(name: str, value: object) -> str:
    """The value as one line of text; ValueError when it holds a control character, bare or in an encoded word."""
    text = str(value)
    if _unsafe.search(text) or _unsafe.search(decode_words(text)):
        raise ValueError(f"the header {name} cannot hold line ends or control characters: {text[:80]!r}")
    return text.strip()


def written(name: str, value: str, line_end: str = "\r\n") -> str:
    """The field as it goes into a message: encoded where needed, folded at blanks (RFC 5322 section 2.2.3)."""
    if name.lower() in ADDRESS_HEADERS:
        value = value if value.isascii() else _addresses(value, _encoded_phrase)
    elif not value.isascii() or max(map(len, value.split(" "))) > LINE_MAX:
        value = encoded_words(value)
    lines, line = [], f"{name}:"
    for word in value.split(" "):
        if word and len(line) + len(word) > 76 and not line.endswith(":"):
            lines.append(line)
            line = ""
        line += f" {word}"
    return line_end.join([*lines, line]) + line_end


def _encoded_phrase(phrase: str) -> str:
    return _quoted(phrase) if phrase.isascii() else encoded_words(phrase)


def encoded_words(text: str) -> str:
    """The text as base64 encoded words, short enough for a line (RFC 2047 section 2); none splits a character."""
    chunks, chunk = [], b""
    for octets in map(str.encode, text):
        if len(chunk) + len(octets) > 36:
            chunks.append(chunk)
            chunk = b""
        chunk += octets
    return " ".join(f"=?utf-8?b?{base64.b64encode(c).decode()}?=" for c in [*chunks, chunk])


def message_ids(text: str) -> Iterator[str]:
    """The message ids in a Message-ID, In-Reply-To or References header."""
    return (found[0] for found in re.finditer(r"<[!-;=?-~]{3,900}>", text))
