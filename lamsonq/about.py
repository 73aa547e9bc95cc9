"""Which message is being worked on: for the log lines about it, and for the keys of what is kept of it.

Rules:

1. While a message is worked on, an `About` says which: its id, its queue, the function and the recipient. It follows
   the message from thread to thread and into `async def` functions; a thread that a handler starts by itself has none.
2. A message that came in by SMTP gets its id at the last dot; the keys of what is kept of it begin with that id. The id
   of a message in a queue is its key. What a function delivers on the way is about the message that it handles.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from lamsonq.keys import derived_key

T = TypeVar("T")


@dataclass(slots=True)
class About:
    """The message that is being worked on: "" where something is not known.

    `keys` counts what is kept of it, in the process `pid`; None where its key belongs to a job that is there already.
    """

    id: str = ""
    queue: str = ""
    handler: str = ""
    recipient: str = ""
    keys: count[int] | None = None
    pid: int = 0

    def for_call(self, handler: str | None, recipient: str) -> About:
        """The same message in the hands of one function."""
        return About(self.id, self.queue, handler or "", recipient, self.keys, self.pid)

    def next_key(self) -> str | None:
        """A key for something that is to be kept of this message, if its id may be used for that."""
        if self.keys is None or self.pid != os.getpid():  # a process that a handler forks has a copy of the counter
            return None
        number = next(self.keys)
        # Behind R0, which nothing else makes: a job of this message may be split, and its parts are R1, R2, ...
        return derived_key(derived_key(self.id, 0), number) if number else self.id


NOTHING = About()
_about: contextvars.ContextVar[About] = contextvars.ContextVar("lamsonq_about", default=NOTHING)


def current() -> About:
    """What the calling code works on."""
    return _about.get()


class about:
    """What is logged in this block is about this message."""

    __slots__ = ("_message", "_token")

    def __init__(self, message: About) -> None:
        self._message = message

    def __enter__(self) -> None:
        self._token = _about.set(self._message)

    def __exit__(self, *_: object) -> None:
        _about.reset(self._token)


def within(message: About, function: Callable[[], T]) -> Callable[[], T]:
    """The function, for whatever thread: what it logs is about this message."""

    def run() -> T:
        with about(message):
            return function()

    return run


def received(id: str) -> About:
    """A message that has just come in and gets this id, a key that nothing else has."""
    return About(id, keys=count(), pid=os.getpid())
