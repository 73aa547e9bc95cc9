"""The way out: when mail is tried again, when its sender is told, and who that may be.

    QueueReceiver("run/outbox", deliver=relay.deliver)                              # all of this, as it stands here
    QueueReceiver("run/outbox", deliver=Outbox(relay, retry="5m 1h", give_up_after=86400).deliver)

Rules:

1. Who could not be reached is tried again after the times of `retry`, the last of them again and again, until
   `give_up_after` (RFC 5321 section 4.5.4.1); each of them a little earlier or later, so that what failed together does
   not come back together. Trouble of our own (a crash, a hang) is no reason to give up sooner.
2. Who fails for good or for the last time is reported to the sender, in one report (RFC 3464) for all of this attempt;
   who still waits after `warn_after`, once. The sender's wishes count (NOTIFY, RET, ENVID, ORCPT: RFC 3461); a success
   is reported only if he asked for it, and not where the next server has promised to do that (section 5.2.2).
3. The report commits with what it reports, into the same queue, from the null sender: no crash loses or doubles it.
4. No backscatter. A report goes to a sender of ours only: the application wrote the message, or gave it its sender; or
   he had logged in where it came in; or SPF says that the host which brought it may use his domain. Never to the null
   sender, never for a message that is itself a report, never to a sender whom nobody recorded. What may not be reported
   is a dead letter and a line in the log.
5. A message for several domains is first parted, one job for each, where the relay finds their servers itself: no slow
   domain holds up another one.
6. `per_domain` attempts at once go to one domain, in this process; more of them wait in the queue for a moment. What
   holds between processes is a Limit of the store (lamsonq.jobs.Limit), where it has such.
"""

from __future__ import annotations

import logging
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

from lamsonq import attempt, clock
from lamsonq.address import domain_of, is_path_address
from lamsonq.connection import own_name
from lamsonq.envelope import Envelope
from lamsonq.errors import Dead, Failure, Later, Receipt, SettingsError, SMTPError, Undelivered, reason_of
from lamsonq.headers import HeaderBlock, shown
from lamsonq.jobs import Backend, Job, Put, part_of
from lamsonq.mail import MailRequest
from lamsonq.notification import DELAYED, DELIVERED, FAILED, RELAYED, Fate, notification
from lamsonq.policy import GIVE_UP_AFTER, Policy
from lamsonq.queue import envelope_of
from lamsonq.relay import Relay
from lamsonq.statuscodes import find_status

RETRY = "1m 5m 15m 30m 1h 2h 4h"
"""When mail is tried again, if nobody says otherwise."""

WARN_AFTER = 4 * 3600.0
"""Seconds after which the sender hears that his message still waits."""

TIMEOUT = 1800.0
"""Seconds that one attempt may take: a relay's own time-outs end it before, as a rule."""

PER_DOMAIN = 5
"""Attempts at once to one domain, where the relay finds its servers itself."""

JITTER = 0.1
WARNED = "warned"
"""The key of a job's metadata that says that the sender has heard of the delay."""

LOG = logging.getLogger()

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_step = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


@dataclass(frozen=True, slots=True)
class Backoff:
    """The seconds before each next try; the last of them counts for all that follow."""

    steps: tuple[float, ...]

    def __call__(self, failures: int) -> float:
        step = self.steps[min(failures, len(self.steps)) - 1]
        return step * random.uniform(1 - JITTER, 1 + JITTER)


def steps_of(retry: str) -> tuple[float, ...]:
    """Seconds, of a text such as "1m 5m 1h". Raises SettingsError."""
    words = retry.replace(",", " ").split()
    found = [_step.fullmatch(word) for word in words]
    if not words or not all(found):
        raise SettingsError(f"retry={retry!r}: times such as {RETRY!r}, in s, m, h or d")
    return tuple(float(step[1]) * _UNITS[step[2]] for step in found if step)


