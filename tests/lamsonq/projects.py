"""Projects of tests, and what runs in them: real commands, real parents and children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from lamsonq import pidfile
from lamsonq.errors import Refusal

from .waiting import until

ROOT = str(Path(pidfile.__file__).parents[1])
ENVIRON = {**os.environ, "PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1"}

BOOT = """
import os, threading
from config import settings
from lamsonq.errors import Refusal

class Waiting:
    '''Listens to nothing, and notes what is asked of it.'''
    stuck = False
    drains = True
    def __init__(self):
        self.stopped = threading.Event()
    def note(self, what):
        with open("run/notes", "a") as file:
            file.write(f"{what} {os.getpid()}\\n")
    def bind(self):
        self.note("bind")
    def start(self):
        self.note("start")
    def stop(self, grace=30.0):
        self.note(f"stop({grace:.0f})")
        if self.drains or not grace:
            self.stopped.set()
    def join(self):
        self.stopped.wait()
    def listening(self):
        return "waiting"

settings.receiver = Waiting()
"""


class Project:
    """A project of a test, and the command line in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "config").mkdir()
        (path / "run").mkdir()
        (path / "config" / "__init__.py").touch()
        (path / "config" / "settings.py").write_text("receiver = None\n")
        self.boot("")

    def boot(self, more: str) -> None:
        (self.path / "config" / "boot.py").write_text(BOOT + more)

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "lamsonq", *args]

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args), cwd=self.path, env=ENVIRON, capture_output=True, text=True, timeout=60, check=False
        )

    def start(self, *args: str) -> int:
        """Start a server that has to come up; the pid of its parent."""
        done = self.run("start", *args)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return self.pid()

    def pid(self) -> int:
        return int((self.path / "run" / "smtp.pid").read_text())

    def wait_until_it_listens(self) -> None:
        """For one that was started in the foreground."""
        until((self.path / "run" / "smtp.status").exists)

    def noted(self, what: str) -> list[int]:
        """The pids of the processes that have noted this."""
        notes = self.path / "run" / "notes"
        lines = notes.read_text().splitlines() if notes.exists() else []
        return [int(line.split()[1]) for line in lines if line.split()[0] == what]

    def wait_for(self, what: str, count: int) -> list[int]:
        until(lambda: len(self.noted(what)) >= count)
        return self.noted(what)

    def clean_up(self) -> None:
        for path in self.path.glob("run/*.pid"):
            try:
                running = pidfile.find(str(path))
            except Refusal:
                continue
            if running is not None:
                running.signal(signal.SIGKILL)
                running.wait(5)
                running.close()


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


MAIL_BOOT = """
import logging
from logging.handlers import WatchedFileHandler
from config import settings
from lamsonq.queue import Queue
from lamsonq.routing import Router
from lamsonq.server import QueueReceiver, SMTPReceiver
logging.basicConfig(
    handlers=[WatchedFileHandler("run/log")], level="INFO", format="[%(process)d] %(levelname)s: %(message)s"
)
Router.load(["handlers"])
Router.UNDELIVERABLE_QUEUE = {undeliverable}
settings.receiver = {receiver}
"""

MAIL_HANDLERS = """
import os, time
from lamsonq.routing import route, stateless

VERSION = 1

@route("desk@example.com")
@stateless
def START(message):
    while os.path.exists("run/hold") and message["subject"] == "slow":
        time.sleep(0.01)
    line = f"{VERSION} {message['message-id']}\\n"
    with open("run/handled", "a") as file:
        file.write(line)
"""


class MailProject(Project):
    """A project that takes mail at `port`, or works the queue run/jobs; its handler notes what it has seen."""

    def __init__(self, path: Path, port: int) -> None:
        super().__init__(path)
        self.port = port
        (path / "handlers.py").write_text(MAIL_HANDLERS)
        self.listen_on(port)

    def listen_on(self, port: int) -> None:
        self.receive(f"SMTPReceiver('127.0.0.1', {port}, hostname='localhost')", "Queue('run/undeliverable')")

    def receive(self, receiver: str, undeliverable: str = "None") -> None:
        boot = MAIL_BOOT.format(receiver=receiver, undeliverable=undeliverable)
        (self.path / "config" / "boot.py").write_text(boot)

    def version(self, number: int) -> None:
        """Change the handler."""
        (self.path / "handlers.py").write_text(MAIL_HANDLERS.replace("VERSION = 1", f"VERSION = {number}"))

    def handled(self) -> list[tuple[int, str]]:
        """(version of the handler, Message-ID) of everything that was handled."""
        path = self.path / "run" / "handled"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(version), name) for version, name in (line.split() for line in lines)]

    def log(self) -> str:
        path = self.path / "run" / "log"
        return path.read_text() if path.exists() else ""

    def reload(self, *, old_stay: bool = False) -> None:
        """Load anew, and wait until the old processes have gone, unless they are to stay."""
        done, old = self.log().count("Loaded anew."), children_of(self.pid())
        os.kill(self.pid(), signal.SIGHUP)
        until(lambda: self.log().count("Loaded anew.") > done)
        until(lambda: old_stay or all(gone(pid) for pid in old))


def children_of(pid: int) -> list[int]:
    """The processes that this one has forked and not waited for, zombies too."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def holdings(pid: int) -> dict[str, int]:
    """What a process holds: descriptors, threads, children."""
    return {
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "children": len(children_of(pid)),
    }
