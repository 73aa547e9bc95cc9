"""LMTP on its way in (RFC 2033): what Postfix and others speak with a server that has no queue of its own.

Rules:

1. Everything is as over SMTP (`smtp`, `session`), except what RFC 2033 changes: LHLO greets, HELO and EHLO do not; a
   message gets one reply for each RCPT that was answered 250, in their order (section 4.2); and every reply says
   an enhanced status code, since ENHANCEDSTATUSCODES has to be offered (section 5).
2. A recipient that was named twice is one recipient with two replies.
3. Each reply goes out when its recipient is done with: what a crash leaves unanswered is sent again, and nothing else.
4. Port 25 is not for LMTP (section 5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from lamsonq import mail
from lamsonq.errors import SettingsError
from lamsonq.routing import RoutingBase
from lamsonq.session import Session
from lamsonq.smtp import SMTPReceiver

SMTP_PORT = 25

_NO_LMTP = "500 5.5.1 This is LMTP (RFC 2033): greet with LHLO"
_STATUS = re.compile(r"([245])\d\d(?: |$)(?!\1\.\d{1,3}\.\d{1,3}(?: |$))")
_DEFAULTS = {"500": "5.5.2", "501": "5.5.4", "502": "5.5.1", "503": "5.5.1"}  # RFC 3463 section 3.6


class ReceiverOptions(TypedDict, total=False):
    """The arguments that SMTPReceiver takes by name only."""

    deliver: Callable[[mail.MailRequest], object] | None
    router: RoutingBase
    workers: int
    timeout: float
    size_limit: int
    hostname: str | None
    min_free: int


class LMTPSession(Session):
    """A session that is greeted with LHLO and answers for each recipient."""

    protocol = "LMTP"
    extensions = ("ENHANCEDSTATUSCODES", *Session.extensions)

    def groups(self, accepted: Sequence[str]) -> list[tuple[str, ...]]:
        return [(recipient,) for recipient in accepted]

    async def push(self, status: str | bytes | None) -> None:
        if isinstance(status, bytes):
            status = status.decode("ascii", "replace")
        await super().push(None if status is None else enhanced(status))

    async def check_helo_needed(self, helo: str = "LHLO") -> bool:  # noqa: ARG002 - aiosmtpd asks for HELO by name
        return await super().check_helo_needed("LHLO")

    async def smtp_LHLO(self, hostname: str | None) -> None:
        await self._greet("LHLO", hostname)

    async def smtp_EHLO(self, hostname: str | None) -> None:  # noqa: ARG002
        await self.push(_NO_LMTP)

    async def smtp_HELO(self, hostname: str | None) -> None:  # noqa: ARG002
        await self.push(_NO_LMTP)


class LMTPReceiver(SMTPReceiver):
    """An SMTPReceiver that speaks LMTP: each recipient of a message is answered for by a reply of its own.

    Takes what SMTPReceiver takes. Raises SettingsError for port 25.

    Source: Salmon's `server.LMTPReceiver`.
    """

    protocol = "LMTP"
    session = LMTPSession

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8824,
        socket: str | None = None,
        **options: Unpack[ReceiverOptions],
    ) -> None:
        super().__init__(host, port, socket, **options)
        self._refuse_port_of_smtp()

    def bind(self) -> None:
        super().bind()
        self._refuse_port_of_smtp()  # a port may also be handed to us

    def _refuse_port_of_smtp(self) -> None:
        if self.socket is None and self.port == SMTP_PORT:
            raise SettingsError(
                "LMTPReceiver(port=25): LMTP must not use SMTP's port (RFC 2033): take another one, 8824"
            )


def enhanced(reply: str) -> str:
    """A reply with an enhanced status code (RFC 2034), if it has to have one and does not; never the greeting."""
    text = " ".join(reply.split())
    code, _, words = text.partition(" ")
    if code == "220" or not _STATUS.match(text):
        return text
    return f"{code} {_DEFAULTS.get(code, f'{code[0]}.0.0')} {words}".rstrip()
