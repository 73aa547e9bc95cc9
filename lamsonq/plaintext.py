"""The text of an HTML message, for readers that show no HTML.

Rules:

1. It is for HTML that this program made: everything a reader would see is kept, with the target of each link and the
   description of each image; styles, scripts and the head are not.
2. Blocks stand on lines of their own, blanks and line ends count for nothing outside of `pre`, as in HTML.
3. Nothing is fetched. Broken HTML gives some text, in linear time and never an exception; the standard library's
   parser takes minutes for some of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

ATTRIBUTES_MAX = 8 * 1024
"""Characters of one tag that are searched for attributes."""
INDENTS_MAX = 10
"""Levels of lists in lists that are indented."""

_UNSEEN = frozenset({"head", "script", "style", "template", "title"})
_RAW = frozenset({"script", "style", "title"})
_PARAGRAPHS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote", "pre", "hr"})
_LINES = frozenset(
    {
        *("address", "article", "aside", "body", "caption", "center", "dd", "div", "dt", "figcaption", "figure"),
        *("footer", "header", "html", "li", "main", "nav", "section", "tr"),
    }
)
_LINKS = ("http://", "https://", "mailto:", "tel:", "ftp://")


_tag = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9:-]*)|<!--|<[!?/]")
_tag_stop = re.compile(r"[>\"']")
_huge_number = re.compile(r"&#[0-9]{100,};?")
_attribute = re.compile(r"""([^\s=/"'>]+)(?:\s*+=\s*+("[^"]*"|'[^']*'|[^\s"']+))?""")


def text_of(html: str) -> str:
    """The text that a reader of this HTML sees, ending in a line end; "" when there is none."""
    reader = _Reader()
    for tag in tags(html):
        reader.data(unescaped(tag.before))
        if tag.closes:
            reader.end(tag.name)
        elif tag.name:
            reader.start(tag.name, tag.inside)
    return reader.text()


def unescaped(text: str) -> str:
    """The text with its character references as characters."""
    from html import unescape  # when it is used: it brings a table of two thousand characters

    # Python refuses to read a number of thousands of digits; what is no character is U+FFFD in HTML.
    return unescape(_huge_number.sub("\ufffd", text))


class Tag(NamedTuple):
    """A tag, and the text before it; `name` is "" for comments and the like, and at the end."""

    before: str
    name: str = ""
    closes: bool = False
    inside: str = ""


def tags(html: str) -> Iterator[Tag]:
    """The tags of HTML in order; what stands inside of scripts and styles is not looked into."""
    position = 0
    while found := _tag.search(html, position):
        before = html[position : found.start()]
        if found[2] is None:
            position = _behind(html, "-->" if found[0] == "<!--" else ">", found.end())
            yield Tag(before)
            continue
        name, stop = found[2].lower(), _tag_end(html, found.end())
        position = stop + 1
        yield Tag(before, name, bool(found[1]), html[found.end() : stop])
        if name in _RAW and not found[1]:
            closing = re.compile(rf"</{name}", re.IGNORECASE).search(html, position)
            position = closing.start() if closing else len(html)
    yield Tag(html[position:])


def _behind(html: str, mark: str, position: int) -> int:
    found = html.find(mark, position)
    return len(html) if found < 0 else found + len(mark)


def _tag_end(html: str, position: int) -> int:
    """Where the ">" is that ends this tag, quoted ones skipped; the end of the text when there is none."""
    while found := _tag_stop.search(html, position):
        if found[0] == ">":
            return found.start()
        closing = html.find(found[0], found.end())
        position = found.end() if closing < 0 else closing + 1
    return len(html)


def _attributes(inside: str) -> dict[str, str]:
    found = _attribute.finditer(inside[:ATTRIBUTES_MAX])
    return {one[1].lower(): unescaped(_unquoted(one[2] or "")) for one in found}


def _unquoted(value: str) -> str:
    return re.sub(r"^([\"'])(.*)\1$", r"\2", value, flags=re.DOTALL)


class _Reader:
    """Collects the text. `_gap` is how many line ends are owed before the next word, `_blank` whether a blank is."""

    def __init__(self) -> None:
        self._out: list[str] = []
        self._gap = 0
        self._blank = False
        self._unseen = 0
        self._pre = 0
        self._lists: list[int | None] = []  # the number of the next item, None in a list without numbers
        self._link: tuple[str, int] | None = None  # the target, and where in `_out` the link's text begins

    def text(self) -> str:
        lines = [line.rstrip() for line in "".join(self._out).split("\n")]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        return f"{text}\n" if text else ""

    def start(self, tag: str, inside: str) -> None:
        if tag in _UNSEEN:
            self._unseen += 1
            return
        self._begin_block(tag)
        if tag == "br":
            self._out.append("\n")
            self._blank = False
        elif tag == "hr":
            self._write("-" * 40)
            self._gap = 2
        elif tag == "img":
            self._write_words(_attributes(inside).get("alt", ""))
        elif tag in ("td", "th"):
            self._blank = True
        elif tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._begin_item()
        elif tag == "pre":
            self._pre += 1
        elif tag == "a":
            self._link = (_attributes(inside).get("href", ""), len(self._out))

    def end(self, tag: str) -> None:
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen - 1)
            return
        if tag == "a" and self._link is not None:
            self._end_link(*self._link)
            self._link = None
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif tag == "pre":
            self._pre = max(0, self._pre - 1)
        self._begin_block(tag)

    def data(self, data: str) -> None:
        if self._pre:
            self._write(data)
        else:
            self._write_words(data)

    def _begin_block(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            inner = tag in ("ul", "ol") and self._lists  # a list in a list needs no empty line
            self._gap = max(self._gap, 1 if inner else 2)
        elif tag in _LINES:
            self._gap = max(self._gap, 1)

    def _begin_item(self) -> None:
        number = self._lists[-1] if self._lists else None
        self._write("  " * min(len(self._lists) - 1, INDENTS_MAX) + ("- " if number is None else f"{number}. "))
        if number is not None:
            self._lists[-1] = number + 1

    def _end_link(self, target: str, start: int) -> None:
        """The target behind the text, unless it is the text."""
        shown = "".join(self._out[start:]).strip()
        bare = target.partition(":")[2].strip("/")
        if target.lower().startswith(_LINKS) and shown.strip("/") not in (bare, target.strip("/")):
            self._write(f" <{target}>" if shown else f"<{target}>")

    def _write_words(self, text: str) -> None:
        words = text.split()
        if not words:
            self._blank = self._blank or bool(text)
            return
        self._blank = self._blank or text[0].isspace()
        self._write(" ".join(words))
        self._blank = text[-1].isspace()

    def _write(self, text: str) -> None:
        if self._unseen or not text:
            return
        if self._gap:
            if self._out:
                self._out.append("\n" * self._gap)
        elif self._blank and self._out and not self._out[-1].endswith(("\n", " ")):
            self._out.append(" ")
        self._gap, self._blank = 0, False
        self._out.append(text)
