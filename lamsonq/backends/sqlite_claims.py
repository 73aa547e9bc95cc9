"""Which jobs are claimed: the one transaction of `reserve`.

Rules:

1. Jobs come by priority, then by key; what is due is made ready before. A batch looks at a bounded number of rows.
2. A job whose worker died runs with no other such job of this queue beside it in this process, and at its last chance
   with no other at all: of the jobs of one queue, what is buried for killing its worker has done so alone. Such jobs
   stand in an index of their own, so that many of them slow nobody down.
3. What a tool claims by its key has a token that tells where it was, `<worker>/<number>:<state>.<row>`, and keeps its
   due moment: if the tool dies, it goes back as it was.
4. Nothing here changes the worker's own memory: the transaction may fail, or run in another thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamsonq.backends.sqlite_lanes import admit
from lamsonq.backends.sqlite_rows import COLUMNS, COUNT_MAX, bound, job_of
from lamsonq.jobs import DELIVERIES_MAX, STATES, Limit

LOOKS = 500
"""How many rows one transaction changes at most, besides those that it claims."""

_HEAD = """
select exists (select 1 from lamsonq_queues where name = ?1 and paused),
       exists (select 1 from jobs where queue = ?1 and state = 'delayed' and due <= ?2)
           or exists (select 1 from jobs where queue = ?1 and state = 'delayed' and due is null),
       exists (select 1 from jobs where queue = ?1 and state = 'ready' and deliveries > 0)
"""
_DUE = """
update jobs set state = 'ready', due = null, since = ?2 where id in
    (select id from jobs where queue = ?1 and state = 'delayed' and due <= ?2 order by due, key limit ?3)
    or id in (select id from jobs where queue = ?1 and state = 'delayed' and due is null limit ?3)
"""
_TOO_EARLY = "update jobs set state = 'delayed', since = ? where id = ?"
_CLAIM = f"""
update jobs set state = 'reserved', token = ?, deliveries = min(deliveries, {COUNT_MAX}) + 1, since = ?, due = null,
    lane = null where id = ?
