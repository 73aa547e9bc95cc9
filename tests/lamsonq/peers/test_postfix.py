"""Postfix in front of us, over SMTP and LMTP, and behind us, as the smarthost of a relay."""

from __future__ import annotations

import dataclasses
import re
import smtplib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq import fsck
from lamsonq.envelope import Notify
from lamsonq.errors import SMTPError
from lamsonq.mail import Envelope, MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, QueueReceiver, Receiver, Relay, SMTPReceiver

from ..ports import free_port
from ..waiting import until
from .conftest import Handled, jobs_in, mail_named
from .postfix import Postfix
from .programs import open_folder, run

Serve = Callable[[Receiver], None]

WAYS = ("smtp", "lmtp", "unix")
"""How Postfix gives us mail; the first label of a domain chooses: bob@lmtp.y.test comes over LMTP."""

MAIN = """\
relay_domains = y.test, x.test
transport_maps = inline:{{
    {{ smtp.y.test = smtp:[127.0.0.1]:{smtp} }}
    {{ lmtp.y.test = lmtp:inet:127.0.0.1:{lmtp} }}
    {{ unix.y.test = lmtp:unix:{unix} }}
    {{ x.test = smtp:[127.0.0.1]:{bounces} }}
    {{ z.test = smtp:[127.0.0.1]:{beyond} }} }}
smtpd_recipient_restrictions = check_recipient_access inline:{{ {{ gone@z.test = 550 5.1.1 No longer here }} }}
"""


@dataclasses.dataclass
class Front:
    """A Postfix that gives what it takes to us: by `way`, as far as the test is about that."""

    postfix: Postfix
    ports: dict[str, int]
    socket: str
    way: str = "lmtp"

    @property
    def lmtp(self) -> bool:
        return self.way != "smtp"

    def receiver(self, router: RoutingBase) -> Receiver:
        """What listens where this way leads to."""
        if self.way == "unix":
            return LMTPReceiver(socket=self.socket, router=router)
        made = LMTPReceiver if self.lmtp else SMTPReceiver
        return made("127.0.0.1", self.ports[self.way], router=router)

    def to(self, who: str) -> str:
        return f"{who}@{self.way}.y.test"

    def send(self, name: str, *who: str) -> None:
        with smtplib.SMTP("127.0.0.1", self.postfix.port) as client:
            client.sendmail("ann@x.test", [self.to(each) for each in who], mail_named(name), ["BODY=8BITMIME"])

    def deferred(self, who: str) -> int:
        """How often mail to somebody was put off."""
        return self.postfix.logged(f"to=<{self.to(who)}>", "status=deferred")

    def wait_until_empty(self) -> None:
        until(lambda: not self.postfix.queue(), "Postfix's queue empty", self.postfix.log)


@pytest.fixture(scope="module")
def running_postfix() -> Iterator[Front]:
    ports = {name: free_port() for name in ("smtp", "lmtp", "bounces", "beyond")}
    with open_folder() as folder:
        path = str(folder / "lmtp.sock")
        postfix = Postfix(folder, free_port(), MAIN.format(unix=path, **ports))
        yield Front(postfix, ports, path)
        postfix.close()


@pytest.fixture
def one_postfix(running_postfix: Front) -> Iterator[Front]:
    """What a test leaves there, because it failed or because nobody took it, does not come to the next one."""
    yield running_postfix
    running_postfix.postfix.forget()


@pytest.fixture(params=WAYS)
def front(request: pytest.FixtureRequest, one_postfix: Front) -> Front:
    return dataclasses.replace(one_postfix, way=request.param)


def as_sent(received: bytes) -> bytes:
    """Without the Received field that Postfix puts in front (RFC 5321 section 4.4)."""
    return re.sub(rb"\A(Received: .*\r\n([ \t].*\r\n)*)+", b"", received)


def test_a_message_comes_through_postfix_with_all_its_bytes(
    front: Front, routed: RoutingBase, handled: Handled, serve: Serve
) -> None:
    serve(front.receiver(routed))
    front.send("through", "bob")
    (message,) = handled.wait(1)
    assert as_sent(message.Data) == mail_named("through")
    assert (message.From, message.To) == ("ann@x.test", front.to("bob"))
    front.wait_until_empty()


