"""Signatures on a message: DKIM (RFC 6376, RFC 8463) and the chain of ARC (RFC 8617).

Canonical forms of headers, keys and arithmetic are dkimpy's. What is read here is what a stranger could make expensive:

Rules:

1. Linear in the message: fields come from a HeaderBlock, with its limits; the body is brought into each canonical form
   and hashed at most once, without an expression that could walk back over a run of blanks.
2. At most SIGNATURES_MAX signatures, FIELD_MAX octets of a signature and KEY_BITS_MAX bits of a key are looked at.
3. A signature that holds says nothing where its key is shorter than KEY_BITS_MIN bits, its hash is SHA-1 (RFC 8301), or
   `l=` leaves an end of the body to whoever wants to add something (RFC 6376 section 8.2): its result is `policy`.
4. What the DNS does not say is a temperror, what nobody can read a permerror; nothing raises.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Any

from lamsonq.headers import TOO_LARGE, HeaderBlock
from lamsonq.names import Ask, Unsure, ascii_domain
from lamsonq.signing import relaxed_body, without_line_ends
from lamsonq.verdicts import Verdict

SIGNATURES_MAX = 5
FIELD_MAX = 4096
SIGNED_MAX = 300
"""Names in `h=`."""
KEY_BITS_MIN = 1024
KEY_BITS_MAX = 8192
KEY_MAX = 4096
"""Octets of a key's record."""
CHAIN_MAX = 50
"""Sets of an ARC chain (RFC 8617 section 4.2.1)."""

_SETS = (b"arc-authentication-results", b"arc-message-signature", b"arc-seal")
_gap = re.compile(rb"\s{32}")
"""dkimpy's expression for b= takes a cube of the time for a run of blanks."""
_base64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
_domain = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)+")
_instance = re.compile(rb"[ \t\r\n]*i[ \t\r\n]*=[ \t\r\n]*([1-9]\d?)[ \t\r\n]*;")


class _Failed(Exception):
    """A signature that has no pass: a word of RFC 8601 section 2.7.1 and why."""

    def __init__(self, result: str, reason: str) -> None:
        super().__init__(reason)
        self.result, self.reason = result, reason


@dataclass(frozen=True, slots=True)
class _Signature:
    """The tags of a signature, checked as far as they can be without a key."""

    field: tuple[bytes, bytes]
    tags: dict[bytes, bytes]
    domain: str
    selector: str
    algorithm: str


