"""Mailboxes that blast and cleanse read: an mbox file or a maildir, one message at a time.

Rules:

1. Only one message is in memory, whatever the size of the mailbox.
2. In an mbox a message begins at a line `From sender date`, at the head of the file or behind an empty line. The line
   and that empty line are not part of a message; every other byte is.
3. A queue of ours is a maildir too: its messages come with the envelope that they were queued with.
4. What cannot be read is an error of that one message.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import click

from lamsonq.address import is_path_address
from lamsonq.backends.maildir_files import Oversize, Unreadable, read_job
from lamsonq.backends.maildir_names import is_deleted, parse_name
from lamsonq.errors import Refusal
from lamsonq.mail import MailRequest
from lamsonq.queue import message_of

_FROM_LINE = re.compile(rb"From (\S*) .*[0-9]:[0-9]{2}")
_LINE_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of a mailbox.

    `read` gives it, or raises ValueError with the reason why not; `size` is how much of the mailbox it is, in the
    mailbox's own unit.
    """

    name: str
    size: int
    read: Callable[[], MailRequest]


class Mailbox(Protocol):
    """A mailbox: its messages, and how much there is in all."""

    def __iter__(self) -> Iterator[Entry]: ...

    def size(self) -> int: ...


def open_mailbox(path: str) -> Mailbox:
    """The mailbox at a path. Raises Refusal when there is none."""
    if os.path.isdir(os.path.join(path, "new")) and os.path.isdir(os.path.join(path, "cur")):
        return _Maildir(path)
    try:
        with open(path, "rb") as file:
            start = file.readline(_LINE_MAX)
            if os.path.isfile(path) and (not start or _FROM_LINE.match(start)):
                return _Mbox(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | IsADirectoryError):
            raise Refusal(f"cannot read {path}: {error.strerror}") from error
    raise Refusal(f"{path} does not exist or is not a valid mbox or maildir")


def with_progress(mailbox: Mailbox) -> Iterator[Entry]:
    """The messages; on a terminal a bar shows how far it is, on stderr."""
    if not sys.stderr.isatty():
        yield from mailbox
        return
    with click.progressbar(range(mailbox.size()), file=sys.stderr) as bar:
        for entry in mailbox:
            yield entry
            bar.update(entry.size)


class _Maildir:
    """A message is a file in new or cur; the unit of its size is one message."""

    def __init__(self, path: str) -> None:
        self.path = path

    def size(self) -> int:
        return sum(1 for _ in self._files())

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in ("new", "cur"):
            with os.scandir(os.path.join(self.path, folder)) as found:
                yield from (file for file in found if not file.name.startswith(".") and not is_deleted(file.name))

    def __iter__(self) -> Iterator[Entry]:
        for file in self._files():
            yield Entry(file.path, 1, lambda path=file.path: _read_file(path))  # type: ignore[misc]


def _read_file(path: str) -> MailRequest:
    name = parse_name(os.path.basename(path))
    if name is None:
        raise ValueError("a newer version of lamsonq has written it")
    try:
        job = read_job(path, name)
    except Unreadable as error:
        raise ValueError(str(error)) from error
    except (OSError, Oversize) as error:
        raise ValueError(getattr(error, "strerror", None) or "it cannot be read") from error
    return message_of(job, os.path.dirname(path))


class _Mbox:
    """The unit of size is an octet."""

    def __init__(self, path: str) -> None:
        self.path = path

    def size(self) -> int:
        return os.path.getsize(self.path)

    def __iter__(self) -> Iterator[Entry]:
        with open(self.path, "rb") as file:
            for number, (sender, size, data) in enumerate(_split(file), 1):
                yield Entry(f"{self.path}, mail {number}", size, lambda s=sender, d=data: _with_sender(s, d))  # type: ignore[misc]


def _split(file: BinaryIO) -> Iterator[tuple[str, int, bytes]]:
    """Sender, octets in the file and bytes of each message."""
    lines: list[bytes] = []
    start, whole, empty = b"", True, True
    for line in iter(lambda: file.readline(_LINE_MAX), b""):
        if whole and empty and _FROM_LINE.match(line):
            if start:
                yield _message(start, lines)
            start, lines, empty = line, [], False
        else:
            empty = whole and line in (b"\n", b"\r\n")
            lines.append(line)
        whole = line.endswith(b"\n")
    if start:
        yield _message(start, lines)


def _message(start: bytes, lines: list[bytes]) -> tuple[str, int, bytes]:
    size = len(start) + sum(map(len, lines))
    if len(lines) > 1 and lines[-1] in (b"\n", b"\r\n"):
        lines.pop()
    found = _FROM_LINE.match(start)
    return found[1].decode("utf-8", "replace") if found else "", size, b"".join(lines)


def _with_sender(sender: str, data: bytes) -> MailRequest:
    """The message; the line in front of it knows the sender where there is no Return-Path."""
    request = MailRequest(None, None, None, data)
    if "return-path" in request:
        return request
    if sender.strip("<>").lower() in ("", "mailer-daemon"):
        return MailRequest(None, "", None, data)
    return MailRequest(None, sender, None, data) if is_path_address(sender) else request
