"""What was found out about who really wrote a message: the results of SPF, DKIM, DMARC and ARC (RFC 8601).

Rules:

1. A verdict is what a receiver of ours has found. It travels beside the message, in the job's record, never inside it:
   a header field that says the same may be anybody's.
2. A message that nobody has checked has no verdicts, and "none" for every method: nothing that asks for "pass" takes
   it for one.
"""

from __future__ import annotations

import msgspec

METHODS = ("spf", "dkim", "dmarc", "arc")


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What one method has come to.

    `method` is one of METHODS, `result` a word of RFC 8601 section 2.7 (`pass`, `fail`, `softfail`, `neutral`, `none`,
    `policy`, `temperror`, `permerror`), `reason` a few words for people, `properties` what was checked, as
    `{"smtp.mailfrom": "example.org"}` (RFC 8601 section 2.3).
    """

    method: str
    result: str
    reason: str = ""
    properties: dict[str, str] = msgspec.field(default_factory=dict)


class Auth(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """All verdicts about one message. `domain` is the one in its From header ("": there is not exactly one)."""

    verdicts: tuple[Verdict, ...] = ()
    domain: str = ""

    def result(self, method: str) -> str:
        """The best result of this method: "pass" if there is one, else the first, else "none"."""
        results = [verdict.result for verdict in self.verdicts if verdict.method == method]
        return "pass" if "pass" in results else next(iter(results), "none")

    @property
    def spf(self) -> str:
        """Whether the sending host may use the domain of the envelope's sender (RFC 7208)."""
        return self.result("spf")

    @property
    def dkim(self) -> str:
        """Whether a signature holds; whose it is, `verdicts` say (RFC 6376)."""
        return self.result("dkim")

    @property
    def dmarc(self) -> str:
        """Whether the domain of the From header stands behind this message (RFC 7489)."""
        return self.result("dmarc")

    @property
    def arc(self) -> str:
        """Whether the chain of those who passed the message on holds (RFC 8617)."""
        return self.result("arc")


UNCHECKED = Auth()
