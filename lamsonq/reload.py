"""A reload: a fresh process tries the boot, and only if it loads is it booted for good.

    parent --- HUP: fork, exec ---> trial: boot, bind, answer, end       nothing has changed so far
      |
      +--- exec: the same process, afresh: boot, bind, fork children; when they listen, TERM to the old ones

Rules:

1. The pid stays, and so do the lock on the pid file, the listening sockets and the old children: they are handed over
   by descriptors that survive the exec, and one environment variable that tells which is which.
2. A trial changes nothing. It ends when it has answered, when its time is over, or when its parent is gone.
3. A signal that comes at the exec waits for the fresh image: it is blocked meanwhile.

Two boots instead of one, because a process cannot try itself: after an exec there is no way back. Not
LISTEN_FDS for our own sockets, because a reload needs to know what each was opened for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from lamsonq.child import READY, answer_of, end_with, flush, refusal_of
from lamsonq.errors import Refusal
from lamsonq.sockets import Listener, Listeners, keep
from lamsonq.tally import Totals

if TYPE_CHECKING:
    from lamsonq.server import Receiver

VARIABLE = "LAMSONQ_RELOAD"
"""The environment variable that hands a Record over. It is taken away before anything else happens."""

PATIENCE = 60.0
"""Seconds that a boot may take in a reload."""

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Command:
    """How this server was started: the command's words, where, and with which environment.

    `beside` says that Python looked for modules in this directory first, as `python -m lamsonq` does and the script
    `lamsonq` does not: a project's own queue.py would stand for Python's.
    """

    words: tuple[str, ...]
    directory: str
    environ: dict[str, str]
    beside: bool

    @classmethod
    def here(cls, words: Sequence[str]) -> Command:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
        return cls(tuple(words), os.getcwd(), environ, sys.path[:1] in ([""], [os.getcwd()]))

    def line(self) -> list[str]:
        options = [option for option in _python_options() if option != "-P"]
        return [sys.executable, *options, *([] if self.beside else ["-P"]), "-m", "lamsonq", *self.words]


@dataclass(frozen=True, slots=True)
class Old:
    """A child from before the exec: its pid, the reading end of its pipe, whether it was told to stop."""

    pid: int
    status: int
    leaving: bool


@dataclass(frozen=True, slots=True)
class Record:
    """What one process tells the next: `role` is trial, rehearsal or successor.

    A rehearsal is a trial without any server to inherit from: nothing has been done yet that its options ask for.
    """

    role: str
    listeners: tuple[Listener, ...] = ()
    answer: int = -1
    lifeline: tuple[int, int] = (-1, -1)
    pid_file: int = -1
    children: tuple[Old, ...] = ()
    again: bool = False
    totals: Totals | None = None

    def descriptors(self) -> list[int]:
        """What survives the exec."""
        own = (self.answer, *self.lifeline, self.pid_file)
        fds = [*own, *(each.fd for each in self.listeners), *(each.status for each in self.children)]
        return [fd for fd in fds if fd >= 0]


_inherited: list[Record] = []


def inherited() -> Record | None:
    """What this process was handed over, if it was started by a reload or by `lamsonq restart`. Raises Refusal."""
    text = os.environ.pop(VARIABLE, None)
    if text is not None:
        import msgspec

        try:
            record = msgspec.json.decode(text, type=Record)
            for fd in record.descriptors():
                os.set_inheritable(fd, False)
        except (msgspec.MsgspecError, OSError) as error:
            raise Refusal(f"{VARIABLE} is for lamsonq itself, and holds what cannot be used: {error}") from error
        _inherited[:] = [record]
    return _inherited[0] if _inherited else None


def already_placed() -> bool:
    """Whether this process is a fresh image of a server: it is already who and where its options ask it to be."""
    record = inherited()
    return record is not None and record.role != "rehearsal"


# ---- the trial, from its parent's side -------------------------------------------------------------------------


class Trial:
    """A process that tries the boot. Raises OSError when it cannot be started."""

    def __init__(self, command: Command, role: str, listeners: Sequence[Listener] = (), lifeline: int = -1) -> None:
        self.fd, answer = os.pipe()
        """Readable when there is something to hear."""
        self.deadline = time.monotonic() + PATIENCE
        self._told = b""
        record = Record(role, tuple(listeners), answer, (lifeline, -1))
        flush()
        try:
            self._process = subprocess.Popen(
                command.line(),
                cwd=command.directory,
                env=command.environ | {VARIABLE: encoded(record)},
                stdin=subprocess.DEVNULL,
                pass_fds=record.descriptors(),
                process_group=0,
            )
        except BaseException:
            os.close(self.fd)
            raise
        finally:
            os.close(answer)

    def hear(self) -> Refusal | bool:
        """True when the boot loads, the Refusal when it does not, False while there is no answer yet."""
        said = os.read(self.fd, 65536)
        self._told += said
        if said and not self._told.endswith(b"\n"):
            return False
        if self._told == READY + b"\n":
            return True
        with contextlib.suppress(ValueError, TypeError):
            return refusal_of(self._told)
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return Refusal("the process that tried the boot has closed its answer without giving one")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Refusal(f"the process that tried the boot {how} before it had an answer")

    def late(self) -> Refusal:
        return Refusal(f"the boot took longer than {PATIENCE:g} seconds")

    def wait(self) -> None:
        """Wait for the answer. Raises the Refusal."""
        import select

        try:
            answer: Refusal | bool = False
            while answer is False:
                ready, _, _ = select.select([self.fd], [], [], max(0.0, self.deadline - time.monotonic()))
                answer = self.hear() if ready else self.late()
        finally:
            self.end()
        if isinstance(answer, Refusal):
            raise answer

    def end(self) -> None:
        """Leave nothing of it, whatever it does."""
        os.close(self.fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it has started as well
        self._process.wait()


def rehearse(command: Command) -> None:
    """See whether this command would boot, while a server still has the sockets that it needs. Raises Refusal."""
    try:
        trial = Trial(command, "rehearsal")
    except OSError as error:
        raise Refusal(f"cannot try the boot: {error.strerror}") from error
    trial.wait()


def start_instead(command: Command) -> NoReturn:
    """Run this command in the place of this process. Raises Refusal."""
    line = command.line()
    flush()
    try:
        os.execve(line[0], line, command.environ)
    except OSError as error:
        raise Refusal(f"cannot run {line[0]}: {error.strerror}") from error


# ---- the trial itself ------------------------------------------------------------------------------------------


def answer(record: Record, boot: Callable[[], Receiver]) -> NoReturn:
    """Be a trial: boot, bind, tell what came of it, and end."""
    for number in (*_STOP, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # ends at once: nothing has been begun
    signal.alarm(int(PATIENCE) + 5)
    if record.lifeline[0] >= 0:
        threading.Thread(target=_end_with_parent, args=(record.lifeline[0],), daemon=True).start()
    keep(Listeners(record.listeners, rehearsal=record.role == "rehearsal"))
    try:
        with kept_from_helpers(record):
            boot().bind()
        told = READY
    except BaseException as error:  # a boot may raise anything; the parent makes one line of it
        told = answer_of(error)
    flush()

    def tell() -> int:
        logging.shutdown()
        os.write(record.answer, told + b"\n")
        return 0

    end_with(tell)


_secret: list[int] = []
os.register_at_fork(after_in_child=lambda: _close(_secret))


@contextlib.contextmanager
def kept_from_helpers(record: Record) -> Iterator[None]:
    """A process that is forked in this block, by a boot, has nothing of what was handed over."""
    _secret[:] = record.descriptors()
    try:
        yield
    finally:
        _secret.clear()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


# ---- the exec --------------------------------------------------------------------------------------------------


def become_fresh(command: Command, record: Record) -> None:
    """Replace this process's image. Returns only by an OSError, and then nothing has changed."""
    fds = record.descriptors()
    line = command.line()
    environ = command.environ | {VARIABLE: encoded(record)}
    flush()
    try:
        os.chdir(command.directory)
        for fd in fds:
            os.set_inheritable(fd, True)
        os.execve(line[0], line, environ)
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)


