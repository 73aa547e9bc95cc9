"""How commands are declared and refused: both spellings of options, groups of them, and errors of one line.

Rules:

1. An option is known by its name: dashes and capitals do not matter, but for the one-letter ones, where they do.
2. What stands behind an option that takes a value is that value, whatever it looks like: `-subject -To` is a subject.
3. A metavar in brackets says that the value may be left out. A switch is such an option; it takes the next word only
   if that word says yes or no, as in Lamson's `-FORCE True`, so that `--force name` leaves the name alone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from lamsonq import __version__
from lamsonq.commands.completion import completer_of
from lamsonq.errors import Refusal

if TYPE_CHECKING:
    from lamsonq.relay import Relay

F = TypeVar("F", bound=Callable[..., Any])

GONE: Mapping[str, str] = {
    "web": "lamsonq has no web server: `python3 -m http.server 8888 --bind 127.0.0.1` serves the current directory",
}
"""Commands of the ancestors that are no more, and what replaces them."""

_HELP_OPTIONS = {"help_option_names": ["-h", "-help", "--help"]}
_YES_OR_NO = frozenset({"true", "false", "yes", "no", "t", "f", "y", "n", "on", "off", "1", "0"})


class Command(click.Command):
    """A command whose unknown options are named whole (click names the first letter), and whose Refusal is a line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        args = as_declared(args, options)
        given = list(args)  # the parser empties its list
        try:
            return super().parse_args(ctx, args)
        except (click.NoSuchOption, click.BadParameter) as error:
            raise _named_whole(error, given, options) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            click.echo(f"ERROR: {' '.join(str(refusal).splitlines())}", err=True)
            ctx.exit(refusal.exit_code)


def as_declared(args: Sequence[str], options: Sequence[click.Option]) -> list[str]:
    """The words as click is to read them: names as they were declared, and a value behind every switch."""
    by_name = {name: option for option in options for name in (*option.opts, *option.secondary_opts)}
    long_names = {_plain(name): name for name in by_name if len(name) > 2}
    words, found = deque(args), list[str]()
    while words and words[0] != "--":
        name, equals, value = words.popleft().partition("=")
        if name.startswith("-") and name not in by_name:
            name = long_names.get(_plain(name), name)
        found.append(name + equals + value)
        option = by_name.get(name)
        if option is None or option.is_flag or equals:
            continue
        if option.type is click.BOOL:
            found.append(words.popleft() if words and words[0].lower() in _YES_OR_NO else "true")
        elif words and not _may_stand_alone(option):
            found.append(words.popleft())
    return [*found, *words]


def _plain(name: str) -> str:
    return name.lstrip("-").lower()


def _may_stand_alone(option: click.Option) -> bool:
    return (option.metavar or "").startswith("[")


def _named_whole(
    error: click.NoSuchOption | click.BadParameter, args: Sequence[str], options: Sequence[click.Option]
) -> click.UsageError:
    """The same error, about the whole word where the parser has read it as one letter and more."""
    known = [name for option in options for name in (*option.opts, *option.secondary_opts)]
    word = _mistyped(args, error, known)
    if word is None:
        return error
    import difflib

    return click.NoSuchOption(word, possibilities=difflib.get_close_matches(word, known, n=1), ctx=error.ctx)


def _mistyped(args: Sequence[str], error: click.UsageError, known: Sequence[str]) -> str | None:
    """The whole word that the parser has read as `-b` and more letters."""
    read_as = [error.option_name] if isinstance(error, click.NoSuchOption) else []
    if isinstance(error, click.BadParameter) and error.param is not None:
        read_as = [name for name in error.param.opts if len(name) == 2]
    for word in (arg.split("=")[0] for arg in args):
        if word.startswith(tuple(read_as)) and word not in known:
            return word
    return read_as[0] if isinstance(error, click.NoSuchOption) else None


