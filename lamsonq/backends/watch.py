"""Sleeping until a file appears.

Rules: watch first, then look, so that nothing can appear between the two. A wake-up that comes before the sleep ends
the next sleep. Where the kernel gives no more watches, the sleeper is told to look by itself, and to ask again later.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import time
import weakref
from collections.abc import Sequence

from asyncinotify import Inotify, Mask

_APPEARED = Mask.MOVED_TO | Mask.CREATE
_CLOSED = Mask.CLOSE_WRITE | Mask.EXCL_UNLINK
_VANISHED = Mask.DELETE_SELF | Mask.MOVE_SELF

AGAIN_AFTER = 10.0
"""Seconds until the kernel is asked again for the watches that it had not."""


class Watch:
    """Lets one thread sleep until a name appears in some folders, until a file that could be written is closed in
    another, until `wake`, or until a time has passed."""

    def __init__(self) -> None:
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._finalizer = weakref.finalize(self, os.close, self._bell)
        self._inotify: Inotify | None = None
        self._places: list[tuple[str, int]] = []
        self._ask_at = 0.0
        self._complained = False

    @property
    def seeing(self) -> bool:
        """False: nothing is watched, `wait` ends only by `wake` and by time."""
        return self._inotify is not None

    @property
    def tried(self) -> bool:
        """False: `follow` is worth a try, for the first time or once more."""
        return self.seeing or time.monotonic() < self._ask_at

    def follow(self, folders: Sequence[str], closing: str) -> None:
        """Watch these folders instead of those before; where that cannot be, say so in the log. `closing` is the one
        in which files are closed."""
        self._unfollow()
        self._ask_at = time.monotonic() + AGAIN_AFTER
        inotify = None
        try:
            inotify = Inotify(sync_timeout=0)
            for folder in folders:
                inotify.add_watch(folder, _APPEARED | _VANISHED | Mask.ONLYDIR)
            inotify.add_watch(closing, _CLOSED | _VANISHED | Mask.ONLYDIR)
            self._places = [(folder, os.stat(folder).st_ino) for folder in (*folders, closing)]
            self._inotify = inotify
        except OSError as error:
            if inotify is not None:
                inotify.close()
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM, errno.ENOSYS):
                raise
            if not self._complained:
                text = "Cannot watch %s (%s; see fs.inotify in sysctl): looking once a second."
                logging.warning(text, folders[0], error.strerror)
                self._complained = True

    def moved(self) -> bool:
        """Whether a watched folder is no longer the one behind its path."""
        with contextlib.suppress(OSError):
            return any(os.stat(folder).st_ino != inode for folder, inode in self._places)
        return True

    def appeared(self) -> list[tuple[str, str]] | None:
        """The (folder, name) that appeared or was closed since the last call, without waiting; None: some were missed,
        look."""
        found: list[tuple[str, str]] = []
        missed = False
        for event in self._inotify or ():
            if event.mask & (_VANISHED | Mask.IGNORED | Mask.Q_OVERFLOW) or event.watch is None:
                missed = True
            elif event.name is not None:
                found.append((str(event.watch.path), str(event.name)))
        return None if missed else found

    def wake(self) -> None:
        """End the sleep that is under way, or else the next."""
        with contextlib.suppress(BlockingIOError):  # the counter is full: it rings already
            os.eventfd_write(self._bell, 1)

    def wait(self, seconds: float) -> bool:
        """Sleep; True when `wake` was called."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if self._inotify is not None:
            poll.register(self._inotify.fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}
        if self._bell not in ready:
            return False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        return True

    def close(self) -> None:
        """Give the descriptors back. Idempotent."""
        self._unfollow()
        self._finalizer()

    def _unfollow(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
        self._inotify = None
        self._places = []
