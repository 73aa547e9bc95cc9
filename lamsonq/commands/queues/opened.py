"""Queues as the command line names them: a path or a URL, and what is no such queue.

Rules:

1. Who looks makes nothing: a slip in the name ends with a line, and not with an empty queue of that name.
2. `lamson` alone takes a directory that is not there for an empty queue, as Lamson did, and says so; and `move` makes
   the queue that it moves to.
3. A queue that only its own process sees is refused: what we saw would be another one, empty and soon forgotten.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from lamsonq.commands.completion import queues_of
from lamsonq.errors import Refusal

if TYPE_CHECKING:
    from lamsonq.jobs import Backend
    from lamsonq.queue import Queue

STATES = click.Choice(["ready", "delayed", "reserved", "dead", "done"])
"""lamsonq.jobs.STATES, without its import."""


def existing(name: str | None, what: str = "the queue") -> Queue:
    """The queue of this name. Raises Refusal where there is none."""
    name = _given(name, what)
    _refuse_missing(name)
    _refuse_other_files(name)
    return _opened(name)


def looked_for(name: str) -> Queue:
    """The queue of this name; a slip in it is not to look like an empty queue. Raises Refusal."""
    if _is_missing(name):
        click.echo(f"There is no {name} yet.", err=True)
    else:
        _refuse_other_files(name)
    return _opened(name)


def made(name: str | None, what: str) -> Queue:
    """The queue of this name, which may have to be made. Raises Refusal where something else has the name."""
    name = _given(name, what)
    path = _directory(name)
    if path is not None and os.path.lexists(path) and not _is_being_made(path):
        _refuse_other_files(name)
    return _opened(name)


def _is_being_made(path: str) -> bool:
    """Whether a directory is empty, or has nothing but folders of a queue: somebody may be making it just now."""
    from lamsonq.backends.maildir_files import FOLDERS

    return os.path.isdir(path) and {folder.partition("/")[0] for folder in FOLDERS}.issuperset(os.listdir(path))


def _given(name: str | None, what: str) -> str:
    if not name:
        raise click.UsageError(f"Give {what}, a directory or a URL.", click.get_current_context())
    return name


def _opened(name: str) -> Queue:
    from lamsonq.queue import Queue

    queue = Queue(name)
    refuse_private(queue)
    return queue


def refuse_private(queue: Queue) -> None:
    """Raises Refusal for a queue that no other process sees."""
    if "processes" not in queue.backend.capabilities:
        raise Refusal(f"{queue.dir} cannot be reached from here: a queue in memory is in its own process")


def _is_missing(name: str) -> bool:
    path = _directory(name)
    return path is not None and not os.path.lexists(path)


def _directory(name: str) -> str | None:
    """The directory that a name means; None for a URL of another scheme."""
    path = name.removeprefix("maildir:")
    return None if ":" in path.split("/")[0] else path


def _refuse_missing(name: str) -> None:
    if _is_missing(name):
        import difflib

        near = difflib.get_close_matches(name.removeprefix("maildir:"), queues_of("run"), n=1)
        raise Refusal(f"there is no queue {name}{f': did you mean {near[0]}?' if near else ''}")


def _refuse_other_files(name: str) -> None:
    path = _directory(name)
    if path is not None and not os.path.isdir(os.path.join(path, "new")):
        raise Refusal(f"{path} is not a queue: a queue is a maildir, with the directories new, cur and tmp")
    if name.startswith("sqlite:"):
        _look_into_database(name)


def _look_into_database(name: str) -> None:
    """Refuse a file that is not there; where it has no such queue at the moment, but others, say so."""
    from lamsonq import databases

    path, queue = databases.parsed(name)
    if not os.path.lexists(path):
        raise Refusal(f"there is no {path}, and so no queue {name}")
    queues = databases.Database(path).queues()
    if queues and queue not in queues:
        click.echo(f"There is nothing in the queue {queue} of {path}; it has {', '.join(queues)}.", err=True)


def job_state(store: Backend, key: str) -> str:
    """The state that a job is in. Raises Refusal where there is none."""
    state = store.state(key)
    if state is None:
        raise Refusal(f"queue {store.name} has no message {key!r}")
    return state
