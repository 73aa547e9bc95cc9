"""Jobs in a maildir: the queue that needs nothing but files.

Rules:

1. Ready is what lies in new/ and cur/. Other programs may put files there, move them and read them; a file that they
   put there is a job with defaults. What cannot be a job (a directory, a link, a newer version's file) is left alone.
2. To claim is to rename the file into this process's folder; who comes second finds nothing. The delivery is counted
   in that rename. A dead process is recognised by its lock (maildir_claims.py), and its jobs go back.
3. A job whose worker died runs with no other such job of this queue beside it, and at its last chance with no other at
   all: of the jobs of one queue, what is buried for killing its worker has done so alone.
4. To settle is to rename or unlink the claimed file; who comes second gets LeaseLost. With puts: maildir_commit.py.
5. A receiver that finds nothing sleeps until a file appears (maildir_arrivals.py); it does not look again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

from lamsonq.backends.backlog import Entry
from lamsonq.backends.durable import make_folders, remove_file, sync_folder, write_file
from lamsonq.backends.maildir_arrivals import Arrivals
from lamsonq.backends.maildir_claims import Worker, dead_workers
from lamsonq.backends.maildir_commit import Target
from lamsonq.backends.maildir_files import READY, Folders, Oversize, Place, Unreadable, place_of, queue_error, read_job
from lamsonq.backends.maildir_index import Index
from lamsonq.backends.maildir_names import Name, fitted, new_key, parse_name
from lamsonq.backends.maildir_settle import Settler, backoff, fate_of, killed
from lamsonq.errors import LeaseLost, QueueError
from lamsonq.jobs import DELIVERIES_MAX, Job, Outcome, Put

LOG = logging.getLogger()
"""The root logger: users of Lamson grep for these lines."""

REAP_EVERY = 5.0
"""Seconds between two looks for dead workers."""


def open_queue(url: str, *, pop_limit: int = 0, oversize_dir: str | None = None) -> Maildir:
    """The backend that a plain path names."""
    return Maildir(url, pop_limit=pop_limit, oversize_dir=oversize_dir)


class Maildir:
    """A queue in a directory; see lamsonq.jobs.Backend. `clock` gives seconds since the epoch.

    With `pop_limit` (bytes, 0 = none) a larger message is not handed out but moved into the maildir `oversize_dir`, or
    to the dead letters where there is none.
    """

    def __init__(
        self,
        name: str,
        *,
        pop_limit: int = 0,
        oversize_dir: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.pop_limit = pop_limit
        self.oversize_dir = oversize_dir
        self.folders = Folders(os.path.abspath(name))
        self._clock = clock
        self._index = Index(self.folders)
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """The state of a process that has claimed nothing yet."""
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._arrivals = Arrivals(self.folders, self._clock)
        self._numbers = itertools.count(1)
        self._reap_at = 0.0
        self._suspect = ""
        self._held: set[str] = set()  # our claims that are not settled
        self._waits_for_quiet = False  # a job at its last chance is to run with no other beside it
        self._settler = Settler(self.folders)

    def forget(self) -> None:
        """In a forked child: claims, watches and locks are the parent's; this process starts as a worker of its own."""
        if self._worker is not None:
            self._worker.forget()
        arrivals = self._arrivals
        self._begin()
        arrivals.close()

    @contextlib.contextmanager
    def _writing(self, data: object = None) -> Iterator[None]:
        """Tell what the operating system refuses as a QueueError that says what to do."""
        try:
            yield
        except OSError as error:
            raise queue_error(self.name, error, data) from error

    # -- putting -----------------------------------------------------------------------------------------------

    def new_key(self) -> str:
        return new_key()

    def put(self, puts: Sequence[Put]) -> None:
        """Raises QueueError, and then none of them is in the queue."""
        with self._writing(puts):
            self.folders.make()
            try:
                self._put(puts)
            except FileNotFoundError:  # somebody has removed the queue while we had it open
                self.folders.make(again=True)
                self._put(puts)

    def _put(self, puts: Sequence[Put]) -> None:
        made: list[str] = []
        reported: list[str] = []
        places = [self._place(put) for put in puts]
        try:
            for put, place in zip(puts, places, strict=True):
                path = self.folders.free("tmp", place.name)
                write_file(path, place.block, put.job.body)
                made.append(path)
            for number, place in enumerate(places):
                if place.report:
                    reported.append(place.name.key)
                    self.folders.set_report(place.name.key, place.report)
                path = self.folders.free(place.folder, place.name)
                os.rename(made[number], path)
                made[number] = path
            for folder in {place.folder for place in places}:
                sync_folder(self.folders.at(folder))
        except OSError:
            for path in made:
                remove_file(path)
            for key in reported:
                self.folders.drop_report(key)
            raise

    def _place(self, put: Put) -> Place:
        return place_of(put, self._clock(), backoff(put.job.attempts - 1))

    # -- reserving ---------------------------------------------------------------------------------------------

    def reserve(self, n: int, wait: float = 0.0, *, bound: bool = False) -> list[Job]:
        """Raises QueueError."""
        until = time.monotonic() + wait
        with self._writing():
            while True:
                self._keep_up()
                jobs = self._take(n, bound)
                left = until - time.monotonic()
                if jobs or n <= 0 or left <= 0 or self._arrivals.sleep(min(left, REAP_EVERY)):
                    return jobs

    def wake(self) -> None:
        self._arrivals.wake()

    def _keep_up(self) -> None:
        """Now and then: look for dead workers, and whether the directory is still the same."""
        now = time.monotonic()
        if now >= self._reap_at:
            self._reap_at = now + REAP_EVERY
            self.release_stale()
            self.folders.sweep()
            self._arrivals.follow_moved()

    def _take(self, n: int, bound: bool) -> list[Job]:
        self._arrivals.look()
        with self._lock:
            if self._waits_for_quiet and self._held:
                return []
            self._waits_for_quiet = False
            if not self._suspect and self._arrivals.has_aside:
                self._arrivals.take_back()
        jobs: list[Job] = []
        try:
            while len(jobs) < n and not self._waits_for_quiet:
                entry = self._arrivals.next(bound, more=not jobs)
                if entry is None:
                    break
                job = self._claim(entry)
                if job is not None:
                    jobs.append(job)
        except OSError:
            if not jobs:
                raise
        return jobs

    def _claim(self, entry: Entry) -> Job | None:
        name = parse_name(entry.name)
        if name is None or self._arrivals.is_left_alone(entry.name):
            return None
        last_chance = name.deliveries == DELIVERIES_MAX - 1
        if name.deliveries and (self._suspect or (last_chance and self._held)):
            self._waits_for_quiet = self._waits_for_quiet or last_chance
            self._arrivals.set_aside(entry)
            return None
        name = fitted(name)
        claimed = name._replace(deliveries=name.deliveries + 1, mark=next(self._numbers))
        path = self._rename_to_claim(os.path.join(entry.folder, entry.name), claimed.text())
        if path is None:
            return None
        try:
            job = self._open(path, name)
        except Unreadable as error:
            self._put_back(path, entry)
            self._arrivals.leave_alone(os.path.join(entry.folder, entry.name), str(error))
            return None
        except OSError:  # this machine is short of something just now
            self._put_back(path, entry)
            self._arrivals.look_again()
            raise
        if job is not None:
            self._held.add(job.claim)
            self._suspect = job.claim if name.deliveries else self._suspect
            self._waits_for_quiet = last_chance
        return job

    def _rename_to_claim(self, source: str, claimed: str) -> str | None:
        """The claimed file's path; None when it is not to be had."""
        for _ in range(2):
            path = os.path.join(self._working().folder, claimed)
            try:
                os.rename(source, path)
            except FileNotFoundError:
                if not os.path.lexists(source):  # another process was faster
                    return None
                self._start_over()
            except PermissionError as error:
                if error.errno != errno.EPERM:
                    raise
                self._arrivals.leave_alone(source, "it may not be moved")
                return None
            else:
                return path
        return None

    def _put_back(self, path: str, entry: Entry) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, os.path.join(entry.folder, entry.name))

    def _working(self) -> Worker:
        with self._lock:
            if self._worker is None:
                self._worker = Worker(self.folders.at("claimed"))
            return self._worker

    def _start_over(self) -> None:
        """Our folder was deleted under us."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
            self._worker = None
            self.folders.make(again=True)

    def _open(self, path: str, name: Name) -> Job | None:
        """Read a claimed file; None when it was none for a handler, and was dealt with."""
        claim = path[len(self.folders.at("claimed")) + 1 :]
        if name.deliveries >= DELIVERIES_MAX:
            self.folders.bury(path, name, killed(name.deliveries))
            return None
        try:
            if name.trouble:
                raise ValueError(name.trouble)
            return read_job(path, name, limit=self.pop_limit, claim=claim)
        except ValueError as error:
            self.folders.bury(path, name._replace(block=0), str(error))
        except Oversize:
            self._put_away(path, name)
        except FileNotFoundError:
            LOG.warning("%s: job %s was taken away while it was claimed", self.name, name.key)
        return None

    def _put_away(self, path: str, name: Name) -> None:
        """Move a message over the limit, as it is, to where somebody can look at it."""
        where = self.oversize_dir or "the dead letters (set oversize_dir)"
        LOG.info("Message key %s over size limit %d, moving to %s.", name.key, self.pop_limit, where)
        if self.oversize_dir is None:
            self.folders.bury(path, name, f"it is over the size limit of {self.pop_limit} bytes")
            return
        target = Folders(os.path.abspath(self.oversize_dir))
        make_folders(target.at(sub) for sub in ("tmp", "new", "cur"))
        target.adopt(path, READY, name._replace(deliveries=0))

    # -- settling ----------------------------------------------------------------------------------------------

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> None:
        """Raises LeaseLost, and QueueError when nothing was settled."""
        name = parse_name(os.path.basename(job.claim))
        if name is None or not job.claim:
            raise LeaseLost(f"job {job.key} was not reserved from {self.name}")
        path = self.folders.at("claimed", job.claim)
        fate = fate_of(job, name, outcome, self._clock())
        with self._writing(puts):
            try:
                self._settler.settle(path, name, fate, next(self._numbers), [self._target(put) for put in puts])
            except FileNotFoundError:
                if not os.path.lexists(path):
                    self._settled(job)
                    raise LeaseLost(f"job {job.key} of {self.name} was settled or taken by somebody else") from None
                self.folders.make(again=True)
                self._settler.settle(path, name, fate, next(self._numbers), [self._target(put) for put in puts])
        self._settled(job)

    def _target(self, put: Put) -> Target:
        store = put.store
        if not isinstance(store, Maildir):
            return Target(put, store.name, True, self._place(put))
        store.folders.make()
        return Target(put, store.folders.path, False, store._place(put))

    def _settled(self, job: Job) -> None:
        with self._lock:
            self._held.discard(job.claim)
            if job.claim == self._suspect:
                self._suspect = ""
            if (self._arrivals.has_aside or self._waits_for_quiet) and not self._suspect:
                self.wake()

    # -- dead workers ------------------------------------------------------------------------------------------

    def release_stale(self) -> int:
        """Raises QueueError, also when the queue could not be written."""
        with self._writing():
            claimed = self.folders.at("claimed")
            self.folders.make(again=not os.path.isdir(claimed))
            if not os.access(self.folders.at(READY), os.W_OK):
                read_only = os.statvfs(self.folders.path).f_flag & os.ST_RDONLY
                code = errno.EROFS if read_only else errno.EACCES
                raise OSError(code, os.strerror(code))
            self._settler.retry()
            own = self._worker.id if self._worker is not None else None
            return sum(self._settler.release(folder) for folder in dead_workers(claimed, own))

    def close(self) -> None:
        """Claims go back uncounted. Another `reserve` starts anew."""
        with self._lock:
            worker, self._worker = self._worker, None
            self._suspect = ""
            self._held.clear()
        self._arrivals.close()
        if worker is not None:
            self._settler.give_back(worker.folder)
            worker.close()

    # -- looking -----------------------------------------------------------------------------------------------

    def keys(self, state: str = "ready") -> list[str]:
        return self._index.keys(state)

    def counts(self) -> dict[str, int]:
        return self._index.counts()

    def get(self, key: str) -> Job | None:
        for _ in range(3):  # it may be moved while we look
            found = self._index.find(key)
            name = parse_name(os.path.basename(found[1])) if found else None
            if found is None or name is None:
                return None
            with contextlib.suppress(FileNotFoundError, Unreadable, ValueError):
                return read_job(found[1], name)
        return None

    def path_of(self, key: str) -> str | None:
        """The file of a job, for people and for Lamson's `Queue.oversize`."""
        found = self._index.find(key)
        return found[1] if found else None

    def report(self, key: str) -> str:
        return self.folders.report(key)

    def remove(self, key: str) -> bool:
        found = self._index.find(key)
        if found is None or found[0] == "reserved":
            return False
        try:
            with self._writing():
                os.unlink(found[1])
        except QueueError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        self.folders.drop_report(key)
        return True

    def kick(self, key: str) -> bool:
        found = self._index.find(key)
        name = parse_name(os.path.basename(found[1])) if found else None
        if found is None or name is None or found[0] not in ("delayed", "dead"):
            return False
        with self._writing():
            try:
                self.folders.move(found[1], READY, fitted(name)._replace(deliveries=0, failures=0, due=0, mark=0))
            except FileNotFoundError:
                return False
        return True


_all: weakref.WeakSet[Maildir] = weakref.WeakSet()


def _forget_all() -> None:
    for maildir in list(_all):
        maildir.forget()


os.register_at_fork(after_in_child=_forget_all)
