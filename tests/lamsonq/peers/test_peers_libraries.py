"""Python's own client libraries talk to our receivers: smtplib and aiosmtplib."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import Callable
from email.message import EmailMessage

import aiosmtplib
import pytest

from lamsonq.errors import SMTPError
from lamsonq.logins import Logins
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, Receiver, SMTPReceiver

from .conftest import NAME, PASSWORD, Handled, Papers, mail_named

Serve = Callable[[Receiver], None]


@pytest.fixture(params=["starttls", "implicit"])
def guarded(request: pytest.FixtureRequest, papers: Papers, handled: Handled, serve: Serve) -> SMTPReceiver:
    tls = papers.tls(required=True, implicit=request.param == "implicit")
    receiver = SMTPReceiver(
        "localhost",
        0,
        deliver=handled,
        router=RoutingBase(),
        tls=tls,
        logins=Logins(papers.logins),
        login_required=True,
    )
    serve(receiver)
    return receiver


def test_smtplib_comes_through_tls_and_logs_in(guarded: SMTPReceiver, papers: Papers, handled: Handled) -> None:
    if guarded.tls_implicit:
        client: smtplib.SMTP = smtplib.SMTP_SSL("localhost", guarded.port, context=papers.trusting())
    else:
        client = smtplib.SMTP("localhost", guarded.port)
        client.starttls(context=papers.trusting())
    with client:
        client.login(NAME, PASSWORD)
        client.sendmail("ann@x.test", ["bob@y.test"], mail_named("smtplib"), ["BODY=8BITMIME"])
    (message,) = handled.messages
    assert message.Data == mail_named("smtplib")
    assert message.envelope.login == NAME


def test_smtplib_sends_addresses_and_headers_with_eight_bits(handled: Handled, serve: Serve) -> None:
    receiver = SMTPReceiver("127.0.0.1", 0, deliver=handled, router=RoutingBase())
    serve(receiver)
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "grüße@x.test", "bob@y.test", "Größe"
    mail.set_content("Grüße\n", cte="8bit")
    with smtplib.SMTP("127.0.0.1", receiver.port) as client:
        client.send_message(mail)
    (message,) = handled.messages
    assert message.envelope.mail_from == "grüße@x.test"
    assert "Subject: Größe".encode() in message.Data
    assert message["subject"] == "Größe"


def test_smtplib_hears_over_lmtp_what_became_of_the_first_recipient(
    routed: RoutingBase, handled: Handled, serve: Serve
) -> None:
    receiver = LMTPReceiver("127.0.0.1", 0, router=routed)
    serve(receiver)
    handled.refusals["bob@y.test"] = SMTPError(451, "Not today")
    with smtplib.LMTP("127.0.0.1", receiver.port) as client:
        with pytest.raises(smtplib.SMTPDataError) as raised:
            client.sendmail("ann@x.test", ["bob@y.test"], mail_named("refused"))
        assert raised.value.smtp_code == 451
        client.sendmail("ann@x.test", ["eve@y.test"], mail_named("taken"))
    assert [message.To for message in handled.messages] == ["eve@y.test"]


def over_tls(to: SMTPReceiver, papers: Papers) -> aiosmtplib.SMTP:
    return aiosmtplib.SMTP(
        hostname="localhost",
        port=to.port,
        tls_context=papers.trusting(),
        use_tls=to.tls_implicit,
        start_tls=not to.tls_implicit,
    )


def test_aiosmtplib_comes_through_tls_and_logs_in(guarded: SMTPReceiver, papers: Papers, handled: Handled) -> None:
    async def send() -> None:
        client = over_tls(guarded, papers)
        async with client:
            await client.login(NAME, PASSWORD)
            for number in range(3):
                await client.sendmail(
                    "ann@x.test", "bob@y.test", mail_named(f"n{number}"), mail_options=["BODY=8BITMIME"]
                )

    asyncio.run(send())
    assert [message.Data for message in handled.messages] == [mail_named(f"n{number}") for number in range(3)]
    assert {message.envelope.login for message in handled.messages} == {NAME}


def test_aiosmtplib_is_told_of_a_wrong_password_and_may_try_again(
    guarded: SMTPReceiver, papers: Papers, handled: Handled
) -> None:
    async def send() -> None:
        client = over_tls(guarded, papers)
        async with client:
            with pytest.raises(aiosmtplib.SMTPAuthenticationError):
                await client.login(NAME, "guessed")
            await client.auth_login(NAME, PASSWORD)
            await client.sendmail("ann@x.test", "bob@y.test", mail_named("second"), mail_options=["BODY=8BITMIME"])

    asyncio.run(send())
    assert len(handled.messages) == 1


@pytest.mark.slow
def test_many_clients_of_aiosmtplib_at_once(papers: Papers, handled: Handled, serve: Serve) -> None:
    receiver = SMTPReceiver("localhost", 0, deliver=handled, router=RoutingBase(), tls=papers.tls())
    serve(receiver)

    async def send(number: int) -> None:
        async with aiosmtplib.SMTP(
            hostname="localhost", port=receiver.port, tls_context=papers.trusting(), start_tls=number % 2 == 0
        ) as client:
            for each in range(5):
                await client.sendmail("ann@x.test", "bob@y.test", mail_named(f"n{number}x{each}"))

    async def together() -> None:
        await asyncio.gather(*map(send, range(40)))

    asyncio.run(together())
    assert len(set(handled.ids())) == len(handled.messages) == 200
