"""The threads that functions run in.

Rules:

1. A thread is started when there is work and none is free, up to a number; it stays.
2. Nobody waits for a result here, so there is none: who hands something over tells it whom to tell. That is a third of
   what concurrent.futures costs, and of a small function most of it.
3. They are daemons: a function that hangs keeps no process from its end.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue


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
