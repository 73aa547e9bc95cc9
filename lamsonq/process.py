"""One boot is one pid file is one parent, which keeps its children alive; each child runs the boot's receiver.

    lamsonq start ---fork---> parent: lock the pid file, boot, bind ---fork---> child: start, join
         |                      |                                               child: start, join
         +---- waits until all children listen, or one failed ------+

At HUP the parent runs the same command again, as a trial, and then in its own place (lamsonq/reload.py).

Rules:

1. What can fail is done before `start` returns: it ends with 0 when the children listen, else with one line and a code.
2. The pid file is locked before the boot, and goes when the last child has ended (lamsonq/supervisor.py). It stays
   locked through a reload.
3. `stop` signals only who holds its pid file (lamsonq/pidfile.py), and waits until it has ended.
4. A server that root has started for another user lets go of root for good when its ports are taken, before any child
   is forked (lamsonq/identity.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from lamsonq import identity, pidfile, reload, sockets, tally
from lamsonq.child import GRACE, MARGIN, READY, REPLACE, SIGNALS, answer_of, end_with, flush, refusal_of, reopen
from lamsonq.errors import Refusal
from lamsonq.sockets import Listener, Listeners
from lamsonq.supervisor import Parent, Service

if TYPE_CHECKING:
    from lamsonq.server import Receiver

__all__ = ["GRACE", "REPLACE", "Service", "resume", "run", "start", "stop"]

OUTPUT = "logs/lamsonq"
"""Where a daemon's stdout and stderr go, with `.out` and `.err` behind it."""


def start(service: Service) -> None:
    """Run the service as a daemon. Returns when it listens; raises the Refusal that ended it otherwise."""
    passed = sockets.passed()
    service = replace(service, output=os.path.abspath(OUTPUT))
    with contextlib.ExitStack() as logs:
        flush()
        out, err = (logs.enter_context(_append(f"{OUTPUT}.{end}")) for end in ("out", "err"))
        reading, writing = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            raise Refusal(f"cannot start a process: {error.strerror}") from error
        if pid == 0:
            os.close(reading)
            end_with(lambda: _daemon(service, passed, writing, out, err))
        os.close(writing)
    os.waitpid(pid, 0)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    if not answer:
        raise Refusal("the server ended before it listened; logs/lamsonq.err may tell why")
    _raise_answer(answer)


def run(service: Service) -> None:
    """Run the service in the foreground until it is stopped; tells systemd when it listens. Raises Refusal."""
    answers: list[bytes] = []
    _serve(service, sockets.passed(), answers.append)
    _raise_answer(answers[-1] if answers else READY)


def resume(service: Service, record: reload.Record, *, daemon: bool) -> None:
    """What `start` or `run` does in a process that a reload has started: be its trial, or its fresh image.

    Returns when the server has ended, if it is one of the foreground.
    """
    if record.role != "successor":
        reload.answer(record, service.boot)
    elif daemon:
        end_with(lambda: _succeed(replace(service, output=os.path.abspath(OUTPUT)), record))
    else:
        _succeed(service, record)


