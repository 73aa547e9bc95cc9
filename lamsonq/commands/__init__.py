"""The command line: one function for each command, whose docstring is its help.

Rules:

1. Every option takes Lamson's spelling and the usual one: `-boot x` and `--boot x`, `-ALL run` and `--all run`.
2. Data goes to stdout, trouble to stderr. What cannot be done is one line, `ERROR: ...`, and an exit code: 1 refused,
   2 usage or import, 3 broker, 4 pid file, 5 settings. `sendmail` has those of sysexits.h.
3. Commands import what they need when they run, so that help and completion stay fast.
"""

from __future__ import annotations

import sys

from lamsonq.commands import project, servers
from lamsonq.commands.blast import blast
from lamsonq.commands.cleanse import cleanse
from lamsonq.commands.fsck import fsck
from lamsonq.commands.logins import logins
from lamsonq.commands.metrics import metrics
from lamsonq.commands.options import Commands
from lamsonq.commands.queues import queue
from lamsonq.commands.routes import routes
from lamsonq.commands.send import send
from lamsonq.commands.sendmail import sendmail
from lamsonq.commands.suppress import suppress

COMMANDS = (
    project.gen,
    servers.start,
    servers.stop,
    servers.restart,
    servers.status,
    metrics,
    servers.log,
    queue,
    routes,
    send,
    sendmail,
    blast,
    cleanse,
    suppress,
    fsck,
    logins,
    project.demo,
    project.completion,
    project.help_,
    project.version,
)

lamsonq = Commands("lamsonq", COMMANDS)


def main() -> None:
    """The `lamsonq` script."""
    if sys.platform != "linux":
        sys.exit("ERROR: lamsonq runs on Linux: its queues and processes need the locks and signals of that kernel.")
    lamsonq(prog_name="lamsonq")
