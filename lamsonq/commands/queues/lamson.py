"""queue and fsck: what waits, and whether all of it is there."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from lamsonq.commands.options import argument, declare, json_option, option, switch
from lamsonq.errors import Later, Refusal
from lamsonq.jobs import DONE

if TYPE_CHECKING:
    from lamsonq.queue import Queue


@declare()
@argument("path", metavar="[QUEUE]")
@option("name", "The queue, when it is not the argument.  [default: run/queue]", metavar="QUEUE")
@switch("pop", "Take the oldest message out and print it.")
@option("get", "Print a message.", metavar="KEY")
@option("remove", "Delete a message.", metavar="KEY")
@switch("keys", "Print the keys, oldest first.", "-list", "--list")
@switch("count", "Print how many messages there are.")
@switch("clear", "Delete all messages that are ready, or all dead or delayed ones.")
@click.option("-dead", "--dead", "state", flag_value="dead", help="With -keys, -count and -clear: the dead letters.")
@click.option(
    "-delayed", "--delayed", "state", flag_value="delayed", help="With -keys, -count and -clear: the delayed."
)
@option("report", "Print why a message failed, with tracebacks.", metavar="KEY")
@option("kick", "Make a delayed or dead message ready again.", metavar="KEY")
@json_option
def queue(path: str | None, name: str | None, state: str | None, as_json: bool, **wish: Any) -> None:
    """Look into a queue and change it. Give exactly one thing to do."""
    from lamsonq.queue import Queue

    if path is not None and name is not None:
        raise Refusal(f"give one queue, {path} or -name {name}")
    wishes = [word for word, value in wish.items() if value]
    if state is not None and not wishes:
        wishes = ["keys"]
    if len(wishes) != 1:
        what = "Give something to do." if not wishes else "Give one thing to do, not more."
        raise Refusal(f"{what}  Try lamsonq help -for queue to find out what.")
    if state is not None and wishes[0] not in ("keys", "count", "clear"):
        raise Refusal(f"-{state} goes with -keys, -count and -clear, not with -{wishes[0]}")
    name = path or name or "run/queue"
    _look_for(name)
    opened = Queue(name)
    if not as_json:
        _print(f"Using queue: {name!r}")
    act = _QUEUE_ACTIONS[wishes[0]]
    act(opened, wish[wishes[0]], state or "ready", as_json)


def _look_for(name: str) -> None:
    """A slip in the name is not to look like an empty queue."""
    if ":" in name:
        return
    if not os.path.lexists(name):
        click.echo(f"There is no {name} yet.", err=True)
    elif not os.path.isdir(os.path.join(name, "new")):
        raise Refusal(f"{name} is not a queue: a queue is a maildir, with the directories new, cur and tmp")


def _pop(queue: Queue, *_: Any) -> None:
    """Print the oldest message; it is out of the queue only when it is printed."""
    for job in queue.backend.reserve(1):
        printed = False
        try:
            _print(f"KEY:  {job.key}")
            _print_message(job.body)
            printed = True
        finally:
            queue.backend.settle(job, DONE if printed else Later(counted=False))
        return
    click.echo("KEY:  None")


def _get(queue: Queue, key: str, *_: Any) -> None:
    job = queue.backend.get(key)
    if job is None:
        raise _missing(queue, key)
    _print_message(job.body)


def _print(line: str) -> None:
    _print_message(f"{line}\n".encode("utf-8", "surrogateescape"))


def _print_message(data: bytes) -> None:
    """The bytes as they are: a message may be in any character set. Raises Refusal when they cannot be printed."""
    if sys.stdout is None:
        raise Refusal("there is no standard output to print to")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # what it still holds cannot be printed at the end either
        raise Refusal(f"cannot print: {error.strerror}") from error


def _remove(queue: Queue, key: str, *_: Any) -> None:
    if not queue.backend.remove(key):
        raise _missing(queue, key)


def _keys(queue: Queue, _: bool, state: str, as_json: bool) -> None:
    keys = queue.backend.keys(state)
    if as_json:
        click.echo(json.dumps({"queue": queue.dir, "state": state, "keys": keys}))
    for key in [] if as_json else keys:
        click.echo(key)


def _count(queue: Queue, _: bool, state: str, as_json: bool) -> None:
    counts = queue.backend.counts()
    if as_json:
        click.echo(json.dumps({"queue": queue.dir, **counts}))
    else:
        which = "" if state == "ready" else f" {state}"
        click.echo(f"Queue {queue.dir} contains {counts[state]}{which} messages")
        others = [f"{counts[other]} {other}" for other in ("delayed", "reserved", "dead") if counts[other]]
        if others and state == "ready":
            click.echo(f"  and besides: {', '.join(others)}")


def _clear(queue: Queue, _: bool, state: str, *__: Any) -> None:
    for key in queue.backend.keys(state):
        queue.backend.remove(key)


def _report(queue: Queue, key: str, *_: Any) -> None:
    if queue.backend.get(key) is None:
        raise _missing(queue, key)
    click.echo(queue.backend.report(key) or "It has not failed.")


def _kick(queue: Queue, key: str, *_: Any) -> None:
    if not queue.backend.kick(key):
        raise _missing(queue, key)


def _missing(queue: Queue, key: str) -> Refusal:
    return Refusal(f"queue {queue.dir} has no message {key!r} for that")


_QUEUE_ACTIONS = {
    "pop": _pop,
    "get": _get,
    "remove": _remove,
    "keys": _keys,
    "count": _count,
    "clear": _clear,
    "report": _report,
    "kick": _kick,
}


@declare()
@argument("run", default="run", metavar="[DIR]")
@option("accepted", "A file of Message-IDs (or `ID recipient`), one a line, that were answered 250.", metavar="FILE")
@option("handled", "A file of Message-IDs, one a line, that were handled.", metavar="FILE")
@json_option
@click.pass_context
def fsck(ctx: click.Context, run: str, accepted: str | None, handled: str | None, as_json: bool) -> None:
    """Check every queue of a directory; with -accepted and -handled, that no message is missing.

    Exits with 1 when a file is broken or a message is missing.
    """
    from lamsonq import fsck as checker

    report = checker.check(run, checker.read_ids(accepted), checker.read_ids(handled))
    click.echo(json.dumps(report.as_json()) if as_json else str(report))
    ctx.exit(0 if report.good else 1)
