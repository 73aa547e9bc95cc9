"""The folders of one maildir queue, and the files in them.

    run/posts/new cur tmp           ready; `cur` because mail programs move there what they have shown
    run/posts/.delayed/new cur tmp  waiting for their time, a Maildir++ folder
    run/posts/.dead/new cur tmp     dead letters, the same
    run/posts/.done/new cur tmp     the archive, the same
    run/posts/claimed/<worker>/     being worked (lamsonq/backends/maildir_claims.py)
    run/posts/held/                 not yet certain (lamsonq/backends/maildir_commit.py)
    run/posts/errors/<key>          why a job failed (lamsonq/reports.py)
    run/posts/guards/               who is unique, and when a gate opens (lamsonq/backends/maildir_guards.py)
    run/posts/paused                there while nothing is to be reserved

Rules: folders are 0700 and files 0600. A rename is the only way into a folder. No name is ever renamed onto another:
where it is taken, a mark in the name keeps the two apart. Reports are for people; a report that cannot be written
never stops a job.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, NamedTuple

from lamsonq import clock
from lamsonq.backends.durable import make_folders, sync_folder, write_file
from lamsonq.backends.maildir_names import Name, Record, decode_block, encode_block, fitted
from lamsonq.errors import Dead, Later, QueueError
from lamsonq.jobs import PRIORITY_MAX, Done, Gate, Job, Put, due_after
from lamsonq.reports import entry_of

READY, DELAYED, DEAD, DONE = "new", ".delayed/new", ".dead/new", ".done/new"
WHERE: Mapping[str, tuple[str, ...]] = {
    "ready": ("new", "cur"),
    "delayed": (".delayed/new", ".delayed/cur"),
    "dead": (".dead/new", ".dead/cur"),
    "done": (".done/new", ".done/cur"),
}
"""The folders of the jobs in each state, but for those that are reserved."""

TAKEN_FROM = ("ready", "delayed", "dead", "done")
"""Where a tool may take a job from, in the order in which a name counts them."""
_EXTRA = (".delayed", ".dead", ".done")
FOLDERS = (
    *("tmp", "new", "cur", "claimed", "held", "errors", "guards"),
    *(f"{folder}/{sub}" for folder in _EXTRA for sub in ("tmp", "new", "cur")),
)
"""What a queue consists of."""
_ABANDONED = 36 * 3600.0
_COUNT_MAX = 10**9
"""More than a name needs to tell; a job from another store may have any number."""
_ADVICE = {
    errno.EROFS: "mount it writable or set another queue directory",
    errno.EACCES: "let the server's user own it",
    errno.EPERM: "let the server's user own it",
    errno.ENOSPC: "free some space; nothing was kept",
    errno.EDQUOT: "raise the quota; nothing was kept",
    errno.EIO: "check the disk; nothing was kept",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (fs.file-max)",
    errno.ENOENT: "somebody has removed a folder of it, or put a file in its place; a missing one is made again",
    errno.ENOTDIR: "something in its path is a file; move it away or set another queue directory",
}


def queue_error(name: str, error: OSError, data: object = None) -> QueueError:
    """What is wrong with a queue's directory and what to do about it, in one line."""
    advice = _ADVICE.get(error.errno or 0, "see its owner, mode and file system")
    refusal = QueueError(f"cannot write {name}: {error.strerror or error}; {advice}", data)
    refusal.__cause__ = error
    return refusal


