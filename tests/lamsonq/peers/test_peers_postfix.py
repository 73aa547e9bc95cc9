"""Postfix with TLS and logins, in front of us and as our smarthost; and what it lets through of SMTP smuggling."""

from __future__ import annotations

import re
import smtplib
import socket
from collections.abc import Callable, Iterator

import pytest

from lamsonq.errors import SMTPError
from lamsonq.logins import Logins
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, QueueReceiver, Receiver, Relay, SMTPReceiver

from ..ports import free_port
from ..waiting import until
from .conftest import NAME, PASSWORD, Handled, Papers, mail_named
from .dovecot import PASSWORD as THEIR_PASSWORD
from .dovecot import Dovecot, give_to_dovecot
from .postfix import Postfix
from .programs import open_folder

Serve = Callable[[Receiver], None]

IN_FRONT = """\
relay_domains = y.test
transport_maps = inline:{{ {{ smtp.y.test = smtp:[127.0.0.1]:{smtp} }} {{ lmtp.y.test = lmtp:inet:127.0.0.1:{lmtp} }} }}
smtp_tls_security_level = secure
smtp_tls_secure_cert_match = mail.y.test
smtp_tls_CAfile = {authority}
smtp_tls_loglevel = 1
smtp_sasl_auth_enable = yes
smtp_sasl_security_options = noanonymous
smtp_sasl_password_maps = inline:{{ {{ [127.0.0.1]:{smtp} = {login} }} {{ 127.0.0.1 = {login} }} }}
lmtp_tls_security_level = secure
lmtp_tls_secure_cert_match = mail.y.test
lmtp_tls_CAfile = {authority}
lmtp_sasl_auth_enable = yes
lmtp_sasl_security_options = noanonymous
lmtp_sasl_password_maps = $smtp_sasl_password_maps
smtputf8_enable = yes
"""

SMARTHOST = """\
relay_domains =
mynetworks =
default_transport = smtp:[127.0.0.1]:{beyond}
smtpd_tls_security_level = encrypt
smtpd_tls_cert_file = {certificate}
smtpd_tls_key_file = {key}
smtpd_tls_auth_only = yes
smtpd_sasl_auth_enable = yes
smtpd_sasl_type = dovecot
smtpd_sasl_path = {auth}
smtpd_relay_restrictions = permit_sasl_authenticated, reject
"""


def as_sent(received: bytes) -> bytes:
    """Without the Received field that Postfix puts in front (RFC 5321 section 4.4)."""
    return re.sub(rb"\A(Received: .*\r\n([ \t].*\r\n)*)+", b"", received)


# -- in front of us, with TLS and a login -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {name: free_port() for name in ("smtp", "lmtp")}


@pytest.fixture(scope="module")
def running(ports: dict[str, int], papers: Papers) -> Iterator[Postfix]:
    more = IN_FRONT.format(authority=papers.authority, login=f"{NAME}:{PASSWORD}", **ports)
    with open_folder() as folder:
        postfix = Postfix(folder, free_port(), more)
        yield postfix
        postfix.close()


@pytest.fixture
def postfix(running: Postfix) -> Iterator[Postfix]:
    yield running
    running.forget()


