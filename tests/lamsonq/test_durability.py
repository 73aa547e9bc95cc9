"""No 250 before the message is on disk: read off the system calls of a real receiver, with strace.

Each reply names the key under which the message is kept. What makes that durable:

- in a maildir: the file is synced, then renamed to a name with the key, then its folder is synced;
- in a SQLite file: the key is written to the -wal, which is synced after that; and a body that has a file of its own
  is synced, and its folder after it, before the sync of the -wal begins whose row names it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from .clients import Client

PROGRAM = """
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase, route
from lamsonq.server import LMTPReceiver, SMTPReceiver
from lamsonq.state import SQLiteStorage
import signal, sys

way, queue = sys.argv[1:]

router = RoutingBase()
router.STATE_STORE = SQLiteStorage("run/state.db")
router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")

@route("desk@example.com")
def START(message):
    if message["subject"] == "fail":
        raise RuntimeError("boom")
    Queue(queue).push(message)
    return AGAIN

@route("desk@example.com")
def AGAIN(message):
    return START(message)

for function in (START, AGAIN):
    router.register_route("desk@example.com", function)
deliver = None if way == "handle" else Queue(queue).push
receiver = (LMTPReceiver if way == "lmtp" else SMTPReceiver)("127.0.0.1", 0, router=router, deliver=deliver)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # a traced process may get it in any of its threads
receiver.start()
print(receiver.port, flush=True)
signal.sigwait([signal.SIGTERM])
receiver.stop()
receiver.join()
"""

CALL = re.compile(r"^(\d+) +(\w+)\((.*)")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)")
KEY = re.compile(r"\d+\.M\d+P\d+Q\d+(?:R\d+)*")
REPLY = re.compile(rf"250 2\.0\.0 Ok: (?:queued|handled) as ({KEY.pattern})")

MAILDIR, SQLITE = "run/posts", "sqlite:run/q.db?queue=posts"
WAYS = [("handle", MAILDIR), ("spool", MAILDIR), ("handle", SQLITE), ("spool", SQLITE), ("lmtp", SQLITE)]
LARGE = "x" * 70 + "\r\n"


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{'sqlite' if way[1] == SQLITE else 'maildir'}")
def traced(request: pytest.FixtureRequest, here: Path) -> Iterator[tuple[int, Path, str]]:
    """A receiver under strace: its port, the trace, and what it does with a message."""
    if shutil.which("strace") is None:
        message = "strace is not installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    (here / "receiver.py").write_text(textwrap.dedent(PROGRAM))
    trace = here / "trace"
    command = ["strace", "-f", "-y", "-qq", "-s", "5000", "-o", str(trace)]
    calls = ["-e", "trace=fsync,fdatasync,rename,renameat,renameat2,link,sendto,sendmsg,write,pwrite64"]
    server = subprocess.Popen(
        [*command, *calls, sys.executable, "receiver.py", *request.param],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    yield int(server.stdout.readline()), trace, request.param[0]
    for child in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    server.wait(30)


def test_250_is_said_only_after_the_message_is_on_disk(traced: tuple[int, Path, str]) -> None:
    port, trace, way = traced
    _send(port, way, "one", "two", "fail", "large")
    together = [threading.Thread(target=_send, args=[port, way, f"{n}a", f"{n}b", f"large {n}"]) for n in range(3)]
    for client in together:
        client.start()
    for client in together:
        client.join()
    disk = Disk()
    for line in trace.read_text(errors="replace").splitlines():
        disk.read(line)
    assert disk.promised == (4 + 3 * 3) * (2 if way == "lmtp" else 1)


def _send(port: int, way: str, *subjects: str) -> None:
    """Send these, one after another; those that are called large have a body that SQLite keeps in a file."""
    recipients = ["desk@example.com"] * (2 if way == "lmtp" else 1)
    with Client(port, greet=False) as client:
        client.socket.settimeout(60)
        client.say("LHLO client.test" if way == "lmtp" else "EHLO client.test")
        for subject in subjects:
            client.begin(*recipients, sender=f"{subject.replace(' ', '.')}@example.com")
            client.say("DATA")
            body = LARGE * 2000 if "large" in subject else "hello\r\n"
            client.send(f"Subject: {subject}\r\n\r\n{body}.\r\n".encode())
            assert set(client.replies(len(recipients))) == {"250"}


class Disk:
    """What a power failure would leave, call by call of a trace; and whether each 250 may be said."""

    def __init__(self) -> None:
        self.promised = 0
        self._unfinished: dict[str, str] = {}
        self._syncs: dict[str, set[str]] = {}
        """What each sync under way will make durable, by its process."""
        self._waits: dict[str, set[str]] = defaultdict(set)
        """What has been written to a file, or named in a folder, and is not synced yet: keys, bodies, names."""
        self._durable: set[str] = set()
        self._bodies: set[str] = set()
        self._synced: dict[str, set[str]] = defaultdict(set)
        """Of each body: whether the file is synced, and the folder that names it; in any order."""

    def read(self, line: str) -> None:
        if resumed := RESUMED.match(line):
            process, call, rest = resumed.groups()
            self._end(process, call, self._unfinished.pop(process, ""), "= -1" not in rest)
        elif found := CALL.match(line):
            process, call, arguments = found.groups()
            self._begin(process, call, arguments)
            if arguments.endswith("<unfinished ...>"):
                self._unfinished[process] = arguments
            else:
                self._end(process, call, arguments, not re.search(r"= -1 E\w+ \([^)]*\)$", arguments))

    def _begin(self, process: str, call: str, arguments: str) -> None:
        path = _path(arguments)
        if call in ("sendto", "sendmsg", "write") and (keys := REPLY.findall(arguments)):
            self.promised += len(keys)
            assert self._durable.issuperset(keys), f"250 before it is on disk: {arguments}"
        elif call in ("fsync", "fdatasync"):
            self._syncs[process] = set(self._waits[path])
            if path.endswith("q.db-wal"):
                early = self._syncs[process] & self._bodies - self._durable
                assert not early, f"the row is synced before its body: {early}"
        elif call.startswith("rename"):
            source, target = re.findall(r'"([^"]*)"', arguments)[:2]
            if os.path.basename(os.path.dirname(source)) in ("tmp", "held"):
                assert os.path.abspath(source) in self._durable, f"renamed unsynced: {arguments}"
                self._waits[os.path.dirname(os.path.abspath(target))] |= set(KEY.findall(target))

    def _end(self, process: str, call: str, arguments: str, went_well: bool) -> None:
        path = _path(arguments)
        if call in ("fsync", "fdatasync") and went_well:
            done = self._syncs.pop(process)
            self._waits[path] -= done
            for body in done & self._bodies:
                self._synced[body].add(path)
            if path.endswith(("q.db-wal", "q.db", "q.db-bodies")) or os.path.isdir(path):
                self._durable |= done - self._bodies
            elif path not in self._bodies:
                self._durable.add(path)
            self._durable |= {body for body in done & self._bodies if len(self._synced[body]) == 2}
        elif call == "write" and os.path.dirname(path).endswith("-bodies"):
            if path not in self._bodies:  # it has a name since it was made
                self._bodies.add(path)
                self._waits[os.path.dirname(path)].add(path)
            self._waits[path].add(path)
        elif call == "pwrite64" and path.endswith(("q.db-wal", "q.db")):
            named = {body for body in self._bodies if os.path.basename(body) in arguments}
            self._waits[path] |= {*KEY.findall(arguments), *named} - self._durable


def _path(arguments: str) -> str:
    """The file of a call, as strace -y shows it."""
    found = re.match(r"\d+<([^>]*)>", arguments)
    return found[1] if found else ""