class Folders:
    """The directories of one queue; `path` is absolute, `now` gives seconds since the epoch."""

    def __init__(self, path: str, now: Callable[[], float] = clock.now) -> None:
        self.path = path
        self.now = now
        self._made = False

    def at(self, *parts: str) -> str:
        return os.path.join(self.path, *parts)

    def of(self, state: str) -> tuple[str, ...]:
        return tuple(self.at(folder) for folder in WHERE[state])

    def make(self, *, again: bool = False) -> None:
        """Make what is missing. The first time the queue's own folder is synced, whoever made it: another process may
        have made it a moment ago and not yet synced it."""
        if self._made and not again:
            return
        make_folders(self.at(folder) for folder in FOLDERS)
        for folder in (*map(self.at, _EXTRA), self.path, os.path.dirname(self.path)):
            with contextlib.suppress(PermissionError):  # a parent that is not ours to read was there before
                sync_folder(folder)
        self._made = True

    def whole(self) -> bool:
        """Whether all folders are there; somebody may have removed one, or put a file in its place."""
        return all(os.path.isdir(self.at(folder)) for folder in FOLDERS)

    def free(self, folder: str, name: Name) -> str:
        """A path in this folder for this name that is not taken."""
        path = self.at(folder, name.text())
        while os.path.lexists(path):
            path = self.at(folder, name._replace(mark=secrets.randbits(48) | 1).text())
        return path

    def move(self, source: str, folder: str, name: Name) -> str:
        """Rename a file into a folder. Raises FileNotFoundError when the file is not there (any more)."""
        target = self.free(folder, name)
        self.rename(source, target)
        return target

    def rename(self, source: str, target: str) -> None:
        """Rename a file to a path in this queue that is not taken. Raises FileNotFoundError when it is gone."""
        try:
            os.rename(source, target)
        except FileNotFoundError:
            if not os.path.lexists(source):
                raise
            self.make(again=True)
            os.rename(source, target)

    def copy_in(self, source: str) -> str:
        """A synced copy in tmp/ of a file on another file system."""
        copy = self.at("tmp", f"{os.path.basename(source)}.{secrets.token_hex(4)}")
        with open(source, "rb") as file:
            write_file(copy, file.read())
        return copy

    def adopt(self, source: str, folder: str, name: Name) -> None:
        """Move a file in from another queue, by a copy where that is on another file system."""
        try:
            self.move(source, folder, name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self.move(self.copy_in(source), folder, name)
            sync_folder(self.at(folder))
            os.unlink(source)

    def bury(self, path: str, name: Name, reason: str) -> None:
        """Make a dead letter of a claimed file that no handler is to see."""
        logging.error("Job %s of %s is a dead letter: %s", name.key, self.path, reason)
        self.add_report(name.key, entry_of(Dead(reason), name.failures + 1, self.now()))
        self.move(path, DEAD, name._replace(mark=0, commit=0, taken=0, errors=1))

    def abandoned(self) -> list[str]:
        """What was never finished in tmp/: the maildir convention gives a writer 36 hours."""
        with contextlib.suppress(OSError), os.scandir(self.at("tmp")) as found:
            files = [entry for entry in found if entry.is_file(follow_symlinks=False)]
            return [entry.path for entry in files if time.time() - entry.stat().st_mtime > _ABANDONED]
        return []

    def add_report(self, key: str, text: str) -> None:
        self._report(key, text, os.O_APPEND)

    def set_report(self, key: str, text: str) -> None:
        """The report of a new job: the same when it is written again after a crash."""
        self._report(key, text, os.O_TRUNC)

    def _report(self, key: str, text: str, how: int) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | how
            with open(os.open(self.at("errors", key), flags, 0o600), "w", errors="backslashreplace") as file:
                file.write(text if text.endswith("\n") else f"{text}\n")
        except OSError as error:
            logging.warning("Cannot keep the report of %r in %s: %s\n%s", key, self.path, error, text)

    def report(self, key: str) -> str:
        with contextlib.suppress(OSError), open(self.at("errors", key), errors="backslashreplace") as file:
            return file.read()
        return ""

    def drop_report(self, key: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.at("errors", key))


class Unreadable(Exception):
    """The file is none that can be a job: a directory, a symbolic link, one that may not be read."""


class Oversize(Exception):
    """The message is larger than the limit."""


def read_job(path: str, name: Name, *, limit: int = 0, claim: str = "") -> Job:
    """The job in this file. Raises FileNotFoundError, Unreadable, Oversize; ValueError with a reason for a record that
    does not check out; and the OSError where the machine is short of something."""
    with _opened(path) as (file, facts):
        if limit and facts.st_size - name.block > limit:
            raise Oversize
        try:
            block = file.read(min(name.block, facts.st_size)) if name.block else b""
            body = file.read()
        except OSError as error:
            raise Unreadable(error.strerror) from error
    return _job(name, block, body, facts.st_mtime, claim)


def read_record(path: str, name: Name) -> Record:
    """What stands in front of a message. Raises as `read_job` does."""
    with _opened(path) as (file, facts):
        if not name.block:
            return Record(received=facts.st_mtime)
        try:
            block = file.read(min(name.block, facts.st_size))
        except OSError as error:
            raise Unreadable(error.strerror) from error
    return decode_block(block, name.block)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], os.stat_result]]:
    try:
        # O_NONBLOCK: a fifo must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise Unreadable(error.strerror) from error
    with open(fd, "rb", buffering=0) as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise Unreadable("not a file")
        yield file, facts