@contextlib.contextmanager
def _append(path: str) -> Iterator[int]:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise Refusal(f"cannot write {path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _daemon(service: Service, passed: Sequence[Listener], writing: int, out: int, err: int) -> NoReturn:
    """The double fork: a process without terminal, parent or session to die with."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.setpgid(0, 0)  # its own group, so that -KILL reaches the children too
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(fd, standard)
        if fd > 2:
            os.close(fd)  # a log that logrotate has moved away is to be let go of
    waiting = [writing]  # whoever started us waits until nobody holds this end any more

    def report(answer: bytes) -> None:
        if waiting:
            os.write(writing, answer)
            os.close(waiting.pop())

    os.register_at_fork(after_in_child=lambda: os.close(waiting.pop()) if waiting else None)
    end_with(lambda: _serve(service, passed, report))


def _raise_answer(answer: bytes) -> None:
    """Raise the Refusal that another process has reported."""
    if answer != READY:
        raise refusal_of(answer)


def _serve(service: Service, passed: Sequence[Listener], report: Callable[[bytes], None]) -> int:
    """The life of the parent. `report` is called when all children listen, or with the failure that ended it.

    Returns the exit code.
    """
    # A reload or a logrotate that is asked for this early would end us: it waits until we can do it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    pid_file = pidfile.PidFile(service.pid_file)
    listeners = Listeners(passed)
    attention = reload.Attention()
    failure = b""
    try:
        with attention.during():
            pid_file.take()
            receiver = _bound(service, listeners, [each.fd for each in passed])
        failure = Parent.first(service, receiver, pid_file, listeners, report).live(stop=attention.stop)
    except reload.Interrupted:
        logging.info("The server was told to stop before it listened.")
    except Refusal as error:
        failure = answer_of(error)
    except Exception as error:  # a boot and a bind() may be a user's: the starter gets one line, the log the rest
        logging.exception("The server could not be started.")
        failure = answer_of(error)
    finally:
        pid_file.give_back()
    if failure:
        report(failure)
    return 1 if failure else 0


def _succeed(service: Service, record: reload.Record) -> int:
    """The life of the parent in a fresh image of itself: its children, its lock and its sockets are there."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    reopen(service.output)
    pid_file = pidfile.PidFile(service.pid_file)
    listeners = Listeners(record.listeners)
    attention = reload.Attention()
    receiver: Receiver | None = None
    failure: Refusal | None = None
    try:
        with attention.during(reload.PATIENCE):
            receiver = _bound(service, listeners, record.descriptors())
    except reload.Interrupted:
        failure = Refusal(f"the boot took longer than {reload.PATIENCE:g} seconds")
    except BaseException as error:  # whatever it is, the old children work on
        failure = refusal_of(answer_of(error))
    pid_file.resume(record.pid_file)  # not before: what the boot forks would close the descriptor twice
    try:
        parent = Parent.successor(service, None if failure else receiver, pid_file, listeners, record)
        parent.live(failure, stop=attention.stop)
    finally:
        pid_file.give_back()
    return 0


def _bound(service: Service, listeners: Listeners, fds: Sequence[int]) -> Receiver:
    """Boot and bind. Processes that the boot forks do not have these descriptors."""
    sockets.keep(listeners)
    with reload.apart(fds):
        receiver = service.boot()
    if hasattr(receiver, "processes"):  # one that has limits, of which each process gets its share
        receiver.processes = service.workers
    receiver.bind()
    identity.give_up_root()
    return receiver


def stop(
    pid_files: list[str],
    kill: bool = False,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = logging.warning,
) -> list[Refusal]:
    """Stop the processes of these pid files, all at once, and wait until they have ended; what went wrong."""
    troubles: list[Refusal] = []
    going = []
    for path in pid_files:
        try:
            running = pidfile.find(path)
            if running is not None:
                say(f"Attempting to stop lamsonq at pid {running.pid}")
                going.append(running)
                running.signal(signal.SIGKILL if kill else signal.SIGTERM)
            elif _remove_stale(path):
                warn(f"PID file {path} was left behind by a server that has ended: removed.")
        except Refusal as error:
            troubles.append(error)
    for running in going:
        started = tally.started(running.path, running.pid)
        grace = GRACE if started is None else started.grace
        if not running.wait(grace + 2 * MARGIN):
            late = f"{running.path}: process {running.pid} does not end; give -KILL to end it at once"
            troubles.append(Refusal(late))
        else:
            with contextlib.suppress(Refusal):  # another one has started in the meantime: its file stays
                _remove_stale(running.path)
        running.close()
    return troubles


def _remove_stale(pid_file: str) -> bool:
    """Remove what a server has left behind that was killed; False when there is nothing. Raises Refusal."""
    found = pidfile.remove_stale(pid_file)
    if found:
        tally.remove(tally.beside(pid_file))
    return found
