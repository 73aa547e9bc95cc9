"""Queues as the command line names them: a path or a URL, and what is no such queue.

Rules:

1. Who looks makes nothing: a slip in the name ends with a line, and not with an empty queue of that name.
2. `lamson` alone takes a directory that is not there for an empty queue, as Lamson did, and says so.
"""

from __future__ import annotations

import difflib
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
    from lamsonq.queue import Queue

    if not name:
        raise click.UsageError(f"Give {what}, a directory or a URL.", click.get_current_context())
    _refuse_missing(name)
    _refuse_other_files(name)
    return Queue(name)


def looked_for(name: str) -> None:
    """A slip in the name is not to look like an empty queue."""
    path = _directory(name)
    if path is not None and not os.path.lexists(path):
        click.echo(f"There is no {name} yet.", err=True)
    else:
        _refuse_other_files(name)


def _directory(name: str) -> str | None:
    """The directory that a name means; None for a URL of another scheme."""
    path = name.removeprefix("maildir:")
    return None if ":" in path.split("/")[0] else path


def _refuse_missing(name: str) -> None:
    path = _directory(name)
    if path is not None and not os.path.lexists(path):
        near = difflib.get_close_matches(path, queues_of("run"), n=1)
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
