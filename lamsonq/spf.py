"""Whether a host may send mail for a domain: SPF (RFC 7208), as a function of an address, a sender and the DNS.

Rules:

1. Pure: the DNS is an argument. `check` never raises.
2. The limits of section 4.6.4 hold for the whole check, through every include and redirect: LOOKUPS_MAX terms that ask
   the DNS, VOID_MAX answers without a record, NAMES_MAX mail servers or names of an address.
3. A record is read whole before any of it is evaluated, so one with a mistake anywhere is a permerror (section 4.6).
4. The text that a domain offers as explanation (section 6.2) is not fetched: it is a stranger's, and nobody needs it.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from lamsonq.names import Ask, Unsure

LOOKUPS_MAX = 10
VOID_MAX = 2
NAMES_MAX = 10
RECORD_MAX = 8 * 1024
"""Characters of a record; one that is longer is a permerror."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_QUALIFIERS = {"": "pass", "+": "pass", "-": "fail", "~": "softfail", "?": "neutral"}
_directive = re.compile(r"([+?~-]?)(all|include|a|mx|ptr|ip4|ip6|exists)((?:[:/].*)?)", re.IGNORECASE)
_modifier = re.compile(r"([A-Za-z][A-Za-z0-9._-]*)=(.*)")
_dual = re.compile(r"(?::(?P<domain>.+?))?(?:/(?P<four>0|[1-9]\d?))?(?://(?P<six>0|[1-9]\d{0,2}))?")
_macro = re.compile(r"%(?:([%_-])|\{([slodipvhcrt])(\d{0,3})(r?)([.+,/_=-]*)\})|([!-$&-~])|(.)", re.I | re.S)
_domain_end = re.compile(
    r".*(?:%\{[^{}]*\}|\.(?:[A-Za-z0-9]*[A-Za-z][A-Za-z0-9]*|[A-Za-z0-9]+-[A-Za-z0-9-]*[A-Za-z0-9])\.?)"
)


class _PermError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Term:
    """One mechanism: what it is, what it says if it matches, and its argument."""

    kind: str
    result: str
    domain: str | None = None
    four: int = 32
    six: int = 128
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None


@dataclass(frozen=True, slots=True)
class _Record:
    terms: list[_Term] = field(default_factory=list)
    redirect: str | None = None


def check(ask: Ask, ip: Address, sender: str, helo: str) -> tuple[str, str]:
    """The result for `sender` (an address; "" stands for postmaster at `helo`, section 2.4) and why.

    The result is a word of section 2.6: pass, fail, softfail, neutral, none, temperror or permerror.
    """
    if getattr(ip, "ipv4_mapped", None):  # section 5
        ip = ip.ipv4_mapped  # type: ignore[union-attr, assignment]
    local, _, domain = sender.rpartition("@") if sender else ("postmaster", "@", helo)
    try:
        return _Check(ask, ip, local or "postmaster", domain, helo).host(domain), ""
    except Unsure as error:
        return "temperror", str(error)
    except _PermError as error:
        return "permerror", str(error)


