"""Handing over what settled jobs have put into other stores, without waiting long for the same one again and again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from lamsonq.errors import QueueError

PATIENCE = 1.0
"""Seconds after which a store that does not take what it is given has kept us waiting."""


class Round:
    """One round of handing over, of one job or many: a store that has kept us waiting is not asked again in it."""

    def __init__(self) -> None:
        self._silent: dict[str, QueueError] = {}

    @contextlib.contextmanager
    def asking(self, store: str) -> Iterator[None]:
        """Raises QueueError, without asking, for such a store."""
        if store in self._silent:
            raise self._silent[store]
        began = time.monotonic()
        try:
            yield
        except QueueError as error:
            if time.monotonic() - began > PATIENCE:
                self._silent[store] = error
            raise
