"""The service manager: the sockets that it passes, and what it is told. Both are a few lines, so they are our own.

Rules:

1. sd_listen_fds(3): LISTEN_FDS sockets, from descriptor 3 on, are for the process whose pid is LISTEN_PID. Our children
   and the programs that handlers run get neither the sockets nor the variables.
2. sd_notify(3): one datagram to NOTIFY_SOCKET; where there is none, nothing happens.
"""

from __future__ import annotations

import contextlib
import os
import socket

from lamsonq.errors import Refusal

_FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def notify(state: str) -> None:
    """Tell the service manager, if there is one: `READY=1` and the like."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, contextlib.suppress(OSError):
            manager.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def passed() -> list[int]:
    """The descriptors that were passed to this very process. The second call finds none. Raises Refusal."""
    pid, count, _ = (os.environ.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit() and len(count) < 4):
        raise Refusal(f"LISTEN_FDS={count!r} is no number of sockets: whoever started this has made a mistake")
    found = list(range(_FIRST, _FIRST + int(count)))
    try:
        for fd in found:
            os.set_inheritable(fd, False)
    except OSError as error:
        raise Refusal(f"LISTEN_FDS={count}, but descriptor {fd} is not open: {error.strerror}") from error
    return found
