"""Looking at a maildir queue without taking anything: its keys, its counts, one job by its key.

Rules: the first look at a key remembers where every key was, so that asking for one key after the other does not read
the directories each time; what is remembered is only a hint, the file system decides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from lamsonq.backends.maildir_files import STATES, Folders
from lamsonq.backends.maildir_names import is_deleted, is_newer

_RESERVED = "reserved"


class Index:
    """The jobs of one queue by state and by key."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._hints: dict[str, tuple[str, str]] = {}

    def keys(self, state: str) -> list[str]:
        """Raises ValueError for a state that is none."""
        found = [(key_of(path), path) for path in self._paths(state)]
        self._hints.update((key, (state, path)) for key, path in found)
        return sorted(key for key, _ in found)

    def counts(self) -> dict[str, int]:
        return {state: sum(1 for _ in self._paths(state)) for state in (*STATES, _RESERVED)}

    def find(self, key: str) -> tuple[str, str] | None:
        """(state, path) of the job with this key."""
        hint = self._hints.pop(key, None)
        if hint is not None and os.path.lexists(hint[1]):
            return hint
        self._hints = {key_of(path): (state, path) for state in (*STATES, _RESERVED) for path in self._paths(state)}
        return self._hints.get(key)

    def _paths(self, state: str) -> Iterator[str]:
        if state == _RESERVED:
            yield from self._reserved()
        elif state in STATES:
            for folder in self._folders.of(state):
                yield from _files(folder)
        else:
            raise ValueError(f"a job is {', '.join((*STATES, _RESERVED))}; not {state!r}")

    def _reserved(self) -> Iterator[str]:
        claimed = self._folders.at("claimed")
        workers = os.listdir(claimed) if os.path.isdir(claimed) else []
        for worker in workers:
            if not worker.endswith(".lock"):
                yield from _files(os.path.join(claimed, worker))


def key_of(path: str) -> str:
    """The key in a file's name."""
    return os.path.basename(path).partition(":2,")[0].partition(",")[0]


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
