"""Which workers live: a file for each, locked (flock) as long as its process lives.

Rules:

1. The kernel drops the lock however the process ends, so no clock can end a life and none goes on after its process.
2. Whoever gets the lock of another worker knows that it is dead, and is the only one who acts on it.
3. A forked child has to close its copies of the lock (which does not release it): else it would keep its parent alive.
4. When a process ends, the kernel closes its files: who watches the folder hears that one is closed that could be
   written. So only its worker opens it for that; and whoever ends in good order removes it first.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import time

LOCK = ".lock"

REAP_EVERY = 5.0
"""Seconds between two looks for dead workers, of who is awake or does not hear of deaths."""

IDLE_REAP_EVERY = 60.0
"""Seconds between two looks of who sleeps and hears of deaths."""

_LOCK_GOES_AFTER = 0.05
"""Seconds after which a lock is certainly free: the kernel tells that its file is closed just before it is."""

_TOLD_PAUSE = 1.0
"""Seconds between two looks because of what is told: there may be many workers that live for a moment only."""


def new_lock(folder: str) -> tuple[str, int]:
    """The id of a new worker, and the descriptor that keeps it alive. Raises OSError."""
    while True:
        worker = f"{os.getpid()}.{secrets.token_hex(4)}"
        path = os.path.join(folder, worker + LOCK)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if _locked(fd, path):  # between the two lines a reaper may have taken the new lock for a dead one
            return worker, fd
        os.close(fd)


def _locked(fd: int, path: str) -> bool:
    """Take the lock, unless somebody holds it or it is no longer the one behind this path."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def take_lock(path: str, *, new: bool) -> int | None:
    """The lock of a dead worker, for the caller to close; None when it lives. `new`: its file was deleted by hand."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except (FileNotFoundError, FileExistsError):
        return None
    except OSError as error:
        logging.warning("Cannot look whether the worker of %r lives: %s", path, error.strerror)
        return None
    if _locked(fd, path):
        return fd
    os.close(fd)
    return None


class Vigil:
    """When a process looks for dead workers: now and then, and a moment after it was told that one may have died.

    On a machine that is overloaded, that moment may be too short; so it looks once more, REAP_EVERY later.
    """

    def __init__(self) -> None:
        self._looked = float("-inf")
        self._look_at = float("inf")
        self._told = False

    def tell(self) -> None:
        """A worker may have died."""
        if not self._told:
            self._told = True
            self._look_at = max(time.monotonic() + _LOCK_GOES_AFTER, self._looked + _TOLD_PAUSE)

    def look_now(self) -> None:
        self._look_at = 0.0

    def is_due(self) -> bool:
        """Whether to look now; who asks does it, then."""
        now = time.monotonic()
        if now < self._look_at and now < self._looked + REAP_EVERY:
            return False
        if now >= self._look_at:
            self._look_at = now + REAP_EVERY if self._told else float("inf")
            self._told = False
        self._looked = now
        return True

    def patience(self, *, hears: bool) -> float:
        """Seconds to sleep at most, until the next look; `hears` is whether a death will be told."""
        at = min(self._look_at, self._looked + (IDLE_REAP_EVERY if hears else REAP_EVERY))
        return max(0.0, at - time.monotonic())
