"""Jobs in a maildir: the queue that needs nothing but files.

Rules:

1. Ready is what lies in new/ and cur/. Other programs may put files there, move them and read them; a file that they
   put there is a job with defaults. What cannot be a job (a directory, a link, a newer version's file) is left alone.
   A pause is a file of that name in the queue's folder.
2. To claim is to rename the file into this process's folder; who comes second finds nothing. The delivery is counted
   in that rename. A dead process is recognised by its lock (maildir_claims.py), and its jobs go back.
3. A job whose worker died runs with no other such job of this queue beside it, and at its last chance with no other at
   all: of the jobs of one queue, what is buried for killing its worker has done so alone.
4. To settle is to rename or unlink the claimed file; who comes second gets LeaseLost. With puts: maildir_commit.py.
5. A key that is there already is put once. A key that this process has just made is not looked for, it can be nowhere.
   Keys that derive from a job's, and all that a settle publishes, are looked for by their whole file name where the job
   would go: that finds what a crash would repeat, as long as it is as it was put. Any other key is looked for among
   all jobs in every state, under the lock of the guarded puts (maildir_guards.py).
6. A receiver that finds nothing sleeps until a file appears (maildir_arrivals.py); it does not look again.
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
from collections.abc import Callable, Collection, Sequence

from lamsonq import clock
from lamsonq.backends import address_of
from lamsonq.backends.backlog import Entry
from lamsonq.backends.durable import make_folders, remove_file, write_files
from lamsonq.backends.lives import Vigil
from lamsonq.backends.maildir_arrivals import Arrivals
from lamsonq.backends.maildir_claims import Worker, dead_workers
from lamsonq.backends.maildir_commit import Fate, Target
from lamsonq.backends.maildir_desk import Desk
from lamsonq.backends.maildir_files import (
    READY,
    TAKEN_FROM,
    Folders,
    Oversize,
    Place,
    Unreadable,
    place_of,
    read_job,
)
from lamsonq.backends.maildir_guards import Guards
from lamsonq.backends.maildir_names import Name, fitted, parse_name
from lamsonq.backends.maildir_settle import Settler, fate_of
from lamsonq.errors import LeaseLost, QueueError
from lamsonq.jobs import DELIVERIES_MAX, Done, Job, Outcome, Put, finish_each, killed
from lamsonq.keys import is_derived, new_key, use_key

LOG = logging.getLogger()
"""The root logger: users of Lamson grep for these lines."""

TIDY_EVERY = 600.0
"""Seconds between two looks for guards that are of no use any more."""
PAUSE_LOOK_EVERY = 0.5
"""Seconds between two looks whether a pause is over."""


def open_queue(url: str, *, pop_limit: int = 0, oversize_dir: str | None = None) -> Maildir:
    """The backend that a plain path names."""
    return Maildir(url, pop_limit=pop_limit, oversize_dir=oversize_dir)


class Maildir(Desk):
    """A queue in a directory; see lamsonq.jobs.Backend. `now` gives seconds since the epoch.

    With `pop_limit` (bytes, 0 = none) a larger message is not handed out but moved into the maildir `oversize_dir`, or
    to the dead letters where there is none.
    """

    capabilities: frozenset[str] = frozenset({"processes", "files"})

    def __init__(
        self,
        name: str,
        *,
        pop_limit: int = 0,
        oversize_dir: str | None = None,
        now: Callable[[], float] = clock.now,
    ) -> None:
        super().__init__(name, Folders(os.path.abspath(name), now))
        self.address = self.folders.path
        self.pop_limit = pop_limit
        self.oversize_dir = oversize_dir
        self._guards = Guards(self.folders)
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """The state of a process that has claimed nothing yet."""
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._vigil = Vigil()
        self._arrivals = Arrivals(self.folders, self._vigil)
        self._numbers = itertools.count(1)
        self._tidy_at = time.monotonic() + TIDY_EVERY
        self._suspect = ""
        self._held: set[str] = set()  # our claims that are not settled
        self._stranded: dict[str, str] = {}  # files that we have claimed and could neither hand out nor put back
        self._waits_for_quiet = False  # a job at its last chance is to run with no other beside it
        self._settler = Settler(self.folders)

    def forget(self) -> None:
        """In a forked child: claims, watches and locks are the parent's; this process starts as a worker of its own."""
        if self._worker is not None:
            self._worker.forget()
        arrivals = self._arrivals
        self._begin()
        arrivals.close()

    # -- putting -----------------------------------------------------------------------------------------------

    def new_key(self) -> str:
        return new_key()

    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        """Raises QueueError, and then none of them is in the queue."""
        if conn is not None:
            raise QueueError(f"{self.name} is no database: push(..., conn=...) is for sqlite: queues", puts)
        sought = {put.job.key for put in puts if not use_key(put.job.key) and not is_derived(put.job.key)}
        with self._writing(puts):
            self.folders.make()
            try:
                return self._put(puts, sought)
            except FileNotFoundError:  # somebody has removed the queue while we had it open
                self.folders.make(again=True)
                return self._put(puts, sought)

    def _put(self, puts: Sequence[Put], sought: set[str]) -> list[bool]:
        places = [place_of(put, self.folders.now()) for put in puts]
        staged = self._stage(puts, places)
        paths: list[str | None] = []
        with contextlib.ExitStack() as stack:
            try:
                if sought or any(place.guarded for place in places):
                    stack.enter_context(self._guards.locked())
                there = self._index.present(sought)
                for file, place in zip(staged, places, strict=True):
                    paths.append("" if place.name.key in there else self._guards.publish(file, place))
                    if paths[-1] is not None:
                        there.add(place.name.key)
                self._guards.sync(list(zip(places, paths, strict=True)))
            except Exception:  # the gate may be somebody's own
                paths += [None] * (len(puts) - len(paths))
                for file, place, path in reversed(list(zip(staged, places, paths, strict=True))):
                    self._guards.retract(file, place, path)
                raise
        for file, path in zip(staged, paths, strict=True):
            if not path:
                remove_file(file)
        return [path is not None for path in paths]

    def _stage(self, puts: Sequence[Put], places: Sequence[Place]) -> list[str]:
        files: dict[str, tuple[bytes, bytes]] = {}
        for put, place in zip(puts, places, strict=True):
            path = self._guards.staging(place)
            if path in files:
                path = self._guards.staging(place, alone=False)
            files[path] = place.block, put.job.body
        write_files(files.items())
        return list(files)

    # -- reserving ---------------------------------------------------------------------------------------------

    def reserve(self, n: int, wait: float = 0.0, *, only: Collection[str] | None = None) -> list[Job]:
        """Raises QueueError."""
        self._arrivals.ask_for(only if only is None or isinstance(only, frozenset) else frozenset(only))
        until = time.monotonic() + wait
        with self._writing():
            while True:
                self._keep_up()
                jobs = self._take(n) if self._may_take() else []
                left = until - time.monotonic()
                if jobs or n <= 0 or left <= 0 or self._sleep(left):
                    return jobs

    def wait(self, seconds: float) -> None:
        """Raises QueueError."""
        until = time.monotonic() + seconds
        with self._writing():
            while True:
                self._keep_up()
                left = until - time.monotonic()
                if (self._may_take() and self._arrivals.any()) or left <= 0 or self._sleep(left):
                    return

    def _sleep(self, seconds: float) -> bool:
        """Sleep until there may be something to do; True when `wake` was called."""
        patience = self._vigil.patience(hears=self._arrivals.seeing and not self._stranded)
        return self._arrivals.sleep(min(seconds, PAUSE_LOOK_EVERY if self.paused() else patience))

    def wake(self) -> None:
        self._arrivals.wake()

    def resume(self) -> None:
        """Raises QueueError."""
        super().resume()
        self.wake()

    def _keep_up(self) -> None:
        """Now and then: look for dead workers, and whether the directory is still the same."""
        if self._vigil.is_due():
            for path, origin in list(self._stranded.items()):
                self._put_back(path, origin)
            self.release_stale()
            if abandoned := self.folders.abandoned():
                self._guards.clear_away(abandoned)
            self._arrivals.follow_moved()
        now = time.monotonic()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_EVERY
            self._guards.sweep()

    def _may_take(self) -> bool:
        """Take note of what is new; whether anything may be claimed now."""
        self._arrivals.look()
        if self.paused():
            return False
        with self._lock:
            if self._waits_for_quiet and self._held:
                return False
            self._waits_for_quiet = False
            if not self._suspect and self._arrivals.has_aside:
                self._arrivals.take_back()
        return True

    def _take(self, n: int) -> list[Job]:
        jobs: list[Job] = []
        try:
            while len(jobs) < n and not self._waits_for_quiet:
                entry = self._arrivals.next(more=not jobs)
                if entry is None:
                    break
                job = self._claim(entry)
                if job is not None:
                    jobs.append(job)
        except OSError:
            self._arrivals.look_again()  # what could not be claimed is still there
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
        claimed = name._replace(deliveries=name.deliveries + 1, mark=next(self._numbers), taken=0, commit=0)
        origin = os.path.join(entry.folder, entry.name)
        path = self._rename_to_claim(origin, claimed.text())
        if path is None:
            return None
        try:
            job = self._open(path, name)
        except Unreadable as error:
            self._put_back(path, origin)
            self._arrivals.leave_alone(origin, str(error))
            return None
        except OSError:  # this machine is short of something just now
            self._put_back(path, origin)
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
                folders = os.path.dirname(source), os.path.dirname(path)
                if error.errno != errno.EPERM or not all(os.access(folder, os.W_OK) for folder in folders):
                    raise  # a folder is not writable just now (chattr +i): that is no fault of the file
                self._arrivals.leave_alone(source, "it may not be moved")
                return None
            else:
                return path
        return None

    def _put_back(self, path: str, origin: str) -> None:
        """Let a file be as if it had never been claimed: now, or as soon as that is possible."""
        self._stranded[path] = origin
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, origin)
        del self._stranded[path]

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
        claim = self._claim_of(path)
        if name.deliveries >= DELIVERIES_MAX:
            self._settler.bury(path, name, killed(name.deliveries))
            return None
        try:
            if name.trouble:
                raise ValueError(name.trouble)
            return read_job(path, name, limit=self.pop_limit, claim=claim)
        except ValueError as error:
            self._settler.bury(path, name._replace(block=0), str(error))
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
            self._settler.bury(path, name, f"it is over the size limit of {self.pop_limit} bytes")
            return
        self._settler.set_free(path, name)
        target = Folders(os.path.abspath(self.oversize_dir))
        make_folders(target.at(sub) for sub in ("tmp", "new", "cur"))
        target.adopt(path, READY, name._replace(deliveries=0))

    def claim(self, key: str) -> Job | None:
        """Raises QueueError."""
        with self._writing():
            for _ in range(3):  # it may be moved while we look
                found = self._index.find(key)
                name = parse_name(os.path.basename(found[1])) if found else None
                if found is None or name is None or found[0] not in TAKEN_FROM:
                    return None
                self.folders.make()
                taken = fitted(name)._replace(mark=next(self._numbers), taken=TAKEN_FROM.index(found[0]) + 1)
                path = self._rename_to_claim(found[1], taken.text())
                if path is not None:
                    return self._open_taken(path, taken, found[1])
        return None

    def _open_taken(self, path: str, name: Name, origin: str) -> Job:
        try:
            return read_job(path, name, claim=self._claim_of(path))
        except (ValueError, Unreadable, OSError) as error:
            self._put_back(path, origin)
            if isinstance(error, OSError):
                raise
            raise QueueError(f"{origin} cannot be read: {error}") from error

    def _claim_of(self, path: str) -> str:
        return path[len(self.folders.at("claimed")) + 1 :]

    # -- settling ----------------------------------------------------------------------------------------------

    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        """Raises LeaseLost, and QueueError when nothing was settled."""
        path, name = self._claimed(job)
        fate = fate_of(job, name, outcome, self.folders.now())
        with self._writing(puts):
            try:
                results = self._settle(path, name, fate, puts)
            except FileNotFoundError:
                if not os.path.lexists(path):
                    self._settled(job)
                    raise self._lost(job) from None
                self.folders.make(again=True)
                results = self._settle(path, name, fate, puts)
            except ValueError as error:
                raise QueueError(f"{self.name}: {error}", puts) from error
        self._settled(job)
        return results

    def _settle(self, path: str, name: Name, fate: Fate, puts: Sequence[Put]) -> list[bool]:
        return self._settler.settle(path, name, fate, next(self._numbers), [self._target(put) for put in puts])

    def _claimed(self, job: Job) -> tuple[str, Name]:
        """The file of a reserved job. Raises LeaseLost."""
        name = parse_name(os.path.basename(job.claim))
        if name is None or not job.claim:
            raise LeaseLost(f"job {job.key} was not reserved from {self.name}")
        return self.folders.at("claimed", job.claim), name

    def _lost(self, job: Job) -> LeaseLost:
        return LeaseLost(f"job {job.key} of {self.name} was settled or taken by somebody else")

    def finish(self, jobs: Sequence[Job], outcome: Done) -> list[Job]:
        """Raises QueueError, and then some of them may have been settled."""
        return finish_each(self, jobs, outcome)

    def touch(self, job: Job) -> None:
        if not os.path.lexists(self._claimed(job)[0]):
            raise self._lost(job)

    def _target(self, put: Put) -> Target:
        store = put.store
        place = place_of(put, self.folders.now())
        if not isinstance(store, Maildir):
            return Target(put, address_of(store), True, place)
        store.folders.make()
        return Target(put, store.address, False, place)

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
            self.folders.make(again=not self.folders.whole())
            if not os.access(self.folders.at(READY), os.W_OK):
                read_only = os.statvfs(self.folders.path).f_flag & os.ST_RDONLY
                code = errno.EROFS if read_only else errno.EACCES
                raise OSError(code, os.strerror(code))
            self._settler.retry()
            own = self._worker.id if self._worker is not None else None
            return sum(self._settler.release(folder, forgiven) for folder, forgiven in dead_workers(claimed, own))

    def forgive(self) -> None:
        """Raises QueueError."""
        with self._writing(), self._lock:
            if self._worker is not None:
                self._worker.forgive(next(self._numbers))

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


_all: weakref.WeakSet[Maildir] = weakref.WeakSet()


def _forget_all() -> None:
    for maildir in list(_all):
        maildir.forget()


os.register_at_fork(after_in_child=_forget_all)
