"""From the 250 to the handler's first line in another process, on an idle machine; and what an idle server costs."""

from __future__ import annotations

import smtplib
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import partial

from ..contest import Contest, Entry, Measure, Sample, Scale, Target
from ..ledger import Ledger
from ..load import place
from ..peers import lamsonq, salmon, tasks
from ..processes import cpu, until, wakeups
from .job import Works

P50 = Measure("p50", "median ms", ",.2f")
P99 = Measure("p99", "99 % ms", ",.2f")
WAKEUPS = Measure("wakeups", "wake-ups per second, idle", ",.1f")
IDLE = Measure("idle", "CPU ms per second, idle", ",.1f")

SQLITE, MAILDIR, SALMON = "lamsonq, SQLite", "lamsonq, maildir", "Salmon, which looks every 10 s"
PAUSE = 0.05
"""Seconds between two messages, in which everything goes to sleep again."""

MESSAGE = "From: sender@example.org\r\nTo: desk@example.com\r\nSubject: latency\r\n\r\nhello\r\n"


def contests(scale: Scale) -> Iterator[Contest]:
    count, few = (100, 2) if scale.full else (50, 1)
    idle = max(scale.seconds * 2, 5)
    urls = {SQLITE: lamsonq.SQLITE, MAILDIR: lamsonq.MAILDIR}
    ours = {name: partial(lamsonq.working, url=url) for name, url in urls.items()}
    theirs = (tasks.HUEY, tasks.CELERY)
    yield Contest(
        "From the 250 to the handler in another process",
        [
            *(Entry(name, "", partial(_mail, start, count, idle)) for name, start in ours.items()),
            Entry(SALMON, "", partial(_mail, partial(salmon.working, sleep=10), few, max(idle, 10)), salmon.missing()),
            *(Entry(each.name, "", partial(_task, each, count, idle), each.missing()) for each in theirs),
        ],
        [
            *(Target(name, None, P50, most=1) for name in ours),
            *(Target(name, None, P99, most=10) for name in ours),
            *(Target(name, None, WAKEUPS, most=0.2) for name in ours),
            *(Target(SQLITE, peer, P50) for peer in (SALMON, *(each.name for each in theirs))),
        ],
        measures=(P50, P99, WAKEUPS, IDLE),
        note=f"{count} messages, one at a time, {few} for Salmon. Less than 0: it began before the 250 had come."
        " Idle: all processes together.",
    )


def _mail(start: Works, count: int, idle: float) -> Sample:
    with place() as folder, start(folder) as servers:
        said = []
        with smtplib.SMTP("127.0.0.1", servers.port) as client:
            for number in range(count + 1):
                client.sendmail("sender@example.org", [f"{number}desk@example.com"], MESSAGE)
                said.append(time.monotonic_ns() / 1e9)
                servers.ledger.wait(number + 1)
                time.sleep(PAUSE)
        return _sample(said, servers.ledger) | _rest(servers.pids, idle)


def _task(library: tasks.Library, count: int, idle: float) -> Sample:
    with place() as folder, tasks.application(library, folder) as application, application.worker() as pids:
        command = [*application.putting(), str(count + 1), "tell"]
        said = []
        with subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as producer:
            assert producer.stdin is not None
            assert producer.stdout is not None
            for number in range(count + 1):
                said.append(int(producer.stdout.readline()) / 1e9)
                application.ledger.wait(number + 1)
                time.sleep(PAUSE)
                producer.stdin.write("\n")
        return _sample(said, application.ledger) | _rest(pids, idle)


def _sample(said: Sequence[float], ledger: Ledger) -> Sample:
    """Without the first, which waited for the worker to start."""
    until(lambda: ledger.count() == len(said), "all handled")
    waited = sorted((began - at) * 1000 for at, began in list(zip(said, ledger.times(), strict=True))[1:])
    return {"p50": statistics.median(waited), "p99": waited[min(len(waited) - 1, len(waited) * 99 // 100)]}


def _rest(pids: Sequence[int], seconds: float) -> Sample:
    """What happens while nothing happens."""
    time.sleep(5)  # what came last has been told to everybody by then
    before, used = wakeups(pids), cpu(pids)
    time.sleep(seconds)
    return {"wakeups": (wakeups(pids) - before) / seconds, "idle": (cpu(pids) - used) / seconds * 1000}
