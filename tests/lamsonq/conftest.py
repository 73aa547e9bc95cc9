"""What several tests of the framework share: handler modules written on the spot, and a folder of one's own."""

import itertools
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq.mail import MailRequest
from lamsonq.marks import MODULES
from lamsonq.routing import RoutingBase

_numbers = itertools.count(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def module(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`module(source)` writes an importable handler module and gives its name. A function that has `@never_again` is a
    dead letter's at its first failure."""
    monkeypatch.syspath_prepend(str(here))
    made: list[str] = []

    def write(source: str, name: str | None = None) -> str:
        name = name or f"handlers_{next(_numbers)}"
        header = (
            "from lamsonq.routing import *\nfrom lamsonq.errors import *; from lamsonq.deferred import deferrable\n"
            "CALLS, never_again = [], deferrable(error_classes=())\n"
        )
        (here / f"{name}.py").write_text(header + textwrap.dedent(source))
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)
        MODULES.pop(name, None)


@pytest.fixture
def router(here: Path) -> RoutingBase:
    """A router of the test's own."""
    return RoutingBase()


@pytest.fixture
def mail() -> Callable[..., MailRequest]:
    """`mail(to, sender)` is a small message."""

    def make(
        to: str | list[str] = "desk@example.com", sender: str = "alice@example.com", body: str = "hello"
    ) -> MailRequest:
        data = f"From: {sender}\r\nTo: {to if isinstance(to, str) else ', '.join(to)}\r\nSubject: hi\r\n\r\n{body}\r\n"
        return MailRequest(("127.0.0.1", 4242), sender, to, data.encode())

    return make


@pytest.fixture
def free_port() -> Callable[[], int]:
    """`free_port()` is a port of the loopback that nobody listens on at this moment."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port: int = server.getsockname()[1]
            return port

    return find
