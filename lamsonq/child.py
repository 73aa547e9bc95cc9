"""The child of a server: it runs the boot's receiver, and tells its parent how that goes.

Rules:

1. TERM: the receiver stops taking, finishes what it has, and the child ends. QUIT, a second TERM or the end of the
   parent: what has been begun is given back at once. (QUIT, because two TERMs that come together are one.)
2. A child ends when its parent is gone: it holds the reading end of a pipe (the lifeline) whose writing end only the
   parent has.
3. A receiver works in a thread, so that the main thread only waits: `stop` is never called in the middle of something
   else. Signals come through a pipe: Python runs their handlers in the main thread, but of two signals that come
   together the kernel gives one to another thread (signal(7)), and then nothing wakes the main thread for it.
4. Large blocks of memory go back to the system when they are freed. The C library would stop doing so by itself, and
   what is small and lives on then keeps the room of large ones between it: a server would grow for days.
5. What a child tells is lines in a pipe: `ready`, `stuck`, `tally ...`, `failed ...`. It never waits for its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NoReturn

from lamsonq.errors import Refusal, reason_of
from lamsonq.events import register_event_consumer
from lamsonq.tally import EVERY, TALLY

if TYPE_CHECKING:
    from lamsonq.server import Receiver

GRACE = 30.0
"""Seconds that a child has after TERM to finish what it has begun."""

MARGIN = 5.0
"""Seconds beyond the grace until a child is killed; also all that a second TERM leaves."""

REPLACE = 86
"""The exit code of a child that ended because its receiver was stuck."""

RETIRED = 87
"""The exit code of a child that ended because it had nothing to do, and is not to be replaced."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
"""The signals that a server minds. They are blocked wherever nobody could mind them: at a fork, at an exec."""

_EVENTS: dict[int, str] = {signal.SIGTERM: "stop", signal.SIGQUIT: "quit", signal.SIGUSR1: "reopen"}
"""Not of INT: Ctrl-C goes to all, and the parent passes it on as TERM."""

READY = b"ready"
STUCK = b"stuck"
TALLY_LINE = b"tally "
FAILED = b"failed "

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 128 * 1024
"""Octets of a block that is mapped for itself: what glibc begins with. Messages may be larger."""

LOOK_EVERY = 30.0
"""Seconds between two looks whether a receiver is stuck that does not say so itself."""

_STARTED_AFTER = 0.25  # a receiver whose start() still works after so many seconds is one that works in start()


