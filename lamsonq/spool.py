"""What a receiver keeps before it answers: messages on their way into one queue, many in one put.

Rules:

1. A message that comes alone is put at once. Those that come while others are being put go together in the next put,
   and share its syncs: the busier it is, the fewer there are for each, and nobody waits for company.
2. A put that fails is tried with each message alone: one that cannot be kept takes no other with it.
3. One thread does it: several would share what waits among them, so that each had more syncs for fewer messages, and
   they would wake each other. Measured, eight threads for a maildir did 0.65 to 0.8 of what one does, and took 1.3 to
   1.9 times the processor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from lamsonq.jobs import Job
from lamsonq.queue import Queue
from lamsonq.tally import TALLY
from lamsonq.threads import Watched

BATCH_MAX = 256
"""Messages in one put."""

BATCH_BYTES = 8 << 20
"""Octets in one put, beyond the first message."""


class Waiting(Protocol):
    """A message that is to be kept. It is told one of the two, once, and raises nothing then."""

    def job(self) -> Job:
        """What to keep. Raises anything."""

    def kept(self) -> None:
        """It is safe."""

    def lost(self, error: BaseException) -> None:
        """It is not, and nothing of it is kept."""


class Spool(Watched):
    """Puts messages into `queue`, in a thread of its own."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self._queue = queue
        self._waiting: SimpleQueue[Waiting | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, message: Waiting) -> None:
        """Have it kept; it is told."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="lamsonq-spool", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # this machine has no more threads just now
                    message.lost(error)
                    return
                self._thread = thread
            self._waiting.put(message)

    def close(self) -> None:
        """Nothing more will come: the thread ends when it has put what waits."""
        self._waiting.put(None)

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            messages, jobs = self._taken(first)
            self._begun = time.monotonic()
            self._put(messages, jobs)
            self._begun = None
            del first, messages, jobs  # who waits for the next message keeps none of before in memory

    def _taken(self, first: Waiting) -> tuple[list[Waiting], list[Job]]:
        """What waits, up to a put's bounds."""
        messages: list[Waiting] = []
        jobs: list[Job] = []
        size = 0
        message: Waiting | None = first
        while message is not None:
            try:
                job = message.job()
            except BaseException as error:  # whatever it is, the thread has more to do
                message.lost(error)
            else:
                messages.append(message)
                jobs.append(job)
                size += len(job.body)
            if len(jobs) >= BATCH_MAX or size > BATCH_BYTES:
                break
            try:
                message = self._waiting.get_nowait()
            except Empty:
                break
        else:
            self._waiting.put(None)  # the sign to end
        return messages, jobs

    def _put(self, messages: Sequence[Waiting], jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        try:
            self._queue.keep(jobs)
        except BaseException as error:  # any store
            if len(jobs) == 1:
                TALLY.count(False)
                messages[0].lost(error)
                return
            for message, job in zip(messages, jobs, strict=True):
                self._put([message], [job])
            return
        for message in messages:
            TALLY.count(True)
            message.kept()
