"""What is asked of a maildir queue without working it: looking, mending, pausing.

Rules: nothing is claimed, and looking makes no folder. Files may move while they are looked for: then it is looked
again, and what has gone meanwhile is gone. What the operating system refuses is a QueueError that says what to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from lamsonq.backends.durable import sync_folder, write_file
from lamsonq.backends.maildir_files import READY, Folders, Unreadable, queue_error, read_job, read_record
from lamsonq.backends.maildir_index import Index
from lamsonq.backends.maildir_names import fitted, key_of, parse_name
from lamsonq.errors import QueueError, SettingsError
from lamsonq.jobs import Job, Limit


class Desk:
    """The part of lamsonq.jobs.Backend that needs no worker."""

    def __init__(self, name: str, folders: Folders) -> None:
        self.name = name
        self.folders = folders
        self._index = Index(folders)

    @contextlib.contextmanager
    def _writing(self, data: object = None) -> Iterator[None]:
        """Tell what the operating system refuses as a QueueError that says what to do."""
        try:
            yield
        except OSError as error:
            raise queue_error(self.name, error, data) from error

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

    def state(self, key: str) -> str | None:
        found = self._index.find(key)
        return found[0] if found else None

    def oldest(self) -> float | None:
        for _ in range(3):
            path = self._index.oldest()
            if path is None:
                return None
            name = parse_name(os.path.basename(path))
            with contextlib.suppress(FileNotFoundError, Unreadable, ValueError):
                return os.stat(path).st_mtime if name is None else read_record(path, name).received
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
        if found is None or name is None or found[0] not in ("delayed", "dead", "done"):
            return False
        with self._writing():
            try:
                self.folders.move(found[1], READY, fitted(name)._replace(deliveries=0, failures=0, due=0, mark=0))
            except FileNotFoundError:
                return False
        return True

    def purge(self, state: str, before: float | None = None) -> int:
        """Raises QueueError."""
        paths = list(self._index.paths(state)) if state != "reserved" else []
        with self._writing():
            return sum(self._purge(path, before) for path in paths)

    def _purge(self, path: str, before: float | None) -> bool:
        try:
            # A rename sets the time of change, so it is when the job came into its state.
            if before is not None and os.lstat(path).st_ctime >= before:
                return False
            os.unlink(path)
        except FileNotFoundError:  # somebody else was faster
            return False
        self.folders.drop_report(key_of(os.path.basename(path)))
        return True

    def pause(self) -> None:
        """Raises QueueError."""
        with self._writing():
            self.folders.make()
            with contextlib.suppress(FileExistsError):
                write_file(self.folders.at("paused"))
            sync_folder(self.folders.path)

    def resume(self) -> None:
        """Raises QueueError."""
        with self._writing(), contextlib.suppress(FileNotFoundError):
            os.unlink(self.folders.at("paused"))
            sync_folder(self.folders.path)

    def paused(self) -> bool:
        return os.path.lexists(self.folders.at("paused"))

    def limit(self, limits: Sequence[Limit]) -> None:
        if limits:
            raise SettingsError(f"{self.name} cannot keep limits per key: use a sqlite: queue")