class Interrupted(BaseException):
    """A boot that is not to be waited for any longer. No Exception: a boot must not take it for one of its own."""


@dataclass(slots=True)
class Attention:
    """Signals during a boot: of a first image, or of a successor whose children work meanwhile."""

    told: list[int] = field(default_factory=list)

    @property
    def stop(self) -> bool:
        """Whether the server is to end."""
        return any(number in _STOP for number in self.told)

    @contextlib.contextmanager
    def during(self, patience: float = 0.0) -> Iterator[None]:
        """Raise Interrupted within the block when a signal asks to end, and after so many seconds (0: never).

        Behind the block such signals wait until somebody minds them.
        """

        def interrupt(number: int, _frame: object) -> None:
            self.told.append(number)
            raise Interrupted

        for number in _STOP:
            signal.signal(number, interrupt)
        if patience:
            signal.signal(signal.SIGALRM, interrupt)
            signal.alarm(int(patience))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
        try:
            yield
        finally:
            if patience:
                signal.alarm(0)
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)


def encoded(record: Record) -> str:
    import msgspec

    return msgspec.json.encode(record).decode()


def _python_options() -> list[str]:
    """The options that this Python was started with, before the script or the module."""
    found: list[str] = []
    words = iter(sys.orig_argv[1:])
    for word in words:
        if not word.startswith("-") or word in ("-m", "-c", "-"):
            break
        found.append(word)
        if word in ("-X", "-W"):
            found.append(next(words, ""))
    return found
