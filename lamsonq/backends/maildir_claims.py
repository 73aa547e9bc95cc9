"""Who works what: a folder for each worker, and a lock that tells whether it lives.

    claimed/4711.9f3a0c21.lock   locked (flock) by the worker as long as its process lives
    claimed/4711.9f3a0c21/       the files that it has claimed

Rules:

1. A claim is a rename into the worker's folder, and holds exactly as long as its process: the kernel drops the lock
   however the process ends, so no clock can break a claim and none outlives its worker.
2. Whoever gets the lock of another worker knows that it is dead, and is the only one who acts on it.
3. The lock is made before the folder and goes after it: a folder without a lock is one whose lock was deleted by hand.
4. What a worker has written into its lock, "forgiven 17", tells that its claims up to that number are not to be counted
   against their jobs: it is being stopped, and may be killed.
5. A forked child closes its copies of the lock, which does not release it, and starts as a worker of its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator

from lamsonq.backends.lives import LOCK, new_lock, take_lock

_FORGIVEN = "forgiven "


class Worker:
    """This process's right to claim jobs of one queue."""

    def __init__(self, claimed: str) -> None:
        """Raises OSError."""
        self.id, fd = new_lock(claimed)
        self.folder = os.path.join(claimed, self.id)
        os.mkdir(self.folder, 0o700)
        self._fd = fd
        self._finalizer = weakref.finalize(self, _retire, self.folder, fd)

    def close(self) -> None:
        """Stop being a worker: what is still in the folder is found by the next reaper."""
        self._finalizer()

    def forgive(self, number: int) -> None:
        """Its claims up to this number are not to count when it dies. Raises OSError."""
        os.pwrite(self._fd, f"{_FORGIVEN}{number}\n".encode("ascii"), 0)

    def forget(self) -> None:
        """In a forked child: the worker is the parent."""
        if self._finalizer.detach() is not None:
            os.close(self._fd)


def _retire(folder: str, fd: int) -> None:
    _remove(folder)
    os.close(fd)


def _remove(folder: str) -> None:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError:  # not empty: the lock stays, so that the next reaper looks at it
        return
    try:
        os.unlink(folder + LOCK)
    except FileNotFoundError:
        pass


def dead_workers(claimed: str, own: str | None) -> Iterator[tuple[str, int]]:
    """The folder of each dead worker, and the number up to which its claims are forgiven; it is locked while the caller
    deals with it, and removed after that if it is empty."""
    names = set(os.listdir(claimed))
    for worker in sorted({name.removesuffix(LOCK) for name in names} - {own}):
        folder = os.path.join(claimed, worker)
        fd = take_lock(folder + LOCK, new=worker + LOCK not in names)
        if fd is None:
            continue
        try:
            yield folder, _forgiven(fd)
            _remove(folder)
        finally:
            os.close(fd)


def _forgiven(fd: int) -> int:
    told = os.pread(fd, 64, 0).decode("ascii", "replace").partition("\n")[0]
    number = told.removeprefix(_FORGIVEN)
    return int(number) if told != number and number.isdecimal() else 0
