"""Who may log in: names and the hashes of their passwords, in one file.

Rules:

1. A line is `name:scrypt:N:r:p:salt:hash` (RFC 7914), salt and hash in base64; `lamsonq logins add NAME` writes it. A
   password is never kept, and never logged.
2. The file is read again when it has changed. A file that cannot be read lets nobody in, and says so in the log.
3. An unknown name costs the time of a known one, so that nobody can try which names exist.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import secrets
import threading
import unicodedata

from lamsonq.errors import SettingsError

LOG = logging.getLogger()

_COST = (16384, 8, 1)
"""N, r and p of scrypt for new passwords: 16 MB and some 40 ms (RFC 7914 section 2)."""
_OCTETS = 32
"""Octets of a hash."""
_MEMORY_MAX = 128 * 1024 * 1024

Record = tuple[int, int, int, bytes, bytes]


class Logins:
    """The names in a file; `check(name, password)` is what a receiver asks. Raises SettingsError for a broken file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._records: dict[str, Record] = {}
        self._read()

    def __call__(self, name: str, password: str) -> bool:
        return self.check(name, password)

    def check(self, name: str, password: str) -> bool:
        """Whether this is the name's password. Takes some 40 ms, for unknown names too."""
        with self._lock:
            try:
                self._read()
            except SettingsError as error:
                LOG.error("%s; nobody can log in", error)
                self._records, self._stamp = {}, None
            record = self._records.get(_prepared(name))
        n, r, p, salt, wanted = record or (*_COST, b"nobody's", b"")
        return hmac.compare_digest(_hash(password, n, r, p, salt), wanted) and record is not None

    def _read(self) -> None:
        try:
            found = os.stat(self.path)
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return
            with open(self.path, encoding="utf-8") as file:
                self._records = dict(_parsed(self.path, file.read()))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            if isinstance(error, FileNotFoundError):
                why = f"{why}; `lamsonq logins -file {self.path} add NAME` makes it"
            raise SettingsError(f"receiver.logins_file: cannot read {self.path}: {why}") from error
        self._stamp = stamp


def _parsed(path: str, text: str) -> list[tuple[str, Record]]:
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, scheme, n, r, p, salt, digest = line.strip().rsplit(":", 6)
            cost = int(n), int(r), int(p)
            if scheme != "scrypt" or not name or 128 * cost[0] * cost[1] > _MEMORY_MAX:
                raise ValueError
            hashlib.scrypt(b"", salt=b"", n=cost[0], r=cost[1], p=cost[2], maxmem=_MEMORY_MAX, dklen=1)
            record = (*cost, base64.b64decode(salt, validate=True), base64.b64decode(digest, validate=True))
            if len(record[-1]) != _OCTETS:
                raise ValueError
        except ValueError as error:
            raise SettingsError(
                f"receiver.logins_file: {path}:{number}: this is no login; `lamsonq logins add NAME` writes one"
            ) from error
        records.append((_prepared(name), record))
    return records


def add(path: str, name: str, password: str) -> None:
    """Add a name to the file, or give it a new password. Raises ValueError, and OSError as it comes."""
    if not name or ":" in name or not name.isprintable() or name.startswith("#") or name != name.strip():
        raise ValueError(f"{name!r} is no name to log in with: it holds a colon or a line end, or nothing")
    if not password:
        raise ValueError("the password is empty")
    salt = secrets.token_bytes(16)
    n, r, p = _COST
    salted, hashed = (base64.b64encode(octets).decode() for octets in (salt, _hash(password, n, r, p, salt)))
    _rewrite(path, name, f"{_prepared(name)}:scrypt:{n}:{r}:{p}:{salted}:{hashed}")


def remove(path: str, name: str) -> bool:
    """Take a name out of the file; False when it is not there. Raises OSError."""
    return _rewrite(path, name, None)


def names(path: str) -> list[str]:
    """Who may log in. Raises OSError."""
    with open(path, encoding="utf-8") as file:
        return [line.split(":")[0] for line in file.read().splitlines() if line.strip() and not line.startswith("#")]


def _rewrite(path: str, name: str, entry: str | None) -> bool:
    """Replace a name's line. The file is there whole at every moment, for its owner alone."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        lines = []
    import tempfile  # when it is used: a server only reads

    kept = [line for line in lines if line.partition(":")[0] != _prepared(name)]
    was_there = len(kept) < len(lines)
    descriptor, fresh = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".logins")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in [*kept, *([entry] if entry else [])])
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            owner = os.stat(path)
            os.chmod(fresh, owner.st_mode & 0o777)
            if os.geteuid() == 0:
                os.chown(fresh, owner.st_uid, owner.st_gid)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise
    return was_there


def _prepared(text: str) -> str:
    """One spelling for what looks the same (RFC 8265 section 4.2)."""
    return unicodedata.normalize("NFC", text)


def _hash(password: str, n: int, r: int, p: int, salt: bytes) -> bytes:
    octets = _prepared(password).encode("utf-8", "surrogateescape")
    return hashlib.scrypt(octets, salt=salt, n=n, r=r, p=p, maxmem=_MEMORY_MAX, dklen=_OCTETS)
