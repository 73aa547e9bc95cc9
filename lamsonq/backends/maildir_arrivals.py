"""What comes next in a maildir queue, and sleeping until something does.

Rules: names come by priority, then in the order of their keys, which is the order in which they were put; where the
kernel gives no watches, an urgent job comes behind those that are known already. A delayed job becomes ready by a
rename when it is due. What cannot be a job is left where it is, said once, and never looked at again. Of jobs that have
a target the record is read before the claim: one that is not asked for is never touched, and not read again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from lamsonq.backends.backlog import Backlog, Entry
from lamsonq.backends.lives import Vigil
from lamsonq.backends.maildir_files import READY, Folders, Unreadable, read_record
from lamsonq.backends.maildir_names import due_of, fitted, is_bound, is_deleted, is_newer, parse_name, priority_of

if TYPE_CHECKING:
    from lamsonq.backends.watch import Watch

BLIND_LOOK_EVERY = 1.0
"""Seconds between two looks where the kernel gives no watches."""
_NOTES_MAX = 1000
_FEW = 200


class Arrivals:
    """The ready and the delayed of one queue, for the one thread that reserves; `wake` is for any thread."""

    def __init__(self, folders: Folders, vigil: Vigil) -> None:
        self._folders = folders
        self._vigil = vigil
        self._lock = threading.RLock()
        self._watch: Watch | None = None
        self._left_alone: set[str] = set()
        self._aside: dict[str, str] = {}
        self._only: frozenset[str] | None = None
        self._passed_over: set[str] = set()
        self._blind_look_at = 0.0
        self._ready = Backlog(folders.of("ready"), self._rank_ready)
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

    def ask_for(self, only: frozenset[str] | None) -> None:
        """From now on only jobs with these targets are wanted; None: all jobs."""
        if only != self._only:
            self._only = only
            self._passed_over.clear()
            self._ready.clear()

    def next(self, *, more: bool) -> Entry | None:
        """The next name; `more` is whether to look into the directories when none is known."""
        while (entry := self._pop(more)) is not None:
            if self._is_wanted(entry):
                return entry
        return None

    def any(self) -> bool:
        """Whether there may be a next name."""
        while (entry := self.next(more=True)) is not None:
            if os.path.lexists(os.path.join(entry.folder, entry.name)):
                self._ready.put_back(entry)
                return True
        return False

    def _pop(self, more: bool) -> Entry | None:
        backlog = self._ready
        entry = backlog.pop()
        if entry is None and more and backlog.refill(self.seeing):
            if len(backlog) > 1 and not self.seeing:
                # What comes while these are worked, more urgent or of one of them, is to run among them.
                self._look_seldom()
                backlog.refill(self.seeing)
            entry = backlog.pop()
        return entry

    def _is_wanted(self, entry: Entry) -> bool:
        if self._only is None:
            return True
        name = parse_name(entry.name)
        try:
            wanted = name is None or read_record(os.path.join(entry.folder, entry.name), name).target in self._only
        except FileNotFoundError:
            return False  # another process was faster
        except (Unreadable, ValueError):
            return True  # who claims it says what is wrong
        except OSError:
            self.look_again()
            raise
        if not wanted:
            self._passed_over.add(entry.name)
        return wanted

    def look_again(self) -> None:
        """Something that was taken out is still there."""
        self._ready.outdate()
        self._delayed.outdate()

    def set_aside(self, entry: Entry) -> None:
        self._aside[entry.name] = entry.folder

    def take_back(self) -> None:
        """What was set aside comes next."""
        aside, self._aside = self._aside, {}
        for name, folder in aside.items():
            self._ready.add(folder, name, known=True)

    @property
    def has_aside(self) -> bool:
        return bool(self._aside)

    def _promote(self) -> None:
        blind = self._watch is not None and self._watch.tried and not self._watch.seeing
        if not blind or time.monotonic() >= self._blind_look_at:
            self._blind_look_at = time.monotonic() + BLIND_LOOK_EVERY
            self._delayed.refill(self.seeing)
        now = int(self._folders.now() * 1000)
        while (first := self._delayed.peek()) is not None and int(first.rank) <= now:
            name = parse_name(first.name)
            if name is not None:
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    old = os.path.join(first.folder, first.name)
                    path = self._folders.move(old, READY, fitted(name)._replace(due=0))
                    if not self.seeing and len(self._ready) < _FEW:
                        self._ready.clear()  # among those that have come meanwhile
                    self._ready.add(os.path.dirname(path), os.path.basename(path), known=True)
            self._delayed.pop()

    # -- which names can be taken ------------------------------------------------------------------------------

    def _rank_ready(self, folder: str, name: str, regular: bool) -> str | None:
        if self._only is not None and (not is_bound(name) or name in self._passed_over):
            return None
        if not self._is_possible(folder, name, regular):
            return None
        priority = priority_of(name)
        return f"{priority:010d}{name}" if priority else f"0000000000{name}"

    def _rank_delayed(self, folder: str, name: str, regular: bool) -> str | None:
        return f"{due_of(name):015d}" if self._is_possible(folder, name, regular) else None

    def _is_possible(self, folder: str, name: str, regular: bool) -> bool:
        reason = ""
        if name.startswith("."):
            reason = "its name begins with a dot"
        elif not regular:
            reason = "it is not a file"
        elif is_newer(name):
            reason = "a newer version of lamsonq wrote it"
        if reason:
            self.leave_alone(os.path.join(folder, name), reason)
            return False
        return not (is_deleted(name) or name in self._left_alone or name in self._aside)

    def leave_alone(self, path: str, reason: str) -> None:
        name = os.path.basename(path)
        if name not in self._left_alone and len(self._left_alone) < _NOTES_MAX:
            logging.warning("%r is left alone: %s", path, reason)
        self._left_alone.add(name)

    def is_left_alone(self, name: str) -> bool:
        return name in self._left_alone

    # -- sleeping and waking -----------------------------------------------------------------------------------

    @property
    def seeing(self) -> bool:
        """Whether what appears, and who dies, is told."""
        return self._watch is not None and self._watch.seeing

    def wake(self) -> None:
        self._own_watch().wake()

    def _own_watch(self) -> Watch:
        from lamsonq.backends.watch import Watch  # when it is used: who only puts watches nothing, and needs no inotify

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
            seconds = min(seconds, int(first.rank) / 1000 - self._folders.now())
        return watch.wait(seconds)

    def follow_moved(self) -> None:
        """Watch the folders that are there now, where somebody has put others in their place."""
        if self._watch is not None and self._watch.seeing and self._watch.moved():
            self._follow(self._watch)

    def _follow(self, watch: Watch) -> None:
        self._folders.make(again=True)
        watch.follow((*self._folders.of("ready"), *self._folders.of("delayed")), self._folders.at("claimed"))
        self._vigil.tell()  # a worker may have died before
        self.look_again()

    def _hear(self, watch: Watch) -> None:
        news = watch.appeared()
        if news is None:
            self._follow(watch)
            return
        delayed, claimed = self._folders.of("delayed"), self._folders.at("claimed")
        for folder, name in news:
            if folder == claimed:
                self._vigil.tell()
            else:
                (self._delayed if folder in delayed else self._ready).add(folder, name)

    def close(self) -> None:
        """Watch and know nothing. Takes no lock: in a forked child a thread that is not there may hold it."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
        self._aside = {}
        self._ready.clear()
        self._delayed.clear()
