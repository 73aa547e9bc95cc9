"""Where mail comes in: a TCP port or a unix socket, taken before any child is forked.

Rules:

1. What cannot be had is one line that says what to do about it.
2. A unix socket that nobody listens on was left behind and is replaced; anything else under its name stays.
3. A unix socket may be connected to by everybody who can reach its directory, as a port of the loopback can.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from lamsonq.errors import Refusal

BACKLOG = 1024
"""Connections that the kernel holds while we are busy."""

_ADVICE = {
    errno.EADDRINUSE: "stop what uses it, or take another port",
    errno.EACCES: "a port below 1024 takes root: start as root, or take another port",
}


def listen(host: str, port: int, path: str | None = None) -> socket.socket:
    """A listening socket: at `path` if there is one, else at `host`:`port` (0 takes any free port). Raises Refusal."""
    if path is not None:
        return _listen_unix(path)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Refusal(
            f"cannot listen on {host}:{port}: {_reason(error)}; {_ADVICE.get(error.errno or 0, 'change receiver.host')}"
        ) from error
    # Sessions inherit it. asyncio sets it only on sockets that name TCP as their protocol, which create_server's do
    # not: a reply of several lines would wait for the client's delayed acknowledgement, some 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


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


def _reason(error: OSError) -> str:
    """The system's words, without what socket.create_server adds to them."""
    if error.errno is None or error.errno < 0:  # getaddrinfo numbers its errors on its own
        return str(error.strerror or error)
    return os.strerror(error.errno)
