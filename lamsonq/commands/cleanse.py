"""cleanse: every message of a mailbox, put right where it is malformed, into a maildir."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from lamsonq.commands.options import argument, declare, one_of, option
from lamsonq.errors import Refusal

if TYPE_CHECKING:
    import mailbox


@declare()
@argument("source", metavar="[INPUT]")
@argument("target", metavar="[OUTPUT]")
@option("input", "The mbox or maildir, when it is not the argument.", "given_source", metavar="INPUT")
@option("output", "The maildir to make or to add to, when it is not the argument.", "given_target", metavar="OUTPUT")
def cleanse(source: str | None, target: str | None, given_source: str | None, given_target: str | None) -> None:
    """Write a mailbox into a maildir, malformed messages put right.

    The mailbox is an mbox or a maildir. What cannot be put right is told on stderr and left out; exits with 1 then.
    """
    from lamsonq.commands.cleansing import cleansed
    from lamsonq.commands.mailboxes import open_mailbox, with_progress

    if given_source is not None and target is None:
        source, target = None, source  # the one word is the output
    read = one_of(source, given_source, "the mbox or maildir to read", "input")
    write = one_of(target, given_target, "the maildir to write", "output")
    found = open_mailbox(read)
    maildir = _new_maildir(read, write)
    errors = 0
    for entry in with_progress(found):
        try:
            data = cleansed(entry.read().Data)
        except ValueError as error:
            click.echo(f"ERROR: {entry.name}: {error}", err=True)
            errors += 1
            continue
        try:
            maildir.add(data)
        except OSError as error:
            raise Refusal(f"cannot write into {write}: {error.strerror}") from error
    click.echo(f"TOTAL ERRORS: {errors}" if errors else "Completed without errors")
    click.get_current_context().exit(1 if errors else 0)


def _new_maildir(source: str, target: str) -> mailbox.Maildir:
    import mailbox

    if os.path.lexists(target) and not os.path.isdir(os.path.join(target, "new")):
        raise Refusal(f"{target} exists and is no maildir: give another name")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise Refusal(f"{target} is what is read: give another name for what is written")
    if os.path.exists(target):
        click.echo(f"{target} is there already: the messages are added to what is in it.", err=True)
    try:
        return mailbox.Maildir(target, create=True)
    except OSError as error:
        raise Refusal(f"cannot make {target}: {error.strerror}") from error
