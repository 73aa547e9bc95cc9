"""The report that a message was delivered, for a sender who asked for it (RFC 3461, NOTIFY=SUCCESS).

Rules:

1. Who offers DSN promises the report, and whoever runs the functions keeps the promise: once a function has handled a
   message, it has reached the recipient (action "delivered", RFC 3464 section 2.3.3). Never to the null sender.
2. One report for each recipient. Where several functions take his message, one job alone carries the wish on.
3. A message that leaves with an attempt takes the wish along, if it is still to this recipient: into the outbound
   queue, or to a conversation's queue. Who has it then reports.
4. That a function has failed is reported to nobody, also not for NOTIFY=FAILURE: the message is not lost but a dead
   letter, which somebody here may send to its function again. Who means to refuse it to the sender does so over SMTP,
   or answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from msgspec import structs

from lamsonq import clock
from lamsonq.address import canonical
from lamsonq.attempt import collected
from lamsonq.envelope import SESSION, Envelope, session_of
from lamsonq.jobs import Job, Put
from lamsonq.mail import MailRequest
from lamsonq.notification import DELIVERED, Fate, notification
from lamsonq.queue import envelope_of

Reports = Callable[[MailRequest], object]
"""What takes a report: the `deliver` of a relay."""

LOG = logging.getLogger()

SUCCESS = "SUCCESS"


def report_of(envelope: Envelope, data: bytes, handled: Iterable[str], hostname: str) -> MailRequest | None:
    """The report that these recipients have the message, or None: of those whom its sender asked about, in the name of
    this host (RFC 3461 section 6.2)."""
    sender, notify = envelope.mail_from, envelope.notify
    having = {canonical(recipient) for recipient in handled}
    told = [path for path in notify.notify if notify.wants(path, SUCCESS) and canonical(path) in having]
    if not sender or not told:
        return None
    body = notification(
        data,
        sender,
        [Fate(path, DELIVERED, "2.1.5", original=notify.orcpt.get(path, "")) for path in told],
        author=f"postmaster@{hostname}",
        reporting=hostname,
        arrived=envelope.received,
        now=clock.now(),
        envid=notify.envid,
    )
    return MailRequest("lamsonq", "", [sender], body)


def reported(reports: Reports, job: Job, puts: Sequence[Put], hostname: str) -> list[Put]:
    """What `reports` leaves behind of the report that this job is handled, to be settled with it; `puts` are what its
    function left. A report that fails is logged: the message is handled all the same."""
    if not _may_ask(job):
        return []
    handled = {canonical(recipient) for recipient in job.recipients} - carried(puts)
    report = report_of(envelope_of(job), job.body, handled, hostname)
    if report is None:
        return []
    try:
        return collected(reports, report)
    except Exception:  # any relay, any queue
        LOG.exception("The report that job %s is handled could not be sent", job.key)
        return []


def carried(puts: Iterable[Put]) -> set[str]:
    """Whose wish leaves with these jobs, as routes see the recipients (rule 3)."""
    return {
        canonical(recipient)
        for put in puts
        if _may_ask(put.job)
        for recipient in put.job.recipients
        if envelope_of(put.job).notify.wants(recipient, SUCCESS)
    }


def reported_once(jobs: Sequence[Job]) -> list[Job]:
    """The jobs of one message, of which the last of each recipient alone carries the wish (rule 2)."""
    last = {job.recipients: n for n, job in enumerate(jobs)}
    return [job if last[job.recipients] == n else _without_wish(job) for n, job in enumerate(jobs)]


def _without_wish(job: Job) -> Job:
    if not _may_ask(job):
        return job
    envelope = envelope_of(job)
    wishes = {path: _without_success(words) for path, words in envelope.notify.notify.items()}
    kept = structs.replace(envelope, notify=structs.replace(envelope.notify, notify=wishes))
    return replace(job, metadata={**job.metadata, **session_of(kept)})


def _without_success(words: str) -> str:
    return ",".join(word for word in words.split(",") if word != SUCCESS) or "NEVER"


def _may_ask(job: Job) -> bool:
    """Whether it is worth a look: most senders ask for nothing."""
    return SUCCESS in job.metadata.get(SESSION, "")
