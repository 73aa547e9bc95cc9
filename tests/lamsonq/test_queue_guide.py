"""docs/queues.md: every block runs, in every store, and what its tables and sentences claim is asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq import events
from lamsonq.backends import _own
from .pages import STORES, Page, Run

PAGE = Page("queues.md")


@pytest.fixture(autouse=True)
def nobody_listens() -> Iterator[None]:
    yield
    events.clear_event_consumers()
    events.clear_metadata_producer_consumers()


@pytest.fixture
def read(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Run]]:
    """`read("sqlite")` begins a session."""
    monkeypatch.syspath_prepend(str(here))
    runs: list[Run] = []

    def begin(store: str) -> Run:
        runs.append(Run(PAGE, store))
        monkeypatch.setenv("LAMSONQ_QUEUE", runs[-1].url("jobs"))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("section", PAGE.sections())
def test_the_blocks_run(section: str, store: str, read: Callable[[str], Run]) -> None:
    read(store).section(section)
