"""Draining costs the same per message however many wait."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from functools import partial

from ..contest import CPU, Contest, Entry, Measure, Sample, Scale, Target
from .queues import measured

TAKE = Measure("take", "claim and settle per second", ",.0f")
FEW, MANY, MILLION = 1_000, 30_000, 1_000_000


def contests(scale: Scale) -> Iterator[Contest]:
    yield _contest(MANY)
    if scale.full:
        yield _contest(MILLION, rounds=1)


def _contest(many: int, rounds: int | None = None) -> Contest:
    kinds, sizes = ("Maildir", "SQLite"), (FEW, many)
    return Contest(
        f"A drain with {FEW:,} and with {many:,} waiting",
        [Entry(_name(kind, size), "", partial(_drained, kind, size)) for kind in kinds for size in sizes],
        [
            *(Target(_name(kind, many), _name(kind, FEW), TAKE, least=0.8) for kind in kinds),
            *(Target(_name(kind, many), _name(kind, FEW), CPU, most=1.25) for kind in kinds),
        ],
        measures=[TAKE, CPU],
        rounds=rounds,
    )


def _name(kind: str, size: int) -> str:
    return f"{kind}, {size:,} waiting"


def _drained(kind: str, size: int) -> Sample:
    """The whole queue, or what goes at 5,000 a second; small ones several times, as they are soon done."""
    seconds = max(1.0, size / 5_000)
    samples = [measured(sys.executable, kind, size, seconds, 1) for _ in range(3 if size == FEW else 1)]
    return {key: statistics.median(sample[key] for sample in samples) for key in ("take", "cpu")}
