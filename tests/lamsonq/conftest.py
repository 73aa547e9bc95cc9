"""What several tests of the framework share: handler modules written on the spot, and a folder of one's own."""

import errno
import itertools
import os
import ssl
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from asyncinotify import Inotify

from lamsonq import backends
from lamsonq.backends import memory
from lamsonq.mail import MailRequest
from lamsonq.marks import MODULES
from lamsonq.routing import RoutingBase
from lamsonq.smtp import SMTPReceiver

from . import ports
from .waiting import PATIENCE

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Syncs of this process are asked for, counted and made to fail, but spare the disk: what only a power failure
    would show, no test can see. What servers ask the kernel for is read from outside (test_durability)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def watched() -> Iterator[None]:
    """A user has so many instances of inotify(7) (fs.inotify.max_user_instances): when other suites of this user have
    them all, a test waits for one, and is not one that has to look once a second."""
    init = Inotify.__init__

    def wait_and_init(self: Inotify, *args: Any, **options: Any) -> None:
        give_up_at = time.monotonic() + PATIENCE
        while True:
            try:
                return init(self, *args, **options)
            except OSError as error:
                if error.errno != errno.EMFILE or time.monotonic() > give_up_at:
                    raise
            time.sleep(0.02)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inotify, "__init__", wait_and_init)
        yield


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """Tests come in any order, and many in one process: its queues and its umask are each test's own."""
    umask = os.umask(0o022)
    os.umask(umask)
    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which is undone before other fixtures end
        patch.setattr(memory, "_stores", {})
        yield
    backends._open.cache_clear()  # 128 of them, with their watches, would be kept for who asks again
    os.umask(umask)


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
    """`free_port()` is a port that nobody listens on, and nobody but the test will."""
    return ports.free_port


@pytest.fixture
def serve(router: RoutingBase, here: Path) -> Iterator[Callable[..., SMTPReceiver]]:
    """`serve(...)` starts a receiver on a free port of the loopback; its `deliver` fills `serve.taken` unless told
    otherwise."""
    started: list[SMTPReceiver] = []

    def begin(kind: type[SMTPReceiver] = SMTPReceiver, **options: Any) -> SMTPReceiver:
        options.setdefault("deliver", taken.append)
        receiver = kind("127.0.0.1", 0, router=router, hostname="mx.test", **options)
        receiver.start()
        started.append(receiver)
        return receiver

    taken: list[MailRequest] = []
    begin.taken = taken  # type: ignore[attr-defined]
    yield begin
    for receiver in started:
        receiver.stop(0)
    for receiver in started:
        receiver.join()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Who signs the certificates of the tests."""
    return trustme.CA()


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client's context that trusts this authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> Callable[..., str]:
    """`certificate()` writes a certificate for 127.0.0.1 with its key to a file; its path."""

    def write(name: str = "127.0.0.1", ca: trustme.CA = authority, file: str = "mx.pem") -> str:
        path = tmp_path / file
        path.touch(0o600)
        ca.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(path))
        return str(path)

    return write