def _job(name: Name, block: bytes, body: bytes, received: float, claim: str) -> Job:
    record = decode_block(block, name.block) if name.block else Record(received=received)
    return Job(
        key=name.key,
        body=body,
        sender=record.sender,
        recipients=record.recipients,
        peer=record.peer,
        target=record.target,
        received=record.received or received,
        due=name.due / 1000 if name.due else None,
        expires=name.expires / 1000 if name.expires else None,
        priority=min(name.priority, PRIORITY_MAX),  # another program's may be more
        unique=record.unique,
        deliveries=name.deliveries,
        attempts=name.failures,
        metadata=record.metadata,
        claim=claim,
    )


class Place(NamedTuple):
    """Where a new job goes, the line in front of it, and the failures before it came: `report` is brought along,
    `entry` is the outcome's. `open_end`: the gate, if there is one, says when the job is due."""

    folder: str
    name: Name
    block: bytes = b""
    report: str = ""
    entry: str = ""
    unique: str | None = None
    gate: Gate | None = None
    open_end: bool = True

    @property
    def guarded(self) -> bool:
        """Whether it is decided at the put if the job is kept."""
        return self.unique is not None or self.gate is not None

    def due_at(self, due: float | None, now: float) -> Place:
        """The same job, ready or, where `due` lies ahead, delayed."""
        if due is None or due <= now:
            return self._replace(folder=READY, name=self.name._replace(due=0))
        return self._replace(folder=DELAYED, name=self.name._replace(due=milliseconds(due)))


def place_of(put: Put, now: float) -> Place:
    """Where the job of a put goes, if nothing keeps it out."""
    job, outcome = put.job, put.outcome
    block = encode_block(job, job.received or now)
    entry = entry_of(outcome, max(job.attempts, 1), now) if isinstance(outcome, Later | Dead) else ""
    unique = None if isinstance(outcome, Dead | Done) else job.unique
    name = Name(
        job.key,
        block=len(block),
        failures=min(max(job.attempts, 0), _COUNT_MAX),
        bound=int(job.target is not None),
        errors=int(bool(put.report or entry)),
        priority=job.priority,
        expires=0 if job.expires is None else milliseconds(job.expires),
        unique=int(unique is not None),
    )
    place = Place(READY, fitted(name), block, put.report, entry, unique, put.gate)
    if isinstance(outcome, Dead | Done):
        return place._replace(folder=DEAD if isinstance(outcome, Dead) else DONE, open_end=False)
    if isinstance(outcome, Later) and (outcome.at is not None or job.attempts):
        return place._replace(open_end=False).due_at(due_after(outcome, job.attempts, now), now)
    return place.due_at(job.due, now)


def milliseconds(at: float) -> int:
    """Seconds since the epoch as a name has them: rounded up, never before its time."""
    return max(1, -int(-min(max(at, 0.0) * 1000, 10.0**15 - 1) // 1))
