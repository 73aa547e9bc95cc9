"""Does a project that runs for long lose anything, do anything twice, or grow?

    python tests/bench/soak.py 200000 -workers 1

A generated project runs as it would for real, two servers with their processes: SMTP -> route -> state function ->
queue -> queue receiver -> handler. Clients send without a pause, by pipelining on several connections, and send again
what was not answered 250. In the middle of the run, which is half of it or longer, the servers are restarted and
reloaded, in turn, over and over, and always under load; the first and the last quarter are left in peace, because
only a process that lives long can show that it grows.

What must hold, or this ends with 1:

1. Every message that was answered 250 is handled. It is handled once, unless its client was cut off before a reply.
2. A restart is the only time at which a connection may be refused; a reload is none.
3. Within a life, and from one quarter of the run to the next, a process keeps its memory, descriptors and threads.
4. Afterwards every queue is empty and whole, the log names no error, and no process is left.

The disk that it takes is bounded: the clients wait while the queue is long.

With -mixed the clients differ: they speak SMTP, some through TLS, and LMTP with a server of its own, and send every
third message by BDAT. Hostile ones are among them all the time: slow ones, talkers of junk, who reset the connection in
the middle of a message and who send too much. And children of all servers are killed: what these had claimed is worked
once more, and every reply that was said still counts. Faults come and go: the queue cannot be written, or the children
of a server get no more descriptors. Meanwhile clients are told 4xx and keep their messages; what had been promised
before holds, and when the fault is over everything goes on by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import random
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import trustme

QUARTERS = ("start", "1/4", "1/2", "3/4", "end")
SERVERS = {"smtp": "config.boot", "queue": "config.queue"}
MIXED = SERVERS | {"lmtp": "config.lmtp"}
HOSTILE = 4
"""Hostile clients of a mixed run, of one kind each."""

BACKLOG = 2000
"""So many messages may wait in the queue before the clients pause."""

PATIENCE = 120.0
"""Seconds after which something that should happen has not."""

NO_FAULT = "no fault"

FAULT = 2.0
"""Seconds that a fault lasts."""

ON_THE_WAY = 1.0
"""Seconds after which a reply that was said before a fault has reached its client."""

LONG = 3600.0
"""The same, for what takes longer the more messages there are."""

GROWTH = 1.10
GROWTH_MB = 4.0
"""How much larger than before a process may be, by factor and beyond it: allocators and caches fill up slowly."""

FIRST_LOOKS = (0.10, 0.23)
LAST_LOOKS = (0.85, 0.97)
"""Shares of the run, in its calm quarters, at which the clients wait until all processes have been looked at."""

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL = 0x80086601, 0x40086602, 0x10
"""linux/fs.h"""

LOG = "logs/lamsonq.log"

AWAY = "tmp.away"
"""Where a queue's tmp is while a file is in its place."""

WORKERS = 10
"""Threads that a receiver starts when there is work for them, at most."""

DESK = """
from lamsonq import queue
from lamsonq.routing import route, route_like, stateless


@route("desk@(host)")
def START(message, host):
    queue.Queue("run/posts").push(message)
    return AGAIN


@route_like(START)
def AGAIN(message, host):
    queue.Queue("run/posts").push(message)
    return START


@route("log@(host)")
@stateless
def LOG(message, host):
    queue.Queue("run/posts").push(message)
"""
INDEX = """
import os

from lamsonq.routing import route, stateless

HANDLED = os.open("handled", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@route("(who)@(host)", who="desk|log")
@stateless
def START(message, who, host):
    os.write(HANDLED, (message["message-id"] + "\\n").encode())
"""
SETTINGS = """
handlers = ["app.handlers.desk"]
queue_config = {"queue": "run/posts", "sleep": 10}
queue_handlers = ["app.handlers.index"]
"""
BEHIND = (
    ("SMTPReceiver(**settings.receiver_config)", 'QueueReceiver(settings.queue_config["queue"])'),
    ("settings.handlers", "settings.queue_handlers"),
    ("also_create=True", "also_create=False"),
)
"""What differs between config/boot.py and config/queue.py."""


# -- the servers ------------------------------------------------------------------------------------------------------


