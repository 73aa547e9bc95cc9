"""How much one client, and all of them together, may ask of a receiver.

Rules:

1. A limit is a number in `Limits`; 0 is none. None, where it may be, is our default for strangers, and no limit for
   this machine itself (loopback and unix sockets): what a program of our own sends is never put off by a number that
   nobody chose.
2. Who is over a limit is told so with a 4xx or 421 reply, so that an honest client comes again and loses nothing.
3. An IPv4 client is its address, also where it is written as an IPv6 one (RFC 4291 section 2.5.5.2); an IPv6 client is
   its /64, which one host has at its will (RFC 7934 section 4). Who has no limits is counted by his own address.
4. A minute is a window of sixty seconds that begins with a client's first act. Counting costs the same for one client
   and for a million: of those who have no connection, at most CLIENTS_MAX are remembered.
5. With N processes of one boot each one has an Nth of every limit.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

CLIENTS_MAX = 100_000
MINUTE = 60.0
_TRIES = 8
"""How many of those who were here first are looked at, for one to forget."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`[receiver.limits]`: times are in seconds, memory in bytes; rule 1 tells what 0 and None mean.

    `connections` are open at once, from everybody; `connections_per_address` from one client. Per client and minute:
    `connections_per_minute`, `messages_per_minute`, `recipients_per_minute`. `messages_per_connection` are taken before
    the client has to connect again, `recipients` are those of one message (RFC 5321 section 4.5.3.1.8 asks for 100).
    `memory` is for all messages that are being received or handled; what of one that comes is in a file does not count.
    `command_timeout` is for a whole command, `data_timeout` for the next piece of a message, and `bad_commands` may be
    sent before the client is sent away.
    """

    connections: int = 2000
    connections_per_address: int | None = None
    connections_per_minute: int | None = None
    messages_per_minute: int | None = None
    recipients_per_minute: int | None = None
    messages_per_connection: int | None = None
    recipients: int = 1000
    memory: int = 512 * 1024 * 1024
    command_timeout: float = 300.0
    data_timeout: float = 180.0
    bad_commands: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 0:
                raise ValueError(f"{field.name}={value}: a limit is not negative; 0 is none")

    def shared_by(self, processes: int) -> Limits:
        """What each of so many processes may take (rule 5)."""
        if processes <= 1:
            return self
        mine = {name: -(-value // processes) for name in _SHARED if (value := getattr(self, name))}
        return replace(self, **mine)


_SHARED = (
    "connections",
    "connections_per_address",
    "connections_per_minute",
    "messages_per_minute",
    "recipients_per_minute",
    "memory",
)

STRANGERS = Limits(
    connections_per_address=50,
    connections_per_minute=300,
    messages_per_minute=1000,
    recipients_per_minute=10_000,
    messages_per_connection=1000,
)
"""What a stranger may do where nobody chose a number: more than an honest mail server does (mox: 30 connections)."""


class Refused(Exception):
    """A client may not connect now; the text says why."""


_OF_A_CLIENT = (
    "connections_per_address",
    "connections_per_minute",
    "messages_per_minute",
    "recipients_per_minute",
    "messages_per_connection",
)
_UNLIMITED = Limits(**dict.fromkeys(_OF_A_CLIENT, 0))


@dataclass(slots=True, eq=False)
class Client:
    """What one client has done: connections that are open, and acts of the current minute.

    `may` are the limits that hold for it, with a number for each.
    """

    group: str
    may: Limits
    open: int = 0
    began: float = 0.0
    connections: int = 0
    messages: int = 0
    recipients: int = 0

    def message(self, now: float) -> bool:
        """Count a message; False when the client has sent enough in this minute."""
        return not self.may.messages_per_minute or self._count("messages", self.may.messages_per_minute, now)

    def recipient(self, now: float) -> bool:
        """Count a recipient; False when the client has named enough in this minute."""
        return not self.may.recipients_per_minute or self._count("recipients", self.may.recipients_per_minute, now)

    def connection(self, now: float) -> bool:
        """Count a connection; False when the client has come too often in this minute."""
        return not self.may.connections_per_minute or self._count("connections", self.may.connections_per_minute, now)

    def _count(self, acts: str, most: int, now: float) -> bool:
        if now - self.began >= MINUTE:
            self.began, self.connections, self.messages, self.recipients = now, 0, 0, 0
        done: int = getattr(self, acts) + 1
        setattr(self, acts, done)
        return done <= most


class Traffic:
    """Who is connected, and how much each client has sent lately, in one of so many processes of a boot.

    `now` is a monotonic clock's, in seconds.
    """

    def __init__(self, limits: Limits, trusted: Sequence[Network] = (), processes: int = 1) -> None:
        self.limits = limits.shared_by(processes)
        self._strangers = STRANGERS.shared_by(processes)
        self.trusted = tuple(trusted)
        self.open = 0
        self.memory = 0
        self._clients: OrderedDict[str, Client] = OrderedDict()

    def enter(self, address: str, now: float) -> Client:
        """A connection has come from this IP address ("": from a unix socket). Raises Refused, else `leave` ends it."""
        if self.limits.connections and self.open >= self.limits.connections:
            raise Refused("too many connections")
        client = self._client(address, now)
        if client.may.connections_per_address and client.open >= client.may.connections_per_address:
            raise Refused("too many connections from your address")
        if not client.connection(now):
            raise Refused("too many connections from your address in this minute")
        client.open += 1
        self.open += 1
        return client

    def leave(self, client: Client) -> None:
        """A connection that was let in is closed."""
        self.open -= 1
        client.open -= 1

    def has_room(self, octets: int) -> bool:
        """Whether so much more of messages fits into memory."""
        return not self.limits.memory or self.memory + octets <= self.limits.memory

    def _client(self, address: str, now: float) -> Client:
        free = not address or (bool(self.trusted) and within(address, self.trusted))
        group = f"free {address}" if free or _is_loopback(address) else _group(address)
        client = self._clients.pop(group, None) or Client(group, self._may(address, free), began=now)
        self._clients[group] = client  # at the end, as who was here last
        for _ in range(_TRIES):
            if len(self._clients) <= CLIENTS_MAX:
                break
            _, oldest = self._clients.popitem(last=False)
            if oldest.open:
                self._clients[oldest.group] = oldest
        return client

    def _may(self, address: str, free: bool) -> Limits:
        """The limits for this address: rule 1."""
        chosen = self.limits
        if free:
            return replace(chosen, **dict.fromkeys(_OF_A_CLIENT, 0))
        ours = _UNLIMITED if _is_loopback(address) else self._strangers
        missing = {name: getattr(ours, name) for name in _OF_A_CLIENT if getattr(chosen, name) is None}
        return replace(chosen, **missing)


def within(client: str, networks: Sequence[Network]) -> bool:
    """Whether this address is in one of the networks; False for what is no address."""
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in network for network in networks)


_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


@lru_cache(1024)
def _is_loopback(client: str) -> bool:
    return within(client, _LOOPBACK)


@lru_cache(1024)
def _group(client: str) -> str:
    """Rule 3."""
    if ":" not in client:
        return client
    address = ipaddress.IPv6Address(client.partition("%")[0])
    return str(address.ipv4_mapped or ":".join(address.exploded.split(":")[:4]))
