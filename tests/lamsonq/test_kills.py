"""SIGKILL at any moment, under load: whatever was answered 250 is afterwards handled, queued or dead.

A project with an SMTP receiver and a queue receiver runs as it would for real. Clients send without a pause, and write
down what was answered 250; the handler writes down what it handled; and a random process is killed, again and again.
So for each way from the last dot to the reply, and each store that the queue between the two can be: what a function
pushes, and what the receiver itself keeps. How often in all: the environment variable KILLS, 25 without it.
"""

import os
import random
import re
import signal
import smtplib
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamsonq import databases, fsck
from lamsonq.queue import Queue

from .ports import free_port
from .waiting import until

KILLS = int(os.environ.get("KILLS", "25"))

MAILDIR, SQLITE = "run/{}", "sqlite:run/q.db?queue={}"
WAYS = {
    "handle-maildir": ("handle", MAILDIR),
    "handle-sqlite": ("handle", SQLITE),
    "spool-maildir": ("spool", MAILDIR),
    "spool-sqlite": ("spool", SQLITE),
}

SETTINGS = """
from lamsonq.server import Receiver, Relay
relay: Relay
receiver: Receiver
"""
BOOT = """
import logging
from config import settings
from lamsonq.queue import Queue
from lamsonq.routing import Router
from lamsonq.server import {receiver}
from lamsonq.state import SQLiteStorage
logging.basicConfig(filename="logs/lamsonq.log", level=logging.INFO)
settings.receiver = {made}
Router.STATE_STORE = SQLiteStorage("run/state.db")
Router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
Router.load({handlers})
"""
FRONT = """
from lamsonq.queue import Queue
from lamsonq.routing import route, stateless

@route("desk@example.com")
def START(message):
    Queue("POSTS").push(message)
    return AGAIN

@route("desk@example.com")
def AGAIN(message):
    Queue("POSTS").push(message)
    return START
"""
BEHIND = """
import os
from lamsonq.queue import Queue
from lamsonq.routing import route, stateless

HANDLED = os.open("handled", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@route("desk@example.com")
@stateless
def START(message):
    Queue("ARCHIVE").push(message)
    os.write(HANDLED, (message["message-id"] + "\\n").encode())

@route("desk@example.com")
@stateless
def SECOND(message):
    pass
"""


class Project:
    """A project in a folder of its own, its two servers, and the clients' ledger. What comes in goes through the queue
    `posts`, and from there into `archive`."""

    def __init__(self, folder: Path, way: str, store: str) -> None:
        self.folder = folder
        self.posts, self.archive = store.format("posts"), store.format("archive")
        self.port = free_port()
        self.accepted = folder / "accepted"
        self.answered = 0
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        self.stop = threading.Event()
        self._write = threading.Lock()
        for name in ("config", "run", "logs"):
            (folder / name).mkdir()
        deliver = None if way == "handle" else f"Queue('{self.posts}').push"
        files = {
            "config/__init__.py": "",
            "config/settings.py": SETTINGS,
            "config/boot.py": BOOT.format(
                receiver="SMTPReceiver",
                made=f"SMTPReceiver('127.0.0.1', {self.port}, deliver={deliver})",
                handlers=["front"] if way == "handle" else [],
            ),
            "config/queue.py": BOOT.format(
                receiver="QueueReceiver", made=f"QueueReceiver('{self.posts}', 1)", handlers=["behind"]
            ),
            "front.py": FRONT.replace("POSTS", self.posts),
            "behind.py": BEHIND.replace("ARCHIVE", self.archive),
        }
        for name, text in files.items():
            (folder / name).write_text(textwrap.dedent(text))

    def start(self, name: str) -> None:
        """Start one of the two servers, as often as it takes: a killed parent's children still hold the port."""
        command = [sys.executable, "-m", "lamsonq", "start", "--no-daemon", "-boot", f"config.{name}"]
        for _ in range(100):
            self._status(name).unlink(missing_ok=True)  # a killed parent's
            server = subprocess.Popen([*command, "-pid", f"run/{name}.pid"], cwd=self.folder, stderr=subprocess.DEVNULL)
            self.servers[name] = server
            if self._is_up(name, server):
                return
        raise AssertionError(f"{name} does not start")

    def _is_up(self, name: str, server: subprocess.Popen[bytes]) -> bool:
        # Before its status is there, a child that dies is the end of its parent.
        until(lambda: self._status(name).exists() or server.poll() is not None)
        if server.poll() is None:
            return True
        time.sleep(0.1)
        return False

    def _status(self, name: str) -> Path:
        """The file that is there when all children are ready."""
        return self.folder / "run" / f"{name}.status"

    def send_without_a_pause(self, number: int) -> None:
        count = 0
        while not self.stop.is_set():
            try:
                with smtplib.SMTP("127.0.0.1", self.port, timeout=5) as client:
                    while not self.stop.is_set():
                        count += 1
                        self._send(client, number, count)
            except (OSError, smtplib.SMTPException):
                time.sleep(0.02)

    def _send(self, client: smtplib.SMTP, number: int, count: int) -> None:
        identity = f"<{number}.{count}@example.com>"
        size = 140_000 if count % 50 == 0 else random.randint(0, 3000)  # a large one has a file beside the database
        text = f"Message-ID: {identity}\r\nSubject: {count}\r\n\r\n{'x' * size}\r\n"
        client.sendmail(f"sender{number}.{count % 7}@example.com", ["desk@example.com"], text)
        with self._write, self.accepted.open("a") as ledger:
            ledger.write(identity + "\n")
            self.answered += 1

    def kill_someone(self) -> None:
        name = random.choice(list(self.servers))
        parent = self.servers[name]
        children = _children(parent.pid)
        if children and random.random() < 0.7:
            os.kill(random.choice(children), signal.SIGKILL)
            return
        parent.kill()
        parent.wait()
        self.start(name)

    def end(self) -> None:
        for server in self.servers.values():
            server.terminate()
        for server in self.servers.values():
            server.wait(60)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture(params=WAYS)
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path, *WAYS[request.param])
    yield project
    project.stop.set()
    for server in project.servers.values():
        if server.poll() is None:
            server.kill()


