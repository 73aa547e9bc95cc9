"""Confirmations: a message waits until its sender has answered a mail that only he can have got.

    CONFIRM = ConfirmationEngine("run/pending", SQLiteConfirmationStorage("run/confirm.db"))

    @route("(list_name)@(host)")
    def START(message, list_name=None, host=None):
        if not CONFIRM.send(settings.relay, list_name, message, "confirm.msg", locals()):
            return None
        return CONFIRMING

    @route("(list_name)-confirm-(id_number)@(host)", id_number="[a-z0-9]+")
    def CONFIRMING(message, list_name=None, id_number=None, host=None):
        original = CONFIRM.verify(list_name, message["from"], id_number)
        if original is None:
            return None
        Queue("run/posts").push(original)
        return START

Rules:

1. What waits lies in the pending queue, which belongs to one engine alone; the storage says which secret, by which
   sender, for what (`target`) sets which message free. The latest registration of a sender for a target counts.
2. In a handler, the pending message leaves with the handler's success, as everything that is pushed. Before that
   nothing can be confirmed. When the handler is tried again the same message gets the same address again, so that
   a confirmation mail that has gone out by then is good.
3. A secret is taken once, whoever comes with it at the same time, in threads or in processes. Outside of handlers it
   is used up at once. In a handler it is used up with the handler's success; until then others wait, for a moment and
   then with a Later, and when the handler fails, the next one may take it. When its process dies, the message that it
   worked on may take it when it comes again, and no other: nobody knows whether it had succeeded.
4. A confirmation expires. `purge` deletes what nobody can confirm any more: call it once a day.
5. Nothing is sent to programs, and no message of a program (an absence notice) confirms anything (RFC 3834).
6. Secrets are compared in constant time and never logged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lamsonq import attempt, clock, view
from lamsonq.address import bare_address, is_path_address
from lamsonq.attempt import ELSEWHERE_PATIENCE, PATIENCE, Attempt
from lamsonq.errors import Later, LeaseLost, SMTPError, UsageError
from lamsonq.jobs import Damaged, Job, Put
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.queue import Queue, job_of, message_of
from lamsonq.state import Conversations

LOG = logging.getLogger("confirm")

EXPIRES = 7 * 24 * 3600.0
"""Seconds for which a confirmation is waited for."""

UNFINISHED = 24 * 3600.0
"""Seconds after which a registration without a pending message is given up: its handler never succeeded."""

_REGISTERED = "registered"


class Confirmation(NamedTuple):
    """One confirmation that is waited for; `stored` is seconds since the epoch."""

    target: str
    from_address: str
    secret: str
    pending_id: str
    stored: float


class ConfirmationStorage:
    """Confirmations in a dict, or in whatever acts like one: `ConfirmationStorage(shelve.open("run/confirmations"))`.

    The base for storages of one's own: override `clear`, `get`, `delete` and `store`, which have to be durable on
    return; and `entries`, if `purge` is to be used. One that several processes share has a `lock_file`, and its own
    `take`, `claim` and `release`. A target never holds a colon.

    Source: Lamson's and Salmon's `confirm.ConfirmationStorage`.
    """

    lock_file: str | None = None
    """Where the processes that share this storage lock what they are about to take; None: they are one process."""

    def __init__(self, db: MutableMapping[str, Any] | None = None) -> None:
        self.confirmations: MutableMapping[str, Any] = {} if db is None else db

    def clear(self) -> None:
        """Forget everything."""
        self.confirmations.clear()

    def key(self, target: str, from_address: str) -> str:
        """What one confirmation is kept under: `target:joe@example.com`, in lower case."""
        key = f"{target}:{bare_address(from_address) or from_address}".lower()
        return key.encode("utf-8", "backslashreplace").decode()  # half a character would not go into a file

    def get(self, target: str, from_address: str) -> tuple[str, str] | tuple[None, None]:
        """(secret, pending id), or (None, None)."""
        found = self.confirmations.get(self.key(target, from_address))
        return (found[0], found[1]) if found else (None, None)

    def delete(self, target: str, from_address: str) -> None:
        """Forget one; nothing happens when there is none."""
        self.confirmations.pop(self.key(target, from_address), None)

    def store(self, target: str, from_address: str, expected_secret: str, pending_message_id: str) -> None:
        """Keep one, in place of an earlier one of this target and sender."""
        with _TAKING:
            self.confirmations[self.key(target, from_address)] = (expected_secret, pending_message_id, time.time())

    def take(self, target: str, from_address: str, secret: str) -> str | None:
        """Forget one if that is its secret, in one step: its pending id, None when it is not or somebody was faster."""
        with _TAKING:
            expected, pending_id = self.get(target, from_address)
            if not _is_secret(expected, secret):
                return None
            self.delete(target, from_address)
            return pending_id

    def claim(self, target: str, from_address: str, secret: str, taker: str) -> bool:  # noqa: ARG002
        """Keep one for this taker, in one step; False when it has another secret or is another taker's.

        "" is who only asks. What ends with its process need not remember the taker: the engine has a lock.
        """
        return _is_secret(self.get(target, from_address)[0], secret)

    def release(self, target: str, from_address: str, taker: str) -> None:
        """Let others take what this taker has claimed."""

    def entries(self) -> Iterable[Confirmation]:
        """All of them. Raises NotImplementedError for a storage that keeps them in a place of its own."""
        if type(self).store is not ConfirmationStorage.store:
            raise NotImplementedError(f"{type(self).__name__} needs entries() -> Confirmations, for purge()")
        for key, (secret, pending_id, *stored) in list(self.confirmations.items()):
            target, _, sender = key.partition(":")
            yield Confirmation(target, sender, secret, pending_id, stored[0] if stored else 0.0)


_TAKING = threading.RLock()  # a `get` of one's own may well call `store`

_SCHEMAS = (
    """
