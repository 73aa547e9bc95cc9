"""The servers that tell spam from other mail, and how they are asked: rspamd over HTTP, SpamAssassin's spamd.

Rules:

1. A request has a deadline, not only time limits for its steps, and an answer a greatest size.
2. Whatever goes wrong is an OSError, an http.client.HTTPException, a ValueError or a RecursionError: `TROUBLE`. An
   answer that is cut off, or whose score is no number that can be compared, is trouble too, never a verdict.
3. The message goes as it is, with the envelope beside it.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import math
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from lamsonq import attempt
from lamsonq.errors import SettingsError
from lamsonq.mail import MailRequest
from lamsonq.records import make_ready
from lamsonq.transaction import one_line

ANSWER_MAX = 1024 * 1024
"""Octets of a scanner's answer that are read."""

TROUBLE = (OSError, http.client.HTTPException, ValueError, RecursionError)

_RSPAMD_PORT, _RSPAMD_CONTROLLER_PORT, _SPAMD_PORT = 11333, 11334, 783
_SPAMD_VERDICT = re.compile(r"(true|yes|false|no)\s*;\s*(-?[\d.]+)\s*/\s*(-?[\d.]+)")
_RSPAMD_SPAM = frozenset({"add header", "rewrite subject", "quarantine", "discard", "reject"})
"""Not `greylist` and `soft reject`, which ask for time at the SMTP door."""

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
_Score = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class SpamConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to ask. `threshold` is a score from which on a message is spam; None leaves it to the scanner.

    `timeout` is in seconds, for one scan. A message of more than `size_limit` octets is not scanned. `password` is
    rspamd's, `controller` the URL of its controller, for training (the same host, port 11334). `user` is
    SpamAssassin's. `connections` is how many scans may run at a time in this process.
    """

    threshold: _Score | None = None
    timeout: _Seconds = 10.0
    size_limit: _Count = 1024 * 1024
    on_error: Literal["pass", "later"] = "pass"
    password: str | None = None
    controller: str | None = None
    user: str | None = None
    connections: _Count = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scanner says. `required` is the score from which on it calls a message spam, `action` its own word for
    what to do (rspamd). `scanned` is False when it was not asked, or gave no answer: then `reason` says why."""

    spam: bool
    score: float = 0.0
    symbols: tuple[str, ...] = ()
    required: float = 0.0
    action: str = ""
    scanned: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Address:
    """A host and port, or without a host the path of a unix socket."""

    host: str
    port: int
    path: str = ""

    def connect(self, deadline: float) -> _Connection:
        """To the first of its addresses that answers, all before the deadline."""
        trouble = OSError(f"{self.host or self.path} has no address")
        for family, address in self._found():
            connected = socket.socket(family, socket.SOCK_STREAM)
            try:
                connected.settimeout(_left(deadline))
                connected.connect(address)
            except OSError as error:
                trouble = error
                connected.close()
            except BaseException:
                connected.close()
                raise
            else:
                return _Connection(connected, deadline)
        raise trouble

    def _found(self) -> list[tuple[int, Any]]:
        if not self.host:
            return [(socket.AF_UNIX, self.path)]
        return [(found[0], found[4]) for found in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)]


class _Connection:
    """A socket whose time is up at `deadline`, however slowly the other side talks; as much of one as http.client
    needs. `with` it, it is closed."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self.socket = connected
        self.deadline = deadline

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def sendall(self, data: bytes) -> None:
        self.socket.settimeout(_left(self.deadline))
        self.socket.sendall(data)

    def makefile(self, mode: str = "rb") -> io.BufferedReader:  # noqa: ARG002 - http.client's
        return io.BufferedReader(_Answer(self))

    def close(self) -> None:
        """Nothing: http.client closes it before it has read the answer."""


class _Answer(io.RawIOBase):
    """What the other side says, up to ANSWER_MAX octets."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._room = ANSWER_MAX

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._room <= 0:
            raise ValueError(f"the answer is longer than {ANSWER_MAX} octets")
        self._connection.socket.settimeout(_left(self._connection.deadline))
        count = self._connection.socket.recv_into(buffer)
        self._room -= count
        return count


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Scan(msgspec.Struct):
    """What of rspamd's answer to `/checkv2` is read. No JSON makes it a score that is infinite or none."""

    action: str
    score: float
    required_score: float | None = None
    symbols: dict[str, Any] | None = None


class _Learned(msgspec.Struct):
    """What of its answer to `/learnspam` and `/learnham` is read."""

    success: bool = False


make_ready(_Scan, _Learned)


