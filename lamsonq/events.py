"""What happens to jobs, told to whoever wants to know, and what travels with them from the producer to the consumer.

    class Counter:
        def on_error(self, job):
            ...

    register_event_consumer(Counter())

The events are Deferrable's ten and the worker's own; each is a method `on_<event>(job)`:

    push            kept in a queue                        pop             claimed by a worker
    complete        settled, whatever its outcome          expire          came too late, and was not run
    retry           failed, and comes again                error           failed for good: a dead letter
    debounce_miss   a debounced job was kept               debounce_hit    one was not, because another waits
    debounce_error  its window could not be computed       empty           nothing is ready (job is None)
    release         given back uncounted                   lease_lost      somebody else has it: the result was dropped
    start, stop     a worker begins, has ended (job is None)

Rules:

1. A consumer is called in the thread where it happens, in the order of registration. What it raises, SystemExit as
   well, is logged and changes nothing: who only looks on cannot lose a job.
2. What a handler pushes is pushed when the handler has succeeded, so that is when `push` is told.
3. Metadata is text under a namespace of its own. What a producer makes that is no text travels as JSON.

Source: Deferrable's event consumers and metadata producer/consumers.
"""

from __future__ import annotations

import contextvars
import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from lamsonq.errors import Dead, Later, reason_of
from lamsonq.jobs import Debounce, Expired, Job, Outcome, Put

__all__ = [
    "MetadataProducerConsumer",
    "TraceContext",
    "clear_event_consumers",
    "clear_metadata_producer_consumers",
    "register_event_consumer",
    "register_metadata_producer_consumer",
]

_JSON = ".json"


class MetadataProducerConsumer(Protocol):
    """Adds something to every job that is put, and takes note of it where the job is run."""

    NAMESPACE: str

    def produce_metadata(self) -> Any:
        """What travels with a job: text, or what JSON can carry; None for nothing."""

    def consume_metadata(self, metadata: Any) -> None:
        """Called before the job's function, in its context, with what was produced."""


_consumers: list[object] = []
_metadata: dict[str, MetadataProducerConsumer] = {}


def register_event_consumer(consumer: object) -> None:
    """Call the `on_<event>(job)` methods that this object has."""
    _consumers.append(consumer)


def clear_event_consumers() -> None:
    """Tell nobody any more."""
    _consumers.clear()


def register_metadata_producer_consumer(both: MetadataProducerConsumer) -> None:
    """Let this object add to every job from now on. Raises ValueError without a NAMESPACE, or for one that is taken."""
    namespace = getattr(both, "NAMESPACE", None)
    if not namespace or not isinstance(namespace, str):
        raise ValueError(f"{both!r} needs a NAMESPACE, a word that no other producer of metadata has")
    if namespace in _metadata:
        raise ValueError(f"the namespace {namespace!r} is taken by {_metadata[namespace]!r}")
    _metadata[namespace] = both


def clear_metadata_producer_consumers() -> None:
    """Add nothing to jobs any more."""
    _metadata.clear()


def tell(event: str, job: Job | None) -> None:
    """Something has happened to this job."""
    for consumer in list(_consumers):
        try:
            method = getattr(consumer, f"on_{event}", None)
            if method is not None:
                method(job)
        except (Exception, SystemExit) as error:  # anybody's code: rule 1
            logging.exception("%r failed at on_%s: %s", consumer, event, reason_of(error))


def tell_puts(puts: Iterable[Put], kept: Sequence[bool]) -> None:
    """These were put; `kept` tells of each whether it was let in."""
    if not _consumers:
        return
    for put, was_kept in zip(puts, kept, strict=True):
        if isinstance(put.gate, Debounce):
            tell("debounce_miss" if was_kept else "debounce_hit", put.job)
        if was_kept:
            tell("push", put.job)


def tell_settled(job: Job, outcome: Outcome) -> None:
    """A worker has settled this job."""
    if not _consumers:
        return
    if isinstance(outcome, Later) and not outcome.counted:
        tell("release", job)
        return
    if isinstance(outcome, Expired):
        tell("expire", job)
    elif isinstance(outcome, Dead):
        tell("error", job)
    elif isinstance(outcome, Later):
        tell("retry", job)
    tell("complete", job)


def produced(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata of a job that is put now: what the producers make, and `given` before all of it."""
    found: dict[str, str] = {}
    for namespace, producer in _metadata.items():
        try:
            value = producer.produce_metadata()
            if isinstance(value, str):
                found[namespace] = value
            elif value is not None:
                found[namespace + _JSON] = json.dumps(value)
        except (Exception, SystemExit):  # anybody's code: a job without its metadata is better than none
            logging.exception("the metadata %s could not be produced", namespace)
    return found | dict(given or {})


def consume(metadata: Mapping[str, str]) -> None:
    """Let everybody take note of what has travelled with a job; called in the context in which its function runs."""
    for namespace, consumer in _metadata.items():
        try:
            if namespace in metadata:
                consumer.consume_metadata(metadata[namespace])
            elif namespace + _JSON in metadata:
                consumer.consume_metadata(json.loads(metadata[namespace + _JSON]))
        except (Exception, SystemExit):  # anybody's code, on anybody's data
            logging.exception("the metadata %s could not be consumed", namespace)


class TraceContext:
    """The W3C `traceparent` of what put a job, in `current()` of what runs it; a producer without one begins a trace.

    A tracer of your own is ten lines of the same form: produce the header of the current span, consume by starting a
    span under it. Source: https://www.w3.org/TR/trace-context/ section 3.2.
    """

    NAMESPACE = "traceparent"

    def __init__(self) -> None:
        self._current: contextvars.ContextVar[str | None] = contextvars.ContextVar("traceparent", default=None)

    def current(self) -> str | None:
        """The traceparent of what is being run."""
        return self._current.get()

    def produce_metadata(self) -> str:
        current = self._current.get()
        trace = current.split("-")[1] if current else secrets.token_hex(16)
        return f"00-{trace}-{secrets.token_hex(8)}-01"

    def consume_metadata(self, metadata: str) -> None:
        parts = metadata.split("-")
        if [len(part) for part in parts[:4]] == [2, 32, 16, 2] and set(parts[1]) != {"0"}:
            self._current.set(metadata)
