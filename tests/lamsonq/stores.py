"""The backends that are always there, opened for a test: see lamsonq.conformance.Stores."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar

from lamsonq.backends.maildir import Maildir
from lamsonq.backends.memory import Memory
from lamsonq.backends.sqlite import SQLite
from lamsonq.conformance import Clock
from lamsonq.jobs import Backend

_numbers = itertools.count(1)


class MemoryStores:
    """Queues in memory under names of their own."""

    kind: ClassVar[type[Memory]] = Memory

    def __init__(self) -> None:
        self.clock = Clock()
        self._prefix = f"memory:{next(_numbers)}/"
        self._opened: list[Memory] = []

    def open(self, name: str = "posts") -> Memory:
        self._opened.append(self.kind(self._prefix + name, now=self.clock))
        return self._opened[-1]

    def die(self, backend: Backend) -> None:
        assert isinstance(backend, Memory)
        backend.forget()


class MaildirStores:
    """Queues that are folders of one directory."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self._folder = folder
        self._opened: list[Maildir] = []

    def open(self, name: str = "posts") -> Maildir:
        self._opened.append(Maildir(str(self._folder / name), now=self.clock))
        return self._opened[-1]

    def die(self, backend: Backend) -> None:
        assert isinstance(backend, Maildir)
        backend.forget()

    def close(self) -> None:
        for queue in self._opened:
            queue.close()


class SQLiteStores:
    """Queues in one file of a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self._folder = folder
        self._opened: list[SQLite] = []

    def open(self, name: str = "posts") -> SQLite:
        self._opened.append(SQLite(f"sqlite:{self._folder}/q.db?queue={name}", now=self.clock))
        return self._opened[-1]

    def die(self, backend: Backend) -> None:
        assert isinstance(backend, SQLite)
        backend.forget()

    def close(self) -> None:
        for queue in self._opened:
            queue.close()