class Rspamd:
    """rspamd over HTTP: the scanner's `/checkv2`, the controller's `/learnspam` and `/learnham`."""

    def __init__(self, url: SplitResult, config: SpamConfig) -> None:
        self._address = _address(url, _RSPAMD_PORT)
        self._password = config.password or unquote(url.password or "")
        self._controller: _Address | None = None
        if config.controller is not None:
            self._controller = _address(_split(config.controller, "rspamd"), _RSPAMD_CONTROLLER_PORT)
        elif self._address.host:
            self._controller = _Address(self._address.host, _RSPAMD_CONTROLLER_PORT)

    def check(self, message: MailRequest, deadline: float) -> Verdict:
        found = msgspec.json.decode(self._ask(self._address, "/checkv2", message, deadline), type=_Scan)
        return Verdict(
            spam=found.action in _RSPAMD_SPAM,
            score=found.score + 0.0,  # not -0.0
            symbols=_symbols(sorted(found.symbols or ())),
            required=found.required_score or 0.0,
            action=one_line(found.action),
        )

    def train(self, message: MailRequest, kind: str, deadline: float) -> bool:
        if self._controller is None:
            raise ValueError("config has no controller, its URL, such as rspamd://127.0.0.1:11334")
        answer = self._ask(self._controller, f"/learn{kind}", message, deadline)
        return msgspec.json.decode(answer, type=_Learned).success

    def _ask(self, address: _Address, path: str, message: MailRequest, deadline: float) -> bytes:
        client = http.client.HTTPConnection("localhost", timeout=_left(deadline))
        with address.connect(deadline) as connection:
            client.sock = connection
            client.request("POST", path, message.Data, self._headers(message))
            answer = client.getresponse()
            body = answer.read(ANSWER_MAX)
        # 208 is rspamd's for a message that it has learned before.
        if answer.status not in (200, 208):
            raise ValueError(f"it answers {answer.status} {answer.reason}: {body[:100].decode('utf-8', 'replace')}")
        return body

    def _headers(self, message: MailRequest) -> dict[str, bytes]:
        running = attempt.current()
        headers = {
            "IP": _ip_of(message.envelope.peer),
            "From": message.From,
            "Rcpt": message.To,
            "Queue-Id": running.key if running is not None else "",
            "Password": self._password,
        }
        # http.client would encode text as Latin-1, which addresses need not be.
        return {name: _line(value) for name, value in headers.items() if value}


class SpamAssassin:
    """spamd's own protocol (spamd/PROTOCOL in its source): SYMBOLS to check, TELL to train."""

    def __init__(self, url: SplitResult, config: SpamConfig) -> None:
        self._address = _address(url, _SPAMD_PORT)
        self._user = config.user

    def check(self, message: MailRequest, deadline: float) -> Verdict:
        headers, body = self._ask("SYMBOLS", message, {}, deadline)
        found = _SPAMD_VERDICT.fullmatch(headers.get("spam", "").lower())
        if not found:
            raise ValueError(f"its answer holds no verdict: {headers}")
        return Verdict(
            spam=found[1] in ("true", "yes"),
            score=_score(found[2]),
            symbols=_symbols(body.decode("utf-8", "replace").split(",")),
            required=_score(found[3]),
        )

    def train(self, message: MailRequest, kind: str, deadline: float) -> bool:
        headers, _ = self._ask("TELL", message, {"Message-class": kind, "Set": "local"}, deadline)
        return "didset" in headers

    def _ask(
        self, command: str, message: MailRequest, headers: Mapping[str, str], deadline: float
    ) -> tuple[dict[str, str], bytes]:
        wanted = {**headers, "Content-length": str(len(message.Data)), **({"User": self._user} if self._user else {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in wanted.items())
        with self._address.connect(deadline) as connection:
            connection.sendall(f"{command} SPAMC/1.5\r\n{head}\r\n".encode() + message.Data)
            connection.socket.shutdown(socket.SHUT_WR)
            answer = connection.makefile().read()
        top, ended, body = answer.partition(b"\r\n\r\n")
        first, *lines = top.decode("utf-8", "replace").split("\r\n")
        if not re.match(r"SPAMD/[\d.]+ 0 ", first):
            raise ValueError(f"it answers {first[:100]!r}")
        found = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if not ended or len(body) < int(found.get("content-length", 0)):
            raise ValueError("its answer is cut off")
        return found, body


Scanner = Rspamd | SpamAssassin
_SCANNERS: dict[str, type[Rspamd] | type[SpamAssassin]] = {"rspamd": Rspamd, "spamassassin": SpamAssassin}


def scanner(url: str, config: SpamConfig) -> Scanner:
    """What asks the scanner at this URL. Raises SettingsError."""
    found = _split(url, *_SCANNERS)
    return _SCANNERS[found.scheme](found, config)


def shown(url: str) -> str:
    """The URL without a password."""
    return re.sub(r"//[^/]*@", "//", str(url))


def _split(url: str, *schemes: str) -> SplitResult:
    """The URL of a scanner. Raises SettingsError."""
    try:
        found = urlsplit(str(url))
        _ = found.port  # raises for nonsense
    except ValueError as error:
        raise SettingsError(f"the spam scanner {shown(url)!r} is no URL: {error}") from error
    if found.scheme not in schemes or not (found.hostname or len(found.path) > 1):
        wanted = " or ".join(f"{scheme}://host:port" for scheme in schemes)
        raise SettingsError(
            f"the spam scanner {shown(url)!r} is none that we know; it is {wanted}, or scheme:///a/unix/socket"
        )
    return found


def _address(url: SplitResult, default_port: int) -> _Address:
    return _Address(url.hostname or "", url.port or default_port, "" if url.hostname else unquote(url.path))


def _score(digits: str) -> float:
    """Raises ValueError for what is no number that can be compared."""
    score = float(digits)
    if not math.isfinite(score):
        raise ValueError(f"its score has {len(digits)} digits")
    return score + 0.0  # not -0.0


def _symbols(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(filter(None, map(one_line, names)))


def _line(value: str) -> bytes:
    return "".join(filter(str.isprintable, value)).encode("utf-8", "replace")


def _ip_of(peer: object) -> str:
    """The address of a peer, as a socket has it or as a queue keeps it (`[::1]:4242`); "" when it is none."""
    host = str(peer[0]) if isinstance(peer, tuple) and peer else str(peer or "").rpartition(":")[0].strip("[]")
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return ""
