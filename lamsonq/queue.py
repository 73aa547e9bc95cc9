"""Queues as handlers see them: `Queue("run/posts").push(message)`.

Rules:

1. What a handler pushes waits until the handler has returned, and is dropped when it raises; `now=True` acts at once,
   and may therefore repeat when the handler is tried again.
2. A message in a queue keeps what came in: its bytes, but for headers that a handler changed, and beside them the
   envelope that it came with.
3. A message of a handler has the one recipient that the handler was called for; a receiver's spool has all of them.

The class has the methods of Lamson's, and works with any backend (lamsonq/backends/).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from email.message import Message
from typing import Any

from lamsonq import about, attempt, clock, events
from lamsonq.address import canonical
from lamsonq.backends import open_backend
from lamsonq.envelope import Envelope, restored, session_of
from lamsonq.errors import Later, QueueError
from lamsonq.jobs import DONE, Backend, Gate, Job, Put
from lamsonq.mail import MailRequest
from lamsonq.policy import priority_of
from lamsonq.response import MailResponse

Moment = float | timedelta | datetime
"""Seconds from now, or a moment."""

Pushable = MailRequest | MailResponse | Message | bytes | str


class Queue:
    """A queue by its directory or URL. Cheap to make: the store behind it is shared within the process.

    With `pop_limit` (bytes, 0 = none) a larger message is not handed out but moved into the maildir `oversize_dir`, or
    to the dead letters. `safe` is Lamson's, and always so. Raises BrokerError for a URL that no backend serves.

    Source: Lamson's and Salmon's `queue.Queue`.
    """

    def __init__(
        self,
        queue_dir: str | os.PathLike[str],
        safe: bool = False,  # noqa: ARG002 - Lamson's
        pop_limit: int = 0,
        oversize_dir: str | None = None,
    ) -> None:
        self.dir = os.fspath(queue_dir).removeprefix("maildir:")
        self.pop_limit = pop_limit
        self.oversize_dir = oversize_dir
        self.backend = open_backend(self.dir, pop_limit=pop_limit, oversize_dir=oversize_dir)

    def push(
        self,
        message: Pushable,
        now: bool = False,
        *,
        delay: Moment | None = None,
        expires: Moment | None = None,
        priority: int = 0,
        unique: str | None = None,
        conn: object = None,
    ) -> str:
        """Queue a message; its key, or "" where another with the same `unique` waits already.

        It is handled after `delay` and not after `expires` (seconds from now, or a datetime); `priority` 0 comes first.
        `conn` is a connection to the queue's own database: the message is there when its transaction has committed.
        Raises QueueError, whose `data` is the message; TypeError for what is none; LeaseLost in a handler that has been
        given up because it took too long.
        """
        at = clock.now()
        job = job_of(message, new_key(self.backend))
        wishes: dict[str, Any] = {}  # most messages come without any, and are not to pay for a second record
        if delay is not None:
            wishes["due"] = moment(delay, at)
        if expires is not None:
            wishes["expires"] = moment(expires, at)
        if priority:
            wishes["priority"] = priority_of(priority)
        if unique is not None:
            wishes["unique"] = unique
        if produced := events.produced():
            wishes["metadata"] = {**produced, **job.metadata}
        if wishes:
            job = replace(job, **wishes)
        try:
            return self.enqueue(job, now=now, conn=conn) or ""
        except QueueError as error:
            error.data = message
            raise

    def enqueue(self, job: Job, *, gate: Gate | None = None, now: bool = False, conn: object = None) -> str | None:
        """Put a job; its key, or None where `unique` or the gate let it go. In a handler it leaves with its success.

        Raises QueueError, LeaseLost; ValueError for one that would expire before it is due.
        """
        if job.due is not None and job.expires is not None and job.due > job.expires:
            raise ValueError(f"{job.target or 'the message'}: it would be due after it has expired, and never run")
        if not isinstance(job.unique, str | None):
            raise TypeError(f"unique is a text, not {job.unique!r}")
        put = Put(self.backend, job, gate=gate)
        running = attempt.current()
        if running is not None and not now and conn is None:
            running.put(put)
            return job.key
        [kept] = self.backend.put([put], conn) if conn is not None else self.backend.put([put])
        events.tell_puts([put], [kept])
        return job.key if kept else None

    def keep(self, jobs: Sequence[Job]) -> None:
        """Put what a receiver has taken, all of it at once. Raises QueueError, and then none of it is kept."""
        made = events.produced()
        puts = [Put(self.backend, replace(job, metadata={**made, **job.metadata}) if made else job) for job in jobs]
        events.tell_puts(puts, self.backend.put(puts))

    def new_key(self) -> str:
        """A key that nothing else has."""
        return self.backend.new_key()

    def pop(self) -> tuple[str, MailRequest] | tuple[None, None]:
        """Take the oldest ready message out of the queue: for scripts, because it is gone even if they fail then.

        (None, None) when none is ready. Raises QueueError.
        """
        for job in self.backend.reserve(1):
            try:
                message = message_of(job, self.dir)
            except Exception:  # whatever it is, the message must not stay claimed
                self.backend.settle(job, Later(counted=False))
                raise
            self.backend.settle(job, DONE)
            return job.key, message
        return None, None

    def get(self, key: str) -> MailRequest | None:
        """A message without taking it, in whatever state it is; None when there is none of this key."""
        job = self.backend.get(key)
        return None if job is None else message_of(job, self.dir)

    def remove(self, key: str) -> None:
        """Delete a message that nobody works on; nothing happens when there is none."""
        self.backend.remove(key)

    def keys(self) -> list[str]:
        """The keys of the ready messages, oldest first."""
        return self.backend.keys()

    def count(self) -> int:
        """How many messages are ready."""
        return self.backend.counts()["ready"]

    __len__ = count

    def __bool__(self) -> bool:
        return True  # an empty queue is still a queue

    def clear(self) -> None:
        """Delete every ready message. What is delayed, dead or being worked stays."""
        for key in self.keys():
            self.remove(key)

    def oversize(self, key: str) -> tuple[bool, str]:
        """Whether a message is over `pop_limit`, and where it lies. Raises KeyError."""
        job = self.backend.get(key)
        if job is None:
            raise KeyError(key)
        path_of = getattr(self.backend, "path_of", None)  # only a store of files has it
        too_large = bool(self.pop_limit) and len(job.body) > self.pop_limit
        return too_large, str(path_of(key) if path_of else self.dir)

    def __repr__(self) -> str:
        return f"<Queue {self.dir}>"


def moment(when: Moment, now: float) -> float:
    """Seconds since the epoch. Raises TypeError or ValueError for what is no moment."""
    if isinstance(when, datetime):
        return when.timestamp()
    span = when.total_seconds() if isinstance(when, timedelta) else when
    if isinstance(span, bool) or not isinstance(span, int | float):
        raise TypeError(f"a moment is a number of seconds from now, a timedelta or a datetime, not {when!r}")
    if not math.isfinite(span):
        raise ValueError(f"{when} is no moment")
    return now + span


def queue_of(deliver: object) -> Queue | None:
    """The queue whose push this is; None for every other callable, also for one that only ends in a push."""
    owner = getattr(deliver, "__self__", None)
    return owner if isinstance(owner, Queue) and getattr(deliver, "__func__", None) is Queue.push else None


def new_key(backend: Backend) -> str:
    """A key for what is to be kept: made from the id of the message that is being received, if there is one."""
    return about.current().next_key() or backend.new_key()


def message_of(job: Job, name: str) -> MailRequest:
    """The message in a job of the queue `name`: the queue is its Peer, the original peer stands in the envelope."""
    return MailRequest(name, job.sender, list(job.recipients), job.body, envelope=envelope_of(job))


def envelope_of(job: Job) -> Envelope:
    """The envelope that a job was made from."""
    return restored(job.sender, job.recipients, job.peer, job.received, job.metadata)


def job_of(message: Pushable, key: str) -> Job:
    """The job that keeps a message. Raises TypeError for what is no message."""
    if isinstance(message, MailRequest):
        return _job_of_request(message, key)
    now = clock.now()
    if isinstance(message, MailResponse):
        recipients = tuple(message.recipients)
        return Job(key=key, body=message.to_bytes(), sender=message.sender, recipients=recipients, received=now)
    if isinstance(message, Message):
        return Job(key=key, body=message.as_bytes(), received=now)
    if isinstance(message, str):
        return Job(key=key, body=message.encode("utf-8", "surrogateescape"), received=now)
    if isinstance(message, bytes | bytearray | memoryview):
        return Job(key=key, body=bytes(message), received=now)
    raise TypeError(
        f"a queue takes a MailRequest, MailResponse, email Message, bytes or str, not {type(message).__name__}"
    )


def _job_of_request(message: MailRequest, key: str) -> Job:
    envelope = message.envelope
    wanted = message.route_to if len(message.route_to) > 1 else [message.To] if message.To else []
    as_received = {canonical(path): path for path in envelope.rcpt_tos}
    sender: str | None = envelope.mail_from
    if sender is None:
        sender = message.From or None
    elif canonical(sender) != message.From:
        sender = message.From
    return Job(
        key=key,
        body=message.to_bytes(),
        sender=sender,
        recipients=tuple(as_received.get(recipient, recipient) for recipient in wanted),
        peer=_peer_text(envelope.peer),
        received=envelope.received or clock.now(),
        metadata=session_of(envelope),
    )


def _peer_text(peer: object) -> str | None:
    """A socket's address as people write it; a queue's name as it is."""
    if isinstance(peer, tuple) and len(peer) >= 2:
        host, port = str(peer[0]), peer[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return None if peer is None else str(peer)
