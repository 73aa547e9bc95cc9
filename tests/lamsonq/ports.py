"""Ports that a test may listen on, or rely on nobody listening on."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def free_port() -> int:
    """A port on which nobody listens at any IPv4 address, kept for as long as this process lives.

    The system gives it to nobody who asks for just any port. Who asks for this one may listen on it with SO_REUSEADDR,
    which servers set.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))  # not listening: whoever connects is refused
    _held.append(holder)
    port: int = holder.getsockname()[1]
    return port
