"""blast: every message of a mailbox to a server."""

from __future__ import annotations

from typing import Any

import click

from lamsonq.commands.options import argument, declare, one_of, option, relay_to, smarthost_options
from lamsonq.errors import Dead, Later, Refusal


@declare()
@argument("path", metavar="[INPUT]")
@option("input", "The mbox or maildir, when it is not the argument.", "given", metavar="INPUT")
@smarthost_options(8823)
def blast(path: str | None, given: str | None, **smarthost: Any) -> None:
    """Send every message of an mbox or a maildir to a server.

    Unmodified: for tests. The sender is that of Return-Path or of the line in front, the recipients are those of To;
    what lies in a queue goes out as it was received. What is refused is told on stderr, the others go on;
    exits with 1 then.
    """
    from lamsonq.commands.mailboxes import open_mailbox, with_progress
    from lamsonq.errors import Undelivered

    mailbox = open_mailbox(one_of(path, given, "the mbox or maildir to send", "input"))
    relay = relay_to(**smarthost)
    sent = errors = 0
    try:
        for entry in with_progress(mailbox):
            try:
                relay.deliver(entry.read())
                sent += 1
            except (Undelivered, Later, Dead, OSError, ValueError) as error:
                if not sent and not errors and _is_unreachable(error):
                    raise Refusal(_text(error)) from error
                click.echo(f"ERROR: {entry.name}: {_text(error)}", err=True)
                errors += 1
    finally:
        relay.close()
    if errors:
        click.get_current_context().exit(1)


def _text(error: Exception) -> str:
    from lamsonq.errors import Undelivered, reason_of

    return str(error) if isinstance(error, Undelivered | ValueError) else reason_of(error)


def _is_unreachable(error: Exception) -> bool:
    """Whether no server answered at all: then the next message would meet the same."""
    from lamsonq.errors import Undelivered

    return isinstance(error, Undelivered) and all(
        isinstance(failure.error, Later) and isinstance(failure.error.__cause__, OSError) for failure in error.failures
    )
