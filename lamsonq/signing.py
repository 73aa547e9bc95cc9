"""DKIM signatures on what leaves (RFC 6376; Ed25519: RFC 8463).

Rules:

1. A relay signs what it sends, when it sends it: the bytes that go over the wire, before dots are doubled. A queue
   holds unsigned messages, so a new key counts for what waits already.
2. A message is signed by the keys of the domain of its From header, else by those of the nearest domain above that has
   some: what DMARC takes for aligned (RFC 7489 section 3.1.1). With none, or without exactly one From, it leaves
   unsigned. Two keys of a domain, RSA and Ed25519, make two signatures.
3. Header and body are signed in the relaxed form, the body whole (no l=, RFC 6376 section 8.2).
4. What readers are shown and what acts on its own is oversigned, named once more than it is there, so that nobody can
   add another (RFC 6376 section 8.15): ALWAYS also where it is missing, PRESENT where it is there.
5. A key is checked at boot: that it can be read, that strangers cannot read it, that it is long enough.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lamsonq import clock
from lamsonq.address import addresses_in
from lamsonq.errors import SettingsError
from lamsonq.headers import Field, HeaderBlock, undecoded
from lamsonq.keyfile import refuse_shared

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

ALWAYS = ("from", "reply-to", "subject", "to", "cc")
"""Signed and oversigned, whether they are there or not."""

PRESENT = (
    *("date", "message-id", "sender", "in-reply-to", "references", "auto-submitted"),
    *("mime-version", "content-type", "content-transfer-encoding"),
    *("list-id", "list-unsubscribe", "list-unsubscribe-post", "list-post", "list-help", "list-archive", "list-owner"),
)
"""Signed and oversigned where they are there: a mailing list may still add what is missing."""

RSA_MIN = 1024
"""Bits; what is shorter verifies nowhere (RFC 8301 section 3.2). RSA_GOOD are what it asks for."""
RSA_GOOD = 2048

LOG = logging.getLogger()

_wsp = re.compile(rb"[ \t]+")
_line_ends = re.compile(rb"(?:\r\n)++")
_label = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_domain = re.compile(rf"{_label}(?:\.{_label})*")


class DKIM:
    """One key of a domain: `selector._domainkey.domain` in the DNS has its other half.

    `key_file` holds the private key: RSA or Ed25519 in PEM, or the base64 of an Ed25519 seed as dknewkey writes it.
    Raises SettingsError for a name or a file that cannot be used, and where `cryptography` is not installed.
    """

    def __init__(self, domain: str, selector: str, key_file: str | os.PathLike[str]) -> None:
        self.domain = _in_ascii(domain)
        self.selector = selector
        self.key_file = os.fspath(key_file)
        if not _domain.fullmatch(selector):
            raise SettingsError(f"DKIM: {selector!r} is no selector: letters, digits and hyphens, as in 2026a")
        self._key = _loaded(self.key_file, _read(self.key_file))

    @property
    def algorithm(self) -> str:
        """As it stands in the signature: rsa-sha256 or ed25519-sha256."""
        return "rsa-sha256" if hasattr(self._key, "key_size") else "ed25519-sha256"

    def sign(self, text: bytes) -> bytes:
        """The signature of these octets."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.hashes import SHA256

        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(hashlib.sha256(text).digest())  # RFC 8463 section 3: the hash is what is signed
        return self._key.sign(text, PKCS1v15(), SHA256())

    def record(self) -> str:
        """What the TXT record at `selector._domainkey.domain` has to say (RFC 6376 section 3.6.1)."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        public = self._key.public_key()
        if isinstance(self._key, Ed25519PrivateKey):
            octets = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
            return f"v=DKIM1; k=ed25519; p={base64.b64encode(octets).decode()}"
        octets = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return f"v=DKIM1; k=rsa; p={base64.b64encode(octets).decode()}"

    def __repr__(self) -> str:
        return f"<DKIM {self.selector}._domainkey.{self.domain} {self.algorithm}>"


def signed(data: bytes, keys: Sequence[DKIM]) -> bytes:
    """The message with the signatures of rule 2 in front; itself where there are none. `data` is as on the wire."""
    block = HeaderBlock(data)
    used = keys_for(block, keys)
    if not used:
        return data
    names, header = _signed_header(block)
    body = base64.b64encode(hashlib.sha256(relaxed_body(data[block.body :])).digest())
    return b"".join(_signature(key, names, header, body) for key in used) + data


def keys_for(block: HeaderBlock, keys: Sequence[DKIM]) -> list[DKIM]:
    """The keys that sign a message with this header."""
    fields = block.named("from")
    senders = addresses_in(undecoded(block.raw(fields[0])), 2) if len(fields) == 1 else []
    if len(senders) != 1:
        return []
    try:
        domain = _in_ascii(senders[0].rpartition("@")[2])
    except SettingsError:  # an address literal
        return []
    while domain:
        if found := [key for key in keys if key.domain == domain]:
            return found
        domain = domain.partition(".")[2]
    return []


def _signature(key: DKIM, names: Sequence[str], header: bytes, body: bytes) -> bytes:
    """The whole field, folded, with CRLF."""
    lines = [
        f"DKIM-Signature: v=1; a={key.algorithm}; c=relaxed/relaxed; d={key.domain};",
        f" s={key.selector}; t={int(clock.now())};",
        *_folded(" h=", names, ":"),
        f" bh={body.decode()};",
        " b=",
    ]
    unsigned = "\r\n".join(lines).encode()
    # RFC 6376 section 3.7: the field itself comes last, its b= empty, without a line end.
    signature = base64.b64encode(key.sign(header + _relaxed_field(unsigned))).decode()
    pieces = [signature[at : at + 72] for at in range(0, len(signature), 72)]
    return unsigned + "\r\n ".join(pieces).encode() + b"\r\n"


def _folded(start: str, words: Sequence[str], between: str) -> Iterator[str]:
    line = start
    for number, word in enumerate(words):
        end = ";" if number == len(words) - 1 else between
        if len(line) + len(word) > 74:
            yield line
            line = " "
        line += word + end
    yield line


def _signed_header(block: HeaderBlock) -> tuple[list[str], bytes]:
    """The names for h=, and the fields that they stand for: of equal ones the last first (RFC 6376 section 5.4.2)."""
    names: list[str] = []
    fields: list[Field] = []
    for name in (*ALWAYS, *PRESENT):
        found = block.named(name)
        if found or name in ALWAYS:
            names += [name] * (len(found) + 1)
            fields += reversed(found)
    source = block.data
    return names, b"".join(_relaxed_field(source[field.start : field.end]) + b"\r\n" for field in fields)


def _relaxed_field(field: bytes) -> bytes:
    """RFC 6376 section 3.4.2, without the line end."""
    name, _, value = field.partition(b":")
    return name.strip().lower() + b":" + _wsp.sub(b" ", value.replace(b"\r", b"").replace(b"\n", b"")).strip(b" ")


def relaxed_body(body: bytes) -> bytes:
    """RFC 6376 section 3.4.4."""
    body = body.replace(b"\t", b" ")
    while b"  " in body:  # each round halves every run
        body = body.replace(b"  ", b" ")
    kept = without_line_ends(body.replace(b" \r\n", b"\r\n").removesuffix(b" "))
    return kept + b"\r\n" if kept else b""


def without_line_ends(body: bytes) -> bytes:
    """The body up to its last line that is not empty, without its line end; a bare CR or LF is none."""
    tail = body[len(body.rstrip(b"\r\n")) :]
    ends = list(_line_ends.finditer(tail))
    return body[: len(body) - len(ends[-1][0])] if ends and ends[-1].end() == len(tail) else body


def _in_ascii(domain: str) -> str:
    """The domain in lower case, and as the DNS has it (RFC 5890)."""
    try:
        name = domain if domain.isascii() else domain.encode("idna").decode()
    except UnicodeError:
        name = ""
    if not _domain.fullmatch(name):
        raise SettingsError(f"DKIM: {domain!r} is no domain")
    return name.lower()


def _read(path: str) -> bytes:
    """The key's octets, by rule 5."""
    try:
        with open(path, "rb") as file:
            refuse_shared("DKIM", path, file.fileno())
            return file.read(64 * 1024)
    except OSError as error:
        raise SettingsError(f"DKIM: the key {path} cannot be read: {error.strerror}") from error


