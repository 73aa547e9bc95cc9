"""What a server has handled: counted where attempts are settled, added up by the parent, read by `lamsonq status`.

Rules:

1. A child counts in memory and tells its parent now and then; nobody who handles a message waits for that. Who tells
   is woken by the first news since he told; while there are none, nobody looks.
2. The parent keeps a small file beside its pid file, written anew as a whole. It is for people who look: losing it
   loses nothing else, and no failure to write it stops a server.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

EVERY = 2.0
"""Seconds between two reports of a child, and between two writings of the file, while there is anything new."""

MINUTES = 5
"""The rate is that of the last minutes, so many."""

FIGURES = (
    *("boot", "workers", "started", "uptime"),
    *("handled", "failed", "last_settled", "last_claim", "per_minute"),
)
"""What is told of a server; docs/commands.md explains each."""


class Tally:
    """What this process has settled. `on_news` is called, in any thread, when there is something to tell."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self.handled = 0
        self.failed = 0
        self.last = 0.0
        self.claimed = 0.0
        self.on_news: Callable[[], None] = _nobody
        self._is_known = False

    def on_pop(self, _job: object) -> None:
        """A job was claimed: this is a consumer of events."""
        self.claimed = time.time()
        self.news()

    def count(self, success: bool) -> None:
        """One attempt was settled, by its success or by a failure that counts."""
        with self._lock:
            self.handled += success
            self.failed += not success
            self.last = time.time()
        self.news()

    def news(self) -> None:
        """There is something to tell, of this or of the process."""
        if not self._is_known:
            self._is_known = True
            self.on_news()

    def told(self) -> bytes:
        """The figures in a line, for the parent."""
        self._is_known = False  # first: what comes from here on is news again
        with self._lock:
            return json.dumps([self.handled, self.failed, round(self.last, 3), round(self.claimed, 3)]).encode()


def _nobody() -> None:
    """Nobody wants to know."""


TALLY = Tally()
os.register_at_fork(after_in_child=TALLY._begin)


@dataclass
class Totals:
    """What all children of a server have settled since it was started; a reload hands it on.

    `started`, `last_settled` and `last_claim` are seconds since the epoch; `minutes` counts what was settled in each of
    the last minutes.
    """

    path: str
    started: float = field(default_factory=time.time)
    handled: int = 0
    failed: int = 0
    last_settled: float = 0.0
    last_claim: float = 0.0
    minutes: dict[str, int] = field(default_factory=dict)
    known: dict[str, tuple[int, int]] = field(default_factory=dict)  # what each living child has told, by its pid
    due: float | None = None  # when the file is to be written, by the monotonic clock

    def add(self, pid: int, line: bytes) -> None:
        """Take what a child tells. Raises ValueError for what is no report."""
        handled, failed, last, *more = json.loads(line)
        before = self.known.get(str(pid), (0, 0))
        self.known[str(pid)] = (handled, failed)
        self.handled += handled - before[0]
        self.failed += failed - before[1]
        self.last_settled = max(self.last_settled, last)
        self.last_claim = max([self.last_claim, *more[:1]])  # a child from before an upgrade does not tell it
        minute = int(last // 60)
        self.minutes[str(minute)] = self.minutes.get(str(minute), 0) + handled + failed - sum(before)
        self.minutes = {m: n for m, n in self.minutes.items() if int(m) > minute - MINUTES - 1}
        self.changed()

    def forget(self, pid: int) -> None:
        """A child has ended."""
        self.known.pop(str(pid), None)
        self.changed()

    def changed(self) -> None:
        """Something is to be written, though not at once."""
        if self.due is None:
            self.due = time.monotonic() + EVERY

    def write(self, boot: str, children: list[int], workers: int, grace: float) -> None:
        """Write the file: the boot, the children that work, and what the server was started with."""
        self.due = None
        figures = {
            "version": 1,
            "pid": os.getpid(),
            "boot": boot,
            "started": round(self.started, 3),
            "children": children,
            "options": {"workers": workers, "grace": grace},
            "handled": self.handled,
            "failed": self.failed,
            "last_settled": self.last_settled or None,
            "last_claim": self.last_claim or None,
            "minutes": self.minutes,
        }
        try:
            with open(f"{self.path}.tmp", "w", encoding="ascii") as file:
                json.dump(figures, file)
            os.replace(f"{self.path}.tmp", self.path)
        except OSError:  # a full disk, for one: the figures of before stay, and no half file beside them
            remove(f"{self.path}.tmp")

    def remove(self) -> None:
        remove(self.path)


def beside(pid_file: str) -> str:
    """Where a server's figures stand: `run/smtp.status` for `run/smtp.pid`."""
    return f"{pid_file.removesuffix('.pid')}.status"


def remove(path: str) -> None:
    """Remove a file of figures, if it is there."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _told(pid_file: str, pid: int) -> dict[str, Any]:
    """What is in the file. Raises one of _UNKNOWN where that is nothing, or not of this server."""
    with open(beside(pid_file), encoding="ascii") as file:
        found: dict[str, Any] = json.load(file)
    if found["pid"] != pid or found["version"] != 1:
        raise ValueError("another server's")
    return found


_UNKNOWN = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Started:
    """What a server was started with, as far as it is what it is and not where it runs."""

    boot: str
    workers: int
    grace: float


def started(pid_file: str, pid: int) -> Started | None:
    """What the server with this pid was started with, if that is known."""
    try:
        found = _told(pid_file, pid)
        options = found["options"]
        return Started(str(found["boot"]), int(options["workers"]), float(options["grace"]))
    except _UNKNOWN:
        return None


def figures(pid_file: str, pid: int, now: float | None = None) -> dict[str, Any]:
    """What the server with this pid has told last: what FIGURES names.

    Times are seconds since the epoch, `uptime` is seconds; None stands for what is not known.
    """
    now = time.time() if now is None else now
    try:
        found = _told(pid_file, pid)
        uptime = max(0.0, now - found["started"])
        recent = sum(n for minute, n in found["minutes"].items() if int(minute) > now // 60 - MINUTES)
        rate = recent / min(float(MINUTES), max(1.0, uptime / 60))
        return {
            "boot": found["boot"],
            "workers": len(found["children"]),
            "started": found["started"],
            "uptime": round(uptime, 1),
            "handled": found["handled"],
            "failed": found["failed"],
            "last_settled": found["last_settled"],
            "last_claim": found.get("last_claim"),  # one that was started before an upgrade does not tell it
            "per_minute": round(rate, 2),
        }
    except _UNKNOWN:
        return dict.fromkeys(FIGURES)