"""
_TAKE = "update jobs set state = 'reserved', token = ?, since = ?, lane = null where id = ?"
# Nothing here is `returning`: for that SQLite makes a table in memory at each statement.
_SELECT = f"select {COLUMNS}, body, file from jobs where queue = ?"
_ORDER = "order by priority, key limit ?"
_FRESH = f"{_SELECT} and state = 'ready' and deliveries = 0"
_SUSPECT = f"{_SELECT} and state = 'ready' and deliveries > 0"
_ONE = f"select {COLUMNS}, body, file, state from jobs where queue = ? and key = ? and state != 'reserved'"
KEY, DUE, PRIORITY, DELIVERIES, ATTEMPTS, BODY, FILE, STATE = 1, 7, 9, 11, 12, 14, 15, 16


@dataclass(slots=True)
class Asked:
    """What a `reserve` asks for, and what this worker has at the moment."""

    queue: str
    n: int
    only: Collection[str] | None
    now: float
    token: Callable[[int], str]
    """The token of a new claim of this row."""
    has_jobs: bool
    has_suspect: bool
    limits: Sequence[Limit]


@dataclass(slots=True)
class Claimed:
    """What came of it: the row (its COLUMNS, BODY and FILE) and the token of each job, in order."""

    jobs: list[tuple[tuple[Any, ...], str]] = field(default_factory=list)
    suspect: str = ""
    """The token of the one whose worker died."""
    quiet: bool = False
    """One at its last chance has been claimed, or is to be as soon as this worker has no other."""
    passed_over: bool = False
    """A suspect waits until another is settled."""
    more: bool = False
    """There may be more, that this transaction did not look at."""


def take(database: sqlite3.Connection, asked: Asked) -> Claimed:
    """Claim up to n jobs."""
    found = Claimed()
    [(paused, due, suspects)] = database.execute(_HEAD, (asked.queue, asked.now)).fetchall()
    if paused:
        return found
    if due:
        database.execute(_DUE, (asked.queue, asked.now, LOOKS))
    looks = LOOKS
    while len(found.jobs) < asked.n and not found.quiet:
        rows = _candidates(database, asked, asked.n - len(found.jobs), suspects=bool(due or suspects))
        if not rows:
            break
        before, passed_over = len(found.jobs), 0
        for row in rows:
            if row[DELIVERIES] and not _may_run(row, asked, found):
                passed_over += 1
            else:
                looks -= not _look_at(database, asked, found, row)
            if found.quiet or len(found.jobs) >= asked.n:
                break
        if looks <= 0:
            found.more = True
            break
        if len(found.jobs) == before and passed_over == len(rows):
            break
    return found


def _may_run(row: tuple[Any, ...], asked: Asked, found: Claimed) -> bool:
    """Rule 2, for a job whose worker died."""
    last_chance = row[DELIVERIES] >= DELIVERIES_MAX - 1
    if asked.has_suspect or found.suspect:
        found.passed_over = True
        return False
    if last_chance and (asked.has_jobs or found.jobs):
        found.quiet = True
        return False
    return True


def _look_at(database: sqlite3.Connection, asked: Asked, found: Claimed, row: tuple[Any, ...]) -> bool:
    """Claim this job, if it may begin; else it no longer stands among the ready ones."""
    if row[DUE] is not None and row[DUE] > asked.now:  # another program has put it, and knows no states
        database.execute(_TOO_EARLY, (asked.now, row[0]))
        return False
    if asked.limits and not _admitted(database, asked, row):
        return False
    token = asked.token(row[0])
    database.execute(_CLAIM, (token, asked.now, row[0]))
    found.jobs.append((row, token))
    if row[DELIVERIES]:
        found.suspect = token
        found.quiet = row[DELIVERIES] >= DELIVERIES_MAX - 1
    return True


def _admitted(database: sqlite3.Connection, asked: Asked, row: tuple[Any, ...]) -> bool:
    try:
        job = job_of(row, b"")
    except ValueError:  # it will be buried
        return True
    return admit(database, asked.queue, row[0], job, asked.limits, asked.now)


def _candidates(database: sqlite3.Connection, asked: Asked, n: int, *, suspects: bool) -> list[tuple[Any, ...]]:
    """The next jobs that nobody died of, and the next one that somebody did; it may have to wait, so it is one more."""
    rows = _ready(database, asked, _FRESH, n)
    suspect = _ready(database, asked, _SUSPECT, 1) if suspects else []
    return sorted([*rows, *suspect], key=_order) if suspect else rows


def _ready(database: sqlite3.Connection, asked: Asked, select: str, n: int) -> list[tuple[Any, ...]]:
    if asked.only is None:
        return database.execute(f"{select} {_ORDER}", (asked.queue, n)).fetchall()
    rows: list[tuple[Any, ...]] = []
    for target in asked.only:
        rows += database.execute(f"{select} and target = ? {_ORDER}", (asked.queue, bound(target), n)).fetchall()
    return sorted(rows, key=_order)[:n]


def _order(row: tuple[Any, ...]) -> tuple[int, int, Any]:
    """As SQLite has them: another program may have put a number as a key."""
    key = row[KEY]
    return row[PRIORITY], 0 if isinstance(key, int | float) else 2 if isinstance(key, bytes) else 1, key


def claim_one(database: sqlite3.Connection, queue: str, key: str, token: Callable[[int], str], now: float) -> Claimed:
    """Claim this one job, uncounted (rule 3)."""
    found = Claimed()
    for row in database.execute(_ONE, (queue, bound(key))).fetchall():
        claim = _taken(token(row[0]), "ready" if row[STATE] == "parked" else row[STATE])
        values = (claim, now, row[0])
        try:
            database.execute(_TAKE, values)
        except sqlite3.IntegrityError:  # while it lay dead or done, another like it has come
            database.execute("update jobs set uniq = null where id = ?", (row[0],))
            database.execute(_TAKE, values)
        found.jobs.append((row, claim))
    return found


def _taken(token: str, state: str) -> str:
    head, _, number = token.rpartition(".")
    return f"{head}:{state}.{number}"


def taken_from(token: str) -> str:
    """The state from which a tool has claimed a job; "" where a worker has, or another program wrote what is none."""
    state = token.rpartition(".")[0].rpartition("/")[2].partition(":")[2]
    return state if state in STATES and state != "reserved" else ""


def is_paused(database: sqlite3.Connection, queue: str) -> bool:
    """Whether nothing may be claimed."""
    found = database.execute("select paused from lamsonq_queues where name = ?", (queue,)).fetchall()
    return bool(found and found[0][0])
