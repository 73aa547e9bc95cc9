"""Which workers live: a file for each, locked (flock) as long as its process lives.

Rules:

1. The kernel drops the lock however the process ends, so no clock can end a life and none goes on after its process.
2. Whoever gets the lock of another worker knows that it is dead, and is the only one who acts on it.
3. A forked child has to close its copies of the lock (which does not release it): else it would keep its parent alive.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets

LOCK = ".lock"


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
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0)
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