def _loaded(path: str, octets: bytes) -> RSAPrivateKey | Ed25519PrivateKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise SettingsError("DKIM needs cryptography: pip install 'lamsonq[auth]'") from error
    if not octets.lstrip().startswith(b"-----BEGIN"):
        try:
            return Ed25519PrivateKey.from_private_bytes(base64.b64decode(octets.strip(), validate=True))
        except (ValueError, binascii.Error):
            raise SettingsError(f"DKIM: {path} holds no private key in PEM") from None
    try:
        key = load_pem_private_key(octets, None)
    except TypeError:
        raise SettingsError(f"DKIM: the key {path} is encrypted; a server needs it without a password") from None
    except Exception:  # whatever a library of another make says: the file is no key
        raise SettingsError(f"DKIM: {path} holds no private key in PEM") from None
    if not isinstance(key, RSAPrivateKey | Ed25519PrivateKey):
        raise SettingsError(f"DKIM: {path} holds neither an RSA nor an Ed25519 key")
    if isinstance(key, RSAPrivateKey) and key.key_size < RSA_MIN:
        raise SettingsError(
            f"DKIM: the key {path} has {key.key_size} bits, and verifies nowhere: make one of {RSA_GOOD}"
        )
    if isinstance(key, RSAPrivateKey) and key.key_size < RSA_GOOD:
        LOG.warning("DKIM: the key %s has %d bits; %d are asked for.", path, key.key_size, RSA_GOOD)
    return key
