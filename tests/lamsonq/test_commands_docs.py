"""docs/commands.md and the commands say the same, and no option is without a test that uses it from outside.

From outside means: some test of the framework has a call, or a list of words, that names the command and then the
option, as in `lamsonq("start", "-boot", ...)`, `project.start("-boot", ...)` or `["lamsonq", "start", "-boot", ...]`.
`parsed(...)`, which only reads a command line, does not count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from .cli import every_command

COMMANDS = every_command()
TESTS = Path(__file__).parent
PAGE = (TESTS.parents[1] / "docs" / "commands.md").read_text()
SECTIONS = dict(re.findall(r"^## ([\w ]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def options_of(command: str) -> list[click.Option]:
    return [param for param in COMMANDS[command].params if isinstance(param, click.Option)]


def spelled(option: click.Option) -> frozenset[str]:
    return frozenset((*option.opts, *option.secondary_opts))


# ---- the page --------------------------------------------------------------------------------------------------


def test_the_page_has_the_commands_that_there_are() -> None:
    assert list(SECTIONS) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_the_options_that_there_are(command: str) -> None:
    lines = re.findall(r"^- (`-.*?):(?=\s)", SECTIONS[command], re.MULTILINE)
    named = [frozenset(re.findall(r"`(-[^`]+)`", line)) for line in lines]
    assert sorted(map(sorted, named)) == sorted(sorted(spelled(option)) for option in options_of(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_the_defaults_and_the_arguments_that_there_are(command: str) -> None:
    for option in options_of(command):
        (line,) = (line for line in SECTIONS[command].splitlines() if line.startswith(f"- `{option.opts[0]}`"))
        if option.show_default and isinstance(option.default, str | int):
            assert line.endswith(f" Default: `{option.default}`."), line
    arguments = [param for param in COMMANDS[command].params if isinstance(param, click.Argument)]
    shown = re.findall(r"^- `([^-`]+)`: ", SECTIONS[command], re.MULTILINE)
    assert shown == [argument.metavar or str(argument.name).upper() for argument in arguments]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_exit_codes_and_an_example(command: str) -> None:
    assert re.search(r"^Exit codes?[,:]", SECTIONS[command], re.MULTILINE)
    assert re.search(rf"^```\n(.*\n)*?.*lamsonq {command}", SECTIONS[command], re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_on_the_page_are_understood(command: str) -> None:
    for line in re.findall(rf"^[$#] lamsonq {command}((?:.*\\\n)*.*)", SECTIONS[command], re.MULTILINE):
        words = re.sub(r"\\\n", " ", line).partition(" <")[0].partition(" >")[0]
        args = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", words)]
        assert COMMANDS[command].make_context(command, args) is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_explained(command: str) -> None:
    assert COMMANDS[command].help
    assert all(option.help and not option.hidden for option in options_of(command))


# ---- the tests -------------------------------------------------------------------------------------------------


def used_from_outside(source: str) -> Iterator[tuple[str, str]]:
    """(command, option) of every call and list of words in a test file."""
    for node in ast.walk(ast.parse(source)):
        words = list(_words(node))
        first = next((index for index, word in enumerate(words[:4]) if word in COMMANDS), None)
        if first is not None and "parsed" not in words[:first]:
            verb = " ".join(words[first : first + 2])
            command = verb if verb in COMMANDS else words[first]
            known = {name for option in options_of(command) for name in spelled(option)}
            names = [word.partition("=")[0] for word in words[first + 1 :] if word.startswith("-")]
            yield from ((command, name if name in known else name[:2]) for name in names)  # -fADDRESS is -f


def _words(node: ast.AST) -> Iterator[str]:
    """The texts in a call, its function's name first, or in a list; a tuple after a star is looked into."""
    if isinstance(node, ast.Call):
        yield node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    elements = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.List) else []
    for element in elements:
        inner = element.value if isinstance(element, ast.Starred) else element
        yield from (leaf.value for leaf in _leaves(inner) if isinstance(leaf.value, str))


def _leaves(node: ast.expr) -> Iterator[ast.Constant]:
    if isinstance(node, ast.Constant):
        yield node
    elif isinstance(node, ast.Tuple | ast.List):
        for element in node.elts:
            yield from _leaves(element)


USED = {use for path in TESTS.glob("test_*.py") for use in used_from_outside(path.read_text())}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_used_by_a_test_from_outside(command: str) -> None:
    unused = [
        sorted(spelled(o)) for o in options_of(command) if not any((command, name) in USED for name in spelled(o))
    ]
    assert unused == []


def test_reading_a_command_line_only_is_not_counted() -> None:
    assert set(used_from_outside('parsed("start", "-boot", "x")')) == set()
    assert set(used_from_outside('lamsonq("start", *("-boot=x",), "-FORCE")')) == {
        ("start", "-boot"),
        ("start", "-FORCE"),
    }
    assert set(used_from_outside('lamsonq("queue", "ls", "-state", "dead")')) == {("queue ls", "-state")}
    assert set(used_from_outside('[sys.executable, "-m", "lamsonq", "log", "-port", "0"]')) == {("log", "-port")}