class Commands(click.Group):
    """All commands. Without one, help is shown, which is no mistake."""

    def __init__(self, name: str, commands: Sequence[click.Command]) -> None:
        super().__init__(
            name,
            commands=list(commands),
            invoke_without_command=True,
            callback=self._without_command,
            context_settings=_HELP_OPTIONS,
            help="A mail application server: SMTP in, routes, state functions, durable queues.",
        )
        click.version_option(__version__, "-version", "--version", message="%(version)s")(self)

    @staticmethod
    @click.pass_context
    def _without_command(ctx: click.Context) -> None:
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help())

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)  # in their own order, which is the order in which one needs them

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in GONE:
            raise click.UsageError(GONE[args[0]])
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except (click.NoSuchOption, click.BadParameter) as error:
            options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
            self._refuse(ctx, _named_whole(error, given, options))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            self._refuse(ctx, error)

    @staticmethod
    def _refuse(ctx: click.Context, error: click.UsageError) -> NoReturn:
        """One line that says what is wrong with the command line, and where to read how it is right."""
        text = " ".join(error.format_message().split())
        command = error.ctx.info_name if error.ctx is not None and error.ctx.parent is not None else None
        more = f"lamsonq {command} -h" if " " in (command or "") else f"lamsonq help -for {command}"
        click.echo(f"ERROR: {text}{f'  Try {more}.' if command else ''}", err=True)
        ctx.exit(error.exit_code)


def declare(name: str | None = None, cls: type[Command] = Command, **attributes: Any) -> Callable[..., click.Command]:
    """The decorator of a command."""
    attributes.setdefault("context_settings", _HELP_OPTIONS)
    return click.command(name, cls=cls, **attributes)


def option(name: str, help: str, *more: str, **attributes: Any) -> Callable[[F], F]:
    """An option that takes a value: `-name x` and `--name x`."""
    attributes.setdefault("shell_complete", completer_of(attributes.get("metavar")))
    attributes.setdefault("show_default", True)
    return click.option(f"-{name}", f"--{name.lower()}", *more, help=help, **attributes)


def argument(name: str, **attributes: Any) -> Callable[[F], F]:
    """A word that is no option; its metavar in brackets says that it may be left out."""
    attributes.setdefault("shell_complete", completer_of(attributes.get("metavar")))
    return click.argument(name, required=False, **attributes)


def switch(name: str, help: str, *more: str, **attributes: Any) -> Callable[[F], F]:
    """A switch: `--name` and, as Lamson's, `-name`, `-name True`, `-name False`."""
    attributes.setdefault("metavar", "[True|False]")
    return click.option(
        f"-{name}", f"--{name.lower()}", *more, type=bool, default=False, show_default=False, help=help, **attributes
    )


json_option = switch("json", "Print JSON for a program to read.", "as_json")


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


def one_of(word: str | None, given: str | None, what: str, name: str) -> str:
    """What may be given as an argument or by an option: the one that was. Raises UsageError."""
    if (word is None) == (given is None):
        raise click.UsageError(f"Give {what} once, as an argument or with -{name}.", click.get_current_context())
    return word or given or ""


# ---- the server that send, sendmail and blast give their messages to -------------------------------------------


def smarthost_options(port: int) -> Callable[[F], F]:
    """Where that server is, and how it is spoken to."""
    return group(
        option("port", "The server's port.", type=click.IntRange(1, 65535), default=port, metavar="N"),
        option("host", "The server; a path is its unix socket.", default="127.0.0.1", metavar="HOST"),
        switch("lmtp", "Speak LMTP."),
        switch("debug", "Show the dialogue with the server on stderr."),
    )


def relay_to(host: str, port: int, *, lmtp: bool, debug: bool, **login: Any) -> Relay:
    """The relay that the smarthost options mean. Raises Refusal for options that exclude each other."""
    from lamsonq.relay import Relay

    if not host:
        raise Refusal("give the server that takes the mail: -host 127.0.0.1")
    if "/" in host:
        host = os.path.abspath(host)
    try:
        return Relay(host=host, port=port, debug=int(debug), lmtp=lmtp, **login)
    except (TypeError, ValueError) as error:
        raise Refusal(str(error)) from error
