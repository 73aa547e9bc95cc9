"""What is measured: each module yields its contests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..contest import Contest, Scale
from . import drain, durable, engine, job, latency, matching, memory, queues, sizes, spool, workers

ROWS: dict[str, Callable[[Scale], Iterator[Contest]]] = {
    "engine": engine.contests,
    "spool": spool.contests,
    "sizes": sizes.contests,
    "durable": durable.contests,
    "job": job.contests,
    "queues": queues.contests,
    "drain": drain.contests,
    "workers": workers.contests,
    "latency": latency.contests,
    "matching": matching.contests,
    "memory": memory.contests,
}
"""In the order of the page that tells the figures."""
