"""completion: what makes the shell complete our commands when TAB is pressed."""

from __future__ import annotations

import click

from lamsonq.commands.options import declare


@declare()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options, boots, queues and files in a shell.

    In ~/.bashrc or ~/.zshrc: eval "$(lamsonq completion bash)", or zsh; for fish, lamsonq completion fish >
    ~/.config/fish/completions/lamsonq.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "lamsonq", "_LAMSONQ_COMPLETE").source())
