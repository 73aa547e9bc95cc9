"""What comes next in a maildir queue, and sleeping until something does.

Rules: names come in the order of their keys, which is the order in which they were put. A delayed job becomes ready by
a rename when it is due. What cannot be a job is left where it is, said once, and never looked at again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

from lamsonq.backends.backlog import Backlog, Entry
from lamsonq.backends.maildir_files import READY, Folders
from lamsonq.backends.maildir_names import due_of, fitted, is_bound, is_deleted, is_newer, parse_name
from lamsonq.backends.watch import Watch

BLIND_LOOK_EVERY = 1.0
"""Seconds between two looks where the kernel gives no watches."""
_NOTES_MAX = 1000
_FEW = 200


class Arrivals:
    """The ready and the delayed of one queue, for the one thread that reserves; `wake` is for any thread."""

    def __init__(self, folders: Folders, clock: Callable[[], float]) -> None:
        self._folders = folders
        self._clock = clock
        self._lock = threading.RLock()
        self._watch: Watch | None = None
        self._left_alone: set[str] = set()
        self._aside: dict[str, str] = {}
        self._blind_look_at = 0.0
        ready = folders.of("ready")
        self._ready = {False: Backlog(ready, self._rank), True: Backlog(ready, self._rank_bound)}
        self._delayed = Backlog(folders.of("delayed"), self._rank_delayed)

    # -- what is next ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Take note of what has appeared and of what has become due."""
        if self._watch is not None and self._watch.seeing:
            self._hear(self._watch)
        elif len(self._delayed) > _FEW:
            self._look_seldom()
        self._promote()

    def _look_seldom(self) -> None:
        """So many jobs are not to be read again whenever one comes: watch them, or else look now and then."""
        watch = self._own_watch()
        if not watch.tried:
            self._follow(watch)

    def next(self, bound: bool, *, more: bool) -> Entry | None:
        """The next name; `more` is whether to look into the directories when none is known."""
        backlog = self._ready[bound]
        entry = backlog.pop()
        if entry is None and more and backlog.refill(self._seeing):
            if len(backlog) > _FEW and not self._seeing:
                # Jobs that come of these ones, bound to one call each, are to run among them and not after them all.
                self._look_seldom()
                backlog.refill(self._seeing)
            entry = backlog.pop()
        return entry

    def look_again(self) -> None:
        """Something that was taken out is still there."""
        for backlog in self._backlogs():
            backlog.outdate()

    def set_aside(self, entry: Entry) -> None:
        self._aside[entry.name] = entry.folder

    def take_back(self) -> None:
        """What was set aside comes next."""
        aside, self._aside = self._aside, {}
        for name, folder in aside.items():
            for backlog in self._ready.values():
                backlog.add(folder, name, known=True)

    @property
    def has_aside(self) -> bool:
        return bool(self._aside)

    def _promote(self) -> None:
        blind = self._watch is not None and self._watch.tried and not self._watch.seeing
        if not blind or time.monotonic() >= self._blind_look_at:
            self._blind_look_at = time.monotonic() + BLIND_LOOK_EVERY
            self._delayed.refill(self._seeing)
        now = int(self._clock() * 1000)
        while (first := self._delayed.peek()) is not None and int(first.rank) <= now:
            self._delayed.pop()
            name = parse_name(first.name)
            if name is None:
                continue
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                path = self._folders.move(os.path.join(first.folder, first.name), READY, fitted(name)._replace(due=0))
                for backlog in self._ready.values():
                    backlog.add(os.path.dirname(path), os.path.basename(path), known=True)

    def _backlogs(self) -> Iterator[Backlog]:
        yield from (*self._ready.values(), self._delayed)

    # -- which names can be taken ------------------------------------------------------------------------------

    def _rank(self, folder: str, name: str, regular: bool) -> str | None:
        reason = ""
        if name.startswith("."):
            reason = "its name begins with a dot"
        elif not regular:
            reason = "it is not a file"
        elif is_newer(name):
            reason = "a newer version of lamsonq wrote it"
        if reason:
            self.leave_alone(os.path.join(folder, name), reason)
            return None
        return None if is_deleted(name) or name in self._left_alone or name in self._aside else name

    def _rank_bound(self, folder: str, name: str, regular: bool) -> str | None:
        return self._rank(folder, name, regular) if is_bound(name) else None

    def _rank_delayed(self, folder: str, name: str, regular: bool) -> str | None:
        return None if self._rank(folder, name, regular) is None else f"{due_of(name):015d}"

    def leave_alone(self, path: str, reason: str) -> None:
        name = os.path.basename(path)
        if name not in self._left_alone and len(self._left_alone) < _NOTES_MAX:
            logging.warning("%r is left alone: %s", path, reason)
        self._left_alone.add(name)

    def is_left_alone(self, name: str) -> bool:
        return name in self._left_alone

    # -- sleeping and waking -----------------------------------------------------------------------------------

    @property
    def _seeing(self) -> bool:
        return self._watch is not None and self._watch.seeing

    def wake(self) -> None:
        self._own_watch().wake()

    def _own_watch(self) -> Watch:
        with self._lock:
            if self._watch is None:
                self._watch = Watch()
            return self._watch

    def sleep(self, seconds: float) -> bool:
        """Sleep until there may be something to do; True when `wake` was called."""
        watch = self._own_watch()
        if not watch.tried:
            self._follow(watch)
            return False  # a file may have appeared before the watch: look once more
        if not watch.seeing:
            seconds = min(seconds, BLIND_LOOK_EVERY)
        first = self._delayed.peek()
        if first is not None:
            seconds = min(seconds, int(first.rank) / 1000 - self._clock())
        return watch.wait(seconds)

    def follow_moved(self) -> None:
        """Watch the folders that are there now, where somebody has put others in their place."""
        if self._watch is not None and self._watch.seeing and self._watch.moved():
            self._follow(self._watch)

    def _follow(self, watch: Watch) -> None:
        self._folders.make(again=True)
        watch.follow((*self._folders.of("ready"), *self._folders.of("delayed")))
        self.look_again()

    def _hear(self, watch: Watch) -> None:
        news = watch.appeared()
        if news is None:
            self._follow(watch)
            return
        delayed = self._folders.of("delayed")
        for folder, name in news:
            for backlog in (self._delayed,) if folder in delayed else self._ready.values():
                backlog.add(folder, name)

    def close(self) -> None:
        """Stop watching. Takes no lock: in a forked child a thread that is not there may hold it."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
        self.look_again()
