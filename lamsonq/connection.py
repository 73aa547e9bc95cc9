"""One connection to a mail server, and the pool of those that wait for the next message.

Rules:

1. A server may be a stranger's: a reply is bounded in lines, in their length and, as a whole, in time; so is the way
   from the first packet to the last word of the login (`until`).
2. A certificate is checked against the name that we asked for. Nothing that the server said before the handshake
   counts behind it (RFC 3207 section 4.2).
3. A pool is bounded over all servers together; the connection that waits longest goes first. It belongs to the
   process that filled it: a forked child closes its copies and leaves the sessions to its parent.
4. We send one command and read its reply. What a server says unasked would be taken for the reply to the next command,
   and each later one for the reply before it: so it ends the connection, before another command goes out.
"""

from __future__ import annotations

import base64
import hmac
import os
import smtplib
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from ssl import SSLContext, SSLWantReadError
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

REPLY_LINE_MAX = 8192
"""Octets of one line of a reply; RFC 5321 section 4.5.3.1.5 asks for 512."""

REPLY_LINES_MAX = 200
"""Lines of one reply."""

IDLE_MAX = 30.0
"""Seconds for which a connection waits for the next message; servers close theirs after a few minutes."""

POOL_MAX = 10
"""How many connections wait for the next message, over all servers."""

_MECHANISMS = ("CRAM-MD5", "PLAIN", "LOGIN")


@dataclass(frozen=True, slots=True)
class Server:
    """Where to connect to: `name` is what its certificate must say, `address` the IP address that was looked up for
    it ("" lets the system look it up). A name that begins with "/" is a unix socket."""

    name: str
    port: int
    address: str = ""

    def __str__(self) -> str:
        if self.is_local_socket:
            return self.name
        if self.address not in ("", self.name):
            return f"{self.name}[{self.address}]:{self.port}"
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"

    @property
    def is_local_socket(self) -> bool:
        return self.name.startswith("/")


class HandshakeError(OSError):
    """The server offered TLS and then could not do it."""


