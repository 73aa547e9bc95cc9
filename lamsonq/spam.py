"""Spam: what a scanner says of a message, and a decorator that keeps spam away from a state function.

    @route("(post_name)@(host)")
    @spam_filter(SPAM["db"], SPAM["rc"], SPAM["queue"], next_state=SPAMMING)
    def START(message, post_name=None, host=None):
        ...

with `SPAM = {"db": "rspamd://127.0.0.1:11333", "rc": None, "queue": "run/spam"}` in the settings. A scanner is a server
of its own, rspamd or SpamAssassin's spamd; `Filter(url, config).check(message)` asks it, for policies of one's own.

Rules:

1. The scanner gets the bytes as they came in, with the envelope; a message is never changed. Why it is spam stands in
   the metadata of the job in the spam queue (`spam`).
2. A scanner that is down does no harm: after `timeout` seconds in all the message passes, with a warning in the log, or
   with `on_error="later"` is tried again.
3. A scan blocks the thread of the handler, never the event loop, and at most `connections` run at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from lamsonq import attempt
from lamsonq.errors import Later, SettingsError
from lamsonq.jobs import Put
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue, job_of
from lamsonq.scanners import TROUBLE, SpamConfig, Verdict, scanner, shown
from lamsonq.transaction import one_line

__all__ = ["Filter", "SpamConfig", "Verdict", "spam_filter"]

LOG = logging.getLogger("spam")

F = TypeVar("F", bound=Callable[..., Any])


class Filter:
    """A scanner, by its URL.

    `rspamd://127.0.0.1:11333`, `spamassassin://127.0.0.1:783`, or a unix socket, `spamassassin:///run/spamd.sock`.
    `config` is a SpamConfig, or a mapping of its fields. Raises SettingsError.

    Source: Lamson's `spam.Filter`, which had SpamBayes in it.
    """

    def __init__(self, storage: str, config: SpamConfig | Mapping[str, Any] | None = None) -> None:
        self.url = storage
        self.config = _config(config)
        self._scanner = scanner(storage, self.config)
        self._slots = threading.BoundedSemaphore(self.config.connections)

    def check(self, message: MailRequest) -> Verdict:
        """Ask the scanner. With `on_error="later"`, raises Later when it gives no answer."""
        if len(message.Data) > self.config.size_limit:
            return Verdict(False, scanned=False, reason=f"larger than {self.config.size_limit} octets")
        try:
            with self._slot() as deadline:
                verdict = self._scanner.check(message, deadline)
        except TROUBLE as error:
            reason = f"{self.url_shown} gives no verdict: {_trouble(error)}"
            if self.config.on_error == "later":
                raise Later(reason) from error
            LOG.warning("%s; the message from %r to %r passes", reason, message.From, message.To)
            return Verdict(False, scanned=False, reason=reason)
        if self.config.threshold is not None:
            verdict = replace(verdict, spam=verdict.score >= self.config.threshold, required=self.config.threshold)
        return replace(verdict, reason=_reason(verdict))

    def filter(self, message: MailRequest) -> bool:
        """Whether it is spam: Lamson's name for it."""
        return self.check(message).spam

    def train_spam(self, message: MailRequest) -> bool:
        """Teach the scanner that this is spam; False when it had nothing to learn. Raises Later when it cannot."""
        return self._train(message, "spam")

    def train_ham(self, message: MailRequest) -> bool:
        """Teach the scanner that this is none; False when it had nothing to learn. Raises Later when it cannot."""
        return self._train(message, "ham")

    def _train(self, message: MailRequest, kind: str) -> bool:
        try:
            with self._slot() as deadline:
                return self._scanner.train(message, kind, deadline)
        except TROUBLE as error:
            raise Later(f"{self.url_shown} does not learn: {_trouble(error)}") from error

    @property
    def url_shown(self) -> str:
        """The URL without a password."""
        return shown(self.url)

    @contextlib.contextmanager
    def _slot(self) -> Iterator[float]:
        """One of the connections; the moment, by the monotonic clock, at which its time is up."""
        deadline = time.monotonic() + self.config.timeout
        if not self._slots.acquire(timeout=self.config.timeout):
            raise TimeoutError(f"{self.config.connections} scans are running")
        try:
            yield deadline
        finally:
            self._slots.release()


class spam_filter:
    """Decorator, with @route: what the scanner calls spam goes into `spam_queue`, not to the state function.

    `storage` is the scanner's URL and `config` what `Filter` takes; `spam_queue` is a queue, or its name. The
    conversation goes on in `next_state`, None leaves it where it is. For `async def` functions too. Raises
    SettingsError.

    Source: Lamson's `spam.spam_filter`.
    """

    def __init__(
        self,
        storage: str,
        config: SpamConfig | Mapping[str, Any] | None,
        spam_queue: str | os.PathLike[str] | Queue,
        next_state: Callable[..., Any] | None = None,
    ) -> None:
        self.filter = Filter(storage, config)
        self.spam_queue = spam_queue
        self.next_state = next_state

    def __call__(self, function: F) -> F:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def keep_spam_away_async(message: MailRequest, *args: Any, **captures: Any) -> Any:
                verdict = await asyncio.to_thread(self.filter.check, message)
                return self._set_aside(message, verdict) if verdict.spam else await function(message, *args, **captures)

            return keep_spam_away_async  # type: ignore[return-value]

        @functools.wraps(function)
        def keep_spam_away(message: MailRequest, *args: Any, **captures: Any) -> Any:
            verdict = self.filter.check(message)
            return self._set_aside(message, verdict) if verdict.spam else function(message, *args, **captures)

        return keep_spam_away  # type: ignore[return-value]

    def _set_aside(self, message: MailRequest, verdict: Verdict) -> Callable[..., Any] | None:
        queue = self.spam_queue if isinstance(self.spam_queue, Queue) else Queue(self.spam_queue)
        store = queue.backend
        job = job_of(message, store.new_key())
        job = replace(job, metadata={**job.metadata, "spam": verdict.reason})
        attempt.publish([Put(store, job)])
        LOG.info("spam from %r to %r: %s", message.From, message.To, verdict.reason)
        return self.next_state


def _config(given: SpamConfig | Mapping[str, Any] | None) -> SpamConfig:
    try:
        fields = msgspec.structs.asdict(given) if isinstance(given, SpamConfig) else dict(given or {})
        return msgspec.convert(fields, SpamConfig)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise SettingsError(
            f"the spam filter's config: {error}; it has {', '.join(SpamConfig.__struct_fields__)}"
        ) from error


def _reason(verdict: Verdict) -> str:
    symbols = ", ".join(verdict.symbols)[:500]
    return f"score {verdict.score:g} of {verdict.required:g}" + (f": {symbols}" if symbols else "")


def _trouble(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return str(error) if "scans" in str(error) else "timed out"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return one_line(str(error)[:1000])[:200] or type(error).__name__