class Outbox:
    """How an outbound queue is worked. `deliver` is what its QueueReceiver gets; one that gets `relay.deliver` makes
    one itself, with the defaults.

    `retry` is when mail is tried again, `give_up_after` and `warn_after` are seconds since it was put (`warn_after` 0:
    never). `reports=False` sends no reports. `ours` are the domains that the application writes from: with it, other
    senders get no reports for what it wrote. `author` is the address of the reports' From; None is MAILER-DAEMON at
    this host's name. `per_domain` is rule 6, None for no such limit; `timeout` is how many seconds an attempt may take.
    Raises SettingsError.
    """

    def __init__(
        self,
        relay: Relay,
        *,
        retry: str = RETRY,
        give_up_after: float = GIVE_UP_AFTER,
        warn_after: float = WARN_AFTER,
        reports: bool = True,
        ours: Iterable[str] | None = None,
        author: str | None = None,
        per_domain: int | None = PER_DOMAIN,
        timeout: float = TIMEOUT,
    ) -> None:
        if not relay.sends:
            raise SettingsError("Outbox: this relay fills a queue; give the one that sends what is in it")
        if author is not None and not is_path_address(author):
            raise SettingsError(f"Outbox: author={author!r} is no address")
        if isinstance(ours, str):
            raise SettingsError(f"Outbox: ours={ours!r}: a list of domains")
        self.relay = relay
        self.policy = Policy(backoff=Backoff(steps_of(retry)), give_up_after=give_up_after, timeout=timeout)
        self.warn_after = warn_after
        self.reports = reports
        self.ours = None if ours is None else frozenset(domain.lower() for domain in ours)
        self.author = author
        self.per_domain = None if relay.hostname else per_domain
        self._busy: Counter[str] = Counter()
        self._lock = threading.Lock()

    def deliver(self, message: MailRequest) -> None:
        """Send a message. Raises Undelivered, Later or Dead."""
        self._send(message)

    def deliver_from(self, store: Backend) -> Callable[[MailRequest], None]:
        """`deliver` for the jobs of this store, which takes the reports."""

        def deliver(message: MailRequest) -> None:
            receipts, running = self._send(message), attempt.current()
            if running is not None and running.job is not None:
                for report in self._reports(store, running.job, self._successes(running.job, receipts)):
                    running.put(report)

        return deliver

    def parts(self, job: Job) -> list[Job]:
        """The jobs that this one is parted into by rule 5; [] where it stays whole."""
        if self.relay.hostname or len(job.recipients) < 2:
            return []
        groups = [tuple(group) for _, group in groupby(sorted(job.recipients, key=domain_of), domain_of)]
        return [part_of(job, group, n) for n, group in enumerate(groups, 1)] if len(groups) > 1 else []

    def settlement(self, store: Backend, job: Job, outcome: Later | Dead) -> Settlement:
        """What a failed attempt is settled with: the job stays whole where one outcome is everybody's."""
        now = clock.now()
        refused = outcome.__cause__
        receipts: Sequence[Receipt] = ()
        if isinstance(refused, Undelivered) and refused.failures:
            failures, receipts = refused.failures, refused.receipts
        else:
            error = _of_ours(outcome)
            failures = tuple(Failure(to, None, error) for to in job.recipients or ("",))
        judged = [(f, self.policy.judge(_of_ours(f.error), job.attempts, job.received, now)) for f in failures]
        later = [(failure, end) for failure, end in judged if isinstance(end, Later)]
        dead = [(failure, end) for failure, end in judged if isinstance(end, Dead)]
        warn = bool(later) and self._warns(job) and now >= job.received + self.warn_after
        fates = [_fate(job, failure, FAILED) for failure, _ in dead]
        if warn:
            until = job.received + self.policy.give_up_after
            fates += [replace(_fate(job, failure, DELAYED), retry_until=until) for failure, _ in later]
        reports = self._reports(store, job, [*fates, *self._successes(job, receipts)])
        warned = warn and bool(reports)
        again = _together(later)
        if again is not None and self._warns(job) and now < (at := job.received + self.warn_after):
            again.at = min(again.at or at, at)  # one try more, so that the warning is in time
        whole = not receipts and len(failures) >= len(job.recipients)  # one that names nobody names them in its header
        if whole and not warned and not (later and dead):
            if again is not None:
                return Settlement(again, [], reports)
            if len(dead) == 1:
                return Settlement(dead[0][1], [], reports)
        parts = [Put(store, _failed(job, (f.recipient,), n), end) for n, (f, end) in enumerate(dead, 1)]
        if again is not None:
            waiting = _failed(job, tuple(failure.recipient for failure, _ in later), len(parts) + 1)
            if warned:
                waiting = replace(waiting, metadata={**waiting.metadata, WARNED: "1"})
            parts.append(Put(store, waiting, again, report=store.report(job.key)))
        return Settlement(None, parts, reports)

    def expired(self, store: Backend, job: Job) -> list[Put]:
        """The report that a job came too late (RFC 3463, X.4.7)."""
        failures = [Failure(to, None, SMTPError(554, "5.4.7 its time to live was over")) for to in job.recipients]
        return self._reports(store, job, [_fate(job, failure, FAILED) for failure in failures])

    def _warns(self, job: Job) -> bool:
        """Whether the sender is still to hear of a delay."""
        return self.reports and bool(self.warn_after and job.received) and WARNED not in job.metadata

    # -- sending -----------------------------------------------------------------------------------------------

    def _send(self, message: MailRequest) -> list[Receipt]:
        with self._lane(domain_of(message.To)):
            try:
                failures, receipts = self.relay.transfer(message)
            except (Later, Dead, SMTPError):
                raise
            except Exception as error:  # a crash is not the message's fault (rule 1)
                LOG.exception("The relay has crashed over a message to %s", message.To)
                raise Later(reason_of(error)) from error
        if failures:
            raise Undelivered(failures, receipts)
        return receipts

    @contextmanager
    def _lane(self, domain: str) -> Iterator[None]:
        """Rule 6."""
        with self._lock:
            full = self.per_domain is not None and self._busy[domain] >= self.per_domain
            if not full:
                self._busy[domain] += 1
        if full:
            raise Later(f"{domain} is busy", clock.now() + random.uniform(2, 10), counted=False)
        try:
            yield
        finally:
            with self._lock:
                self._busy[domain] -= 1
                if not self._busy[domain]:
                    del self._busy[domain]

    # -- reports -----------------------------------------------------------------------------------------------

    def _successes(self, job: Job, receipts: Iterable[Receipt]) -> list[Fate]:
        """What is to be told of those who have got it: only where somebody asked, so nobody reads a record for it."""
        notify = envelope_of(job).notify
        told = [r for r in receipts if not r.reports and notify.wants(r.recipient, "SUCCESS")]
        return [_success(job, receipt) for receipt in told]

    def _reports(self, store: Backend, job: Job, fates: Sequence[Fate]) -> list[Put]:
        """One report of all that the sender wants to be told, or none."""
        if not fates or not self.reports:
            return []
        envelope = envelope_of(job)
        wanted = [fate for fate in fates if envelope.notify.wants(fate.recipient, _WISHES[fate.action])]
        if not wanted:
            return []
        if why := self.silence(job):
            LOG.info("Nobody is told about job %s: %s.", job.key, why)
            return []
        now, sender, host = clock.now(), job.sender or "", own_name()
        body = notification(
            job.body,
            sender,
            wanted,
            author=self.author or f"MAILER-DAEMON@{host or domain_of(sender)}",
            reporting=host or domain_of(self.author or sender),
            arrived=job.received,
            now=now,
            envid=envelope.notify.envid,
            full=envelope.notify.ret.upper() == "FULL",
            key=job.key,
        )
        report = Job(key=store.new_key(), body=body, sender="", recipients=(sender,), received=now)
        LOG.info("Report %s to %s about job %s: %s", report.key, sender, job.key, wanted[0].action)
        return [Put(store, report)]

    def silence(self, job: Job) -> str:
        """Why the sender of this job gets no report (rule 4); "" when he does."""
        if job.sender is None or not is_path_address(job.sender):
            return "it has no sender" if job.sender is None else "it is from the null sender"
        block = HeaderBlock(job.body)
        kinds = [shown("Content-Type", block.raw(field)) for field in block.named("content-type")]
        if any(kind.strip().lower().startswith("multipart/report") for kind in kinds):
            return "it is a report itself"
        envelope, domain = envelope_of(job), domain_of(job.sender)
        if envelope.login or _is_spf_of(envelope, domain):
            return ""
        if job.peer is not None:
            return f"{job.sender} is a stranger, and may be forged"
        return "" if self.ours is None or domain in self.ours else f"{domain} is none of our domains"


