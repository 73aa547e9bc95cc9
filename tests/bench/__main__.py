"""Ours and the peers beside each other, in one run.

    make bench                        every row, a few minutes
    make bench ROWS="engine spool"    these rows
    make bench BENCH=full             what figures are published from
    python -m tests.bench --list      which rows there are

Installs what the peers need, and prints Markdown: the tables of docs/speed.md. What is being done goes to stderr.
"""

from __future__ import annotations

import datetime
import os
import platform
import signal
import sys

from lamsonq import __version__

from .contest import FULL, SHORT, hold, markdown
from .installed import versions
from .rows import ROWS


def main(words: list[str]) -> int:
    if words == ["--list"]:
        for name, contests in ROWS.items():
            print(f"{name:10}{(sys.modules[contests.__module__].__doc__ or '').splitlines()[0]}")
        return 0
    if unknown := [word for word in words if word not in ROWS]:
        print(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    scale = FULL if os.environ.get("BENCH") == "full" else SHORT
    _head(scale.rounds)
    for name in words or ROWS:
        print(f"## {name}\n", flush=True)
        for contest in ROWS[name](scale):
            print("\n".join(markdown(hold(contest, scale.rounds))), flush=True)
    return 0


def _head(rounds: int) -> None:
    """When, where, and with what this was measured."""
    print(
        f"{datetime.date.today()}, lamsonq {__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} at the start; {rounds} rounds, "
        f"median (least..most). Peers: {', '.join(versions())}.\n",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