def _share(way: str) -> int:
    """How many of the KILLS are for this way."""
    number = list(WAYS).index(way)
    return KILLS * (number + 1) // len(WAYS) - KILLS * number // len(WAYS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_that_was_answered_250_is_ever_lost(
    project: Project, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    way = request.node.callspec.params["project"]
    kills = _share(way)
    for name in ("boot", "queue"):
        project.start(name)
    clients = [threading.Thread(target=project.send_without_a_pause, args=[n]) for n in range(4)]
    for client in clients:
        client.start()
    for number in range(kills):
        time.sleep(random.uniform(0.02, 0.6))
        until(lambda number=number: project.answered > number)  # type: ignore[misc]
        project.kill_someone()
    until(lambda: project.answered > kills)
    project.stop.set()
    for client in clients:
        client.join()
    _wait_until_worked(Queue(project.posts))
    project.end()
    accepted, done = project.accepted.read_text().split(), Path("handled").read_text().split()
    report = fsck.check("run", accepted, done)
    archived = _ids_in(project.archive)
    with capsys.disabled():
        print(f"\n{way}: {kills} kills: {len(accepted)} answered 250, {len(report.missing)} lost,", end=" ")
        print(f"{len(done) - len(set(done))} handled more than once; {report}")
    assert len(accepted) > kills
    assert report.missing == []
    assert report.good, report
    assert len(archived) == len(set(archived)), "what a handler pushed has left twice"
    assert set(accepted) <= set(archived)


def _ids_in(queue: str) -> list[str]:
    """The Message-IDs of what is ready in a queue."""
    found = (re.search(rb"^Message-ID: (\S+)", body, re.MULTILINE) for body in _bodies_in(queue))
    return [match[1].decode() for match in found if match]


def _bodies_in(queue: str) -> Iterator[bytes]:
    if queue.startswith("sqlite:"):
        path, name = databases.parsed(queue)
        yield from (row.body for row in databases.Database(path).rows(name))
    else:
        yield from (path.read_bytes() for path in Path(queue, "new").iterdir())


def _wait_until_worked(queue: Queue) -> None:
    """Until nothing waits in the queue and nothing is claimed."""
    give_up_at = time.monotonic() + 300
    while any(queue.backend.counts()[state] for state in ("ready", "delayed", "reserved")):
        assert time.monotonic() < give_up_at, "the queue is not worked any more"
        time.sleep(0.2)
    queue.backend.close()
