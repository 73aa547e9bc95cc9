"""gen, demo, completion, help and version: how one begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from lamsonq import __version__
from lamsonq.commands import completion as shells
from lamsonq.commands.options import GONE, Commands, argument, declare, option, switch
from lamsonq.errors import Refusal

PROJECT_FILES = (
    ".gitignore",
    "app/__init__.py",
    "app/handlers/__init__.py",
    "app/handlers/post.py",
    "app/model/__init__.py",
    "app/model/post.py",
    "app/templates/page_ready.msg",
    "app/templates/welcome.msg",
    "config/__init__.py",
    "config/boot.py",
    "config/lamsonq@.service",
    "config/lamsonq@.socket",
    "config/logging.toml",
    "config/settings.py",
    "config/settings.toml",
    "config/testing.py",
    "logs/.gitignore",
    "run/.gitignore",
    "tests/handlers/test_post.py",
    "tests/model/test_blog.py",
    "tests/templates/test_templates.py",
)
"""What a project begins with: these files of the repository's own project. pyproject.toml puts them into the wheel."""

TUTORIAL_SETTINGS = "\n# this is for when you run the config.queue boot\n"
"""The settings from here on belong to config/queue.py, which the tutorial's reader writes, as he does these lines."""


@declare()
@argument("path", metavar="[PROJECT]")
@option("project", "The directory, when it is not the argument.", metavar="PROJECT")
@switch("FORCE", "Add to a directory that exists. Files in it stay as they are.", "-f")
def gen(path: str | None, project: str | None, force: bool) -> None:
    """Make a new project: a small blog written by mail, with tests."""
    if (path is None) == (project is None):
        raise click.UsageError("Give one directory for the project: lamsonq gen NAME")
    target = Path(path or project or "")
    if os.path.lexists(target) and not force:
        raise Refusal(f"Project {target} exists, delete it first.")
    try:
        for line in generate(target):
            click.echo(line)
    except OSError as error:
        raise Refusal(f"cannot write {error.filename}: {error.strerror}") from error


def generate(target: Path) -> Iterator[str]:
    """Write the project's files, and tell each step. Never writes over a file."""
    yield from _mkdir(target)
    yield from _write(target / "README.md", Path(__file__).with_name("project_readme.md").read_text("utf-8"))
    for name in PROJECT_FILES:
        yield from _mkdir((target / name).parent)
        yield from _write(target / name, _template(name))


def _template(name: str) -> str:
    text = (_template_root() / name).read_text("utf-8")
    return text.partition(TUTORIAL_SETTINGS)[0] if name == "config/settings.py" else text


def _template_root() -> Path:
    """In a wheel the files lie inside the package; a checkout is itself the project."""
    package = Path(__file__).parents[1]
    return package / "project" if (package / "project").is_dir() else package.parent


def _mkdir(directory: Path) -> Iterator[str]:
    for each in reversed([directory, *directory.parents]):
        if not each.is_dir():
            each.mkdir()
            yield f"mkdir: {each}"


def _write(path: Path, text: str) -> Iterator[str]:
    try:
        with path.open("x", encoding="utf-8") as file:  # "x" makes a new file or fails: not even a link is followed
            file.write(text)
    except FileExistsError:
        yield f"exists: {path}"
    else:
        yield f"copy: {path}"


@declare()
def demo() -> None:
    """Show the whole way of a message, in real processes.

    SMTP, state function, queue, second process, relay.
    """
    from lamsonq import demo

    click.get_current_context().exit(demo.run())


@declare()
@click.argument("shell", type=click.Choice(shells.SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script for completion in a shell.

    It completes commands, options, boots, queues and files. In ~/.bashrc or ~/.zshrc: eval "$(lamsonq completion
    bash)", or zsh; for fish, lamsonq completion fish > ~/.config/fish/completions/lamsonq.fish
    """
    click.echo(shells.script(shell, ctx.find_root().command))


def _names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    group = ctx.find_root().command
    names = group.list_commands(ctx) if isinstance(group, Commands) else []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@declare("help")
@option("for", "The command to explain, when it is not the argument.", "name", metavar="COMMAND", shell_complete=_names)
@argument("command_name", metavar="[COMMAND]", shell_complete=_names)
@click.pass_context
def help_(ctx: click.Context, name: str | None, command_name: str | None) -> None:
    """List the commands, or explain one.

    lamsonq help -for start explains start.
    """
    group = ctx.find_root().command
    assert isinstance(group, Commands)
    name = name or command_name
    if name is None:
        click.echo(f"Available commands:\n\n{', '.join(sorted(group.commands))}\n")
        click.echo("Use lamsonq help -for <command> to find out more.")
        return
    command = group.commands.get(name)
    if command is None:
        if name in GONE:
            raise click.UsageError(GONE[name])
        raise click.UsageError(f"There is no command {name!r}. Try one of: {', '.join(sorted(group.commands))}")
    with click.Context(command, info_name=name, parent=ctx.parent) as explained:
        click.echo(command.get_help(explained))


@declare()
def version() -> None:
    """Print the version."""
    click.echo(f"Lamsonq-Version:  {__version__}")
