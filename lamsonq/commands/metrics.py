"""metrics: figures for Prometheus, and whether all servers live, from a small process of its own."""

from __future__ import annotations

import click

from lamsonq.commands.options import declare, option


@declare()
@option("port", "The port to listen on; 0 takes a free one.", type=click.IntRange(0, 65535), default=9108, metavar="N")
@option("host", "The address to listen on.", default="127.0.0.1", metavar="ADDRESS")
@option("run", "The directory with the pid files and queues.", default="run", metavar="DIR")
def metrics(port: int, host: str, run: str) -> None:
    """Serve /metrics for Prometheus, and /live and /ready.

    Stays in the foreground until TERM or ctrl-c. Needs the extra `metrics`: pip install 'lamsonq[metrics]'.
    """
    from lamsonq import metrics as served

    server = served.bound(host, port, run)
    click.echo(f"metrics on {server.url}metrics", err=True)
    served.serve(server)
