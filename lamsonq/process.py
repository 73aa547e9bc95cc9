"""One boot is one pid file is one parent, which keeps its children alive; each child runs the boot's receiver.

    lamsonq start ---fork---> parent: lock the pid file, boot, bind ---fork---> child: start, join
         |                      |                                               child: start, join
         +---- waits until all children listen, or one failed ------+

Rules:

1. What can fail is done before `start` returns: it ends with 0 when the children listen, else with one line and a code.
2. The pid file is locked before the boot, and goes when the last child has ended (lamsonq/supervisor.py).
3. `stop` signals only who holds its pid file (lamsonq/pidfile.py), and waits until it has ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import NoReturn

from lamsonq import pidfile
from lamsonq.errors import Refusal
from lamsonq.supervisor import GRACE, MARGIN, READY, REPLACE, Parent, Service, answer_of, end_with, flush

__all__ = ["GRACE", "REPLACE", "Service", "notify", "run", "start", "stop"]

UMASK = 0o027


def start(service: Service) -> None:
    """Run the service as a daemon. Returns when it listens; raises the Refusal that ended it otherwise."""
    with contextlib.ExitStack() as logs:
        flush()
        out, err = (logs.enter_context(_append(f"logs/lamsonq.{end}")) for end in ("out", "err"))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _daemon(service, writing, out, err)
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

    def report(answer: bytes) -> None:
        answers.append(answer)
        if answer == READY:
            notify("READY=1")

    _serve(service, report)
    _raise_answer(answers[-1] if answers else READY)


def notify(state: str) -> None:
    """sd_notify(3): one datagram to the service manager, where there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, contextlib.suppress(OSError):
            manager.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def _append(path: str) -> contextlib.AbstractContextManager[int]:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise Refusal(f"cannot write {path}: {error.strerror}") from error
    return _closing(fd)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _daemon(service: Service, writing: int, out: int, err: int) -> NoReturn:
    """The double fork: a process without terminal, parent or session to die with."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.setpgid(0, 0)  # its own group, so that -KILL reaches the children too
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(fd, standard)
    waiting = [writing]  # whoever started us waits until nobody holds this end any more

    def report(answer: bytes) -> None:
        if waiting:
            os.write(writing, answer)
            os.close(waiting.pop())

    os.register_at_fork(after_in_child=lambda: os.close(waiting.pop()) if waiting else None)
    end_with(lambda: _serve(service, report))


def _raise_answer(answer: bytes) -> None:
    """Raise the Refusal that another process has reported."""
    if answer == READY:
        return
    code, text = json.loads(answer)
    refusal = Refusal(text)
    refusal.exit_code = code
    raise refusal


def _serve(service: Service, report: Callable[[bytes], None]) -> int:
    """The life of the parent. `report` is called when all children listen, or with the failure that ended it.

    Returns the exit code.
    """
    os.umask(UMASK)
    pid_file = pidfile.PidFile(service.pid_file)
    failure = b""
    try:
        pid_file.take()
        receiver = service.boot()
        receiver.bind()
        failure = Parent(service, receiver, report).live()
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
            elif pidfile.remove_stale(path):
                warn(f"PID file {path} was left behind by a server that has ended: removed.")
        except Refusal as error:
            troubles.append(error)
    for running in going:
        if not running.wait(GRACE + 2 * MARGIN):
            late = f"{running.path}: process {running.pid} does not end; give -KILL to end it at once"
            troubles.append(Refusal(late))
        else:
            with contextlib.suppress(Refusal):  # another one has started in the meantime: its file stays
                pidfile.remove_stale(running.path)
        running.close()
    return troubles
