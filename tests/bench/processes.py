"""Processes that are measured: started and ended by their ids, and what the kernel tells of them and their children."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 30.0
"""Seconds after which something that should happen has not."""

_TICK = os.sysconf("SC_CLK_TCK")


class Program:
    """A program in the foreground, with a process group of its own and its output in a file beside it."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, name: str = "program"
    ) -> None:
        self.log = folder / f"{name}.output"
        self.began = time.monotonic()
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def runs(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """TERM, and after a while KILL, for it and the children that it leaves behind."""
        family = tree(self.pid)
        if self.runs():
            self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) == self.pid:  # still one of its group: the id was not given to another
                    os.kill(pid, signal.SIGKILL)

    def told(self) -> str:
        return self.log.read_text("utf-8", "replace")[-2000:]


@dataclass
class Listening:
    """A mail server on the loopback: the processes that it consists of, without their children, and how many seconds
    after its start it said 220."""

    port: int
    pids: Sequence[int]
    start: float


def listening(port: int, program: Program) -> Listening:
    """Wait for its 220."""
    until(lambda: greets(port), "the 220 line", program)
    return Listening(port, [program.pid], time.monotonic() - program.began)


@contextlib.contextmanager
def running(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, name: str = "program"
) -> Iterator[Program]:
    program = Program(command, folder, environment, name)
    try:
        yield program
    finally:
        program.close()


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                found += map(int, Path(f"/proc/{each}/task/{thread}/children").read_text().split())
    return found


def trees(pids: Sequence[int]) -> list[int]:
    return [each for pid in pids for each in tree(pid)]


def cpu(pids: Sequence[int]) -> float:
    """Seconds of processor time of these processes, of their children, and of those that they have waited for."""
    ticks = 0
    for pid in trees(pids):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # utime stime cutime cstime
    return ticks / _TICK


def memory(pids: Sequence[int]) -> float:
    """Resident MB of these processes and their children; a page that several share counts once (PSS)."""
    kilobytes = 0
    for pid in trees(pids):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes / 1000


def wakeups(pids: Sequence[int]) -> int:
    """How often a thread of these processes and their children went to sleep by itself since it began."""
    number = 0
    for pid in trees(pids):
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):
                lines = status.read_text().splitlines()
                number += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))
    return number


def until(
    condition: Callable[[], object],
    what: str,
    program: Program | None = None,
    *,
    pause: float = 0.005,
    patience: float = PATIENCE,
) -> None:
    """Wait for something that nobody tells us of."""
    give_up_at = time.monotonic() + patience
    while not condition():
        told = f"\n{program.told()}" if program else ""
        if program is not None and not program.runs():
            raise RuntimeError(f"it ended before {what}{told}")
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"not seen in {patience:.0f} s: {what}{told}")
        time.sleep(pause)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def greets(port: int) -> bool:
    """Whether a mail server says 220 there."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            return client.recv(3) == b"220"
    except OSError:
        return False