create table if not exists confirmations (
    key     text primary key,
    secret  text not null,
    pending text not null,
    stored  real not null
) without rowid
""",
    "alter table confirmations add column taker text not null default ''",
)
"""What makes each version of the last."""
_SCHEMA_VERSION = len(_SCHEMAS)
_GET = "select secret, pending, taker from confirmations where key = ?"
_DELETE = "delete from confirmations where key = ?"
_STORE = "insert or replace into confirmations (key, secret, pending, stored) values (?, ?, ?, ?)"


class SQLiteConfirmationStorage(ConfirmationStorage):
    """Confirmations in one SQLite file, shared by any number of processes; they survive power failures.

    The file is made when it is first used. What cannot be read or written just now is a Later.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.lock_file = f"{self.path}-taking"

    def clear(self) -> None:
        with self._database() as database:
            database.execute("delete from confirmations")

    def get(self, target: str, from_address: str) -> tuple[str, str] | tuple[None, None]:
        with self._database() as database:
            found = database.execute(_GET, (self.key(target, from_address),)).fetchone()
        return (found[0], found[1]) if found else (None, None)

    def delete(self, target: str, from_address: str) -> None:
        with self._database() as database:
            database.execute(_DELETE, (self.key(target, from_address),))

    def take(self, target: str, from_address: str, secret: str) -> str | None:
        key = (self.key(target, from_address),)
        with self._transaction() as database:  # compared here, not in SQL: in constant time
            expected, pending_id, _ = database.execute(_GET, key).fetchone() or (None, None, "")
            if not _is_secret(expected, secret):
                return None
            database.execute(_DELETE, key)
        return str(pending_id)

    def claim(self, target: str, from_address: str, secret: str, taker: str) -> bool:
        key = self.key(target, from_address)
        with self._transaction() as database:
            expected, _, claimed = database.execute(_GET, (key,)).fetchone() or (None, None, "")
            if not _is_secret(expected, secret) or claimed not in ("", taker):
                return False
            if taker != claimed:
                database.execute("update confirmations set taker = ? where key = ?", (taker, key))
        return True

    def release(self, target: str, from_address: str, taker: str) -> None:
        statement = "update confirmations set taker = '' where key = ? and taker = ?"
        with self._database() as database:
            database.execute(statement, (self.key(target, from_address), taker))

    def store(self, target: str, from_address: str, expected_secret: str, pending_message_id: str) -> None:
        values = (self.key(target, from_address), expected_secret, pending_message_id, time.time())
        with self._database() as database:
            database.execute(_STORE, values)

    def entries(self) -> Iterable[Confirmation]:
        with self._database() as database:
            rows = database.execute("select key, secret, pending, stored from confirmations").fetchall()
        for key, secret, pending_id, stored in rows:
            target, _, sender = key.partition(":")
            yield Confirmation(target, sender, secret, pending_id, stored)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each use: they are rare, and so no thread and no fork can share one.

        SQLite's defaults, a journal that is deleted and full syncs, are what is wanted here.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)  # secrets: for nobody else to read
            with closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as database:
                self._check_version(database)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise Later(
                f"cannot use the confirmations in {self.path}: {error}; check the file and its folder"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._database() as database:
            database.execute("begin immediate")
            yield database
            database.execute("commit")

    def _check_version(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("pragma user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise Later(f"{self.path} was written by a newer lamsonq (schema {version}); it is left untouched")
        if version < _SCHEMA_VERSION:
            database.execute("begin immediate")
            (version,) = database.execute("pragma user_version").fetchone()  # another process may have been faster
            for statement in _SCHEMAS[version:]:
                database.execute(statement)
            database.execute(f"pragma user_version = {_SCHEMA_VERSION}")
            database.execute("commit")


class Keeps(Protocol):
    """What Lamson asks of a storage."""

    def clear(self) -> object: ...
    def get(self, target: str, from_address: str, /) -> tuple[str, str] | tuple[None, None]: ...
    def delete(self, target: str, from_address: str, /) -> object: ...
    def store(self, target: str, from_address: str, secret: str, pending_id: str, /) -> object: ...


class _Adopted(ConfirmationStorage):
    """A storage that is derived from nothing of ours, as Lamson's users have them, for one process."""

    def __init__(self, own: Keeps) -> None:
        self._own = own

    def clear(self) -> None:
        self._own.clear()

    def get(self, target: str, from_address: str) -> tuple[str, str] | tuple[None, None]:
        return self._own.get(target, from_address)

    def delete(self, target: str, from_address: str) -> None:
        self._own.delete(target, from_address)

    def store(self, target: str, from_address: str, expected_secret: str, pending_message_id: str) -> None:
        self._own.store(target, from_address, expected_secret, pending_message_id)

    def entries(self) -> Iterable[Confirmation]:
        raise NotImplementedError(f"{type(self._own).__name__} has to be a ConfirmationStorage, for purge()")


class Delivers(Protocol):
    """Whatever sends: a Relay."""

    def deliver(self, message: MailResponse) -> object: ...


class ConfirmationEngine:
    """Registers messages and sets them free.

    `pending_queue_dir` is the queue in which they wait, `expires` is in seconds, `clock` gives seconds since the epoch.
    A storage that only has Lamson's `clear get delete store` is good for one process.

    Source: Lamson's and Salmon's `confirm.ConfirmationEngine`.
    """

    def __init__(
        self,
        pending_queue_dir: str | os.PathLike[str],
        storage: ConfirmationStorage | Keeps,
        *,
        expires: float = EXPIRES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.pending = Queue(pending_queue_dir)
        self.storage = storage if isinstance(storage, ConfirmationStorage) else _Adopted(storage)
        self.expires = expires
        self._clock = clock

    # The pending messages.

    def get_pending(self, pending_id: str) -> MailRequest | None:
        """A message that waits, or has waited: it stays until `purge` or `delete_pending`."""
        return self.pending.get(pending_id)

    def push_pending(self, message: MailRequest) -> str:
        """Let a message wait, without a confirmation; its id. In a handler it is there when that has succeeded."""
        store = self.pending.backend
        job = job_of(message, store.new_key())
        job = replace(job, metadata={**job.metadata, _REGISTERED: repr(self._clock())})
        attempt.publish([Put(store, job)])
        return job.key

    def delete_pending(self, pending_id: str) -> None:
        """Delete a message that waits."""
        self.pending.remove(pending_id)

    # Confirmations.

    def make_random_secret(self) -> str:
        """96 random bits, as digits that go into an address."""
        return secrets.token_hex(12)

    def register(self, target: str, message: MailRequest) -> str:
        """Let the message wait for a confirmation; the local part of the address that confirms it.

        That is `<target>-confirm-<secret>`. Raises SMTPError (553) for a target that makes no address of it.
        """
        sender = sender_of(message)
        secret = self._unfinished(target, sender, message) or self._new_secret(message)
        address = f"{target}-confirm-{secret}"
        if not target or not is_path_address(f"{address}@localhost"):
            raise SMTPError(553, f"{target!r} is too long, or no name, to be confirmed by mail")
        self.storage.store(target, sender, secret, self.push_pending(message))
        return address

    def _new_secret(self, message: MailRequest) -> str:
        secret = self.make_random_secret()
        return secret + _mark(secret, message)

    def _unfinished(self, target: str, sender: str, message: MailRequest) -> str | None:
        """The secret under which this very message was registered by a handler that has not succeeded (rule 2)."""
        secret, pending_id = self.storage.get(target, sender)
        if secret is None or pending_id is None or self.pending.backend.get(pending_id) is not None:
            return None
        return secret if _same(secret[-_MARK_DIGITS:], _mark(secret[:-_MARK_DIGITS], message)) else None

    def verify(self, target: str, from_address: str | None, expect_secret: str) -> MailRequest | None:
        """The message that this secret sets free; None when it does not, or no longer.

        `from_address` is who answers, `message["from"]`. The message stays in the pending queue. Raises Later while a
        handler that has verified this secret still runs.
        """
        running = attempt.current()
        if running is not None and running.given_up:
            raise LeaseLost("the handler took too long; this attempt was given up, and confirms nothing")
        if running is not None and running.message.is_automatic:
            LOG.info("A confirmation for %.200r by %.200r is ignored: no person wrote it.", target, from_address)
            return None
        job = self._take(target, from_address or "", expect_secret, running)
        if job is None:
            LOG.info("A confirmation for %.200r by %.200r is refused.", target, from_address)
            return None
        return message_of(job, self.pending.dir)

    def _take(self, target: str, from_address: str, secret: str, running: Attempt | None) -> Job | None:
        """The pending message, for this attempt or outside of one."""
        job = self._waiting(target, from_address, secret)
        if job is None:
            return None  # those who guess lock nobody out
        key, claims = job.key, _claims(self.storage.lock_file)
        if claims.has(key, running):
            return job

        def give_back() -> None:
            claims.end(key, running, lambda: self.storage.release(target, from_address, _taker(running)))

        def use_up() -> None:
            claims.end(key, running, lambda: self.storage.take(target, from_address, secret))

        if not claims.wait(key, running, give_back):
            return None
        mine = False
        try:
            mine = self._claim(key, target, from_address, secret, running)
        finally:
            if not mine or running is None:
                claims.end(key, running)
        if mine and running is not None:
            running.afterwards(use_up)
            running.otherwise(give_back)
        return job if mine else None

    def _claim(self, key: str, target: str, from_address: str, secret: str, running: Attempt | None) -> bool:
        """Whether it is this attempt's, or outside of one is taken, unless whoever had it before has done so."""
        job = self._waiting(target, from_address, secret)
        if job is None or job.key != key or not self.storage.claim(target, from_address, secret, _taker(running)):
            return False
        return running is not None or self.storage.take(target, from_address, secret) == key

    def _waiting(self, target: str, from_address: str, secret: str) -> Job | None:
        """The message that waits for this secret, unless it has waited for too long."""
        expected, pending_id = self.storage.get(target, from_address)
        if pending_id is None or not _is_secret(expected, secret):
            return None
        job = self.pending.backend.get(pending_id)
        if job is None or isinstance(job, Damaged) or self._age(job.metadata, job.received) > self.expires:
            return None
        return job

    def cancel(self, target: str, from_address: str, expect_secret: str) -> None:
        """Forget a confirmation and delete its message, if that is the secret."""
        pending_id = self.storage.take(target, from_address, expect_secret)
        if pending_id is not None:
            self.delete_pending(pending_id)

    def send(self, relay: Delivers, target: str, message: MailRequest, template: str, vars: Mapping[str, Any]) -> bool:
        """Register the message and ask its sender to confirm it; False when nobody is there to be asked.

        `template` is the text, as Lamson's, or begins with headers. It gets `vars`, which need `host`, and
        `confirm_address`, `target` and `message`. The mail comes from `confirm_address@host`, and its subject is
        "Confirmation required", unless its headers say other; answers go to `confirm_address@host` in any case.

        Raises UsageError for what the template needs, SMTPError as `register`, and what the relay raises.
        """
        if "host" not in vars:
            raise UsageError("confirm.send needs vars['host']: the domain that the answer comes back to")
        to = sender_of(message)
        if message.is_automatic or not to:
            LOG.info("Not asking %r for a confirmation: no person wrote that message.", message.From)
            return False
        confirm_address = self.register(target, message)
        reply_to = f"{confirm_address}@{vars['host']}"
        variables = {**vars, "target": target, "message": message, "confirm_address": confirm_address}
        asking = MailResponse(From=reply_to, Subject="Confirmation required")
        if view.has_headers(template):
            view.read_msg(asking, template, variables)
        else:
            asking.Body = view.render(variables, template)
        asking.update({"To": to, "Cc": None, "Bcc": None, "Reply-To": reply_to, "Auto-Submitted": None})
        asking.original = message
        relay.deliver(asking)
        return True

    def clear(self) -> None:
        """Forget all confirmations, and delete all that waits."""
        self.pending.clear()
        self.storage.clear()

    def purge(self, older_than: float | None = None) -> tuple[int, int]:
        """Delete what is older than `older_than` seconds (`expires`): confirmations with their messages, and messages
        that were confirmed or replaced. (confirmations, messages) that were deleted.

        Raises NotImplementedError for a storage without `entries`.
        """
        limit = self.expires if older_than is None else older_than
        keys = self.pending.keys()
        ages = {key: age for key in keys if (age := self._age_of(key)) is not None}
        late = [entry for entry in self.storage.entries() if self._is_late(entry, ages.get(entry.pending_id), limit)]
        for entry in late:
            self.storage.take(entry.target, entry.from_address, entry.secret)
        deleted = [key for key, age in ages.items() if age > limit]
        for key in deleted:
            self.delete_pending(key)
        return len(late), len(deleted)

    def _is_late(self, entry: Confirmation, age: float | None, limit: float) -> bool:
        if age is not None:
            return age > limit
        # It may have been made a moment ago, by a handler that still runs.
        return self._clock() - entry.stored > UNFINISHED and self.pending.backend.get(entry.pending_id) is None

    def _age_of(self, key: str) -> float | None:
        job = self.pending.backend.get(key)
        return None if job is None else self._age(job.metadata, job.received)

    def _age(self, metadata: Mapping[str, str], received: float) -> float:
        """Seconds since a message was registered; since it was received, if Lamson put it there."""
        return self._clock() - float(metadata.get(_REGISTERED, received))


_MARK_DIGITS = 4


def _mark(secret: str, message: MailRequest) -> str:
    """What ties a secret to its message, so that nobody slips in another one for a registration that failed."""
    return hashlib.blake2b(message.to_bytes(), key=secret.encode(), digest_size=_MARK_DIGITS // 2).hexdigest()


def _nothing() -> None:
    """Nothing to do, and nobody who is next in line."""


class _Claims:
    """Who is about to take which confirmation: one at a time, across threads and, with a lock file, processes.

    The kernel holds the lock between processes, so it ends with its process.
    """

    def __init__(self, lock_file: str | None) -> None:
        self._turns = Conversations(lock_file)
        self._takers: dict[str, tuple[Attempt | None, Callable[[], None]]] = {}
        self._lock = threading.Lock()

    def has(self, key: str, taker: Attempt | None) -> bool:
        """Whether it is this attempt's already."""
        return taker is not None and self._takers.get(key, (None,))[0] is taker

    def wait(self, key: str, taker: Attempt | None, give_back: Callable[[], None]) -> bool:
        """Wait until it is this one's; False when another delivery inside of the same handler has it. Raises Later.

        `give_back` is what others do when this attempt was given up.
        """
        give_up_at = time.monotonic() + (PATIENCE if taker is None else ELSEWHERE_PATIENCE)
        while not self._begin(key, taker, give_back):
            other, others_give_back = self._takers.get(key, (None, give_back))
            if other is not None and any(one.given_up for one in _inside_of(other)):
                others_give_back()
            elif other is not None and taker is not None and _inside_of(other)[-1] is _inside_of(taker)[-1]:
                return False
            elif time.monotonic() >= give_up_at:
                raise Later("another message is just being confirmed by this secret", clock.now() + 1, counted=False)
            else:
                time.sleep(0.005)  # fcntl(2) has no wait with a time limit
        return True

    def _begin(self, key: str, taker: Attempt | None, give_back: Callable[[], None]) -> bool:
        who, locked = ("confirmation", key), False
        with self._lock:
            if key in self._takers:
                return False
            self._turns.enter(who, _nothing)
            try:
                locked = self._turns.lock(who)
            except OSError as error:
                raise Later(f"cannot lock a confirmation: {error}") from error
            finally:
                if locked:
                    self._takers[key] = (taker, give_back)
                else:
                    self._turns.leave(who)
        return locked

    def end(self, key: str, taker: Attempt | None, act: Callable[[], object] = _nothing) -> None:
        """Do this, and let the next one come; nothing happens when it is not this one's any more."""
        with self._lock:
            if key not in self._takers or self._takers[key][0] is not taker:
                return
            try:
                act()
            finally:
                del self._takers[key]
                self._turns.leave(("confirmation", key))


@cache
def _claims(lock_file: str | None) -> _Claims:
    return _Claims(lock_file)


os.register_at_fork(after_in_child=_claims.cache_clear)


def _taker(running: Attempt | None) -> str:
    """What is the same when the same message comes to the same function again, be it in another job."""
    if running is None:
        return ""
    named = repr((running.call.name, running.message.From, running.message.To))
    digest = hashlib.sha256(named.encode("utf-8", "surrogatepass"))
    digest.update(running.message.Data)
    return digest.hexdigest()


def _inside_of(one: Attempt) -> list[Attempt]:
    """This attempt, the one that it was delivered in, and so on."""
    found = [one]
    while (outer := found[-1].outer) is not None:
        found.append(outer)
    return found


def _is_secret(expected: str | None, secret: str) -> bool:
    return expected is not None and bool(secret) and _same(expected, secret.lower())


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def sender_of(message: MailRequest) -> str:
    """Whom a confirmation is asked of, as Lamson has it: the address in From, else the envelope's sender."""
    return bare_address(message["from"] or "") or message.From
