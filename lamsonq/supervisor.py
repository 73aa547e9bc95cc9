"""The parent that keeps children alive, and the child that runs a receiver.

Rules:

1. TERM to the parent: every child stops taking, finishes what it has, ends. A second TERM: quickly. Who has not ended
   after that is killed. Only our own children are ever signalled.
2. A child that dies is replaced, more and more slowly when it dies at once. A child whose receiver is stuck is
   replaced at once and may take its time to end.
3. A child ends when its parent is gone: it holds the reading end of a pipe (the lifeline) whose writing end only the
   parent has.
4. A receiver works in a thread of the child, so that its main thread, where Python runs signal handlers, only waits:
   `stop` is never called in the middle of something else. The parent has no threads, so that it can fork at any time.
"""

from __future__ import annotations

import contextlib
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

if TYPE_CHECKING:
    from lamsonq.server import Receiver

GRACE = 30.0
"""Seconds that a child has after TERM to finish what it has begun."""

MARGIN = 5.0
"""Seconds beyond the grace until a child is killed; also all that a second TERM leaves."""

REPLACE = 86
"""The exit code of a child that ended because its receiver was stuck."""

READY = b"ready\n"  # what a child tells the parent, and the parent tells the starter
_STUCK = b"stuck\n"

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_STARTED_AFTER = 0.25  # a receiver whose start() still works after so many seconds is one that works in start()
_QUICK = 5.0  # a child that lives shorter than this died at once
_SLOWEST = 30.0  # the longest pause before a child is replaced


@dataclass(frozen=True, slots=True)
class Service:
    """What is to run: `boot` gives the receiver and is called in the parent, after the pid file is locked."""

    boot: Callable[[], Receiver]
    pid_file: str
    workers: int = 1
    grace: float = GRACE


@dataclass(slots=True)
class Offspring:
    """What the parent knows of a child."""

    pid: int
    status: int  # the reading end of the pipe that it reports on
    born: float
    ready: bool = False
    leaving: bool = False
    told: bytes = b""


@dataclass(slots=True)
class Parent:
    """Forks, waits, replaces. Has no threads, so that it can fork at any time."""

    service: Service
    receiver: Receiver
    report: Callable[[bytes], None]
    children: list[Offspring] = field(default_factory=list)
    births: list[float] = field(default_factory=list)  # when the missing children are to be forked
    quick_deaths: int = 0
    terms: int = 0  # how often we were told to stop
    kill_at: float | None = None
    listening: bool = False
    failure: bytes = b""
    wake: tuple[int, int] = field(default_factory=os.pipe)
    lifeline: tuple[int, int] = field(default_factory=os.pipe)

    def live(self) -> bytes:
        """Until the last child has ended; the failure, when the children never listened."""
        for fd in self.wake:
            os.set_blocking(fd, False)
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        self.births = [time.monotonic()] * self.service.workers
        while self.children or (self.births and not self.terms):
            self._give_birth()
            self._listen(self._pause())
            self._bury()
            self._kill_late()
        return self.failure

    def _on_signal(self, number: int, _frame: object) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes us as well
            os.write(self.wake[1], bytes([number]))

    def _pause(self) -> float | None:
        """Seconds until something is to be done without being told."""
        times = [*self.births, *([] if self.kill_at is None else [self.kill_at])]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _listen(self, timeout: float | None) -> None:
        reports = {child.status: child for child in self.children if child.status >= 0}
        ready, _, _ = select.select([self.wake[0], *reports], [], [], timeout)
        for fd in ready:
            if fd in reports:
                self._hear(reports[fd])
        if self.wake[0] in ready:
            for number in os.read(self.wake[0], 512):
                self._obey(number)

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP:
            logging.warning("SIGHUP is ignored: stop and start the server to load it anew.")
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stop_children()

    def _stop_children(self) -> None:
        self.terms += 1
        self.births.clear()
        self.kill_at = time.monotonic() + MARGIN + (self.service.grace if self.terms == 1 else 0)
        for child in self.children:
            os.kill(child.pid, signal.SIGTERM)

    def _kill_late(self) -> None:
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            self.kill_at = None
            for child in self.children:
                logging.error("Process %d did not end in time and is killed.", child.pid)
                os.kill(child.pid, signal.SIGKILL)

    def _give_birth(self) -> None:
        now = time.monotonic()
        due = [moment for moment in self.births if moment <= now]
        self.births = [moment for moment in self.births if moment > now]
        for _ in due:
            self.children.append(self._fork())

    def _fork(self) -> Offspring:
        reading, writing = os.pipe()
        flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a child must not run the handlers of its parent
        pid = os.fork()
        if pid == 0:
            end_with(lambda: self._child(reading, writing))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(writing)
        return Offspring(pid, reading, time.monotonic())

    def _child(self, reading: int, writing: int) -> int:
        """In the child: let go of what is the parent's own."""
        others = [child.status for child in self.children if child.status >= 0]
        for fd in (reading, *self.wake, self.lifeline[1], *others):
            os.close(fd)
        return Child(self.receiver, writing, self.lifeline[0], self.service.grace).live()

    def _hear(self, child: Offspring) -> None:
        """Read a child's report: `ready`, `stuck`, or the failure that it ended with."""
        said = os.read(child.status, 65536)
        if not said:
            os.close(child.status)
            child.status = -1
        child.told += said
        if child.told.startswith(READY) and not child.ready:
            child.ready = True
            self._all_ready()
        if _STUCK in child.told and not child.leaving and not self.terms:
            child.leaving = True
            self.births.append(time.monotonic())

    def _all_ready(self) -> None:
        if not self.listening and len(self.children) == self.service.workers and all(c.ready for c in self.children):
            self.listening = True
            logging.info("%s with %d process(es).", self.receiver.listening(), self.service.workers)
            self.report(READY)

    def _bury(self) -> None:
        """Take leave of the children that have ended. Only our own pids are waited for: handlers have theirs."""
        for child in list(self.children):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                while child.status >= 0:
                    self._hear(child)
                self.children.remove(child)
                self._replace(child, os.waitstatus_to_exitcode(status))

    def _replace(self, child: Offspring, code: int) -> None:
        if self.terms or child.leaving:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if not self.listening:
            told = child.told.removeprefix(READY).removeprefix(_STUCK)
            self.failure = told or answer_of(Refusal(f"process {child.pid} {how} before the server listened"))
            self._stop_children()
            return
        quick = code != REPLACE and time.monotonic() - child.born < _QUICK
        self.quick_deaths = self.quick_deaths + 1 if quick else 0
        pause = min(_SLOWEST, 0.5 * 2 ** (self.quick_deaths - 2)) if self.quick_deaths > 1 else 0.0
        logging.error("Process %d %s; another one takes its place in %.1f s.", child.pid, how, pause)
        self.births.append(time.monotonic() + pause)


