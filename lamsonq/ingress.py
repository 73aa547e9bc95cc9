"""Mail that comes by HTTP: one ASGI application that takes raw messages, as a provider or a program of your own posts
them.

    application = Ingress(Queue("run/incoming").push, token=settings.ingress_token)

Rules:

1. A message is posted as it is (RFC 5322), its envelope in the query:
   `POST /?from=joe@example.org&to=desk@example.com`. An empty `from` is the null sender; `to` may be there several
   times.
2. 200 is a promise, as 250 is over SMTP: what `deliver` was given is on disk, or done. 503 asks to post it again later;
   every other status says what is wrong with this request, and posting it again changes nothing.
3. Nobody posts without the token (RFC 6750 section 2.1); it is compared in constant time, and before anything is read.
4. A body is kept up to `size_limit` and no further, whatever Content-Length says.
5. Addresses pass the grammar that SMTP's do, and a recipient that no route takes is refused as over SMTP.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from socket import gethostname
from typing import Any
from urllib.parse import parse_qs

from msgspec import structs

from lamsonq import mail
from lamsonq.address import canonical
from lamsonq.commit import Committer
from lamsonq.envelope import Envelope
from lamsonq.errors import SettingsError
from lamsonq.routing import Router, RoutingBase
from lamsonq.threads import Threads
from lamsonq.trace import HOPS_MAX, hops, received_field

LOG = logging.getLogger()

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

RECIPIENTS_MAX = 1000
FIELDS_MAX = 2000
"""Fields of a query beyond which it is not taken apart."""
TOKEN_MIN = 16
"""Characters of a token: shorter ones can be guessed."""

_PROTOCOL = "HTTP"
"""What Received says of the way (RFC 5321 section 4.4 leaves room for other protocols)."""


class _Refusal(Exception):
    """What is wrong with a request: the status and the words."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Ingress:
    """The ASGI application. `deliver` takes each message, in one of `workers` threads.

    `token` is what a client sends as `Authorization: Bearer ...`, `size_limit` how many octets a message may have,
    `timeout` how many seconds `deliver` may take, `hostname` what Received calls this machine (its own name). `router`
    says which recipients there are, where handlers are loaded.

    Raises SettingsError for a token that could be guessed.
    """

    def __init__(
        self,
        deliver: Callable[[mail.MailRequest], object],
        token: str,
        *,
        size_limit: int = 33_554_432,
        router: RoutingBase = Router,
        workers: int = 10,
        timeout: float = 300.0,
        hostname: str | None = None,
    ) -> None:
        if len(token) < TOKEN_MIN:
            raise SettingsError(f"Ingress: a token of {len(token)} characters can be guessed: take {TOKEN_MIN} or more")
        self.deliver = deliver
        self.size_limit = size_limit
        self.router = router
        self.timeout = timeout
        self.hostname = hostname or gethostname()
        self._secret = f"Bearer {token}".encode()
        self._pool = Threads(workers, "lamsonq-ingress")
        self._committer: Committer | None = None
        self._under_way: set[asyncio.Future[str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request, or the server's start and end, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            try:
                status, told = await self._take(scope, receive)
            except _Refusal as refusal:
                status, told = refusal.status, {"error": str(refusal)}
            await _answer(send, status, told)

    async def _live(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        if self._under_way:
            await asyncio.wait(self._under_way)  # what has begun is finished, also when its client has gone
        self._pool.close()
        if self._committer is not None:
            self._committer.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _take(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, str]]:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._secret):
            raise _Refusal(401, "the token is missing or wrong: Authorization: Bearer ...")
        if scope["method"] != "POST":
            raise _Refusal(405, "a message is posted")
        sender, recipients = self._envelope(scope["query_string"])
        for recipient in recipients:
            if recipient.lower() != "postmaster" and not await self._takes(recipient):
                raise _Refusal(422, f"550 5.1.1 No such recipient here: {recipient}")
        content = await self._body(headers, receive)
        if not content:
            raise _Refusal(400, "there is no message in the body of the request")
        if hops(content) > HOPS_MAX:
            raise _Refusal(422, "554 5.4.6 Too many hops: this message goes round in circles")
        peer = tuple(scope["client"]) if scope.get("client") else "http"
        reply = await self._commit(Envelope(sender, recipients, peer, time.time(), protocol=_PROTOCOL), content)
        if reply.startswith("2"):
            return 200, {"reply": reply, "id": reply.rpartition(" ")[2]}
        raise _Refusal(503 if reply.startswith("4") else 422, reply)

    def _envelope(self, query: bytes) -> tuple[str, tuple[str, ...]]:
        """The sender and the recipients that the query names (rule 1)."""
        if query.count(b"&") > FIELDS_MAX:
            raise _Refusal(422, f"452 4.5.3 Too many recipients: at most {RECIPIENTS_MAX}")
        try:
            named = parse_qs(query.decode("ascii"), keep_blank_values=True, errors="strict")
        except ValueError as error:
            raise _Refusal(400, "the query cannot be read: ?from=...&to=..., percent-encoded UTF-8") from error
        senders, recipients = named.get("from", []), named.get("to", [])
        if len(senders) != 1 or not recipients:
            raise _Refusal(400, "the query names one sender and at least one recipient: ?from=...&to=...")
        if len(recipients) > RECIPIENTS_MAX:
            raise _Refusal(422, f"452 4.5.3 Too many recipients: at most {RECIPIENTS_MAX}")
        return _path("from", senders[0], null=True), tuple(dict.fromkeys(_path("to", text) for text in recipients))

    async def _takes(self, address: str) -> bool:
        if not self.router.table.routes:
            return True
        taken = self.router.takes_at_once(address)
        return await asyncio.to_thread(self.router.takes, address) if taken is None else taken

    async def _body(self, headers: MutableMapping[bytes, bytes], receive: Receive) -> bytes:
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.size_limit:
            raise _Refusal(413, f"552 5.3.4 Message size exceeds the limit of {self.size_limit} octets")
        pieces, size = [], 0
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise _Refusal(400, "the request has ended before its body")
            piece = event.get("body", b"")
            size += len(piece)
            if size > self.size_limit:
                raise _Refusal(413, f"552 5.3.4 Message size exceeds the limit of {self.size_limit} octets")
            pieces.append(piece)
            if not event.get("more_body"):
                return b"".join(pieces)

    async def _commit(self, envelope: Envelope, content: bytes) -> str:
        """What SMTP would reply; a client that goes away loses only that."""
        loop = asyncio.get_running_loop()
        if self._committer is None:  # the loop is the server's, and there only now
            self._committer = Committer(loop, self._pool, self.router, self.deliver, self.timeout, _hangs, self._traced)
        group = tuple(dict.fromkeys(canonical(path) for path in envelope.rcpt_tos))
        reply: asyncio.Future[str] = loop.create_future()
        self._under_way.add(reply)
        reply.add_done_callback(self._under_way.discard)
        self._committer.commit(envelope, content, [group], reply.set_result)
        return await asyncio.shield(reply)

    def _traced(self, envelope: Envelope, content: bytes, id: str) -> tuple[Envelope, bytes]:
        trace = received_field(envelope, self.hostname, id, _PROTOCOL)
        return structs.replace(envelope, trace=trace.decode()), content


def _path(name: str, text: str, *, null: bool = False) -> str:
    if null and text == "":
        return ""
    try:
        address, rest = mail.parse_path(f"<{text}>", postmaster=not null)
    except ValueError as reason:
        raise _Refusal(422, f"553 5.1.{7 if null else 3} Bad address in {name}: {reason}") from None
    if rest or not address:
        raise _Refusal(422, f"553 5.1.3 Bad address in {name}")
    return address


def _hangs() -> None:
    LOG.error("A thread of the ingress hangs; restart the server when there are many.")


async def _answer(send: Send, status: int, told: MutableMapping[str, str]) -> None:
    body = json.dumps(told).encode() + b"\n"
    headers: list[Sequence[bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *_more_headers(status),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _more_headers(status: int) -> Iterable[tuple[bytes, bytes]]:
    if status == 401:
        yield b"www-authenticate", b"Bearer"
    elif status == 405:
        yield b"allow", b"POST"
    elif status == 503:
        yield b"retry-after", b"60"
