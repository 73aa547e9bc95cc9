"""blast and cleanse: what goes through a whole mailbox."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lamsonq.commands.options import argument, declare, option
from lamsonq.commands.outgoing import relay_to, server_options
from lamsonq.errors import Dead, Later, Refusal

if TYPE_CHECKING:
    import mailbox

    from lamsonq.commands.sources import Mail, Source


@declare()
@argument("path", metavar="[INPUT]")
@option("input", "The mbox or maildir, when it is not the argument.", "given", metavar="INPUT")
@server_options(8823)
def blast(path: str | None, given: str | None, **server: Any) -> None:
    """Send every message of an mbox or a maildir to a server, unmodified: for tests.

    The sender is that of Return-Path or of the line in front, the recipients are those of To; what lies in a queue goes
    out as it was received. What is refused is told on stderr, the others go on; exits with 1 then.
    """
    from lamsonq.commands.sources import open_source
    from lamsonq.errors import Undelivered

    source = open_source(_one_of(path, given, "the mbox or maildir to send", "input"))
    relay = relay_to(**server)
    sent = errors = 0
    try:
        for mail in _progress(source):
            try:
                relay.deliver(mail.read())
                sent += 1
            except (Undelivered, Later, Dead, OSError, ValueError) as error:
                if not sent and not errors and _is_unreachable(error):
                    raise Refusal(_text(error)) from error
                click.echo(f"ERROR: {mail.name}: {_text(error)}", err=True)
                errors += 1
    finally:
        relay.close()
    if errors:
        click.get_current_context().exit(1)


def _text(error: Exception) -> str:
    from lamsonq.errors import Undelivered, reason_of

    return str(error) if isinstance(error, Undelivered | ValueError) else reason_of(error)


@declare()
@argument("source", metavar="[INPUT]")
@argument("target", metavar="[OUTPUT]")
@option("input", "The mbox or maildir, when it is not the argument.", "given_source", metavar="INPUT")
@option("output", "The maildir to make, when it is not the argument.", "given_target", metavar="OUTPUT")
def cleanse(source: str | None, target: str | None, given_source: str | None, given_target: str | None) -> None:
    """Write every message of an mbox or a maildir, put right where it is malformed, into a maildir.

    What cannot be put right is told on stderr and left out; exits with 1 then.
    """
    from lamsonq.commands.cleansing import cleansed
    from lamsonq.commands.sources import open_source

    if given_source is not None and target is None:
        source, target = None, source  # the one word is the output
    read = _one_of(source, given_source, "the mbox or maildir to read", "input")
    write = _one_of(target, given_target, "the maildir to write", "output")
    found = open_source(read)
    maildir = _new_maildir(read, write)
    errors = 0
    for mail in _progress(found):
        try:
            data = cleansed(mail.read().Data)
        except ValueError as error:
            click.echo(f"ERROR: {mail.name}: {error}", err=True)
            errors += 1
            continue
        try:
            maildir.add(data)
        except OSError as error:
            raise Refusal(f"cannot write into {write}: {error.strerror}") from error
    click.echo(f"TOTAL ERRORS: {errors}" if errors else "Completed without errors")
    click.get_current_context().exit(1 if errors else 0)


def _one_of(word: str | None, given: str | None, what: str, name: str) -> str:
    if (word is None) == (given is None):
        raise click.UsageError(f"Give {what} once, as an argument or with -{name}.", click.get_current_context())
    return word or given or ""


def _new_maildir(source: str, target: str) -> mailbox.Maildir:
    import mailbox

    if os.path.lexists(target) and not os.path.isdir(os.path.join(target, "new")):
        raise Refusal(f"{target} exists and is no maildir: give another name")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise Refusal(f"{target} is what is read: give another name for what is written")
    try:
        return mailbox.Maildir(target, create=True)
    except OSError as error:
        raise Refusal(f"cannot make {target}: {error.strerror}") from error


def _is_unreachable(error: Exception) -> bool:
    """Whether no server answered at all: then the next message would meet the same."""
    from lamsonq.errors import Undelivered

    return isinstance(error, Undelivered) and all(
        isinstance(failure.error, Later) and isinstance(failure.error.__cause__, OSError) for failure in error.failures
    )


def _progress(source: Source) -> Iterator[Mail]:
    """The messages; on a terminal a bar shows how far it is, on stderr."""
    if not sys.stderr.isatty():
        yield from source
        return
    with click.progressbar(range(source.size()), file=sys.stderr) as bar:
        for mail in source:
            yield mail
            bar.update(mail.size)
