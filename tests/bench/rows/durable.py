"""Accepted durably, against what else keeps what it has taken: aiosmtpd with a synced maildir, Haraka, Salmon."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..contest import CPU, RATE, Contest, Entry, Scale, Target
from ..load import Load, Start, accepted
from ..peers import aiosmtpd, haraka, lamsonq, salmon
from .spool import MAILDIR, SQLITE, SYNCED

STOCK, HARAKA, SALMON = "aiosmtpd, a synced maildir", "Haraka's queue", "Salmon's queue"


def contests(scale: Scale) -> Iterator[Contest]:
    load = Load()

    def entry(name: str, promise: str, start: Start, missing: str | None = None) -> Entry:
        return Entry(name, promise, partial(accepted, start, load, scale.seconds), missing)

    yield Contest(
        f"Accepted durably, other peers: {load.named()}",
        [
            entry(SQLITE, "committed, synced", lamsonq.sqlite),
            entry(MAILDIR, SYNCED, lamsonq.maildir),
            entry(STOCK, SYNCED, aiosmtpd.maildir, aiosmtpd.missing()),
            entry(HARAKA, "file synced", haraka.durable, haraka.missing()),
            entry(SALMON, "file synced", salmon.durable, salmon.missing()),
        ],
        [Target(SQLITE, peer, RATE, least=4) for peer in (STOCK, HARAKA, SALMON)]
        + [Target(SQLITE, peer, CPU) for peer in (STOCK, HARAKA, SALMON)],
    )
