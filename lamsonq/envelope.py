"""The envelope of a message: who sent it to whom, in which session, and what the sender wants to be told.

Rules:

1. It is as received: no case is changed, no address is made canonical.
2. It is control data, and travels in the record of a job, never in the message, where anybody could forge it: the
   sender and the recipients in fields of their own, the rest in the job's metadata, under SESSION.
3. A record of a later version may say more: what is not known here is left out, and nothing fails.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from lamsonq.records import make_ready
from lamsonq.verdicts import UNCHECKED, Auth

SESSION = "session"
"""The key of a job's metadata under which `session_text` stands."""


class Notify(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the sender asks to be told of the delivery (RFC 3461): "" and {} where he did not say.

    `ret` is FULL or HDRS (section 4.3), `envid` an identifier of his own, in xtext (section 4.4). By recipient, as on
    the envelope, `notify` is NEVER or words of SUCCESS, FAILURE and DELAY with commas (section 4.1), and `orcpt` whom
    the message was first sent to, `rfc822;` and an address in xtext (section 4.2).
    """

    ret: str = ""
    envid: str = ""
    notify: dict[str, str] = msgspec.field(default_factory=dict)
    orcpt: dict[str, str] = msgspec.field(default_factory=dict)

    def wants(self, recipient: str, word: str) -> bool:
        """Whether SUCCESS, FAILURE or DELAY of this recipient is to be told: without NOTIFY, the latter two are."""
        return word in (self.notify.get(recipient) or "FAILURE,DELAY").upper().split(",")


UNASKED = Notify()


class _Session(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of the session: fields of the envelope, and, where they say anything, of the record in a job's
    metadata."""

    helo: str = ""
    login: str = ""
    tls: str = ""
    notify: Notify = UNASKED
    auth: Auth = UNCHECKED
    protocol: str = ""
    trace: str = ""


make_ready(_Session)
_SILENT = _Session()


class Envelope(_Session, frozen=True):
    """Who sent a message to whom, exactly as it was received, case kept.

    `mail_from` is "" for the null sender and None where nobody recorded one. `peer` is a socket's `(host, port)` or
    the name of a queue. `received` is seconds since the epoch, 0.0 where nobody looked at a clock. `helo` is what the
    client called itself, `login` who has logged in ("": nobody), `tls` the version of TLS ("": none), `protocol` the
    word of RFC 3848 for the way it came (`ESMTPS`). `trace` are the header fields that the receiver has put in front of
    the message, each with its line end: they leave with it, and are no part of its bytes.
    """

    mail_from: str | None
    rcpt_tos: tuple[str, ...]
    peer: object = None
    received: float = 0.0


def session_of(envelope: Envelope) -> dict[str, str]:
    """What a job's metadata keep of an envelope: nothing when there is nothing to tell."""
    kept = _Session(
        helo=envelope.helo,
        login=envelope.login,
        tls=envelope.tls,
        notify=envelope.notify,
        auth=envelope.auth,
        protocol=envelope.protocol,
        trace=envelope.trace,
    )
    return {} if kept == _SILENT else {SESSION: msgspec.json.encode(kept).decode()}


def restored(
    sender: str | None, recipients: tuple[str, ...], peer: object, received: float, metadata: Mapping[str, str]
) -> Envelope:
    """The envelope that a job was made from. What cannot be read of the session is left out."""
    kept = _SILENT
    if SESSION in metadata:
        try:
            kept = msgspec.json.decode(metadata[SESSION], type=_Session)
        except msgspec.MsgspecError:
            pass  # somebody else's field of this name: the message is worth more
    return Envelope(sender, recipients, peer, received, **msgspec.structs.asdict(kept))
