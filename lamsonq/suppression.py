"""Addresses that get nothing any more, because mail to them has bounced or their owner wants none.

Rules:

1. One SQLite file for all processes; a relay asks it before it sends.
2. An address counts without its case and its needless quotes, as routes see it.
3. Hard is for good: the address does not exist (RFC 3463, 5.1.x), or somebody has said so. Soft is for a time.
4. Who learns from bounces believes only what names its recipient by a proof (`VERP`), or everything, if he says so:
   a bounce can be forged (lamsonq.bounce, rule 4).
5. Each call opens the file and closes it: no connection is open at a fork.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamsonq import clock
from lamsonq.address import canonical, is_path_address
from lamsonq.errors import QueueError
from lamsonq.statuscodes import Status

if TYPE_CHECKING:
    from lamsonq.mail import MailRequest
    from lamsonq.verp import VERP

SOFT_SECONDS = 3 * 24 * 3600.0
"""How long a soft bounce suppresses an address."""

REASON_MAX = 500
_SCHEMA = """create table if not exists suppressed (
    address text primary key, reason text not null, since real not null, expires real
) without rowid"""
_VERSION = 1
_LIVE = "(expires is null or expires > ?)"


@dataclass(frozen=True, slots=True)
class Suppressed:
    """One address: why, since when and until when, in seconds since the epoch; `expires` None is for good."""

    address: str
    reason: str
    since: float
    expires: float | None = None


class Suppressions:
    """The store in the file `path`, which the first addition makes. All methods raise QueueError where the file cannot
    be used."""

    def __init__(self, path: str | os.PathLike[str] = "run/suppressed.db") -> None:
        self.path = Path(path)

    def add(self, address: str, reason: str, seconds: float | None = None) -> None:
        """Suppress an address, for so many seconds (None: for good). What is for good is not shortened.

        Raises ValueError for what is no address.
        """
        if not is_path_address(address):
            raise ValueError(f"{address!r} is no address")
        now = clock.now()
        reason = "".join(c if c.isprintable() else " " for c in " ".join(reason.split()))[:REASON_MAX]
        with self._database() as database:
            database.execute(
                "insert into suppressed values (?, ?, ?, ?) on conflict do update set reason = excluded.reason, "
                "since = excluded.since, expires = excluded.expires where suppressed.expires is not null",
                (canonical(address), reason, now, None if seconds is None else now + seconds),
            )

    def remove(self, address: str) -> bool:
        """Let an address get mail again; False when it could already."""
        if not self.path.exists():
            return False
        with self._database() as database:
            return database.execute("delete from suppressed where address = ?", (canonical(address),)).rowcount > 0

    def among(self, addresses: Iterable[str]) -> dict[str, str]:
        """Which of these addresses are suppressed, as they were given, and why."""
        asked = list(addresses)
        if not asked or not self.path.exists():
            return {}
        sql = f"select reason from suppressed where address = ? and {_LIVE}"
        with self._database() as database:
            rows = [(a, database.execute(sql, (canonical(a), clock.now())).fetchone()) for a in asked]
        return {address: str(row[0]) for address, row in rows if row is not None}

    def all(self) -> list[Suppressed]:
        """What is suppressed now, in the order of the addresses."""
        if not self.path.exists():
            return []
        with self._database() as database:
            rows = database.execute(
                f"select address, reason, since, expires from suppressed where {_LIVE} order by address", (clock.now(),)
            ).fetchall()
        return [Suppressed(*row) for row in rows]

    def purge(self) -> int:
        """Delete what is over; how many."""
        if not self.path.exists():
            return 0
        with self._database() as database:
            return database.execute(f"delete from suppressed where not {_LIVE}", (clock.now(),)).rowcount

    def learn(self, message: MailRequest, verp: VERP | None, soft_seconds: float = SOFT_SECONDS) -> list[str]:
        """Suppress whom a bounce tells of; the addresses, [] when it is none.

        With `verp` those that it proves, with None everybody whom the report names. For good where the address does not
        exist (5.1.x), else for `soft_seconds`; a delay or a success suppresses nobody.
        """
        if not message.is_bounce() or message.bounce is None:
            return []
        told = [
            recipient for recipient in message.bounce.recipients if recipient.failed and recipient.action != "delayed"
        ]
        proven = [verp.bounced(message)] if verp is not None else [recipient.address for recipient in told]
        learned = []
        for address in filter(None, proven):
            found = next((r for r in told if canonical(address) in (r.address, r.final, r.original)), None)
            if found is None and len(told) == 1:
                found = told[0]  # forwarded: the report names where it was forwarded to
            if found is None or not is_path_address(address):
                continue
            reason = found.diagnostic or str(found.status or "") or "bounced"
            self.add(address, reason, None if found.permanent and _is_unknown(found.status) else soft_seconds)
            learned.append(address)
        return learned

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction on the file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self.path.exists():
                self.path.touch(mode=0o600)  # whom somebody writes to is nobody else's business
            database = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            try:
                self._check(database)
                database.execute("begin")
                yield database
                database.execute("commit")
            finally:
                database.close()
        except (sqlite3.Error, OSError) as error:
            raise QueueError(f"the suppressed addresses in {self.path} cannot be used: {error}") from error

    def _check(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("pragma user_version").fetchone()
        if version > _VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}, this lamsonq knows {_VERSION}")
        if version < _VERSION:
            database.execute(_SCHEMA)
            database.execute(f"pragma user_version = {_VERSION}")

    def __repr__(self) -> str:
        return f"<Suppressions {self.path}>"


def _is_unknown(status: Status | None) -> bool:
    """Whether the address itself is what was refused: 5.1.x, but for what is wrong with the sender's (5.1.7, 5.1.8)."""
    return status is not None and (status.primary, status.subject) == (5, 1) and status.detail in (0, 1, 2, 3, 6, 10)