class Project:
    """A generated project and its two servers."""

    def __init__(self, folder: Path, workers: int, *, mixed: bool = False) -> None:
        self.folder = folder / "soak"
        self.workers = workers
        self.servers = MIXED if mixed else SERVERS
        self.posts = self.folder / "run/posts"
        self.begun: set[str] = set()
        """The messages that were being worked when a child was killed or the queue could not be written."""
        self.staged: set[str] = set()
        """What lay in the queue's tmp then: it is never finished."""
        self.expected: list[tuple[int, int]] = []
        """Where the log tells of faults: from octet, to octet."""
        self.port, self.lmtp_port = _free_port(), _free_port()
        self.environment = os.environ | {"LAMSONQ_RECEIVER__PORT": str(self.port)}
        if mixed:
            self.environment["LAMSONQ_RECEIVER__CERTIFICATE_FILE"] = str(_certificate(folder))
            self.environment["LAMSONQ_RECEIVER__SIZE_LIMIT"] = "100000"
        self.lamsonq("gen", str(self.folder), cwd=folder)
        self._write("app/handlers/desk.py", DESK)
        self._write("app/handlers/index.py", INDEX)
        self._write("config/settings.py", self._read("config/settings.py") + SETTINGS)
        boot = self._read("config/boot.py")
        for front, behind in BEHIND:
            assert front in boot, f"config/boot.py has no {front}"
            boot = boot.replace(front, behind)
        self._write("config/queue.py", boot)
        if mixed:
            self._write("config/lmtp.py", self._read("config/boot.py").replace("SMTPReceiver", "LMTPReceiver"))
        self._write("config/logging.toml", self._read("config/logging.toml").replace('"DEBUG"', '"INFO"'))

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def lamsonq(self, *words: str, cwd: Path | None = None, codes: tuple[int, ...] = (0,)) -> str:
        command = [sys.executable, "-m", "lamsonq", *words]
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in codes:
            raise SystemExit(f"lamsonq {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def run(self, word: str, server: str) -> None:
        """Start or restart a server."""
        workers = ("-workers", str(self.workers))
        port = self.lmtp_port if server == "lmtp" else self.port
        self.environment["LAMSONQ_RECEIVER__PORT"] = str(port)
        self.lamsonq(word, "-boot", self.servers[server], "-pid", f"run/{server}.pid", *workers)

    def parent(self, server: str) -> int:
        """Its process id, 0 when it does not run."""
        try:
            return int(self._read(f"run/{server}.pid"))
        except (OSError, ValueError):
            return 0

    def kill(self, server: str) -> None:
        """Kill a child of a server, and wait until another one has taken its place."""
        parent = self.parent(server)
        old = children(parent)
        victim = random.choice(old)
        os.kill(victim, signal.SIGSTOP)  # so that what it has begun does not change while it is noted
        until(lambda: _stands_still(victim), f"child {victim} of {server} stopped")
        self._note_begun(f"{victim}.*")
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(children(parent)) - set(old)) == 1, f"another child of {server}")

    def _note_begun(self, workers: str) -> None:
        """What these workers of the queue have claimed may be worked again; what is in tmp may stay there."""
        for claimed in self.posts.glob(f"claimed/{workers}/*"):
            with contextlib.suppress(FileNotFoundError):
                self.begun |= set(re.findall(r"^Message-ID: (\S+)", claimed.read_text("latin-1"), re.MULTILINE))
        self.staged |= {name for tmp in ("tmp", AWAY) for name in entries(self.posts / tmp)}

    @contextlib.contextmanager
    def fault(self, what: str, server: str) -> Iterator[None]:
        """A fault while this lasts: the queue's store is read-only, or a server's children have no descriptors left."""
        if what == "store":
            with read_only(self.posts):
                self._note_begun("*")
                yield
            return
        victims = children(self.parent(server))
        with contextlib.ExitStack() as stack:
            for victim in victims:
                stack.enter_context(no_descriptors(victim))
            yield
        if set(victims) != set(children(self.parent(server))):
            raise SystemExit(f"{server}: a child has ended because it could open nothing")

    def handled(self) -> int:
        """A number that grows with what is handled."""
        return _size_of(self.folder / "handled")

    def logged(self) -> int:
        """How long the log is, in octets."""
        return _size_of(self.folder / LOG)

    def reload(self, server: str) -> None:
        """Send HUP, and wait until other children have taken over."""
        parent = self.parent(server)
        old = set(children(parent))
        os.kill(parent, signal.SIGHUP)
        until(lambda: self._has_taken_over(parent, old), f"the reload of {server}")

    def _has_taken_over(self, parent: int, old: set[int]) -> bool:
        now = set(children(parent))
        return len(now) == self.workers and not now & old

    def waiting(self) -> int:
        """How many messages wait in the queues or are worked."""
        queues = self.posts, self.folder / "run/undeliverable"
        folders = [queue / sub for queue in queues for sub in ("new", "cur", ".delayed/new")]
        claimed = [worker for queue in queues for worker in queue.glob("claimed/*") if worker.is_dir()]
        return sum(len(entries(folder)) for folder in folders + claimed)

    def processes(self) -> list[int]:
        """Every process that works in this folder, whoever its parent is."""
        return [int(each.name) for each in Path("/proc").glob("[0-9]*") if _link(each / "cwd") == str(self.folder)]

    def troubles(self, *, expected: bool = False) -> list[str]:
        """The lines of the logs that tell of an error: those of a fault, or all others."""
        words = (" ERROR:", " CRITICAL:", "Traceback", "Error:")
        found = []
        for path in (self.folder / "logs").glob("*"):
            at = 0
            for line in path.read_bytes().splitlines(keepends=True):
                within = path == self.folder / LOG and any(low <= at < high for low, high in self.expected)
                at += len(line)
                text = line.decode(errors="replace").rstrip()
                if within == expected and any(word in text for word in words):
                    found.append(text)
        return found

    def size(self) -> float:
        """MB on disk."""
        found = (os.path.join(folder, name) for folder, _, names in os.walk(self.folder) for name in names)
        return sum(_size(path) for path in found) / 1e6


