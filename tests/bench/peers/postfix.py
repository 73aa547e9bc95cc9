"""Postfix as a front: what it takes is written into its queue and synced there, and delivered nowhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lamsonq.peers.postfix import Postfix

from ..installed import program
from ..processes import Listening, free_port

HOLD = """\
smtpd_client_restrictions = static:HOLD
in_flow_delay = 0
"""
"""A message on hold is as durable as any other, and costs less: the queue manager never looks at it. in_flow_delay
slows a Postfix down that takes more than it delivers."""


def missing() -> str | None:
    if os.geteuid() != 0:
        return "it starts as root only"
    return None if program("smtp-source") and program("postqueue") else "it is not installed"


@contextlib.contextmanager
def durable(folder: Path) -> Iterator[Listening]:
    port = free_port()
    began = time.monotonic()
    postfix = Postfix(folder, port, HOLD)
    try:
        yield Listening(port, [postfix.pid], time.monotonic() - began)
    finally:
        postfix.close()
