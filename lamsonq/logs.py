"""What a log line says about the message that it is about, and log lines for programs: one JSON object each.

Rules:

1. While a message is worked on, an `About` says which: its id, its queue, the function and the recipient. It follows
   the message from thread to thread and into `async def` functions; a thread that a handler starts by itself has none.
2. A message that came in by SMTP gets its id at the last dot; the keys of what is kept of it begin with that id. The id
   of a message in a queue is its key. What a function delivers on the way is logged under the message that it handles.
3. A formatter of this file writes the id; it is looked up where the line is logged. So a handler that writes in another
   thread (logging.handlers.QueueHandler) is the one that needs the formatter.
4. To format never raises and never makes a second line in JSON, whatever is logged.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from typing import TypeVar

from lamsonq.jobs import derived_key

T = TypeVar("T")

_FIELDS = ("id", "queue", "handler", "recipient")
_DEEPEST = 6  # levels of a container that are written as JSON; what is inside them is written as Python shows it
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(slots=True)
class About:
    """The message that is being worked on: "" where something is not known.

    `keys` counts what is kept of it; None where its key belongs to a job that is there already.
    """

    id: str = ""
    queue: str = ""
    handler: str = ""
    recipient: str = ""
    keys: count[int] | None = None

    def for_call(self, handler: str | None, recipient: str) -> About:
        """The same message in the hands of one function."""
        return replace(self, handler=handler or "", recipient=recipient)

    def next_key(self) -> str | None:
        """A key for something that is to be kept of this message, if its id may be used for that."""
        if self.keys is None:
            return None
        number = next(self.keys)
        # Behind R0, which nothing else makes: a job of this message may be split, and its parts are R1, R2, ...
        return derived_key(derived_key(self.id, 0), number) if number else self.id


NOTHING = About()
_about: contextvars.ContextVar[About] = contextvars.ContextVar("lamsonq_about", default=NOTHING)


def current() -> About:
    """What the calling code works on."""
    return _about.get()


@contextlib.contextmanager
def about(message: About) -> Iterator[None]:
    """What is logged in this block is about this message."""
    token = _about.set(message)
    try:
        yield
    finally:
        _about.reset(token)


def within(message: About, function: Callable[[], T]) -> Callable[[], T]:
    """The function, for whatever thread: what it logs is about this message."""

    def run() -> T:
        with about(message):
            return function()

    return run


def received(id: str) -> About:
    """A message that has just come in and gets this id, a key that nothing else has."""
    return About(id, keys=count())


class LineFormatter(logging.Formatter):
    """As logging.Formatter; `%(id)s`, `%(queue)s`, `%(handler)s` and `%(recipient)s` tell what the line is about."""

    def format(self, record: logging.LogRecord) -> str:
        for field, value in _told(record).items():
            if field not in vars(record):
                setattr(record, field, value)
        return super().format(record)


class JSONFormatter(logging.Formatter):
    """One JSON object a line, in ASCII.

    `time` (RFC 3339, UTC), `level`, `logger`, `message` and `process` are always there; `id`, `queue`, `handler` and
    `recipient` when they are known; `error`, `traceback` and `stack` when there are any; then whatever `extra=` holds,
    with an underscore behind its name where ours is the same. What JSON does not have is written as Python shows it.
    """

    def format(self, record: logging.LogRecord) -> str:
        try:
            return _dumped(self._fields(record))
        except Exception:  # any object may be logged; a line about it that says little is better than none
            return _dumped(_essentials(record, f"a {type(record.msg).__name__} that cannot be written"))

    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        fields = _essentials(record, _message(record))
        fields |= {field: value for field, value in _told(record).items() if value}
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and record.exc_info:
            fields["error"] = f"{type(error).__name__}: {_text(error)}"
            fields["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in _FIELDS:
                fields[f"{name}_" if name in fields else name] = _plain(value)
        return fields


def _told(record: logging.LogRecord) -> Mapping[str, str]:
    """What a record is about; what `extra=` says of that goes before."""
    known = current()
    return {field: _text(vars(record).get(field, getattr(known, field))) for field in _FIELDS}


def _essentials(record: logging.LogRecord, message: str) -> dict[str, object]:
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return {
        "time": moment.replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "message": message,
        "process": record.process,
    }


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # "%d" for a str, most often
        return f"{_text(record.msg)} {_text(record.args)} ({type(error).__name__}: {_text(error)})"


def _plain(value: object, depth: int = 0) -> object:
    """The value as JSON has it."""
    if value is None or isinstance(value, bool):
        return value
    if type(value) is str:
        return value
    if type(value) is int:
        return value if value.bit_length() < 1024 else hex(value)  # int(str) of others has a limit of digits
    if type(value) is float:
        return value if math.isfinite(value) else repr(value)
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {_text(key): _plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, str) else _shown(value)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # any object: its own code fails
        return _shown(value)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # as above
        return f"<{type(value).__name__}>"


def _dumped(fields: Mapping[str, object]) -> str:
    """ASCII, so that no character ends a line or has no place in the file's encoding."""
    return json.dumps(fields, ensure_ascii=True, allow_nan=False)
