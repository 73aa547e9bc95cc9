"""lamsonq, started as its users start it: a generated project and `lamsonq start`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ledger import Ledger
from ..processes import Listening, Program, free_port, listening, running, until

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

SPOOL = """
from config import settings
from lamsonq.queue import Queue
from lamsonq.server import SMTPReceiver
from lamsonq.settings import load_logging

load_logging("config/logging.toml")
settings.receiver = SMTPReceiver(**settings.receiver_config, deliver=Queue("{url}").push)
"""
SQLITE, MAILDIR = "sqlite:run/q.db?queue=posts", "run/posts"

ENGINE = """
from lamsonq.server import SMTPReceiver

receiver = SMTPReceiver("127.0.0.1", {port}, deliver=lambda message: None)
receiver.bind()
receiver.start()
receiver.join()
"""


SESSION = """
from lamsonq.server import SMTPReceiver


class Sink(SMTPReceiver):
    def commit(self, envelope, content, groups, tell):
        for _ in groups:
            tell("250 2.0.0 Ok")


receiver = Sink("127.0.0.1", {port}, deliver=lambda message: None)
receiver.bind()
receiver.start()
receiver.join()
"""

DESK = """
from lamsonq.queue import Queue
from lamsonq.routing import route, route_like, state_key_generator


@state_key_generator
def conversation(module, message):
    return f"{{module}}:{{int(message.To.partition('desk')[0] or 0) % 1000}}"


@route("(who)@(host)", who=".+", host=".+")
def START(message, who, host):
    Queue("{url}").push(message)
    return AGAIN


@route_like(START)
def AGAIN(message, who, host):
    Queue("{url}").push(message)
    return START
"""
"""A thousand conversations: smtp-source numbers the recipients, and its sender is always the same."""

INDEX = """
from lamsonq.routing import route, stateless


@route("(who)@(host)", who=".+", host=".+")
@stateless
def START(message, who, host):
    note()
"""
FRONT = """
from config import settings
from lamsonq.queue import Queue
from lamsonq.routing import Router
from lamsonq.server import SMTPReceiver
from lamsonq.settings import load_logging
from lamsonq.state import SQLiteStorage

load_logging("config/logging.toml")
settings.receiver = SMTPReceiver(**settings.receiver_config)
Router.load(["app.handlers.desk"])
Router.STATE_STORE = SQLiteStorage("run/state.db")
Router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
"""
BEHIND = """
from config import settings
from lamsonq.queue import Queue
from lamsonq.routing import Router
from lamsonq.server import QueueReceiver
from lamsonq.settings import load_logging
from lamsonq.state import SQLiteStorage

load_logging("config/logging.toml")
settings.receiver = QueueReceiver("{url}")
Router.load(["app.handlers.index"])
Router.STATE_STORE = SQLiteStorage("run/state.db")
Router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
"""


@dataclass
class Working:
    """Servers that take mail, and note in the ledger when it is handled in another process."""

    port: int
    pids: Sequence[int]
    ledger: Ledger


class Project:
    """A generated project in a folder. It logs at INFO, as one in operation does."""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self.folder = folder / "project"
        self.port = free_port()
        command = [sys.executable, "-m", "lamsonq", "gen", str(self.folder)]
        subprocess.run(command, check=True, env={**ENVIRONMENT, "PATH": ""}, stdout=subprocess.DEVNULL)
        logging = self.folder / "config" / "logging.toml"
        logging.write_text(logging.read_text().replace('level = "DEBUG"', 'level = "INFO"'))
        for name, text in files.items():
            (self.folder / name).write_text(text)

    @contextlib.contextmanager
    def started(self, boot: str, processes: int = 1) -> Iterator[Program]:
        """`lamsonq start` of a boot module."""
        name = boot.rpartition(".")[2]
        command = [sys.executable, "-m", "lamsonq", "start", "-boot", boot, "-pid", f"run/{name}.pid", "--no-daemon"]
        command += ["-workers", str(processes)]
        environment = {**ENVIRONMENT, "LAMSONQ_RECEIVER__PORT": str(self.port)}
        with running(command, self.folder, environment, name) as program:
            yield program


@contextlib.contextmanager
def _program(folder: Path, text: str) -> Iterator[Listening]:
    port = free_port()
    with running([sys.executable, "-c", text.format(port=port)], folder, ENVIRONMENT) as program:
        yield listening(port, program)


def engine(folder: Path) -> contextlib.AbstractContextManager[Listening]:
    """The receiver with a function that drops what it gets, in a thread as every function."""
    return _program(folder, ENGINE)


def session(folder: Path) -> contextlib.AbstractContextManager[Listening]:
    """The SMTP session alone: a message is dropped on the event loop, as aiosmtpd's handlers do it."""
    return _program(folder, SESSION)


@contextlib.contextmanager
def _spool(folder: Path, url: str, processes: int = 1) -> Iterator[Listening]:
    project = Project(folder, {"config/spool.py": SPOOL.format(url=url)})
    with project.started("config.spool", processes) as program:
        yield listening(project.port, program)


def sqlite(folder: Path, processes: int = 1) -> contextlib.AbstractContextManager[Listening]:
    """A receiver in front of a queue in SQLite."""
    return _spool(folder, SQLITE, processes)


def maildir(folder: Path) -> contextlib.AbstractContextManager[Listening]:
    """A receiver in front of a queue in a maildir."""
    return _spool(folder, MAILDIR)


@contextlib.contextmanager
def working(folder: Path, url: str) -> Iterator[Working]:
    """The whole way: receiver, state function, queue, and a queue receiver in a process of its own."""
    ledger = Ledger(folder)
    files = {
        "app/handlers/desk.py": DESK.format(url=url),
        "app/handlers/index.py": ledger.note + INDEX,
        "config/front.py": FRONT,
        "config/behind.py": BEHIND.format(url=url),
    }
    project = Project(folder, files)
    with project.started("config.front") as front, project.started("config.behind") as behind:
        port = listening(project.port, front).port
        until((project.folder / "run" / "behind.pid").exists, "the queue receiver holds its pid file", behind)
        yield Working(port, [front.pid, behind.pid], ledger)


def worker(url: str, ledger: Ledger) -> dict[str, str]:
    """The files of a project that has a queue receiver only, config.behind."""
    return {"app/handlers/index.py": ledger.note + INDEX, "config/behind.py": BEHIND.format(url=url)}
