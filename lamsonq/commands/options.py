"""How commands are declared and refused: both spellings of options, and errors of one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from lamsonq import __version__
from lamsonq.errors import Refusal

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose unknown options are named whole (click names the first letter), and whose Refusal is a line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = [name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)]
        args = as_known(args, known)
        given = list(args)  # the parser empties its list
        try:
            return super().parse_args(ctx, args)
        except (click.NoSuchOption, click.BadParameter) as error:
            word = _mistyped(given, error, known)
            if word is None:
                raise
            near = difflib.get_close_matches(word, known, n=1)
            raise click.NoSuchOption(word, possibilities=near, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            click.echo(f"ERROR: {' '.join(str(refusal).splitlines())}", err=True)
            ctx.exit(refusal.exit_code)


def as_known(args: Sequence[str], known: Sequence[str]) -> list[str]:
    """The options as they were declared, whatever dashes and capitals they were written with, as Lamson takes them."""
    declared = {name.lstrip("-").lower(): name for name in known if name.startswith("-")}
    end = args.index("--") if "--" in args else len(args)
    found = []
    for arg in args[:end]:
        name, equals, value = arg.partition("=")
        if name.startswith("-") and name not in known:
            name = declared.get(name.lstrip("-").lower(), name)
        found.append(name + equals + value)
    return found + list(args[end:])


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
            context_settings={"help_option_names": ["-h", "-help", "--help"]},
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


def declare(name: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """The decorator of a command."""
    return click.command(name, cls=Command)


def option(name: str, help: str, **attributes: Any) -> Callable[[F], F]:
    """An option that takes a value: `-name x` and `--name x`."""
    return click.option(f"-{name}", f"--{name}", help=help, show_default=True, **attributes)


def switch(name: str, help: str, *more: str, **attributes: Any) -> Callable[[F], F]:
    """An option of a command without arguments: `--name` and, as Lamson's, `-name`, `-name True`, `-name False`."""
    spellings = (f"-{name}", f"--{name.lower()}", *more)
    return click.option(
        *spellings,
        name.lower(),
        is_flag=False,
        flag_value="true",
        type=bool,
        default=False,
        metavar="[True|False]",
        help=help,
        **attributes,
    )


json_option = click.option("-json", "--json", "as_json", is_flag=True, help="Print JSON for a program to read.")
