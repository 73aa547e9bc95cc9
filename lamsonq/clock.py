"""The clock by which jobs are due, expire and age: seconds since the epoch. Tests put another in its place.

Claims never ask it: whether a worker lives is told by the kernel, so a clock that jumps breaks none. Time-outs run by
the monotonic clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CORRECTION = 3 * 3600.0
"""A clock that jumps by more seconds has been set, not merely put right; as Debian's cron has it."""

_source: Callable[[], float] = time.time


def now() -> float:
    """Seconds since the epoch."""
    return _source()


@contextmanager
def replaced(source: Callable[[], float]) -> Iterator[None]:
    """Within the block, `source` tells the time, in all threads of this process."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before
