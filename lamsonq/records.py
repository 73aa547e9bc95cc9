"""Records that are read in several threads: their kinds are made ready before.

msgspec works out how to read a kind of record when it first reads one. Another thread that reads one of that kind at
this very moment gets what is half done, and the process ends with a segmentation fault (msgspec 0.22). So a kind is
made ready where it is defined, while one thread imports it, or else under a lock.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import msgspec

_lock = threading.Lock()
_ready: set[Any] = set()


def make_ready(*kinds: Any) -> None:
    """Let any number of threads read these kinds. What cannot be read is refused when it is read."""
    for kind in kinds:
        with contextlib.suppress(Exception):
            if kind not in _ready:
                with _lock:
                    msgspec.msgpack.Decoder(kind)
                _ready.add(kind)