@pytest.mark.slow
def test_what_is_put_off_comes_again_and_is_handled_once(
    front: Front, routed: RoutingBase, handled: Handled, serve: Serve
) -> None:
    serve(front.receiver(routed))
    handled.refusals[""] = SMTPError(451, "Come back tomorrow")
    front.send("later", "tom")
    until(lambda: front.deferred("tom") == 1, "status=deferred")
    assert "Come back tomorrow" in front.postfix.log()
    assert not handled.messages
    handled.refusals.clear()
    front.postfix.flush()
    handled.wait(1)
    front.wait_until_empty()
    assert handled.ids() == ["<later@x.test>"]


@pytest.mark.slow
def test_what_comes_while_we_are_down_waits_at_postfix(
    front: Front, routed: RoutingBase, handled: Handled, serve: Serve
) -> None:
    front.send("down", "dora")
    until(lambda: front.deferred("dora") == 1, "status=deferred")
    serve(front.receiver(routed))
    front.postfix.flush()
    handled.wait(1)
    front.wait_until_empty()
    assert handled.ids() == ["<down@x.test>"]


def test_postfix_bounces_whom_we_refuse_and_the_bounce_is_known_as_one(
    front: Front, routed: RoutingBase, handled: Handled, posts: Queue, serve: Serve
) -> None:
    """Nobody takes no-body; the handler refuses eve, for which only LMTP has a reply of her own."""
    serve(front.receiver(routed))
    serve(SMTPReceiver("127.0.0.1", front.ports["bounces"], deliver=posts.push, router=RoutingBase()))
    handled.refusals[front.to("eve")] = SMTPError(550, "Moved away")
    refused = ["no-body", "eve"] if front.lmtp else ["no-body"]
    front.send("mixed", "bob", *refused)
    handled.wait(1)
    until(lambda: posts.count() == 1, "a bounce")
    (job,) = jobs_in(posts)
    bounce = MailRequest(None, job.sender, list(job.recipients), job.body)
    assert (bounce.From, bounce.To) == ("", "ann@x.test")
    assert bounce.is_bounce()
    reported = re.findall(rb"^Final-Recipient: rfc822; (\S+)\r$", bounce.Data, re.MULTILINE)
    assert sorted(reported) == sorted(front.to(who).encode() for who in refused)
    assert [message.To for message in handled.messages] == [front.to("bob")]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lmtp", "unix"])
def test_over_lmtp_only_that_recipient_comes_again_who_was_put_off(
    way: str, one_postfix: Front, routed: RoutingBase, handled: Handled, serve: Serve
) -> None:
    front = dataclasses.replace(one_postfix, way=way)
    serve(front.receiver(routed))
    handled.refusals[front.to("joe")] = SMTPError(452, "No room")
    front.send("parts", "bob", "joe", "eve")
    until(lambda: front.deferred("joe") == 1, "joe put off")
    assert sorted(message.To for message in handled.wait(2)) == [front.to("bob"), front.to("eve")]
    handled.refusals.clear()
    front.postfix.flush()
    handled.wait(3)
    front.wait_until_empty()
    assert [message.To for message in handled.messages[2:]] == [front.to("joe")]


@pytest.mark.slow
def test_many_messages_through_postfix_are_all_handled_once(
    front: Front, routed: RoutingBase, handled: Handled, serve: Serve
) -> None:
    serve(front.receiver(routed))
    source = ["smtp-source", "-s", "5", "-m", "50", "-r", "2", "-f", "ann@x.test", "-t", front.to("bob")]
    run([*source, f"inet:127.0.0.1:{front.postfix.port}"])
    messages = handled.wait(100)
    front.wait_until_empty()
    assert len({(message["message-id"], message.To) for message in messages}) == len(messages) == 100


