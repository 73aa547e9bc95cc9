"""Accepted durably, larger messages, against Postfix."""

from __future__ import annotations

from collections.abc import Iterator

from ..contest import CPU, RATE, Contest, Scale, Target
from ..load import Load
from .spool import MAILDIR, POSTFIX, SQLITE, contest


def contests(scale: Scale) -> Iterator[Contest]:
    yield contest(scale, Load(size=100_000), _targets(1.2))
    yield contest(scale, Load(size=1_000_000), _targets(0.9))


def _targets(times: float) -> list[Target]:
    rates = [Target(ours, POSTFIX, RATE, least=times) for ours in (SQLITE, MAILDIR)]
    return [*rates, *(Target(ours, POSTFIX, CPU) for ours in (SQLITE, MAILDIR))]
