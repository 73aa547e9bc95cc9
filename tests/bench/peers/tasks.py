"""Task queues: huey with SQLite, and taskiq, Celery, Dramatiq and RQ with Redis. Each as its documentation starts it,
with one worker process."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..installed import program, python
from ..ledger import Ledger
from ..processes import Program, free_port, running, until


@dataclass(frozen=True)
class Library:
    """`app` defines `job`, `put(body)` puts one; `command` is its worker, a script of the virtual environment.

    `rate` is how many jobs a second it will hardly exceed: so many are put for a second of measuring.
    """

    name: str
    promise: str
    app: str
    command: tuple[str, ...]
    rate: int
    redis: bool = True

    def missing(self) -> str | None:
        if python() is None:
            return "PyPI's packages cannot be installed"
        return "redis-server is not installed" if self.redis and not program("redis-server") else None


HUEY = Library(
    "huey, SQLite",
    "synced; at most once",
    """
from huey import SqliteHuey

huey = SqliteHuey(filename="huey.db", fsync=True, results=False)

@huey.task()
def job(body):
    note()

put = job
""",
    ("huey_consumer", "app.huey", "-q"),
    6000,
    redis=False,
)
TASKIQ = Library(
    "taskiq, Redis stream",
    "synced each second; acknowledged",
    """
import asyncio
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker("{redis}")

@broker.task
async def job(body: str) -> None:
    note()

loop = None
def put(body):
    global loop
    if loop is None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(broker.startup())
    loop.run_until_complete(job.kiq(body))
""",
    ("taskiq", "worker", "app:broker", "--workers", "1", "--log-level", "WARNING"),
    5000,
)
CELERY = Library(
    "Celery, Redis",
    "synced each second; at most once",
    """
from celery import Celery

app = Celery("app", broker="{redis}")
app.conf.task_ignore_result = True

@app.task
def job(body):
    note()

put = job.delay
""",
    ("celery", "-A", "app", "worker", "-c", "1", "--loglevel", "WARNING"),
    1500,
)
DRAMATIQ = Library(
    "Dramatiq, Redis",
    "synced each second; at least once",
    """
import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url="{redis}"))

@dramatiq.actor
def job(body):
    note()

put = job.send
""",
    ("dramatiq", "app", "--processes", "1"),
    1500,
)
RQ = Library(
    "RQ, Redis",
    "synced each second; failed when its worker dies",
    """
from redis import Redis
from rq import Queue

queue = Queue(connection=Redis.from_url("{redis}"))

def job(body):
    note()

def put(body):
    queue.enqueue(job, body)
""",
    ("rq", "worker", "--quiet", "--url", "{redis}"),
    100,
)
LIBRARIES = (HUEY, TASKIQ, CELERY, DRAMATIQ, RQ)

PUT = """
import sys, time
import app

body = "x" * 5000
for number in range(int(sys.argv[1])):
    app.put(body)
    if len(sys.argv) > 2:
        print(time.monotonic_ns(), flush=True)
        sys.stdin.readline()
"""
"""Puts so many; with a second argument it tells when each was put, and waits for a line before the next."""


@dataclass
class Application:
    """A library's application in a folder of its own, with the Redis that it needs."""

    library: Library
    folder: Path
    redis: str
    ledger: Ledger
    brokers: Sequence[Program]

    def put(self, count: int) -> None:
        subprocess.run([*self.putting(), str(count)], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def putting(self) -> list[str]:
        return [python() or "", "put.py"]

    @contextlib.contextmanager
    def worker(self) -> Iterator[Sequence[int]]:
        """The processes that work: its own, and the broker."""
        name, *rest = (word.format(redis=self.redis) for word in self.library.command)
        command = [python() or "", str(Path(python() or "").with_name(name)), *rest]
        environment = {"PYTHONPATH": str(self.folder)}
        with running(command, self.folder, environment, "worker") as program:
            yield [program.pid, *(broker.pid for broker in self.brokers)]


@contextlib.contextmanager
def application(library: Library, folder: Path) -> Iterator[Application]:
    with contextlib.ExitStack() as stack:
        url, brokers = "", []
        if library.redis:
            port = free_port()
            url = f"redis://127.0.0.1:{port}/0"
            brokers.append(stack.enter_context(running(_redis(port), folder, name="redis")))
            until(lambda: _answers(port), "Redis", brokers[0])
        ledger = Ledger(folder)
        (folder / "app.py").write_text(ledger.note + library.app.replace("{redis}", url))
        (folder / "put.py").write_text(PUT)
        yield Application(library, folder, url, ledger, brokers)


def _redis(port: int) -> list[str]:
    words = f"--port {port} --bind 127.0.0.1 --appendonly yes --appendfsync everysec --maxmemory-policy noeviction"
    return [program("redis-server") or "", *words.split(), "--save", ""]


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(b"PING\r\n")
            return client.recv(5) == b"+PONG"
    except OSError:
        return False
