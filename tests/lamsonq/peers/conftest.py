"""Receivers and queues that a peer talks to."""

from __future__ import annotations

import contextlib
import dataclasses
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from lamsonq import logins
from lamsonq.backends.maildir import Maildir
from lamsonq.jobs import Job
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import QueueReceiver, Receiver
from lamsonq.tls import TLS

from ..waiting import until
from .programs import open_folder

BODY = (
    "Grüße, ein Punkt am Anfang:\r\n.\r\n..zwei\r\n.drei\r\n\r\n"
    "From here on nothing is a header: at all\r\n"
    f"{'long ' * 190}\r\n\ttab and trailing blanks  \r\n\r\n\r\n"
)
HEADERS = (
    "From: Ann <ann@x.test>\r\nTo: Bob <bob@y.test>\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n"
    "Message-ID: <{name}@x.test>\r\nDate: Mon, 23 Nov 2026 10:00:00 +0000\r\n"
    "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n"
    "X-Odd:   two  blanks\r\n\tand a fold\r\n"
)


def mail_named(name: str) -> bytes:
    """A message that is easily spoilt: dots, eight bits, folds, blanks and blank lines at its end."""
    return (HEADERS.format(name=name) + "\r\n" + BODY).encode()


class Handled:
    """What a handler has got. `refusals` are the errors that it raises instead, by recipient, "" for all."""

    def __init__(self) -> None:
        self.messages: list[MailRequest] = []
        self.refusals: dict[str, Exception] = {}
        self._lock = threading.Lock()

    def __call__(self, message: MailRequest) -> None:
        error = self.refusals.get(message.To) or self.refusals.get("")
        if error is not None:
            raise error
        with self._lock:
            self.messages.append(message)

    def ids(self) -> list[str]:
        return sorted(message["message-id"] or "" for message in self.messages)

    def wait(self, count: int) -> list[MailRequest]:
        """The messages, once there are so many."""
        until(lambda: len(self.messages) >= count, f"{count} messages handled")
        return self.messages


@pytest.fixture
def handled() -> Handled:
    return Handled()


@pytest.fixture
def routed(router: RoutingBase, handled: Handled, module: Callable[..., str], posts: Queue) -> RoutingBase:
    """A router whose one function takes the mail to y.test and its subdomains, and nothing else."""
    name = module(
        """
        @route("(who)@(sub)y.test", who="[a-z0-9]+", sub="([a-z]+[.])?")
        @stateless
        def START(message, who, sub):
            HANDLED(message)
        """
    )
    router.load([name])
    sys.modules[name].HANDLED = handled  # type: ignore[attr-defined]
    router.UNDELIVERABLE_QUEUE = Queue(Path(posts.dir).with_name("undeliverable"))
    return router


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Receiver], None]]:
    """`serve(receiver)` runs it until the test has ended."""
    monkeypatch.setattr("lamsonq.smtp.LEAVE_AFTER", 0.0)  # who keeps a connection for later is sent away at once
    with contextlib.ExitStack() as stack:

        def start(receiver: Receiver) -> None:
            if isinstance(receiver, QueueReceiver):  # its start returns when it is stopped
                thread = threading.Thread(target=receiver.start)
                thread.start()
                stack.callback(thread.join)
            else:
                receiver.start()
            stack.callback(receiver.join)
            stack.callback(receiver.stop)

        yield start


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """A run/ that other users may look into."""
    with open_folder() as folder:
        yield folder / "run"


@pytest.fixture
def posts(run_folder: Path) -> Queue:
    run_folder.mkdir()
    return Queue(run_folder / "posts")


NAME, PASSWORD = "ann", "geheim & lang"
"""Who may log in."""


@dataclasses.dataclass(frozen=True)
class Papers:
    """A certificate for 127.0.0.1, localhost and mail.y.test, what trusts it, and a file with one login."""

    certificate: str
    key: str
    authority: str
    logins: str

    def tls(self, **when: bool) -> TLS:
        return TLS(self.certificate, self.key, **when)

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority)


@pytest.fixture(scope="session")
def papers() -> Iterator[Papers]:
    """In a folder that other users may look into."""
    authority = trustme.CA()
    mine = authority.issue_cert("127.0.0.1", "localhost", "mail.y.test")
    with open_folder() as folder:
        files = Papers(*(str(folder / name) for name in ("certificate.pem", "key.pem", "authority.pem", "logins")))
        for number, blob in enumerate(mine.cert_chain_pems):
            blob.write_to_path(files.certificate, append=number > 0)
        mine.private_key_pem.write_to_path(files.key)
        Path(files.key).chmod(0o600)
        authority.cert_pem.write_to_path(files.authority)
        logins.add(files.logins, NAME, PASSWORD)
        yield files


def jobs_in(queue: Queue) -> list[Job]:
    """All ready jobs, oldest first."""
    assert isinstance(queue.backend, Maildir)
    found = [queue.backend.get(key) for key in queue.keys()]  # noqa: SIM118 - no mapping
    return [job for job in found if job is not None]