class Client(smtplib.SMTP):
    """smtplib's client, bounded by rule 1; `lmtp` greets with LHLO (RFC 2033 section 4.1).

    `timeout` is in seconds, for connecting and for each reply; `until` is a moment of the monotonic clock at which
    all waiting ends, None for never. Methods raise OSError or smtplib.SMTPException.
    """

    def __init__(
        self, server: Server, timeout: float, debug: int = 0, *, lmtp: bool = False, until: float | None = None
    ) -> None:
        # smtplib would ask the DNS for our name unless it is given one; the right one is known once connected.
        super().__init__(local_hostname="localhost", timeout=timeout)
        self.set_debuglevel(debug)
        self.server = server
        self.until = until
        self.ehlo_msg = "lhlo" if lmtp else "ehlo"
        self._unread = bytearray()

    def open(self, context: SSLContext | None = None) -> None:
        """Connect, with TLS from the first byte if a context is given, and wait for the greeting."""
        self.sock = self._connected()
        if context is not None:
            self.encrypt(context)
        self.local_hostname = _own_name(self.sock)
        code, text = self.getreply()
        if code != 220:
            raise smtplib.SMTPConnectError(code, text)

    def _connected(self) -> socket.socket:
        wait = self._left(self.timeout)
        if not self.server.is_local_socket:
            return socket.create_connection((self.server.address or self.server.name, self.server.port), wait)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(wait)
            connection.connect(self.server.name)
        except BaseException:
            connection.close()
            raise
        return connection

    def hello(self) -> None:
        """EHLO, or HELO for a server that does not know it; LHLO has no elder."""
        if self.ehlo_msg == "ehlo":
            self.ehlo_or_helo_if_needed()
        elif (reply := self.ehlo())[0] != 250:
            raise smtplib.SMTPHeloError(*reply)

    def upgrade(self, context: SSLContext) -> None:
        """STARTTLS (RFC 3207), and another EHLO behind it. Raises HandshakeError when it was promised and failed."""
        if not self.has_extn("starttls"):
            raise smtplib.SMTPNotSupportedError("the server does not offer the STARTTLS that was asked for")
        code, text = self.docmd("STARTTLS")
        if code != 220:
            raise smtplib.SMTPResponseException(code, text)
        try:
            self.encrypt(context)
            self.hello()  # in TLS 1.3 a server may refuse the handshake only now
        except OSError as error:  # smtplib.SMTPException is one
            raise HandshakeError("TLS handshake failed") from error

    def encrypt(self, context: SSLContext) -> None:
        """The handshake. Raises ssl.SSLError, and smtplib.SMTPException when the server did not wait for it."""
        if self.sock is None:
            raise smtplib.SMTPServerDisconnected("not connected")
        if self._unread:  # what stands here was put in by somebody without the key
            raise smtplib.SMTPException("the server spoke between STARTTLS and the handshake")
        self.sock.settimeout(self._left(self.timeout))
        self.sock = context.wrap_socket(self.sock, server_hostname=self.server.name)
        self.helo_resp = self.ehlo_resp = None
        self.esmtp_features = {}
        self.does_esmtp = False

    def log_in(self, username: str, password: str) -> None:
        """AUTH (RFC 4954) with CRAM-MD5, PLAIN or LOGIN. smtplib's own takes ASCII passwords only.

        Debugging does not show it: a terminal or a log is no place for a password.
        """
        debug, self.debuglevel = self.debuglevel, 0
        try:
            self._log_in(username, password)
        finally:
            self.debuglevel = debug

    def _log_in(self, username: str, password: str) -> None:
        offered = self.esmtp_features.get("auth", "").upper().split()
        code, text = 0, b""
        for mechanism in _MECHANISMS:
            if mechanism in offered:
                code, text = self._authenticate(mechanism, username.encode(), password.encode())
                if code in (235, 503):  # 503: this session is logged in already
                    return
        if not code:
            words = f"it offers only {' '.join(offered)}" if offered else "it offers none"
            raise smtplib.SMTPNotSupportedError(f"no way to log in to the server: {words}")
        raise smtplib.SMTPAuthenticationError(code, text)

    def _authenticate(self, mechanism: str, user: bytes, secret: bytes) -> tuple[int, bytes]:
        if mechanism == "PLAIN":
            return self.docmd("AUTH", "PLAIN " + _base64(b"\0".join([b"", user, secret])))
        code, text = self.docmd("AUTH", mechanism)
        if mechanism == "LOGIN":
            for answer in (user, secret):
                if code == 334:
                    code, text = self.docmd(_base64(answer))
        elif code == 334:
            try:
                digest = hmac.new(secret, base64.b64decode(text), "md5").hexdigest()
            except ValueError:  # no base64, or a system without MD5: "*" gives up (RFC 4954 section 4)
                return self.docmd("*")
            code, text = self.docmd(_base64(user + b" " + digest.encode()))
        return code, text

    def greets_as(self) -> str:
        """The name that the server gave itself in its reply to EHLO (RFC 5321 section 4.1.1.1), lower-cased."""
        words = (self.ehlo_resp or self.helo_resp or b"").split(None, 1)
        return words[0].decode("latin-1").lower() if words else ""

    # Commands and replies.

    def putcmd(self, cmd: str, args: str = "") -> None:
        """Send a command; smtplib's methods all do it here. Raises smtplib.SMTPException by rule 4."""
        if self.sock is not None and not self.is_silent():
            spoke = bool(self._unread)
            self.close()
            if spoke:
                raise smtplib.SMTPException("the server spoke without being asked")
            raise smtplib.SMTPServerDisconnected("the server closed the connection")
        super().putcmd(cmd, args)

    def is_silent(self) -> bool:
        """Whether the connection stands and the server waits for us to speak."""
        if self.sock is None:
            return False
        try:
            self.sock.settimeout(0)
            self._unread += self.sock.recv(4096)  # poll() would also tell of TLS records that hold no data
            return False
        except (BlockingIOError, SSLWantReadError):
            self.sock.settimeout(self.timeout)
            return not self._unread
        except OSError:
            return False

    def send(self, s: Buffer | str) -> None:
        """Send these octets, in no more time than is left."""
        if self.sock is not None:
            self.sock.settimeout(self._left(self.timeout))
        super().send(s)

    def getreply(self, patience: float | None = None) -> tuple[int, bytes]:
        """The code and the text of a reply; code -1 for what is none. `patience` in seconds, for all of it."""
        deadline = time.monotonic() + self._left(patience or self.timeout)
        texts: list[bytes] = []
        while len(texts) < REPLY_LINES_MAX:
            line = self._line(deadline)
            code, mark, text = line[:3], line[3:4].strip(b"\r"), line[4:]
            valid = len(code) == 3 and code.isdigit() and mark in (b"", b" ", b"-")
            texts.append(text.strip(b" \t\r"))
            if not valid or mark != b"-":
                return int(code) if valid else -1, b"\n".join(texts)
        self.close()
        raise smtplib.SMTPException("the server's reply does not end")

    def _line(self, deadline: float) -> bytes:
        while (end := self._unread.find(b"\n")) < 0:
            if len(self._unread) > REPLY_LINE_MAX:
                self.close()
                raise smtplib.SMTPException("the server's reply does not end")
            self._unread += self._receive(deadline)
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        if self.debuglevel > 0:
            print("reply:", repr(line), file=sys.stderr)
        return line

    def _receive(self, deadline: float) -> bytes:
        if self.sock is None:
            raise smtplib.SMTPServerDisconnected("not connected")
        try:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            octets = self.sock.recv(4096)
            self.sock.settimeout(self.timeout)
        except OSError:
            self.close()
            raise
        if not octets:
            self.close()
            raise smtplib.SMTPServerDisconnected("the server closed the connection")
        return octets

    def _left(self, seconds: float) -> float:
        """How long to wait, where `seconds` are wanted. Raises TimeoutError when no time is left."""
        left = seconds if self.until is None else min(seconds, self.until - time.monotonic())
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def farewell(self) -> None:
        """Say goodbye without waiting for the answer."""
        try:
            self.timeout = 1.0
            self.putcmd("QUIT")
        except (OSError, smtplib.SMTPException):
            pass  # it is gone already
        finally:
            self.close()

    def forget(self) -> bool:
        """Forget the transaction (RFC 5321 section 4.1.1.5); False when the connection is of no more use."""
        try:
            return self.rset()[0] == 250
        except (OSError, smtplib.SMTPException):
            return False


