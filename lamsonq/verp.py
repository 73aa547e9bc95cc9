"""One return path for each recipient (VERP), so that a bounce proves whom it is about, whatever its text says.

    verp = VERP("bounces@example.org", secret)
    relay.deliver(message, To="joe@y.org", From=verp.address("joe@y.org"))  # bounces+5fqk3w7n2c4t+joe=y.org@example.org

Rules:

1. `prefix+TOKEN+local=domain@ours`. The token is an HMAC of the recipient: who does not know the secret can make none,
   so no forged bounce is believed. Everything is in lower case, because some systems make it so on the way back.
2. What is no letter, digit, `.`, `_` or `-` is `+` and two hexadecimal digits, so that every valid address fits.
3. A local part has 64 octets at most (RFC 5321 section 4.5.3.1.1). Where the recipient does not fit in, the address is
   `prefix+TOKEN@ours` with a longer token: the bounce must then name the recipient, and the token proves it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lamsonq.address import LOCAL_PART_MAX, canonical, is_path_address
from lamsonq.errors import SettingsError

if TYPE_CHECKING:
    from lamsonq.mail import MailRequest

SECRET_MIN = 16
"""Octets of a secret."""

SHORT, LONG = 12, 24
"""Letters of a token, of 5 bits each: beside the recipient, and in its place."""

_other = re.compile(rb"[^a-z0-9._-]|(?<=\.)\.")
_escape = re.compile(r"\+([0-9a-f]{2})")


def octets_of(secret: str | bytes) -> bytes:
    """A secret as octets. Raises SettingsError for one that can be guessed."""
    octets = secret.encode() if isinstance(secret, str) else secret
    if len(octets) < SECRET_MIN:
        raise SettingsError(f"a secret of {len(octets)} octets can be guessed: at least {SECRET_MIN}, at random")
    return octets


def token_of(secret: bytes, purpose: str, *texts: str, letters: int) -> str:
    """So many letters and digits that only who knows the secret can make from these texts."""
    text = "\0".join([purpose, *texts]).encode()
    digest = hmac.new(secret, text, hashlib.sha256).digest()
    return base64.b32encode(digest).decode().lower()[:letters]


class VERP:
    """Makes and reads the return paths below `address`. Raises SettingsError for what cannot be one."""

    def __init__(self, address: str, secret: str | bytes) -> None:
        self.prefix, _, self.domain = canonical(address).rpartition("@")
        self._secret = octets_of(secret)
        room = LOCAL_PART_MAX - len(self.prefix) - LONG - 1
        if not is_path_address(address) or not re.fullmatch(r"[a-z0-9._-]+", self.prefix) or room < 0:
            raise SettingsError(
                f"VERP: {address!r} is no address that return paths can be made of: bounces@example.org"
            )

    def address(self, recipient: str) -> str:
        """The return path for mail to this recipient. Raises ValueError for what is no address."""
        if not is_path_address(recipient):
            raise ValueError(f"{recipient!r} is no address")
        recipient = canonical(recipient)
        local, _, domain = recipient.rpartition("@")
        whole = f"{self.prefix}+{self._token(recipient, SHORT)}+{_encoded(local)}={_encoded(domain)}"
        if len(whole) > LOCAL_PART_MAX:
            whole = f"{self.prefix}+{self._token(recipient, LONG)}"
        return f"{whole}@{self.domain}"

    def recipient(self, address: str, named: Iterable[str] = ()) -> str | None:
        """Whom the mail with this return path went to; None for one that we have not made.

        `named` are the addresses that may be meant where it does not say so itself (rule 3).
        """
        local, _, domain = address.lower().rpartition("@")
        start = f"{self.prefix}+"
        if domain != self.domain or not local.startswith(start) or not local.isascii():
            return None
        token, _, encoded = local[len(start) :].partition("+")
        if not encoded:
            names = (canonical(name) for name in named if is_path_address(name))
            return next((name for name in names if self._is_token(token, name, LONG)), None)
        name, _, host = encoded.rpartition("=")
        try:
            found = f"{_decoded(name)}@{_decoded(host)}"
        except UnicodeDecodeError:
            return None
        return found if self._is_token(token, found, SHORT) else None

    def bounced(self, message: MailRequest) -> str | None:
        """Whom a bounce is about, by the address that it came to; None when that proves nothing."""
        bounce = message.bounce if message.is_bounce() else None
        named = [] if bounce is None else [a for r in bounce.recipients for a in (r.address, r.original, r.final)]
        return self.recipient(message.To, named)

    def _token(self, recipient: str, letters: int) -> str:
        return token_of(self._secret, "verp", recipient, letters=letters)

    def _is_token(self, token: str, recipient: str, letters: int) -> bool:
        return hmac.compare_digest(token, self._token(recipient, letters))


def _encoded(text: str) -> str:
    return _other.sub(lambda found: b"+%02x" % ord(found[0]), text.encode()).decode()


def _decoded(text: str) -> str:
    octets = _escape.sub(lambda found: chr(int(found[1], 16)), text).encode("latin-1")
    return octets.decode()
