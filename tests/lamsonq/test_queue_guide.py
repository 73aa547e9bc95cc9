"""docs/queues.md: every block runs, in every store, and what its tables and sentences claim is asserted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq import events
from lamsonq.deferred import deferrable
from lamsonq.queue import Queue
from lamsonq.testing import drain

from .pages import STORES, Page, Run

PAGE = Page("queues.md")
TRACING = "OpenTelemetry"  # its block needs a library that is no dependency of ours


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
@pytest.mark.parametrize("section", [section for section in PAGE.sections() if section != TRACING])
def test_the_blocks_run(section: str, store: str, read: Callable[[str], Run]) -> None:
    read(store).section(section)


@pytest.mark.parametrize("section", ["Testing", "A store of your own"])
def test_the_tests_that_it_shows_pass(section: str, here: Path, read: Callable[[str], Run]) -> None:
    [path] = [block.path for block in PAGE.of(section) if block.path]
    read("memory").section(section)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_spans_of_a_job_stand_under_the_span_that_put_it(read: Callable[[str], Run], jobs: Queue) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="the block is for those who have OpenTelemetry")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    names = vars(read("memory").section(TRACING))
    assert isinstance(names["OpenTelemetry"].NAMESPACE, str)
    tracer = sdk.TracerProvider().get_tracer("test")
    spans = []

    @deferrable
    def work() -> None:
        spans.append(trace.get_current_span().get_span_context())
        with tracer.start_as_current_span("inner") as span:
            spans.append(span.get_span_context())

    with tracer.start_as_current_span("outer") as outer:
        work.using(queue=jobs).later()
    assert drain(jobs) == 1
    assert {span.trace_id for span in spans} == {outer.get_span_context().trace_id}
    assert spans[0].span_id == outer.get_span_context().span_id
