"""The mail servers of a domain (RFC 5321 section 5.1), in the order in which they are to be tried.

Rules:

1. MX records by preference, equal ones in random order; without any, the domain itself; a null MX (RFC 7505) means
   never. CNAMEs are followed by the resolver. At most HOSTS_MAX hosts that have an address (of LOOKUPS_MAX names, and
   for SEARCH_SECONDS in the DNS), and ADDRESSES_MAX addresses of each; IPv4 first, because more of the world believes
   mail from there.
2. What the DNS says for certain is an `SMTPError`; what it does not say (SERVFAIL, no answer in time) is a `Later`.
3. No mail comes back to us: where this host is among the servers, it and all that are not better are left out. And on
   port 25 no record, nor an address literal, leads to this machine's own loopback, which trusts us more than a stranger
   may use. (Behind another port there is a network that somebody built for tests.)
"""

from __future__ import annotations

import ipaddress
import random
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lamsonq.connection import Server, own_name
from lamsonq.errors import Later, SettingsError, SMTPError
from lamsonq.names import system_resolver

if TYPE_CHECKING:
    import dns.name
    import dns.resolver

HOSTS_MAX = 5
ADDRESSES_MAX = 3

DNS_SECONDS = 10.0
"""How long one question to the DNS may take."""

LOOKUPS_MAX = 20
"""So many names of hosts are looked up for one domain, whether they have addresses or not."""

SEARCH_SECONDS = 60.0
"""After so much time in the DNS no further host of a domain is looked up."""

_host_name = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class MailServers:
    """Finds the servers that listen on `port`. Without a `resolver` it asks those of /etc/resolv.conf.

    Raises SettingsError where dnspython is not installed or no resolver is configured.
    """

    def __init__(self, port: int = 25, resolver: dns.resolver.Resolver | None = None) -> None:
        try:
            import dns.name
            import dns.resolver
            import idna  # noqa: F401 - dnspython needs it for domains that are not ASCII
        except ImportError as error:
            raise SettingsError(
                "Relay without a host asks the DNS for mail servers: pip install 'lamsonq[mx]', or name a host"
            ) from error
        self.port = port
        self._codec = dns.name.IDNA_2008_Practical
        self._resolver = resolver or system_resolver("Relay without a host")

    def names(self, domain: str) -> list[str]:
        """The names of the hosts that take mail for a domain, the best first. Raises Later and SMTPError."""
        if domain.startswith("["):
            return [_literal(domain)]
        return [name.to_text(omit_final_dot=True) for name in self._exchanges(domain)[:HOSTS_MAX]]

    def servers(self, domain: str) -> Iterator[Server]:
        """The servers of a domain, to be tried in this order; at least one, else raises Later or SMTPError."""
        if domain.startswith("["):
            address = _literal(domain)
            if not self._may_be_asked(address):
                raise SMTPError(554, f"5.4.6 {domain} is no address of another mail server")
            yield Server(address, self.port, address)
            return
        later, found, spent = None, 0, 0.0
        for exchange in self._exchanges(domain):
            if spent > SEARCH_SECONDS:
                later = later or Later(f"the DNS takes too long to tell the mail servers of {domain}")
            if spent > SEARCH_SECONDS or found == HOSTS_MAX:
                break
            began, addresses = time.monotonic(), list[str]()
            try:
                addresses = self._addresses(exchange)
            except Later as error:
                later = error
            spent += time.monotonic() - began
            found += bool(addresses)
            for address in addresses:
                yield Server(exchange.to_text(omit_final_dot=True), self.port, address)
        if not found:
            raise later or SMTPError(550, f"5.4.4 no mail server of {domain} has an address")

    def spelled(self, address: str) -> str:
        """The address as every server understands it: where its local part is ASCII, the domain is made so as well
        (RFC 5890 section 2.3.2.1)."""
        local, _, domain = address.rpartition("@")
        if domain.isascii() or not local.isascii():
            return address
        try:
            return f"{local}@{self._name(domain).to_text(omit_final_dot=True)}"
        except SMTPError:
            return address

    def _exchanges(self, domain: str) -> list[dns.name.Name]:
        import dns.name
        import dns.resolver

        name = self._name(domain)
        try:
            records = [(record.preference, record.exchange) for record in self._resolve(name, "MX")]
        except dns.resolver.NXDOMAIN as error:
            raise SMTPError(550, f"5.1.2 there is no domain {domain}") from error
        except dns.resolver.NoAnswer:
            records = [(0, name)]
        records = [record for record in records if record[1] != dns.name.root]
        if not records:
            raise SMTPError(556, f"5.1.10 {domain} takes no mail")
        ours = min((preference for preference, host in records if _is_ours(host)), default=None)
        if ours is not None:
            records = [record for record in records if record[0] < ours]
        if not records:
            raise SMTPError(554, f"5.4.6 mail for {domain} leads back to this host, which has no route for it")
        random.shuffle(records)  # RFC 5321 section 5.1: spreads the load; the sort keeps the order of equal ones
        records.sort(key=lambda record: record[0])
        return list(dict.fromkeys(host for _, host in records))[:LOOKUPS_MAX]

    def _addresses(self, host: dns.name.Name) -> list[str]:
        """The addresses of a host that may be asked, [] when it has none. Raises Later when the DNS does not say."""
        import dns.resolver

        if not _host_name.fullmatch(host.to_text(omit_final_dot=True)):
            return []
        later, addresses = None, list[str]()
        for kind in ("A", "AAAA"):
            try:
                addresses += [record.address for record in self._resolve(host, kind)]
            except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
                continue
            except Later as error:
                later = error
        if later is not None and not addresses:
            raise later
        return [address for address in addresses if self._may_be_asked(address)][:ADDRESSES_MAX]

    def _resolve(self, name: dns.name.Name, kind: str) -> dns.resolver.Answer:
        """Raises NXDOMAIN, NoAnswer, and Later for all other trouble."""
        import dns.exception
        import dns.resolver

        try:
            return self._resolver.resolve(name, kind, search=False, lifetime=DNS_SECONDS)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            raise
        except dns.exception.DNSException as error:
            words = " ".join(str(error).split())
            raise Later(f"the DNS does not tell the {kind} record of {name.to_text(True)}: {words}") from error

    def _name(self, domain: str) -> dns.name.Name:
        import dns.exception
        import dns.name

        try:
            return dns.name.from_unicode(domain, idna_codec=self._codec).canonicalize()
        except (dns.exception.DNSException, UnicodeError) as error:
            raise SMTPError(550, f"5.1.2 {domain} is no domain of the DNS") from error

    def _may_be_asked(self, address: str) -> bool:
        """Rule 3."""
        ip = ipaddress.ip_address(address)
        mapped = getattr(ip, "ipv4_mapped", None)
        ip = mapped if mapped is not None else ip
        local = ip.is_loopback or ip.is_link_local
        return not (ip.is_unspecified or ip.is_multicast or (local and self.port == 25))


def _is_ours(host: dns.name.Name) -> bool:
    return host.to_text(omit_final_dot=True).lower() == own_name().lower()


def _literal(domain: str) -> str:
    """The address inside `[192.0.2.1]` or `[IPv6:2001:db8::1]` (RFC 5321 section 4.1.3). Raises SMTPError."""
    text = domain.strip("[]")
    text = text[5:] if text[:5].lower() == "ipv6:" else text
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise SMTPError(550, f"5.1.2 {domain} is no address") from error
