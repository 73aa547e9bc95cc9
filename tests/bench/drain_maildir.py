"""Does draining a maildir cost the same per message however many wait?

    python tests/bench/drain_maildir.py 1000 10000 100000

For each size it fills a maildir in a temporary directory (without fsync, because filling is not what is measured) and
drains it by reserve and settle, one message at a time. It prints microseconds per message and the ratio to the first
size, and ends with 1 when a ratio is over 1.5. The verdict is on wall time, which other work on the machine spoils; the
processor time of this process stands beside it, and the load, to tell the one from the other.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

from lamsonq.backends.maildir import Maildir
from lamsonq.backends.maildir_names import Name, encode_block
from lamsonq.jobs import DONE, Job

ALLOWED = 1.5
BODY = b"From: a@example.org\r\nTo: b@example.org\r\nSubject: drain\r\n\r\n" + b"x" * 1000 + b"\r\n"


def fill(queue: Maildir, size: int) -> None:
    """Put `size` messages into new/, unsynced."""
    queue.folders.make()
    for _ in range(size):
        job = Job(key=queue.new_key(), body=BODY, sender="a@example.org", recipients=("b@example.org",))
        block = encode_block(job, time.time())
        with open(queue.folders.at("new", Name(job.key, block=len(block)).text()), "wb") as file:
            file.write(block + BODY)


def drain(queue: Maildir) -> int:
    """Work everything off, one by one; how many there were."""
    drained = 0
    while jobs := queue.reserve(1):
        queue.settle(jobs[0], DONE)
        drained += 1
    return drained


def measure(size: int) -> tuple[float, float]:
    """Microseconds per message: by the clock on the wall, and of the processor."""
    with tempfile.TemporaryDirectory(prefix="lamsonq-drain-") as place:
        queue = Maildir(os.path.join(place, "posts"))
        fill(queue, size)
        os.sync()
        begun, worked = time.perf_counter(), time.process_time()
        drained = drain(queue)
        seconds, processor = time.perf_counter() - begun, time.process_time() - worked
        queue.close()
    assert drained == size, f"{size} went in, {drained} came out"
    return seconds / size * 1e6, processor / size * 1e6


def main(sizes: list[int]) -> int:
    measure(200)  # warm up
    first = first_processor = worst = 0.0
    for size in sizes:
        wall, processor = measure(size)
        first, first_processor = first or wall, first_processor or processor
        worst = max(worst, wall / first)
        print(
            f"{size:>9} messages: {wall:7.1f} us per message, {wall / first:.2f} x the first; processor "
            f"{processor:7.1f} us, {processor / first_processor:.2f} x; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main([int(size) for size in sys.argv[1:]] or [1000, 10_000, 100_000]))
