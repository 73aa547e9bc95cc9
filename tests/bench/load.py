"""The load: Postfix's smtp-source, the same for everybody, against a server on the loopback."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from .contest import Sample
from .installed import program
from .processes import Listening, cpu, memory

MOST = 200_000
"""Messages of one measurement at most, however fast a server is."""

TIMEOUT = 120.0


Start = Callable[[Path], AbstractContextManager[Listening]]
"""Starts a server in a folder; it listens when the block begins, and has ended after it."""


@dataclass(frozen=True)
class Load:
    """`keep`: all messages of a session over one connection; otherwise a connection for each. `numbered`: every message
    has a recipient of its own, 1desk@example.com and so on."""

    sessions: int = 10
    size: int = 5000
    keep: bool = True
    numbered: bool = False

    def send(self, port: int, count: int) -> float:
        """Send so many messages; seconds. Raises when one is refused."""
        command = [program("smtp-source") or "smtp-source", "-s", str(self.sessions), "-m", str(count)]
        command += ["-l", str(self.size), "-f", "sender@example.org", "-t", "desk@example.com"]
        command += ["-N"] if self.numbered else []
        command += ["-M", "client.example.org", *(["-d"] if self.keep else []), f"inet:127.0.0.1:{port}"]
        began = time.perf_counter()
        subprocess.run(command, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return time.perf_counter() - began

    def named(self) -> str:
        size = f"{self.size // 1_000_000} MB" if self.size >= 1_000_000 else f"{self.size // 1000} KB"
        kept = "kept connections" if self.keep else "a connection for each"
        sessions = f"{self.sessions} sessions" if self.sessions > 1 else "1 session"
        return f"{size}, {sessions}, {kept}"


def accepted(start: Start, load: Load, seconds: float) -> Sample:
    """Start a server and send for about so many seconds. The warm-up tells how many messages that takes."""
    with place() as folder, start(folder) as server:
        few = max(load.sessions * 4, 20)
        load.send(server.port, few)
        rate = few * 5 / load.send(server.port, few * 5)
        count = max(min(int(rate * seconds), MOST), few)
        before = cpu(server.pids)
        took = load.send(server.port, count)
        used = cpu(server.pids) - before
        return {"rate": count / took, "cpu": used / count * 1000, "memory": memory(server.pids)}


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A folder for a server, which other users may look into. What it held is on the disk when the next one comes: a
    disk that still writes would slow that one down. It is removed at the end of all: for minutes after files were
    deleted ext4 makes new ones several times as slowly (its `recently_deleted`)."""
    made = tempfile.mkdtemp(prefix="lamsonq-bench-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    os.chmod(made, 0o755)
    yield Path(made)
    os.sync()
