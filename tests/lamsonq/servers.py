"""Servers on the loopback that answer as a test says: SMTP or LMTP, and DNS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import dns.resolver
from dnslib import QTYPE, RCODE, RR, DNSError, DNSRecord  # type: ignore[import-untyped]
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer  # type: ignore[import-untyped]

HANG_UP = "HANG UP"


class Server:
    """A mail server in threads. `answers` maps the beginning of a command to its reply, or to a list of replies of
    which the last one stays; "." answers the message. HANG_UP closes the connection, "" says nothing.

    `tls` is for STARTTLS, or from the first byte if `implicit`. `path` is a unix socket in place of address and port.
    """

    def __init__(
        self,
        answers: Mapping[str, str | list[str]] | None = None,
        tls: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
        *,
        implicit: bool = False,
        path: str | None = None,
        start: bool = True,
    ) -> None:
        self.answers = dict(answers or {})
        self.tls = tls
        self.implicit = implicit
        self.offers = ["fake.test", "SIZE 1000000", "8BITMIME", "SMTPUTF8"]
        self.commands: list[str] = []
        self.messages: list[bytes] = []
        self.connections: list[socket.socket] = []
        if path is None:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._listener = socket.create_server((address, port), family=family)
            self.port: int = self._listener.getsockname()[1]
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
            self.port = 0
        if start:
            threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread that accepts
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _answer(self, command: str, default: str) -> str:
        for beginning, reply in self.answers.items():
            if command.upper().startswith(beginning):
                if isinstance(reply, str):
                    return reply
                return reply.pop(0) if len(reply) > 1 else reply[0]
        return default

    def _talk(self, connection: socket.socket) -> None:
        try:
            if self.implicit and self.tls is not None:
                connection = self._encrypted(connection)
            self._session(connection)
        except OSError:
            pass

    def _encrypted(self, connection: socket.socket) -> socket.socket:
        assert self.tls is not None
        connection = self.tls.wrap_socket(connection, server_side=True)
        self.connections.append(connection)
        return connection

    def _session(self, connection: socket.socket) -> None:
        greeting = self._answer("GREETING", "220 fake.test")
        if greeting == HANG_UP:
            connection.shutdown(socket.SHUT_RDWR)
            return
        if greeting:
            connection.sendall(greeting.encode() + b"\r\n")
        lines = connection.makefile("rb")
        while line := lines.readline():
            command = line.decode().rstrip("\r\n")
            self.commands.append(command)
            reply = self._answer(command, self._default(command))
            if reply == HANG_UP:
                connection.shutdown(socket.SHUT_RDWR)
                return
            if reply:
                connection.sendall(reply.encode() + b"\r\n")
            if reply.startswith("354"):
                self._data(connection, lines.readline)
            if command.upper() == "STARTTLS" and reply.startswith("220") and self.tls is not None:
                connection = self._encrypted(connection)
                lines = connection.makefile("rb")

    def _default(self, command: str) -> str:
        verb = command.upper()
        if verb.startswith(("EHLO", "LHLO")):
            return "\r\n".join([f"250-{offer}" for offer in self.offers] + ["250 HELP"])
        return "354 go on" if verb == "DATA" else "235 ok" if verb.startswith("AUTH") else "250 ok"

    def _data(self, connection: socket.socket, readline: Callable[[], bytes]) -> None:
        wire = b""
        while (line := readline()) != b".\r\n":
            if not line:
                return
            wire += line
        self.messages.append(wire)
        reply = self._answer(".", "250 taken")
        hang_up = reply.endswith(HANG_UP)
        if reply := reply.removesuffix(HANG_UP):
            connection.sendall(reply.rstrip().encode() + b"\r\n")
        if hang_up:
            connection.shutdown(socket.SHUT_RDWR)

    def said(self, verb: str) -> list[str]:
        return [command for command in self.commands if command.upper().startswith(verb)]


class Dns(BaseResolver):  # type: ignore[misc]
    """A DNS server with these zone lines. A name in `broken` gets SERVFAIL, one in `silent` no answer at all."""

    def __init__(self, zone: str, broken: Sequence[str] = (), silent: Sequence[str] = ()) -> None:
        self.records = RR.fromZone(zone)
        self.broken, self.silent = broken, silent
        self.questions: list[tuple[str, str]] = []
        self._server = DNSServer(self, address="127.0.0.1", port=0, logger=DNSLogger(logf=lambda _: None))
        serve = partial(self._server.server.serve_forever, poll_interval=0.01)  # as long as `close` waits for it
        threading.Thread(target=serve, daemon=True).start()
        self.resolver = dns.resolver.Resolver(configure=False)
        self.resolver.nameservers = ["127.0.0.1"]
        self.resolver.port = self._server.server.server_address[1]

    def close(self) -> None:
        self._server.server.shutdown()
        self._server.server.server_close()

    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:  # noqa: ARG002 - dnslib calls it
        name, kind = str(request.q.qname).rstrip(".").lower(), QTYPE[request.q.qtype]
        self.questions.append((name, kind))
        reply = request.reply()
        if name in self.broken:
            reply.header.rcode = RCODE.SERVFAIL
        elif name in self.silent:
            raise DNSError("says nothing")
        elif not self._add(reply, name, kind):
            reply.header.rcode = RCODE.NXDOMAIN
        return reply

    def _add(self, reply: DNSRecord, name: str, kind: str) -> bool:
        known = [record for record in self.records if str(record.rname).rstrip(".").lower() == name]
        for record in known:
            if QTYPE[record.rtype] == "CNAME":
                reply.add_answer(record)
                return self._add(reply, str(record.rdata).rstrip(".").lower(), kind)
            if QTYPE[record.rtype] == kind:
                reply.add_answer(record)
        return bool(known)
