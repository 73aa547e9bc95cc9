"""logins: who may log in to a receiver."""

from __future__ import annotations

import sys

import click

from lamsonq.commands.options import argument, declare, option
from lamsonq.errors import Refusal, UsageError

ACTIONS = ("ls", "add", "rm")


@declare()
@argument("action", metavar="ACTION", type=click.Choice(ACTIONS))
@argument("name", metavar="[NAME]")
@option("file", "The file, as `receiver.logins_file` names it.", metavar="FILE", default="config/logins")
def logins(action: str | None, name: str | None, file: str) -> None:
    """List who may log in with AUTH, add one, or remove one.

    `add` asks for the password, or reads it from standard input; a name that is there gets the new one. A running
    receiver sees the change at the next login.
    """
    from lamsonq import logins as kept

    if action is None:
        raise UsageError("logins: ls, add NAME, or rm NAME?")
    if action != "ls" and not name:
        raise UsageError(f"logins {action}: whom? lamsonq logins {action} NAME")
    try:
        if action == "ls":
            for known in kept.names(file):
                click.echo(known)
        elif action == "add":
            kept.add(file, name or "", _password())
        elif not kept.remove(file, name or ""):
            raise Refusal(f"{file}: nobody is called {name}")
    except UnicodeDecodeError as error:
        raise Refusal(f"cannot use {file}: it is not UTF-8") from error
    except ValueError as error:
        raise UsageError(f"logins: {error}") from error
    except OSError as error:
        raise Refusal(f"cannot use {file}: {error.strerror}") from error


def _password() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    return sys.stdin.readline().rstrip("\r\n")
