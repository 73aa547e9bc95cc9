"""Where mail comes in: a TCP port or a unix socket, taken before any child is forked.

Rules:

1. What cannot be had is one line that says what to do about it.
2. A unix socket that nobody listens on was left behind and is replaced; anything else under its name stays.
3. A unix socket may be connected to by everybody who can reach its directory, as a port of the loopback can.
4. A server keeps its listening sockets in `Listeners`, beside the receivers that use them: a reload hands them on, so
   that nobody is refused meanwhile. One that the service manager has passed stands for whatever address is asked for;
   one that we have opened only for its own.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from lamsonq import identity, systemd
from lamsonq.errors import Refusal

BACKLOG = 1024
"""Connections that the kernel holds while we are busy."""

_ADVICE = {
    errno.EADDRINUSE: "stop what uses it, or take another port",
    errno.EACCES: "a port below 1024 takes root: start as root, or take another port",
}


Address = tuple[str, int, str | None]
"""Host, port, and the path of a unix socket: what `listen` was asked for."""


@dataclass(slots=True)
class Listener:
    """A listening socket of this server. `address` is what it was opened for, None for one that was passed."""

    fd: int
    address: Address | None = None
    taken: bool = False


class Listeners:
    """The listening sockets of a server, apart from the receivers that use them."""

    def __init__(self, found: Sequence[Listener] = (), *, rehearsal: bool = False) -> None:
        self.found = list(found)
        self.rehearsal = rehearsal
        """Whether nobody is to be served: an address that is in use is no reason to refuse then."""
        self._new: list[Listener] = []
        self._given: list[socket.socket] = []

    def take(self, address: Address) -> socket.socket | None:
        """The first socket that fits and is not in use yet."""
        ours = [each for each in self.found if each.address == address and not each.taken]
        passed = [each for each in self.found if each.address is None and not each.taken]
        exact = [each for each in passed if _name(each.fd) == _shown(address)]
        for each in (*ours, *exact, *(p for p in passed if _is_unix(p.fd) == (address[2] is not None))):
            each.taken = True
            taken = socket.socket(fileno=os.dup(each.fd))
            if each in passed:
                logging.info("Listening on %s, which was passed to this process.", _name(each.fd))
            self._given.append(taken)
            return taken
        return None

    def add(self, listener: socket.socket, address: Address) -> None:
        """Keep what was opened just now."""
        kept = Listener(os.dup(listener.fileno()), address, True)
        self.found.append(kept)
        self._new.append(kept)
        self._given.append(listener)

    def to_hand_over(self) -> tuple[Listener, ...]:
        """All of them, for a process that has taken none yet."""
        return tuple(Listener(each.fd, each.address) for each in self.found)

    def settle(self) -> None:
        """The receivers are bound and work: what none of them has taken is no longer listened on."""
        self._new.clear()
        for each in list(self.found):
            if each.address is not None and not each.taken:
                self._drop(each)
            elif not each.taken:
                logging.warning("Nothing listens on %s, which was passed to this process.", _name(each.fd))

    def undo(self) -> None:
        """The receivers did not come up: as it was before them."""
        for each in self._new:
            self._drop(each)
        self._new.clear()
        self._take_back()
        for each in self.found:
            each.taken = False

    def close(self) -> None:
        """Listen no more: whoever connects is refused, once the children have closed their own."""
        for each in list(self.found):
            self._drop(each)
        self._take_back()

    def forget(self) -> None:
        """In a forked child: only its receiver has sockets."""
        for each in list(self.found):
            self._drop(each)

    def _drop(self, each: Listener) -> None:
        self.found.remove(each)
        os.close(each.fd)

    def _take_back(self) -> None:
        for each in self._given:
            each.close()
        self._given.clear()


_kept: Listeners | None = None


def keep(listeners: Listeners) -> None:
    """From now on, `listen` takes from these and adds to them."""
    global _kept
    _kept = listeners


def passed() -> list[Listener]:
    """The listening sockets that the service manager has passed. Raises Refusal for what cannot be listened on."""
    found = systemd.passed()
    for fd in found:
        try:
            with socket.socket(fileno=os.dup(fd)) as one:
                fits = one.type == socket.SOCK_STREAM and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            fits = False
        if not fits:
            raise Refusal(f"descriptor {fd} of LISTEN_FDS does not listen: the unit needs ListenStream= and Accept=no")
    return [Listener(fd) for fd in found]


def listen(host: str, port: int, path: str | None = None) -> socket.socket:
    """A listening socket: at `path` if there is one, else at `host`:`port` (0 takes any free port). Raises Refusal."""
    address = (host, port, path)
    listener = _kept.take(address) if _kept is not None else None
    if listener is None:
        listener = _rehearse(address) if _kept is not None and _kept.rehearsal else _open(*address)
        if _kept is not None:
            _kept.add(listener, address)
    if listener.family != socket.AF_UNIX:
        # Sessions inherit it. asyncio sets it only on sockets that name TCP as their protocol, which create_server's do
        # not: a reply of several lines would wait for the client's delayed acknowledgement, some 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _open(host: str, port: int, path: str | None) -> socket.socket:
    return _listen_tcp(host, port) if path is None else _listen_unix(path)


def _rehearse(address: Address) -> socket.socket:
    """As `_open`; but what is in use is about to be given up, so that any other address does as well."""
    try:
        return _open(*address)
    except Refusal as refusal:
        if getattr(refusal.__cause__, "errno", None) != errno.EADDRINUSE:
            raise
    return socket.create_server(("127.0.0.1", 0))


def _listen_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with identity.as_root():
            return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Refusal(
            f"cannot listen on {host}:{port}: {_reason(error)}; {_ADVICE.get(error.errno or 0, 'change receiver.host')}"
        ) from error


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_left_behind(path)
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Refusal(f"cannot listen on the socket {path}: {error.strerror or error}") from error
    return listener


def _remove_left_behind(path: str) -> None:
    """Raises FileExistsError-like OSError when the name belongs to something else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is a file of that name, which is no socket")
    except FileNotFoundError:
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "another server listens there")


def is_this_machine(host: str) -> bool:
    """Whether this host, of a receiver or a relay, is the machine that we are on: loopback, or a unix socket."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.startswith("/") or host.lower() == "localhost"


def _reason(error: OSError) -> str:
    """The system's words, without what socket.create_server adds to them."""
    if error.errno is None or error.errno < 0:  # getaddrinfo numbers its errors on its own
        return str(error.strerror or error)
    return os.strerror(error.errno)


def _is_unix(fd: int) -> bool:
    with socket.socket(fileno=os.dup(fd)) as listener:
        return listener.family == socket.AF_UNIX


def _name(fd: int) -> str:
    """Where a socket listens."""
    with socket.socket(fileno=os.dup(fd)) as listener:
        name = listener.getsockname()
    return os.fsdecode(name) if isinstance(name, str | bytes) else f"{name[0]}:{name[1]}"


def _shown(address: Address) -> str:
    return f"{address[0]}:{address[1]}" if address[2] is None else os.path.abspath(address[2])
