"""The names of jobs.

    1244080328.M408474P3147Q4.mycomputer.local    what maildir programs call their files
    1244080328.M408474P3147Q4R1.mycomputer.local  the first part of that job

Rules:

1. A key sorts by the time at which it was made, and a part's directly behind that of its job: jobs are worked in the
   order of their keys.
2. A key that this process has made and that was not put yet can be in no queue: it is remembered, so that most puts
   need not look whether theirs is there.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import socket
import threading
import time
from collections import OrderedDict

_DERIVED = re.compile(r"^[0-9]+\.M[0-9]+P[0-9]+Q[0-9]+(?:R[0-9]+)+(?:\.|$)|\.R[0-9]+$")
_FRESH_MAX = 10_000
"""Keys that are remembered (rule 2)."""


@functools.cache
def _host() -> str:
    """This machine's name as a part of a file name: the maildir convention replaces / and :, we the comma as well."""
    cleaned = re.sub(r"[/:,\s\x00-\x1f]", "_", socket.gethostname())
    return os.fsencode(cleaned)[:64].decode("ascii", "replace").replace("\ufffd", "_") or "localhost"


class _Keys:
    """Keys in rising order: two of one process never share a microsecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = itertools.count(1)
        self._last = 0
        self._fresh: OrderedDict[str, None] = OrderedDict()

    def new(self) -> str:
        with self._lock:
            now = time.time_ns() // 1000
            if 0 <= self._last - now < 1_000_000:
                now = self._last + 1
            self._last = now
            number = next(self._count)
            key = f"{now // 1_000_000}.M{now % 1_000_000:06d}P{os.getpid()}Q{number}.{_host()}"
            self._fresh[key] = None
            if len(self._fresh) > _FRESH_MAX:
                self._fresh.popitem(last=False)
        return key

    def use(self, key: str) -> bool:
        with self._lock:
            return self._fresh.pop(key, self) is None


_keys = _Keys()


def new_key() -> str:
    """`<seconds>.M<microseconds>P<process>Q<number>.<host>`: a key that no other process, thread or machine makes."""
    return _keys.new()


def use_key(key: str) -> bool:
    """A job is put under this key; whether none can be there that has it, because this process has just made it."""
    return _keys.use(key)


def derived_key(key: str, number: int) -> str:
    """The key of a part of this job, that only who has the job makes."""
    derived, found = re.subn(r"^(\d+\.M\d+P\d+Q\d+(?:R\d+)*)", rf"\1R{_in_order(number)}", key, count=1)
    return derived if found else f"{key}.R{_in_order(number)}"


def is_derived(key: str) -> bool:
    """Whether `derived_key` has made this key."""
    return _DERIVED.search(key) is not None


def _in_order(number: int) -> str:
    """The number in digits that sort as texts do, because keys are sorted so: 8, 9009, 9010, 9099, 990100."""
    if number < 9:
        return str(number)
    digits = f"{number:02d}"
    return f"{'9' * (len(digits) - 1)}0{digits}"


def _start_afresh() -> None:
    """Another thread of the parent may have held the lock at the fork."""
    global _keys
    _keys = _Keys()


os.register_at_fork(after_in_child=_start_afresh)
