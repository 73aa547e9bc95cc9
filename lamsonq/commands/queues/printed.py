"""Jobs as they are shown: to people in lines, to programs as records.

Rules:

1. What a stranger wrote (addresses, headers, reasons) reaches a terminal without its control characters.
2. A message itself is printed as the bytes that it is, because it may be in any character set.
3. In a record moments are seconds since the epoch, ages are seconds, and None is what is not known.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lamsonq.errors import Refusal

if TYPE_CHECKING:
    from lamsonq.jobs import Job

RECORD_VERSION = 1
"""What the records of `export` say of their form."""

_DEPTHS = ("ready", "delayed", "reserved", "dead")

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def print_line(line: str) -> None:
    """One line, or several. Raises Refusal when it cannot be printed."""
    print_bytes(f"{line}\n".encode("utf-8", "surrogateescape"))


def print_json(record: Mapping[str, Any]) -> None:
    print_line(json.dumps(record))


def print_bytes(data: bytes) -> None:
    """The bytes as they are. Raises Refusal when they cannot be printed."""
    if sys.stdout is None:
        raise Refusal("there is no standard output to print to")
    try:
        sys.stdout.flush()
        rest = memoryview(data)
        while rest:  # with PYTHONUNBUFFERED the file is written directly, and may take a part only
            rest = rest[sys.stdout.buffer.write(rest) :]
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # what it still holds cannot be printed at the end either
        raise Refusal(f"cannot print: {error.strerror}") from error


def shown(text: str | None) -> str:
    """A stranger's text, in one line and harmless to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text or "")


def span(seconds: float | None) -> str:
    """A time as people say it: 42s, 3m, 5h, 12d."""
    if seconds is None or not math.isfinite(seconds):  # another program has put a moment that is none
        return "-"
    unit, size = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    return f"{int(seconds // size)}{unit}"


def moment(at: float | None) -> str:
    """A moment as people read it, in UTC."""
    if at is None:
        return "-"
    try:
        return f"{datetime.fromtimestamp(at, UTC).isoformat(timespec='seconds').removesuffix('+00:00')}Z"
    except (ValueError, OverflowError, OSError):
        return f"{at:g}"


def summary(job: Job, state: str, now: float) -> dict[str, Any]:
    """What `ls` tells of a job."""
    return {
        "key": job.key,
        "state": state,
        "target": job.target,
        "sender": job.sender,
        "recipients": list(job.recipients),
        "age": round(max(0.0, now - job.received), 1) if job.received else None,
        "due": job.due,
        "priority": job.priority,
        "attempts": job.attempts,
        **_trouble(job),
    }


def row(record: Mapping[str, Any], now: float) -> str:
    """A summary in a line."""
    sender = "-" if record["sender"] is None else f"<{shown(record['sender'])}>"
    due = "" if record["due"] is None else f"  due in {span(max(0.0, record['due'] - now))}"
    recipients = shown(", ".join(record["recipients"])) or "-"
    return (
        f"{shown(record['key'])}  {span(record['age']):>4}  priority {record['priority']}  "
        f"attempts {record['attempts']}{due}  {shown(record['target']) or 'by address'}  {sender} -> {recipients}"
    )


def columns(queues: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What `survey.queues` tells, a line for each queue."""
    names = {name: shown(f"{name}:") for name in queues}
    states = {state: max((len(str(told[state])) for told in queues.values()), default=0) for state in _DEPTHS}
    name_width = max(map(len, names.values()), default=0)
    lines = []
    for name, told in queues.items():
        figures = [f"{state} {told[state]:>{width}}" for state, width in states.items()]
        figures.insert(1, f"oldest {span(told['oldest']):>4}")
        notes = ["paused"] if told["paused"] else []
        figures = [shown(told["trouble"])] if "trouble" in told else [*figures, *notes]
        lines.append(f"{names[name]:<{name_width}}  {'  '.join(figures)}")
    return lines


def whole(job: Job, state: str) -> dict[str, Any]:
    """Everything that is recorded of a job, but for its body and report."""
    return {
        "key": job.key,
        "state": state,
        "target": job.target,
        "sender": job.sender,
        "recipients": list(job.recipients),
        "peer": job.peer,
        "received": job.received or None,
        "due": job.due,
        "expires": job.expires,
        "priority": job.priority,
        "unique": job.unique,
        "deliveries": job.deliveries,
        "attempts": job.attempts,
        "metadata": dict(job.metadata),
        "size": len(job.body),
        **_trouble(job),
    }


def _trouble(job: Job) -> dict[str, str]:
    from lamsonq.jobs import Damaged

    return {"trouble": job.trouble} if isinstance(job, Damaged) else {}


def body_fields(body: bytes) -> dict[str, str]:
    """The body as JSON can hold it: `body` is the text where it is UTF-8, else `body_base64`."""
    try:
        return {"body": body.decode("utf-8")}
    except UnicodeDecodeError:
        import base64

        return {"body_base64": base64.b64encode(body).decode("ascii")}
