"""The threads that functions run in.

Rules:

1. A thread is started when there is work and none is free, up to a number; it stays.
2. Nobody waits for a result here, so there is none: who hands something over tells it whom to tell. That is a third of
   what concurrent.futures costs, and of a small function most of it.
3. They are daemons: a function that hangs keeps no process from its end.
4. `Together` has no thread of its own: who comes first works for all that come meanwhile, and they go on.
5. A time-out is for a function that has had the time: what a process stood still does not count (`Standstill`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

TOGETHER_MAX = 256
"""Things that are dealt with at once."""

STOOD_STILL = 3.0
"""Seconds between two looks that are no ordinary delay; who uses a Standstill looks once a second."""


class Threads:
    """At most `most` threads, called `name`."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._free = 0
        self._closed = False

    def submit(self, function: Callable[[], object]) -> None:
        """Run this as soon as a thread is free. Raises RuntimeError when they are closed, and OSError when there is
        none, and none can be started."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the threads {self._name} are closed")
            if self._free < 1 and len(self._threads) < self._most:
                self._start()
            self._free -= 1
            self._work.put(function)  # in here: behind the signs of `close` nothing is read

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}_{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # this machine has no more: those that there are have to do
            if not self._threads:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
            return
        self._threads.append(thread)
        self._free += 1

    def close(self, *, wait: bool = False) -> None:
        """Take nothing more. What was taken is done; with `wait`, before this returns."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._work.put(None)
        if wait:
            for thread in threads:
                thread.join()

    def drop(self) -> None:
        """Take nothing more, and forget what no thread has begun with."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(Empty):
            while True:
                self._work.get_nowait()
        self.close()

    def _run(self) -> None:
        while (function := self._work.get()) is not None:
            try:
                function()
            except BaseException:  # whoever it is from, the thread has more to do
                logging.exception("a function in the thread %s failed", threading.current_thread().name)
            del function  # who waits for more to do keeps no message in memory
            with self._lock:
                self._free += 1


class Standstill:
    """Tells for how long this process stood still since the last look: stopped (SIGSTOP, a frozen control group, a
    paused virtual machine), or without a processor. No function of it could run meanwhile."""

    def __init__(self) -> None:
        self._looked, self._used = time.monotonic(), time.process_time()

    def seconds(self) -> float:
        """Since the last call; 0.0 where it was not for long. What it has computed meanwhile is not counted."""
        looked, used = self._looked, self._used
        self._looked, self._used = time.monotonic(), time.process_time()
        still = (self._looked - looked) - (self._used - used)
        return still if still > STOOD_STILL else 0.0


class Watched:
    """Something of which one piece of work is under way at a time, and somebody looks whether that hangs."""

    def __init__(self) -> None:
        self._begun: float | None = None
        """Since when it is under way, by the monotonic clock."""
        self._told: float | None = None

    def hangs(self, seconds: float) -> bool:
        """Whether it takes longer than that; it is told once of each piece."""
        begun = self._begun
        if begun is None or begun == self._told or time.monotonic() - begun <= seconds:
            return False
        self._told = begun
        return True


class Together(Watched, Generic[T]):
    """Has things dealt with by `act`: those that come while it is at work, all at once by its next call."""

    def __init__(self, act: Callable[[list[T]], None]) -> None:
        super().__init__()
        self._act = act
        self._waiting: deque[T] = deque()
        self._busy = threading.Lock()

    def submit(self, thing: T) -> None:
        """Have it dealt with: before this returns, or by the thread that is at work."""
        self._waiting.append(thing)
        while self._waiting and self._busy.acquire(blocking=False):
            try:
                things = [self._waiting.popleft() for _ in range(min(len(self._waiting), TOGETHER_MAX))]
                self._begun = time.monotonic()
                self._act(things)
                del things  # who works on keeps nothing of before in memory
            except BaseException:  # whoever it is from, there is more to do
                logging.exception("%r failed", self._act)
            finally:
                self._begun = None
                self._busy.release()
