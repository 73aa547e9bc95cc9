"""Whether the disk has room for another message: mail is put off before it is full, not when it is.

Rules:

1. Below the mark the answer is 4xx (452 4.3.1, RFC 3463 section 3.4: mail system full), so that every client keeps its
   message and comes again. What is accepted already still finds the space that is left.
2. The file system is asked at most once a second; a change is logged once.
3. A disk that cannot be asked is taken for one with room: what cannot be written then is refused where it is written.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

LOG = logging.getLogger()

MIN_FREE = 64 << 20
"""Bytes that stay free, unless the settings say otherwise."""

EVERY = 1.0
"""Seconds for which an answer of the file system is good."""


class Space:
    """The free space where a server of this project writes: in `run/`, or the current directory where there is none.

    `min_free` bytes are to stay free; 0 asks nothing.
    """

    def __init__(
        self,
        min_free: int = MIN_FREE,
        *,
        statvfs: Callable[[str], os.statvfs_result] = os.statvfs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min_free < 0:
            raise ValueError(f"min_free={min_free}: give the bytes that are to stay free, or 0")
        self.min_free = min_free
        self._statvfs = statvfs
        self._clock = clock
        self._asked: float | None = None
        self._free: int | None = None
        self._low = False

    def lacks(self, size: int = 0) -> bool:
        """Whether a message of this size would leave less than the mark."""
        if not self.min_free:
            return False
        now = self._clock()
        if self._asked is None or now - self._asked >= EVERY:
            self._asked = now
            self._ask()
        return self._free is not None and self._free - size < self.min_free

    def _ask(self) -> None:
        where = "run" if os.path.isdir("run") else "."
        try:
            found = self._statvfs(where)
        except OSError:
            self._free = None
            return
        self._free = found.f_bavail * found.f_frsize
        low = self._free < self.min_free
        if low != self._low:
            self._low = low
            told = (
                f"{self._free >> 20} MiB are free where {os.path.abspath(where)} is; the mark is {self.min_free} bytes"
            )
            if low:
                LOG.error("No mail is taken: %s (min_free). Free some space.", told)
            else:
                LOG.warning("Mail is taken again: %s (min_free).", told)
