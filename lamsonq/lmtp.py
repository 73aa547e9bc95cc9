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

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypedDict, Unpack

from lamsonq import mail
from lamsonq.authentication import Verifier
from lamsonq.delivery import Reports
from lamsonq.errors import SettingsError
from lamsonq.limits import Limits
from lamsonq.routing import RoutingBase
from lamsonq.session import Check, Session
from lamsonq.smtp import SMTPReceiver
from lamsonq.tls import TLS
from lamsonq.wire import Command

SMTP_PORT = 25

_NO_LMTP = "500 5.5.1 This is LMTP (RFC 2033): greet with LHLO"


class ReceiverOptions(TypedDict, total=False):
    """The arguments that SMTPReceiver takes by name only."""

    deliver: Callable[[mail.MailRequest], object] | None
    router: RoutingBase
    workers: int
    timeout: float
    size_limit: int
    hostname: str | None
    min_free: int
    tls: TLS | None
    logins: Callable[[str, str], bool] | None
    login_required: bool
    hosts: Sequence[str] | None
    limits: Limits | None
    trusted: Sequence[str]
    proxies: Sequence[str]
    refuse_bare: bool
    on_connect: Check | None
    on_mail: Check | None
    on_rcpt: Check | None
    verify: bool | Verifier
    authserv_id: str | None
    reports: Reports | None


class LMTPSession(Session):
    """A session that is greeted with LHLO and answers for each recipient."""

    protocol = "LMTP"
    greeting = "LHLO"

    def groups(self, accepted: Sequence[str]) -> list[tuple[str, ...]]:
        return [(recipient,) for recipient in accepted]

    def _lhlo(self, hostname: str | None) -> None:
        self._greet("LHLO", hostname)

    def _no_smtp(self, hostname: str | None) -> None:  # noqa: ARG002
        self.say(_NO_LMTP)

    commands: ClassVar[Mapping[str, Command]] = {
        **Session.commands,
        "LHLO": _lhlo,
        "EHLO": _no_smtp,
        "HELO": _no_smtp,
    }


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
