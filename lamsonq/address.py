"""Mail addresses: the strict grammar of the envelope, and the lenient reading of address headers.

Rules:

1. On the envelope an address is a Mailbox of RFC 5321 section 4.1.2, with the UTF-8 of RFC 6531, or it is
   refused. What is accepted holds no control, invisible or unassigned character and no surrogate, is in Unicode
   form NFC (its domain in NFKC), is no encoded word, and keeps the limits of section 4.5.3.1: local part 64 octets,
   domain 255, label 63.
2. An address header is read element by element; an element that is broken (a quote, comment or bracket that
   never ends, a second "<") has no address. Whatever comes out has passed rule 1. Encoded words are never decoded
   before the structure is read, so a display name cannot become an address.
3. Reading is linear in the length of the text and never raises.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

LOCAL_PART_MAX = 64
DOMAIN_MAX = 255
LABEL_MAX = 63
ADDRESSES_MAX = 1000
"""How many addresses of one header are read when a stranger wrote it."""

# Sets that leave out, instead of ones that reach up to U+10FFFF: `re` takes 50 ms to compile those.
_ATOM = r"""[^\x00-\x20"(),.:;<>@\[\\\]\x7f]+"""
_DOT_STRING = rf"{_ATOM}(?:\.{_ATOM})*"
_QUOTED = r'"(?:[^\x00-\x1f"\\\x7f]|\\[ -~])*"'
_NO_LABEL = r"\x00-,./:-@\[-`{-\x7f"
"""What is in ASCII neither letter, digit nor hyphen."""
_LABEL = rf"[^{_NO_LABEL}-](?:[^{_NO_LABEL}]*[^{_NO_LABEL}-])?"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_MAILBOX = rf"(?P<local>{_DOT_STRING}|{_QUOTED})@(?P<domain>{_DOMAIN}|\[[!-Z^-~]*\])"
_mailbox = re.compile(_MAILBOX)
_dot_string = re.compile(_DOT_STRING)
_path = re.compile(rf"<(?:@{_DOMAIN}(?:,@{_DOMAIN})*:)?(?P<mailbox>{_MAILBOX})>")
_encoded_word = re.compile(r"=\?.*\?=")
_control = re.compile(r"[\x00-\x1f\x7f]")


def is_path_address(address: str) -> bool:
    """Whether this is a Mailbox of RFC 5321: `joe@x.org`, `"joe b"@x.org` or `j@[10.0.0.1]`."""
    return not _objection(address)


def is_domain(text: str) -> bool:
    """Whether this can stand behind the @ of an address: `x.org`, or `[10.0.0.1]`."""
    return is_path_address(f"a@{text}")


def parse_path(argument: str, *, null: bool = False, postmaster: bool = False) -> tuple[str, str]:
    """The address and what follows it, of a MAIL or RCPT argument: `<a@b> SIZE=3` gives `("a@b", " SIZE=3")`.

    `null` allows `<>`, which gives "" (MAIL, RFC 5321 section 4.5.5), `postmaster` allows `<postmaster>` (RCPT,
    section 4.5.1). A source route is dropped (appendix C). Raises ValueError with a reason that quotes nothing
    of the argument.
    """
    argument = argument.lstrip(" ")
    if not argument.startswith("<"):
        raise ValueError("the address must stand in angle brackets")
    address, end = _special_path(argument, null, postmaster)
    if not end:
        found = _path.match(argument)
        if not found:
            raise ValueError("that is no address (RFC 5321 section 4.1.2)")
        address, end = found["mailbox"], found.end()
        if objection := _objection(address):
            raise ValueError(objection)
    rest = argument[end:]
    if _control.search(rest) or (rest and not rest.startswith(" ")):
        raise ValueError("only a space and parameters may follow the address")
    return address, rest


def _special_path(argument: str, null: bool, postmaster: bool) -> tuple[str, int]:
    if argument.startswith("<>"):
        if not null:
            raise ValueError("the null address has no place here")
        return "", 2
    if postmaster and argument[:12].lower() == "<postmaster>":
        return argument[1:11], 12
    return "", 0


@lru_cache(1024)
def _objection(address: str) -> str:
    """Why this is no address; "" when it is one."""
    found = _mailbox.fullmatch(address)
    if not found:
        return "that is no address (RFC 5321 section 4.1.2)"
    local, domain = found["local"], found["domain"]
    if not address.isprintable():
        return "an address holds no control or invisible characters"
    if _encoded_word.search(local):
        return "an encoded word is no address (RFC 2047 section 5)"
    if len(local.encode()) > LOCAL_PART_MAX:
        return f"the local part is longer than {LOCAL_PART_MAX} octets"
    if len(domain.encode()) > DOMAIN_MAX:
        return f"the domain is longer than {DOMAIN_MAX} octets"
    if not address.isascii() and unicodedata.normalize("NFC", local) != local:
        return "the local part is not in Unicode normalization form C"
    if not (_is_literal(domain) if domain.startswith("[") else _is_domain(domain)):
        return "that is no domain"
    return ""


def _is_domain(domain: str) -> bool:
    if domain.isascii() and len(domain) <= LABEL_MAX:
        return True
    if any(len(label.encode()) > LABEL_MAX for label in domain.split(".")):
        return False
    if domain.isascii():
        return True
    # RFC 5890: letters, marks and digits, and nothing that another program would fold into something else
    # (a full-width letter or dot), else two spellings of one domain are two domains to a route.
    known = all(c in ".-" or unicodedata.category(c)[0] in "LMN" for c in domain)
    return known and unicodedata.normalize("NFKC", domain) == domain


def _is_literal(literal: str) -> bool:
    inner = literal[1:-1]
    try:
        if inner[:5].lower() == "ipv6:":
            return ipaddress.IPv6Address(inner[5:]).scope_id is None
        ipaddress.IPv4Address(inner)
    except ValueError:
        return False
    return True


def canonical(address: str) -> str:
    """Lower case, without quotes that change nothing: `"Joe"@X.org` is joe@x.org (RFC 5321 section 4.1.2)."""
    if address.startswith('"'):
        quoted, _, domain = address.rpartition("@")
        local = re.sub(r"\\(.)", r"\1", quoted[1:-1])
        if _dot_string.fullmatch(local):
            address = f"{local}@{domain}"
    return address.lower()


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One element of an address header: the display name as written, and the address ("" when there is none).

    `path` is what stands in the place of the address, whether it is one or not.
    """

    name: str
    address: str
    path: str = ""


def domain_of(address: str) -> str:
    """What stands behind the @, in lower case; all of it where there is none."""
    return address.rpartition("@")[2].lower()


def bare_address(text: str) -> str:
    """The first address, bare and lower-cased: `Joe <Joe@X>` gives `joe@x`; "" when there is none."""
    if is_path_address(text):
        return canonical(text)
    return next(iter(addresses_in(text, 1)), "")


def parseaddr(text: str | None) -> tuple[str, str]:
    """The display name and the address, as they are written, of the first element that has an address; else "" twice.

    For headers of strangers, in place of `email.utils.parseaddr`: that one raises RecursionError for a header of many
    parentheses.
    """
    mailbox = next((mailbox for mailbox in mailboxes_in(text or "") if mailbox.address), Mailbox("", ""))
    return unquoted(mailbox.name), mailbox.address


def unquoted(phrase: str) -> str:
    """A display name without its quotes: `"Smith, J."` gives `Smith, J.`"""
    return _quoted_string.sub(lambda found: _pair.sub(r"\1", found[1]), phrase)


def addresses_in(header_text: str, limit: int | None = ADDRESSES_MAX) -> list[str]:
    """Every address of an address header, bare, lower-cased, once each, in order; at most `limit`."""
    found: dict[str, None] = {}
    for mailbox in mailboxes_in(header_text):
        if limit is not None and len(found) >= limit:
            break
        if mailbox.address:
            found[canonical(mailbox.address)] = None
    return list(found)


def mailboxes_in(header_text: str) -> Iterator[Mailbox]:
    """The elements of an address list (RFC 5322 section 3.4); the names of groups are left out."""
    reading = _Element()
    for token in _tokens(header_text):
        if token in (",", ";") and not reading.in_route():
            yield from reading.mailboxes()
            reading = _Element()
        elif token == ":" and not reading.angle:
            reading = _Element()  # what came before was the name of a group
        else:
            reading.add(token)
    yield from reading.mailboxes()


class _Element:
    """One element of an address list while its tokens come in."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.path: list[str] = []
        self.angle = ""  # "<" inside, ">" behind
        self.broken = False

    def add(self, token: str) -> None:
        if token in ("<", ">"):
            self.broken |= self.angle != {"<": "", ">": "<"}[token]
            self.angle = token
        elif self.angle == "<":
            self.path.append(token)
        else:
            self.words.append(token)
            self.broken |= self.angle == ">" and not token.isspace()
        self.broken |= token in _BROKEN

    def in_route(self) -> bool:
        """Inside `<@relay,@relay:joe@x>`, where a comma separates hosts and a colon ends them."""
        return self.angle == "<" and bool(self.path) and self.path[0].lstrip().startswith("@")

    def mailboxes(self) -> Iterator[Mailbox]:
        name = "".join(self.words).strip()
        path = "".join(self.path).strip()
        if self.angle == "":
            name, path = "", name
        # a source route, RFC 5322 section 4.4
        address = path.partition(":")[2] if path.startswith("@") else path
        if self.broken or self.angle == "<" or not is_path_address(address):
            address = ""
        if name or path:
            yield Mailbox(name, address, path)


_quoted_string = re.compile(r'"((?:[^"\\]|\\.)*+)"', re.DOTALL)
_pair = re.compile(r"\\(.)", re.DOTALL)
_BROKEN = frozenset('")[]\\')
_token = re.compile(r'"(?:[^"\\]|\\.)*+"|\[[^\[\]\\]*+\]|\\.|[^"\[\]\\(),:;<>]+|.', re.DOTALL)
_comment_mark = re.compile(r"\\.|[()]", re.DOTALL)


def _tokens(text: str) -> Iterator[str]:
    """Quoted strings, address literals, single specials and runs of everything else; comments are one space.

    A `"` or `[` that comes alone is one that never ends, a `)` or `]` one that was never opened.
    """
    position = 0
    while position < len(text):
        if text[position] == "(":
            position = _after_comment(text, position)
            yield " " if position <= len(text) else '"'
        elif found := _token.match(text, position):
            position = found.end()
            yield found[0]


def _after_comment(text: str, start: int) -> int:
    depth = 0
    for mark in _comment_mark.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.end()
    return len(text) + 1
