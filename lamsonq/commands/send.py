"""send: one message from the command line to a server."""

from __future__ import annotations

from typing import Any

import click

from lamsonq.commands.options import declare, option, relay_to, smarthost_options, switch
from lamsonq.errors import Dead, Later, Refusal


@declare()
@option("sender", "Who sends it.", required=True, metavar="ADDRESS")
@option("to", "Who gets it; several are separated by commas.", required=True, metavar="ADDRESS")
@option("subject", "Its subject.", required=True, metavar="TEXT")
@option("body", "Its text.", required=True, metavar="TEXT")
@option("attach", "A file to attach; may be given several times.", multiple=True, metavar="FILE")
@smarthost_options(8825)
@option("username", "Log in as this user.", metavar="NAME")
@option("password-file", "With the password in the first line of this file.", metavar="FILE")
@option(
    "password",
    "With this password, which other users of the machine can see while it runs.",
    envvar="LAMSONQ_RELAY__PASSWORD",
    show_envvar=True,
    metavar="TEXT",
)
@switch("ssl", "Speak TLS from the start.")
@switch("starttls", "Ask for TLS with STARTTLS.")
def send(
    sender: str,
    to: str,
    subject: str,
    body: str,
    attach: tuple[str, ...],
    username: str | None,
    password: str | None,
    password_file: str | None,
    **server: Any,
) -> None:
    """Send one message to a server. Prints nothing when the server has taken it."""
    from lamsonq.errors import Undelivered, reason_of
    from lamsonq.mail import MailResponse

    secret = None if username is None else _password(password, password_file)
    if username is None and (password_file or _is_given("password")):
        raise Refusal("a password needs -username too")
    relay = relay_to(username=username, password=secret, **server)
    try:
        message = MailResponse(To=to, From=sender, Subject=subject, Body=body)
        for filename in attach:
            message.attach(filename=filename)
    except (ValueError, OSError) as error:
        raise Refusal(str(error)) from error
    try:
        relay.deliver(message)
    except Undelivered as error:
        raise Refusal(str(error)) from error
    except (OSError, ValueError, Later, Dead) as error:
        raise Refusal(f"{server['host']}:{server['port']}: {reason_of(error)}") from error
    finally:
        relay.close()


def _password(given: str | None, path: str | None) -> str:
    if path is not None:
        if _is_given("password"):
            raise Refusal("give -password or -password-file, not both")
        try:
            with open(path, encoding="utf-8") as file:
                return file.readline().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"cannot read the password from {path}: {error}") from error
    if given is None:
        raise Refusal("-username needs a password: -password-file, LAMSONQ_RELAY__PASSWORD or -password")
    return given


def _is_given(name: str) -> bool:
    """Whether this option stands on the command line, and does not come from the environment."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE
