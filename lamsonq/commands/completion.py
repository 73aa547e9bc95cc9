"""What a shell offers when TAB is pressed, and the script that makes it ask us.

Rules:

1. What is offered behind an option or argument is chosen by its metavar, so that no command says it twice.
2. Looking it up imports nothing of the project: it is the names of files, and of the queues in SQLite files.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping

import click
from click.shell_completion import CompletionItem, get_completion_class

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

# A file may be a directory to the shell, which has to show what is in it: an mbox is one, a maildir the other.
_PATHS: Mapping[str, str] = {
    "DIR": "dir",
    "FILE": "file",
    "INPUT": "file",
    "OUTPUT": "dir",
    **dict.fromkeys(("QUEUE", "FROM", "TO"), "dir"),
}


SHELLS = ("bash", "zsh", "fish")


def script(shell: str, commands: click.Command) -> str:
    """What one of the SHELLS has to run, so that it completes these commands."""
    found = get_completion_class(shell)
    assert found is not None
    return found(commands, {}, "lamsonq", "_LAMSONQ_COMPLETE").source()


def completer_of(metavar: object) -> Completer | None:
    """What completes `DIR`, `[DIR]` or `[MODULE]...`; None where nothing does."""
    bare = str(metavar).strip("[]")
    words, kind = _WORDS.get(str(metavar), _WORDS.get(bare)), _PATHS.get(bare)

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(word) for word in (words() if words else []) if word.startswith(incomplete)]
        return found or ([CompletionItem(incomplete, type=kind)] if kind else [])

    return complete if words or kind else None


def _boots() -> list[str]:
    return _modules_of("config")


def _boots_and_handlers() -> list[str]:
    return _modules_of("config") + _modules_of("app/handlers")


def _modules_of(folder: str) -> list[str]:
    names = [path.removesuffix(".py").replace(os.sep, ".") for path in sorted(glob.glob(f"{folder}/*.py"))]
    return [name for name in names if not name.endswith((".__init__", ".settings"))]


def _queues() -> list[str]:
    return queues_of("run")


def queues_of(run: str) -> list[str]:
    """The queues of a directory as one writes them: maildirs, and those in SQLite files."""
    found = [os.path.dirname(path) for path in sorted(glob.glob(f"{glob.escape(run)}/*/new"))]
    files = [path for path in sorted(glob.glob(f"{glob.escape(run)}/*")) if _is_sqlite(path)]
    if files:
        from lamsonq import databases  # only where there is a file to look into

        found += databases.named(files)
    return found


def _is_sqlite(path: str) -> bool:
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


_WORDS: Mapping[str, Callable[[], list[str]]] = {
    "MODULE": _boots,
    "[MODULE]...": _boots_and_handlers,
    "QUEUE": _queues,
    "FROM": _queues,
    "TO": _queues,
}
