"""routes: what the router would do with an address."""

from __future__ import annotations

import importlib
import json
import os
import sys
from types import ModuleType

import click

from lamsonq.commands.options import argument, declare, json_option, option
from lamsonq.errors import UsageError


@declare()
@argument("modules", nargs=-1, metavar="[MODULE]...")
@option("test", "Show what takes this address, and what it captures.", metavar="ADDRESS")
@option("path", "Look for the modules here too.", metavar="DIR")
@json_option
def routes(modules: tuple[str, ...], test: str | None, path: str | None, as_json: bool) -> None:
    """Show the routes of boots or modules, and test an address.

    Without a module it is config.testing. Exits with 1 when nothing takes the address.
    """
    from lamsonq import settings
    from lamsonq.modules import load
    from lamsonq.routing import Router

    if not modules and path is None and not os.path.exists("config/testing.py"):
        raise UsageError("there is no config/testing.py to show the routes of: name a boot or a handler module")
    modules = modules or ("config.testing",)
    settings.use_project()
    if path is not None:
        sys.path.insert(0, path)
        importlib.invalidate_caches()
    hint = ""
    for module in modules:
        before = Router.table
        loaded = load(module)
        if Router.table is before:  # no boot: a boot would have loaded its handlers
            Router.load([module])
            if isinstance(getattr(loaded, "settings", None), ModuleType):
                hint = "; a boot that loads no handlers has no routes, and takes every recipient"
    if not Router.ORDER:
        raise UsageError(f"{', '.join(modules)} imported, but no function is registered{hint}")
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
