"""suppress: the addresses that get nothing any more, listed and changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from lamsonq.commands.options import argument, declare, json_option, option
from lamsonq.errors import Refusal

if TYPE_CHECKING:
    from lamsonq.suppression import Suppressed


@declare()
@argument("verb", metavar="[ls|add|rm]", default="ls", type=click.Choice(["ls", "add", "rm"]))
@argument("addresses", metavar="[ADDRESS]...", nargs=-1)
@option("file", "The file that the relay asks.", default="run/suppressed.db", metavar="FILE")
@option("reason", "With add: why, as the sender of a message is told.", default="by hand", metavar="TEXT")
@option("days", "With add: for how long; without it for good.", type=click.FloatRange(0, min_open=True), metavar="N")
@json_option
def suppress(verb: str, addresses: tuple[str, ...], file: str, reason: str, days: float | None, as_json: bool) -> None:
    """List the suppressed addresses, add some or remove some.

    `add` and `rm` take the addresses; `ls` lists all, or those of them that are suppressed.
    """
    from lamsonq.suppression import Suppressions

    store = Suppressions(file)
    if verb == "ls":
        _list(store.all(), addresses, as_json)
        return
    if not addresses:
        raise click.UsageError(f"{verb} needs an address")
    if verb == "rm":
        if missing := [address for address in addresses if not store.remove(address)]:
            raise Refusal(f"{', '.join(missing)}: not suppressed")
        return
    try:
        for address in addresses:
            store.add(address, reason, None if days is None else days * 86400)
    except ValueError as error:
        raise Refusal(str(error)) from error


def _list(found: list[Suppressed], wanted: tuple[str, ...], as_json: bool) -> None:
    from lamsonq.address import canonical

    names = {canonical(address) for address in wanted}
    found = [one for one in found if not names or one.address in names]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found]))
        return
    for one in found:
        until = "for good" if one.expires is None else f"until {_day(one.expires)}"
        click.echo(f"{one.address}  since {_day(one.since)} {until}  {one.reason}")
    if names and not found:
        raise Refusal("not suppressed")


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"
