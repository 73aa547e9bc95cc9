"""The names that come next in a queue, without a look at the directory for each.

Rules: one look keeps the `LIMIT` smallest names in memory, and more where very many wait; they are used up before the
next look, so that draining costs the same per message however many wait. The horizon is the rank up to which all is
known: news before it are added one by one as the watch tells them, and an empty queue is not looked at again. Without a
watch the directory's time stamp tells whether another look can find anything.
"""

from __future__ import annotations

import heapq
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

LIMIT = 20_000
_MORE = 5
"""At most so many times LIMIT names are kept: some 30 MB."""
_PART = 8
"""Of very many names so great a part is kept, one in 8, so that each is read a few times only."""
_STAMP_SETTLES = 50_000_000
"""Nanoseconds: the kernel's clock for time stamps ticks slowly, a younger stamp may hide a second change."""

_ALL = "\U0010ffff"  # a horizon behind which no name can be


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
        self._horizon = ""
        self._stamp: tuple[int, ...] = ()
        self._seen = 0  # how many the last look has found

    def __len__(self) -> int:
        return len(self._heap)

    def outdate(self) -> None:
        """What is known is no longer all up to the horizon."""
        self._horizon = ""

    def peek(self) -> Entry | None:
        return self._heap[0] if self._heap else None

    def pop(self) -> Entry | None:
        return heapq.heappop(self._heap) if self._heap else None

    def put_back(self, entry: Entry) -> None:
        """What was taken out is still to come."""
        heapq.heappush(self._heap, entry)

    def clear(self) -> None:
        """Nothing is known any more."""
        self._heap, self._horizon = [], ""

    def add(self, folder: str, name: str, *, known: bool = False) -> None:
        """A name has appeared. `known`: it is kept even if a later look would find it as well."""
        if len(self._heap) > 2 * _MORE * LIMIT:
            self.outdate()
        if not (self._horizon or (known and self._heap)):
            return  # the next look finds it, in its place
        try:
            regular = stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode)
        except OSError:  # it has gone already
            return
        rank = self._rank(folder, name, regular)
        if rank is not None and (known or rank <= self._horizon):
            heapq.heappush(self._heap, Entry(rank, folder, name))

    def refill(self, watched: bool) -> bool:
        """Look at the directories if that can bring anything; whether there is something now."""
        if self._worth_a_look(watched):
            self._look()
        return bool(self._heap)

    def _worth_a_look(self, watched: bool) -> bool:
        if not self._horizon or (not self._heap and self._horizon != _ALL):
            return True
        return not watched and (not self._stamp or self._stamp != self._stamps())

    def _look(self) -> None:
        stamp = self._stamps()
        settled = time.time_ns() - max(stamp, default=0) > _STAMP_SETTLES
        self._stamp = stamp if settled else ()
        limit = max(LIMIT, min(self._seen // _PART, _MORE * LIMIT))
        self._seen = 0
        self._heap = heapq.nsmallest(limit, self._entries())
        self._horizon = _ALL if len(self._heap) < limit else self._heap[-1].rank

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
                        self._seen += 1
                        yield Entry(rank, folder, entry.name)
