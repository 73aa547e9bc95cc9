"""Verbs that do one thing to several messages: all that can be done is done, and what cannot is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from lamsonq.commands.queues.printed import print_json, print_line, shown

if TYPE_CHECKING:
    from lamsonq.jobs import Backend

_INSTEAD = {"dead": "a dead letter: `retry` makes it ready", "delayed": "delayed: `kick` makes it ready"}


def one_way(what: str, keys: Sequence[str], all: bool | None = None, fingerprint: str | None = None) -> None:
    """Raises UsageError unless the messages are named in one way."""
    if sum((bool(keys), bool(all), fingerprint is not None)) != 1:
        ways = ["their keys", *(["-all"] if all is not None else [])]
        ways[1:1] = ["-fingerprint F"] if what == "dead letters" else []
        raise click.UsageError(f"Give {what} in one way: {', or '.join(ways)}.", click.get_current_context())


def each_key(
    store: Backend,
    keys: Sequence[str],
    state: str | None,
    act: Callable[[str], bool],
    done: str,
    as_json: bool,
    *,
    listed: bool = False,
) -> None:
    """Do it to each of these messages that is in this state (None: any but reserved and dead), print which were done;
    ends with 1 when one could not be. `listed`: the keys have just been read from that state."""
    acted = []
    for key in keys:
        now = state if listed else store.state(key)
        fits = now == state if state else now not in (None, "reserved", "dead")
        if fits and act(key):
            acted.append(key)
        else:
            click.echo(f"{shown(key)} was not {done}: {_why(store, key)}", err=True)
    if as_json:
        print_json({"queue": store.name, done: acted})
    else:
        print_line(f"{done} {len(acted)} of {store.name}")
    click.get_current_context().exit(0 if len(acted) == len(keys) else 1)


def _why(store: Backend, key: str) -> str:
    state = store.state(key)
    if state is None:
        return f"{store.name} has no such message"
    return f"it is {'being worked' if state == 'reserved' else _INSTEAD.get(state, state)}"
