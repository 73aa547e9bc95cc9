"""Pid files: who runs, told by a lock that the kernel drops when its process dies.

Rules:

1. The file holds `<pid>` and a newline, and is locked (flock) for the life of its process. Locked means running;
   unlocked means left behind, whatever pid it names: it is replaced at a start and removed at a stop.
2. A pid is signalled only while the file that names it is locked, and never a pid below 2, except where a server is
   the first process of its container.
3. A file that is no pid file (a link, anything but a number in it) is left alone: its user chose a wrong name.
4. The pid is written into a fresh file before anybody could take it for an old one: a stale file is removed first,
   under its own lock. The lock does not pass into forked children, but a fresh image of the same process keeps it.
5. A file that somebody has removed while its process runs is written anew when that process is asked to; never in the
   place of one that another process has locked meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import stat
import time
from dataclasses import dataclass

from lamsonq.errors import PidFileError, Refusal

_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_POLL = 0.02
_PID_MAX = 2**22  # the largest pid of Linux


class PidFile:
    """The pid file of this process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        os.register_at_fork(after_in_child=self._forget)

    @property
    def fd(self) -> int:
        """The descriptor that the lock is held by; -1 before `take`."""
        return self._fd

    def resume(self, fd: int) -> None:
        """Go on with the lock that this process took before its exec."""
        self._hold(fd)

    def _hold(self, fd: int) -> None:
        self._fd = fd
        self.path = os.path.abspath(self.path)  # a boot may change the directory

    def take(self) -> None:
        """Lock the file and write our pid.

        Raises PidFileError when a running process holds it, or it is no pid file.
        """
        while self._fd < 0:
            if remove_stale(self.path):
                continue
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o644)
            except FileExistsError:
                continue
            except OSError as error:
                raise Refusal(f"cannot write the PID file {self.path}: {error.strerror}") from error
            if not (_lock(fd) and _same(fd, self.path)):
                os.close(fd)  # somebody took our new, still empty file for a stale one: look again
                continue
            self._hold(fd)
            try:
                os.write(fd, _own_line())
            except OSError as error:
                self.give_back()
                raise Refusal(f"cannot write the PID file {self.path}: {error.strerror}") from error

    def renew(self) -> None:
        """Write the file anew, if somebody has removed it.

        Raises what `take` raises; the lock that we have stays ours then.
        """
        if self._fd < 0 or _same(self._fd, self.path):
            return
        removed, self._fd = self._fd, -1
        try:
            self.take()
        finally:
            if self._fd < 0:
                self._fd = removed
            else:
                os.close(removed)

    def give_back(self) -> None:
        """Remove the file, then drop the lock. Idempotent; leaves a file alone that is no longer ours."""
        if self._fd < 0:
            return
        if _same(self._fd, self.path):
            os.unlink(self.path)
        self._forget()

    def _forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(slots=True)
class Running:
    """A process that holds its pid file. `fd` is our view of the file, which outlives its name."""

    path: str
    pid: int
    fd: int

    def signal(self, number: int) -> None:
        """Send a signal, if the process still holds its file; SIGKILL goes to the whole group that it leads."""
        if not _locked(self.fd):
            return
        try:
            if number == signal.SIGKILL and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it ended between the two lines: what was wanted
        except OSError as error:
            raise Refusal(f"ERROR stopping lamsonq on PID {self.pid}: {error.strerror}") from error

    def wait(self, seconds: float) -> bool:
        """Wait until the process has ended; False when it still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        while _locked(self.fd):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    def close(self) -> None:
        os.close(self.fd)


def is_own(fd: int, path: str) -> bool:
    """Whether our process has taken this pid file, perhaps in a former image: it is locked by us and holds our pid.

    Somebody may have removed it since. Raises OSError for a descriptor that is not open.
    """
    status = os.fstat(fd)
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    there = status.st_nlink == 0 or _same(fd, path)
    return ours and there and os.pread(fd, 64, 0) == _own_line() and _lock(fd)


def find(path: str) -> Running | None:
    """The process that holds this pid file, or None when there is no file or nobody holds it.

    Raises PidFileError when it is no pid file. The caller closes what it gets.
    """
    deadline = time.monotonic() + 1.0
    while (fd := _open(path)) is not None:
        running: Running | None = None
        try:
            locked = _locked(fd)
            pid = _read(fd, path)
            if locked and pid is not None:
                running = Running(path, _signalable(pid, path), fd)
            if running or not locked:
                return running
        finally:
            if running is None:
                os.close(fd)
        if time.monotonic() > deadline:
            raise PidFileError(f"PID file {path} is locked, but holds no pid")
        time.sleep(_POLL)  # it was created a moment ago, and its pid is on the way
    return None


def remove_stale(path: str) -> bool:
    """Remove a pid file that nobody holds; False when there is none.

    Raises PidFileError when a running process holds it, or it is no pid file.
    """
    fd = _open(path)
    if fd is None:
        return False
    try:
        if not _lock_soon(fd):
            raise PidFileError(held(path))
        _read(fd, path)
        if _same(fd, path):
            os.unlink(path)
        return True
    finally:
        os.close(fd)


def held(path: str) -> str:
    """What `start` says when another process runs."""
    first = f"Stop it first (lamsonq stop -pid {path}); for a boot lamsonq restart does both."
    return f"PID file {path} exists, so assuming lamsonq is running.  {first}"


def _open(path: str) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | _SAFE)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise PidFileError(
                f"PID file {path} is a link, a directory or a device, not a PID file: not touched"
            ) from error
        raise Refusal(f"cannot open the PID file {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PidFileError(f"PID file {path} is not a regular file: not touched")
    return fd


def _own_line() -> bytes:
    return b"%d\n" % os.getpid()


def _read(fd: int, path: str) -> int | None:
    """The number in it; None for the empty file of a process that is just starting, or died there."""
    content = os.pread(fd, 64, 0)
    if not content:
        return None
    number = re.fullmatch(rb"([0-9]{1,20})\n?", content)
    if number is None:
        raise PidFileError(f"PID file {path} holds {content[:20]!r} and no pid, so it is no PID file: not touched")
    return int(number[1])


def _signalable(number: int, path: str) -> int:
    """The pid of a locked file, if it is one that may be signalled."""
    if 1 < number <= _PID_MAX or _is_first_of_a_container(number):
        return number
    raise PidFileError(f"PID file {path} is locked, but holds {number} and no pid: not touched")


def _is_first_of_a_container(pid: int) -> bool:
    """Whether this is process 1, and that is lamsonq and no init."""
    if pid != 1:
        return False
    try:
        with open("/proc/1/cmdline", "rb") as file:
            return b"lamsonq" in file.read()
    except OSError:
        return False


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_soon(fd: int) -> bool:
    """As `_lock`, but not misled by somebody who only looks at this moment."""
    for _ in range(5):
        if _lock(fd):
            return True
        time.sleep(_POLL)
    return False


def _locked(fd: int) -> bool:
    """Whether somebody else holds the lock. Looks with a shared lock, so that two who look do not see each other."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _same(fd: int, path: str) -> bool:
    """Whether the open file still has this name."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
