"""What a receiver has in memory while clients send large messages: of each all has come but the last octet.

    python tests/bench/inflight.py [CLIENTS [MEGABYTES ...]]

Each size has a process of its own. PSS is what it has for itself and its share of what others have, too, in MB.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECEIVER = """
import sys
from lamsonq.child import _map_large_blocks
from lamsonq.smtp import SMTPReceiver
_map_large_blocks()  # as in a process of `lamsonq start`
receiver = SMTPReceiver("127.0.0.1", 0, deliver=lambda message: None)
receiver.start()
print(receiver.port, flush=True)
while sys.stdin.readline():
    come = sum(session._received + len(session._held) for session in receiver._sessions)
    print(receiver.traffic.memory, come, flush=True)
"""
MEGABYTE = 1_000_000
LINE = b"x" * 76 + b"\r\n"
HEAD = b"EHLO me\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n"


def figures(pid: int) -> dict[str, float]:
    """Rss and Pss of a process, in MB."""
    found = re.findall(r"^(Rss|Pss): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return {name: int(value) * 1024 / MEGABYTE for name, value in found}


def measure(clients: int, megabytes: int) -> None:
    octets = (LINE * (megabytes * MEGABYTE // len(LINE) + 1))[: megabytes * MEGABYTE - 2] + b"\r\n.\r"
    with tempfile.TemporaryDirectory() as project:
        os.mkdir(f"{project}/run")
        receiver = subprocess.Popen(
            [sys.executable, "-c", RECEIVER], cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        asks, answers = receiver.stdin, receiver.stdout
        assert asks is not None
        assert answers is not None
        port = int(answers.readline())
        before = figures(receiver.pid)
        began = time.monotonic()
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(clients)]
        for connection in connections:
            connection.sendall(HEAD)
            connection.sendall(octets)
        counted = come = 0
        while come < clients * len(octets):
            print(file=asks, flush=True)
            counted, come = map(int, answers.readline().split())
        seconds = time.monotonic() - began
        held = figures(receiver.pid)
        for connection in connections:
            connection.sendall(b"\nQUIT\r\n")
            replies = connection.makefile("rb").read()
            assert b"\r\n250 2.0.0 Ok: handled" in replies, replies
        time.sleep(0.5)  # what the last thread has is gone, too
        after = figures(receiver.pid)
        asks.close()
        receiver.wait(10)
    told = "   ".join(f"{name} {before[name]:.1f} -> {held[name]:.1f} -> {after[name]:.1f}" for name in ("Rss", "Pss"))
    print(f"{clients} x {megabytes} MB   {told}   counted {counted / MEGABYTE:.1f}   received in {seconds:.2f} s")


if __name__ == "__main__":
    clients, *sizes = map(int, sys.argv[1:] or ("10",))
    print("before -> all but the last octet has come -> answered, in MB")
    for size in sizes or (1, 25):
        measure(clients, size)
