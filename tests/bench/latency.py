"""How long a message waits on an idle machine: from its rename into new/ to the first line of the handler that runs in
another process.

    python tests/bench/latency.py [messages]
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKER = """
import os, time
from lamsonq.routing import RoutingBase, route, stateless
from lamsonq.worker import QueueReceiver

LEDGER = os.open("handled", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@stateless
def START(message):
    now = time.time_ns()
    os.write(LEDGER, f"{message['message-id']} {now}\\n".encode())

router = RoutingBase()
router.register_route("desk@example.com", START)
QueueReceiver("posts", 10, router=router).start()
"""


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("worker.py").write_text(WORKER)
        worker = subprocess.Popen([sys.executable, "worker.py"])
        try:
            measured = _measure(count)
        finally:
            worker.terminate()
            worker.wait()
    measured.sort()
    percentile = [measured[min(count - 1, count * p // 100)] for p in (50, 99)]
    print(f"{count} messages, one every 50 ms: median {percentile[0]:.2f} ms, 99 % {percentile[1]:.2f} ms,", end=" ")
    print(f"longest {measured[-1]:.2f} ms, mean {statistics.mean(measured):.2f} ms (`sleep` is 10 s)")


def _measure(count: int) -> list[float]:
    new, ledger = Path("posts/new"), Path("handled")
    while not new.exists():
        time.sleep(0.05)
    time.sleep(1)  # until it is idle
    renamed = {}
    for number in range(count):
        identity = f"<{number}@example.com>"
        path = new.parent / "tmp" / str(number)
        path.write_text(f"Message-ID: {identity}\nTo: desk@example.com\nFrom: a@example.com\n\nhello\n")
        renamed[identity] = time.time_ns()
        path.rename(new / f"{int(time.time())}.M{number:06}P{os.getpid()}Q{number}.bench")
        time.sleep(0.05)
    while len(ledger.read_text().splitlines()) < count:
        time.sleep(0.05)
    started = (line.split() for line in ledger.read_text().splitlines())
    return [(int(at) - renamed[identity]) / 1e6 for identity, at in started]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
