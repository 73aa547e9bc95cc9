"""Queues: push, and claim and settle, against the same system calls in a loop and against other libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from ..contest import CPU, Contest, Entry, Measure, Sample, Scale, Target
from ..installed import python
from ..load import place
from ..peers.lamsonq import ROOT

PUSH = Measure("push", "push per second", ",.0f")
PUSH_TWO = Measure("push2", "push, 2 processes", ",.0f")
TAKE = Measure("take", "claim and settle per second", ",.0f")
TAKE_TWO = Measure("take2", "claim and settle, 2 processes", ",.0f")
MEASURES = (PUSH, PUSH_TWO, TAKE, TAKE_TWO)

OURS = {"memory": "Memory", "maildir": "Maildir", "SQLite": "SQLite"}
PEERS = {  # name -> kind, promise, processes that may take from it
    "huey, SQLite": ("HueySQLite", "synced; at most once", 2),
    "litequeue": ("Litequeue", "synced; a taken job stays so", 2),
    "persist-queue, SQLite": ("PersistSQLite", "synced; acknowledged", 1),  # two takers get the same jobs
    "persist-queue, files": ("PersistFile", "synced; at least once", 1),
    "huey, files": ("HueyFile", "not synced; at most once", 2),
    "Salmon": ("Salmon", "file synced; at most once", 1),  # with two, it raises FileNotFoundError
}
AGAINST = {
    "SQLite": ("huey, SQLite", "litequeue", "persist-queue, SQLite"),
    "maildir": ("persist-queue, files", "huey, files", "Salmon"),
}


def contests(scale: Scale) -> Iterator[Contest]:
    size = 10_000 if scale.full else 3_000
    absent = None if python() else "PyPI's packages cannot be installed"

    def entry(name: str, kind: str, promise: str, processes: int, *, interpreter: str, missing: str | None) -> Entry:
        return Entry(name, promise, partial(_both, interpreter, kind, size, scale.seconds, processes), missing)

    def raw(name: str, kind: str) -> Entry:
        return entry(name, kind, "synced", 2, interpreter=sys.executable, missing=None)

    ours = {name: f"lamsonq, {name}" for name in OURS}
    promises = {"memory": "nothing is kept"}
    yield Contest(
        f"Queues: {size:,} jobs of 5 KB",
        [
            *(
                entry(
                    ours[name],
                    kind,
                    promises.get(name, "synced; at least once"),
                    1 if name == "memory" else 2,
                    interpreter=sys.executable,
                    missing=None,
                )
                for name, kind in OURS.items()
            ),
            raw("raw maildir calls", "RawMaildir"),
            raw("raw SQLite statements", "RawSQLite"),
            *(entry(name, *facts, interpreter=python() or "", missing=absent) for name, facts in PEERS.items()),
        ],
        [
            *(Target(ours["maildir"], "raw maildir calls", measure, least=0.7) for measure in MEASURES),
            *(Target(ours["SQLite"], "raw SQLite statements", measure, least=0.7) for measure in MEASURES),
            *(
                Target(ours[name], peer, measure, least=1)
                for name, peers in AGAINST.items()
                for peer in peers
                for measure in MEASURES
            ),
        ],
        measures=(*MEASURES, CPU),
        note="One job at a time is put, and taken and settled.",
    )


def _both(interpreter: str, kind: str, size: int, seconds: float, processes: int) -> Sample:
    one = measured(interpreter, kind, size, seconds, 1)
    sample = {key: one[key] for key in ("push", "take", "cpu")}
    if processes > 1:
        two = measured(interpreter, kind, size, seconds, 2)
        sample |= {"push2": two["push"], "take2": two["take"]}
    return sample


def measured(interpreter: str, kind: str, size: int, seconds: float, processes: int) -> Sample:
    """In a process of its own, so that no measurement leaves anything to the next."""
    with place() as folder:
        words = [kind, str(folder), str(size), str(seconds), str(processes)]
        command = [interpreter, "-m", "tests.bench.stores", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    sample: Sample = json.loads(done.stdout)
    return sample
