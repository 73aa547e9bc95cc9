"""The report that a function has handled a message, for a sender who asked for it (RFC 3461, NOTIFY=SUCCESS)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lamsonq.commands.servers import _receiver_of
from lamsonq.envelope import Envelope, Notify
from lamsonq.errors import LeaseLost
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue, message_of
from lamsonq.relay import Relay
from lamsonq.routing import RoutingBase
from lamsonq.server import SMTPReceiver
from lamsonq.worker import QueueReceiver

from .waiting import PATIENCE

Module = Callable[..., str]

NOTED = """
@route("(who)@y.test", who=".+")
@stateless
def START(message, who=None): CALLS.append(who)
"""
TWICE = """
@route("ann@y.test")
@stateless
def FIRST(message): CALLS.append("first")

@route("ann@y.test")
@stateless
def SECOND(message): CALLS.append("second")
"""


@pytest.fixture(params=["maildir", "sqlite"])
def posts(request: pytest.FixtureRequest, here: Path) -> Queue:
    return Queue("run/posts" if request.param == "maildir" else "sqlite:run/q.db?queue=posts")


@pytest.fixture
def outbox(posts: Queue) -> Iterator[Queue]:
    outbox = Queue("run/outbox" if posts.dir == "run/posts" else "sqlite:run/q.db?queue=outbox")
    yield outbox
    posts.backend.close()


def spool(queue: Queue, *to: str, notify: str = "SUCCESS", sender: str = "Joe@x.test") -> None:
    """As a receiver that was given `deliver=queue.push`."""
    to = to or ("Ann@y.test",)
    wishes = Notify(envid="QQ314", notify=dict.fromkeys(to, notify), orcpt=dict.fromkeys(to, "rfc822;old@y.test"))
    envelope = Envelope(sender, to, ("192.0.2.1", 4), 1e9, notify=wishes)
    queue.push(MailRequest(envelope.peer, sender, list(to), b"Subject: hi\r\n\r\nbody\r\n", envelope=envelope))


def work(posts: Queue, router: RoutingBase, outbox: Queue) -> None:
    receiver = QueueReceiver(posts, router=router, reports=Relay(deliver=outbox.push).deliver)
    while receiver.run_once():
        pass


def reports(outbox: Queue) -> list[MailRequest]:
    store = outbox.backend
    return [message_of(job, "") for key in store.keys("ready") if (job := store.get(key))]


def told(outbox: Queue) -> list[str]:
    """Who stands in the reports, one after the other."""
    found = [re.findall(rb"Final-Recipient: rfc822; (\S+)\r\nAction: delivered", r.Data) for r in reports(outbox)]
    return [address.decode() for addresses in found for address in addresses]


def test_a_spooled_message_is_reported_when_its_function_has_handled_it(
    posts: Queue, outbox: Queue, router: RoutingBase, module: Module
) -> None:
    router.load([module(NOTED)])
    spool(posts)
    assert reports(outbox) == []
    work(posts, router, outbox)
    (report,) = reports(outbox)
    assert (report.envelope.mail_from, report.envelope.rcpt_tos) == ("", ("Joe@x.test",))
    for field in (b"Original-Envelope-Id: QQ314", b"Original-Recipient: rfc822; old@y.test", b"Action: delivered"):
        assert field in report.Data
    assert told(outbox) == ["Ann@y.test"]


@pytest.mark.parametrize(
    ("notify", "sender"),
    [("FAILURE,DELAY", "joe@x.test"), ("NEVER", "joe@x.test"), ("", "joe@x.test"), ("SUCCESS", "")],
)
def test_nobody_is_told_who_did_not_ask_and_never_the_null_sender(
    notify: str, sender: str, posts: Queue, outbox: Queue, router: RoutingBase, module: Module
) -> None:
    router.load([module(NOTED)])
    spool(posts, notify=notify, sender=sender)
    work(posts, router, outbox)
    assert posts.backend.counts()["ready"] == 0
    assert reports(outbox) == []


def test_each_recipient_is_reported_once_when_the_last_of_his_functions_has_finished(
    posts: Queue, outbox: Queue, router: RoutingBase, module: Module
) -> None:
    router.load([module(TWICE + NOTED.replace('".+"', '"ben"'))])
    spool(posts, "ann@y.test", "ben@y.test")
    receiver = QueueReceiver(posts, router=router, reports=Relay(deliver=outbox.push).deliver)
    after = []
    while receiver.run_once():
        after.append(len(told(outbox)))
    assert after == [0, 0, 1, 2], "parted, the first function, the second, and that of the other recipient"
    assert sorted(told(outbox)) == ["ann@y.test", "ben@y.test"]


def test_what_a_function_sends_on_takes_the_wish_along(
    posts: Queue, outbox: Queue, router: RoutingBase, module: Module
) -> None:
    name = module("""
