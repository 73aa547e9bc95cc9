"""Enhanced status codes (RFC 3463): finding them in text, and what they mean in words.

Rules:

1. A code is class.subject.detail, as `5.7.26`; the class alone says whether it is for good (5) or for now (4).
2. A code that nobody has registered still has its class, and the words for what is known of it.
3. Four numbers with points between them are an IP address, and a part of that is no code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lamsonq.errors import CLASSES, SUBJECTS

# The registry of RFC 5248 ("SMTP Enhanced Status Codes"), in our words where they are shorter.
DETAILS = {
    (0, 0): "Other undefined status",
    (1, 0): "Other address status",
    (1, 1): "Bad destination mailbox address",
    (1, 2): "Bad destination system address",
    (1, 3): "Bad destination mailbox address syntax",
    (1, 4): "Destination mailbox address ambiguous",
    (1, 5): "Destination address valid",
    (1, 6): "Destination mailbox has moved, no forwarding address",
    (1, 7): "Bad sender's mailbox address syntax",
    (1, 8): "Bad sender's system address",
    (1, 9): "Message relayed to a non-compliant mailer",
    (1, 10): "Recipient's domain takes no mail (null MX)",
    (2, 0): "Other or undefined mailbox status",
    (2, 1): "Mailbox disabled, not accepting messages",
    (2, 2): "Mailbox full",
    (2, 3): "Message longer than the administrative limit",
    (2, 4): "Mailing list expansion problem",
    (3, 0): "Other or undefined mail system status",
    (3, 1): "Mail system full",
    (3, 2): "System not accepting network messages",
    (3, 3): "System not capable of selected features",
    (3, 4): "Message too big for the system",
    (3, 5): "System incorrectly configured",
    (3, 6): "Requested priority was changed",
    (4, 0): "Other or undefined network or routing status",
    (4, 1): "No answer from host",
    (4, 2): "Bad connection",
    (4, 3): "Directory server failure",
    (4, 4): "Unable to route",
    (4, 5): "Mail system congestion",
    (4, 6): "Routing loop detected",
    (4, 7): "Delivery time expired",
    (5, 0): "Other or undefined protocol status",
    (5, 1): "Invalid command",
    (5, 2): "Syntax error",
    (5, 3): "Too many recipients",
    (5, 4): "Invalid command arguments",
    (5, 5): "Wrong protocol version",
    (5, 6): "Authentication exchange line is too long",
    (6, 0): "Other or undefined media error",
    (6, 1): "Media not supported",
    (6, 2): "Conversion required and prohibited",
    (6, 3): "Conversion required but not supported",
    (6, 4): "Conversion with loss performed",
    (6, 5): "Conversion failed",
    (6, 6): "Message content not available",
    (6, 7): "Non-ASCII addresses not permitted for that sender or recipient",
    (6, 8): "UTF-8 string reply is required, but not permitted",
    (6, 9): "UTF-8 header cannot be transferred to a recipient",
    (7, 0): "Other or undefined security status",
    (7, 1): "Delivery not authorized, message refused",
    (7, 2): "Mailing list expansion prohibited",
    (7, 3): "Security conversion required but not possible",
    (7, 4): "Security features not supported",
    (7, 5): "Cryptographic failure",
    (7, 6): "Cryptographic algorithm not supported",
    (7, 7): "Message integrity failure",
    (7, 8): "Authentication credentials invalid",
    (7, 9): "Authentication mechanism is too weak",
    (7, 10): "Encryption needed",
    (7, 11): "Encryption required for the requested authentication mechanism",
    (7, 12): "A password transition is needed",
    (7, 13): "User account disabled",
    (7, 14): "Trust relationship required",
    (7, 15): "Priority level is too low",
    (7, 16): "Message is too big for its priority",
    (7, 17): "Mailbox owner has changed",
    (7, 18): "Domain owner has changed",
    (7, 19): "Required recipient-valid-since test cannot be completed",
    (7, 20): "No passing DKIM signature found",
    (7, 21): "No acceptable DKIM signature found",
    (7, 22): "No valid author-matched DKIM signature found",
    (7, 23): "SPF validation failed",
    (7, 24): "SPF validation error",
    (7, 25): "Reverse DNS validation failed",
    (7, 26): "Multiple authentication checks failed",
    (7, 27): "Sender's domain takes no mail (null MX)",
    (7, 28): "Mail flood detected",
    (7, 29): "ARC validation failure",
    (7, 30): "REQUIRETLS support required",
}

_code = re.compile(r"(?<![\w.-])([245])\.(\d{1,3})\.(\d{1,3})(?![\w-]|\.\d)", re.ASCII)
_reply = re.compile(r"(?<![\w.,:/#-])(?:#\s?)?([245][0-5]\d)(?=[ -]\S|[.,;:)]?\s|$)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Status:
    """One enhanced status code. `str()` is `5.7.26`."""

    primary: int
    subject: int
    detail: int

    def __str__(self) -> str:
        return f"{self.primary}.{self.subject}.{self.detail}"

    def words(self) -> tuple[str, str, str]:
        """What class, subject and detail mean; unknown ones say so."""
        return (
            CLASSES.get(self.primary, f"Unknown class {self.primary}"),
            SUBJECTS.get(self.subject, f"Unknown subject {self.subject}"),
            DETAILS.get((self.subject, self.detail), f"Unregistered status X.{self.subject}.{self.detail}"),
        )


def find_status(text: str) -> Status | None:
    """The first enhanced code in a text: in `5.0.0 (permanent failure)`, `#5.1.1` or `550-5.7.26 no`.

    One that stands next to an SMTP reply of the same class is preferred, as what else has that form may be a version.
    """
    found = [Status(*map(int, code.groups())) for code in _code.finditer(_spaced(text))]
    reply = find_reply(text)
    fitting = [status for status in found if reply is None or status.primary == reply // 100]
    return next(iter([*fitting, *found]), None)


def find_reply(text: str) -> int | None:
    """The first SMTP reply code in a text (RFC 5321 section 4.2), as 550; None when there is none."""
    found = _reply.search(_spaced(text))
    return int(found[1]) if found else None


def _spaced(text: str) -> str:
    """`550-5.7.26` and `#5.1.1` with the mark between as a space, so that both parts stand alone."""
    return re.sub(r"(?<=\d)-(?=[245]\.\d)|#(?=[245]\.\d)", " ", text)