@contextlib.contextmanager
def read_only(queue: Path) -> Iterator[None]:
    """While this lasts, nothing is made, moved or removed in a queue: its folders are immutable (chattr +i), which
    holds for root too. Where that is not allowed, or unknown to the file system, a file takes the place of tmp, so that
    nothing new is put."""
    with contextlib.ExitStack() as stack:
        try:
            for folder, _, _ in os.walk(queue):
                with contextlib.suppress(FileNotFoundError):
                    _set_immutable(folder, True)
                    stack.callback(_set_immutable, folder, False)
        except OSError:
            tmp, away = queue / "tmp", queue / AWAY
            tmp.rename(away)
            stack.callback(away.rename, tmp)
            tmp.touch()
            stack.callback(tmp.unlink)
        yield


def _set_immutable(folder: str, immutable: bool) -> None:
    """As chattr does it; raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        [flags] = struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))
        flags = flags | FS_IMMUTABLE_FL if immutable else flags & ~FS_IMMUTABLE_FL
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(fd)


@contextlib.contextmanager
def no_descriptors(pid: int) -> Iterator[None]:
    """While this lasts, a process can hardly open anything."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def _stands_still(pid: int) -> bool:
    """Whether all threads of a process are stopped."""
    stats = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _certificate(folder: Path) -> Path:
    path = folder / "certificate.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    path.chmod(0o600)
    return path


