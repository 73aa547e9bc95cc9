"""The parts of a message: a parser that hostile bytes cannot make slow, and what a part says.

Rules:

1. Structure is found by searching the bytes for boundaries, never line by line, so that time is linear for each
   level; at most DEPTH_MAX levels and PARTS_MAX parts. What lies beyond is one opaque part, and a defect.
2. The result is a tree of the standard library's `email.message.Message`, whose headers were split by our rules
   (lamsonq.headers) and whose payloads are the bytes as they came.
3. The standard library's accessors raise whatever a stranger makes them raise; here each has a default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import TypeVar

from lamsonq.headers import STRUCTURED_MAX, HeaderBlock, Reading, decode, decode_words, shown

DEPTH_MAX = 50
PARTS_MAX = 1000
PART_BLOCK_MAX = 16 * 1024
PART_FIELDS_MAX = 100
FILENAME_MAX = 200

_bare_cr = re.compile(rb"\r(?!\n)")
_delimiter_tail = re.compile(rb"(--)?[ \t]*+(?:\r?\n|\Z)")
_T = TypeVar("_T")


def _tolerant(read: Callable[[], _T], default: _T) -> _T:
    try:
        return read()
    except Exception:
        # The standard parser meets a stranger's bytes: IndexError, LookupError, ValueError, RecursionError and
        # others are all known of it, and none of them says more than "this cannot be read".
        return default


class Tree(Message):
    """A message or part that knows where its body stands in the bytes that it came from."""

    source: bytes = b""
    span: tuple[int, int] = (0, 0)


def parse(data: bytes, defects: list[str] | None = None, reading: Reading | None = None) -> Tree:
    """The tree of parts of a message; what is wrong with it is added to `defects`.

    `reading` makes text of header values with octets beyond ASCII in them, for who writes them anew. Raises only what
    that raises.
    """
    return _Parser(data, [] if defects is None else defects, reading).root()


class _Parser:
    def __init__(self, data: bytes, defects: list[str], reading: Reading | None) -> None:
        self.data = data
        self.defects = defects
        self.reading = reading
        self.parts = 0

    def root(self) -> Tree:
        return self._message(HeaderBlock(self.data), 1, "text/plain")

    def _part(self, start: int, end: int, depth: int, default_type: str) -> Tree:
        block = HeaderBlock(self.data, start, end, block_max=PART_BLOCK_MAX, fields_max=PART_FIELDS_MAX)
        self._defect(*block.defects)
        return self._message(block, depth, default_type)

    def _message(self, block: HeaderBlock, depth: int, default_type: str) -> Tree:
        self.parts += 1
        tree = Tree()
        tree.source, tree.span = self.data, (block.body, block.end)
        for found in block.fields:
            tree.set_raw(found.name, _stored(found.name, block.raw(found), self.reading))
        tree.set_default_type(default_type)
        children = self._children(tree, depth)
        payload: list[Message | str] | str = [*children] or self._text(*tree.span)
        tree.set_payload(payload)
        return tree

    def _children(self, tree: Tree, depth: int) -> list[Tree]:
        kind = _content_type(tree)
        if kind.startswith("multipart/"):
            return self._multipart(tree, kind, depth)
        if kind == "message/delivery-status":
            return self._header_blocks(tree, depth)
        if kind == "message/rfc822" and not _is_encoded(tree) and self._allows(depth):
            return [self._part(*tree.span, depth + 1, "text/plain")]
        return []

    def _multipart(self, tree: Tree, kind: str, depth: int) -> list[Tree]:
        boundary = _tolerant(tree.get_boundary, None)
        if not boundary:
            self._defect("a multipart without a boundary")
            return []
        default_type = "message/rfc822" if kind == "multipart/digest" else "text/plain"
        start, end = tree.span
        children: list[Tree] = []
        opened: int | None = None
        for before, after, closes in self._delimiters(boundary.encode("utf-8", "replace"), start, end):
            if opened is None:
                tree.preamble = self._text(start, before) or None
            elif not self._allows(depth):
                return []
            else:
                children.append(self._part(opened, max(opened, before), depth + 1, default_type))
            opened = after
            if closes:
                tree.epilogue = self._text(after, end) if self.data[after - 1 : after] == b"\n" else None
                return children
        self._defect("a multipart that does not end")
        if opened is not None and self._allows(depth):
            children.append(self._part(opened, end, depth + 1, default_type))
        return children

    def _delimiters(self, boundary: bytes, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Where the content before a delimiter line ends, where the content behind it begins, is it the last."""
        mark = b"--" + boundary
        position = start if self.data.startswith(mark, start) else self._next(mark, start, end)
        while position >= 0:
            tail = _delimiter_tail.match(self.data, position + len(mark), end)
            if tail:
                before = position - 1 - (self.data[position - 2 : position] == b"\r\n")
                yield max(start, before), tail.end(), bool(tail[1])
            # The line end of one delimiter may be the one before the next.
            position = self._next(mark, tail.end() - 1 if tail else position + 1, end)

    def _next(self, mark: bytes, position: int, end: int) -> int:
        found = self.data.find(b"\n" + mark, position, end)
        return found + 1 if found >= 0 else -1

    def _header_blocks(self, tree: Tree, depth: int) -> list[Tree]:
        """A delivery status is header blocks with empty lines between them (RFC 3464 section 2.1)."""
        position, end = tree.span
        blocks: list[Tree] = []
        while position < end and self._allows(depth):
            block = HeaderBlock(self.data, position, end, block_max=PART_BLOCK_MAX, fields_max=PART_FIELDS_MAX)
            if block.body <= position:
                break
            position, block.end = block.body, block.body
            if block.fields:
                blocks.append(self._message(block, depth + 1, "text/plain"))
        return blocks

    def _allows(self, depth: int) -> bool:
        """Whether one more part may lie inside a part of this depth."""
        if depth < DEPTH_MAX and self.parts < PARTS_MAX:
            return True
        self._defect("too many parts, or parts in parts: left as one")
        return False

    def _defect(self, *defects: str) -> None:
        self.defects += [defect for defect in defects if defect not in self.defects]

    def _text(self, start: int, end: int) -> str:
        return self.data[start:end].decode("ascii", "surrogateescape")


