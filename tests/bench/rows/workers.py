"""A worker with an empty handler, one process, against task queues."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

from ..contest import CPU, MEMORY, RATE, Contest, Entry, Sample, Scale, Target
from ..ledger import Ledger
from ..load import place
from ..peers import lamsonq, tasks
from ..processes import PATIENCE, cpu, memory, until

SQLITE, MAILDIR = "lamsonq, SQLite", "lamsonq, maildir"
TIMES = {tasks.HUEY: 2, tasks.TASKIQ: 3, tasks.CELERY: 12, tasks.DRAMATIQ: 30, tasks.RQ: 150}
RATE_OF_OURS = 12_000

FILL = """
import os, sys
from tests.bench.stores import Ours

os.fsync = lambda fd: None
store = Ours(sys.argv[1])
store.hasten()
for number in range(int(sys.argv[2])):
    store.push()
"""


def contests(scale: Scale) -> Iterator[Contest]:
    ours = {SQLITE: lamsonq.SQLITE, MAILDIR: lamsonq.MAILDIR}
    yield Contest(
        "A worker with an empty handler, jobs of 5 KB, 1 process",
        [
            *(Entry(name, "synced; at least once", partial(_ours, url, scale.seconds)) for name, url in ours.items()),
            *(
                Entry(each.name, each.promise, partial(_theirs, each, scale.seconds), each.missing())
                for each in tasks.LIBRARIES
            ),
        ],
        [
            *(Target(SQLITE, library.name, RATE, least=times) for library, times in TIMES.items()),
            *(Target(SQLITE, library.name, measure) for measure in (CPU, MEMORY) for library in TIMES),
        ],
        note="The queue is full before the worker starts; its first tenth warms up. CPU and memory: with the broker.",
    )


def _ours(url: str, seconds: float) -> Sample:
    with place() as folder:
        ledger = Ledger(folder)
        project = lamsonq.Project(folder, lamsonq.worker(url, ledger))
        count = int(RATE_OF_OURS * seconds)
        command = [sys.executable, "-c", FILL, url, str(count)]
        path = {"PYTHONPATH": str(lamsonq.ROOT), "PATH": ""}
        subprocess.run(command, cwd=project.folder, env=path, check=True)
        with project.started("config.behind") as program:
            return _watched(ledger, count, [program.pid], seconds)


def _theirs(library: tasks.Library, seconds: float) -> Sample:
    with place() as folder, tasks.application(library, folder) as application:
        count = max(int(library.rate * seconds), 50)
        application.put(count)
        with application.worker() as pids:
            return _watched(application.ledger, count, pids, seconds)


def _watched(ledger: Ledger, count: int, pids: Sequence[int], seconds: float) -> Sample:
    """From the first tenth on, until all are done or four times the seconds are over."""
    until(lambda: ledger.count() >= count // 10, "the first tenth handled", pause=0.001, patience=PATIENCE * 2)
    first, before, began = ledger.count(), cpu(pids), time.monotonic()
    while (last := ledger.count()) < count and time.monotonic() - began < seconds * 4:
        time.sleep(0.001)
    took, used = time.monotonic() - began, cpu(pids) - before
    done = last - first
    return {"rate": done / took, "cpu": used / done * 1000, "memory": memory(pids)}
