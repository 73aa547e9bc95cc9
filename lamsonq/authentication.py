"""Who really wrote a message: what SPF, DKIM, ARC and DMARC say of it, the field that tells others, and the guard that
refuses what does not pass.

Rules:

1. `Verifier.verify` never raises, keeps one deadline for all its questions to the DNS, and takes time linear in the
   message. It is called in a thread: it waits.
2. What cannot be found out now is a temperror, what nobody could read a permerror; neither is ever a pass.
3. A header that a reader could take for two, or for another one, has no author: a second From, more fields than are
   looked at, a bare CR.
4. A field that says what we have found is believed because it carries our name; so whatever a stranger wrote under our
   name is dropped before it is added (RFC 8601 section 5), and nothing else of the message is touched.
"""

from __future__ import annotations

import functools
import inspect
import ipaddress
import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lamsonq.address import mailboxes_in
from lamsonq.envelope import Envelope
from lamsonq.errors import SettingsError, SMTPError
from lamsonq.headers import STRUCTURED_MAX, TOO_LARGE, HeaderBlock, undecoded
from lamsonq.verdicts import METHODS, Auth, Verdict

if TYPE_CHECKING:
    import dns.resolver

    from lamsonq.names import Ask

F = TypeVar("F", bound=Callable[..., Any])

LOG = logging.getLogger()

TIMEOUT = 20.0
"""Seconds for all questions about one message (RFC 7208 section 4.6.4 asks for at least 20)."""

VALUE_MAX = 200
"""Characters of a value in the Authentication-Results field."""


class Verifier:
    """Finds out who wrote a message. One is enough for a process; its threads share what the DNS has said.

    `hostname` is our own name, `resolver` where to ask (None: the servers of /etc/resolv.conf), `timeout` seconds for
    one message. Raises SettingsError where the libraries are not installed or no DNS server is configured.
    """

    def __init__(self, hostname: str, resolver: dns.resolver.Resolver | None = None, timeout: float = TIMEOUT) -> None:
        try:
            import dkim  # noqa: F401 - a missing library is told at boot, not with the first message
            import dns.resolver  # noqa: F401
            import idna  # noqa: F401
            import nacl.signing  # noqa: F401
        except ImportError as error:
            raise SettingsError(f"verify = true needs {error.name}: pip install 'lamsonq[auth]'") from error
        from lamsonq.names import system_resolver

        self.hostname, self.timeout = hostname, timeout
        self._resolver = resolver or system_resolver("verifying mail")

    def verify(self, envelope: Envelope, data: bytes) -> Auth:
        """All verdicts about a message as it was received, headers and body; never raises."""
        from lamsonq.dmarc import evaluate
        from lamsonq.names import Names
        from lamsonq.signatures import Signatures

        ask = Names(self._resolver, time.monotonic() + self.timeout)
        block = HeaderBlock(data)
        spf = _guarded("spf", lambda: [_spf(ask, envelope)])
        signatures = Signatures(ask, block)
        dkim = _guarded("dkim", signatures.dkim)
        arc = _guarded("arc", lambda: [signatures.arc()])
        domain, objection = author(block)
        if objection:
            dmarc = [Verdict("dmarc", "permerror", objection)]
        else:
            identities = [("spf", verdict.result, _spf_domain(verdict)) for verdict in spf]
            identities += [("dkim", verdict.result, verdict.properties.get("header.d", "")) for verdict in dkim]
            dmarc = _guarded("dmarc", lambda: [evaluate(ask, domain, identities)])
        return Auth((*spf, *dkim, *dmarc, *arc), domain)


def _guarded(method: str, verdicts: Callable[[], list[Verdict]]) -> list[Verdict]:
    try:
        return verdicts()
    except Exception:  # a fault of ours, or of a library's: the message is worth more than the verdict
        LOG.exception("%s could not be evaluated", method)
        return [Verdict(method, "temperror", "internal error")]


def _spf(ask: Ask, envelope: Envelope) -> Verdict:
    from lamsonq.names import ascii_domain
    from lamsonq.spf import check

    sender, peer = envelope.mail_from, envelope.peer
    helo = ascii_domain(envelope.helo)
    try:
        if sender is None or not isinstance(peer, tuple):
            raise ValueError
        ip = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return Verdict("spf", "none", "no client with an address")
    properties = {"smtp.helo": helo}
    if sender:
        local, _, domain = sender.rpartition("@")
        domain = ascii_domain(domain)
        sender = f"{local}@{domain}"
        properties = {"smtp.mailfrom": domain}
    result, reason = check(ask, ip, sender, helo)
    return Verdict("spf", result, reason, properties)