class _Check:
    """One check, with what it has asked so far."""

    def __init__(self, ask: Ask, ip: Address, local: str, domain: str, helo: str) -> None:
        self._ask, self._ip = ask, ip
        self._local, self._domain, self._helo = local, domain, helo
        self._lookups = self._voids = 0
        self._names: list[str] | None = None

    def host(self, domain: str) -> str:
        """check_host() of section 4. Raises Unsure and _PermError."""
        if not _is_domain(domain):
            return "none"
        texts = self._ask(domain, "TXT")
        records = [text for text in texts if re.match(r"v=spf1(?: |\Z)", text, re.IGNORECASE)]
        if len(records) > 1:
            raise _PermError(f"{domain} has {len(records)} SPF records")
        if not records:
            return "none"
        record = _read(records[0])
        for term in record.terms:
            if self._matches(term, domain):
                return term.result
        if record.redirect is None:
            return "neutral"  # section 4.7
        self._count()
        target = self._expand(record.redirect, domain)
        result = self.host(target)
        if result == "none":
            raise _PermError(f"redirect to {target}, which has no SPF record")
        return result

    def _matches(self, term: _Term, domain: str) -> bool:
        if term.kind == "all":
            return True
        if term.network is not None:
            return term.network.version == self._ip.version and self._ip in term.network
        self._count()
        target = domain if term.domain is None else self._expand(term.domain, domain)
        ways: dict[str, Callable[[], bool]] = {
            "include": lambda: self._includes(target),
            "a": lambda: self._is_at(self._addresses(target), term),
            "mx": lambda: self._is_exchange(target, term),
            "ptr": lambda: any(_below(name, target) for name in self._own_names()),
            "exists": lambda: bool(self._heard(target, "A")),
        }
        return ways[term.kind]()

    def _includes(self, target: str) -> bool:
        result = self.host(target)
        if result == "none":
            raise _PermError(f"include of {target}, which has no SPF record")
        return result == "pass"

    def _is_exchange(self, target: str, term: _Term) -> bool:
        names = self._heard(target, "MX")
        if len(names) > NAMES_MAX:
            raise _PermError(f"{target} has more than {NAMES_MAX} mail servers")
        return any(self._is_at(self._addresses(name), term) for name in names if name not in ("", "."))

    def _is_at(self, addresses: list[str], term: _Term) -> bool:
        prefix = term.four if self._ip.version == 4 else term.six
        own = ipaddress.ip_network((self._ip, prefix), strict=False)
        return any(ipaddress.ip_address(address) in own for address in addresses)

    def _addresses(self, name: str) -> list[str]:
        return self._heard(name, "A" if self._ip.version == 4 else "AAAA")

    def _own_names(self) -> list[str]:
        """The names of the sending host that lead back to it (section 5.5)."""
        if self._names is None:
            self._names = []
            try:
                names = self._heard(self._ip.reverse_pointer, "PTR")
            except Unsure:
                names = []
            kind = "A" if self._ip.version == 4 else "AAAA"
            for name in names[:NAMES_MAX]:
                try:
                    addresses = self._ask(name, kind)
                except Unsure:
                    continue
                if any(ipaddress.ip_address(address) == self._ip for address in addresses):
                    self._names.append(name)
        return self._names

    def _heard(self, name: str, kind: str) -> list[str]:
        """Ask, and count an answer without a record (section 4.6.4)."""
        answer = self._ask(name, kind)
        self._voids += not answer
        if self._voids > VOID_MAX:
            raise _PermError(f"more than {VOID_MAX} names without a record")
        return answer

    def _count(self) -> None:
        self._lookups += 1
        if self._lookups > LOOKUPS_MAX:
            raise _PermError(f"more than {LOOKUPS_MAX} questions to the DNS")

    # -- macros, section 7 -------------------------------------------------------------------------------------

    def _expand(self, spec: str, domain: str) -> str:
        text = "".join(self._piece(found, domain) for found in _macro.finditer(spec)).removesuffix(".")
        while len(text) > 253:  # section 7.3: labels are dropped from the left
            text = text.partition(".")[2]
        return text

    def _piece(self, found: re.Match[str], domain: str) -> str:
        escape, letter, digits, reverse, delimiters, literal, _ = found.groups()
        if letter is None:
            return {"%": "%", "_": " ", "-": "%20"}[escape] if escape else literal or ""
        parts = re.split(f"[{re.escape(delimiters or '.')}]", self._value(letter.lower(), domain)[:512])
        parts = parts[::-1] if reverse else parts
        text = ".".join(parts[-int(digits) :] if digits else parts)
        return quote(text, safe="-._~") if letter.isupper() else text

    def _value(self, letter: str, domain: str) -> str:
        if letter == "p":
            names = sorted(self._own_names(), key=lambda name: (name != domain, not _below(name, domain)))
            return names[0] if names else "unknown"
        six = self._ip.version == 6
        dotted = ".".join(self._ip.exploded.replace(":", "")) if six else str(self._ip)
        values = {"s": f"{self._local}@{self._domain}", "l": self._local, "o": self._domain, "d": domain}
        values |= {"i": dotted, "v": "ip6" if six else "in-addr", "h": self._helo}
        values |= {"c": str(self._ip), "r": "unknown", "t": str(int(time.time()))}
        return values[letter]


