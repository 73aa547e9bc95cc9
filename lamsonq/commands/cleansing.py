"""A message written anew where it breaks the rules of RFC 5322 and MIME: what cleanse does with each.

Rules:

1. A message without a fault keeps its bytes, but for line ends, which become those of a file.
2. A header with a fault is written from what it says: encoded words for what is not ASCII, folded lines, no control
   characters. All others stay.
3. A part with a fault keeps its content: text becomes UTF-8, everything base64. A multipart that does not end is ended;
   one without a boundary is text.
4. Text in no charset, or not in that which it names, is read as UTF-8, else as windows-1252, which has Latin-1 in it.
5. What cannot be put right without inventing or losing something is refused, with the reason.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from email.message import Message

from lamsonq.headers import ADDRESS_HEADERS, TOO_LARGE, HeaderBlock, check_name, codec_of, decoded, shown, written
from lamsonq.mail import MailRequest
from lamsonq.mime import Part, Tree, filename_of, parse

LINE_MAX = 998
"""Octets of a line without its end (RFC 5322 section 2.1.1)."""

_PLAIN_ENCODINGS = frozenset({"", "7bit", "8bit", "binary"})
_LINE_END = re.compile(rb"\r+\n")
_CONTROL = re.compile(rb"[\x00\r]")
_LONG = re.compile(rb"[^\n]{%d}" % (LINE_MAX + 1))
_QUOTED_PRINTABLE = re.compile(rb"(?:[^=]|=[0-9A-Fa-f]{2}|=[ \t]*\n)*+")
_HEADER_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]|\n(?![ \t])")
_TOKEN = re.compile(r"[A-Za-z0-9.+_-]{1,60}")
_KIND = re.compile(rf"{_TOKEN.pattern}/{_TOKEN.pattern}")
_DESCRIBED = frozenset({"content-type", "content-transfer-encoding", "content-disposition"})


def cleansed(data: bytes) -> bytes:
    """The message without faults. Raises ValueError with the reason when that cannot be."""
    data = _LINE_END.sub(b"\n", data)
    block = HeaderBlock(data)
    if not block.fields:
        raise ValueError("it has no header")
    if TOO_LARGE in block.defects:
        raise ValueError(TOO_LARGE)
    defects: list[str] = []
    tree = parse(data, defects, _read)
    lost = [defect for defect in (*block.defects, *defects) if defect.endswith(("it is cut", "left as one"))]
    if lost:
        raise ValueError(lost[0])
    if not block.defects and not defects and _is_clean(tree):
        return data
    anew = b"".join(_entity(tree))
    if left := faults_of(anew):
        raise ValueError(f"it stays broken: {left[0]}")
    return anew


def faults_of(data: bytes) -> list[str]:
    """What is wrong with a message; [] when nothing is."""
    request = MailRequest(None, None, None, data)
    tree = request.base
    return [*request.defects, *(["a header or part with a fault"] if not _is_clean(tree) else [])]


def _is_clean(tree: Message) -> bool:
    return all(_is_clean_field(name, str(value)) for name, value in tree.raw_items()) and _has_clean_content(tree)


def _is_clean_field(name: str, value: str) -> bool:
    lines = f"{name}: {value}".split("\n")
    return value.isascii() and not _HEADER_CONTROL.search(value) and max(map(len, lines)) <= LINE_MAX


def _has_clean_content(tree: Message) -> bool:
    kind = Part(tree).content_type
    if tree.is_multipart() and kind != "message/delivery-status":
        return all(_is_clean(child) for child in _children(tree))
    if kind.startswith("multipart/"):
        return False  # it has no boundary, or nothing in it
    body, encoding = _raw_body(tree), _encoding(tree)
    if _CONTROL.search(body) or _LONG.search(body):
        return False
    if encoding == "base64":
        return _is_base64(body)
    if encoding == "quoted-printable":
        return body.isascii() and _QUOTED_PRINTABLE.fullmatch(body) is not None
    return encoding in _PLAIN_ENCODINGS and (body.isascii() or (encoding == "8bit" and _is_declared(tree, body)))


def _is_base64(body: bytes) -> bool:
    try:
        base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        return False
    return True


def _is_declared(tree: Message, body: bytes) -> bool:
    """Whether text is what its charset says."""
    if not Part(tree).content_type.startswith("text/"):
        return False
    try:
        body.decode(tree.get_content_charset() or "us-ascii")
    except (LookupError, ValueError):
        return False
    return True


def _entity(tree: Message) -> Iterator[bytes]:
    """A message or part: header, empty line, content."""
    kind = Part(tree).content_type
    described = all(_is_clean_field(name, str(value)) for name, value in tree.raw_items() if name.lower() in _DESCRIBED)
    if _has_clean_content(tree) and not (tree.is_multipart() and kind.startswith("multipart/")):
        yield from _header(tree, set() if described else _DESCRIBED - {"content-transfer-encoding"})
        if not described:
            yield from _description(tree, kind, charset=Part(tree).charset if kind.startswith("text/") else None)
        yield b"\n" + _raw_body(tree)
    elif tree.is_multipart() and kind.startswith("multipart/"):
        boundary = f"=_{secrets.token_hex(12)}"
        yield from _header(tree, _DESCRIBED)
        yield from _description(tree, kind, boundary=boundary)
        for child in _children(tree):
            yield f"\n--{boundary}\n".encode()
            yield b"".join(_entity(child)).removesuffix(b"\n")
        yield f"\n--{boundary}--\n".encode()
    elif tree.is_multipart() and kind == "message/rfc822":
        yield from _header(tree, _DESCRIBED)
        yield from _description(tree, kind)
        yield b"\n"
        for child in _children(tree):
            yield from _entity(child)
    else:
        yield from _leaf(tree, kind)


def _leaf(tree: Message, kind: str) -> Iterator[bytes]:
    part = Part(tree)
    if kind.startswith("multipart/"):
        kind = "text/plain"
    elif kind.startswith("message/") or not _KIND.fullmatch(kind):
        kind = "application/octet-stream"  # a message may not be encoded (RFC 2046 section 5.2)
    data = part.data
    if kind.startswith("text/"):
        octets = data if part.content_type.startswith("text/") else _raw_body(tree)
        data = _read(octets, part.charset).replace("\r\n", "\n").encode()
    yield from _header(tree, _DESCRIBED)
    yield from _description(tree, kind, charset="utf-8" if kind.startswith("text/") else None)
    yield b"Content-Transfer-Encoding: base64\n\n"
    yield base64.encodebytes(data)


def _read(octets: bytes, charset: str) -> str:
    """The text, by rule 4. Raises ValueError for what would not be what its writer has seen."""
    text = decoded(octets, charset)
    if text is not None:
        return text
    codec = codec_of(charset)
    if codec not in ("ascii", "utf-8"):
        raise ValueError(f"it holds text that is not in its charset {charset}, nor in UTF-8")
    text = octets.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    if sum(character > "\x7f" for character in text) >= 2 * broken:  # too many that fit for that to be chance
        raise ValueError("it holds UTF-8 with broken characters in it")
    try:
        return octets.decode("cp1252")
    except UnicodeDecodeError:
        raise ValueError("it holds text that is neither in UTF-8 nor in windows-1252, nor says in what") from None


def _description(tree: Message, kind: str, **changed: str | None) -> Iterator[bytes]:
    """Content-Type, with the parameters that it had and these, and Content-Disposition."""
    had = {name: value for name, value in _parameters(tree) if name not in ("charset", "boundary", "name")}
    kind = kind if _KIND.fullmatch(kind) else "application/octet-stream"
    yield _structured("Content-Type", kind, {**had, **changed, "name": _filename(tree)})
    disposition = Part(tree).disposition
    if disposition:
        disposition = disposition if _TOKEN.fullmatch(disposition) else "attachment"
        yield _structured("Content-Disposition", disposition, {"filename": _filename(tree)})


def _filename(tree: Message) -> str | None:
    name = filename_of(tree, _read)
    if name is not None and "\ufffd" in name:
        raise ValueError(f"a file name in it cannot be read: {name!r}")
    return name


def _parameters(tree: Message) -> Iterator[tuple[str, str]]:
    """Those that are plain text; one that cannot be read is none."""
    try:
        found = tree.get_params([])[1:]
    except Exception:
        # The standard parser meets a stranger's bytes, and raises whatever they make it raise.
        return
    for name, value in found:
        if _TOKEN.fullmatch(name) and isinstance(value, str) and value.isascii() and value.isprintable():
            yield name.lower(), value


def _structured(name: str, value: str, parameters: Mapping[str, str | None]) -> bytes:
    """A field with parameters, one a line; what is not ASCII is written by RFC 2231."""
    field = Message()
    field[name] = value
    for key, text in parameters.items():
        if text:
            field.set_param(key, text, name, charset=None if text.isascii() else "utf-8")
    return f"{name}: {field[name]}\n".replace("; ", ";\n ").encode()


def _header(tree: Message, without: AbstractSet[str]) -> Iterator[bytes]:
    named = {name.lower() for name, _ in tree.raw_items()}
    if without and "mime-version" not in named and isinstance(tree, Tree) and "from" in named:
        yield b"MIME-Version: 1.0\n"
    for name, value in tree.raw_items():
        text = str(value)
        if name.lower() in without:
            continue
        if _is_clean_field(name, text):
            yield f"{name}: {text}\n".encode()
        else:
            yield _rewritten(name, text)


def _rewritten(name: str, value: str) -> bytes:
    text = shown(name, value.encode("utf-8", "surrogateescape"), _read)
    line = written(check_name(name), text, "\n")
    if text and not line.partition(":")[2].strip():
        raise ValueError(f"{name} holds no address: {text[:60]!r}" if name.lower() in ADDRESS_HEADERS else f"{name}")
    return line.encode()


def _children(tree: Message) -> list[Message]:
    return [child for child in tree.get_payload() if isinstance(child, Message)]


def _raw_body(tree: Message) -> bytes:
    return tree.source[slice(*tree.span)] if isinstance(tree, Tree) else b""


def _encoding(tree: Message) -> str:
    return str(tree.get("content-transfer-encoding", "")).strip().lower()
