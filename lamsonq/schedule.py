"""When a periodic function is to run: the five fields of crontab(5), in local time.

Rules: a moment is named by its seconds since the epoch, so two processes that reckon it mean the same one. A moment
that was missed by less than LOOK_BACK, because nothing ran just then, is made up for; an older one is not. Who was
there, but late, makes up for the last one since its last look, unless that was so long ago that the clock was set or
the machine slept. Days on which the clock is changed are treated as Debian's cron does: what would be skipped runs,
what comes twice runs once.
"""

from __future__ import annotations

import functools
import os
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from lamsonq.clock import CORRECTION

LOOK_BACK = 60.0
"""Seconds for which a moment may be late: a server that restarts in that moment misses nothing."""


def check(schedule: str) -> None:
    """Raises ValueError, with what is wrong, for what is no schedule."""
    try:
        next(CronSim(schedule, datetime.now(UTC)))
    except (CronSimError, StopIteration) as error:
        raise ValueError(
            f"@periodic({schedule!r}): {error or 'no such day ever comes'}; it has minute, hour, day, month and"
            ' weekday, as in "*/5 * * * *"'
        ) from error


def next_after(schedule: str, moment: float) -> float:
    """The first moment of the schedule behind this one, in seconds since the epoch."""
    return _next(schedule, int(moment))


@functools.lru_cache(maxsize=1024)
def _next(schedule: str, second: int) -> float:
    return next(CronSim(schedule, datetime.fromtimestamp(second, _local_zone()))).timestamp()


@functools.cache
def _local_zone() -> tzinfo:
    """The zone with its rules, not only with today's offset."""
    try:
        if name := os.environ.get("TZ", "").lstrip(":"):
            return ZoneInfo(name)
        with open("/etc/localtime", "rb") as file:
            return ZoneInfo.from_file(file)
    except (OSError, ValueError):  # a zone by another notation, or none: what the C library makes of it
        return datetime.now().astimezone().tzinfo or UTC


def latest(schedule: str, since: float, now: float) -> float | None:
    """The last moment that has come since then, or within LOOK_BACK; None when there is none."""
    if since < now - CORRECTION:  # a machine whose clock begins in 1970 would count the minutes of all the years
        since = now
    found, at = None, next_after(schedule, min(since, now - LOOK_BACK))
    while at <= now:
        found, at = at, next_after(schedule, at)
    return found
