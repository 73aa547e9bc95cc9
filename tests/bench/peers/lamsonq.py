"""lamsonq, started as its users start it: a generated project and `lamsonq start`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..processes import Program, free_port, greets, running, until

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


@dataclass
class Listening:
    port: int
    pids: Sequence[int]


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
    def started(self, boot: str, *, wait: bool = True) -> Iterator[Program]:
        """`lamsonq start` of a boot module; `wait` for its 220."""
        name = boot.rpartition(".")[2]
        command = [sys.executable, "-m", "lamsonq", "start", "-boot", boot, "-pid", f"run/{name}.pid", "--no-daemon"]
        environment = {**ENVIRONMENT, "LAMSONQ_RECEIVER__PORT": str(self.port)}
        with running(command, self.folder, environment, name) as program:
            if wait:
                until(lambda: greets(self.port), "the 220 line", program)
            yield program


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[Listening]:
    """The receiver alone, which drops what it has taken."""
    port = free_port()
    with running([sys.executable, "-c", ENGINE.format(port=port)], folder, ENVIRONMENT) as program:
        until(lambda: greets(port), "the 220 line", program)
        yield Listening(port, [program.pid])


@contextlib.contextmanager
def _spool(folder: Path, url: str) -> Iterator[Listening]:
    project = Project(folder, {"config/spool.py": SPOOL.format(url=url)})
    with project.started("config.spool") as program:
        yield Listening(project.port, [program.pid])


def sqlite(folder: Path) -> contextlib.AbstractContextManager[Listening]:
    """A receiver in front of a queue in SQLite."""
    return _spool(folder, SQLITE)


def maildir(folder: Path) -> contextlib.AbstractContextManager[Listening]:
    """A receiver in front of a queue in a maildir."""
    return _spool(folder, MAILDIR)
