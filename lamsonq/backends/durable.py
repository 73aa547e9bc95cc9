"""Files and folders that survive a power failure.

Rules:

1. A file is synced before it gets its final name, its folder after: whoever sees the name sees the whole file.
2. A descriptor whose fsync has failed is never synced again. The kernel reports a lost page once and then calls the
   file clean, so a second fsync would lie; the file is thrown away instead.
3. Threads that wait for the same folder share one sync.
4. What belongs together is synced at the same time, each file by a thread: the kernel commits its journal and flushes
   the disk once for many that wait, but once for each that comes alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from lamsonq.threads import Threads

SYNCED_AT_ONCE = 8
"""Files of one `write_files`, and their folder; more wait for a thread."""

OPEN_MAX = 100
"""Files that one call has open at the same time: a process may have a thousand, and most are its connections."""


def write_file(path: str, *chunks: bytes) -> None:
    """Make a new file (0600) of these bytes and sync it; on an OSError there is no file."""
    write_files([(path, chunks)])


def write_files(files: Iterable[tuple[str, Sequence[bytes]]], folder: str | None = None) -> None:
    """Make new files (0600), each of its chunks of bytes, and sync them; on an OSError there is none of them.

    Many are on their way to the disk before the first one is waited for: of those behind it most have arrived by then.
    With `folder`, where they are, their names survive a power failure, too.
    """
    files = list(files)
    made: list[str] = []
    try:
        for begin in range(0, len(files), OPEN_MAX):
            is_last = begin + OPEN_MAX >= len(files)
            _write_part(files[begin : begin + OPEN_MAX], made, folder if is_last else None)
    except OSError:
        for path in made:
            remove_file(path)
        raise


def _write_part(files: Sequence[tuple[str, Sequence[bytes]]], made: list[str], folder: str | None) -> None:
    """Add to `made` what is there, whole or not."""
    opened: list[int] = []
    try:
        for path, chunks in files:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            made.append(path)
            opened.append(fd)
            for chunk in chunks:
                _write_all(fd, chunk)
        if len(opened) > 1:
            for fd in opened:
                # Linux begins to write what is dirty (mm/fadvise.c); it is no promise, the fsync is.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        syncs: list[Callable[[], object]] = [partial(os.fsync, fd) for fd in opened]
        if folder is not None:
            syncs.append(partial(sync_folder, folder))
        _at_once(syncs)
    finally:
        for fd in opened:
            os.close(fd)


def _at_once(syncs: Sequence[Callable[[], object]]) -> None:
    """Return when all of them have ended; raises what one of them has raised."""
    if len(syncs) == 1:
        syncs[0]()
    elif syncs:
        all_of_them = _Syncs(syncs)
        for _ in syncs[1:SYNCED_AT_ONCE]:
            try:
                _helpers.submit(all_of_them.work)
            except OSError:  # this machine has no threads just now: it takes longer
                break
        all_of_them.work()
        all_of_them.wait()


class _Syncs:
    """What any number of threads work off, each taking the next one."""

    def __init__(self, syncs: Sequence[Callable[[], object]]) -> None:
        self._waiting = deque(syncs)
        self._left = len(syncs)
        self._lock = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def work(self) -> None:
        """Do those that no other thread has begun with."""
        with contextlib.suppress(IndexError):
            while True:
                self._do(self._waiting.popleft())

    def _do(self, sync: Callable[[], object]) -> None:
        error: BaseException | None = None
        try:
            sync()
        except BaseException as failure:  # whatever it is, somebody waits for us
            error = failure
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if not self._left:
                self._done.release()

    def wait(self) -> None:
        """Return when all have ended; raises what one of them has raised."""
        self._done.acquire()
        if self._error is not None:
            raise self._error


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def remove_file(path: str) -> None:
    """Unlink a file, if it is there and can be unlinked: for cleaning up, where nothing more can be done."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def make_folders(paths: Iterable[str]) -> None:
    """Make what is missing of these folders and of their parents (0700), each synced into its parent."""
    changed: dict[str, None] = {}
    for path in paths:
        for folder in _missing(path):
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                if not os.path.isdir(folder):
                    raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", folder) from None
            changed[os.path.dirname(folder)] = None
    for parent in changed:
        sync_folder(parent)


def _missing(path: str) -> list[str]:
    """The folders that have to be made for `path`, parents first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing[::-1]


class _SharedSync:
    """Numbered syncs of each folder. Who asks is served by the first sync that *begins* after the question, because
    one that is under way may have looked at the folder before the asker's rename."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._failed: dict[str, tuple[int, OSError]] = {}

    def sync(self, folder: str) -> None:
        """Return when a sync has begun and ended since the call; raises the OSError of that sync."""
        with self._changed:
            ticket = self._begun.get(folder, 0) + 1
            while self._ended.get(folder, 0) < ticket:
                if self._begun.get(folder, 0) == self._ended.get(folder, 0):
                    self._begun[folder] = ticket
                    break
                self._changed.wait()
            else:
                failed, error = self._failed.get(folder, (0, None))
                if error is not None and failed >= ticket:  # perhaps a later one than ours: told once too often is safe
                    raise error
                return
        self._lead(folder, ticket)

    def _lead(self, folder: str, ticket: int) -> None:
        error: OSError | None = OSError(errno.EIO, "the sync was interrupted")
        try:
            _fsync_folder(folder)
            error = None
        except OSError as failure:
            error = failure
            raise
        finally:
            with self._changed:
                if error is not None:
                    self._failed[folder] = ticket, error
                self._ended[folder] = ticket
                self._changed.notify_all()


def _fsync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_shared = _SharedSync()
_helpers = Threads(SYNCED_AT_ONCE - 1, "lamsonq-sync")


def sync_folder(folder: str) -> None:
    """Make the names in a folder survive a power failure; shared with other threads that want the same."""
    _shared.sync(folder)


def _start_afresh() -> None:
    """A forked child has none of its parent's threads, to finish what they have begun or to help."""
    global _shared, _helpers
    _shared = _SharedSync()
    _helpers = Threads(SYNCED_AT_ONCE - 1, "lamsonq-sync")


os.register_at_fork(after_in_child=_start_afresh)
