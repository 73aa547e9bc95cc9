"""What SQLite refuses, told as a QueueError that says what to do; nothing was kept then."""

from __future__ import annotations

import sqlite3

from lamsonq.backends.maildir_files import queue_error
from lamsonq.errors import QueueError

_ADVICE = {
    sqlite3.SQLITE_FULL: "free some space (or raise its max_page_count); nothing was kept",
    sqlite3.SQLITE_BUSY: "another program has a transaction open in it; end that one, and begin yours `immediate`",
    sqlite3.SQLITE_LOCKED: "another statement of this connection is at work in it; finish that one first",
    sqlite3.SQLITE_READONLY: "let the server's user own the file and its folder, on a file system mounted writable",
    sqlite3.SQLITE_IOERR: "check the disk, its space and its quota; nothing was kept",
    sqlite3.SQLITE_CANTOPEN: "see the owner, mode and space of its folder, and the limit of open files (ulimit -n)",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: move it away and save what it has by `sqlite3 FILE .recover`",
    sqlite3.SQLITE_NOTADB: "the file is no SQLite database: move it away, or name another one",
    sqlite3.SQLITE_PERM: "let the server's user own the file and its folder",
    sqlite3.SQLITE_TOOBIG: "the job is larger than SQLite takes; nothing was kept",
}


TROUBLE = (sqlite3.Error, OSError, UnicodeDecodeError)
"""What SQLite's module raises for what it cannot read or write; the last for the text of an error that quotes a file
which is damaged."""


def told(name: str, error: sqlite3.Error | OSError | UnicodeDecodeError, data: object = None) -> QueueError:
    """What is wrong with a queue's database and what to do about it, in one line."""
    if isinstance(error, OSError):
        return queue_error(name, error, data)
    code = sqlite3.SQLITE_CORRUPT if isinstance(error, UnicodeDecodeError) else getattr(error, "sqlite_errorcode", None)
    advice = _ADVICE.get((code or 0) & 0xFF, "nothing was kept")
    if str(error).startswith(("no such table", "no such column")):
        advice = "somebody has changed lamsonq's tables in it: restore them, or move the file away; nothing was kept"
    refusal = QueueError(f"cannot use {name}: {error}; {advice}", data)
    refusal.__cause__ = error
    return refusal


class Telling:
    """Within the block an error is told as a QueueError about `data`, which was to be queued."""

    __slots__ = ("_data", "_name")

    def __init__(self, name: str, data: object = None) -> None:
        self._name, self._data = name, data

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QueueError):
            error.data = self._data
        elif isinstance(error, OSError):
            raise told(self._name, error, self._data) from error
