"""kick, purge, pause and resume: what waits is hurried, deleted or held up."""

from __future__ import annotations

import re
import sys

import click

from lamsonq.commands.options import argument, declare, json_option, option, switch
from lamsonq.commands.queues.opened import existing
from lamsonq.commands.queues.printed import print_json, print_line
from lamsonq.commands.queues.several import each_key, one_way
from lamsonq.errors import Refusal

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])")

PURGED = click.Choice(["ready", "delayed", "dead", "done"])
"""What may be deleted: what is being worked may not."""


class Span(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """A length of time: 90s, 15m, 12h, 7d, 2w."""

    name = "span"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = _SPAN.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no time; write 90s, 15m, 12h, 7d or 2w", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


@declare()
@argument("name", metavar="QUEUE")
@argument("keys", metavar="[KEY]...", nargs=-1)
@switch("all", "All that are delayed.")
@json_option
def kick(name: str | None, keys: tuple[str, ...], all: bool, as_json: bool) -> None:
    """Make delayed messages ready now, their counts at zero."""
    one_way("delayed messages", keys, all)
    store = existing(name).backend
    each_key(store, keys or tuple(store.keys("delayed")), "delayed", store.kick, "kicked", as_json, listed=all)


@declare()
@argument("name", metavar="QUEUE")
@option("state", "What to delete: ready, delayed, dead or done.", type=PURGED, required=True, metavar="STATE")
@option("older", "Only what has been in this state for so long: 90s, 15m, 12h, 7d, 2w.", type=Span(), metavar="TIME")
@switch("yes", "Do not ask.", "-y")
@json_option
def purge(name: str | None, state: str, older: float | None, yes: bool, as_json: bool) -> None:
    """Delete all messages of one state, or those that have been in it for a time. Asks first."""
    from lamsonq import clock

    store = existing(name).backend
    which = f"all {state} messages" if older is None else f"the {state} messages older than {older:g} seconds"
    if not yes:
        _ask(f"Delete {which} of {store.name} (it has {store.counts()[state]} {state})?")
    count = store.purge(state, None if older is None else clock.now() - older)
    if as_json:
        print_json({"queue": store.name, "state": state, "purged": count})
    else:
        print_line(f"purged {count} {state} of {store.name}")


def _ask(question: str) -> None:
    """Raises Refusal where the answer is no, or where nobody is there to answer."""
    if not sys.stdin.isatty():
        raise Refusal("nothing was deleted: give -yes where nobody can be asked")
    if not click.confirm(question, err=True):
        raise Refusal("nothing was deleted")


@declare()
@argument("name", metavar="QUEUE")
@json_option
def pause(name: str | None, as_json: bool) -> None:
    """Let no message be taken, by any process, until `resume`. What is being worked is finished."""
    store = existing(name).backend
    store.pause()
    _tell(store.name, store.paused(), as_json)


@declare()
@argument("name", metavar="QUEUE")
@json_option
def resume(name: str | None, as_json: bool) -> None:
    """End a pause."""
    store = existing(name).backend
    store.resume()
    _tell(store.name, store.paused(), as_json)


def _tell(name: str, paused: bool, as_json: bool) -> None:
    if as_json:
        print_json({"queue": name, "paused": paused})
    else:
        print_line(f"{name} is {'paused' if paused else 'not paused'}")
