"""A reload: a fresh process tries the boot, and only if it loads is it booted for good.

    parent --- HUP: fork, exec ---> trial: boot, bind, answer, end       nothing has changed so far
      |
      +--- exec: the same process, afresh: boot, bind, fork children; when they listen, TERM to the old ones

Rules:

1. The pid stays, and so do the lock on the pid file, the listening sockets and the old children: they are handed over
   by descriptors that survive the exec, and one environment variable that tells which is which.
2. That variable is believed only together with the very descriptors that it tells of: a fresh image holds the locked
   pid file with its pid in it, a trial the pipe for its answer. Whatever else is found in it counts for nothing.
3. A trial changes nothing. It ends when it has answered, when its time is over, or when its parent is gone.
4. A signal that comes at the exec waits for the fresh image: it is blocked meanwhile.
5. What a boot forks is no part of the server: it has none of its descriptors, and its own signals.

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
from typing import TYPE_CHECKING, Literal, NoReturn

from lamsonq import pidfile
from lamsonq.child import READY, SIGNALS, answer_of, end_with, flush, refusal_of
from lamsonq.errors import Refusal
from lamsonq.sockets import Listener, Listeners, keep
from lamsonq.tally import Totals

if TYPE_CHECKING:
    from lamsonq.server import Receiver

VARIABLE = "LAMSONQ_RELOAD"
"""The environment variable that hands a Record over. It is taken away before anything else is run or started."""

PATIENCE = 60.0
"""Seconds that a boot may take in a reload."""

Role = Literal["trial", "rehearsal", "successor"]
"""What a process of a reload is to be. A rehearsal is a trial without any server to inherit from: nothing has been done
yet that its options ask for."""

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
        own = (VARIABLE, *(name for name in os.environ if name.startswith("LISTEN_")))
        environ = {name: value for name, value in os.environ.items() if name not in own}
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
    """What one process tells the next: what it is to be, and which descriptors are what."""

    role: Role
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


def inherited(pid_file: str) -> Record | None:
    """What this process was handed over, if it was started by a reload or by `lamsonq restart`.

    `pid_file` is the path of the one that its options name.
    """
    text = os.environ.pop(VARIABLE, None)
    if text is not None:
        record = _believed(text, pid_file)
        if record is None:
            # Not by logging.warning(), which would configure logging before the boot does.
            logging.getLogger().warning("%s in the environment is ignored: it is lamsonq's own.", VARIABLE)
        else:
            for fd in record.descriptors():
                os.set_inheritable(fd, False)
            _inherited[:] = [record]
    return _inherited[0] if _inherited else None


def _encoded(record: Record) -> str:
    """Numbers of descriptors could be anybody's, so the text also tells which files stand behind them."""
    import msgspec

    return msgspec.json.encode((record, _files(record))).decode()


def _believed(text: str, pid_file: str) -> Record | None:
    """What `_encoded` has written, for this process; None for everything else."""
    import msgspec

    try:
        record, files = msgspec.json.decode(text, type=tuple[Record, list[int]])
        fresh = record.role == "successor"
        proven = pidfile.is_own(record.pid_file, pid_file) if fresh else record.answer >= 0
        return record if proven and files == _files(record) else None
    except (msgspec.MsgspecError, ValueError, OverflowError, OSError):
        return None


def _files(record: Record) -> list[int]:
    """The inode numbers of what is handed over. Raises OSError."""
    return [os.fstat(fd).st_ino for fd in record.descriptors()]


def already_placed() -> bool:
    """Whether this process is a fresh image of a server: it is already who and where its options ask it to be."""
    return any(record.role != "rehearsal" for record in _inherited)


# ---- the trial, from its parent's side -------------------------------------------------------------------------


class Trial:
    """A process that tries the boot. Raises OSError when it cannot be started."""

    def __init__(self, command: Command, role: Role, listeners: Sequence[Listener] = (), lifeline: int = -1) -> None:
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
                env=command.environ | {VARIABLE: _encoded(record)},
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


@dataclass(slots=True)
class Reload:
    """How far the reload of a server is: the boot is on trial, then new children are to take the place of old ones.

    `again` says that another HUP came meanwhile.
    """

    trial: Trial | None = None
    replacing: bool = False
    again: bool = False

    @property
    def under_way(self) -> bool:
        return self.replacing or self.trial is not None

    def watched(self) -> list[int]:
        """The descriptor on which there may be something to hear."""
        return [] if self.trial is None else [self.trial.fd]

    def clocks(self) -> list[float]:
        """When there is something to do if nothing was heard."""
        return [] if self.trial is None else [self.trial.deadline]

    def end_trial(self) -> None:
        if self.trial is not None:
            trial, self.trial = self.trial, None
            trial.end()


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
        with apart(record.descriptors()):
            receiver = boot()
        receiver.bind()
        told = READY
    except BaseException as error:  # a boot may raise anything; the parent makes one line of it
        told = answer_of(error)
    flush()

    def tell() -> int:
        logging.shutdown()
        os.write(record.answer, told + b"\n")
        return 0

    end_with(tell)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


# ---- a boot ----------------------------------------------------------------------------------------------------

_ours: list[int] | None = None  # while a boot runs: the descriptors that are not for what it forks


@contextlib.contextmanager
def apart(fds: Sequence[int]) -> Iterator[None]:
    """In this block, which is for a boot, a process that is forked is none of ours: it has none of these descriptors
    (whoever waits for the end of a pipe would wait for that process too) and none of our signal handlers, and it ends
    where it would leave the block and be a second server."""
    global _ours
    we, _ours = os.getpid(), list(fds)
    try:
        yield
    finally:
        _ours = None
        if os.getpid() != we:
            error = sys.exception()
            if not isinstance(error, SystemExit):
                logging.error("A process that the boot has forked does not end by itself.", exc_info=error)
            end_with(lambda: 1)


def _part() -> None:
    """In a process that a boot has forked."""
    global _ours
    if _ours is None:
        return
    for fd in _ours:
        with contextlib.suppress(OSError):
            os.close(fd)
    _ours = None
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


os.register_at_fork(after_in_child=_part)


# ---- the exec --------------------------------------------------------------------------------------------------


def become_fresh(command: Command, record: Record, pid_file: str) -> None:
    """Replace this process's image. Returns only by an OSError, and then nothing has changed."""
    fds = record.descriptors()
    line = command.line()
    text = _encoded(record)
    if _believed(text, pid_file) is None:  # nor would the fresh image believe it, and that would be the server's end
        raise OSError(f"the PID file {pid_file} is not as it was written: remove it, and try again")
    environ = command.environ | {VARIABLE: text}
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
