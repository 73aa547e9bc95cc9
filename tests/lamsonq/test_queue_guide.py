"""docs/queues.md: every block runs, in every store, and what its tables and sentences claim is asserted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq import events

from .pages import STORES, Page, Run

PAGE = Page("queues.md")
WITHOUT = {"opentelemetry": importlib.util.find_spec("opentelemetry") is None}
"""What a block needs that is no dependency of ours, and whether it is missing here."""


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
        runs.append(Run(PAGE, store, WITHOUT))
        monkeypatch.setenv("LAMSONQ_QUEUE", runs[-1].url("jobs"))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("section", PAGE.sections())
def test_the_blocks_run(section: str, store: str, read: Callable[[str], Run]) -> None:
    read(store).section(section)


@pytest.mark.parametrize("section", ["Testing", "A store of your own"])
def test_the_tests_that_it_shows_pass(section: str, here: Path, read: Callable[[str], Run]) -> None:
    [path] = [block.path for block in PAGE.of(section) if block.path]
    read("memory").section(section)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
