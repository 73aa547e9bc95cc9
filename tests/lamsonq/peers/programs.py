"""Finding and running the programs of others that a test talks to or through."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PATH = os.pathsep.join(
    (os.environ.get("PATH", ""), "/usr/sbin", "/usr/lib/postfix/sbin", "/usr/lib/dovecot", "/opt/exim4")
)
"""Servers are often not on the path of users. Debian installs Exim or Postfix: .ci/run puts Exim beside it."""


def need(name: str, *, root: bool = False) -> str:
    """Where a program is. Without it, or without the `root` that it needs, the test is skipped; in CI it fails."""
    found = shutil.which(name, path=PATH)
    if found is not None and not (root and os.geteuid() != 0):
        return found
    message = f"{name} is not installed" if found is None else f"{name} starts as root only"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def run(command: Sequence[str], data: bytes = b"", *, code: int | None = 0) -> str:
    """Run a program to its end; what it said. `code` is how it has to end, None: however."""
    done = subprocess.run(
        [need(command[0]), *command[1:]],
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    said = done.stdout.decode("utf-8", "replace")
    assert code is None or done.returncode == code, f"{command[0]} ended with {done.returncode}:\n{said}"
    return said


def listens(port: int) -> bool:
    """Whether a server answers there."""
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            return bool(client.recv(1))
    except OSError:
        return False


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that other users may look into: pytest's own are for one user alone."""
    with tempfile.TemporaryDirectory(prefix="lamsonq-peer-", ignore_cleanup_errors=True) as made:
        os.chmod(made, 0o755)
        yield Path(made)