from lamsonq.queue import Queue
@route("ann@y.test")
@stateless
def ON(message): CALLS[0].push(message)
""")
    router.load([name])
    elsewhere = Queue("run/elsewhere")
    __import__(name).CALLS.append(elsewhere)
    spool(posts)
    work(posts, router, outbox)
    assert reports(outbox) == []
    there = RoutingBase()
    there.load([module(NOTED)])
    work(elsewhere, there, outbox)
    assert told(outbox) == ["Ann@y.test"]


def test_a_failure_is_a_dead_letter_and_no_report_and_a_success_after_it_is_one(
    posts: Queue, outbox: Queue, router: RoutingBase, module: Module
) -> None:
    name = module("""
@route("ann@y.test")
@stateless
def REFUSED(message):
    if not CALLS:
        raise Dead("no room")
""")
    router.load([name])
    spool(posts, notify="SUCCESS,FAILURE,DELAY")
    work(posts, router, outbox)
    [key] = posts.backend.keys("dead")
    assert reports(outbox) == []
    __import__(name).CALLS.append("room")
    posts.backend.kick(key)
    work(posts, router, outbox)
    assert told(outbox) == ["Ann@y.test"]


def test_the_report_leaves_with_the_job_or_not_at_all(
    posts: Queue, outbox: Queue, router: RoutingBase, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> list[bool]:
        raise LeaseLost("somebody else has it")

    router.load([module(NOTED)])
    spool(posts)
    with monkeypatch.context() as patched:
        patched.setattr(posts.backend, "settle", lost)
        work(posts, router, outbox)
    assert reports(outbox) == []


def test_a_report_that_cannot_be_sent_is_logged_and_the_message_is_handled(
    posts: Queue, router: RoutingBase, module: Module, caplog: pytest.LogCaptureFixture, free_port: Callable[[], int]
) -> None:
    router.load([module(NOTED)])
    spool(posts)
    direct = Relay("127.0.0.1", free_port(), timeout=PATIENCE)
    QueueReceiver(posts, router=router, reports=direct.deliver).start(one_shot=True)
    assert sum(posts.backend.counts().values()) == 0
    assert "is handled could not be sent" in caplog.text


def test_a_boot_gives_its_relay_to_whoever_runs_functions(posts: Queue, outbox: Queue) -> None:
    relay = Relay(deliver=outbox.push)
    own: list[MailRequest] = []
    boot = SimpleNamespace(
        relay=relay,
        receiver=QueueReceiver(
            [
                posts,
                QueueReceiver(outbox, deliver=Relay("127.0.0.1").deliver),
                QueueReceiver("run/x", reports=own.append),
            ]
        ),
    )
    _receiver_of(boot, "config.boot")
    first, sent, last = boot.receiver.sources
    assert first.reports == relay.deliver
    assert sent.reports is None, "the outbound queue makes its own reports"
    assert last.reports == own.append
    boot.receiver = SMTPReceiver()
    _receiver_of(boot, "config.boot")
    assert boot.receiver.reports == relay.deliver


def test_a_receiver_that_delivers_makes_no_reports_of_functions(here: Path) -> None:
    with pytest.raises(TypeError, match="deliver or reports"):
        QueueReceiver("run/posts", deliver=print, reports=print)