@dataclass(frozen=True, slots=True)
class Settlement:
    """The outcome of the job (None: done, as its parts go on without it), those parts, and the reports."""

    outcome: Later | Dead | None
    parts: list[Put]
    reports: list[Put]


def outbox_of(deliver: object) -> Outbox | None:
    """The Outbox that this `deliver` is of; for a relay's that sends over the network, one with the defaults."""
    owner = getattr(deliver, "__self__", None)
    if isinstance(owner, Outbox) and getattr(deliver, "__func__", None) is Outbox.deliver:
        return owner
    if isinstance(owner, Relay) and owner.sends and getattr(deliver, "__func__", None) is Relay.deliver:
        return Outbox(owner)
    return None


_WISHES = {FAILED: "FAILURE", DELAYED: "DELAY", RELAYED: "SUCCESS", DELIVERED: "SUCCESS"}


def _is_spf_of(envelope: Envelope, domain: str) -> bool:
    """Whether SPF stands behind this very domain, as the one of the envelope's sender."""
    checked = [
        v.properties.get("smtp.mailfrom", "") for v in envelope.auth.verdicts if (v.method, v.result) == ("spf", "pass")
    ]
    return any(domain_of(name if "@" in name else f"@{name}") == domain for name in checked)


def _together(later: Sequence[tuple[Failure, Later]]) -> Later | None:
    """One outcome for all who wait: they are tried again together, when the last of them may be."""
    if not later:
        return None
    again = Later("; ".join(dict.fromkeys(end.reason for _, end in later)), max(end.at or 0.0 for _, end in later))
    again.__cause__ = later[0][0].error
    return again


