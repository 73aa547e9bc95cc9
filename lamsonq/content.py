"""A large message on its way in: a file takes what has come of it, and memory stays free.

Rules:

1. The file has no name (O_TMPFILE, where the file system knows it): whoever goes, the client or this process, nothing
   of it is left.
2. It lies in `run/`, which is on a disk, and on the one whose room `space` watches: /tmp may be memory itself. Where
   nothing can be written in `run/` it lies where `tempfile` puts it.
3. It is read once, by the thread that works on the message: so many are in memory as there are threads, however many
   clients send one; with `verify`, also those that were looked at and wait. It is not synced: a message is promised
   when it is kept, and until then it is the client's.
"""

from __future__ import annotations

import os

from lamsonq.trace import hops


class Spilled:
    """A message in a file: pieces are written, then all of it is read. `len` tells its octets.

    With `checked` it is looked for what `has_bare_line_end` and `has_nul` tell; else they are False. `hops` are those
    of the first piece: where a message goes round, they stand at its top. Raises OSError when there can be no file.
    """

    def __init__(self, *, checked: bool = False) -> None:
        import tempfile  # when it is used: most servers never see a large message, and it brings the compressors

        where = "run" if os.access("run", os.W_OK | os.X_OK) else None
        self._file = tempfile.TemporaryFile(buffering=0, dir=where)  # noqa: SIM115 - `read` closes it, or `close`
        self._size = 0
        self._checked = checked
        self._open = b""
        """A CR that ended the last piece: whether it is bare, the next one tells."""
        self._bare = False
        self.hops = 0
        self.has_nul = False

    def __len__(self) -> int:
        return self._size

    def write(self, piece: bytes) -> None:
        """Raises OSError, for one where the disk is full; then only `close` is left."""
        if not self._size:
            self.hops = hops(piece)
        self._size += len(piece)
        if self._checked:
            self._check(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _check(self, piece: bytes) -> None:
        known = self._open + piece
        self._open = known[-1:] if known.endswith(b"\r") else b""
        self._bare = self._bare or has_bare_line_end(known.removesuffix(b"\r"))
        self.has_nul = self.has_nul or b"\0" in piece

    @property
    def has_bare_line_end(self) -> bool:
        return self._bare or bool(self._open)

    def read(self) -> bytes:
        """All of it; the file is gone then. Raises OSError."""
        with self._file:
            self._file.seek(0)
            return self._file.readall()

    def close(self) -> None:
        """Nobody wants it."""
        self._file.close()


Content = bytes | Spilled
"""A message that has come whole."""


def has_bare_line_end(content: bytes) -> bool:
    """Whether a CR or LF stands alone: counting is a hundred times faster than an expression."""
    pairs = content.count(b"\r\n")
    return content.count(b"\n") != pairs or content.count(b"\r") != pairs
