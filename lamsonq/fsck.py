"""The accounting invariant: every message that was accepted is handled, or lies in a queue where it can be found.

Rules:

1. Nothing is changed. A queue may be in use while it is checked; for an account of all messages, stop it first.
2. A file or row that cannot be a job (its name or its record does not check out) is broken, and the check fails.
3. What lies in `tmp/` and `held/` was never promised to anybody: it is counted as left over, and is no failure. A job
   that has been settled, but whose puts were not all published when its process died, still has its own file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lamsonq import databases
from lamsonq.backends.maildir_files import FOLDERS, WHERE, Folders, Oversize, Unreadable, read_job
from lamsonq.backends.maildir_index import Index, put_at
from lamsonq.backends.maildir_names import is_deleted, parse_name
from lamsonq.errors import Refusal
from lamsonq.jobs import Job
from lamsonq.queue import message_of

_MESSAGE_ID = re.compile(rb"^message-id:\s*(\S+)", re.IGNORECASE | re.MULTILINE)
_HEADER_END = re.compile(rb"\r?\n\r?\n")


@dataclass
class QueueReport:
    """What one queue holds: jobs of each state, leftovers, and the files that are no jobs with the reason."""

    ready: int = 0
    delayed: int = 0
    reserved: int = 0
    dead: int = 0
    done: int = 0
    held: int = 0
    tmp: int = 0
    broken: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What was found under a directory; `outgoing` is how many jobs a SQLite file still has to hand over elsewhere,
    `missing` are the accepted Message-IDs that are nowhere, and `accounted` is how many of them were found."""

    queues: dict[str, QueueReport] = field(default_factory=dict)
    outgoing: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    accounted: int = 0

    @property
    def good(self) -> bool:
        return not self.missing and not any(queue.broken for queue in self.queues.values())

    def as_json(self) -> dict[str, object]:
        return {"good": self.good, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for path, queue in self.queues.items():
            jobs = f"ready {queue.ready}, delayed {queue.delayed}, reserved {queue.reserved}, dead {queue.dead}"
            jobs += f", done {queue.done}" if queue.done else ""
            yield f"{path}: {jobs}; left over: held {queue.held}, tmp {queue.tmp}; broken {len(queue.broken)}"
            for name, reason in queue.broken.items():
                yield f"  {name}: {reason}"
        for name, count in self.outgoing.items():
            yield f"{name}: {count} on their way to other queues"
        for message_id in self.missing:
            yield f"missing: {message_id}"
        yield "All is accounted for." if self.good else "Not all is accounted for."


def check(run: str | Path, accepted: Iterable[str] = (), handled: Iterable[str] = ()) -> Report:
    """Look at every file of every maildir queue, and every row of every SQLite queue, under `run`.

    `accepted` and `handled` are Message-IDs as in the header, or a Message-ID, a space and a recipient in lower case:
    of a message to several, one may be lost.

    Raises Refusal when `run` is no directory.
    """
    report = Report()
    wanted = set(accepted)
    report.accounted = len(wanted)
    wanted -= set(handled)
    for path in queues(run):
        queue = report.queues[str(path)] = QueueReport()
        for state, file in _files(path):
            ids = _look(path, state, file, queue)
            wanted -= ids
        queue.held = _count(path / "held")
        queue.tmp = sum(_count(path / sub) for sub in ("tmp", ".delayed/tmp", ".dead/tmp", ".done/tmp"))
    for database in databases.found(run):
        for name, queue, ids in _look_into(database):
            report.queues[name] = queue
            wanted -= ids
        on_their_way = _outgoing(database)
        if on_their_way:
            report.outgoing[str(database)] = len(on_their_way)
            wanted -= set().union(*on_their_way)
    report.missing = sorted(wanted)
    report.accounted -= len(wanted)
    return report


def _look_into(path: Path) -> Iterator[tuple[str, QueueReport, set[str]]]:
    """(name, what it holds, the Message-IDs in it) of each queue in a SQLite file."""
    database = databases.Database(path)
    try:
        for queue in database.queues():
            report, ids = QueueReport(), set[str]()
            for row in database.rows(queue):
                setattr(report, row.state, getattr(report, row.state) + 1)
                if row.trouble and row.state != "dead":  # a dead letter tells it itself
                    report.broken[row.key] = row.trouble
                else:
                    ids |= _ledger_lines(Job(key=row.key, body=row.body, recipients=row.recipients))
            yield databases.url_of(path, queue), report, ids
    except Refusal as refusal:
        yield f"sqlite:{path}", QueueReport(broken={path.name: str(refusal)}), set()


def _outgoing(path: Path) -> list[set[str]]:
    """The Message-IDs of each job that a SQLite file still has to hand over to another store."""
    try:
        rows = databases.Database(path).outgoing()
    except Refusal:  # told already
        return []
    return [_ledger_lines(Job(key=row.key, body=row.body, recipients=row.recipients)) for row in rows]


def counts(run: str | Path) -> dict[Path, dict[str, int]]:
    """How many jobs each queue under `run` has in each state. Reads names only."""
    return {path: Index(Folders(str(path))).counts() for path in queues(run)}


def oldest(queue: Path, now: float) -> float | None:
    """How long the oldest ready job of a queue has waited, in seconds; None when there is none. Reads names only."""
    path = Index(Folders(str(queue))).oldest()
    return None if path is None else round(max(0.0, now - min(now, put_at(path)[0])), 1)


def queues(run: str | Path) -> Iterator[Path]:
    """The maildir queues under a directory. Raises Refusal when it is none."""
    if not os.path.isdir(run):
        raise Refusal(f"{run} is not a directory: give the one that holds the queues")
    for folder, inner, _ in os.walk(run):
        inner.sort()
        if {"new", "cur", "tmp"} <= set(inner):
            yield Path(folder)
            inner[:] = [name for name in inner if name not in _OWN]


_OWN = {folder.partition("/")[0] for folder in FOLDERS}


def read_ids(path: str | None) -> list[str]:
    """The lines of a file, without blank ones; none without a file. Raises Refusal."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]


def _files(queue: Path) -> Iterator[tuple[str, Path]]:
    """(state, file) of everything in a queue that is to be a job."""
    for state, folders in WHERE.items():
        for folder in folders:
            yield from ((state, file) for file in _listed(queue / folder) if not is_deleted(file.name))
    for worker in _listed(queue / "claimed"):
        if worker.is_dir():
            yield from (("reserved", file) for file in _listed(worker))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def _count(folder: Path) -> int:
    return len(_listed(folder))


def _look(queue: Path, state: str, file: Path, report: QueueReport) -> set[str]:
    """Check one file and count it; the Message-IDs in it, alone and with each recipient."""
    name = parse_name(file.name)
    trouble = "a newer version of lamsonq has written it" if name is None else name.trouble
    job = None
    if name is not None and not trouble:
        try:
            job = read_job(str(file), name)
        except FileNotFoundError:
            return set()  # taken while we looked: it is where it went
        except (ValueError, Unreadable, Oversize, OSError) as error:
            trouble = str(error)
    if trouble:
        report.broken[str(file.relative_to(queue))] = trouble
    setattr(report, state, getattr(report, state) + 1)
    return set() if job is None else _ledger_lines(job)


def _ledger_lines(job: Job) -> set[str]:
    header = _HEADER_END.split(job.body, maxsplit=1)[0]
    ids = {found.decode("utf-8", "surrogateescape") for found in _MESSAGE_ID.findall(header)}
    recipients = message_of(job, "").route_to
    return ids | {f"{message_id} {recipient}" for message_id in ids for recipient in recipients}