def _spf_domain(verdict: Verdict) -> str:
    """The domain that SPF has checked: for the null sender HELO's (RFC 7489 section 3.1.2)."""
    return verdict.properties.get("smtp.mailfrom") or verdict.properties.get("smtp.helo", "")


def author(block: HeaderBlock) -> tuple[str, str]:
    """(domain, "") of the one mailbox in the one From field; ("", why) where there is no such thing.

    RFC 7489 section 6.6.1: several From fields, or one with several mailboxes, have nobody who could stand behind them.
    """
    from lamsonq.names import ascii_domain

    fields = block.named("From")
    if TOO_LARGE in block.defects:
        return "", TOO_LARGE
    if re.search(rb"\r(?!\n)", block.data[block.start : block.fields_end]):
        return "", "a bare CR in the header"
    if len(fields) != 1:
        return "", f"{len(fields) or 'no'} From fields"
    raw = block.raw(fields[0])
    if len(raw) > STRUCTURED_MAX:
        return "", "the From field is too long"
    mailboxes = list(mailboxes_in(undecoded(raw)))
    if len(mailboxes) != 1 or not mailboxes[0].address:
        return "", "the From field does not hold exactly one address"
    domain = ascii_domain(mailboxes[0].address.rpartition("@")[2])
    return (domain, "") if domain else ("", "the From field has no domain")


# -- the field -------------------------------------------------------------------------------------------------------

_token = re.compile(r"[!#$%&'*+.0-9A-Z^_`a-z{|}~-]+")  # RFC 2045 section 5.1
_pvalue = re.compile(r"[!#$%&'*+.0-9A-Z^_`a-z{|}~-]*@?[!#$%&'*+.0-9A-Z^_`a-z{|}~-]+")
_keyword = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,60}[A-Za-z0-9])?")
_property = re.compile(r"[A-Za-z0-9-]{1,30}\.[A-Za-z0-9-]{1,60}")


def authentication_results(auth: Auth, authserv_id: str) -> bytes:
    """The Authentication-Results field that tells these verdicts (RFC 8601 section 2.2), with its line end."""
    lines = [f"Authentication-Results: {_value(authserv_id)}"]
    for verdict in auth.verdicts:
        if not (_keyword.fullmatch(verdict.method) and _keyword.fullmatch(verdict.result)):
            continue
        line = f"{verdict.method}={verdict.result}"
        if verdict.reason:
            line += f"\r\n  reason={_quoted(verdict.reason)}"
        for name, value in verdict.properties.items():
            if value and _property.fullmatch(name):
                line += f"\r\n  {name}={_value(value)}"
        lines.append(line)
    if len(lines) == 1:
        lines.append("none")
    return (";\r\n ".join(lines) + "\r\n").encode("ascii")


def _value(text: str) -> str:
    text = text[:VALUE_MAX]
    return text if _pvalue.fullmatch(text) else _quoted(text)


def _quoted(text: str) -> str:
    plain = re.sub(r"[^ -~]", "?", text[:VALUE_MAX])
    return '"' + re.sub(r'(["\\])', r"\\\1", plain) + '"'


# -- forged fields ---------------------------------------------------------------------------------------------------

# There are readers for whom a bare CR ends a line, so what stands behind one is looked at as a field as well. To others
# it is a part of the field around it, which must not become two.
_results = re.compile(rb"(?:\A|(?<=[\r\n]))authentication-results[ \t]*:", re.IGNORECASE)
_line_end = re.compile(rb"\r?\n(?![ \t])")
_any_end = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?![ \t])")
_block_end = re.compile(rb"(?:\A|\n)\r?\n")
_BLANK = "".join(map(chr, range(33))) + "\x7f"
_comment_mark = re.compile(r"\\.|[()]", re.DOTALL)
_quoted_string = re.compile(r'"((?:[^"\\]|\\.)*+)"', re.DOTALL)
_bare = re.compile(r'[^\s;()"]+')


