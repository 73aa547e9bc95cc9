"""Queues in SQLite files, looked at: which there are, how many jobs wait in them, and whether each row is a job.

Rules:

1. Only reading: a file is opened `mode=ro`, so that neither it nor anything beside it is made or changed.
2. A file is ours when it has the table `lamsonq`, or the folder of workers beside it. One of a newer version, or one
   that cannot be read, is a Refusal of that file alone: it must not hide the others.
3. Counting goes by the partial indexes of the schema (lamsonq/backends/sqlite_schema.py), never through the bodies.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from lamsonq.errors import Refusal

VERSION = 1
"""The schema that is known here."""

DEFAULT_QUEUE = "jobs"
_MAGIC = b"SQLite format 3\0"
_PATIENCE = 2.0

_NAMES = """
with recursive names (name) as (
    select min(queue) from jobs union all
    select (select min(queue) from jobs where queue > name) from names where name is not null
), gates (name) as (
    select min(queue) from lamsonq_gates union all
    select (select min(queue) from lamsonq_gates where queue > name) from gates where name is not null
), rates (name) as (
    select min(queue) from lamsonq_rates union all
    select (select min(queue) from lamsonq_rates where queue > name) from rates where name is not null
)
select name from names where name is not null union select name from lamsonq_queues
union select name from gates where name is not null union select name from rates where name is not null
"""
_PLACES = {
    "ready": ("state = 'ready' and deliveries = 0", "state = 'ready' and deliveries > 0", "state = 'parked'"),
    "delayed": ("state = 'delayed'",),
    "reserved": ("state = 'reserved'",),
    "dead": ("state = 'dead'",),
    "done": ("state = 'done'",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What fsck looks at: `trouble` says why this is no job."""

    key: str
    state: str
    body: bytes
    recipients: tuple[str, ...] = ()
    trouble: str = ""


def parsed(url: str) -> tuple[str, str]:
    """The file and the queue that `sqlite:run/q.db?queue=posts` names."""
    path, _, query = url.removeprefix("sqlite:").partition("?")
    path = unquote(path[2:] if path.startswith("//") else path)
    return path, parse_qs(query).get("queue", [DEFAULT_QUEUE])[-1]


def url_of(path: str | Path, queue: str) -> str:
    """What a queue in a file is called."""
    return f"sqlite:{quote(os.fspath(path))}?queue={quote(queue, safe='')}"


def found(run: str | Path) -> list[Path]:
    """The files with queues under a directory, in order."""
    files = []
    for folder, inner, names in os.walk(run):
        if "new" in inner and "cur" in inner:
            inner[:] = []  # a maildir: its files are messages
        inner[:] = sorted(name for name in inner if not name.endswith(("-bodies", "-workers")))
        files += [Path(folder, name) for name in sorted(names) if not name.endswith(("-wal", "-shm", "-journal"))]
    return [path for path in files if is_ours(path)]


def is_ours(path: str | Path) -> bool:
    """Whether a file is a SQLite database that lamsonq has made for queues."""
    try:
        if not os.path.isfile(path):
            return False
        if os.path.isdir(f"{path}-workers"):
            return True  # also when it is damaged, which is to be told
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return False
        with closing(_connected(path)) as database:
            query = "select count(*) from sqlite_master where type = 'table' and name in ('lamsonq', 'jobs')"
            return bool(database.execute(query).fetchone()[0] == 2)
    except (OSError, sqlite3.Error):
        return False


def named(files: Iterable[str | Path]) -> list[str]:
    """The URLs of all queues in those of these files that are ours."""
    urls = []
    for path in filter(is_ours, files):
        with contextlib.suppress(Refusal):
            urls += [url_of(path, queue) for queue in Database(path).queues()]
    return urls


def _connected(path: str | Path) -> sqlite3.Connection:
    url = f"file:{quote(os.path.abspath(path))}?mode=ro"
    database = sqlite3.connect(url, uri=True, timeout=_PATIENCE, isolation_level=None)
    database.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    return database


class Database:
    """One file. All methods raise Refusal when it cannot be read."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def queues(self) -> list[str]:
        """The queues that have jobs, have ever been paused, or whose gates or limits remember some."""
        return sorted(str(name) for (name,) in self._rows(_NAMES))

    def counts(self, queue: str) -> dict[str, int]:
        """How many jobs are in each state."""
        return {
            state: sum(
                self._rows(f"select count(*) from jobs where queue = ? and {place}", queue)[0][0] for place in places
            )
            for state, places in _PLACES.items()
        }

    def oldest(self, queue: str) -> float | None:
        """When the oldest ready job was put, in seconds since the epoch."""
        query = "select min(received) from jobs where queue = ? and"
        born = [self._rows(f"{query} {place}", queue)[0][0] for place in _PLACES["ready"]]
        return min((moment for moment in born if moment is not None), default=None)

    def paused(self, queue: str) -> bool:
        rows = self._rows("select paused from lamsonq_queues where name = ?", queue)
        return bool(rows and rows[0][0])

    def rows(self, queue: str) -> Iterator[Row]:
        """Every job of a queue, in the order of the keys."""
        query = "select key, state, recipients, metadata, file, body from jobs where queue = ? order by key"
        try:
            with closing(self._open()) as database:
                for row in database.execute(query, (queue,)):
                    yield self._looked_at(row)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise self._refusal(error) from error

    def outgoing(self) -> list[Row]:
        """What settled jobs have put into other stores and is not there yet (lamsonq/backends/sqlite_outgoing.py)."""
        found = []
        for record, body in self._rows("select record, body from lamsonq_outgoing"):
            recipients: Any = ()
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
                recipients = json.loads(record)["job"]["recipients"]
            found.append(Row("", "ready", bytes(body), tuple(map(str, recipients))))
        return found

    def _looked_at(self, row: tuple[Any, ...]) -> Row:
        key, state, recipients, metadata, file, body = row
        key = key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)
        state = "ready" if state == "parked" else state
        content = body.encode("utf-8", "surrogateescape") if isinstance(body, str) else body
        try:
            if file is not None:
                content = Path(f"{self.path}-bodies", os.path.basename(file)).read_bytes()
            addresses = json.loads(recipients)
            if not isinstance(addresses, list) or not all(isinstance(address, str) for address in addresses):
                raise ValueError("`recipients` is no JSON array of texts")
            if not isinstance(json.loads(metadata), dict):
                raise ValueError("`metadata` is no JSON object")
        except OSError as error:
            return Row(key, state, b"", trouble=f"its body {file} cannot be read: {error.strerror}")
        except ValueError as error:
            return Row(key, state, content if isinstance(content, bytes) else b"", trouble=str(error))
        return Row(key, state, content if isinstance(content, bytes) else b"", tuple(addresses))

    def _open(self) -> sqlite3.Connection:
        database = _connected(self.path)
        try:
            version = database.execute("select max(version) from lamsonq").fetchone()[0]
        except (sqlite3.Error, UnicodeDecodeError):
            database.close()
            raise
        if version is not None and version > VERSION:
            database.close()
            raise Refusal(f"{self.path} was written by a newer lamsonq (schema {version}); it is left untouched")
        return database

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with closing(self._open()) as database:
                return database.execute(query, values).fetchall()
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> Refusal:
        return Refusal(
            f"cannot read {self.path}: {error}; see its owner and mode, and whether it is a queue of lamsonq"
        )