@dataclass(frozen=True, slots=True, eq=False)
class _Idle:
    client: Client
    since: float
    pid: int


class Pool:
    """Connections that wait for the next message. Its deque needs no lock, so a fork cannot leave one locked."""

    def __init__(self) -> None:
        self._idle: deque[_Idle] = deque()

    def take(self, server: Server | None = None) -> Client | None:
        """The connection to this server (None: to any) that waits for the shortest time, if there is one."""
        found = None
        for idle in reversed(self._idle.copy()):
            usable = idle.pid == os.getpid() and time.monotonic() - idle.since < IDLE_MAX
            if usable and (found or server not in (None, idle.client.server)):
                continue
            try:
                self._idle.remove(idle)
            except ValueError:  # another thread took it
                continue
            if usable and idle.client.is_silent():
                found = idle.client
            else:
                idle.client.close()
        return found

    def keep(self, client: Client) -> None:
        """Let a connection wait for the next message; rule 4 closes it instead."""
        if not client.is_silent():
            return client.close()
        self._idle.append(_Idle(client, time.monotonic(), os.getpid()))
        while len(self._idle) > POOL_MAX:
            try:
                oldest = self._idle.popleft()
            except IndexError:
                break
            oldest.client.farewell()
        return None

    def close(self) -> None:
        """Say goodbye to everybody."""
        while (client := self.take()) is not None:
            client.farewell()


def own_name() -> str:
    """The full name of this host, "" where it has none: a name without a dot tells others nothing."""
    name = socket.gethostname()
    return name if "." in name and not name.lower().startswith("localhost.") else ""


def _own_name(connection: socket.socket) -> str:
    """How we greet (RFC 5321 section 4.1.4): the host's full name, else the address that we come from."""
    if (name := own_name()) or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return name or "localhost"
    address = str(connection.getsockname()[0]).partition("%")[0]
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def _base64(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")
