"""The whole main job: SMTP, route, state function with its state in SQLite, push, 250; a handler in another process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from ..contest import CPU, RATE, Contest, Entry, Sample, Scale, Target
from ..load import MOST, Load, place
from ..peers import lamsonq, salmon
from ..peers.lamsonq import Working
from ..processes import cpu, memory

SQLITE, MAILDIR, SALMON = "lamsonq, SQLite", "lamsonq, maildir", "Salmon, maildir"
LOAD = Load(numbered=True)

Works = Callable[[Path], AbstractContextManager[Working]]


def contests(scale: Scale) -> Iterator[Contest]:
    yield Contest(
        f"From the client to the handler behind the queue: {LOAD.named()}",
        [
            Entry(
                SQLITE,
                "at least once, synced",
                partial(measured, partial(lamsonq.working, url=lamsonq.SQLITE), scale.seconds),
            ),
            Entry(
                MAILDIR,
                "at least once, synced",
                partial(measured, partial(lamsonq.working, url=lamsonq.MAILDIR), scale.seconds),
            ),
            Entry(
                SALMON,
                "at most once, file synced",
                partial(measured, partial(salmon.working, sleep=0.1), scale.seconds),
                salmon.missing(),
            ),
        ],
        [
            Target(SQLITE, SALMON, RATE, least=35),
            Target(MAILDIR, SALMON, RATE, least=12),
            Target(SQLITE, SALMON, CPU),
            Target(MAILDIR, SALMON, CPU),
        ],
        note="Until the last message is handled. Salmon looks into its queue every 0.1 s here, not every 10 s.",
    )


def measured(start: Works, seconds: float) -> Sample:
    with place() as folder, start(folder) as servers:
        few, least = 40, int(400 * seconds)  # a queue that only works while it is short is not fast
        through(servers, few)
        count = max(min(int(few * 2 / through(servers, few * 2) * seconds), MOST), least)
        before = cpu(servers.pids)
        took = through(servers, count)
        used = cpu(servers.pids) - before
        return {"rate": count / took, "cpu": used / count * 1000, "memory": memory(servers.pids)}


def through(servers: Working, count: int) -> float:
    """Seconds until so many messages are sent and handled."""
    wanted = servers.ledger.count() + count
    began = time.perf_counter()
    LOAD.send(servers.port, count)
    servers.ledger.wait(wanted)
    return time.perf_counter() - began