@dataclass(slots=True)
class Child:
    """The child: its receiver works in a thread; the main thread waits for what happens."""

    receiver: Receiver
    status: int
    lifeline: int
    grace: float
    output: str | None
    events: SimpleQueue[str] = field(default_factory=SimpleQueue)
    failure: BaseException | None = None
    stops: int = 0
    deadline: float | None = None
    stuck: bool = False
    told: bytes = b""
    tell_at: float = 0.0
    untold: bool = False

    def live(self) -> int:
        _map_large_blocks()
        os.set_blocking(self.status, False)
        signals = self._hear_signals()
        self.told = TALLY.told()
        register_event_consumer(TALLY)
        for work, *args in ((self._watch, signals), (self._receive,)):
            threading.Thread(target=work, args=args, name=work.__name__, daemon=True).start()
        event = self._next(_STARTED_AFTER)
        if event in ("started", "") or (event == "ended" and self.failure is None):  # it may have had little to do
            self._say(READY)
        TALLY.on_news = lambda: self.events.put("news")
        while event != "ended":
            if event == "stop":
                self._stop(self.grace if self.stops == 0 else 0.0)
            elif event in ("quit", "orphan"):
                self._stop(0.0)
            elif event == "reopen":
                reopen(self.output)
            self._look_if_stuck()
            self._tell()
            if self.deadline is not None and time.monotonic() > self.deadline:
                break
            event = self._next(self._patience())
        return self._end()

    def _patience(self) -> float:
        """Seconds until the next look, if nothing happens."""
        if self.deadline is not None:
            return 0.1
        return max(0.0, self.tell_at - time.monotonic()) if self.untold else LOOK_EVERY

    def _next(self, timeout: float) -> str:
        try:
            return self.events.get(timeout=timeout)
        except Empty:
            return ""

    def _receive(self) -> None:
        try:
            self.receiver.start()
            self.events.put("started")
            self.receiver.join()
        except BaseException as error:  # it would be lost with this thread: the main thread reports it
            self.failure = error
        self.events.put("ended")

    def _hear_signals(self) -> int:
        """Let signals come; the descriptor from which their numbers can be read."""
        signals, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what comes to a handler's is not for us
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that a handler starts would inherit
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return signals

    def _watch(self, signals: int) -> None:
        """Wait for signals, and for the end of the parent."""
        poll = select.poll()
        for fd in (signals, self.lifeline):
            poll.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if signals in ready:
                for number in os.read(signals, 512):
                    if number in _EVENTS:
                        self.events.put(_EVENTS[number])
            if self.lifeline in ready:
                self.events.put("orphan")
                poll.unregister(self.lifeline)

    def _stop(self, grace: float) -> None:
        self.stops += 1
        self.deadline = time.monotonic() + grace + MARGIN / 2
        self.receiver.stop(grace)

    def _look_if_stuck(self) -> None:
        if self.receiver.stuck and not self.stuck:
            self.stuck = True
            logging.error("A handler hangs: this process takes no more mail and is replaced.")
            self._say(STUCK)
            if not self.stops:
                self._stop(self.grace)

    def _tell(self, *, now: bool = False) -> None:
        """Tell what has been handled, if there is news and it was not told a moment ago."""
        self.untold = not now and time.monotonic() < self.tell_at
        if self.untold:
            return
        told = TALLY.told()
        if told != self.told:
            self.told = told
            self.tell_at = time.monotonic() + EVERY
            self._say(TALLY_LINE + told)

    def _say(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody listens: the lifeline says so too; or not yet, and the pipe is full
            os.write(self.status, line + b"\n")

    def _end(self) -> int:
        self._tell(now=True)
        if self.failure is not None:
            logging.error("The receiver failed.", exc_info=self.failure)
            self._say(FAILED + answer_of(self.failure))
            return self.failure.exit_code if isinstance(self.failure, Refusal) else 1
        # A receiver of the user's own may know of neither.
        if self.stuck or self.receiver.stuck or getattr(self.receiver, "worn_out", False):
            return REPLACE
        return RETIRED if getattr(self.receiver, "retired", False) else 0


def _map_large_blocks() -> None:
    """Rule 4. A threshold that is set is one that glibc no longer raises (mallopt(3))."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def answer_of(error: BaseException) -> bytes:
    """What another process is told of an error, in one line: exit code and text."""
    code = error.exit_code if isinstance(error, Refusal) else 1
    text = str(error) if isinstance(error, Refusal) else reason_of(error)
    return json.dumps([code, text]).encode()


def refusal_of(answer: bytes) -> Refusal:
    """The Refusal that another process has told. Raises ValueError for what is no answer."""
    code, text = json.loads(answer)
    refusal = Refusal(text)
    refusal.exit_code = code
    return refusal


def end_with(life: Callable[[], int]) -> NoReturn:
    """Live in a forked process, and end it: it must not return into its parent's code, whatever happens."""
    code = 1
    try:
        code = life()
    except BaseException:
        logging.exception("The process ends because of an error of its own.")
    finally:
        logging.shutdown()
        flush()
        os._exit(code)


def flush() -> None:
    """Before a fork or an exec, so that nothing is printed twice or lost; before an end, so that all is."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def reopen(output: str | None) -> None:
    """Write stdout and stderr to `<output>.out` and `.err`, which logrotate may have moved away; None: leave them."""
    if output is None:
        return
    flush()
    for end, standard in (("out", 1), ("err", 2)):
        try:
            fd = os.open(f"{output}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        except OSError as error:
            logging.error("%s.%s cannot be opened again: %s; the old one goes on", output, end, error.strerror)
            continue
        os.dup2(fd, standard)
        os.close(fd)
