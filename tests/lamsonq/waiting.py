"""How tests wait for what has to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 60.0
"""Seconds after which something that should have happened has not. Much more than anything takes: a machine that is
busy with something else is no error."""

T = TypeVar("T")


def until(look: Callable[[], T | None], what: str = "it has not come about", log: Callable[[], str] = str) -> T:
    """What `look` gives as soon as that is true. If it never is, the test fails with `what` and the `log`."""
    give_up_at = time.monotonic() + PATIENCE
    while not (seen := look()):
        assert time.monotonic() < give_up_at, f"not seen in {PATIENCE:g} s: {what}\n{log()}"
        time.sleep(0.005)
    return seen
