"""Limits per key: so many jobs of one lane at once, or begun in a second; kept by all processes together.

Rules:

1. A job takes a place in each of its lanes, one after the other in the order of the limits, before it is claimed. The
   lane of a `concurrency` has so many places, which are held until the job is settled or its worker has died; that of a
   `rate` has one, which is held until the job begins, and sets the moment at which the next may begin.
2. A job that finds a lane full is parked under it, and keeps the places that it has; whoever leaves a lane lets the
   first of those that are parked there go. As all take their places in one order, they never wait in a circle.
3. So a job is looked at once when it comes, and once for each lane that was full: what waits costs nothing.
4. A job that has all its places but comes too early for its rates waits as delayed. A clock that was put back holds a
   lane up for no longer than one interval.
5. What rule 2 cannot see (a job that was deleted, a limit that was changed) is mended by `mend`, now and then.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from lamsonq.jobs import Job, Limit

_LET_GO = """
update jobs set state = 'ready', lane = null, since = ?3 where id in
    (select id from jobs where queue = ?1 and lane = ?2 and state = 'parked' order by priority, key limit ?4)
"""
_LANES = """
with recursive lanes (lane) as (
    select min(lane) from jobs where queue = ?1 and state = 'parked'
    union all
    select (select min(lane) from jobs where queue = ?1 and state = 'parked' and lane > lanes.lane) from lanes
    where lanes.lane is not null
)
select lane from lanes where lane is not null
"""
_FORGET_RATES_AFTER = 3600.0
_AT_ONCE = 10_000


def lane_of(limit: Limit, job: Job) -> str:
    """What the places of this limit stand under, for this job."""
    return f"{_head_of(limit)}{limit.lane(job)}".encode("utf-8", "backslashreplace").decode()


def _head_of(limit: Limit) -> str:
    """What all lanes of this limit begin with."""
    return f"{'rate' if limit.concurrency is None else 'concurrency'} {limit.per} "


def admit(database: sqlite3.Connection, queue: str, number: int, job: Job, limits: Sequence[Limit], now: float) -> bool:
    """Take the job's places; False: it was parked or delayed. `number` is the id of its row."""
    rates: list[tuple[str, float]] = []
    for limit in limits:
        lane, places = lane_of(limit, job), limit.concurrency or 1
        if not _take_place(database, queue, lane, number, places):
            update = "update jobs set state = 'parked', lane = ?, due = null, since = ? where id = ?"
            database.execute(update, (lane, now, number))
            return False
        if limit.rate is not None:
            rates.append((lane, 1 / limit.rate))
    begin = max((_opens(database, queue, lane, interval, now) for lane, interval in rates), default=now)
    if begin > now:
        database.execute("update jobs set state = 'delayed', due = ?, since = ? where id = ?", (begin, now, number))
        return False
    for lane, interval in rates:
        insert = "insert into lamsonq_rates values (?, ?, ?) on conflict do update set next = excluded.next"
        database.execute(insert, (queue, lane, now + interval))
        database.execute("delete from lamsonq_lanes where queue = ? and lane = ? and job = ?", (queue, lane, number))
        let_go(database, queue, lane, now)
    return True


def _take_place(database: sqlite3.Connection, queue: str, lane: str, number: int, places: int) -> bool:
    held = database.execute("select job from lamsonq_lanes where queue = ? and lane = ?", (queue, lane)).fetchall()
    if (number,) in held:
        return True
    if len(held) >= places:
        return False
    database.execute("insert into lamsonq_lanes values (?, ?, ?)", (queue, lane, number))
    return True


def _opens(database: sqlite3.Connection, queue: str, lane: str, interval: float, now: float) -> float:
    """When the next job of this lane may begin."""
    query = "select next from lamsonq_rates where queue = ? and lane = ?"
    for [opens] in database.execute(query, (queue, lane)).fetchall():
        if opens <= now + interval:
            return float(opens)
        update = "update lamsonq_rates set next = ? where queue = ? and lane = ?"
        database.execute(update, (now + interval, queue, lane))  # the clock was put back
        return now + interval
    return now


def let_go(database: sqlite3.Connection, queue: str, lane: str, now: float, places: int = 1) -> None:
    """So many of the jobs that are parked under this lane are looked at again."""
    database.execute(_LET_GO, (queue, lane, now, places))


def leave(database: sqlite3.Connection, number: int, now: float) -> None:
    """This job gives its places up."""
    lanes = database.execute("select queue, lane from lamsonq_lanes where job = ?", (number,)).fetchall()
    if lanes:
        database.execute("delete from lamsonq_lanes where job = ?", (number,))
    for queue, lane in lanes:
        let_go(database, queue, lane, now)


def mend(database: sqlite3.Connection, queue: str, limits: Sequence[Limit], now: float) -> None:
    """Rule 5, by a process that keeps these limits, or none."""
    lost = "delete from lamsonq_lanes where queue = ? and not exists"
    gone = "(select 1 from jobs where id = job and state in ('ready', 'delayed', 'parked', 'reserved'))"
    database.execute(f"{lost} {gone}", (queue,))
    database.execute("delete from lamsonq_rates where queue = ? and next < ?", (queue, now - _FORGET_RATES_AFTER))
    for [lane] in database.execute(_LANES, (queue,)).fetchall():
        places = max((limit.concurrency or 1 for limit in limits if lane.startswith(_head_of(limit))), default=None)
        query = "select count(*) from lamsonq_lanes where queue = ? and lane = ?"
        [held] = database.execute(query, (queue, lane)).fetchone()
        if places is None or held < places:
            let_go(database, queue, lane, now, _AT_ONCE if places is None else places - held)
