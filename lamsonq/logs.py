"""Log lines that say which message they are about; for programs, one JSON object each.

Rules:

1. A formatter of this file writes the message's id (lamsonq/about.py); it is looked up where the line is logged. So a
   handler that writes in another thread (logging.handlers.QueueHandler) is the one that needs the formatter.
2. To format never raises and never makes a second line in JSON, whatever is logged.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime

from lamsonq.about import current

_FIELDS = ("id", "queue", "handler", "recipient")
_DEEPEST = 6  # levels of a container that are written as JSON; what is inside them is written as Python shows it
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


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
