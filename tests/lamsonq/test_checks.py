"""The user's own checks at the connection, at MAIL and at RCPT; and that nobody relays for strangers."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from lamsonq import smtp
from lamsonq.errors import SettingsError, SMTPError
from lamsonq.lmtp import LMTPReceiver
from lamsonq.routing import RoutingBase
from lamsonq.session import Dialogue
from lamsonq.smtp import SMTPReceiver
from lamsonq.tls import TLS

from .clients import Client
from .waiting import until

Serve = Any
HOOKS = ("on_connect", "on_mail", "on_rcpt")


def at(hook: str, receiver: SMTPReceiver) -> str:
    """What a client is told where this check is asked."""
    with Client(receiver, greet=False) as client:
        if hook == "on_connect" or client.greeting[:3] != "220":
            return client.greeting
        client.say("EHLO client.test")
        said = client.say("MAIL FROM:<a@x.test>")
        return said if hook == "on_mail" else client.say("RCPT TO:<desk@y.test>")


def plain(error: BaseException | None) -> Callable[[Dialogue], object]:
    def check(dialogue: Dialogue) -> object:
        if error is not None:
            raise error
        return "what a check returns does not matter"

    return check


def coroutine(error: BaseException | None) -> Callable[[Dialogue], object]:
    async def check(dialogue: Dialogue) -> object:
        await asyncio.sleep(0)
        return plain(error)(dialogue)

    return check


def object_(error: BaseException | None) -> Callable[[Dialogue], object]:
    class Check:
        async def __call__(self, dialogue: Dialogue) -> object:
            return await coroutine(error)(dialogue)  # type: ignore[misc]

    return Check()


KINDS = pytest.mark.parametrize("kind", [plain, coroutine, object_])


@KINDS
@pytest.mark.parametrize("hook", HOOKS)
def test_a_check_that_says_nothing_lets_it_pass(serve: Serve, hook: str, kind: Any) -> None:
    receiver = serve(**{hook: kind(None)})
    with Client(receiver) as client:
        assert client.mail().startswith("250")
    assert len(serve.taken) == 1


@KINDS
@pytest.mark.parametrize(
    ("hook", "code", "reply"),
    [
        ("on_connect", 550, "554 5.7.1 go away"),
        ("on_connect", 450, "421 4.7.1 go away"),
        ("on_mail", 550, "550 5.7.1 go away"),
        ("on_mail", 451, "451 4.7.1 go away"),
        ("on_rcpt", 550, "550 5.7.1 go away"),
        ("on_rcpt", 450, "450 4.7.1 go away"),
    ],
)
def test_a_check_refuses_by_an_smtp_error(serve: Serve, hook: str, code: int, reply: str, kind: Any) -> None:
    error = SMTPError(code, reply.partition(" ")[2])
    assert at(hook, serve(**{hook: kind(error)})) == reply


@KINDS
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "error", [ValueError("our secret"), SMTPError(250, "fine"), KeyError(), asyncio.CancelledError()]
)
def test_a_check_that_fails_loses_no_mail_and_tells_nothing(
    serve: Serve, hook: str, kind: Any, error: BaseException
) -> None:
    reply = at(hook, serve(**{hook: kind(error)}))
    assert reply.startswith("421 4.3.0" if hook == "on_connect" else "451 4.3.0"), reply
    assert "secret" not in reply


@pytest.mark.parametrize("hook", HOOKS)
def test_a_check_that_hangs_is_given_up_and_others_are_served(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    monkeypatch.setattr(smtp, "CHECK_TIMEOUT", 0.1)
    gate = threading.Event()
    try:
        assert at(hook, serve(**{hook: lambda _: gate.wait(10)}))[:3] in ("451", "421")

        async def hang(_dialogue: Dialogue) -> None:
            await asyncio.sleep(10)

        assert at(hook, serve(**{hook: hang}))[:3] in ("451", "421")
    finally:
        gate.set()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("text", ["a\r\n250 ok", "a\nb", "a\0b", "\u00fc\u2028x", "  ", "", "x" * 5000])
def test_no_reply_of_a_check_can_be_injected(serve: Serve, hook: str, text: str) -> None:
    receiver = serve(**{hook: plain(SMTPError(550, text))})
    with Client(receiver, greet=False) as client:
        if hook != "on_connect":
            client.send(b"EHLO a\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nQUIT\r\n")
        lines = [client.greeting, *client.rest().splitlines()]
    assert all(line.isprintable() and line.isascii() and len(line) <= 510 for line in lines)
    said = [line[:3] for line in lines if line[3:4] != "-"]
    assert (
        said
        == {
            "on_connect": ["554"],
            "on_mail": ["220", "250", "550", "503", "221"],
            "on_rcpt": ["220", "250", "250", "550", "221"],
        }[hook]
    )


def test_what_a_check_is_told(serve: Serve) -> None:
    seen: list[Dialogue] = []
    with Client(serve(on_connect=seen.append, on_mail=seen.append, on_rcpt=seen.append)) as client:
        client.begin("One@y.test", "two@y.test", sender="Alice@x.test")
        client.say("RSET")
        client.say("MAIL FROM:<>")
    address = "127.0.0.1"
    assert seen == [
        Dialogue(address),
        Dialogue(address, helo="client.test", sender="Alice@x.test"),
        Dialogue(address, helo="client.test", sender="Alice@x.test", recipient="One@y.test"),
        Dialogue(address, "client.test", sender="Alice@x.test", recipient="two@y.test", recipients=("One@y.test",)),
        Dialogue(address, helo="client.test", sender=""),
    ]


def test_on_a_unix_socket_there_is_no_address(here: Any) -> None:
    seen: list[Dialogue] = []
    receiver = SMTPReceiver(socket="mail.sock", deliver=print, on_connect=seen.append)
    receiver.start()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("mail.sock")
            assert client.recv(100).startswith(b"220")
    finally:
        receiver.stop(0)
        receiver.join()
    assert [dialogue.address for dialogue in seen] == [""]


def test_a_check_comes_after_our_own(serve: Serve) -> None:
    seen: list[Dialogue] = []
    with Client(serve(on_mail=seen.append, on_rcpt=seen.append, hosts=["y.test"])) as client:
        client.say("MAIL FROM:<a@x.test> SIZE=99999999999")
        client.say("MAIL FROM:<broken")
        assert seen == []
        client.begin("a@elsewhere.test", "broken@@y.test")
        assert [dialogue.recipient for dialogue in seen] == [""]


def test_after_a_refusal_at_mail_no_transaction_is_under_way(serve: Serve) -> None:
    def only_alice(dialogue: Dialogue) -> None:
        if dialogue.sender != "alice@x.test":
            raise SMTPError(550, "5.7.1 who are you?")

    with Client(serve(on_mail=only_alice)) as client:
        assert client.say("MAIL FROM:<bob@x.test>") == "550 5.7.1 who are you?"
        assert client.say("RCPT TO:<a@y.test>") == "503 5.5.1 Need MAIL command"
        assert client.mail(sender="alice@x.test").startswith("250")
    assert [message.From for message in serve.taken] == ["alice@x.test"]


def test_a_recipient_that_is_refused_leaves_the_others(serve: Serve) -> None:
    def not_bob(dialogue: Dialogue) -> None:
        if dialogue.recipient.startswith("bob"):
            raise SMTPError(550, "5.1.1 no bob")

    with Client(serve(on_rcpt=not_bob)) as client:
        said = [reply[:3] for reply in client.begin("a@y.test", "bob@y.test", "c@y.test")]
        assert said == ["250", "250", "550", "250"]
        client.say("DATA")
        assert client.say(b"x\r\n.").startswith("250")
    assert serve.taken[0].envelope.rcpt_tos == ("a@y.test", "c@y.test")


def test_replies_to_pipelined_commands_keep_their_order_over_slow_checks(serve: Serve) -> None:
    async def slow(dialogue: Dialogue) -> None:
        if dialogue.recipient.startswith("slow"):
            await asyncio.sleep(0.05)
            raise SMTPError(550, "5.1.1 no")

    with Client(serve(on_rcpt=slow)) as client:
        client.send(
            b"MAIL FROM:<a@x.test>\r\nRCPT TO:<slow@y.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\nx\r\n.\r\nNOOP\r\nQUIT\r\n"
        )
        assert client.replies(7) == ["250", "550", "250", "354", "250", "250", "221"]


def test_who_speaks_before_the_greeting_is_refused_where_it_waits_for_a_check(serve: Serve) -> None:
    gate = threading.Event()
    receiver = serve(on_connect=lambda _: gate.wait(5))
    with Client(receiver, wait=False) as client:
        client.send(b"EHLO early\r\nMAIL FROM:<a@x.test>\r\n")
        until(lambda: any(session._held for session in receiver._sessions))
        gate.set()
        assert client.rest() == "554 5.5.1 You spoke before the greeting\r\n"
    with Client(receiver) as client:
        assert client.mail().startswith("250")


def test_a_client_that_goes_while_a_check_runs_leaves_nothing(serve: Serve) -> None:
    gate = threading.Event()
    receiver = serve(on_connect=lambda _: gate.wait(5))
    with Client(receiver, wait=False) as client:
        until(lambda: receiver.traffic.open == 1)
        client.reset()
    until(lambda: receiver.traffic.open == 0)
    gate.set()


def test_lmtp_asks_them_too(serve: Serve) -> None:
    receiver = serve(LMTPReceiver, on_rcpt=plain(SMTPError(550, "5.7.1 no")))
    with Client(receiver, greet=False) as client:
        client.say("LHLO a")
        assert client.begin("a@y.test")[1] == "550 5.7.1 no"


# -- relaying -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipient", "reply"),
    [
        ("a@y.test", "250"),
        ("a@Y.TEST", "250"),
        ("postmaster", "250"),
        ("postmaster@y.test", "250"),
        ("a@elsewhere.test", "550 5.7.1"),
        ("postmaster@elsewhere.test", "550 5.7.1"),
        ("a@sub.y.test", "550 5.7.1"),
        ("a@y.test.", "55"),
        ("a@y.test@elsewhere.test", "553"),
        ('"a@y.test"@elsewhere.test', "550 5.7.1"),
        ("a%y.test@elsewhere.test", "550 5.7.1"),
        ("@y.test:a@elsewhere.test", "55"),
        ("a@[127.0.0.1]", "550 5.7.1"),
    ],
)
def test_strangers_send_to_our_hosts_only(serve: Serve, recipient: str, reply: str) -> None:
    with Client(serve(hosts=["Y.test", "z.test"])) as client:
        said = client.begin(recipient)[1]
    assert said.startswith(reply), said


def test_with_no_hosts_at_all_only_the_postmaster_gets_mail(serve: Serve) -> None:
    with Client(serve(hosts=[])) as client:
        assert [reply[:3] for reply in client.begin("a@y.test", "postmaster")] == ["250", "550", "250"]


def test_who_has_logged_in_sends_everywhere(serve: Serve, certificate: Any, trusting: Any) -> None:
    receiver = serve(hosts=["y.test"], tls=TLS(certificate()), logins=lambda name, _: name == "joe")
    with Client(receiver) as client:
        client.starttls(trusting)
        client.say("AUTH PLAIN AGppbQB4")  # jim's
        assert client.begin("a@elsewhere.test")[1].startswith("550 5.7.1")
        client.say("RSET")
        assert client.say("AUTH PLAIN AGpvZQB4").startswith("235")
        assert client.begin("a@elsewhere.test")[1].startswith("250")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "mail.example.com"])
def test_an_open_relay_is_refused_at_boot(host: str) -> None:
    with pytest.raises(SettingsError, match=r"would take mail for everybody, from everybody: .*hosts=\[\.\.\.\]"):
        SMTPReceiver(host, 0, deliver=print, router=RoutingBase()).bind()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_on_this_machine_alone_everything_may_be_taken(host: str) -> None:
    receiver = SMTPReceiver(host, 0, deliver=print, router=RoutingBase())
    receiver.bind()
    assert receiver._listener is not None
    receiver._listener.close()


def test_hosts_that_are_one_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hosts='y.test': a list of domains is wanted"):
        SMTPReceiver(hosts="y.test")
