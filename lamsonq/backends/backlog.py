"""The names that come next in a queue, without a look at the directory for each.

Rules: one look keeps the `LIMIT` smallest names in memory; they are used up before the next look, so that draining
costs the same per message however many wait. `complete` says that nothing else waits: then news are added one by one
as the watch tells them, and an empty queue is not looked at again. Without a watch the directory's time stamp tells
whether another look can find anything.
"""

from __future__ import annotations

import heapq
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

LIMIT = 20_000
_STAMP_SETTLES = 50_000_000
"""Nanoseconds: the kernel's clock for time stamps ticks slowly, a younger stamp may hide a second change."""


class Entry(NamedTuple):
    rank: str
    folder: str
    name: str


class Backlog:
    """Names of the regular files in some folders, smallest rank first.

    `rank(folder, name, regular)` gives a name's place in the order, or None for what is not to be taken.
    """

    def __init__(self, folders: Sequence[str], rank: Callable[[str, str, bool], str | None]) -> None:
        self._folders = folders
        self._rank = rank
        self._heap: list[Entry] = []
        self._stamp: tuple[int, ...] = ()
        self.complete = False

    def peek(self) -> Entry | None:
        return self._heap[0] if self._heap else None

    def pop(self) -> Entry | None:
        return heapq.heappop(self._heap) if self._heap else None

    def add(self, folder: str, name: str, *, known: bool = False) -> None:
        """A name has appeared. `known`: it comes next for certain; otherwise a later look may find it as well."""
        if not known and len(self._heap) > 2 * LIMIT:
            self.complete = False
        if not (self.complete or known):
            return
        try:
            regular = stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode)
        except OSError:  # it has gone already
            return
        rank = self._rank(folder, name, regular)
        if rank is not None:
            heapq.heappush(self._heap, Entry(rank, folder, name))

    def refill(self, watched: bool) -> bool:
        """Look at the directories if that can bring anything; whether there is something now."""
        if not self._current(watched):
            self._look()
        return bool(self._heap)

    def _current(self, watched: bool) -> bool:
        return self.complete and (watched or (bool(self._stamp) and self._stamp == self._stamps()))

    def _look(self) -> None:
        stamp = self._stamps()
        settled = time.time_ns() - max(stamp, default=0) > _STAMP_SETTLES
        self._stamp = stamp if settled else ()
        self._heap = heapq.nsmallest(LIMIT, self._entries())
        self.complete = len(self._heap) < LIMIT

    def _stamps(self) -> tuple[int, ...]:
        try:
            return tuple(os.stat(folder).st_mtime_ns for folder in self._folders)
        except FileNotFoundError:
            return ()

    def _entries(self) -> Iterator[Entry]:
        for folder in self._folders:
            try:
                found = os.scandir(folder)
            except FileNotFoundError:
                continue
            with found:
                for entry in found:
                    rank = self._rank(folder, entry.name, entry.is_file(follow_symlinks=False))
                    if rank is not None:
                        yield Entry(rank, folder, entry.name)