# -- reading a record, sections 4.6, 5, 6 and 12 ---------------------------------------------------------------------


def _read(text: str) -> _Record:
    """Raises _PermError."""
    if len(text) > RECORD_MAX or not text.isascii():
        raise _PermError("an SPF record that is too long or not ASCII")
    terms, modifiers = list[_Term](), dict[str, str]()
    for word in filter(None, text.split(" ")[1:]):
        if found := _directive.fullmatch(word):
            terms.append(_term(found[2].lower(), _QUALIFIERS[found[1]], found[3]))
        elif found := _modifier.fullmatch(word):
            name, value = found[1].lower(), found[2]
            if name in ("redirect", "exp"):
                if name in modifiers:
                    raise _PermError(f"two {name}= in an SPF record")
                modifiers[name] = _spec(value)
            _check_macros(value, explains=True)
        else:
            raise _PermError(f"an SPF record with {word[:60]!r}")
    # section 5.1: redirect says nothing where there is an "all"
    redirect = None if any(term.kind == "all" for term in terms) else modifiers.get("redirect")
    return _Record(terms, redirect)


def _term(kind: str, result: str, rest: str) -> _Term:
    if kind == "all" and not rest:
        return _Term(kind, result)
    if kind in ("ip4", "ip6"):
        return _Term(kind, result, network=_network(kind, rest))
    if kind in ("include", "exists", "ptr"):
        if kind == "ptr" and not rest:
            return _Term(kind, result)
        if rest.startswith(":"):
            return _Term(kind, result, _spec(rest[1:]))
    elif found := _dual.fullmatch(rest):
        four, six = int(found["four"] or 32), int(found["six"] or 128)
        four, six = 0 if found["four"] == "0" else four, 0 if found["six"] == "0" else six
        if kind != "all" and four <= 32 and six <= 128:
            return _Term(kind, result, None if found["domain"] is None else _spec(found["domain"]), four, six)
    raise _PermError(f"an SPF record with {(kind + rest)[:60]!r}")


def _network(kind: str, rest: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    address, slash, prefix = rest.removeprefix(":").partition("/")
    try:
        if not rest.startswith(":") or (slash and not re.fullmatch(r"0|[1-9]\d{0,2}", prefix)) or "%" in address:
            raise ValueError
        network = f"{address}/{prefix}" if slash else address
        if kind == "ip4":
            return ipaddress.IPv4Network(network, strict=False)
        return ipaddress.IPv6Network(network, strict=False)
    except ValueError:
        raise _PermError(f"an SPF record with {(kind + rest)[:60]!r}") from None


def _spec(text: str) -> str:
    """A domain-spec (section 7.1). Raises _PermError."""
    _check_macros(text, explains=False)
    if not _domain_end.fullmatch(text):
        raise _PermError(f"an SPF record with the domain {text[:60]!r}")
    return text


def _check_macros(text: str, *, explains: bool) -> None:
    for found in _macro.finditer(text):
        letter = (found[2] or "").lower()
        wrong = found[7] is not None or (found[3] and int(found[3]) == 0)
        if wrong or (letter and letter in "crt" and not explains):
            raise _PermError(f"an SPF record with the macro {text[:60]!r}")


def _is_domain(domain: str) -> bool:
    """Section 4.3: at least two labels, none of them empty or longer than 63 octets."""
    labels = domain.removesuffix(".").split(".")
    return len(labels) > 1 and len(domain) <= 253 and all(0 < len(label.encode()) <= 63 for label in labels)


def _below(name: str, domain: str) -> bool:
    """Whether a name is the domain or inside it."""
    name, domain = name.lower().removesuffix("."), domain.lower().removesuffix(".")
    return name == domain or name.endswith(f".{domain}")