def _failed(job: Job, recipients: tuple[str, ...], number: int) -> Job:
    return replace(part_of(job, tuple(filter(None, recipients)), number), attempts=job.attempts + 1)


def _of_ours(error: BaseException) -> Exception:
    """What went wrong, in our words: a crash or a hang means later (rule 1)."""
    cause = error.__cause__ if isinstance(error, Dead) else None
    error = cause if cause is not None and not isinstance(cause, Undelivered) else error
    return error if isinstance(error, Later | Dead | SMTPError) else Later(reason_of(error))


def _fate(job: Job, failure: Failure, action: str) -> Fate:
    original = envelope_of(job).notify.orcpt.get(failure.recipient, "")
    said = str(failure.error) if failure.server else reason_of(failure.error)
    return Fate(failure.recipient, action, _status(failure), said, failure.server, original)


def _success(job: Job, receipt: Receipt) -> Fate:
    original = envelope_of(job).notify.orcpt.get(receipt.recipient, "")
    return Fate(receipt.recipient, DELIVERED if receipt.final else RELAYED, "2.0.0", "", receipt.server, original)


def _status(failure: Failure) -> str:
    """The enhanced code (RFC 3463): what the server said, or what comes nearest."""
    error = failure.error
    if isinstance(error, SMTPError):
        found = find_status(str(error))
        return str(found) if found and found.primary == error.code // 100 else f"{error.code // 100}.0.0"
    if isinstance(error, Dead):
        return "5.1.3" if error.reason.startswith("not an address") else "5.0.0"
    if isinstance(error, Later) and isinstance(error.__cause__, OSError):
        return "4.4.2" if "timed out" in error.reason or "lost" in error.reason else "4.4.1"
    return "4.0.0"
