"""A command whose first word may be a verb, which is then a command of its own: `queue ls`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from lamsonq.commands.completion import Completer, completer_of
from lamsonq.commands.options import Command


class WithVerbs(Command):
    """Hands the line over to the verb that it begins with; without one it is the command itself."""

    def __init__(self, *args: Any, verbs: Mapping[str, click.Command], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.verbs = dict(verbs)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        verb = self.verbs.get(args[0]) if args else None
        if verb is None:
            return super().make_context(info_name, args, parent, **extra)
        return verb.make_context(f"{info_name} {verb.name}", args[1:], parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args[:2] if not word.startswith("-")]
        if len(words) == 2 and not ctx.resilient_parsing:  # only a verb stands in front of a queue
            import difflib

            near = difflib.get_close_matches(words[0], self.verbs, n=1)
            meant = f": did you mean {near[0]}?" if near else "."
            raise click.UsageError(f"There is no verb {words[0]!r}{meant} There are {', '.join(self.verbs)}.", ctx)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[VERB]", *super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=200)) for name, verb in self.verbs.items()])
        super().format_options(ctx, formatter)


def queues_and(verbs: Iterable[str]) -> Completer:
    """Completes what a line can begin with: one of the verbs, or a queue."""
    queues = completer_of("QUEUE")
    words = list(verbs)

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
        others = queues(ctx, param, incomplete) if queues else []
        return found + [item for item in others if not found or item.type == "plain"]

    return complete
