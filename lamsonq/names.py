"""Questions to the DNS about one message: all of them under one deadline.

Rules:

1. What the DNS says for certain is a list, empty where there is no such name or record. What it does not say
   (SERVFAIL, no answer in time, no time left) is an `Unsure`.
2. A name that cannot exist (a label of 64 octets, a stranger's backslash) is not asked for: nothing has that name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lamsonq.errors import SettingsError

if TYPE_CHECKING:
    import dns.resolver

Ask = Callable[[str, str], list[str]]
"""(name, "TXT" | "A" | "AAAA" | "MX" | "PTR") -> what the records say; exchanges of MX by preference. Raises Unsure."""

QUESTION_SECONDS = 5.0
"""How long one question may take, at most."""

RECORDS_MAX = 100
"""So many records of one answer are looked at."""

CACHE_MAX = 2000
"""Answers that are kept for as long as the DNS allows."""


class Unsure(Exception):
    """The DNS does not say; later it may."""


class Names:
    """An `Ask` that has until `deadline` (of time.monotonic) for all questions together."""

    def __init__(self, resolver: dns.resolver.Resolver, deadline: float) -> None:
        self._resolver, self._deadline = resolver, deadline

    def __call__(self, name: str, kind: str) -> list[str]:
        import dns.exception
        import dns.name
        import dns.resolver

        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Unsure("no time was left for the DNS")
        try:
            # Label by label: in dnspython's own reading of a text a backslash has a meaning.
            asked = dns.name.Name([*(label.encode() for label in name.removesuffix(".").split(".")), b""])
        except (dns.exception.DNSException, UnicodeError):
            return []
        try:
            answer = self._resolver.resolve(asked, kind, search=False, lifetime=min(left, QUESTION_SECONDS))
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer, dns.resolver.YXDOMAIN):
            return []
        except dns.exception.DNSException as error:
            raise Unsure(f"the DNS does not tell the {kind} record of {name}") from error
        records = list(answer)[:RECORDS_MAX]
        if kind == "TXT":
            return [b"".join(record.strings).decode("utf-8", "replace") for record in records]
        if kind == "MX":
            records.sort(key=lambda record: record.preference)
            return [record.exchange.to_text(omit_final_dot=True) for record in records]
        if kind == "PTR":
            return [record.target.to_text(omit_final_dot=True) for record in records]
        return [record.address for record in records]


def system_resolver(who: str) -> dns.resolver.Resolver:
    """A resolver with a cache, which asks the servers of /etc/resolv.conf. Raises SettingsError, in the words of `who`
    needs it, where that names none."""
    import dns.resolver

    try:
        resolver = dns.resolver.Resolver()
    except (dns.resolver.NoResolverConfiguration, OSError) as error:
        raise SettingsError(f"{who} needs a DNS server: {error}") from error
    resolver.cache = dns.resolver.LRUCache(CACHE_MAX)
    return resolver


def ascii_domain(domain: str) -> str:
    """The domain in lower case as the DNS knows it, U-labels as A-labels (RFC 5890); "" for what is no domain."""
    text = domain.removesuffix(".")
    if not text.isascii():
        import idna

        try:
            text = idna.encode(text, uts46=True).decode()
        except (idna.IDNAError, UnicodeError):
            return ""
    labels = text.split(".")
    fits = len(text) <= 253 and all(0 < len(label) <= 63 for label in labels)
    return text.lower() if fits and not set(text) & set('[]\\/:@ \t\r\n\0"();,') else ""
