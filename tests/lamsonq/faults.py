"""Makes calls of the operating system fail, or end the process, at a chosen one."""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

WRITING = ("open", "write", "fsync", "rename", "unlink", "link", "utime", "mkdir")
LOOKING = ("scandir", "lstat", "listdir", "fstat")
CODES = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS)


class Crash(BaseException):
    """The process ends here."""


class Faults:
    """Counts the calls of some functions of `os`, and of `open`; from `fail` on the n-th fails, with `lasting` all
    that come after it too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...] = WRITING) -> None:
        self.seen: list[str] = []
        self._at = -1
        self._lasting = False
        self._error: BaseException | None = None
        for function in functions:
            monkeypatch.setattr(os, function, self._wrapped(function, getattr(os, function)))
        monkeypatch.setattr(builtins, "open", self._wrapped("open", builtins.open))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._at < 0:
                return real(*args, **kwargs)
            self.seen.append(f"{name} {args[0]}")
            number = len(self.seen) - 1
            if number == self._at or (self._lasting and number > self._at):
                if self._error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    raise self._error
            return real(*args, **kwargs)

        return call

    def fail(self, at: int, error: BaseException | int | None, *, lasting: bool = False) -> None:
        """Let the call `at` raise this error (a number is an OSError's), or with None be the end of the process."""
        self.seen.clear()
        self._error = OSError(error, os.strerror(error)) if isinstance(error, int) else error
        self._at, self._lasting = at, lasting

    def heal(self) -> bool:
        """Let all calls succeed again; whether one had failed."""
        at, self._at = self._at, -1
        return len(self.seen) > at
