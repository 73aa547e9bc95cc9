"""`queue` itself: Lamson's options, which do one thing each; a verb in front of the queue is a command of its own.

Rules:

1. The first word is a verb, or else the queue: a queue whose directory is called like a verb is written ./ls.
2. What Lamson's options print stays as it is.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lamsonq.commands.options import argument, declare, json_option, option, switch
from lamsonq.commands.queues import change, dead, look, move
from lamsonq.commands.queues.opened import looked_for
from lamsonq.commands.queues.printed import print_bytes, print_line
from lamsonq.commands.queues.verbs import WithVerbs, queues_and
from lamsonq.errors import Later, Refusal

if TYPE_CHECKING:
    from lamsonq.queue import Queue


VERBS = {
    verb.name or "": verb
    for verb in (
        look.ls,
        look.show,
        look.stats,
        dead.dead,
        dead.retry,
        dead.bury,
        change.kick,
        move.move,
        change.purge,
        change.pause,
        change.resume,
        look.export,
    )
}


@declare(cls=WithVerbs, verbs=VERBS)
@argument("path", metavar="[QUEUE]", shell_complete=queues_and(VERBS))
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
    """Look into a queue and change it. Give one of the verbs first, or exactly one option.

    `lamsonq queue VERB -h` explains a verb.
    """
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
    opened = looked_for(name)
    if not as_json:
        print_line(f"Using queue: {name!r}")
    act = _QUEUE_ACTIONS[wishes[0]]
    act(opened, wish[wishes[0]], state or "ready", as_json)


def _pop(queue: Queue, *_: Any) -> None:
    """Print the oldest message; it is out of the queue only when it is printed."""
    from lamsonq.jobs import DONE

    for job in queue.backend.reserve(1):
        printed = False
        try:
            print_line(f"KEY:  {job.key}")
            print_bytes(job.body)
            printed = True
        finally:
            queue.backend.settle(job, DONE if printed else Later(counted=False))
        return
    click.echo("KEY:  None")


def _get(queue: Queue, key: str, *_: Any) -> None:
    job = queue.backend.get(key)
    if job is None:
        raise _missing(queue, key)
    print_bytes(job.body)


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
    from lamsonq.jobs import Damaged

    job = queue.backend.get(key)
    if job is None:
        raise _missing(queue, key)
    trouble = f"It cannot be read: {job.trouble}" if isinstance(job, Damaged) else "It has not failed."
    click.echo(queue.backend.report(key) or trouble)


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