def entries(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _size_of(path: Path) -> int:
    """In octets."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except OSError:
        return 0


def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    give_up_at = time.monotonic() + patience
    while not condition():
        if time.monotonic() > give_up_at:
            raise SystemExit(f"not seen within {patience:.0f} s: {what}")
        time.sleep(0.05)


# -- the clients ------------------------------------------------------------------------------------------------------


class Ledger:
    """What the clients have to send, and what became of it."""

    def __init__(self, folder: Path, messages: int) -> None:
        self.messages = messages
        self.accepted = 0
        self.cut_off: set[str] = set()
        """Messages whose reply was lost: they may have been taken."""
        self.doubtful: set[str] = set()
        """Messages that were refused in a fault: they may have been seen in the queue before they could be synced."""
        self.troubles: Counter[str] = Counter()
        self.restarting = False
        self.fault = NO_FAULT
        """What just does not work."""
        self.refusals: Counter[tuple[str, int]] = Counter()
        """Replies to messages that were not taken, by fault and code."""
        self.refused: list[str] = []
        self.path = folder / "accepted"
        self.calm_from: int | None = None
        """How many were accepted when the last interruption was over."""
        self._looks = deque(int(messages * share) for share in FIRST_LOOKS)
        """Before more than so many are sent, all processes are looked at: however fast it goes, none is missed."""
        self._next = 0
        self._last: int | None = None
        self._paused = False
        self._lock = threading.Condition()
        self._file = self.path.open("w")

    def take(self) -> int | None:
        """The number of the next message; None when there are no more."""
        with self._lock:
            while self._paused or (self._looks and self._next >= self._looks[0]):
                self._lock.wait()
            if self._next == self._last:
                return None
            self._next += 1
            return self._next

    def pause(self, paused: bool) -> None:
        """Hold the clients back, or let them go on."""
        with self._lock:
            self._paused = paused
            self._lock.notify_all()

    def looked(self, accepted: int) -> None:
        """All processes were looked at, when so many had been accepted."""
        with self._lock:
            while self._looks and accepted >= self._looks[0]:
                self._looks.popleft()
                self._lock.notify_all()

    def calm_down(self) -> None:
        """The interruptions are over: the last quarter follows."""
        with self._lock:
            self.calm_from = self.accepted
            self._last = max(self._next + self.messages // 4, self.messages)
            rest = self._last - self.calm_from
            self._looks.extend(self.calm_from + int(rest * (share - 0.75) / 0.25) for share in LAST_LOOKS)

    @property
    def total(self) -> int:
        return self._last or self.messages

    def progress(self, accepted: int) -> float:
        """Which share of the run that many messages are: a quarter, half of it that is interrupted, a quarter."""
        quarter, calm = self.messages / 4, self.calm_from or self.messages
        if accepted < quarter:
            return accepted / self.messages
        if accepted < calm:
            return 0.25 + 0.5 * (accepted - quarter) / (calm - quarter)
        return 0.75 + 0.25 * (accepted - calm) / max(self.total - calm, 1)

    def accept(self, identity: str) -> None:
        with self._lock:
            self.accepted += 1
            self._file.write(f"{identity}\n")

    def refuse(self, identity: str, code: int) -> None:
        with self._lock:
            self.refusals[self.fault, code] += 1
            if self.fault != NO_FAULT:
                self.doubtful.add(identity)

    def refusals_during(self, fault: str) -> dict[int, int]:
        """How often each code was said."""
        with self._lock:
            return {code: count for (what, code), count in sorted(self.refusals.items()) if what == fault}

    def trouble(self, error: OSError) -> None:
        with self._lock:
            self.troubles[type(error).__name__] += 1
            if isinstance(error, ConnectionRefusedError) and not self.restarting:
                self.refused.append(f"at message {self.accepted}")

    def close(self) -> None:
        self._file.close()


class Client(threading.Thread):
    """Sends one message after the other on one connection, and on a new one when that is gone."""

    def __init__(
        self, port: int, number: int, ledger: Ledger, *, lmtp: bool = False, tls: bool = False, bdat: bool = False
    ) -> None:
        super().__init__(daemon=True, name=f"client {number}")
        self.port = port
        self.lmtp, self.tls, self.bdat = lmtp, tls, bdat
        self.pending: int | None = None
        self.number = number
        self.ledger = ledger

    def run(self) -> None:
        self.pending = self.ledger.take()
        while self.pending is not None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
                    self._talk(connection)
            except OSError as error:
                self.ledger.trouble(error)
                time.sleep(0.02)

    def _talk(self, connection: socket.socket) -> None:
        """Send until nothing is left, or the server says goodbye; `pending` is then the message that was not taken."""
        replies = connection.makefile("rb")
        if _reply(replies.readline) != 220:
            return
        greeting = b"LHLO soak.test\r\n" if self.lmtp else b"EHLO soak.test\r\n"
        connection.sendall(greeting)
        if _reply(replies.readline) != 250:
            return
        if self.tls:
            connection.sendall(b"STARTTLS\r\n")
            if _reply(replies.readline) != 220:
                return
            connection = _UNVERIFIED.wrap_socket(connection)
            replies = connection.makefile("rb")
            connection.sendall(greeting)
            _reply(replies.readline)
        while self.pending is not None:
            sent = self._send(connection, replies.readline, self.pending)
            if sent is None:
                return
            if sent:
                self.pending = self.ledger.take()
        connection.sendall(b"QUIT\r\n")

    def _send(self, connection: socket.socket, readline: Callable[[], bytes], number: int) -> bool | None:
        """Whether it was taken; None when there is a need for a new connection."""
        identity = f"<{number}@soak.test>"
        sender, recipient = f"c{self.number}.{number % 50}@soak.test", ("desk", "log")[number % 2]
        text = f"Message-ID: {identity}\r\nSubject: {number}\r\n\r\n" + "some text\r\n" * random.randint(5, 250)
        envelope = f"MAIL FROM:<{sender}>\r\nRCPT TO:<{recipient}@test.com>\r\n"
        if self.bdat and number % 3 == 0:
            half = len(text) // 2
            pieces = f"BDAT {half}\r\n{text[:half]}", f"BDAT {len(text) - half} LAST\r\n{text[half:]}"
            return self._finish(connection, readline, identity, envelope + pieces[0] + pieces[1], 3)
        connection.sendall(f"{envelope}DATA\r\n".encode())
        codes = []
        for _ in range(3):
            codes.append(_reply(readline))
            if codes[-1] in (0, 421):
                return None
        if codes != [250, 250, 354]:
            self._refused(identity, next(code for code in codes if code not in (250, 354)))
            connection.sendall(b".\r\n" if codes[-1] == 354 else b"RSET\r\n")
            return None if _reply(readline) in (0, 421) else False
        return self._finish(connection, readline, identity, f"{text}.\r\n", 0)

    def _finish(
        self, connection: socket.socket, readline: Callable[[], bytes], identity: str, octets: str, before: int
    ) -> bool | None:
        """Send the rest of a message; its own reply comes behind `before` others."""
        code, refusal = 0, 0
        try:
            connection.sendall(octets.encode())
            for _ in range(before + 1):
                code = 0
                code = _reply(readline)
                if code != 250:
                    refusal = refusal or code
                if code in (0, 421):
                    break
        finally:
            if not code:
                self.ledger.cut_off.add(identity)
        if code == 250:
            self.ledger.accept(identity)
        elif code:
            self._refused(identity, refusal)
        return None if code in (0, 421) else code == 250

    def _refused(self, identity: str, code: int) -> None:
        """The message comes again, after a while."""
        self.ledger.refuse(identity, code)
        time.sleep(0.05)


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


_UNVERIFIED = _unverified()


class Hostile(threading.Thread):
    """A client that means harm, over and over, until it is told to stop. Its messages are never whole."""

    def __init__(self, ports: tuple[int, int], number: int) -> None:
        super().__init__(daemon=True, name=f"hostile {number}")
        self.ports = ports
        self.number = number
        self.visits = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        acts = (self._slowly, self._junk, self._reset, self._too_much)
        while not self.stopping.wait(0.02):
            try:
                with socket.create_connection(("127.0.0.1", random.choice(self.ports)), 5) as connection:
                    acts[self.number % len(acts)](connection)
            except OSError:
                pass  # it is thrown out, or a server is just being restarted
            self.visits += 1

    def _begin(self, connection: socket.socket) -> None:
        lines = b"EHLO evil\r\nLHLO evil\r\nMAIL FROM:<e@soak.test>\r\nRCPT TO:<desk@test.com>\r\nDATA\r\n"
        connection.sendall(lines)

    def _slowly(self, connection: socket.socket) -> None:
        self._begin(connection)
        for _ in range(20):
            connection.sendall(b"X")
            if self.stopping.wait(0.1):
                return

    def _junk(self, connection: socket.socket) -> None:
        connection.sendall(random.randbytes(random.choice((10, 5000, 300_000))))
        connection.recv(1000)

    def _reset(self, connection: socket.socket) -> None:
        self._begin(connection)
        connection.sendall(b"text\r\n" * random.randint(1, 5000))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _too_much(self, connection: socket.socket) -> None:
        self._begin(connection)
        connection.sendall(b"text\r\n" * 50_000 + b".\r\nQUIT\r\n")
        while connection.recv(1000):
            pass


def _reply(readline: Callable[[], bytes]) -> int:
    """The code of a reply, 0 at the end of the connection."""
    line = readline()
    while line[3:4] == b"-":
        line = readline()
    return int(line[:3]) if line else 0


# -- what the processes take ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    """One process at one moment; memory in MB."""

    pid: int
    accepted: int
    pss: float
    rss: float
    fds: int
    threads: int


class Sampler(threading.Thread):
    """Looks at all processes every second, and holds the clients back while the queue is long."""

    def __init__(self, project: Project, ledger: Ledger, every: float) -> None:
        super().__init__(daemon=True, name="sampler")
        self.project = project
        self.ledger = ledger
        self.every = every
        self.samples: dict[str, list[Sample]] = {
            f"{server} {who}": [] for server in project.servers for who in ("parent", "child")
        }
        self.longest = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.wait(self.every):
            self.look()

    def look(self) -> None:
        accepted = self.ledger.accepted
        for role, pid in self._roles():
            sample = _sample(pid, accepted)
            if sample is not None:
                self.samples[role].append(sample)
        self.ledger.looked(accepted)
        waiting = self.project.waiting()
        self.longest = max(self.longest, waiting)
        if not BACKLOG / 2 <= waiting <= BACKLOG:
            self.ledger.pause(waiting > BACKLOG)

    def _roles(self) -> Iterator[tuple[str, int]]:
        for server in self.project.servers:
            if parent := self.project.parent(server):
                yield f"{server} parent", parent
                yield from ((f"{server} child", child) for child in children(parent))

    def at(self, role: str, low: float, high: float) -> Sample | None:
        """The largest that a process of this role was between two shares of the run, number by number."""
        found = [sample for sample in self.samples[role] if low <= self.ledger.progress(sample.accepted) <= high]
        if not found:
            return None
        pid, accepted = found[-1].pid, found[-1].accepted
        most = [max(getattr(sample, name) for sample in found) for name in ("pss", "rss", "fds", "threads")]
        return Sample(pid, accepted, most[0], most[1], int(most[2]), int(most[3]))


def _sample(pid: int, accepted: int) -> Sample | None:
    process = Path(f"/proc/{pid}")
    try:
        words = (process / "smaps_rollup").read_text().split()
        sizes = {name: int(words[words.index(name) + 1]) / 1024 for name in ("Pss:", "Rss:")}
        fds, threads = len(os.listdir(process / "fd")), len(os.listdir(process / "task"))
    except (OSError, ValueError):  # it has ended meanwhile
        return None
    return Sample(pid, accepted, sizes["Pss:"], sizes["Rss:"], fds, threads)


# -- the run ----------------------------------------------------------------------------------------------------------


class Soak:
    """One run: `messages` (or more, as long as it is interrupted) by `clients` connections; `restarts` and `reloads` of
    either server in its middle."""

    def __init__(
        self,
        folder: Path,
        messages: int,
        workers: int,
        clients: int,
        restarts: int,
        reloads: int,
        kills: int = 0,
        faults: int = 0,
        *,
        mixed: bool = False,
    ) -> None:
        self.project = Project(folder, workers, mixed=mixed)
        self.ledger = Ledger(folder, messages)
        self.sampler = Sampler(self.project, self.ledger, max(0.05, min(1.0, messages / 60_000)))
        self.clients = [self._client(number, mixed) for number in range(clients)]
        ports = (self.project.port, self.project.lmtp_port)
        self.hostile = [Hostile(ports, number) for number in range(HOSTILE if mixed else 0)]
        counts = {"restart": restarts, "reload": reloads, "kill": kills, "descriptors": faults, "store": faults}
        self.interruptions = _in_turn(counts, self.project.servers)
        self.read_only = faults > 0
        self.seconds = 0.0
        self.slowest = 0.0
        """Seconds that it took at most until messages were taken and handled again after a fault."""
        self.failures: list[str] = []
        self.notes: list[str] = []

    def _client(self, number: int, mixed: bool) -> Client:
        if not mixed:
            return Client(self.project.port, number, self.ledger)
        lmtp = number % 4 == 3
        port = self.project.lmtp_port if lmtp else self.project.port
        return Client(port, number, self.ledger, lmtp=lmtp, tls=number % 2 == 1, bdat=True)

    def run(self) -> None:
        for server in self.project.servers:
            self.project.run("start", server)
        self._check(len(self.project.processes()) >= 4, "the servers' processes cannot be told by their folder")
        try:
            begun = time.monotonic()
            self.sampler.start()
            for client in [*self.clients, *self.hostile]:
                client.start()
            self._interrupt()
            until(lambda: not any(client.is_alive() for client in self.clients), "the end of the clients", LONG)
            self.seconds = time.monotonic() - begun
            for hostile in self.hostile:
                hostile.stopping.set()
            for hostile in self.hostile:
                hostile.join()
            until(lambda: self.project.waiting() == 0, "the queue empty", LONG)
            self.sampler.stopping.set()
            self.sampler.join()
        finally:
            self.ledger.close()
            self.project.lamsonq("stop", "-ALL", "run")
        self._judge()

    def _interrupt(self) -> None:
        for number, (what, server) in enumerate(self.interruptions, 1):
            share = 0.25 + 0.5 * number / (len(self.interruptions) + 1)
            self._wait_for(share)
            if what == "reload":
                self.project.reload(server)
            elif what == "kill":
                self.project.kill(server)
            elif what in ("store", "descriptors"):
                self._suffer(what, server)
            else:
                self.ledger.restarting = True
                self.project.run("restart", server)
                self.ledger.restarting = False
        self._wait_for(0.75)
        self.ledger.calm_down()

    def _suffer(self, what: str, server: str) -> None:
        """A fault, and what must hold: nothing is promised that is not kept, and afterwards all goes on by itself."""
        begun = self.project.logged()
        self.ledger.fault = f"{what} of {server}"
        with self.project.fault(what, server):
            time.sleep(ON_THE_WAY)
            accepted = self.ledger.accepted
            time.sleep(FAULT - ON_THE_WAY)
            lies = self.ledger.accepted - accepted
        accepted, handled, ended = self.ledger.accepted, self.project.handled(), time.monotonic()
        until(lambda: self.ledger.accepted > accepted, f"a message taken after {self.ledger.fault}")
        until(lambda: self.project.handled() > handled, f"a message handled after {self.ledger.fault}")
        self.slowest = max(self.slowest, time.monotonic() - ended)
        if what == "store":
            self._check(not lies, f"250 was said {lies} times while nothing could be kept")
        self.ledger.fault = NO_FAULT
        self.project.expected.append((begun, self.project.logged()))

    def _wait_for(self, share: float) -> None:
        """Until so much of the run is done."""
        waited, before = time.monotonic(), self.ledger.accepted
        while self.ledger.accepted < share * self.ledger.messages:
            time.sleep(0.02)
            if self.ledger.accepted > before:
                waited, before = time.monotonic(), self.ledger.accepted
            if time.monotonic() - waited > PATIENCE:
                raise SystemExit(f"no message was accepted for {PATIENCE:.0f} s, at message {before}")

    # -- what must hold ------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        self._judge_messages()
        self._judge_connections()
        for role in self.sampler.samples:
            self._judge_growth(role)
        self._judge_what_is_left()

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failures.append(otherwise)

    def _judge_messages(self) -> None:
        accepted = Counter(self.ledger.path.read_text().split())
        handled = Counter((self.project.folder / "handled").read_text().split())
        lost, strange = accepted.keys() - handled.keys(), handled.keys() - accepted.keys()
        repeated = {identity for identity, count in handled.items() if count > 1}
        reasons = {
            "no reply": self.ledger.cut_off,
            "refused in a fault": self.ledger.doubtful,
            "being worked at a kill or a fault": self.project.begun,
        }
        unexplained = repeated.difference(*reasons.values())
        self._check(len(accepted) == self.ledger.total, f"{len(accepted)} of {self.ledger.total} were accepted")
        self._check(not lost, f"lost: {len(lost)}, {sorted(lost)[:5]}")
        self._check(not strange, f"handled and never sent: {sorted(strange)[:5]}")
        self._check(not unexplained, f"handled again, for no reason: {len(unexplained)}, {sorted(unexplained)[:5]}")
        self.notes.append(
            f"{len(accepted)} answered 250, {len(lost)} lost, {len(repeated)} handled more than once, of these "
            + ", ".join(f"{len(repeated & could)} of {len(could)} {reason}" for reason, could in reasons.items())
        )
        self._judge_refusals()

    def _judge_refusals(self) -> None:
        for fault in sorted({fault for fault, _ in self.ledger.refusals}):
            self.notes.append(f"refused, {fault}: {self.ledger.refusals_during(fault)}")
        if self.read_only:
            refused = any(fault.startswith("store") for fault, _ in self.ledger.refusals)
            self._check(refused, "nobody was refused while the queue was read-only")
        never = {(fault, code) for fault, code in self.ledger.refusals if code >= 500}
        self._check(not never, f"refused for ever: {never}")
        if self.project.expected:
            errors = len(self.project.troubles(expected=True))
            self.notes.append(
                f"after a fault it went on within {self.slowest:.1f} s; {errors} lines of the log tell of it"
            )

    def _judge_connections(self) -> None:
        self._check(not self.ledger.refused, f"refused while nothing restarted: {self.ledger.refused[:5]}")
        if self.hostile:
            self.notes.append(f"hostile visits: {[hostile.visits for hostile in self.hostile]}")
        self.notes.append(f"what clients met: {dict(self.ledger.troubles) or 'nothing'}")

    def _judge_growth(self, role: str) -> None:
        # The first messages warm up: pools, caches and modules that are imported when they are used.
        before, after = self.sampler.at(role, 0.10, 0.25), self.sampler.at(role, 0.90, 1.0)
        self._compare(role, "from the first quarter to the last", before, after)
        self._compare(
            role, "within the first quarter", self.sampler.at(role, 0.08, 0.12), self.sampler.at(role, 0.2, 0.25)
        )
        self._compare(
            role, "within the last quarter", self.sampler.at(role, 0.83, 0.87), self.sampler.at(role, 0.95, 1.0)
        )

    def _compare(self, role: str, when: str, before: Sample | None, after: Sample | None) -> None:
        if before is None or after is None:
            self.failures.append(f"{role}: not seen {when}")
            return
        # Not the proportional size: that grows when a process ends that shared pages with this one.
        room = before.rss * GROWTH + GROWTH_MB
        self._check(after.rss <= room, f"{role}: {before.rss:.1f} MB became {after.rss:.1f} {when}")
        more_fds, more_threads = after.fds - before.fds, after.threads - before.threads
        self._check(
            more_fds <= len(self.clients) + len(self.hostile) + 4, f"{role}: {more_fds} more descriptors {when}"
        )
        self._check(more_threads <= WORKERS, f"{role}: {more_threads} more threads {when}")

    def _judge_what_is_left(self) -> None:
        self._check(not self.project.processes(), f"processes are left: {self.project.processes()}")
        troubles = self.project.troubles()
        if ("kill", "queue") in self.interruptions:
            troubles = [line for line in troubles if "was killed by signal 9" not in line]
        self._check(not troubles, f"{len(troubles)} errors in the logs: {troubles[:3]}")
        report = self.project.lamsonq(
            "fsck", "run", "-accepted", str(self.ledger.path), "-handled", "handled", codes=(0, 1)
        )
        self.notes += report.splitlines()[:20]
        self._check("All is accounted for." in report, "fsck does not find all")
        # A write that a kill or a fault has cut short: nobody was told 250 for it, and it goes after its time.
        left = set(entries(self.project.posts / "tmp"))
        self._check(left <= self.project.staged, f"in tmp for no reason: {sorted(left - self.project.staged)[:5]}")
        for line in report.splitlines():
            if line.startswith("run/posts:"):
                line = line.replace(f"tmp {len(left)};", "tmp 0;")
            numbers = [word.strip(",;") for word in line.split() if word.strip(",;").isdigit()]
            self._check(not line.startswith("run/") or set(numbers) == {"0"}, f"not empty: {line}")
        size = self.project.size()
        self.notes.append(
            f"{size:.1f} MB on disk at the end; at most {self.sampler.longest} messages waited in the queue"
        )

    def table(self) -> str:
        """The largest that each process was around the quarter points."""
        lines = [f"{'':24}" + "".join(f"{name:>9}" for name in QUARTERS)]
        for role in self.sampler.samples:
            for name in ("pss", "rss", "fds", "threads"):
                shown = []
                for quarter in range(5):
                    sample = self.sampler.at(role, quarter / 4 - 0.03, quarter / 4 + 0.03)
                    value = getattr(sample, name) if sample else None
                    shown.append("-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value))
                unit = " MB" if name in ("pss", "rss") else ""
                lines.append(f"{role + ' ' + name + unit:24}" + "".join(f"{text:>9}" for text in shown))
        return "\n".join(lines)

    def __str__(self) -> str:
        rate = self.ledger.accepted / self.seconds if self.seconds else 0.0
        counts = Counter(what for what, _ in self.interruptions)
        head = f"{self.ledger.accepted} messages in {self.seconds:.0f} s, {rate:.0f} per second; {dict(counts)}"
        verdict = [f"FAILED: {failure}" for failure in self.failures] or ["Everything holds."]
        return "\n".join([head, self.table(), *self.notes, *verdict])


def _in_turn(counts: dict[str, int], servers: Iterable[str]) -> list[tuple[str, str]]:
    """Interruptions of each kind in turn, each of one server after the other; the store is one for all."""
    spread = sorted(((number + 0.5) / count, kind) for kind, count in counts.items() for number in range(count))
    return [(kind, server) for _, kind in spread for server in (servers if kind != "store" else ("queue",))]


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run of a whole project.")
    parser.add_argument("messages", nargs="?", type=int, default=200_000)
    parser.add_argument("-workers", "--workers", type=int, default=1, help="processes of each server")
    parser.add_argument("-clients", "--clients", type=int, default=8)
    parser.add_argument("-restarts", "--restarts", type=int, default=10, help="of either server")
    parser.add_argument("-reloads", "--reloads", type=int, default=10, help="of either server")
    parser.add_argument(
        "-mixed", "--mixed", action="store_true", help="with TLS, LMTP, BDAT, hostile clients, kills and faults"
    )
    parser.add_argument("-kills", "--kills", type=int, default=10, help="of a child of each server, with -mixed")
    parser.add_argument("-faults", "--faults", type=int, default=5, help="of each kind, with -mixed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lamsonq-soak-") as folder:
        interruptions = given.restarts, given.reloads, *((given.kills, given.faults) if given.mixed else (0, 0))
        soak = Soak(Path(folder), given.messages, given.workers, given.clients, *interruptions, mixed=given.mixed)
        soak.run()
        print(soak)
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
