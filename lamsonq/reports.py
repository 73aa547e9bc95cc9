"""What is kept beside a job that has failed: when, the reason and the traceback of each failure.

    2026-11-29T01:02:03.456Z attempt 2: ValueError: no such post

    Traceback (most recent call last):
      ...

Rules: a report is text for people, one entry behind the other, and the head of each is all that a program reads. Two
failures of one kind have one fingerprint, whatever addresses, numbers and moments they name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from lamsonq.errors import Dead, Later, reason_of, report_of

_HEAD = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) attempt (\d{1,9}): (.*)$", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"\n]*)", line (\d+), in (.*)$', re.MULTILINE)
_VARIABLE = re.compile(r"""<[^<>\n]*>|"[^"\n]*"|'[^'\n]*'|\S+@\S+|0x[0-9a-f]+|\d+(?:\.\d+)*""")


@dataclass(frozen=True, slots=True)
class Entry:
    """One failure: `at` in seconds since the epoch, None where nobody has told; `attempt` counts from 1."""

    at: float | None
    attempt: int
    reason: str
    details: str = ""

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits, the same for failures of one kind: the error's words without what varies in them,
        and the place where it was raised."""
        frames = _FRAME.findall(self.details)
        place = " ".join(frames[-1]) if frames else ""
        return hashlib.sha256(f"{_VARIABLE.sub('?', self.reason)}\n{place}".encode("utf-8", "replace")).hexdigest()[:12]


def entry_of(outcome: Later | Dead, attempt: int, at: float) -> str:
    """The text of one failure, to be put behind what is there; "" for an outcome that says nothing, as of a dead letter
    whose report comes with it."""
    if not outcome.reason and outcome.__cause__ is None and outcome.__traceback__ is None:
        return ""
    reason = reason_of(outcome)
    details = report_of(outcome).partition("\n")[2].strip("\n")
    moment = datetime.fromtimestamp(min(max(at, 0.0), 253402300799.0), UTC).isoformat(timespec="milliseconds")
    head = f"{moment.removesuffix('+00:00')}Z attempt {attempt}: {reason}\n"
    return f"{head}\n{details}\n\n" if details else f"{head}\n"


def entries(report: str) -> list[Entry]:
    """The failures that a report tells of, oldest first."""
    heads = list(_HEAD.finditer(report))
    found = []
    before = report[: heads[0].start()] if heads else report
    if before.strip():
        reason, _, details = before.strip("\n").partition("\n")
        found.append(Entry(None, 1, reason, details.strip("\n")))
    ends = [head.start() for head in heads[1:]] + [len(report)]
    for head, end in zip(heads, ends, strict=False):
        at = datetime.fromisoformat(head[1]).timestamp()
        found.append(Entry(at, int(head[2]), head[3], report[head.end() : end].strip("\n")))
    return found


@dataclass(slots=True)
class Group:
    """Dead letters of one kind: `keys` in the order of the queue, `first` and `last` when such failures happened."""

    fingerprint: str
    reason: str
    target: str | None
    keys: list[str]
    first: float | None = None
    last: float | None = None


def grouped(reports: Iterable[tuple[str, str | None, str]]) -> list[Group]:
    """Groups of (key, target, report) by fingerprint and target, the largest first."""
    groups: dict[tuple[str, str | None], Group] = {}
    for key, target, report in reports:
        told = entries(report) or [Entry(None, 1, "no reason was kept")]
        last = told[-1]
        group = groups.setdefault((last.fingerprint, target), Group(last.fingerprint, last.reason, target, []))
        group.keys.append(key)
        moments = [entry.at for entry in told if entry.at is not None]
        group.first = min([*moments, *([] if group.first is None else [group.first])], default=None)
        group.last = max([*moments, *([] if group.last is None else [group.last])], default=None)
    return sorted(groups.values(), key=lambda group: -len(group.keys))
