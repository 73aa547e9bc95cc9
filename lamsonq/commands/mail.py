"""queue, routes, send and fsck: what looks at mail, and sends one."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from lamsonq.commands.options import declare, json_option, option, switch
from lamsonq.errors import Dead, Later, Refusal, UsageError

if TYPE_CHECKING:
    from lamsonq.queue import Queue


@declare()
@click.argument("path", required=False, metavar="[QUEUE]")
@option("name", "The queue, when it is not the argument.", default="run/queue", metavar="QUEUE")
@click.option("-pop", "--pop", is_flag=True, help="Take the oldest message out and print it.")
@option("get", "Print a message.", metavar="KEY")
@option("remove", "Delete a message.", metavar="KEY")
@click.option("-keys", "--keys", "-list", "--list", "keys", is_flag=True, help="Print the keys, oldest first.")
@click.option("-count", "--count", is_flag=True, help="Print how many messages there are.")
@click.option(
    "-clear", "--clear", is_flag=True, help="Delete all messages that are ready, or all dead or delayed ones."
)
@click.option("-dead", "--dead", "state", flag_value="dead", help="With -keys, -count and -clear: the dead letters.")
@click.option(
    "-delayed", "--delayed", "state", flag_value="delayed", help="With -keys, -count and -clear: the delayed."
)
@option("report", "Print why a message failed, with tracebacks.", metavar="KEY")
@option("kick", "Make a delayed or dead message ready again.", metavar="KEY")
@json_option
def queue(path: str | None, name: str, state: str | None, as_json: bool, **wish: Any) -> None:
    """Look into a queue and change it. Give exactly one thing to do."""
    from lamsonq.queue import Queue

    wishes = [word for word, value in wish.items() if value]
    if state is not None and not wishes:
        wishes = ["keys"]
    if len(wishes) != 1:
        what = "Give something to do." if not wishes else "Give one thing to do, not more."
        raise Refusal(f"{what}  Try lamsonq help -for queue to find out what.")
    if state is not None and wishes[0] not in ("keys", "count", "clear"):
        raise Refusal(f"-{state} goes with -keys, -count and -clear, not with -{wishes[0]}")
    name = path or name
    _look_for(name)
    opened = Queue(name)
    if not as_json:
        click.echo(f"Using queue: {name!r}")
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
    key, message = queue.pop()
    click.echo(f"KEY:  {key}")
    if message is not None:
        _print_message(message.Data)


def _get(queue: Queue, key: str, *_: Any) -> None:
    job = queue.backend.get(key)
    if job is None:
        raise _missing(queue, key)
    _print_message(job.body)


def _print_message(data: bytes) -> None:
    """The bytes as they are: a message may be in any character set."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


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
@click.argument("modules", nargs=-1, metavar="[MODULE]...")
@option("test", "Show what takes this address, and what it captures.", metavar="ADDRESS")
@option("path", "Look for the modules here too.", metavar="DIR")
@json_option
def routes(modules: tuple[str, ...], test: str | None, path: str | None, as_json: bool) -> None:
    """Show the routes of boots or handler modules (config.testing when none is given), and test an address."""
    from lamsonq import settings
    from lamsonq.modules import load
    from lamsonq.routing import Router

    modules = modules or ("config.testing",)
    settings.use_project()
    if path is not None:
        sys.path.insert(0, path)
        importlib.invalidate_caches()
    for module in modules:
        before = Router.table
        load(module)
        if Router.table is before:  # no boot: a boot would have loaded its handlers
            Router.load([module])
    if not Router.ORDER:
        raise UsageError(f"{', '.join(modules)} imported, but no function is registered")
    table = [(route.expression, [h.name for h in route.handlers]) for route in Router.table.routes.values()]
    matches = (
        [] if test is None else [(r.expression, dict(table)[r.expression], c) for r, c in Router.table.matches(test)]
    )
    if as_json:
        rows = [{"expression": expression, "functions": names} for expression, names in table]
        hits = [{"expression": e, "functions": names, "captures": captures} for e, names, captures in matches]
        click.echo(json.dumps({"routes": rows, "test": test, "matches": hits}))
    else:
        _print_routes(table)
        if test is not None:
            _print_test(test, matches)
    if test is not None and not matches:
        click.get_current_context().exit(1)


def _print_routes(table: list[tuple[str, list[str]]]) -> None:
    click.echo(f"Routing ORDER: {[expression for expression, _ in table]}")
    click.echo("Routing TABLE:\n---")
    for expression, names in table:
        click.echo(f"{expression!r}: {''.join(f'{name} ' for name in names)}")
    click.echo("---")


def _print_test(address: str, matches: list[tuple[str, list[str], dict[str, str]]]) -> None:
    if not matches:
        click.echo(f"\nTEST address {address!r} didn't match anything.")
        return
    click.echo(f"\nTEST address {address!r} matches:")
    for expression, names, captures in matches:
        click.echo(f"  {expression!r} {' '.join(names)}")
        click.echo(f"  -  {captures}")


@declare()
@option("sender", "Who sends it.", required=True, metavar="ADDRESS")
@option("to", "Who gets it.", required=True, metavar="ADDRESS")
@option("subject", "Its subject.", required=True, metavar="TEXT")
@option("body", "Its text.", required=True, metavar="TEXT")
@option("attach", "A file to attach.", type=click.Path(exists=True, dir_okay=False), metavar="FILE")
@option("port", "The server's port.", type=click.IntRange(1, 65535), default=8825, metavar="N")
@option("host", "The server.", default="127.0.0.1", metavar="HOST")
@option("username", "Log in as this user.", metavar="NAME")
@option("password", "With this password.", metavar="TEXT")
@switch("ssl", "Speak TLS from the start.")
@switch("starttls", "Ask for TLS with STARTTLS.")
@option("debug", "1 shows the SMTP dialogue on stderr.", type=click.IntRange(0, 1), default=0, metavar="N")
def send(sender: str, to: str, subject: str, body: str, attach: str | None, port: int, host: str, **login: Any) -> None:
    """Send one message to a server. Prints nothing when the server has taken it."""
    from lamsonq.errors import Undelivered, reason_of
    from lamsonq.mail import MailResponse
    from lamsonq.relay import Relay

    message = MailResponse(To=to, From=sender, Subject=subject, Body=body)
    if attach is not None:
        message.attach(filename=attach)
    try:
        Relay(host=host, port=port, **login).deliver(message)
    except Undelivered as error:
        raise Refusal(str(error)) from error
    except (OSError, ValueError, Later, Dead) as error:
        raise Refusal(f"{host}:{port}: {reason_of(error)}") from error


@declare()
@click.argument("run", default="run", metavar="[DIR]")
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
