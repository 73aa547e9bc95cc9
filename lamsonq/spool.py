"""What a receiver keeps before it answers: messages on their way into one queue, many in one put.

Rules:

1. A message that comes alone is put at once. Those that come while others are being put go together in the next put,
   and share its syncs: the busier it is, the fewer there are for each, and nobody waits for company.
2. A put that fails is tried with each message alone: one that cannot be kept takes no other with it.
3. A store whose writers share one sync needs one thread. Where each message is a file of its own, several threads have
   their syncs under way together, because the kernel joins those that wait for the disk at the same time.
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

BATCH_MAX = 256
"""Messages in one put."""

BATCH_BYTES = 8 << 20
"""Octets in one put, beyond the first message."""

FILE_THREADS = 8


class Waiting(Protocol):
    """A message that is to be kept. It is told one of the two, once, and raises nothing then."""

    def job(self) -> Job:
        """What to keep. Raises anything."""

    def kept(self) -> None:
        """It is safe."""

    def lost(self, error: BaseException) -> None:
        """It is not, and nothing of it is kept."""


class Spool:
    """Puts messages into `queue`, in threads of its own."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._most = FILE_THREADS if "files" in queue.backend.capabilities else 1
        self._waiting: SimpleQueue[Waiting | None] = SimpleQueue()
        self._begun: dict[int, float] = {}
        """Which threads are at a put, and since when, by the monotonic clock."""
        self._hung: set[float] = set()
        self.threads = 0
        self._lock = threading.Lock()

    def keep(self, message: Waiting) -> None:
        """Have it kept; it is told."""
        with self._lock:
            if not self.threads or (self.threads < self._most and not self._waiting.empty()):
                try:
                    self._start()
                except RuntimeError as error:  # this machine has no more threads: those that there are have to do
                    if not self.threads:
                        message.lost(error)
                        return
            self._waiting.put(message)

    def _start(self) -> None:
        number = self.threads + 1
        threading.Thread(target=self._work, args=(number,), name="lamsonq-spool", daemon=True).start()
        self.threads = number

    def hangs(self, seconds: float) -> bool:
        """Whether a put takes longer than that; it is told once of each."""
        hung = {begun for begun in list(self._begun.values()) if time.monotonic() - begun > seconds}
        new = hung - self._hung
        self._hung = hung
        return bool(new)

    def close(self) -> None:
        """Nothing more will come: its threads end when they have put what waits."""
        with self._lock:
            for _ in range(self.threads):
                self._waiting.put(None)

    def _work(self, number: int) -> None:
        while (first := self._waiting.get()) is not None:
            messages, jobs = self._taken(first)
            self._begun[number] = time.monotonic()
            self._put(messages, jobs)
            del self._begun[number]
            del first, messages, jobs  # who waits for the next message keeps none of before in memory

    def _taken(self, first: Waiting) -> tuple[list[Waiting], list[Job]]:
        """What waits, this thread's share of it: rule 3."""
        share = min(self._waiting.qsize() // self._most + 1, BATCH_MAX)
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
            if len(jobs) >= share or size > BATCH_BYTES:
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
