"""The parent that keeps children alive, and loads the boot anew when it is told to.

Rules:

1. TERM: every child stops taking, finishes what it has, ends. A second TERM, or QUIT: at once. Who has not ended after
   that is killed. Only our own children are ever signalled.
2. A child that dies is replaced, more and more slowly when it dies at once. A child whose receiver is stuck is
   replaced at once and may take its time to end.
3. HUP: a pid file that was removed is written anew. Then a fresh process tries the boot (lamsonq/reload.py). If it
   does not load, nothing changes. If it does, this process becomes a fresh image of itself, which forks new children,
   and sends the old ones away when the new ones listen. One HUP that comes meanwhile is remembered. Where the fresh
   image fails after all, the old children go on without a receiver behind them: when one is missing, that is a reason
   to try again.
4. USR1: stdout and stderr of a daemon are opened anew.
5. The parent has no threads, so that it can fork at any time. Signals come through a pipe: a handler that is written in
   Python would not run for one that comes between the last look for signals and the sleep in poll(), until another one
   ends that sleep.
6. What is there at a fork is shared with the child, until one of them writes to it. The search for garbage would, to
   every object: so it leaves those alone.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lamsonq.child import (
    FAILED,
    GRACE,
    MARGIN,
    READY,
    REPLACE,
    RETIRED,
    SIGNALS,
    STUCK,
    TALLY_LINE,
    Child,
    answer_of,
    end_with,
    flush,
    refusal_of,
    reopen,
)
from lamsonq.errors import Refusal
from lamsonq.jobs import DELIVERIES_MAX
from lamsonq.pidfile import PidFile
from lamsonq.reload import Command, Old, Record, Reload, Trial, become_fresh
from lamsonq.sockets import Listeners
from lamsonq.systemd import notify
from lamsonq.tally import Totals, beside

if TYPE_CHECKING:
    from lamsonq.server import Receiver

_QUICK = 5.0  # a child that lives shorter than this died at once
_SLOWEST = 30.0  # the longest pause before a child is replaced


@dataclass(frozen=True, slots=True)
class Service:
    """What is to run: `boot` gives the receiver and is called in the parent, after the pid file is locked.

    `name` is what `lamsonq status` calls the boot. `grace` is how many seconds a child has to finish what it has begun,
    when the server ends or is loaded anew. `command` is how to start it afresh (None: HUP is refused).
    `output` is where stdout and stderr of a daemon go, without the ends `.out` and `.err`; None is the foreground.
    """

    boot: Callable[[], Receiver]
    pid_file: str
    name: str
    workers: int = 1
    grace: float = GRACE
    command: Command | None = None
    output: str | None = None

    def tell_manager(self, state: str) -> None:
        """A daemon is not what a service manager has started."""
        if self.output is None:
            notify(state)


@dataclass(slots=True)
class Offspring:
    """What the parent knows of a child. `old` is one from before a reload that is not finished yet."""

    pid: int
    status: int  # the reading end of the pipe that it reports on
    born: float
    ready: bool = False
    old: bool = False
    leaving: bool = False  # whether it ends without being missed
    kill_at: float | None = None
    told: bytes = b""  # the line that is not complete yet
    failure: bytes = b""

    def stop(self, grace: float) -> None:
        """Tell it to end, and to finish what it has begun if there is a grace for that."""
        self.kill_at = time.monotonic() + grace + MARGIN
        os.kill(self.pid, signal.SIGTERM if grace else signal.SIGQUIT)


@dataclass(slots=True)
class Parent:
    """Forks, waits, replaces. Has no threads, so that it can fork at any time.

    `receiver` is None in a fresh image whose boot has failed: then `failure` says why.
    """

    service: Service
    receiver: Receiver | None
    pid_file: PidFile
    listeners: Listeners
    report: Callable[[bytes], None]
    totals: Totals
    children: list[Offspring] = field(default_factory=list)
    births: list[float] = field(default_factory=list)  # when the missing children are to be forked
    quick_deaths: int = 0
    terms: int = 0  # how often we were told to stop
    listening: bool = False
    reload: Reload = field(default_factory=Reload)
    failure: bytes = b""
    wake: tuple[int, int] = field(default_factory=os.pipe)
    lifeline: tuple[int, int] = (-1, -1)

    @classmethod
    def first(
        cls,
        service: Service,
        receiver: Receiver,
        pid_file: PidFile,
        listeners: Listeners,
        report: Callable[[bytes], None],
    ) -> Parent:
        totals = Totals(beside(service.pid_file))
        return cls(service, receiver, pid_file, listeners, report, totals, lifeline=os.pipe())

    @classmethod
    def successor(
        cls, service: Service, receiver: Receiver | None, pid_file: PidFile, listeners: Listeners, record: Record
    ) -> Parent:
        """The parent that the fresh image of a running server needs."""
        totals = record.totals or Totals(beside(service.pid_file))
        parent = cls(service, receiver, pid_file, listeners, lambda _: None, totals, lifeline=record.lifeline)
        now = time.monotonic()
        for child in record.children:
            known = Offspring(child.pid, child.status, now, True, not child.leaving, child.leaving)
            if child.leaving:
                known.kill_at = now + service.grace + MARGIN
            parent.children.append(known)
        parent.listening = True
        parent.reload = Reload(replacing=True, again=record.again)
        return parent

    def live(self, failure: Refusal | None = None, *, stop: bool = False) -> bytes:
        """Until the last child has ended; the failure, when the children never listened.

        A successor is told the `failure` of its own boot, and whether it was told to stop meanwhile.
        """
        for fd in self.wake:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self.wake[1], warn_on_full_buffer=False)  # a full pipe wakes us as well
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if stop:
            self._stop_children()
        elif failure is not None:
            self._abandon(failure)
        else:
            self.births = [time.monotonic()] * self.service.workers
        self._bury()
        while self.children or self.reload.trial or (self.births and not self.terms):
            self._listen(self._pause())
            self._bury()
            self._look_at_the_clock()
            self._give_birth()
        self.totals.remove()
        return self.failure

    def _pause(self) -> float | None:
        """Seconds until something is to be done without being told."""
        clocks = [self.totals.due, *(child.kill_at for child in self.children)]
        times = [*self.births, *self.reload.clocks(), *(moment for moment in clocks if moment is not None)]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _listen(self, timeout: float | None) -> None:
        reports = {child.status: child for child in self.children if child.status >= 0}
        trial = self.reload.trial
        poll = select.poll()  # select() cannot watch descriptors beyond 1023
        for fd in (self.wake[0], *reports, *self.reload.watched()):
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000 + 1)]
        for fd in ready:
            if fd in reports:
                self._hear(reports[fd])
        if self.wake[0] in ready:
            for number in os.read(self.wake[0], 512):
                self._obey(number)
        # Not a trial that has just begun: its descriptor may be the number of one that has just been closed.
        if trial is not None and trial is self.reload.trial and trial.fd in ready:
            self._tried(trial.hear())

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._load_anew()
        elif number == signal.SIGUSR1:
            reopen(self.service.output)
            for child in self.children:
                os.kill(child.pid, signal.SIGUSR1)
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stop_children()
        elif number == signal.SIGQUIT:
            self._stop_children(at_once=True)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for child in self.children:
            if child.kill_at is not None and now >= child.kill_at:
                child.kill_at = None
                logging.error("Process %d did not end in time and is killed.", child.pid)
                os.kill(child.pid, signal.SIGKILL)
        trial = self.reload.trial
        if trial is not None and now >= trial.deadline:
            self._tried(trial.late())
        if self.totals.due is not None and now >= self.totals.due:
            self._write_totals()

    def _write_totals(self) -> None:
        working = [child.pid for child in self.children if child.ready and not child.leaving]
        self.totals.write(self.service.name, working, self.service.workers, self.service.grace)

    # -- the end -----------------------------------------------------------------------------------------------

    def _stop_children(self, *, at_once: bool = False) -> None:
        if not self.terms:
            self.service.tell_manager("STOPPING=1")
        self.terms += 1
        at_once = at_once or self.terms > 1
        self.births.clear()
        self.reload.end_trial()
        self.listeners.close()
        for child in self.children:
            if at_once:
                child.stop(0.0)
            elif not child.leaving:  # who was told before would take it for a second time, which is to be quick
                child.stop(self.service.grace)

    # -- children ----------------------------------------------------------------------------------------------

    def _give_birth(self) -> None:
        now = time.monotonic()
        due = [moment for moment in self.births if moment <= now]
        if due and self.receiver is None:
            self.births = [moment for moment in self.births if moment > now]
            if self.reload.trial is None:
                self._load_anew()
            return
        for moment in due:
            try:
                self.children.append(self._fork())  # one after the other: each lets go of what is the others'
            except OSError as error:
                self._cannot_fork(error)
                return
            self.births.remove(moment)

    def _fork(self) -> Offspring:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        flush()
        gc.freeze()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a child must not run the handlers of its parent
        try:
            pid = os.fork()
            if pid == 0:
                end_with(lambda: self._child(reading, writing))
        except OSError:
            os.close(reading)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.close(writing)
        return Offspring(pid, reading, time.monotonic())

    def _cannot_fork(self, error: OSError) -> None:
        """This machine is short of something: the children that there are work on."""
        failure = Refusal(f"cannot start a process: {error.strerror}")
        if not self.listening:
            self.failure = answer_of(failure)
            self._stop_children()
        elif self.reload.replacing:
            self._abandon(failure)
        else:
            logging.error("%s; trying again.", failure)
            later = time.monotonic() + _QUICK
            self.births = [max(moment, later) for moment in self.births]

    def _child(self, reading: int, writing: int) -> int:
        """In the child: let go of what is the parent's own."""
        others = [child.status for child in self.children if child.status >= 0]
        for fd in (reading, *self.wake, self.lifeline[1], *others, *self.reload.watched()):
            os.close(fd)
        self.listeners.forget()
        assert self.receiver is not None
        return Child(self.receiver, writing, self.lifeline[0], self.service.grace, self.service.output).live()

    def _hear(self, child: Offspring) -> None:
        """Read a child's reports."""
        try:
            said = os.read(child.status, 65536)
        except BlockingIOError:  # it has ended, but a process that a handler has forked still holds its end of the pipe
            said = b""
        if not said:
            os.close(child.status)
            child.status = -1
        *lines, child.told = (child.told + said).split(b"\n")
        for line in lines:
            if line == READY:
                child.ready = True
                self._all_ready()
            elif line == STUCK:
                self._is_stuck(child)
            elif line.startswith(TALLY_LINE):
                with contextlib.suppress(ValueError, TypeError):
                    self.totals.add(child.pid, line.removeprefix(TALLY_LINE))
            elif line.startswith(FAILED):
                child.failure = line.removeprefix(FAILED)

    def _is_stuck(self, child: Offspring) -> None:
        if child.leaving or self.terms:
            return
        child.leaving = True  # it has told itself
        child.kill_at = time.monotonic() + self.service.grace + MARGIN
        self.totals.changed()
        if not (self.reload.replacing and child.old):
            self.births.append(time.monotonic())

    def _all_ready(self) -> None:
        fresh = [child for child in self.children if not (child.old or child.leaving)]
        if self.terms or len(fresh) != self.service.workers or not all(child.ready for child in fresh):
            return
        self.totals.changed()
        if self.listening and not self.reload.replacing:
            return
        assert self.receiver is not None
        logging.info("%s with %d process(es).", self.receiver.listening(), self.service.workers)
        self.listeners.settle()
        if self.reload.replacing:
            self._send_old_away()
            self._loaded()
        else:
            self.listening = True
            self._write_totals()
            self.service.tell_manager("READY=1")
            self.report(READY)
            if self.reload.again:
                self._load_anew()

    def _bury(self) -> None:
        """Take leave of the children that have ended. Only our own pids are waited for: handlers have theirs."""
        for child in list(self.children):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                while child.status >= 0:
                    self._hear(child)
                self.children.remove(child)
                self.totals.forget(child.pid)
                self._replace(child, os.waitstatus_to_exitcode(status))

    def _replace(self, child: Offspring, code: int) -> None:
        if self.terms or child.leaving:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        failure = child.failure or answer_of(Refusal(f"process {child.pid} {how} before the server listened"))
        silent = not child.failure and code not in (0, REPLACE, RETIRED)
        # It may have died of its first job, which will be a dead letter soon (lamsonq/jobs.py, rule 2).
        if not self.listening and not (silent and self.quick_deaths < DELIVERIES_MAX):
            self.failure = failure
            self._stop_children()
            return
        if self.reload.replacing and child.old:  # a new one is on its way already
            logging.error("Process %d %s.", child.pid, how)
            return
        if self.reload.replacing and not child.ready:
            self._abandon(refusal_of(failure))
            return
        if code == RETIRED:
            logging.info("Process %d had nothing to do and has ended.", child.pid)
            return
        quick = code != REPLACE and time.monotonic() - child.born < _QUICK
        self.quick_deaths = self.quick_deaths + 1 if quick else 0
        pause = min(_SLOWEST, 0.5 * 2 ** (self.quick_deaths - 2)) if self.quick_deaths > 1 else 0.0
        level = logging.INFO if code == REPLACE else logging.ERROR  # it has said why it is to be replaced
        logging.log(level, "Process %d %s; another one takes its place in %.1f s.", child.pid, how, pause)
        self.births.append(time.monotonic() + pause)

    # -- loading anew ------------------------------------------------------------------------------------------

    def _load_anew(self) -> None:
        """Begin to; or remember it, while that is being done."""
        if self.terms:
            return
        self._renew_pid_file()
        command = self.service.command
        if command is None:
            logging.warning("SIGHUP is ignored: this server was not started by the lamsonq command.")
            return
        self.reload.again = self.reload.under_way or not self.listening
        if self.reload.again:
            return
        # sd_notify(3): a reload is announced with the time, and ended by READY=1, whatever came of it.
        self.service.tell_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        logging.info("Loading anew: a fresh process tries the boot.")
        try:
            self.reload.trial = Trial(command, "trial", self.listeners.to_hand_over(), self.lifeline[0])
        except OSError as error:
            self._not_loaded(Refusal(f"cannot start the process that tries the boot: {error.strerror}"))

    def _renew_pid_file(self) -> None:
        try:
            self.pid_file.renew()
        except Refusal as error:
            logging.error("The PID file was removed, and cannot be written anew: %s", error)

    def _tried(self, answer: Refusal | bool) -> None:
        """What the trial has told; False is nothing yet."""
        if answer is False:
            return
        self.reload.end_trial()
        if isinstance(answer, Refusal):
            self._not_loaded(answer)
        else:
            self._become_fresh()

    def _become_fresh(self) -> None:
        """Hand everything over to a fresh image of this process. Returns only if that cannot be."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes from now on waits for the successor
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.wake[0], 512):
                if number == signal.SIGHUP:
                    self.reload.again = True
                else:
                    self._obey(number)
        failure = ""
        try:
            if not self.terms:
                assert self.service.command is not None
                become_fresh(self.service.command, self._record(), self.pid_file.path)
        except OSError as error:
            failure = error.strerror or str(error)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if failure:
            self._not_loaded(Refusal(f"cannot become a fresh process: {failure}"))

    def _record(self) -> Record:
        return Record(
            "successor",
            self.listeners.to_hand_over(),
            lifeline=self.lifeline,
            pid_file=self.pid_file.fd,
            children=tuple(Old(child.pid, child.status, child.leaving) for child in self.children),
            again=self.reload.again,
            totals=self.totals,
        )

    def _send_old_away(self) -> None:
        old = [child for child in self.children if child.old]
        for child in old:
            child.old = False
            if not child.leaving:  # a stuck one has told itself, and would take this for a second time
                child.leaving = True
                child.stop(self.service.grace)
        logging.info("Loaded anew. The old process(es) finish what they have: %s.", ", ".join(str(c.pid) for c in old))

    def _abandon(self, failure: Refusal) -> None:
        """The fresh image cannot take over after all: back to the old children."""
        self.births.clear()
        self.receiver = None
        self.listeners.undo()
        for child in self.children:
            if child.old:
                child.old = False
            elif not child.leaving:
                child.leaving = True
                child.stop(0.0)
        self._not_loaded(failure)

    def _not_loaded(self, failure: Refusal) -> None:
        logging.error("The boot could not be loaded anew, and everything goes on as before: %s", failure)
        serving = sum(not child.leaving for child in self.children)
        if self.receiver is None and serving < self.service.workers:
            self.births = [time.monotonic() + _SLOWEST]
        self._loaded()

    def _loaded(self) -> None:
        """The reload is over, whatever came of it."""
        self.reload.replacing = False
        self.totals.changed()
        self.service.tell_manager("READY=1")
        if self.reload.again:
            self._load_anew()
