"""ls, show, stats and export: what is in a queue. They claim nothing, and change nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from lamsonq.commands.options import argument, declare, json_option, option, switch
from lamsonq.commands.queues.opened import STATES, existing, job_state
from lamsonq.commands.queues.printed import (
    RECORD_VERSION,
    body_fields,
    moment,
    print_bytes,
    print_json,
    print_line,
    row,
    shown,
    span,
    summary,
    whole,
)
from lamsonq.errors import Refusal

if TYPE_CHECKING:
    from lamsonq.jobs import Backend, Job
    from lamsonq.reports import Entry

_HEADER_END = re.compile(rb"\r?\n\r?\n")
_FOLDED = re.compile(rb"\r?\n(?=[ \t])")


@declare()
@argument("name", metavar="QUEUE")
@option("state", "Those in this state.", type=STATES, default="ready", metavar="STATE")
@option("limit", "At most so many; 0 is all.", type=click.IntRange(0), default=100, metavar="N")
@json_option
def ls(name: str | None, state: str, limit: int, as_json: bool) -> None:
    """List the messages of one state: key, age, priority, attempts, function, sender and recipients."""
    from lamsonq import clock

    queue, now = existing(name), clock.now()
    keys = queue.backend.keys(state)
    jobs = (summary(job, state, now) for job in _jobs(queue.backend, keys))
    found = jobs if not limit else islice(jobs, limit)
    if as_json:
        print_json({"queue": queue.dir, "state": state, "total": len(keys), "jobs": list(found)})
        return
    for record in found:
        print_line(row(record, now))
    if limit and len(keys) > limit:
        click.echo(f"... and {len(keys) - limit} more: -limit 0 shows all", err=True)
    if not keys and (others := [f"{count} {other} (-state {other})" for other, count in _others(queue.backend, state)]):
        click.echo(f"nothing is {state}; there are {', '.join(others)}", err=True)


def _others(store: Backend, state: str) -> Iterator[tuple[str, int]]:
    """The other states that something is in, and how much."""
    counts = store.counts()
    for other in STATES.choices:
        if other != state and counts.get(other):
            yield other, counts[other]


def _jobs(store: Backend, keys: list[str]) -> Iterator[Job]:
    """Those that are still there when their turn comes."""
    for key in keys:
        job = store.get(key)
        if job is not None:
            yield job


@declare()
@argument("name", metavar="QUEUE")
@argument("key", metavar="KEY")
@switch("body", "Print the message itself, byte for byte; in JSON with all the rest.")
@json_option
def show(name: str | None, key: str | None, body: bool, as_json: bool) -> None:
    """Show one message: its record, its headers and how it has failed."""
    from lamsonq.reports import entries

    store = existing(name).backend
    if not key:
        raise click.UsageError("Give the key of a message.", click.get_current_context())
    state, job = job_state(store, key), store.get(key)
    if job is None:
        raise Refusal(f"message {key!r} of {store.name} cannot be read")
    if body and not as_json:
        print_bytes(job.body)
        return
    headers, failures = _headers(job), entries(store.report(key))
    if not as_json:
        _print_job(whole(job, state), headers, failures)
        return
    told = [
        {"at": entry.at, "attempt": entry.attempt, "reason": entry.reason, "details": entry.details}
        | {"fingerprint": entry.fingerprint}
        for entry in failures
    ]
    print_json(
        {"queue": store.name, **whole(job, state), "headers": headers, "failures": told}
        | (body_fields(job.body) if body else {})
    )


def _headers(job: Job) -> list[tuple[str, str]]:
    """The header of a message, unfolded; nothing where the body is no message (a deferred call's arguments)."""
    if job.body[:1] in (b"{", b"["):
        return []
    head = _FOLDED.sub(b"", _HEADER_END.split(job.body, maxsplit=1)[0])
    pairs = (line.decode("utf-8", "replace").partition(":") for line in head.splitlines())
    return [(name, value.strip()) for name, colon, value in pairs if colon and name and " " not in name]


def _print_job(record: dict[str, Any], headers: list[tuple[str, str]], failures: list[Entry]) -> None:
    for field, value in record.items():
        if field in ("received", "due", "expires"):
            value = moment(value)
        elif isinstance(value, list | dict):
            value = ", ".join(f"{k}={value[k]}" for k in value) if isinstance(value, dict) else ", ".join(value)
        print_line(f"{field + ':':<12}{shown('-' if value is None else str(value))}".rstrip())
    if headers:
        print_line("\n".join(["", *(shown(f"{name}: {value}") for name, value in headers)]))
    for entry in failures:
        print_line(f"\n{moment(entry.at)} attempt {entry.attempt}: {shown(entry.reason)} [{entry.fingerprint}]")
        if entry.details:
            print_line("\n".join(f"  {shown(line)}" for line in entry.details.splitlines()))


@declare()
@argument("name", metavar="QUEUE")
@option("run", "The directory with the pid files of the servers.", default="run", metavar="DIR")
@json_option
def stats(name: str | None, run: str, as_json: bool) -> None:
    """Count a queue: each state, the age of the oldest, whether it is paused; and what the servers do."""
    from lamsonq import clock, survey

    store = existing(name).backend
    counts, born = store.counts(), store.oldest()
    if born is not None and not math.isfinite(born):  # another program has put a moment that is none
        born = None
    age = None if born is None else round(max(0.0, clock.now() - born), 1)
    servers = survey.servers(run)
    record = {"queue": store.name, **counts, "oldest": age, "paused": store.paused(), "servers": servers}
    if as_json:
        print_json(record)
        return
    print_line(f"queue:    {store.name}{' (paused)' if record['paused'] else ''}")
    for state, count in counts.items():
        print_line(f"{state + ':':<10}{count}{_note(state, age)}")
    for server in servers:
        print_line(survey.line(server))


def _note(state: str, age: float | None) -> str:
    if state == "reserved":
        return " (in flight)"
    return f", the oldest {span(age)} old" if state == "ready" and age is not None else ""


@declare()
@argument("name", metavar="QUEUE")
@option("state", "Those in this state, instead of all.", type=STATES, metavar="STATE")
@json_option
def export(name: str | None, state: str | None, as_json: bool) -> None:  # noqa: ARG001 - it always is
    """Print messages as JSON, one a line: record, report, and the body as text or, where it is none, base64."""
    from lamsonq.jobs import STATES

    store = existing(name).backend
    for each in [state] if state else STATES:
        for job in _jobs(store, store.keys(each)):
            body, report = body_fields(job.body), store.report(job.key)
            print_json({"version": RECORD_VERSION, "queue": store.name, **whole(job, each), **body, "report": report})
