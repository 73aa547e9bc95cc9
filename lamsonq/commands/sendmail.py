"""sendmail: a message from standard input to a server, as mutt, cron and git call it.

Rules:

1. The options of sendmail(1) that say something about this one message do what they say; those that are about a mail
   system of its own are taken and ignored, as Postfix's sendmail does.
2. Nothing else is quietly left out: what is neither is refused, before anything is sent.
3. The exit code is one of sysexits.h, so that the caller knows whether to try again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lamsonq.commands.options import Command, declare, relay_to, smarthost_options
from lamsonq.errors import Failure, Later, Refusal, SMTPError

if TYPE_CHECKING:
    from lamsonq.relay import Relay

NO_USER_CODES = (550, 551, 553)
"""Replies that say that there is no such mailbox, where no enhanced code says something else."""


class _Misuse(Refusal):
    """The command line is wrong."""

    exit_code = os.EX_USAGE


class _NoMessage(Refusal):
    """What stands on standard input cannot be sent."""

    exit_code = os.EX_DATAERR


class _NoInput(Refusal):
    """There is no standard input."""

    exit_code = os.EX_NOINPUT


class _Misused(click.UsageError):
    """What click says about the command line, with the exit code of sendmail."""

    exit_code = os.EX_USAGE

    def __init__(self, error: click.UsageError) -> None:
        super().__init__(error.format_message(), error.ctx)


class _Sendmail(Command):
    """A command whose misuse ends with EX_USAGE."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _Misused(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException:
            raise
        except click.exceptions.Exit as end:  # what other commands end with says nothing to a caller of sendmail
            ctx.exit(os.EX_TEMPFAIL if 0 < end.exit_code < os.EX_USAGE else end.exit_code)
        except (Exception, KeyboardInterrupt) as error:  # whatever it is: the caller keeps the message and tries again
            with contextlib.suppress(Exception):
                click.echo(f"ERROR: {type(error).__name__}: {' '.join(str(error).split())}", err=True)
            ctx.exit(os.EX_TEMPFAIL)


# -h is sendmail's hop count: a caller that gives one must not be answered with our help.
@declare(cls=_Sendmail, context_settings={"help_option_names": ["-help", "--help"]})
@click.argument("recipients", nargs=-1, metavar="[ADDRESS]...")
@click.option("-t", "from_header", is_flag=True, help="Send to To, Cc and Bcc of the message as well.")
@click.option("-i", "ignore_dots", is_flag=True, help="A line with only a dot does not end the message.")
@click.option("-f", "-r", "sender", metavar="ADDRESS", help="The envelope's sender.  [default: you, at this host]")
@click.option("-F", "name", metavar="NAME", help="Your name, for a message without From.")
@click.option("-b", "mode", metavar="MODE", default="m", help="m: read a message. There is no other mode.")
@click.option("-o", "settings", metavar="X", multiple=True, help="i: the same as -i. Others are ignored.")
@click.option("-B", "-N", "-R", "-V", "asked", metavar="X", multiple=True, help="Ignored: the relay decides.")
@click.option("-A", "-C", "-L", "-O", "-X", "-e", "-h", "-p", "ours", metavar="X", multiple=True, help="Ignored.")
@click.option("-G", "-U", "-c", "-m", "-n", "-v", "plain", is_flag=True, help="Ignored.")
@smarthost_options(8825)
def sendmail(
    recipients: tuple[str, ...],
    from_header: bool,
    ignore_dots: bool,
    sender: str | None,
    name: str | None,
    mode: str,
    settings: tuple[str, ...],
    **server: Any,
) -> None:
    """Send the message on standard input, as sendmail(1) does.

    Exits with 0, or a code of sysexits.h: 64 misuse, 65 no recipient in the message, 67 no such user, 69 refused, 75
    to be tried again. Who did not get the message is named on stderr.
    """
    from lamsonq.commands import submission
    from lamsonq.errors import Undelivered, reason_of

    for ignored in ("asked", "ours", "plain"):
        server.pop(ignored)
    if mode != "m":
        raise _Misuse(f"-b{mode} is not for us: lamsonq sendmail takes a message (-bm) and nothing else")
    if not recipients and not from_header:
        raise _Misuse("give the recipients, or -t to take them from the message")
    if sys.stdin is None:
        raise _NoInput("there is no standard input to read the message from")
    relay = _relay(**server)
    host = submission.host_name()
    from_address = _sender(sender, f"{submission.user_name()}@{host}", host)
    to = _addresses(recipients, host)
    data = submission.read_message(sys.stdin.buffer, dot_ends=not (ignore_dots or "i" in settings))
    try:
        request = submission.request_of(data)
        if from_header:
            to = list(dict.fromkeys([*to, *submission.recipients_in_header(request, host)]))
        name = submission.full_name() if name is None else name
        submission.make_complete(request, from_address or f"{submission.user_name()}@{host}", name)
    except ValueError as error:
        raise _NoMessage(str(error)) from error
    if not to:
        raise _NoMessage("the message names no recipient in To, Cc or Bcc")
    try:
        relay.deliver(request, To=to, From=from_address)
    except Undelivered as error:
        for failure in error.failures:
            click.echo(f"ERROR: {failure.recipient}: {reason_of(failure.error)}", err=True)
        click.get_current_context().exit(_code_of(error.failures))
    finally:
        relay.close()


def _relay(**server: Any) -> Relay:
    try:
        return relay_to(**server)
    except Refusal as error:
        raise _Misuse(str(error)) from error


def _sender(given: str | None, own: str, host: str) -> str:
    """The envelope's sender; "" is the null sender, which `-f ""` and `-f "<>"` mean."""
    if given is None:
        return own
    if given.strip() in ("", "<>"):
        return ""
    found = _addresses((given,), host)
    if len(found) != 1:
        raise _Misuse(f"-f takes one address, not {given!r}")
    return found[0]


def _addresses(texts: tuple[str, ...], host: str) -> list[str]:
    from lamsonq.commands import submission

    try:
        return submission.addresses_of(texts, host)
    except ValueError as error:
        raise _Misuse(str(error)) from error


def _code_of(failures: Sequence[Failure]) -> int:
    """To be tried again while anybody may still get it; else whether it was the user or the message."""
    if any(isinstance(failure.outcome(), Later) for failure in failures):
        return os.EX_TEMPFAIL
    return os.EX_NOUSER if all(_is_no_user(failure.error) for failure in failures) else os.EX_UNAVAILABLE


def _is_no_user(error: Exception) -> bool:
    if not isinstance(error, SMTPError):
        return False
    enhanced, _, _ = error.message.partition(" ")
    if enhanced.count(".") == 2 and enhanced.replace(".", "").isdigit():
        return enhanced.startswith("5.1.")  # the addressing status of RFC 3463 section 3.2
    return error.code in NO_USER_CODES
