"""Salmon, started as its users start it: a project and `salmon start`.

What would slow it down beyond need is taken out: modules are not looked at again for each message (RELOAD), and its
log is at INFO, as ours is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..installed import python
from ..ledger import Ledger
from ..processes import Listening, free_port, listening, running
from .lamsonq import Working

LOGGING = """
import logging
logging.basicConfig(filename="logs/salmon.log", level=logging.INFO)
"""
SETTINGS = """
relay_config = {{"host": "127.0.0.1", "port": 8825}}
receiver_config = {{"host": "127.0.0.1", "port": {port}}}
handlers = ["app.handlers.desk"]
queue_handlers = ["app.handlers.index"]
"""
BOOT = """
from . import settings
from salmon.queue import Queue
from salmon.routing import Router
from salmon.server import SMTPReceiver
from config.states import SQLiteStorage

settings.receiver = SMTPReceiver(**settings.receiver_config)
Router.STATE_STORE = SQLiteStorage()
Router.load(settings.handlers)
Router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
"""
QUEUE = """
from . import settings
from salmon.queue import Queue
from salmon.routing import Router
from salmon.server import QueueReceiver

settings.receiver = QueueReceiver("run/posts", {sleep})
Router.load(settings.queue_handlers)
Router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
"""
STATES = """
import sqlite3, threading
from salmon.routing import ROUTE_FIRST_STATE, StateStorage

class SQLiteStorage(StateStorage):
    def __init__(self):
        self.lock = threading.Lock()
        self.database = sqlite3.connect("run/state.db", check_same_thread=False, isolation_level=None)
        self.database.execute("pragma journal_mode = wal")
        self.database.execute("pragma synchronous = full")
        self.database.execute("create table if not exists states (key, sender, state, primary key (key, sender))")

    def get(self, key, sender):
        with self.lock:
            found = self.database.execute("select state from states where key = ? and sender = ?", (key, sender))
            row = found.fetchone()
        return row[0] if row else ROUTE_FIRST_STATE

    def set(self, key, sender, state):
        with self.lock:
            self.database.execute("replace into states values (?, ?, ?)", (key, sender, state))

    def clear(self):
        with self.lock:
            self.database.execute("delete from states")
"""
KEEP = """
from salmon.queue import Queue
from salmon.routing import route, stateless

@route(".+")
@stateless
def START(message):
    Queue("run/posts").push(message)
"""
DESK = """
from salmon.queue import Queue
from salmon.routing import route, route_like, state_key_generator

@state_key_generator
def conversation(module, message):
    return f"{module}:{int(message.To.partition('desk')[0] or 0) % 1000}"

@route("(who)@(host)", who=".+", host=".+")
def START(message, who, host):
    Queue("run/posts").push(message)
    return AGAIN

@route_like(START)
def AGAIN(message, who, host):
    Queue("run/posts").push(message)
    return START
"""
INDEX = """
from salmon.routing import nolocking, route, stateless

@route("(who)@(host)", who=".+", host=".+")
@stateless
@nolocking
def START(message, who, host):
    note()
"""


def missing() -> str | None:
    return None if python() else "PyPI's packages cannot be installed"


def _project(folder: Path, desk: str, index: str, sleep: float) -> int:
    port = free_port()
    files = {
        "config/__init__.py": LOGGING,
        "config/settings.py": SETTINGS.format(port=port),
        "config/boot.py": BOOT,
        "config/queue.py": QUEUE.format(sleep=sleep),
        "config/states.py": STATES,
        "app/__init__.py": "",
        "app/handlers/__init__.py": "",
        "app/handlers/desk.py": desk,
        "app/handlers/index.py": index,
        "logs/.keep": "",
        "run/.keep": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return port


def _command(boot: str) -> list[str]:
    name = boot.rpartition(".")[2]
    program = Path(python() or "").with_name("salmon")
    return [str(program), "start", "--boot", boot, "--pid", f"run/{name}.pid", "--no-daemon"]


@contextlib.contextmanager
def durable(folder: Path) -> Iterator[Listening]:
    """Its receiver and a state function that puts what comes into its queue."""
    port = _project(folder, KEEP, "", 10)
    environment = {"PYTHONPATH": str(folder)}
    with running(_command("config.boot"), folder, environment) as program:
        yield listening(port, program)


@contextlib.contextmanager
def working(folder: Path, *, sleep: float) -> Iterator[Working]:
    """The whole way: receiver, state function, queue, and a queue receiver that looks every so many seconds."""
    ledger = Ledger(folder)
    port = _project(folder, DESK, ledger.note + INDEX, sleep)
    environment = {"PYTHONPATH": str(folder)}
    with (
        running(_command("config.boot"), folder, environment, "boot") as front,
        running(_command("config.queue"), folder, environment, "queue") as behind,
    ):
        yield Working(listening(port, front).port, [front.pid, behind.pid], ledger)
