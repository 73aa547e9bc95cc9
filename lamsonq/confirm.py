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
3. In a handler, a secret is used up with the handler's success. One that failed may verify it again.
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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lamsonq import attempt, view
from lamsonq.address import bare_address, is_path_address
from lamsonq.errors import Later, SMTPError, UsageError
from lamsonq.jobs import Put
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.queue import Queue, job_of

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
    return; and `entries`, if `purge` is to be used. A target never holds a colon.

    Source: Lamson's and Salmon's `confirm.ConfirmationStorage`.
    """

    def __init__(self, db: MutableMapping[str, Any] | None = None) -> None:
        self.confirmations: MutableMapping[str, Any] = {} if db is None else db

    def clear(self) -> None:
        """Forget everything."""
        self.confirmations.clear()

    def key(self, target: str, from_address: str) -> str:
        """What one confirmation is kept under: `target:joe@example.com`, in lower case."""
        return f"{target}:{bare_address(from_address) or from_address}".lower()

    def get(self, target: str, from_address: str) -> tuple[str, str] | tuple[None, None]:
        """(secret, pending id), or (None, None)."""
        found = self.confirmations.get(self.key(target, from_address))
        return (found[0], found[1]) if found else (None, None)

    def delete(self, target: str, from_address: str) -> None:
        """Forget one; nothing happens when there is none."""
        self.confirmations.pop(self.key(target, from_address), None)

    def store(self, target: str, from_address: str, expected_secret: str, pending_message_id: str) -> None:
        """Keep one, in place of an earlier one of this target and sender."""
        self.confirmations[self.key(target, from_address)] = (expected_secret, pending_message_id, time.time())

    def entries(self) -> Iterable[Confirmation]:
        """All of them. Raises NotImplementedError for a storage that keeps them in a place of its own."""
        if type(self).store is not ConfirmationStorage.store:
            raise NotImplementedError(f"{type(self).__name__} needs entries() -> Confirmations, for purge()")
        for key, (secret, pending_id, *stored) in list(self.confirmations.items()):
            target, _, sender = key.partition(":")
            yield Confirmation(target, sender, secret, pending_id, stored[0] if stored else 0.0)


_SCHEMA_VERSION = 1
_SCHEMA = """
create table if not exists confirmations (
    key     text primary key,
    secret  text not null,
    pending text not null,
    stored  real not null
) without rowid
"""


class SQLiteConfirmationStorage(ConfirmationStorage):
    """Confirmations in one SQLite file, shared by any number of processes; they survive power failures.

    The file is made when it is first used. What cannot be read or written just now is a Later.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    def clear(self) -> None:
        with self._database() as database:
            database.execute("delete from confirmations")

    def get(self, target: str, from_address: str) -> tuple[str, str] | tuple[None, None]:
        query = "select secret, pending from confirmations where key = ?"
        with self._database() as database:
            found = database.execute(query, (self.key(target, from_address),)).fetchone()
        return (found[0], found[1]) if found else (None, None)

    def delete(self, target: str, from_address: str) -> None:
        with self._database() as database:
            database.execute("delete from confirmations where key = ?", (self.key(target, from_address),))

    def store(self, target: str, from_address: str, expected_secret: str, pending_message_id: str) -> None:
        values = (self.key(target, from_address), expected_secret, pending_message_id, time.time())
        with self._database() as database:
            database.execute("insert or replace into confirmations values (?, ?, ?, ?)", values)

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

    def _check_version(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("pragma user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise Later(f"{self.path} was written by a newer lamsonq (schema {version}); it is left untouched")
        if version < _SCHEMA_VERSION:
            database.execute(_SCHEMA)
            database.execute(f"pragma user_version = {_SCHEMA_VERSION}")


class Delivers(Protocol):
    """Whatever sends: a Relay."""

    def deliver(self, message: MailResponse) -> object: ...


class ConfirmationEngine:
    """Registers messages and sets them free.

    `pending_queue_dir` is the queue in which they wait, `expires` is in seconds, `clock` gives seconds since the epoch.

    Source: Lamson's and Salmon's `confirm.ConfirmationEngine`.
    """

    def __init__(
        self,
        pending_queue_dir: str | os.PathLike[str],
        storage: ConfirmationStorage,
        *,
        expires: float = EXPIRES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.pending = Queue(pending_queue_dir)
        self.storage = storage
        self.expires = expires
        self._clock = clock

    # The pending messages.

    def get_pending(self, pending_id: str) -> MailRequest | None:
        """A message that waits, or has waited: it stays until `purge` or `delete_pending`."""
        return self.pending.get(pending_id)

    def push_pending(self, message: MailRequest) -> str:
        """Let a message wait, without a confirmation; its id. In a handler it is there when that has succeeded."""
        store = self.pending.backend
        job = replace(job_of(message, store.new_key()), metadata={_REGISTERED: repr(self._clock())})
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

    def verify(self, target: str, from_address: str, expect_secret: str) -> MailRequest | None:
        """The message that this secret sets free; None when it does not, or no longer.

        `from_address` is who answers, `message["from"]`. The message stays in the pending queue. Outside of handlers
        the secret is used up at once.
        """
        running = attempt.current()
        if running is not None and running.message.is_automatic:
            LOG.info("A confirmation for %r by %r is ignored: no person wrote it.", target, from_address)
            return None
        pending_id = self._expected(target, from_address, expect_secret)
        job = None if pending_id is None else self.pending.backend.get(pending_id)
        if job is None or self._age(job.metadata, job.received) > self.expires:
            LOG.info("A confirmation for %r by %r is refused.", target, from_address)
            return None
        use_up = partial(self._forget, target, from_address, expect_secret)
        if running is None:
            use_up()
        else:
            running.afterwards(use_up)
        return self.pending.get(job.key)

    def cancel(self, target: str, from_address: str, expect_secret: str) -> None:
        """Forget a confirmation and delete its message, if that is the secret."""
        pending_id = self._expected(target, from_address, expect_secret)
        if pending_id is not None:
            self.storage.delete(target, from_address)
            self.delete_pending(pending_id)

    def _expected(self, target: str, from_address: str, secret: str) -> str | None:
        """The id of the message that this secret sets free."""
        expected, pending_id = self.storage.get(target, from_address)
        return pending_id if expected is not None and secret and _same(expected, secret.lower()) else None

    def _forget(self, target: str, from_address: str, secret: str) -> None:
        if self._expected(target, from_address, secret) is not None:
            self.storage.delete(target, from_address)

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
        asking.update({"To": to, "Cc": None, "Bcc": None, "Reply-To": reply_to, "Auto-Submitted": "auto-replied"})
        asking.in_reply_to(message)
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
            self._forget(entry.target, entry.from_address, entry.secret)
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


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def sender_of(message: MailRequest) -> str:
    """Whom a confirmation is asked of, as Lamson has it: the address in From, else the envelope's sender."""
    return bare_address(message["from"] or "") or message.From
