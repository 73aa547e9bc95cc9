"""Looking at a maildir queue without taking anything: its keys, its counts, one job by its key.

Rules: the first look at a key remembers where every key was, so that asking for one key after the other does not read
the directories each time; what is remembered is only a hint, the file system decides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator

from lamsonq.backends.maildir_files import Folders
from lamsonq.backends.maildir_names import is_deleted, is_newer, key_of, priority_of
from lamsonq.jobs import STATES, check_state

_RESERVED = "reserved"
_SECONDS = re.compile(r"([0-9]{9,11})\.")


class Index:
    """The jobs of one queue by state and by key."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._hints: dict[str, tuple[str, str]] = {}

    def keys(self, state: str) -> list[str]:
        """Raises ValueError for a state that is none."""
        found = []
        for path in self.paths(state):
            name = os.path.basename(path)
            key = key_of(name)
            self._hints[key] = state, path
            found.append((priority_of(name), key))
        return [key for _, key in sorted(found)]

    def counts(self) -> dict[str, int]:
        return {state: sum(1 for _ in self.paths(state)) for state in STATES}

    def present(self, keys: Collection[str]) -> set[str]:
        """Which of these keys are there, in any state. Reads all directories, unless there are no keys."""
        # In the order in which jobs move, and the ready once more, so that hardly one that moves is missed.
        states = ("ready", _RESERVED, "delayed", "dead", "done", "ready") if keys else ()
        return {
            key for state in states for path in self.paths(state) if (key := key_of(os.path.basename(path))) in keys
        }

    def oldest(self) -> str | None:
        """The ready file that was put first, whatever its priority: a key of ours begins with that moment."""
        return min(self.paths("ready"), key=put_at, default=None)

    def find(self, key: str) -> tuple[str, str] | None:
        """(state, path) of the job with this key."""
        hint = self._hints.get(key)
        if hint is not None and os.path.lexists(hint[1]):
            return hint
        self._hints = {key_of(os.path.basename(path)): (state, path) for state in STATES for path in self.paths(state)}
        return self._hints.get(key)

    def paths(self, state: str) -> Iterator[str]:
        check_state(state)
        if state == _RESERVED:
            yield from self._reserved()
        else:
            for folder in self._folders.of(state):
                yield from _files(folder)

    def _reserved(self) -> Iterator[str]:
        claimed = self._folders.at("claimed")
        workers = os.listdir(claimed) if os.path.isdir(claimed) else []
        for worker in workers:
            if not worker.endswith(".lock"):
                yield from _files(os.path.join(claimed, worker))


def put_at(path: str) -> tuple[float, str]:
    """When a job came, and its name: its key tells, and where another program has chosen that, its file."""
    name = os.path.basename(path)
    if match := _SECONDS.match(name):
        return float(match[1]), name
    try:
        return os.lstat(path).st_mtime, name
    except OSError:  # taken while we looked
        return float("inf"), name


def _files(folder: str) -> Iterator[str]:
    try:
        found = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with found:
        for entry in found:
            passed_over = entry.name.startswith(".") or is_deleted(entry.name) or is_newer(entry.name)
            if not passed_over and entry.is_file(follow_symlinks=False):
                yield entry.path
