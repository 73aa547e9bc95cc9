"""Sleeping until another process, or a thread of this one, has written to the database.

Rules:

1. Watch first, then look. The kernel tells of writes to two files (inotify), and a bell (eventfd) of `wake`.
2. Who writes by lamsonq rings after the commit: he writes a byte into q.db-workers/turn. Other programs write the -wal
   file only, and a moment *before* what they write can be seen: so after that, look a few times, ever more rarely.
3. Between two looks that writes bring about lie some milliseconds: else busy processes would keep idle ones busy.
4. Who hears of a worker's death (lives.py) tells the vigil, which says when to look for it.
5. Where the kernel gives no more watches, look once a second.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import time
import weakref
from typing import TYPE_CHECKING

from lamsonq.backends.lives import LOCK, Vigil

if TYPE_CHECKING:
    from asyncinotify import Inotify

PAUSE = 0.004
"""Seconds between two looks that writes bring about."""

LOOK_EVERY = 1.0
"""Seconds between two looks where nothing is watched; and the longest pause of rule 2."""

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM, errno.ENOSYS, errno.ENOENT)


class Ear:
    """Lets one thread sleep until somebody has written to the database, until `wake`, or until a time has passed."""

    def __init__(self, wal: str, turn: str, vigil: Vigil) -> None:
        self._wal, self._turn, self._workers = wal, turn, os.path.dirname(turn)
        self._vigil = vigil
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._finalizer = weakref.finalize(self, os.close, self._bell)
        self._inotify: Inotify | None = None
        self._inodes: list[int] = []
        self._complained = False
        self._not_before = 0.0
        self._look_at: float | None = None
        self._pause = PAUSE

    def listen(self) -> None:
        """Hear of what is written from now on; to be called before each look."""
        try:
            inodes = [os.stat(path).st_ino for path in (self._wal, self._turn)]
        except FileNotFoundError:
            inodes = []
        if self._inotify is not None and inodes == self._inodes:
            self._hear()
            return
        self._deafen()
        if not inodes:
            return
        from asyncinotify import Inotify, Mask  # when it is used: who only puts waits for nothing

        inotify = None
        try:
            inotify = Inotify(sync_timeout=0)
            for path in (self._wal, self._turn):
                inotify.add_watch(path, Mask.MODIFY | Mask.DELETE_SELF | Mask.MOVE_SELF)
            inotify.add_watch(self._workers, Mask.CLOSE_WRITE | Mask.EXCL_UNLINK | Mask.ONLYDIR)
            self._inotify, self._inodes = inotify, inodes
            self._vigil.tell()  # one may have died before
        except OSError as error:
            if inotify is not None:
                inotify.close()
            if error.errno not in _SHORTAGES:
                raise
            if not self._complained:
                text = "Cannot watch %s (%s; see fs.inotify in sysctl): looking once a second."
                logging.warning(text, self._wal, error.strerror)
                self._complained = True

    def _hear(self) -> bool:
        """Whether somebody has rung or died since the last call; what the -wal file tells makes for a look later on."""
        rung = False
        for event in self._inotify or ():
            path = None if event.watch is None else str(event.watch.path)
            if path == self._workers:
                if str(event.name).endswith(LOCK):
                    self._vigil.tell()
                    rung = True
            elif path != self._wal:
                rung = True
            else:
                self._pause = PAUSE
                soon = time.monotonic() + PAUSE
                self._look_at = soon if self._look_at is None else min(soon, self._look_at)
        return rung

    @property
    def hears(self) -> bool:
        """False: nothing is watched."""
        return self._inotify is not None

    def wake(self) -> None:
        """End the sleep that is under way, or else the next."""
        with contextlib.suppress(BlockingIOError):  # the counter is full: it rings already
            os.eventfd_write(self._bell, 1)

    def sleep(self, seconds: float) -> bool:
        """Sleep; True when `wake` was called."""
        until = time.monotonic() + seconds
        pause = min(seconds, self._not_before - time.monotonic())
        if pause > 0 and self._poll(pause, written=False):
            return True
        if self._inotify is None:
            until = min(until, time.monotonic() + LOOK_EVERY)
        while True:
            now = time.monotonic()
            if self._poll(min(until, self._look_at or until) - now, written=True):
                return True
            now = time.monotonic()
            if self._hear():
                self._not_before = now + PAUSE
                return False
            if self._look_at is not None and self._look_at <= now:
                self._pause *= 2
                self._look_at = now + self._pause if self._pause < LOOK_EVERY else None
                return False
            if until <= now:
                return False

    def _poll(self, seconds: float, *, written: bool) -> bool:
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if written and self._inotify is not None:
            poll.register(self._inotify.fd, select.POLLIN)
        if self._bell not in {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}:
            return False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        return True

    def close(self) -> None:
        """Give the descriptors back. Idempotent."""
        self._deafen()
        self._finalizer()

    def _deafen(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
        self._inotify = None
