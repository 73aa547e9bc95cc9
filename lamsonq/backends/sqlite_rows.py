"""Jobs as rows, and what is decided where a row is put.

Rules: text that is no Unicode (a mail's raw bytes, as Python has them) is kept as a blob. What is wrong with a row that
another program has put is a ValueError with a reason, and makes a dead letter of it. A job is put by one function,
whether on a connection of ours or of the user's, alone or with the job from which it comes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lamsonq.errors import Dead, Later
from lamsonq.jobs import Damaged, Done, Gate, Job, Put, due_after
from lamsonq.reports import entry_of

_T = TypeVar("_T")

COLUMNS = (
    "id, key, sender, recipients, peer, target, received, due, expires, priority, uniq, deliveries, attempts, metadata"
)
"""What `job_of` reads, without the body."""

COUNT_MAX = 2**31
"""No count goes far above it: what another program has put might be the largest that SQLite can keep."""

TOKEN_SIZE = 40
"""Characters of a worker's token. A row comes with room for it, so that a claim leaves its size as it was: then SQLite
changes the row in its place, and does not write the body once more."""

_ROOM = " " * (TOKEN_SIZE + len("reserved") - len("ready"))
_INSERT = """
insert into jobs (queue, key, state, priority, attempts, received, since, due, expires, sender, recipients, peer,
                  target, uniq, metadata, report, file, body, token) values
"""
_VALUES = f"(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '{_ROOM}')"
_INSERT_NEW = f"{_INSERT} {_VALUES} on conflict do nothing"
_TOGETHER = [f"{_INSERT} {', '.join([_VALUES] * number)}" for number in range(33)]
"""The statements that insert so many rows."""


def bound(text: str | None) -> str | bytes | None:
    """A text as SQLite keeps it."""
    if text is None or text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def text_of(value: Any) -> str | None:
    """What `bound` has kept."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogatepass")
    return None if value is None else str(value)


def readable(report: str) -> str:
    """A report is for people, so that what is no Unicode is only shown."""
    return report if report.isascii() else report.encode("utf-8", "backslashreplace").decode()


def body_of(value: Any) -> bytes:
    """The bytes of a body, which another program may have put as a text."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return value if isinstance(value, bytes) else b"" if value is None else str(value).encode()


def job_of(row: tuple[Any, ...], body: bytes, claim: str = "") -> Job:
    """The job in a row of COLUMNS. Raises ValueError."""
    recipients, metadata = row[3], row[13]
    try:
        return Job(
            key=text_of(row[1]) or "",
            body=body,
            sender=text_of(row[2]),
            recipients=() if recipients == "[]" else _texts(recipients),
            peer=text_of(row[4]),
            target=text_of(row[5]),
            received=row[6],
            due=row[7],
            expires=row[8],
            priority=row[9],
            unique=text_of(row[10]),
            deliveries=row[11],
            attempts=row[12],
            metadata={} if metadata == "{}" else _pairs(metadata),
            claim=claim,
        )
    except ValueError as error:
        raise ValueError(f"its row is not what a job's is: {error}") from error


def damaged_of(row: tuple[Any, ...], body: bytes, trouble: str) -> Damaged:
    """What can be read of a row of COLUMNS that is no job's."""
    return Damaged(
        key=legible(row[1]) or "",
        body=body,
        sender=legible(row[2]),
        recipients=_or(_texts, row[3], ()),
        peer=legible(row[4]),
        target=legible(row[5]),
        received=row[6],
        due=row[7],
        expires=row[8],
        priority=row[9],
        unique=legible(row[10]),
        deliveries=row[11],
        attempts=row[12],
        metadata=_or(_pairs, row[13], {}),
        trouble=trouble,
    )


def legible(value: Any) -> str | None:
    """The same for people, who are to see also what another program has put and `text_of` cannot read."""
    try:
        return text_of(value)
    except UnicodeDecodeError:
        return str(value, "utf-8", "replace")


def _or(read: Callable[[str], _T], value: str, otherwise: _T) -> _T:
    try:
        return read(value)
    except ValueError:
        return otherwise


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _texts(value: str) -> tuple[str, ...]:
    found = _json(value)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError("`recipients` is no JSON array of texts")
    return tuple(found)


def _pairs(value: str) -> dict[str, str]:
    found = _json(value)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError("`metadata` is no JSON object of texts")
    return found


