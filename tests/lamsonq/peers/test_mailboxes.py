"""A queue is a maildir: mutt and Dovecot read it, procmail delivers into it, and no job is lost or doubled."""

from __future__ import annotations

import imaplib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq import fsck
from lamsonq.errors import SMTPError, Undelivered
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import QueueReceiver, Receiver, Relay

from ..ports import free_port
from ..waiting import until
from .conftest import Handled, mail_named
from .dovecot import Dovecot, give_to_dovecot
from .mutt import Mutt
from .programs import need, open_folder, run

Serve = Callable[[Receiver], None]


def push(queue: Queue, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        queue.push(MailRequest(None, "ann@x.test", ["bob@y.test"], mail_named(f"n{number}")))


def work_off(queue: Queue, handled: Handled) -> None:
    QueueReceiver(queue, deliver=handled, router=RoutingBase()).start(one_shot=True)


def assert_each_handled_once(queue: Queue, handled: Handled, count: int) -> None:
    """Every message, with its bytes; and nothing is left."""
    assert handled.ids() == sorted(f"<n{number}@x.test>" for number in range(count))
    assert sorted(message.Data for message in handled.messages) == sorted(mail_named(f"n{n}") for n in range(count))
    assert set(queue.backend.counts().values()) == {0}
    assert not [name for sub in ("new", "cur") for name in os.listdir(os.path.join(queue.dir, sub))]


def names_in(queue: Queue) -> list[str]:
    return sorted(os.listdir(os.path.join(queue.dir, "new")) + os.listdir(os.path.join(queue.dir, "cur")))


# -- mutt -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mutt(posts: Queue, tmp_path: Path) -> Callable[[], Mutt]:
    need("mutt")
    return lambda: Mutt(Path(posts.dir), tmp_path)


@pytest.mark.slow
def test_mutt_lists_opens_and_flags_what_waits_and_leaves_it_whole(
    mutt: Callable[[], Mutt], posts: Queue, handled: Handled
) -> None:
    push(posts, 5)
    before = posts.keys()
    opened = mutt()
    opened.see("[Grüße]")
    opened.press("\r", "From here on nothing is a header")
    opened.press("q", "[Grüße]")
    opened.press("F")
    opened.press("$")
    opened.close()
    names = names_in(posts)
    assert sum(name.endswith(":2,FS") for name in names) == 1, names
    assert posts.keys() == before
    report = fsck.check(Path(posts.dir).parent, [f"<n{number}@x.test>" for number in range(5)])
    assert report.good, report
    work_off(posts, handled)
    assert_each_handled_once(posts, handled, 5)


@pytest.mark.slow
def test_what_is_worked_while_mutt_shows_it_does_not_come_back(
    mutt: Callable[[], Mutt], posts: Queue, handled: Handled
) -> None:
    push(posts, 5)
    opened = mutt()
    opened.press("\r", "From here on nothing is a header")
    work_off(posts, handled)
    opened.press("q")
    opened.press("F")
    opened.press("$")
    opened.close()
    assert_each_handled_once(posts, handled, 5)
    work_off(posts, handled)
    assert len(handled.messages) == 5


@pytest.mark.slow
def test_mutt_saves_its_flags_again_and_again_while_jobs_come_and_go(
    mutt: Callable[[], Mutt], posts: Queue, handled: Handled, serve: Serve
) -> None:
    push(posts, 10)
    opened = mutt()
    opened.see("[Grüße]")
    serve(QueueReceiver(posts, workers=2, deliver=handled, router=RoutingBase()))
    for first in range(10, 60, 5):
        push(posts, 5, first)
        opened.press("F")
        opened.press("$")
    handled.wait(60)
    opened.close()
    assert_each_handled_once(posts, handled, 60)


@pytest.mark.slow
def test_what_is_deleted_in_mutt_is_no_job_any_more(mutt: Callable[[], Mutt], posts: Queue, handled: Handled) -> None:
    push(posts, 3)
    opened = mutt()
    opened.see("[Grüße]")
    opened.press("d")
    opened.close()
    work_off(posts, handled)
    assert len(handled.messages) == 2


# -- Dovecot ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dovecot() -> Iterator[Dovecot]:
    """It serves the queue posts to the user posts, and takes mail for ann."""
    with open_folder() as folder:
        mailboxes = {"posts": folder / "run/posts", "ann@x.test": folder / "ann", "bob@y.test": folder / "bob"}
        (folder / "run").mkdir()
        give_to_dovecot(folder / "run")
        os.chmod(folder, 0o777)
        dovecot = Dovecot(folder, free_port(), free_port(), mailboxes)
        yield dovecot
        dovecot.close()


@pytest.fixture
def served(dovecot: Dovecot) -> Iterator[Queue]:
    """The queue that Dovecot serves."""
    queue = Queue(dovecot.folder / "run/posts")
    yield queue
    queue.backend.close()


def fetched(client: imaplib.IMAP4, number: int) -> bytes:
    _, data = client.fetch(str(number), "(BODY[])")
    assert isinstance(data[0], tuple)
    return data[0][1]


def test_dovecot_serves_a_queue_by_imap_and_leaves_it_whole(dovecot: Dovecot, served: Queue, handled: Handled) -> None:
    push(served, 5)
    before = served.keys()
    give_to_dovecot(Path(served.dir))
    client = dovecot.login("posts")
    assert client.select("INBOX") == ("OK", [b"5"])
    for number in range(1, 6):
        assert fetched(client, number).endswith(mail_named(f"n{number - 1}"))
    client.store("2", "+FLAGS", "(\\Seen \\Answered)")
    listed = b" ".join(line for line in client.list()[1] if isinstance(line, bytes))
    client.logout()
    assert b"dead" in listed
    assert b"delayed" in listed
    assert served.keys() == before
    assert [name for name in names_in(served) if name.endswith(":2,RS")]
    report = fsck.check(Path(served.dir).parent, [f"<n{number}@x.test>" for number in range(5)])
    assert report.good, report
    work_off(served, handled)
    assert_each_handled_once(served, handled, 5)


def test_a_queue_is_worked_while_an_imap_client_looks_at_it(dovecot: Dovecot, served: Queue, handled: Handled) -> None:
    push(served, 5)
    give_to_dovecot(Path(served.dir))
    client = dovecot.login("posts")
    client.select("INBOX")
    client.store("1:5", "+FLAGS", "(\\Seen)")
    work_off(served, handled)
    client.store("1:5", "+FLAGS", "(\\Flagged)")
    client.noop()
    client.logout()
    assert_each_handled_once(served, handled, 5)


def test_what_an_imap_client_puts_into_a_queue_is_a_job(dovecot: Dovecot, served: Queue, handled: Handled) -> None:
    push(served, 0)
    served.count()
    give_to_dovecot(Path(served.dir))
    client = dovecot.login("posts")
    assert client.append("INBOX", "", "", mail_named("n0"))[0] == "OK"
    client.logout()
    work_off(served, handled)
    (message,) = handled.messages
    assert message.Data.replace(b"\n", b"\r\n") == mail_named("n0")  # Dovecot keeps lines as its system does
    assert (message.From, message.To) == ("ann@x.test", "bob@y.test")


@pytest.mark.parametrize("by", ["port", "socket"])
def test_dovecot_takes_what_a_relay_gives_it_by_lmtp_and_refuses_for_each_recipient(by: str, dovecot: Dovecot) -> None:
    relay = Relay(dovecot.socket) if by == "socket" else Relay("127.0.0.1", dovecot.lmtp, lmtp=True)
    message = MailRequest(None, "eve@z.test", ["ann@x.test", "nobody@x.test", "bob@y.test"], mail_named(by))
    with pytest.raises(Undelivered) as raised:
        relay.deliver(message)
    relay.close()
    (failure,) = raised.value.failures
    assert failure.recipient == "nobody@x.test"
    assert isinstance(failure.error, SMTPError)
    assert failure.error.code == 550
    for user in ("ann@x.test", "bob@y.test"):
        client = dovecot.login(user)
        count = int(client.select("INBOX")[1][0] or 0)
        assert fetched(client, count).endswith(mail_named(by))
        assert b"Return-Path: <eve@z.test>" in fetched(client, count)
        client.logout()


# -- what others deliver ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_procmail_delivers_into_a_queue_is_worked(
    posts: Queue, handled: Handled, serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "procmailrc").write_text(f"DEFAULT={posts.dir}/\nLOGFILE={tmp_path}/log\n")
    serve(QueueReceiver(posts, deliver=handled, router=RoutingBase()))
    for number in range(10):
        message = mail_named(f"n{number}").replace(b"\r\n", b"\n")
        run(["procmail", "-m", str(tmp_path / "procmailrc")], message)
    until(lambda: len(handled.messages) == 10, "10 messages handled")
    assert handled.ids() == sorted(f"<n{number}@x.test>" for number in range(10))
    assert {(message.From, message.To) for message in handled.messages} == {("ann@x.test", "bob@y.test")}
    expected = {mail_named(f"n{number}").replace(b"\r\n", b"\n") for number in range(10)}
    assert {message.Data for message in handled.messages} == expected