@pytest.fixture(params=["smtp", "lmtp"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def guarded(way: str, ports: dict[str, int], papers: Papers, routed: RoutingBase, serve: Serve) -> SMTPReceiver:
    """A receiver that takes mail through TLS from who has logged in, and from nobody else."""
    kind = LMTPReceiver if way == "lmtp" else SMTPReceiver
    receiver = kind(
        "127.0.0.1",
        ports[way],
        router=routed,
        tls=papers.tls(required=True),
        logins=Logins(papers.logins),
        login_required=True,
        reports=lambda _: None,  # so that it offers DSN
    )
    serve(receiver)
    return receiver


def send(postfix: Postfix, way: str, name: str, *who: str, options: tuple[str, ...] = ("BODY=8BITMIME",)) -> None:
    with smtplib.SMTP("127.0.0.1", postfix.port) as client:
        client.sendmail("ann@x.test", [f"{each}@{way}.y.test" for each in who], mail_named(name), options)


def test_postfix_logs_in_through_a_certificate_that_it_verifies(
    way: str, postfix: Postfix, guarded: SMTPReceiver, handled: Handled
) -> None:
    send(postfix, way, "safe", "bob")
    (message,) = handled.wait(1)
    assert as_sent(message.Data) == mail_named("safe")
    assert (message.envelope.login, message.envelope.tls) == (NAME, "TLSv1.3")
    assert postfix.logged("Verified TLS connection established to 127.0.0.1")
    until(lambda: not postfix.queue(), "Postfix's queue empty", postfix.log)


@pytest.mark.slow
def test_what_was_put_off_is_delivered_after_a_flush(
    way: str, postfix: Postfix, guarded: SMTPReceiver, handled: Handled
) -> None:
    to = f"eve@{way}.y.test"
    handled.refusals[to] = SMTPError(451, "Come back tomorrow")
    who = ["bob", "eve"] if way == "lmtp" else ["eve"]  # only LMTP answers for each
    send(postfix, way, "later", *who)
    until(lambda: postfix.logged(f"to=<{to}>", "status=deferred", "Come back tomorrow") == 1, "deferred", postfix.log)
    assert [message.To for message in handled.messages] == [f"{each}@{way}.y.test" for each in who[:-1]]
    handled.refusals.clear()
    postfix.flush()
    handled.wait(len(who))
    until(lambda: not postfix.queue(), "Postfix's queue empty", postfix.log)
    assert sorted(message.To for message in handled.messages) == sorted(f"{each}@{way}.y.test" for each in who)


def test_postfix_carries_addresses_with_eight_bits_and_wishes_for_reports(
    way: str, postfix: Postfix, guarded: SMTPReceiver, handled: Handled
) -> None:
    with smtplib.SMTP("127.0.0.1", postfix.port) as client:
        client.ehlo()
        assert client.mail("grüße@x.test", ["SMTPUTF8", "BODY=8BITMIME", "RET=HDRS", "ENVID=QQ314159"])[0] == 250
        assert client.rcpt(f"bob@{way}.y.test", ["NOTIFY=FAILURE,DELAY", "ORCPT=rfc822;Bob+2Bx@y.test"])[0] == 250
        assert client.data(mail_named("utf8"))[0] == 250
    (message,) = handled.wait(1)
    assert message.envelope.mail_from == "grüße@x.test"
    assert as_sent(message.Data) == mail_named("utf8")
    notify = message.envelope.notify
    assert (notify.ret, notify.envid) == ("HDRS", "QQ314159")
    (recipient,) = message.envelope.rcpt_tos
    assert set(notify.notify[recipient].split(",")) == {"FAILURE", "DELAY"}
    assert notify.orcpt[recipient] == "rfc822;Bob+2Bx@y.test"


@pytest.mark.slow
def test_many_sessions_through_tls_are_all_handled_once(
    way: str, postfix: Postfix, guarded: SMTPReceiver, handled: Handled
) -> None:
    for number in range(40):
        send(postfix, way, f"n{number}", "bob", "eve")
    handled.wait(80)
    until(lambda: not postfix.queue(), "Postfix's queue empty", postfix.log)
    found = {(message["message-id"], message.To) for message in handled.messages}
    assert len(found) == len(handled.messages) == 80


# -- our smarthost, with TLS and a login ------------------------------------------------------------------------------


class Smarthost:
    """A Postfix that takes mail through TLS from who has logged in, and gives it to the port `beyond`."""

    def __init__(self, postfix: Postfix, beyond: int) -> None:
        self.postfix = postfix
        self.beyond = beyond

    def relay(self, papers: Papers, password: str = THEIR_PASSWORD) -> Relay:
        return Relay("127.0.0.1", self.postfix.port, "out", password, starttls=papers.trusting())


@pytest.fixture(scope="module")
def smarthost(papers: Papers) -> Iterator[Smarthost]:
    beyond = free_port()
    with open_folder() as folder, open_folder() as other:
        (folder / "out").mkdir()
        give_to_dovecot(folder / "out")
        dovecot = Dovecot(folder, free_port(), free_port(), {"out": folder / "out"})
        try:
            values = {"auth": dovecot.auth, "certificate": papers.certificate, "key": papers.key, "beyond": beyond}
            postfix = Postfix(other, free_port(), SMARTHOST.format(**values))
            try:
                yield Smarthost(postfix, beyond)
            finally:
                postfix.close()
        finally:
            dovecot.close()


@pytest.mark.slow
def test_an_outbox_goes_through_a_smarthost_with_tls_and_a_login(
    smarthost: Smarthost, papers: Papers, posts: Queue, handled: Handled, serve: Serve
) -> None:
    """Our outbox -> our relay -> Postfix -> another lamsonq, with envelope and bytes."""
    serve(SMTPReceiver("127.0.0.1", smarthost.beyond, deliver=handled, router=RoutingBase()))
    relay = smarthost.relay(papers)
    serve(QueueReceiver(posts, deliver=relay.deliver))
    names = [f"out{number}" for number in range(5)]
    for name in names:
        posts.push(MailRequest(None, "ann@x.test", ["bob@z.test", "eve@z.test"], mail_named(name)))
    handled.wait(5)
    relay.close()
    assert sorted(as_sent(message.Data) for message in handled.messages) == sorted(map(mail_named, names))
    assert {message.envelope.rcpt_tos for message in handled.messages} == {("bob@z.test", "eve@z.test")}
    assert smarthost.postfix.logged("sasl_username=out")


@pytest.mark.slow
def test_a_smarthost_that_does_not_know_the_password_is_tried_again_later(
    smarthost: Smarthost, papers: Papers, posts: Queue, serve: Serve
) -> None:
    relay = smarthost.relay(papers, "wrong")
    serve(QueueReceiver(posts, deliver=relay.deliver))
    posts.push(MailRequest(None, "ann@x.test", ["bob@z.test"], mail_named("wrong")))
    until(lambda: posts.backend.counts()["delayed"] == 1, "put off")
    (key,) = posts.backend.keys("delayed")
    assert "535" in posts.backend.report(key)
    assert THEIR_PASSWORD not in posts.backend.report(key)


# -- SMTP smuggling through a real server -----------------------------------------------------------------------------

ENDS = [
    b"\n.\n",
    b"\r\n.\r",
    *(
        pytest.param(end, marks=pytest.mark.slow)
        for end in (
            b"\n.\r\n",
            b"\r.\r",
            b"\r.\r\n",
            b"\r\n.\n",
            b"\n.\r",
            b"\r\n\0.\r\n",
            b"\r\n.\0\r\n",
            b"\r\r\n.\r\r\n",
        )
    ),
]
"""What some servers take for the end of a message, and others carry on (RFC 5321 section 4.1.1.4 knows one)."""

SMUGGLED = b"MAIL FROM:<root@y.test>\r\nRCPT TO:<eve@%s.z.test>\r\nDATA\r\nSubject: smuggled\r\n\r\nnot sent by Postfix"


@pytest.fixture(scope="module")
def lax(ports: dict[str, int]) -> Iterator[Postfix]:
    """A Postfix that carries bare line ends, as it did up to 3.8."""
    more = (
        "relay_domains = z.test\nsmtpd_forbid_bare_newline = no\ntransport_maps = inline:"
        f"{{ {{ smtp.z.test = smtp:[127.0.0.1]:{ports['smtp']} }}"
        f" {{ lmtp.z.test = lmtp:inet:127.0.0.1:{ports['lmtp']} }} }}\n"
    )
    with open_folder() as folder:
        postfix = Postfix(folder, free_port(), more)
        yield postfix
        postfix.close()


def converse(port: int, *steps: bytes) -> bytes:
    """Send each step and read its reply, and then the rest; all replies."""
    with socket.create_connection(("127.0.0.1", port), 20) as client, client.makefile("rb") as replies:
        said = replies.readline()
        for step in steps:
            client.sendall(step)
            said += replies.readline()
        return said + replies.read()


@pytest.mark.parametrize("refuse_bare", [False, True])
@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_so_many_messages_as_postfix_sends_arrive(
    end: bytes, refuse_bare: bool, way: str, lax: Postfix, ports: dict[str, int], handled: Handled, serve: Serve
) -> None:
    """What Postfix takes for the end of a message is its business; what it carries as one message is one for us."""
    made = LMTPReceiver if way == "lmtp" else SMTPReceiver
    serve(made("127.0.0.1", ports[way], deliver=handled, router=RoutingBase(), refuse_bare=refuse_bare))
    before = len(lax.log())
    content = b"Subject: sent\r\n\r\nbefore" + end + SMUGGLED % way.encode() + b"\r\n.\r\n"
    envelope = [b"HELO x.test\r\n", b"MAIL FROM:<ann@x.test>\r\n", f"RCPT TO:<bob@{way}.z.test>\r\n".encode()]
    said = converse(lax.port, *envelope, b"DATA\r\n", content, b"QUIT\r\n")
    assert said.endswith(b"221 2.0.0 Bye\r\n"), said
    until(lambda: not lax.queue(), "Postfix's queue empty", lax.log)
    log = lax.log()[before:]
    sent = {who: len(re.findall(rf"to=<{who}@{way}.z.test>.*status=sent", log)) for who in ("bob", "eve")}
    refused = len(re.findall(r"status=bounced .*550 5.6.0", log))
    assert sum(sent.values()) + refused == said.count(b"250 2.0.0 Ok: queued"), log
    got = [message.envelope.mail_from or "" for message in handled.messages]
    assert sorted(got) == ["ann@x.test"] * sent["bob"] + ["root@y.test"] * sent["eve"]
    assert refused == 0 or (refuse_bare and b"\r" in end)
