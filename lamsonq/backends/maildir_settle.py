"""What becomes of a claimed job, and of the claims of a worker that has died.

Rules:

1. `fate_of` decides for a job that is settled, `place_of` for one that is put; a killer of workers is buried where it
   is found. Everything else moves files.
2. A job that has been committed is never given back. What could not be published is tried again, by this process as
   long as it lives and then by whoever finds it.
3. Counts: a settle sets the deliveries to zero, because the worker has lived; only what is given back uncounted keeps
   those that it had before this claim, and so does what a worker had that was forgiven. What a tool has taken was not
   counted: when the tool dies it goes back where it was.
4. A job that ends (gone, dead, archived) is no longer unique: see lamsonq/backends/maildir_guards.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Mapping, Sequence

from lamsonq.backends import maildir_commit as commits
from lamsonq.backends.maildir_commit import Fate, Manifest
from lamsonq.backends.maildir_files import (
    DEAD,
    DELAYED,
    DONE,
    READY,
    TAKEN_FROM,
    WHERE,
    Folders,
    Unreadable,
    milliseconds,
    read_record,
)
from lamsonq.backends.maildir_guards import Guards, mark_of
from lamsonq.backends.maildir_names import Name, parse_name
from lamsonq.backends.rounds import Round
from lamsonq.errors import Dead, Later, QueueError
from lamsonq.jobs import DELIVERIES_MAX, Done, Expired, Job, Outcome, Put, due_after, killed
from lamsonq.reports import entry_of

LOG = logging.getLogger()
"""The root logger, as in the rest of the queue."""


def fate_of(job: Job, name: Name, outcome: Outcome, now: float) -> Fate:
    """Where a job with this outcome goes, with its counts in its new name."""
    if isinstance(outcome, Later) and not outcome.counted:
        back = given_back(name)._replace(due=0, taken=0)
        if outcome.at is None or outcome.at <= now:
            return Fate(READY, back.text())
        return Fate(DELAYED, back._replace(due=milliseconds(outcome.at)).text())
    unique = "" if job.unique is None or isinstance(outcome, Later) else mark_of(job.unique)
    if isinstance(outcome, Expired) or (isinstance(outcome, Done) and not outcome.kept):
        return Fate(reported=bool(name.errors), unique=unique)
    name = name._replace(deliveries=0, mark=0, due=0, taken=0)
    if isinstance(outcome, Done):
        return Fate(DONE, name.text(), unique=unique)
    failures = name.failures + 1
    report = entry_of(outcome, failures, now)
    name = name._replace(failures=failures, errors=1)
    if isinstance(outcome, Dead):
        return Fate(DEAD, name.text(), report, unique=unique)
    due = due_after(outcome, failures, now)
    if due <= now:  # a name tells milliseconds, which are rounded up: it would be found a moment too late
        return Fate(READY, name.text(), report)
    return Fate(DELAYED, name._replace(due=milliseconds(due)).text(), report)


def given_back(name: Name) -> Name:
    """The name that a claimed job had before it was claimed, but for where a tool took it from."""
    return name._replace(deliveries=name.deliveries if name.taken else max(name.deliveries - 1, 0), mark=0)


class Settler:
    """Settles the claims of one queue object, and finishes what it or a dead worker has begun."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._unfinished: dict[str, Mapping[str, Put]] = {}
        self._complained: set[str] = set()

    def settle(self, path: str, name: Name, fate: Fate, number: int, puts: Sequence[commits.Target]) -> list[bool]:
        """`number` is one that this worker has not used yet. Raises FileNotFoundError when the claim is gone."""
        results = [True] * len(puts)
        if not puts:
            commits.apply_fate(self._folders, path, name.key, fate)
            return results
        if not os.path.lexists(path):
            raise FileNotFoundError(errno.ENOENT, "it was taken away", path)
        committed = os.path.join(os.path.dirname(path), name._replace(commit=number).text())
        token = _token(committed, number)
        manifest = commits.stage(self._folders, token, fate, puts)
        try:
            os.rename(path, committed)
        except OSError:
            commits.discard(self._folders, token, manifest.publications)
            raise
        live = {p.staged: target.put for p, target in zip(manifest.publications, puts, strict=True)}
        if not self._finish(committed, name.key, token, manifest, live, results):
            self._unfinished[committed] = live
        return results

    def retry(self) -> None:
        """Try again to publish what this process has committed."""
        this_round = Round()
        for path, live in list(self._unfinished.items()):
            name = parse_name(os.path.basename(path))
            if name is None or self._finish_committed(path, name, live, this_round):
                self._unfinished.pop(path, None)

    def release(self, folder: str, forgiven: int = 0) -> int:
        """Deal with the claims of a dead worker; how many there were. Those up to `forgiven` do not count."""
        kept, claims, this_round = [], claims_in(folder), Round()
        for path, name in claims:
            if name.commit:
                if not self._finish_committed(path, name, {}, this_round):
                    kept.append(_token(path, name.commit))
            elif name.taken:
                self._put_back(path, name)
            elif name.deliveries >= DELIVERIES_MAX and name.mark > forgiven:
                self.bury(path, name, killed(name.deliveries))
            else:
                LOG.warning("The worker of job %s has died; it is ready again in %s", name.key, self._folders.path)
                if name.mark <= forgiven:
                    name = given_back(name)
                self._folders.move(path, READY, name._replace(mark=0))
        if not _has_strangers(folder):
            commits.sweep(self._folders, os.path.basename(folder), kept)
        return len(claims)

    def give_back(self, folder: str) -> None:
        """Give our own claims back, uncounted, as far as that is possible."""
        self.retry()
        for path, name in claims_in(folder):
            if not name.commit:
                with contextlib.suppress(OSError):
                    self._put_back(path, name)
        if not claims_in(folder):  # no thread of ours can commit any more, so nothing that is staged is needed
            with contextlib.suppress(OSError):
                commits.sweep(self._folders, os.path.basename(folder), [])

    def _put_back(self, path: str, name: Name) -> None:
        """As it was before it was claimed."""
        state = TAKEN_FROM[name.taken - 1] if 0 < name.taken <= len(TAKEN_FROM) else "ready"
        self._folders.move(path, WHERE[state][0], given_back(name)._replace(taken=0))

    def bury(self, path: str, name: Name, reason: str) -> None:
        """Make a dead letter of a claimed file that no handler is to see."""
        self.set_free(path, name)
        self._folders.bury(path, name, reason)

    def set_free(self, path: str, name: Name) -> None:
        """Like jobs need not wait for this one any longer."""
        if name.unique:
            with contextlib.suppress(ValueError, Unreadable):
                unique = read_record(path, name).unique
                if unique is not None:
                    Guards(self._folders).release(mark_of(unique), path)

    def _finish_committed(self, path: str, name: Name, live: Mapping[str, Put], this_round: Round) -> bool:
        """Whether nothing is left to be done for a job that was committed."""
        token = _token(path, name.commit)
        try:
            manifest = commits.read_manifest(self._folders, token)
        except (OSError, ValueError) as error:
            self._complain(path, str(error))
            return False
        if manifest is not None:
            return self._finish(path, name.key, token, manifest, live, this_round=this_round)
        if os.path.lexists(path):
            reason = f"it was settled, but {token}.json, which says how, is gone from held/"
            self.bury(path, name, reason)
        return True

    def _finish(
        self,
        path: str,
        key: str,
        token: str,
        manifest: Manifest,
        live: Mapping[str, Put],
        results: list[bool] | None = None,
        this_round: Round | None = None,
    ) -> bool:
        try:
            if manifest.fate.unique:  # it is settled for good, and in nobody's way: not even of a like one that it puts
                with contextlib.suppress(FileNotFoundError):
                    Guards(self._folders).release(manifest.fate.unique, path)
            commits.publish(self._folders, path, manifest, live, results, this_round)
            commits.finish(self._folders, path, key, manifest.fate, token)
        except (OSError, ValueError, QueueError) as error:
            self._complain(path, f"what job {key} has put is not out yet, and is tried again: {error}")
            return False
        return True

    def _complain(self, path: str, text: str) -> None:
        if path not in self._complained:
            LOG.error("%s: %s", self._folders.path, text)
            self._complained.add(path)


def claims_in(folder: str) -> list[tuple[str, Name]]:
    """The files in a worker's folder that this version can read."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as found:
        paths = sorted(entry.path for entry in found if entry.is_file(follow_symlinks=False))
    names = ((path, parse_name(os.path.basename(path))) for path in paths)
    return [(path, name) for path, name in names if name is not None]


def _has_strangers(folder: str) -> bool:
    """Whether claims of a newer version lie there, which may need what is staged."""
    return os.path.isdir(folder) and any(parse_name(name) is None for name in os.listdir(folder))


def _token(committed: str, number: int) -> str:
    """What the staged files of a commit begin with: `<worker>.<number>`."""
    return f"{os.path.basename(os.path.dirname(committed))}.{number}"
