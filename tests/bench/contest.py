"""What is compared: entries that do the same work, in turn within each round, and the ratios of ours to theirs.

A ratio is taken within a round, where both had the same machine; what is told is the median of the rounds' ratios.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

Sample = dict[str, float]
"""What one entry did in one round: the key of a measure -> its figure."""


@dataclass(frozen=True)
class Scale:
    """How much is measured: a few minutes for everything together, or (BENCH=full) what figures are published from."""

    full: bool
    rounds: int
    seconds: float
    """How long one measurement takes, about."""


SHORT = Scale(full=False, rounds=3, seconds=1.0)
FULL = Scale(full=True, rounds=5, seconds=3.0)


@dataclass(frozen=True)
class Measure:
    """`text` is how a figure is written: a format specification."""

    key: str
    heading: str
    text: str


RATE = Measure("rate", "per second", ",.0f")
CPU = Measure("cpu", "CPU s per 1000", ".2f")
MEMORY = Measure("memory", "memory MB", ".0f")
"""Resident, what processes share counted once."""


@dataclass(frozen=True)
class Entry:
    """`promise` is what holds when it says that it is done. `missing` says why it cannot be measured here."""

    name: str
    promise: str
    measure: Callable[[], Sample]
    missing: str | None = None


@dataclass(frozen=True)
class Target:
    """How ours compares with a peer in one measure: at least or at most so many times as much. Without a peer it is
    the figure itself."""

    ours: str
    peer: str | None
    measure: Measure
    least: float | None = None
    most: float | None = None

    def wanted(self) -> str:
        if self.least is not None:
            return f"≥ {self.least:g}"
        return f"≤ {self.most:g}" if self.most is not None else ""

    def is_met(self, figure: float) -> bool:
        return (self.least is None or figure >= self.least) and (self.most is None or figure <= self.most)


@dataclass
class Contest:
    title: str
    entries: Sequence[Entry]
    targets: Sequence[Target] = ()
    measures: Sequence[Measure] = (RATE, CPU, MEMORY)
    note: str = ""
    rounds: int | None = None
    """Fewer than the scale's, for what takes very long."""


@dataclass
class Result:
    """The samples of each entry, one a round; an entry that failed has none, and its reason among the `absent`."""

    contest: Contest
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def figures(self, name: str, measure: Measure) -> list[float]:
        return [sample[measure.key] for sample in self.samples.get(name, ()) if measure.key in sample]

    def ratios(self, target: Target) -> list[float]:
        """Of each round in which both were measured."""
        ours = self.figures(target.ours, target.measure)
        if target.peer is None:
            return ours
        return [a / b for a, b in zip(ours, self.figures(target.peer, target.measure), strict=False) if b]


def hold(contest: Contest, rounds: int) -> Result:
    """Measure every entry once a round, in turn. One that fails is left out from then on, with its reason."""
    result = Result(contest)
    result.absent.update({entry.name: entry.missing for entry in contest.entries if entry.missing})
    rounds = contest.rounds or rounds
    for number in range(rounds):
        for entry in contest.entries:
            if entry.name in result.absent:
                continue
            began = time.monotonic()
            try:
                sample = entry.measure()
            except Exception as error:  # a peer, or a program around it: the others are measured all the same
                told = f"{type(error).__name__}: {error}"
                result.absent[entry.name] = f"it failed: {told.splitlines()[0]}"
                result.samples.pop(entry.name, None)
            else:
                result.samples.setdefault(entry.name, []).append(sample)
                told = ", ".join(f"{key} {figure:,.2f}" for key, figure in sample.items())
            place = f"{contest.title} {number + 1}/{rounds} {entry.name}"
            load = os.getloadavg()[0]
            print(f"{place}: {told} ({time.monotonic() - began:.1f} s, load {load:.1f})", file=sys.stderr, flush=True)
    return result


def markdown(result: Result) -> Iterator[str]:
    """The table of a result, the table of its ratios, and who was left out, in lines."""
    contest = result.contest
    yield f"### {contest.title}"
    if contest.note:
        yield from ("", contest.note)
    present = [entry for entry in contest.entries if entry.name in result.samples]
    measures = [m for m in contest.measures if any(result.figures(entry.name, m) for entry in present)]
    yield ""
    promises = ["when it says done"] if any(entry.promise for entry in present) else []
    yield from _table(
        ["", *promises, *(measure.heading for measure in measures)],
        [
            [
                e.name,
                *([e.promise] if promises else []),
                *(_spread(result.figures(e.name, m), m.text) for m in measures),
            ]
            for e in present
        ],
    )
    rows = [
        [_named(target), _spread(ratios, _digits(target)), target.wanted(), _verdict(target, ratios)]
        for target in contest.targets
        if (ratios := result.ratios(target))
    ]
    if rows:
        yield ""
        yield from _table(["ratio", "median (least..most)", "target", ""], rows)
    for name, reason in result.absent.items():
        yield from ("", f"Left out: {name}; {reason}.")
    yield ""


def _named(target: Target) -> str:
    against = f" / {target.peer}" if target.peer is not None else ""
    return f"{target.measure.heading}: {target.ours}{against}"


def _digits(target: Target) -> str:
    return target.measure.text if target.peer is None else ".2f"


def _verdict(target: Target, ratios: list[float]) -> str:
    if target.least is None and target.most is None:
        return ""
    return "met" if target.is_met(statistics.median(ratios)) else "missed"


def _spread(figures: list[float], text: str) -> str:
    if not figures:
        return ""
    middle, least, most = statistics.median(figures), min(figures), max(figures)
    return f"{middle:{text}} ({least:{text}}..{most:{text}})" if len(figures) > 1 else f"{middle:{text}}"


def _table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
