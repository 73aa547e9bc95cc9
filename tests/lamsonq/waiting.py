"""How tests wait for what has to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import pytest

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


def clock_ahead(monkeypatch: pytest.MonkeyPatch, *modules: str) -> Callable[[float], None]:
    """What puts the monotonic clock of these modules ahead, by seconds in which no processor was used."""
    ahead = [0.0]
    stepping = SimpleNamespace(**vars(time))
    stepping.monotonic = lambda: time.monotonic() + ahead[0]
    for module in modules:
        monkeypatch.setattr(f"{module}.time", stepping)
    return lambda seconds: ahead.append(ahead.pop() + seconds)