def _stored(name: str, raw: bytes, reading: Reading | None) -> str:
    """A header value as the standard library's tree keeps it; raw UTF-8 in a file name, which is common, is text."""
    structured = name[:8].lower() == "content-"
    raw = _bare_cr.sub(b" ", raw[:STRUCTURED_MAX] if structured else raw)
    if reading is not None and not raw.isascii():
        return reading(raw, "us-ascii")
    escaped = raw.decode("ascii", "surrogateescape")
    return _tolerant(raw.decode, escaped) if structured else escaped


def _content_type(tree: Message) -> str:
    return _tolerant(tree.get_content_type, "application/octet-stream")


def _is_encoded(tree: Message) -> bool:
    return str(tree.get("content-transfer-encoding", "")).strip().lower() in ("base64", "quoted-printable")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a message, decoded on demand; `message` is the standard library's view of it."""

    message: Message

    def __getitem__(self, name: str) -> str | None:
        """The first header of this name, decoded; None when there is none."""
        for found, value in self.message.raw_items():
            if found.lower() == name.lower():
                return shown(found, str(value).encode("utf-8", "surrogateescape"))
        return None

    def __contains__(self, name: str) -> bool:
        return any(found.lower() == name.lower() for found in self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The names of its headers as they are written, repeated ones repeated."""
        return [name for name, _ in self.message.raw_items()]

    @property
    def content_type(self) -> str:
        """`text/plain`, in lower case and without parameters."""
        return _content_type(self.message)

    @property
    def disposition(self) -> str | None:
        """`attachment`, `inline` or None."""
        return _tolerant(self.message.get_content_disposition, None)

    @property
    def filename(self) -> str | None:
        """The name that the sender gave, without directories, control characters and leading dots."""
        return filename_of(self.message)

    @property
    def data(self) -> bytes:
        """The content as bytes, its transfer encoding undone; of a message inside a message, its own bytes."""
        if isinstance(self.message, Tree) and self.message.is_multipart():
            return self.message.source[slice(*self.message.span)]
        return _tolerant(lambda: _payload(self.message), b"")

    @property
    def body(self) -> str | bytes:
        """Text as str with `\\n` line ends, undecodable characters replaced; anything else as bytes."""
        if not self.content_type.startswith("text/"):
            return self.data
        return decode(self.data, self.charset).replace("\r\n", "\n")

    @property
    def charset(self) -> str:
        """What its text is said to be in; `us-ascii` where nothing is said."""
        return _tolerant(self.message.get_content_charset, None) or "us-ascii"


def filename_of(message: Message, reading: Reading | None = None) -> str | None:
    """See `Part.filename`; `reading` is `decode`, or what stands for it. Raises only what that raises."""
    name = decode_words(str(_tolerant(message.get_filename, None) or ""), reading)
    name = "".join(filter(str.isprintable, re.split(r"[/\\]", name)[-1]))
    return name.lstrip(". ").strip()[:FILENAME_MAX] or None


def _payload(message: Message) -> bytes:
    payload = message.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else message.as_bytes()


def leaves(tree: Message) -> Iterator[Part]:
    """The parts that hold content, in order; a message inside a message is one of them, and is not looked into."""
    if tree.is_multipart() and _content_type(tree).startswith("multipart/"):
        for child in tree.get_payload():
            if isinstance(child, Message):
                yield from leaves(child)
    else:
        yield Part(tree)


def main_text(tree: Message) -> str | bytes:
    """The body a reader would call the text: the first text/plain, else the first text, else the first part."""
    parts = list(leaves(tree))
    texts = [p for p in parts if p.content_type.startswith("text/") and p.disposition != "attachment"]
    plain = [p for p in texts if p.content_type == "text/plain"]
    chosen = next(iter([*plain, *texts, *parts]), None)
    return chosen.body if chosen else b""