# ---- a child ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Child:
    """The child: its receiver works in a thread; the main thread waits for what happens."""

    receiver: Receiver
    status: int
    lifeline: int
    grace: float
    events: SimpleQueue[str] = field(default_factory=SimpleQueue)
    failure: BaseException | None = None
    stops: int = 0
    deadline: float | None = None
    stuck: bool = False

    def live(self) -> int:
        signal.signal(signal.SIGTERM, lambda *_: self.events.put("stop"))
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C goes to all: the parent passes it on as TERM
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for work in (self._watch_parent, self._receive):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        event = self._next(_STARTED_AFTER)
        if event in ("started", ""):
            self._say(READY)
        while event != "ended":
            if event == "stop":
                self._stop(self.grace if self.stops == 0 else 0.0)
            elif event == "orphan":
                self._stop(0.0)
            self._look_if_stuck()
            if self.deadline is not None and time.monotonic() > self.deadline:
                break
            event = self._next(1.0 if self.deadline is None else 0.1)
        return self._end()

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

    def _watch_parent(self) -> None:
        os.read(self.lifeline, 1)
        self.events.put("orphan")

    def _stop(self, grace: float) -> None:
        self.stops += 1
        self.deadline = time.monotonic() + grace + MARGIN / 2
        self.receiver.stop(grace)

    def _look_if_stuck(self) -> None:
        if self.receiver.stuck and not self.stuck:
            self.stuck = True
            logging.error("A handler hangs: this process takes no more mail and is replaced.")
            self._say(_STUCK)
            if not self.stops:
                self._stop(self.grace)

    def _say(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the lifeline says so too
            os.write(self.status, text)

    def _end(self) -> int:
        if self.failure is not None:
            logging.error("The receiver failed.", exc_info=self.failure)
            self._say(answer_of(self.failure))
            return self.failure.exit_code if isinstance(self.failure, Refusal) else 1
        return REPLACE if self.stuck or self.receiver.stuck else 0


def answer_of(error: BaseException) -> bytes:
    code = error.exit_code if isinstance(error, Refusal) else 1
    text = str(error) if isinstance(error, Refusal) else reason_of(error)
    return json.dumps([code, text]).encode()


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
    """Before a fork, so that nothing is printed twice; before an end, so that all is."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
