"""Haraka with its own disk queue: the file is synced before 250, the directory is not. Nothing is delivered."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..installed import haraka
from ..processes import Listening, free_port, listening, running

RELAY = "exports.hook_rcpt = (next, connection) => { connection.relaying = true; next(OK) }\n"


def missing() -> str | None:
    return None if haraka() else "it needs npm"


@contextlib.contextmanager
def durable(folder: Path) -> Iterator[Listening]:
    port = free_port()
    subprocess.run(
        [haraka() or "", "-i", str(folder)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    files = {
        "config/smtp.ini": f"listen=127.0.0.1:{port}\n",
        "config/plugins": "keep\n",
        "config/outbound.ini": "disabled=true\n",
        "config/log.ini": "[main]\nlevel=notice\n",
        "plugins/keep.js": RELAY,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    with running([haraka() or "", "-c", str(folder)], folder) as program:
        yield listening(port, program)
