"""gen, demo, help and version: how one begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from lamsonq import __version__
from lamsonq.commands.options import Commands, declare
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
@click.argument("path", required=False, metavar="[PROJECT]")
@click.option("-project", "--project", metavar="PROJECT", help="The directory, when it is not the argument.")
@click.option("--force", "-f", is_flag=True, help="Add to a directory that exists. Files in it stay as they are.")
@click.option("-FORCE", "force_lamson", is_flag=False, flag_value="true", type=bool, hidden=True)
def gen(path: str | None, project: str | None, force: bool, force_lamson: bool | None) -> None:
    """Make a new project: a small blog that people write by mail, with its tests."""
    if (path is None) == (project is None):
        raise click.UsageError("Give one directory for the project: lamsonq gen NAME")
    target = Path(path or project or "")
    if os.path.lexists(target) and not (force or force_lamson):
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
    """Show the whole way of a message: SMTP, state function, queue, second process, relay."""
    from lamsonq import demo

    click.get_current_context().exit(demo.run())


@declare("help")
@click.option("-for", "--for", "name", metavar="COMMAND", help="The command to explain.")
@click.argument("argument", required=False, metavar="[COMMAND]")
@click.pass_context
def help_(ctx: click.Context, name: str | None, argument: str | None) -> None:
    """List the commands, or explain one: lamsonq help -for start."""
    group = ctx.find_root().command
    assert isinstance(group, Commands)
    name = name or argument
    if name is None:
        click.echo(f"Available commands:\n\n{', '.join(sorted(group.commands))}\n")
        click.echo("Use lamsonq help -for <command> to find out more.")
        return
    command = group.commands.get(name)
    if command is None:
        raise click.UsageError(f"There is no command {name!r}. Try one of: {', '.join(sorted(group.commands))}")
    with click.Context(command, info_name=name, parent=ctx.parent) as explained:
        click.echo(command.get_help(explained))


@declare()
def version() -> None:
    """Print the version."""
    click.echo(f"Lamsonq-Version:  {__version__}")
