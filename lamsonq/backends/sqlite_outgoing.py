"""What a settled job has put into stores that are not in its database.

Rules:

1. It is written down in the transaction that settles the job, at synchronous=FULL, and handed over after that: putting
   is once per key, so that it can be tried again. What is there is struck.
2. What could not be handed over is tried again by the worker as long as it lives, and then by whoever finds it dead.
3. A record has a version; one that is newer is left alone.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lamsonq.backends import address_of, open_backend
from lamsonq.backends.rounds import Round
from lamsonq.backends.sqlite_database import Database
from lamsonq.errors import Dead, Later, QueueError, report_of
from lamsonq.jobs import Backend, Debounce, Done, Gate, Job, Put, Tick
from lamsonq.records import make_ready

VERSION = 1
_INSERT = "insert into lamsonq_outgoing (worker, store, record, body) values (?, ?, ?, ?) returning id"


class _Record(msgspec.Struct, omit_defaults=True):
    """A put, but for store and body."""

    version: int
    job: dict[str, Any]
    outcome: str = ""
    reason: str = ""
    details: str = ""
    at: float | None = None
    counted: bool = True
    debounce: tuple[str, float, bool] | None = None
    tick: tuple[str, float] | None = None
    report: str = ""


make_ready(_Record)


def _encoded(put: Put) -> bytes:
    job = {name: getattr(put.job, name) for name in _FIELDS}
    record = _Record(VERSION, {**job, "metadata": dict(put.job.metadata)}, report=put.report)
    if isinstance(put.outcome, Later | Dead):
        record.outcome = type(put.outcome).__name__
        record.reason, record.details = str(put.outcome), report_of(put.outcome).partition("\n")[2].strip("\n")
    if isinstance(put.outcome, Later):
        record.at, record.counted = put.outcome.at, put.outcome.counted
    if isinstance(put.outcome, Done):
        record.outcome = "Kept" if put.outcome.kept else "Done"
    if isinstance(put.gate, Debounce):
        record.debounce = put.gate.key, put.gate.window, put.gate.always_delay
    elif isinstance(put.gate, Tick):
        record.tick = put.gate.key, put.gate.at
    # msgspec itself takes no text that is no Unicode, and an envelope may be such
    return json.dumps(msgspec.to_builtins(record)).encode()


_FIELDS = (
    *("key", "sender", "recipients", "peer", "target", "received", "due", "expires", "priority", "unique"),
    *("deliveries", "attempts"),
)


def _decoded(store: Backend, data: bytes, body: bytes) -> Put:
    """Raises ValueError, also for a newer version."""
    record = msgspec.convert(json.loads(data), _Record)
    if record.version > VERSION:
        raise ValueError("a newer version has written it")
    outcome: Later | Dead | Done | None = None
    if record.outcome == "Later":
        outcome = Later(record.reason, record.at, counted=record.counted)
    elif record.outcome == "Dead":
        outcome = Dead(record.reason)
    elif record.outcome:
        outcome = Done(kept=record.outcome == "Kept")
    if record.details and isinstance(outcome, Later | Dead):
        outcome.add_note(record.details)
    gate: Gate | None = None
    if record.debounce is not None:
        gate = Debounce(*record.debounce)
    elif record.tick is not None:
        gate = Tick(*record.tick)
    fields = {**record.job, "recipients": tuple(record.job["recipients"])}
    return Put(store, Job(body=body, **fields), outcome, gate, record.report)


def write_down(connection: sqlite3.Connection, worker: str, puts: Sequence[Put]) -> list[int]:
    """Rule 1, in the transaction that is open; the numbers of the rows."""
    numbers = []
    for put in puts:
        values = (worker, address_of(put.store), _encoded(put), put.job.body)
        [(number,)] = connection.execute(_INSERT, values).fetchall()
        numbers.append(number)
    return numbers


class Outgoing:
    """Hands over what one worker has put into other stores."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._left: dict[int, Put] = {}
        self._complained: set[str] = set()

    def hand_over(self, puts: Mapping[int, Put]) -> dict[int, bool]:
        """What `put` says of each; True for those that are to be tried again."""
        results = dict.fromkeys(puts, True)
        for store in {id(put.store): put.store for put in puts.values()}.values():
            numbers = [number for number, put in puts.items() if put.store is store]
            try:
                kept = store.put([puts[number] for number in numbers])
                results.update(zip(numbers, kept, strict=True))
                self._strike(numbers)
            except Exception as error:  # whatever it is: the job is settled, and this is to be there in the end
                self._left.update((number, puts[number]) for number in numbers)
                self._complain(store.name, error)
        return results

    def retry(self) -> None:
        """Try again what is left."""
        if self._left:
            left, self._left = self._left, {}
            self.hand_over(left)

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return not self._left

    def inherit(self, worker: str) -> bool:
        """Hand over what a dead worker has left; whether nothing is left of it."""
        query = "select id, store, record, body from lamsonq_outgoing where worker = ? order by id"
        complete, this_round = True, Round()
        for number, name, record, body in self._database.rows(query, worker):
            try:
                with this_round.asking(name):
                    store = open_backend(name)
                    store.put([_decoded(store, record, body)])
                self._strike([number])
            except Exception as error:  # a newer version's record, a store that is down or gone
                self._complain(name, error)
                complete = False
        return complete

    def _strike(self, numbers: Sequence[int]) -> None:
        delete = "delete from lamsonq_outgoing where id = ?"
        try:
            self._database.write(lambda connection: connection.executemany(delete, [(n,) for n in numbers]) and None)
        except QueueError as error:  # it will be put once more, which changes nothing
            logging.warning("%s", error)

    def _complain(self, name: str, error: Exception) -> None:
        if name not in self._complained:
            text = "%s: what a settled job has put into %s is not there yet, and is tried again: %s"
            logging.error(text, self._database.path, name, error)
            self._complained.add(name)
