"""Clients of a receiver that say what no library would say, and when."""

from __future__ import annotations

import socket
import ssl

from lamsonq.smtp import SMTPReceiver

from .waiting import PATIENCE

MESSAGE = b"From: a@x.test\r\nTo: desk@y.test\r\nSubject: hi\r\n\r\nbody\r\n"


class Client:
    """`say` sends a line and gives the reply, its lines joined by "|"; "" when the server has closed.

    `header` goes out before anything else. With `tls` the whole session is encrypted.
    """

    def __init__(
        self,
        receiver: SMTPReceiver | int,
        *,
        greet: bool = True,
        tls: ssl.SSLContext | None = None,
        header: bytes = b"",
        wait: bool = True,
    ) -> None:
        port = receiver if isinstance(receiver, int) else receiver.port
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lines = self.socket.makefile("rb")
        if header:
            self.send(header)
        if tls is not None:
            self._wrap(tls)
        self.greeting = self.reply() if wait else ""
        if greet and wait:
            self.say("EHLO client.test")

    def _wrap(self, context: ssl.SSLContext) -> None:
        self.socket = context.wrap_socket(self.socket, server_hostname="127.0.0.1")
        self.lines = self.socket.makefile("rb")

    def starttls(self, context: ssl.SSLContext, *, greet: bool = True) -> str:
        """The reply to EHLO through TLS."""
        assert self.say("STARTTLS").startswith("220")
        self._wrap(context)
        return self.say("EHLO client.test") if greet else ""

    def reply(self) -> str:
        lines = []
        while True:
            try:
                line = self.lines.readline().decode("ascii")
            except ConnectionError:
                line = ""
            lines.append(line.rstrip("\r\n"))
            if line[3:4] != "-":
                return "|".join(lines)

    def replies(self, count: int) -> list[str]:
        """The codes of so many replies."""
        return [self.reply()[:3] for _ in range(count)]

    def rest(self) -> str:
        """Everything up to the end of the connection."""
        try:
            return self.lines.read().decode("ascii")
        except ConnectionError:
            return ""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def say(self, line: str | bytes) -> str:
        self.send((line if isinstance(line, bytes) else line.encode()) + b"\r\n")
        return self.reply()

    def begin(self, *recipients: str, sender: str = "a@x.test") -> list[str]:
        return [self.say(f"MAIL FROM:<{sender}>"), *(self.say(f"RCPT TO:<{to}>") for to in recipients)]

    def mail(self, *recipients: str, sender: str = "a@x.test", data: bytes = MESSAGE) -> str:
        """The reply to a whole message, or to what of it was refused."""
        for reply in self.begin(*(recipients or ("desk@y.test",)), sender=sender):
            if not reply.startswith("250"):
                return reply
        assert self.say("DATA").startswith("354")
        return self.say(data + b".")

    def close(self) -> None:
        self.lines.close()
        self.socket.close()

    def reset(self) -> None:
        """End the connection with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
