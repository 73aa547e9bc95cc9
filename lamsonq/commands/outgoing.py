"""The mail server that send, sendmail and blast give their messages to: its options, and the relay that they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lamsonq.commands.options import option, switch
from lamsonq.errors import Refusal

if TYPE_CHECKING:
    from lamsonq.relay import Relay

F = TypeVar("F", bound=Callable[..., Any])


def server_options(port: int) -> Callable[[F], F]:
    """Where the server is and how it is spoken to."""
    options = (
        option("port", "The server's port.", type=click.IntRange(1, 65535), default=port, metavar="N"),
        option("host", "The server; a path is its unix socket.", default="127.0.0.1", metavar="HOST"),
        switch("lmtp", "Speak LMTP."),
        switch("debug", "Show the dialogue with the server on stderr."),
    )

    def decorate(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


def relay_to(host: str, port: int, *, lmtp: bool, debug: bool, **login: Any) -> Relay:
    """The relay that these options mean. Raises Refusal for options that exclude each other."""
    from lamsonq.relay import Relay

    if not host:
        raise Refusal("give the server that takes the mail: -host 127.0.0.1")
    if "/" in host:
        host = os.path.abspath(host)
    try:
        return Relay(host=host, port=port, debug=int(debug), lmtp=lmtp, **login)
    except (TypeError, ValueError) as error:
        raise Refusal(str(error)) from error