class Signatures:
    """The signatures on one message. `ask` finds their keys."""

    def __init__(self, ask: Ask, block: HeaderBlock) -> None:
        self._ask, self._block = ask, block
        self._whole = TOO_LARGE not in block.defects
        self._fields = [_name_and_value(block.data[field.start : field.end]) for field in block.fields]
        self._bodies: dict[bytes, bytes] = {}
        self._hashes: dict[bytes, bytes] = {}

    def dkim(self) -> list[Verdict]:
        """A verdict about each DKIM-Signature, from the top, at most SIGNATURES_MAX; one of `none` without any."""
        found = [field for field in self._fields if field[0].lower() == b"dkim-signature"]
        return [self._dkim(field) for field in found[:SIGNATURES_MAX]] or [Verdict("dkim", "none")]

    def _dkim(self, field: tuple[bytes, bytes]) -> Verdict:
        properties: dict[str, str] = {}
        try:
            if not self._whole:
                raise _Failed("policy", TOO_LARGE)
            signature = _read(field, (b"v", b"a", b"b", b"bh", b"d", b"h", b"s"))
            properties = {"header.d": signature.domain, "header.s": signature.selector}
            properties["header.a"] = signature.algorithm
            properties["header.b"] = re.sub(rb"\s", b"", signature.tags[b"b"])[:8].decode("ascii")
            names = _signed_names(signature.tags)
            if b"from" not in names:  # RFC 6376 section 5.4
                raise _Failed("permerror", "From is not signed")
            self._check_body(signature.tags)
            self._check_header(signature, names)
            if b"l" in signature.tags:
                raise _Failed("policy", "l= leaves the end of the body unsigned")
        except _Failed as error:
            return Verdict("dkim", error.result, error.reason, properties)
        return Verdict("dkim", "pass", "", properties)

    def arc(self) -> Verdict:
        """Whether the chain holds (RFC 8617 section 5.2): pass, fail or none; temperror where the DNS does not say."""
        fields = [field for field in self._fields if field[0].lower() in _SETS]
        if not fields:
            return Verdict("arc", "none")
        properties: dict[str, str] = {}
        try:
            if not self._whole:
                raise _Failed("fail", TOO_LARGE)
            chain = _chain(fields)
            seals = [_read(members[b"arc-seal"], (b"a", b"b", b"cv", b"d", b"s")) for members in chain]
            properties = {"arc.chain": ":".join(seal.domain for seal in reversed(seals))}
            for number, seal in enumerate(seals, 1):
                if seal.tags[b"cv"] != (b"none" if number == 1 else b"pass") or b"h" in seal.tags:
                    raise _Failed("fail", f"the seal of {number} does not say that the chain held")
            latest = _read(chain[-1][b"arc-message-signature"], (b"a", b"b", b"bh", b"d", b"h", b"s"))
            names = _signed_names(latest.tags)
            if b"arc-seal" in names:  # section 4.1.2
                raise _Failed("fail", "the signature covers seals")
            self._check_body(latest.tags)
            self._check_header(latest, names)
            for number, seal in enumerate(seals, 1):
                self._check_seal(seal, chain[:number])
        except _Failed as error:
            result = "temperror" if error.result == "temperror" else "fail"
            return Verdict("arc", result, error.reason, properties)
        return Verdict("arc", "pass", "", properties)

    def _check_seal(self, seal: _Signature, chain: list[dict[bytes, tuple[bytes, bytes]]]) -> None:
        """RFC 8617 section 5.1.1: a seal covers all sets up to its own, itself without the signature."""
        covered = [members[name] for members in chain for name in _SETS][:-1]
        names = [name.lower() for name, _ in covered]
        self._check(seal, covered[::-1], names, b"relaxed/relaxed")  # dkimpy takes fields from the bottom

    def _check_header(self, signature: _Signature, names: list[bytes]) -> None:
        self._check(signature, self._fields, names, signature.tags.get(b"c", b"simple/simple"))

    def _check(
        self, signature: _Signature, fields: list[tuple[bytes, bytes]], names: list[bytes], canonical: bytes
    ) -> None:
        """Whether the key of the signature's domain has signed these fields. Raises _Failed."""
        import dkim
        from dkim.canonicalization import CanonicalizationPolicy, InvalidCanonicalizationPolicyError

        key, bits, kind = self._key(signature)
        try:
            policy = CanonicalizationPolicy.from_c_value(canonical)
        except InvalidCanonicalizationPolicyError:
            raise _Failed("permerror", "c= is unknown") from None
        # As many From fields as there are, and one more: none can be added (RFC 6376 section 8.15).
        names = [*names, b"from"] if b"from" in names else names
        hasher = dkim.HashThrough(hashlib.sha1() if signature.algorithm == "rsa-sha1" else hashlib.sha256())
        dkim.hash_headers(hasher, policy, policy.canonicalize_headers(fields), names, signature.field, signature.tags)
        octets = base64.b64decode(re.sub(rb"\s", b"", signature.tags[b"b"]))
        if not _holds(key, kind, hasher, octets):
            raise _Failed("fail", "the signature does not hold")
        if signature.algorithm == "rsa-sha1":
            raise _Failed("policy", "SHA-1 is no longer good enough")
        if kind == "rsa" and bits < KEY_BITS_MIN:
            raise _Failed("policy", f"the key has {bits} bits, fewer than {KEY_BITS_MIN}")

    def _key(self, signature: _Signature) -> tuple[Any, int, str]:
        """The key, its bits and kind. Raises _Failed."""
        import dkim

        name = f"{signature.selector}._domainkey.{signature.domain}"
        try:
            texts = self._ask(name, "TXT")
        except Unsure as error:
            raise _Failed("temperror", str(error)) from None
        if not texts:
            raise _Failed("permerror", "there is no key")
        text = texts[0].encode("utf-8", "replace")
        tags = _tags(text)
        if tags.get(b"p") == b"":
            raise _Failed("permerror", "the key is revoked")
        if len(text) > KEY_MAX:
            raise _Failed("permerror", "the key is too long")
        hashes = tags.get(b"h", b"sha256:sha1").replace(b" ", b"").split(b":")
        services = tags.get(b"s", b"*").replace(b" ", b"").split(b":")
        kind, _, hash_name = signature.algorithm.partition("-")
        if hash_name.encode() not in hashes or not {b"*", b"email"} & set(services):
            raise _Failed("permerror", "the key is for something else")
        strict = b"s" in tags.get(b"t", b"").replace(b" ", b"").split(b":")
        identity = signature.tags.get(b"i", b"").rpartition(b"@")[2].lower()
        if strict and identity and identity != signature.domain.encode():
            raise _Failed("permerror", "the key does not allow subdomains in i=")
        try:
            key, bits, kind_of_key, _ = dkim.evaluate_pk(name, text)
            if kind_of_key != kind.encode():
                raise _Failed("permerror", "the key is of another kind")
        except _Failed:
            raise
        except Exception:  # dkimpy lets out whatever a broken key makes of its parser
            raise _Failed("permerror", "the key cannot be read") from None
        if kind == "rsa" and (bits > KEY_BITS_MAX or not 1 < key["publicExponent"] < 1 << 33):
            raise _Failed("policy", "the key is too large")
        return key, bits, kind

    def _check_body(self, tags: dict[bytes, bytes]) -> None:
        """Whether the body is what was signed. Raises _Failed."""
        kinds = tags.get(b"c", b"simple/simple").partition(b"/")
        kind = kinds[2] or b"simple"
        if kind not in (b"simple", b"relaxed"):
            raise _Failed("permerror", "c= is unknown")
        length = tags.get(b"l")
        hash_name = tags[b"a"].rpartition(b"-")[2]
        index = b"/".join((kind, hash_name, length or b""))
        if index not in self._hashes:
            if kind not in self._bodies:
                self._bodies[kind] = self._body(kind)
            body = self._bodies[kind]
            cut = body if length is None else body[: int(length)]
            self._hashes[index] = hashlib.new(hash_name.decode(), cut).digest()
        if base64.b64decode(re.sub(rb"\s", b"", tags[b"bh"])) != self._hashes[index]:
            raise _Failed("fail", "the body has been changed")

    def _body(self, kind: bytes) -> bytes:
        """The body in a canonical form (RFC 6376 section 3.4), its line ends CRLF."""
        body = self._block.data[self._block.body :]
        if body.count(b"\n") != body.count(b"\r\n"):
            body = body.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        return relaxed_body(body) if kind == b"relaxed" else without_line_ends(body) + b"\r\n"


def _name_and_value(octets: bytes) -> tuple[bytes, bytes]:
    name, _, value = octets.partition(b":")
    if value.count(b"\n") != value.count(b"\r\n"):
        value = value.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return name, value if value.endswith(b"\r\n") else value + b"\r\n"


def _read(field: tuple[bytes, bytes], wanted: tuple[bytes, ...]) -> _Signature:
    """Raises _Failed."""
    import dkim

    if len(field[1]) > FIELD_MAX:
        raise _Failed("policy", f"a signature of more than {FIELD_MAX} octets")
    if _gap.search(field[1]):
        raise _Failed("policy", "a signature with a long run of blanks")
    tags = _tags(field[1])
    if not tags:
        raise _Failed("permerror", "the signature cannot be read")
    for name in (b"b", b"bh"):
        # Ours: dkimpy looks at b= where it means bh=, and takes long over what is no base64.
        if name in wanted and not _is_base64(tags.get(name, b"")):
            raise _Failed("permerror", f"{name.decode()}= is not base64")
    if b"l" in tags and not re.fullmatch(rb"\d{1,20}", tags[b"l"]):
        raise _Failed("permerror", "l= is no number")
    seals = field[0].lower() != b"dkim-signature"
    try:
        dkim.validate_signature_fields(tags, list(wanted), seals)
        domain = ascii_domain(tags[b"d"].decode())
        selector = tags[b"s"].decode("ascii").lower()
    except (dkim.DKIMException, ValueError, KeyError, IndexError) as error:
        expired = str(error).startswith("x= value is past")
        raise _Failed("policy" if expired else "permerror", _plain(str(error))) from None
    if not _domain.fullmatch(domain) or not _domain.fullmatch(f"{selector}.x"):
        raise _Failed("permerror", "d= or s= is no name")
    return _Signature(field, tags, domain, selector, tags[b"a"].decode("ascii"))


