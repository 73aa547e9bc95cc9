"""What the domain in a From header asks of receivers: DMARC (RFC 7489), as a function of verdicts and the DNS.

Rules:

1. Pure: the DNS is an argument. `Policies` asks each name once.
2. The organizational domain is found by walking up the DNS (DMARCbis section 4.10), with at most WALK_MAX questions:
   there is no list of public suffixes that could be out of date.
3. `pct` is ignored, as DMARCbis does: whether a message passes is no matter of chance.
4. A domain stands behind a message if SPF or DKIM passed for it, or, unless the record says strict, for one with the
   same organizational domain (RFC 7489 section 3.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lamsonq.names import Ask, Unsure
from lamsonq.verdicts import Verdict

WALK_MAX = 8
"""Questions of one walk (DMARCbis section 4.10)."""

_POLICIES = ("none", "quarantine", "reject")
_version = re.compile(r"v[ \t]*=[ \t]*DMARC1[ \t]*(?:;|\Z)")


@dataclass(frozen=True, slots=True)
class Record:
    """A DMARC record: `tags` as they stand, of the domain `domain`."""

    domain: str
    tags: dict[str, str]

    def policy(self, name: str) -> str:
        """What a tag of p, sp and np asks for; "" where it says nothing that is known."""
        value = self.tags.get(name, "").lower()
        return value if value in _POLICIES else ""

    def strict(self, method: str) -> bool:
        return self.tags.get({"spf": "aspf", "dkim": "adkim"}[method], "r").lower() == "s"


class Policies:
    """The records of the DNS, each asked for once."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._records: dict[str, Record | None] = {}

    def record(self, domain: str) -> Record | None:
        """The record of exactly this domain; None where it has not exactly one. Raises Unsure."""
        if domain not in self._records:
            found = [text for text in self._ask(f"_dmarc.{domain}", "TXT") if _version.match(text)]
            self._records[domain] = Record(domain, _tags(found[0])) if len(found) == 1 else None
        return self._records[domain]

    def organizational(self, domain: str) -> str:
        """The organizational domain (DMARCbis section 4.10.2). Raises Unsure."""
        highest = domain
        for name in _walk(domain):
            record = self.record(name)
            if record is None:
                continue
            psd = record.tags.get("psd", "u").lower()
            if psd == "n":
                return name
            if psd == "y" and name != domain:  # one label below a public suffix
                return domain.removesuffix(f".{name}").rpartition(".")[2] + f".{name}"
            highest = name
        return highest

    def governing(self, domain: str) -> tuple[Record | None, str]:
        """The record that speaks for a domain, and the policy it asks for (section 4.10.1). Raises Unsure."""
        own = self.record(domain)
        if own is not None:
            return _asked(own, own.policy("p"))
        record = self.record(self.organizational(domain))
        if record is None:  # perhaps a public suffix speaks for what is registered below it
            found = (self.record(name) for name in _walk(domain))
            record = next(filter(None, found), None)
        if record is None:
            return None, ""
        below = record.policy("sp") or record.policy("p")
        if record.policy("np") and not self._exists(domain):
            below = record.policy("np")
        return _asked(record, below)

    def _exists(self, domain: str) -> bool:
        return any(self._ask(domain, kind) for kind in ("A", "AAAA", "MX"))


def evaluate(ask: Ask, domain: str, identities: list[tuple[str, str, str]]) -> Verdict:
    """The verdict for the domain of the From header.

    `identities` are (method, result, domain) of what SPF and DKIM have found. Never raises.
    """
    policies = Policies(ask)
    properties = {"header.from": domain}
    try:
        record, policy = policies.governing(domain)
    except Unsure as error:
        return Verdict("dmarc", "temperror", str(error), properties)
    if record is None:
        return Verdict("dmarc", "none", "no policy", properties)
    properties["policy.dmarc"] = policy
    unsure = ""
    # Those that have passed first: where one of them is aligned, nothing else matters.
    for method, result, other in sorted(identities, key=lambda identity: identity[1] != "pass"):
        if result not in ("pass", "temperror"):
            continue
        try:
            if not _aligned(policies, record, method, domain, other):
                continue
        except Unsure as error:
            unsure = str(error)
            continue
        if result == "pass":
            return Verdict("dmarc", "pass", "", properties)
        unsure = f"{method} may pass later"
    return Verdict("dmarc", "temperror" if unsure else "fail", unsure, properties)


def _aligned(policies: Policies, record: Record, method: str, domain: str, other: str) -> bool:
    if domain == other:
        return True
    if record.strict(method) or not other:
        return False
    return policies.organizational(domain) == policies.organizational(other)


def _walk(domain: str) -> list[str]:
    """The domain and those above it that are asked (DMARCbis section 4.10): of a long one, the last seven labels."""
    labels = domain.split(".")
    first = 1 if len(labels) <= WALK_MAX else len(labels) - (WALK_MAX - 1)
    return [domain, *(".".join(labels[cut:]) for cut in range(first, len(labels)))]


def _asked(record: Record, policy: str) -> tuple[Record | None, str]:
    """RFC 7489 section 6.6.3: a record that asks for nothing known but for reports means none, else is no record."""
    if policy or record.tags.get("rua"):
        return record, policy or "none"
    return None, ""


def _tags(text: str) -> dict[str, str]:
    """The tags of a record, the first of each name."""
    tags: dict[str, str] = {}
    for part in text[:4096].split(";"):
        name, equals, value = part.partition("=")
        if equals:
            tags.setdefault(name.strip(), value.strip())
    return tags
