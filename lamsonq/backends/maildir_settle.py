"""What becomes of a claimed job, and of the claims of a worker that has died.

Rules:

1. `fate_of` decides for a job that is settled, `place_of` for one that is put; a killer of workers is buried where it
   is found. Everything else moves files.
2. A job that has been committed is never given back. What could not be published is tried again, by this process as
   long as it lives and then by whoever finds it.
3. Counts: a settle sets the deliveries to zero, because the worker has lived; only what is given back uncounted keeps
   those that it had before this claim.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
from collections.abc import Mapping, Sequence

from lamsonq.backends import maildir_commit as commits
from lamsonq.backends.maildir_commit import Fate, Manifest
from lamsonq.backends.maildir_files import DEAD, DELAYED, READY, Folders, milliseconds
from lamsonq.backends.maildir_names import Name, parse_name
from lamsonq.errors import Dead, Later, QueueError, report_of
from lamsonq.jobs import DELIVERIES_MAX, GIVE_UP_AFTER, Done, Job, Outcome, Put

LOG = logging.getLogger()
"""The root logger, as in the rest of the queue."""


def fate_of(job: Job, name: Name, outcome: Outcome, now: float) -> Fate:
    """Where a job with this outcome goes, with its counts in its new name."""
    if isinstance(outcome, Done):
        return Fate(reported=bool(name.errors))
    if isinstance(outcome, Later) and not outcome.counted:
        return _given_back(name, outcome.at, now)
    if isinstance(outcome, Later) and job.received and now - job.received > GIVE_UP_AFTER:
        outcome = _given_up(outcome)
    report = report_of(outcome) if outcome.reason or outcome.__cause__ else ""
    errors = int(bool(name.errors or report))
    name = name._replace(deliveries=0, failures=name.failures + 1, errors=errors, mark=0)
    if isinstance(outcome, Dead):
        return Fate(DEAD, name.text(), report)
    at = now + backoff(name.failures - 1) if outcome.at is None else outcome.at
    return Fate(DELAYED, name._replace(due=milliseconds(at)).text(), report)


def _given_back(name: Name, at: float | None, now: float) -> Fate:
    name = name._replace(deliveries=max(name.deliveries - 1, 0), mark=0)
    if at is None or at <= now:
        return Fate(READY, name.text())
    return Fate(DELAYED, name._replace(due=milliseconds(at)).text())


def _given_up(outcome: Later) -> Dead:
    dead = Dead(f"gave up after {round(GIVE_UP_AFTER / 86400)} days: {outcome.reason}")
    dead.__cause__ = outcome.__cause__
    return dead


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures and one more: 2-4, 4-8, ... up to an hour; at random, so that jobs that
    failed together do not come back together."""
    return float(min(2 ** min(max(failures, 0), 20) * 4, 3600)) * random.uniform(0.5, 1)


def killed(times: int) -> str:
    """The reason of a job that is dead because its workers died."""
    return f"the worker died {times} times while it had this job"


class Settler:
    """Settles the claims of one queue object, and finishes what it or a dead worker has begun."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._unfinished: dict[str, Mapping[str, Put]] = {}
        self._complained: set[str] = set()

    def settle(self, path: str, name: Name, fate: Fate, number: int, puts: Sequence[commits.Target]) -> None:
        """`number` is one that this worker has not used yet. Raises FileNotFoundError when the claim is gone."""
        if not puts:
            commits.apply_fate(self._folders, path, name.key, fate)
            return
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
        if not self._finish(committed, name.key, token, manifest, live):
            self._unfinished[committed] = live

    def retry(self) -> None:
        """Try again to publish what this process has committed."""
        for path, live in list(self._unfinished.items()):
            name = parse_name(os.path.basename(path))
            if name is None or self._finish_committed(path, name, live):
                self._unfinished.pop(path, None)

    def release(self, folder: str) -> int:
        """Deal with the claims of a dead worker; how many there were."""
        kept, claims = [], claims_in(folder)
        for path, name in claims:
            if name.commit:
                if not self._finish_committed(path, name, {}):
                    kept.append(_token(path, name.commit))
            elif name.deliveries >= DELIVERIES_MAX:
                self._folders.bury(path, name, killed(name.deliveries))
            else:
                LOG.warning("The worker of job %s has died; it is ready again in %s", name.key, self._folders.path)
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
                    back = name._replace(deliveries=max(name.deliveries - 1, 0), mark=0)
                    self._folders.move(path, READY, back)
        if not claims_in(folder):  # no thread of ours can commit any more, so nothing that is staged is needed
            with contextlib.suppress(OSError):
                commits.sweep(self._folders, os.path.basename(folder), [])

    def _finish_committed(self, path: str, name: Name, live: Mapping[str, Put]) -> bool:
        """Whether nothing is left to be done for a job that was committed."""
        token = _token(path, name.commit)
        try:
            manifest = commits.read_manifest(self._folders, token)
        except (OSError, ValueError) as error:
            self._complain(path, str(error))
            return False
        if manifest is not None:
            return self._finish(path, name.key, token, manifest, live)
        if os.path.lexists(path):
            reason = f"it was settled, but {token}.json, which says how, is gone from held/"
            self._folders.bury(path, name, reason)
        return True

    def _finish(self, path: str, key: str, token: str, manifest: Manifest, live: Mapping[str, Put]) -> bool:
        try:
            commits.publish(self._folders, path, manifest, live)
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
