"""fsck: whether everything that was accepted is there."""

from __future__ import annotations

import json

import click

from lamsonq.commands.options import argument, declare, json_option, option


@declare()
@argument("run", default="run", metavar="[DIR]")
@option("accepted", "A file of Message-IDs (or `ID recipient`), one a line, that were answered 250.", metavar="FILE")
@option("handled", "A file of Message-IDs, one a line, that were handled.", metavar="FILE")
@json_option
@click.pass_context
def fsck(ctx: click.Context, run: str, accepted: str | None, handled: str | None, as_json: bool) -> None:
    """Account for every file in all queues of a directory.

    With -accepted and -handled also for every message. Exits with 1 when a file is broken or a message is missing.
    """
    from lamsonq import fsck as checker

    report = checker.check(run, checker.read_ids(accepted), checker.read_ids(handled))
    click.echo(json.dumps(report.as_json()) if as_json else str(report))
    ctx.exit(0 if report.good else 1)
