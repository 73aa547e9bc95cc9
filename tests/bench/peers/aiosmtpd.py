"""aiosmtpd as it comes, which lamsonq is built on: with a handler that drops, and with one that keeps in a maildir and
syncs file and directory before it says 250."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..installed import python
from ..processes import Listening, free_port, listening, running

SERVER = """
import asyncio, os, time
from aiosmtpd.smtp import SMTP

class Sink:
    async def handle_DATA(self, server, session, envelope):
        return "250 OK"

class Maildir:
    def __init__(self):
        self.number = 0
        for name in ("tmp", "new", "cur"):
            os.makedirs(f"posts/{{name}}")
        self.new = os.open("posts/new", os.O_RDONLY | os.O_DIRECTORY)

    async def handle_DATA(self, server, session, envelope):
        self.number += 1
        name = f"{{time.time()}}.{{os.getpid()}}Q{{self.number}}.bench"
        with open(f"posts/tmp/{{name}}", "wb") as file:
            file.write(envelope.content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"posts/tmp/{{name}}", f"posts/new/{{name}}")
        os.fsync(self.new)
        return "250 OK"

async def serve():
    loop = asyncio.get_running_loop()
    handler = {handler}()
    server = await loop.create_server(lambda: SMTP(handler, loop=loop), "127.0.0.1", {port})
    await server.serve_forever()

asyncio.run(serve())
"""


def missing() -> str | None:
    return None if python() else "PyPI's packages cannot be installed"


@contextlib.contextmanager
def _serving(folder: Path, handler: str) -> Iterator[Listening]:
    port = free_port()
    command = [python() or "", "-c", SERVER.format(handler=handler, port=port)]
    with running(command, folder) as program:
        yield listening(port, program)


def sink(folder: Path) -> contextlib.AbstractContextManager[Listening]:
    return _serving(folder, "Sink")


def maildir(folder: Path) -> contextlib.AbstractContextManager[Listening]:
    return _serving(folder, "Maildir")