@dataclass(slots=True)
class Row:
    """A job on its way into the table; with a `file` the body lies there."""

    queue: str
    job: Job
    now: float
    outcome: Later | Dead | Done | None
    gate: Gate | None
    report: str
    file: str | None = None


def row_of(put: Put, queue: str, now: float) -> Row:
    """`now` is the clock of the queue."""
    report = put.report
    if isinstance(put.outcome, Later | Dead):
        report += entry_of(put.outcome, max(put.job.attempts, 1), now)
    return Row(queue, put.job, now, put.outcome, put.gate, readable(report))


def insert(database: sqlite3.Connection, rows: Sequence[Row]) -> list[bool | None]:
    """For each: False, not kept because of unique or the gate; None, the key is there already."""
    results: list[bool | None] = []
    for begin in range(0, len(rows), len(_TOGETHER) - 1):
        some = rows[begin : begin + len(_TOGETHER) - 1]
        results += _insert_together(database, some) or [_insert_one(database, row) for row in some]
    return results


def _insert_together(database: sqlite3.Connection, rows: Sequence[Row]) -> list[bool | None] | None:
    """By one statement: other threads run while a statement is at work, and with one for each row this thread would
    wait for them as often. None: some are refused, and nothing was inserted."""
    if len(rows) == 1 or any(row.gate is not None for row in rows):
        return None
    values = [value for row in rows for value in _values(row, row.job.due)]
    try:
        database.execute(_TOGETHER[len(rows)], values)
    except sqlite3.IntegrityError:
        if not database.in_transaction:  # a trigger has rolled back everything: what is put from here on would stay
            raise
        return None
    return [True] * len(rows)


def _insert_one(database: sqlite3.Connection, row: Row) -> bool | None:
    cursor = database.cursor()
    cursor.row_factory = None
    key, due = bound(row.job.key), row.job.due
    if row.gate is not None:
        known = _conflict(cursor, row, key)
        if known is not True:
            return known
        passage = row.gate.passage(_number(cursor, row.queue, row.gate.key), row.now)
        if passage is None:
            return False
        _set_number(cursor, row.queue, row.gate, passage.last)
        due = passage.due
    cursor.execute(_INSERT_NEW, _values(row, due))
    if cursor.rowcount:
        return True
    return _conflict(cursor, row, key)


def _values(row: Row, due: float | None) -> tuple[Any, ...]:
    """What _INSERT asks for; `due` is the job's own moment, or its gate's."""
    job, now, outcome = row.job, row.now, row.outcome
    state = "ready"
    if isinstance(outcome, Later):
        due = due_after(outcome, job.attempts, now) if outcome.at is not None or job.attempts else due
    elif outcome is not None:
        state = "dead" if isinstance(outcome, Dead) else "done"
    if state == "ready" and due is not None and due > now:
        state = "delayed"
    return (
        *(row.queue, bound(job.key), state, job.priority, job.attempts, job.received or now, now),
        *(due if state == "delayed" else None, job.expires, bound(job.sender)),
        json.dumps(job.recipients) if job.recipients else "[]",
        *(bound(job.peer), bound(job.target), bound(job.unique)),
        json.dumps(dict(job.metadata)) if job.metadata else "{}",
        *(row.report, row.file, None if row.file else job.body),
    )


def _conflict(cursor: sqlite3.Cursor, row: Row, key: str | bytes | None) -> bool | None:
    """True: there is none."""
    if cursor.execute("select 1 from jobs where queue = ? and key = ?", (row.queue, key)).fetchall():
        return None
    if row.job.unique is None or isinstance(row.outcome, Dead | Done):
        return True
    query = "select 1 from jobs where queue = ? and uniq = ? and state in ('ready', 'delayed', 'parked', 'reserved')"
    return not cursor.execute(query, (row.queue, bound(row.job.unique))).fetchall()


def _number(cursor: sqlite3.Cursor, queue: str, key: str) -> float | None:
    query = "select last from lamsonq_gates where queue = ? and key = ?"
    found = cursor.execute(query, (queue, bound(key))).fetchall()
    return found[0][0] if found else None


def _set_number(cursor: sqlite3.Cursor, queue: str, gate: Gate, last: float) -> None:
    cursor.execute(
        "insert into lamsonq_gates values (?, ?, ?, ?) on conflict do update set last = excluded.last,"
        " until = excluded.until",
        (queue, bound(gate.key), last, last + gate.memory),
    )