# -- Postfix as the smarthost -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_relay_sends_through_postfix(one_postfix: Front, posts: Queue, handled: Handled, serve: Serve) -> None:
    """Our outbox -> our relay -> Postfix -> another lamsonq, with envelope and bytes."""
    serve(SMTPReceiver("127.0.0.1", one_postfix.ports["beyond"], deliver=handled, router=RoutingBase()))
    relay = Relay("127.0.0.1", one_postfix.postfix.port)
    serve(QueueReceiver(posts, deliver=relay.deliver))
    names = [f"out{number}" for number in range(20)]
    for name in names:
        posts.push(MailRequest(None, "Bounces+1@x.test", ["Bob.B@z.test"], mail_named(name)))
    handled.wait(20)
    one_postfix.wait_until_empty()
    relay.close()
    assert sorted(as_sent(message.Data) for message in handled.messages) == sorted(map(mail_named, names))
    envelopes = {(message.envelope.mail_from, *message.envelope.rcpt_tos) for message in handled.messages}
    assert envelopes == {("Bounces+1@x.test", "Bob.B@z.test")}
    assert fsck.check(Path(posts.dir).parent).good


def test_whom_postfix_refuses_is_a_dead_letter_and_the_others_get_the_message(
    one_postfix: Front, posts: Queue, handled: Handled, serve: Serve
) -> None:
    """And the sender gets a report, through Postfix too."""
    serve(SMTPReceiver("127.0.0.1", one_postfix.ports["beyond"], deliver=handled, router=RoutingBase()))
    told = Handled()
    serve(SMTPReceiver("127.0.0.1", one_postfix.ports["bounces"], deliver=told, router=RoutingBase()))
    relay = Relay("127.0.0.1", one_postfix.postfix.port)
    serve(QueueReceiver(posts, deliver=relay.deliver))
    posts.push(MailRequest(None, "ann@x.test", ["gone@z.test", "bob@z.test"], mail_named("half")))
    (message,) = handled.wait(1)
    until(lambda: posts.backend.counts()["dead"] == 1, "a dead letter")
    one_postfix.wait_until_empty()
    relay.close()
    (key,) = posts.backend.keys("dead")
    dead = posts.backend.get(key)
    assert dead is not None
    assert dead.recipients == ("gone@z.test",)
    assert "No longer here" in posts.backend.report(key)
    assert message.envelope.rcpt_tos == ("bob@z.test",)
    (report,) = told.wait(1)
    assert (report.From, report.To, report.is_bounce()) == ("", "ann@x.test", True)
    assert report.bounce is not None
    assert [(r.address, str(r.status)) for r in report.bounce.recipients] == [("gone@z.test", "5.1.1")]


class _WithoutReports(SMTPReceiver):
    """A server that does not offer DSN: the one before it has to report."""

    offers_dsn = False


def test_postfix_takes_over_what_the_sender_wants_to_be_told(
    one_postfix: Front, posts: Queue, handled: Handled, serve: Serve
) -> None:
    """It offers DSN, so the report of the success is its own, with the sender's words."""
    serve(_WithoutReports("127.0.0.1", one_postfix.ports["beyond"], deliver=handled, router=RoutingBase()))
    told = Handled()
    serve(SMTPReceiver("127.0.0.1", one_postfix.ports["bounces"], deliver=told, router=RoutingBase()))
    relay = Relay("127.0.0.1", one_postfix.postfix.port)
    serve(QueueReceiver(posts, deliver=relay.deliver))
    wishes = Notify("HDRS", "our+2Bid", {"bob@z.test": "SUCCESS"}, {"bob@z.test": "rfc822;old+2Bbob@z.test"})
    envelope = Envelope("ann@x.test", ("bob@z.test",), notify=wishes)
    posts.push(MailRequest(None, "ann@x.test", ["bob@z.test"], mail_named("asked"), envelope=envelope))
    (report,) = told.wait(1)
    one_postfix.wait_until_empty()
    relay.close()
    assert b"Original-Envelope-Id: our+id\r\n" in report.Data
    assert b"Original-Recipient: rfc822;old+bob@z.test\r\n" in report.Data
    assert b"Reporting-MTA: dns; front.test\r\n" in report.Data
    assert len(told.messages) == 1