def without_forged(data: bytes, authserv_id: str) -> bytes:
    """The message without the Authentication-Results fields in its header that claim to be from `authserv_id`.

    Every other byte stays, ARC-Authentication-Results too; where nothing is dropped, it is the same object.
    """
    found_end = _block_end.search(data)
    end = found_end.start() + 1 if found_end else len(data)
    kept: list[bytes] = []
    position = 0
    for found in _results.finditer(data, 0, end):
        start = found.start()
        if start < position:
            continue
        within = data[start - 1 : start] == b"\r" if start else False
        line_end = (_any_end if within else _line_end).search(data, found.end(), end)
        stop, behind = (line_end.start(), line_end.end()) if line_end else (end, end)
        if not _claims(data[found.end() : stop].decode("utf-8", "replace"), authserv_id):
            continue
        if within:
            start, behind = start - 1, stop  # the field around it keeps its own line end
        kept.append(data[position:start])
        position = behind
    return b"".join([*kept, data[position:]]) if kept else data


def _claims(text: str, authserv_id: str) -> bool:
    """Whether the value of such a field begins with this authserv-id (RFC 8601 section 2.2)."""
    ours = _plain(authserv_id)
    position = _after_comments(text)
    if position is None:  # a comment that never ends: nobody knows what a reader makes of it
        return ours in text.lower()
    if found := _quoted_string.match(text, position):
        return _plain(re.sub(r"\\(.)", r"\1", found[1])) == ours
    found = _bare.match(text, position)
    if not found and text[position : position + 1] == '"':
        return ours in text.lower()
    return bool(found) and _plain(cast(re.Match[str], found)[0]) == ours


def _plain(name: str) -> str:
    return re.sub(r"[\x00-\x20\x7f]", "", name).lower().removesuffix(".")


def _after_comments(text: str) -> int | None:
    """Where the first word begins, behind blanks and comments; None where a comment does not end."""
    depth, position = 0, 0
    for mark in _comment_mark.finditer(text):
        if depth == 0 and text[position : mark.start()].strip(_BLANK):
            break  # the first word has begun before this one
        depth += {"(": 1, ")": -1}.get(mark[0], 0)
        if depth < 0:
            break
        position = mark.end() if depth == 0 else position
    else:
        if depth:
            return None
    return len(text) - len(text[position:].lstrip(_BLANK))


# -- the guard -------------------------------------------------------------------------------------------------------


def require(*methods: str, domain: str | None = None) -> Callable[[F], F]:
    """Decorator, below `@route`: the function runs only for messages for which all these methods passed.

    `domain` is whose pass is meant: for dmarc that of the From header, for dkim the signer, for arc the last seal, for
    spf the envelope's sender. Anything else raises SMTPError: 451 4.7.0 where it may pass later, else 550 5.7.1.
    Raises ValueError for an unknown method or for none.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(
            f"@require takes methods of {', '.join(METHODS)}, not {', '.join(map(repr, unknown)) or 'none'}"
        )
    wanted = None if domain is None else domain.lower()

    def decorate(function: F) -> F:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def waiting(message: Any, *args: Any, **captures: Any) -> Any:
                _check(message.auth, methods, wanted)
                return await function(message, *args, **captures)

            return cast(F, waiting)

        @functools.wraps(function)
        def guarded(message: Any, *args: Any, **captures: Any) -> Any:
            _check(message.auth, methods, wanted)
            return function(message, *args, **captures)

        return cast(F, guarded)

    return decorate


def _check(auth: Auth, methods: tuple[str, ...], domain: str | None) -> None:
    """Raises SMTPError."""
    missing = [
        (method, [verdict.result for verdict in auth.verdicts if verdict.method == method])
        for method in methods
        if not any(_satisfies(verdict, method, domain) for verdict in auth.verdicts)
    ]
    for method, results in missing:
        if "temperror" not in results:
            whose = f" for {domain}" if domain else ""
            raise SMTPError(550, f"5.7.1 This address takes only mail that passes {method.upper()}{whose}")
    if missing:
        raise SMTPError(451, f"4.7.0 {missing[0][0].upper()} cannot be evaluated now, please try again later")


def _satisfies(verdict: Verdict, method: str, domain: str | None) -> bool:
    if verdict.method != method or verdict.result != "pass":
        return False
    if domain is None:
        return True
    properties = verdict.properties
    whose = {
        "dmarc": properties.get("header.from"),
        "dkim": properties.get("header.d"),
        "spf": _spf_domain(verdict),
        "arc": properties.get("arc.chain", "").partition(":")[0],
    }
    return whose[method] == domain
