"""The certificate of a receiver, which may be replaced while it runs.

Rules:

1. A certificate and its key are looked at again when a client connects, at most every LOOK_AGAIN seconds: what a
   renewal has written counts from then on. Nobody has to restart anything, and no session is cut.
2. A key that others on this machine can use is not used, as one of DKIM.
3. What cannot be used when the receiver starts ends the boot. Later it is one line in the log, and the certificate that
   works stays.
"""

from __future__ import annotations

import logging
import os
import ssl
import time

from lamsonq.errors import SettingsError
from lamsonq.keyfile import refuse_shared

LOG = logging.getLogger()

LOOK_AGAIN = 5.0
"""Seconds for which the files are not looked at again."""


class TLS:
    """A certificate, and when it is used: STARTTLS (RFC 3207) is offered; with `required` no mail is taken before it;
    with `implicit` TLS is spoken from the first byte (RFC 8314 section 3.3).

    `certificate_file` holds the certificate and what leads to its authority, in PEM; `key_file` the key, None where it
    stands in the same file. TLS 1.2 is the least that is spoken (RFC 8996). Raises SettingsError.
    """

    def __init__(
        self,
        certificate_file: str,
        key_file: str | None = None,
        *,
        required: bool = False,
        implicit: bool = False,
    ) -> None:
        self.certificate_file = certificate_file
        self.key_file = key_file
        self.required = required or implicit
        self.implicit = implicit
        self._seen = self._signature()
        self._context = self._loaded()
        self._looked = time.monotonic()

    def context(self) -> ssl.SSLContext:
        """The context for a new handshake: of the certificate that is there now."""
        if time.monotonic() - self._looked > LOOK_AGAIN:
            self.refresh()
        return self._context

    def refresh(self) -> None:
        """Look at the files now (rule 3)."""
        self._looked = time.monotonic()
        signature = self._signature()
        if signature == self._seen:
            return
        try:
            context = self._loaded()
        except SettingsError as error:
            LOG.error("%s; going on with the certificate of before", error)
            return
        self._context, self._seen = context, signature
        LOG.info("The certificate %s was loaded again.", self.certificate_file)

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate_file, self.key_file, password=_no_password)
            refuse_shared("receiver", self.key_file or self.certificate_file)
        except (OSError, ValueError) as error:
            raise SettingsError(f"receiver: cannot use {self._files()} for TLS: {_why(error)}") from error
        return context

    def _files(self) -> str:
        return f"{self.certificate_file} and {self.key_file}" if self.key_file else self.certificate_file

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when a file is written or replaced."""
        return tuple(_stamp(path) for path in (self.certificate_file, self.key_file) if path)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _no_password() -> str:
    raise ValueError("the key is encrypted; a server cannot ask for its password")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        known = {
            "KEY_VALUES_MISMATCH": "the key is not this certificate's",
            "NO_START_LINE": "it holds no PEM",
            "PEM_LIB": "it holds no certificate with its key in PEM",
        }
        # OpenSSL 3 has no reason for what its PEM library says, only the words "[SSL] PEM lib".
        reason = error.reason or ("PEM_LIB" if "PEM lib" in str(error) else "")
        return known.get(reason, reason or str(error))
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