def _signed_names(tags: dict[bytes, bytes]) -> list[bytes]:
    names = [name.strip().lower() for name in tags[b"h"].split(b":")]
    if len(names) > SIGNED_MAX:
        raise _Failed("policy", f"more than {SIGNED_MAX} names in h=")
    return names


def _chain(fields: list[tuple[bytes, bytes]]) -> list[dict[bytes, tuple[bytes, bytes]]]:
    """The sets in order (RFC 8617 section 5.2 step 3): complete, one field of each kind, no gap. Raises _Failed."""
    sets: dict[int, dict[bytes, tuple[bytes, bytes]]] = {}
    for field in fields[: 3 * CHAIN_MAX + 1]:
        # The results begin with the instance; in a signature its place is free.
        found = _instance.match(field[1])
        number = int(found[1]) if found else 0
        if not found and field[0].lower() != _SETS[0]:
            tag = _tags(field[1][:FIELD_MAX]).get(b"i", b"")
            number = int(tag) if re.fullmatch(rb"[1-9]\d?", tag) else 0
        members = sets.setdefault(number, {})
        if number == 0 or members.setdefault(field[0].lower(), field) is not field:
            raise _Failed("fail", "a set with a field that is broken or twice there")
    if sorted(sets) != list(range(1, len(sets) + 1)) or len(sets) > CHAIN_MAX:
        raise _Failed("fail", "a set is missing")
    if any(len(members) != 3 for members in sets.values()):
        raise _Failed("fail", "a set is not complete")
    return [sets[number] for number in sorted(sets)]


def _holds(key: Any, kind: str, hasher: Any, octets: bytes) -> bool:
    from dkim.crypto import DigestTooLargeError, RSASSA_PKCS1_v1_5_verify

    if kind == "ed25519":
        from nacl.exceptions import CryptoError

        try:
            key.verify(hasher.digest(), octets)
        except (CryptoError, ValueError):
            return False
        return True
    try:
        return bool(RSASSA_PKCS1_v1_5_verify(hasher, octets, key))
    except (DigestTooLargeError, TypeError, ValueError, AssertionError, ZeroDivisionError):
        return False


def _tags(text: bytes) -> dict[bytes, bytes]:
    """A tag list (RFC 6376 section 3.2); {} where it is broken or has a tag twice."""
    tags: dict[bytes, bytes] = {}
    for part in text.strip().removesuffix(b";").split(b";"):
        name, equals, value = part.partition(b"=")
        name = name.strip()
        if not equals or name in tags or not re.fullmatch(rb"[A-Za-z]\w*", name):
            return {}
        tags[name] = value.strip()
    return tags


def _is_base64(text: bytes) -> bool:
    octets = re.sub(rb"\s", b"", text)
    try:
        return bool(_base64.fullmatch(octets)) and bool(binascii.a2b_base64(octets))
    except binascii.Error:
        return False


def _plain(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)[:100]
