"""Other people's clients talk to our receivers: swaks, msmtp, curl, smtp-source."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lamsonq.errors import SMTPError
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, Receiver, SMTPReceiver

from .conftest import Handled, jobs_in, mail_named
from .programs import run

Serve = Callable[[Receiver], None]
Client = Callable[[SMTPReceiver, bytes], str]


def swaks(to: SMTPReceiver, message: bytes, *more: str, recipients: str = "bob@y.test", code: int | None = 0) -> str:
    command = ["swaks", "--protocol", "LMTP" if isinstance(to, LMTPReceiver) else "ESMTP", "--data", "-"]
    command += ["--server", f"127.0.0.1:{to.port}", "--from", "ann@x.test", "--to", recipients, *more]
    # It ends the last line itself, whether that has an end or not.
    return run(command, message.removesuffix(b"\r\n"), code=code)


def msmtp(to: SMTPReceiver, message: bytes) -> str:
    protocol = "lmtp" if isinstance(to, LMTPReceiver) else "smtp"
    command = ["msmtp", "--host=127.0.0.1", f"--port={to.port}", f"--protocol={protocol}", "--from=ann@x.test"]
    return run([*command, "--file=/dev/null", "bob@y.test"], message.replace(b"\r\n", b"\n"))


def curl(to: SMTPReceiver, message: bytes) -> str:
    command = ["curl", "--silent", "--show-error", "--url", f"smtp://127.0.0.1:{to.port}/x.test"]
    return run([*command, "--mail-from", "ann@x.test", "--mail-rcpt", "bob@y.test", "--upload-file", "-"], message)


def smtp_source(to: SMTPReceiver, *more: str) -> None:
    lmtp = ["-L"] if isinstance(to, LMTPReceiver) else []
    run(["smtp-source", *lmtp, "-f", "ann@x.test", "-t", "bob@y.test", *more, f"inet:127.0.0.1:{to.port}"])


@pytest.fixture(params=[SMTPReceiver, LMTPReceiver])
def spool(request: pytest.FixtureRequest, posts: Queue, serve: Serve) -> SMTPReceiver:
    """A receiver that puts everything into `posts`."""
    receiver: SMTPReceiver = request.param("127.0.0.1", 0, deliver=posts.push, router=RoutingBase())
    serve(receiver)
    return receiver


@pytest.fixture(params=[SMTPReceiver, LMTPReceiver])
def handler(request: pytest.FixtureRequest, routed: RoutingBase, serve: Serve) -> SMTPReceiver:
    """A receiver that runs a handler."""
    receiver: SMTPReceiver = request.param("127.0.0.1", 0, router=routed)
    serve(receiver)
    return receiver


@pytest.mark.parametrize(
    ("client", "spool"),
    [(swaks, SMTPReceiver), (swaks, LMTPReceiver), (msmtp, SMTPReceiver), (msmtp, LMTPReceiver), (curl, SMTPReceiver)],
    indirect=["spool"],
)
def test_a_message_of_another_client_arrives_byte_for_byte(client: Client, spool: SMTPReceiver, posts: Queue) -> None:
    client(spool, mail_named(client.__name__))
    (job,) = jobs_in(posts)
    assert job.body == mail_named(client.__name__)
    assert (job.sender, job.recipients) == ("ann@x.test", ("bob@y.test",))


def test_swaks_may_pipeline_and_use_the_null_sender(spool: SMTPReceiver, posts: Queue) -> None:
    swaks(spool, mail_named("bounce"), "--pipeline", "--from", "<>")
    (job,) = jobs_in(posts)
    assert (job.sender, job.body) == ("", mail_named("bounce"))


def test_a_recipient_that_no_route_takes_is_refused_and_the_other_gets_it(
    handler: SMTPReceiver, handled: Handled
) -> None:
    said = swaks(handler, mail_named("two"), recipients="bob@y.test,nobody@elsewhere.test", code=None)
    assert "550 5.1.1" in said
    assert [message.To for message in handled.messages] == ["bob@y.test"]


@pytest.mark.parametrize("code", [451, 554])
def test_a_client_is_told_what_the_handler_says(code: int, handler: SMTPReceiver, handled: Handled) -> None:
    handled.refusals[""] = SMTPError(code, "Not today")
    said = swaks(handler, mail_named("refused"), code=26)  # its code for: refused after the final dot
    assert f"<** {code}" in said
    assert "Not today" in said
    assert not handled.messages


def test_over_lmtp_each_recipient_is_answered_for(routed: RoutingBase, handled: Handled, serve: Serve) -> None:
    receiver = LMTPReceiver("127.0.0.1", 0, router=routed)
    serve(receiver)
    handled.refusals["eve@y.test"] = SMTPError(550, "Moved away")
    said = swaks(receiver, mail_named("three"), recipients="bob@y.test,eve@y.test,joe@y.test", code=None)
    replies = [line for line in said.splitlines() if line.startswith(("<-  250 2.0.0", "<** 550"))]
    assert [line.split()[1] for line in replies] == ["250", "550", "250"], said
    assert [message.To for message in handled.messages] == ["bob@y.test", "joe@y.test"]


@pytest.mark.slow
def test_many_sessions_at_once_with_several_recipients_each(handler: SMTPReceiver, handled: Handled) -> None:
    smtp_source(handler, "-s", "8", "-m", "100", "-r", "3", "-l", "3000")
    messages = handled.messages
    assert len(messages) == 300
    assert len({(message["message-id"], message.To) for message in messages}) == 300
    # It numbers the recipients of a message.
    assert {message.To for message in messages} == {"bob@y.test", "2bob@y.test", "3bob@y.test"}
    assert all(len(message.Data) >= 3000 for message in messages), "some are not whole"


@pytest.mark.slow
def test_many_sessions_fill_a_spool_that_loses_nothing(spool: SMTPReceiver, posts: Queue) -> None:
    smtp_source(spool, "-s", "8", "-m", "200")
    found = [MailRequest(None, job.sender, list(job.recipients), job.body)["message-id"] for job in jobs_in(posts)]
    assert len(found) == len(set(found)) == 200
