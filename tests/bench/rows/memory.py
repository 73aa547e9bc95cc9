"""From the start to the 220 line, and the memory of a receiver: idle, and while ten messages are on their way in."""

from __future__ import annotations

import contextlib
import fcntl
import smtplib
import socket
import struct
import termios
import time
from collections.abc import Iterator
from functools import partial

from ..contest import Contest, Entry, Measure, Sample, Scale, Target
from ..load import Start, place
from ..peers import aiosmtpd, lamsonq, salmon
from ..processes import memory, until

START = Measure("start", "s to the 220", ".2f")
IDLE = Measure("idle", "MB idle", ".0f")
SMALL = Measure("small", "MB with 10 x 1 MB", ".0f")
LARGE = Measure("large", "MB with 10 x 25 MB", ".0f")
FLAT = Measure("flat", "25 MB / 1 MB", ".2f")
MEASURES = (START, IDLE, SMALL, LARGE, FLAT)

RECEIVER, SQLITE, MAILDIR = "lamsonq, the receiver alone", "lamsonq start, SQLite", "lamsonq start, maildir"
STOCK, SALMON = "aiosmtpd", "Salmon"
MB = b"x" * 70 + b"\r\n"
SESSIONS = 10


def contests(scale: Scale) -> Iterator[Contest]:
    def entry(name: str, start: Start, missing: str | None = None) -> Entry:
        return Entry(name, "", partial(_measured, start), missing)

    yield Contest(
        "Start and memory of a receiver",
        [
            entry(RECEIVER, lamsonq.engine),
            entry(SQLITE, lamsonq.sqlite),
            entry(MAILDIR, lamsonq.maildir),
            entry(STOCK, aiosmtpd.sink, aiosmtpd.missing()),
            entry(SALMON, salmon.durable, salmon.missing()),
        ],
        [
            *(Target(SQLITE, SALMON, measure, most=1) for measure in (START, IDLE, SMALL)),
            *(Target(RECEIVER, STOCK, measure, most=1) for measure in (START, IDLE, SMALL)),
            *(Target(name, None, FLAT, most=1.25) for name in (SQLITE, MAILDIR)),
        ],
        measures=MEASURES,
        note="Of all processes of the server; `lamsonq start` has a parent that keeps its children alive.",
    )


def _measured(start: Start) -> Sample:
    with place() as folder, start(folder) as server:
        sample = {"start": server.start, "idle": memory(server.pids)}
        for key, size in (("small", 1_000_000), ("large", 25_000_000)):
            with _in_flight(server.port, size):
                sample[key] = memory(server.pids)
        return sample | {"flat": sample["large"] / sample["small"]}


@contextlib.contextmanager
def _in_flight(port: int, size: int) -> Iterator[None]:
    """Sessions that have sent everything but the end of their message. After it they go without one."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(SESSIONS):
            client = smtplib.SMTP("127.0.0.1", port, timeout=60)
            stack.callback(client.close)
            client.ehlo()
            for command in ("MAIL FROM:<sender@example.org>", "RCPT TO:<desk@example.com>", "DATA"):
                code, reply = client.docmd(command)
                if code >= 400:
                    raise RuntimeError(f"{command}: {code} {reply!r}")
            assert client.sock is not None
            connections.append(client.sock)
        for connection in connections:
            connection.sendall(b"Subject: large\r\n\r\n" + MB * (size // len(MB)))
        until(lambda: not any(map(_unsent, connections)), "everything taken")
        time.sleep(0.5)  # until what was taken is where it stays
        yield


def _unsent(connection: socket.socket) -> int:
    """Bytes that the other side has not taken yet."""
    count: int = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0]
    return count
