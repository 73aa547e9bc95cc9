"""An outbound queue: when mail is tried again, when its sender is told, and who that may be."""

from __future__ import annotations

import email
import email.policy
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path

import pytest
from flufl.bounce import all_failures
from hypothesis import given
from hypothesis import strategies as st

from lamsonq.envelope import Notify, session_of
from lamsonq.errors import SettingsError
from lamsonq.jobs import Job
from lamsonq.mail import Envelope, MailRequest, MailResponse
from lamsonq.notification import FAILED, Fate, notification, typed_address
from lamsonq.outbound import RETRY, Outbox, steps_of
from lamsonq.queue import Queue, message_of
from lamsonq.relay import Relay
from lamsonq.testing import FrozenClock, frozen_clock
from lamsonq.verdicts import Auth, Verdict
from lamsonq.worker import QueueReceiver

from .servers import Dns, Server
from .waiting import PATIENCE

UNKNOWN = "550 5.1.1 no such user"
BUSY = "451 4.2.1 come back"
DAY = 86400.0


@pytest.fixture(params=["maildir", "sqlite"])
def outbox(request: pytest.FixtureRequest, here: Path) -> Queue:
    return Queue("run/outbox" if request.param == "maildir" else "sqlite:run/q.db?queue=outbox")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    relay = Relay("127.0.0.1", server.port, timeout=PATIENCE)
    yield relay
    relay.close()


@pytest.fixture
def time_now() -> Iterator[FrozenClock]:
    with frozen_clock() as clock:
        yield clock


def worker(outbox: Queue, relay: Relay) -> QueueReceiver:
    return QueueReceiver(outbox, deliver=relay.deliver)


def push(outbox: Queue, *to: str, sender: str = "joe@ours.test") -> None:
    """As an application does."""
    response = MailResponse(From=sender, To=", ".join(to or ("ann@y.test",)), Subject="hi", Body="body")
    Relay(deliver=outbox.push).deliver(response)


def work(receiver: QueueReceiver) -> None:
    while receiver.run_once():
        pass


def reports(server: Server) -> list[EmailMessage]:
    """The reports that have left."""
    found = [
        email.message_from_bytes(m, policy=email.policy.default) for m in server.messages if b"multipart/report" in m
    ]
    return [message for message in found if isinstance(message, EmailMessage)]


def fields(report: EmailMessage) -> list[dict[str, str]]:
    """The blocks of the machine's part."""
    (part,) = [part for part in report.walk() if part.get_content_type() == "message/delivery-status"]
    return [dict(block.items()) for block in part.get_payload()]  # type: ignore[union-attr]


def request(report: EmailMessage) -> MailRequest:
    return MailRequest(None, "", ["joe@ours.test"], report.as_bytes())


def jobs(outbox: Queue, state: str) -> list[Job]:
    return [job for key in outbox.backend.keys(state) if (job := outbox.backend.get(key))]


# -- trying again -------------------------------------------------------------------------------------------------


def test_mail_is_tried_again_after_the_times_of_the_schedule(
    outbox: Queue, server: Server, relay: Relay, time_now: FrozenClock
) -> None:
    server.answers = {"RCPT TO:<ANN": BUSY}
    push(outbox)
    waits = []
    receiver = QueueReceiver(outbox, deliver=Outbox(relay, warn_after=0).deliver)
    for _ in range(9):
        work(receiver)
        (job,) = jobs(outbox, "delayed")
        assert job.due is not None
        waits.append(job.due - time_now.now)
        time_now.now = job.due + 0.01
    minutes = [1, 5, 15, 30, 60, 120, 240, 240, 240]
    assert all(0.9 * 60 * m <= wait <= 1.1 * 60 * m for m, wait in zip(minutes, waits, strict=True)), waits
    assert len(set(waits[-3:])) == 3, "they come back a little apart"


def failures(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What stands in the log above INFO, without the jobs' keys."""
    told = [record for record in caplog.records if record.levelno > logging.INFO]
    assert not [record for record in told if record.exc_info]
    return [(r.levelname, re.sub(r"Job \S+ of \S+", "Job", r.getMessage())) for r in told]


def test_mail_that_has_to_wait_is_one_warning_and_an_error_when_it_is_given_up(
    outbox: Queue, server: Server, relay: Relay, time_now: FrozenClock, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = {"RCPT TO:<ANN": BUSY}
    push(outbox)
    receiver = QueueReceiver(outbox, deliver=Outbox(relay, give_up_after=DAY, warn_after=0, reports=False).deliver)
    work(receiver)
    (job,) = jobs(outbox, "delayed")
    assert job.due is not None
    at = f"{datetime.fromtimestamp(job.due, UTC):%Y-%m-%dT%H:%M:%SZ}"
    assert failures(caplog) == [("WARNING", f"Job is tried again at {at}: ann@y.test: {BUSY}")]
    caplog.clear()
    time_now.tick(2 * DAY)
    work(receiver)
    assert failures(caplog) == [("ERROR", f"Job failed: ann@y.test: gave up after 24 hours: {BUSY}")]


def test_a_refused_connection_is_one_warning_without_a_traceback(
    outbox: Queue, free_port: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    push(outbox)
    work(worker(outbox, Relay("127.0.0.1", free_port(), timeout=PATIENCE)))
    [(level, line)] = failures(caplog)
    assert level == "WARNING"
    assert re.fullmatch(r"Job is tried again at \S+Z: ann@y\.test: relay 127\.0\.0\.1:\d+: .*refused.*", line), line


def test_who_fails_and_who_waits_in_one_attempt_stand_in_one_line(
    outbox: Queue, server: Server, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN, "RCPT TO:<BEN": BUSY}
    push(outbox, "ann@y.test", "ben@y.test", "joe@y.test")
    work(worker(outbox, relay))
    [(level, line)] = failures(caplog)
    assert level == "ERROR"
    told = rf"Job failed: ann@y.test: {UNKNOWN}; tried again at \S+Z: ben@y.test: {BUSY}"
    assert re.fullmatch(told, line), line


def test_the_schedule_is_one_text_and_a_slip_in_it_is_told() -> None:
    assert steps_of("90s, 5m 1.5h 1d") == (90, 300, 5400, 86400)
    assert steps_of(RETRY)[-1] == 4 * 3600
    for wrong in ("", "5", "5 m", "m", "1w"):
        with pytest.raises(SettingsError, match="retry="):
            Outbox(Relay("127.0.0.1"), retry=wrong)


def test_another_schedule_counts_and_ends(outbox: Queue, server: Server, relay: Relay, time_now: FrozenClock) -> None:
    server.answers = {"RCPT TO:<ANN": BUSY}
    push(outbox)
    receiver = QueueReceiver(outbox, deliver=Outbox(relay, retry="10s", give_up_after=25, warn_after=0).deliver)
    for _ in range(4):
        work(receiver)
        time_now.tick(12)
    work(receiver)
    assert [job.recipients for job in jobs(outbox, "dead")] == [("ann@y.test",)]
    (report,) = reports(server)
    block = fields(report)[1]
    assert (block["Action"], block["Status"]) == ("failed", "4.2.1")


def test_who_has_got_it_does_not_get_it_again_and_who_waits_is_tried_together(
    outbox: Queue, server: Server, relay: Relay, time_now: FrozenClock
) -> None:
    server.answers = {"RCPT TO:<BEN": [BUSY, "250 ok"], "RCPT TO:<CAT": [BUSY, "250 ok"]}
    push(outbox, "ann@y.test", "ben@y.test", "cat@y.test")
    work(worker(outbox, relay))
    (waiting,) = jobs(outbox, "delayed")
    assert waiting.recipients == ("ben@y.test", "cat@y.test")
    time_now.tick(70)
    work(worker(outbox, relay))
    assert [line[9:12] for line in server.said("RCPT")] == ["ann", "ben", "cat", "ben", "cat"]
    assert len(server.messages) == 2
    assert sum(outbox.backend.counts().values()) == 0


def test_of_a_file_without_an_envelope_only_those_who_failed_are_tried_again(
    here: Path, server: Server, relay: Relay, time_now: FrozenClock
) -> None:
    outbox = Queue("run/outbox")
    outbox.push(b"From: joe@ours.test\r\nTo: ann@y.test, ben@y.test\r\n\r\nx\r\n")
    server.answers = {"RCPT TO:<BEN": [BUSY, UNKNOWN]}
    work(worker(outbox, relay))
    assert [job.recipients for job in jobs(outbox, "delayed")] == [("ben@y.test",)]
    time_now.tick(70)
    work(worker(outbox, relay))
    assert [line[9:12] for line in server.said("RCPT")] == ["ann", "ben", "ben"]
    assert reports(server) == [], "nobody has recorded a sender"


def test_an_attempt_that_hangs_is_tried_again(outbox: Queue, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    push(outbox)
    hanging = threading.Event()
    monkeypatch.setattr(relay, "transfer", lambda _message: hanging.wait())
    receiver = QueueReceiver(outbox, deliver=Outbox(relay, timeout=0.1).deliver, sleep=0.05)
    thread = threading.Thread(target=receiver.start, daemon=True)
    thread.start()
    thread.join(PATIENCE)  # it asks to be replaced
    assert not thread.is_alive()
    hanging.set()
    assert len(jobs(outbox, "delayed")) == 1


def test_an_outbox_needs_a_relay_that_sends() -> None:
    with pytest.raises(SettingsError, match="fills a queue"):
        Outbox(Relay(deliver=print))


def test_a_relay_that_crashes_loses_nothing(
    outbox: Queue, relay: Relay, time_now: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "transfer", lambda _message: 1 / 0)
    push(outbox)
    for _ in range(8):
        work(worker(outbox, relay))
        time_now.tick(5 * 3600)
    waiting = [*jobs(outbox, "delayed"), *jobs(outbox, "ready")]
    assert sorted(job.sender or "" for job in waiting) == ["", "joe@ours.test"]  # and the warning
    assert jobs(outbox, "dead") == []


def test_a_message_for_two_domains_is_parted_where_each_has_its_own_servers(
    outbox: Queue, time_now: FrozenClock
) -> None:
    server = Server(address="127.0.0.1")
    dns = Dns("y.test. IN MX 1 mx.test.\nz.test. IN MX 1 mx.test.\nmx.test. IN A 127.0.0.1")
    server.answers = {"RCPT TO:<BEN": BUSY}
    relay = Relay(None, server.port, timeout=PATIENCE, resolver=dns.resolver)
    push(outbox, "ann@y.test", "ben@z.test", "cat@y.test")
    work(worker(outbox, relay))
    assert [job.recipients for job in jobs(outbox, "delayed")] == [("ben@z.test",)]
    assert len(server.messages) == 1
    assert [line[9:12] for line in server.said("RCPT")] == ["ann", "cat", "ben"]
    for closed in (relay, server, dns):
        closed.close()


def test_a_domain_that_is_busy_lets_its_mail_wait_uncounted(outbox: Queue, time_now: FrozenClock) -> None:
    relay = Relay(None, resolver=Dns("y.test. IN A 127.0.0.1").resolver)
    slow = Outbox(relay, per_domain=1)
    push(outbox)
    with slow._lane("y.test"):
        work(QueueReceiver(outbox, deliver=slow.deliver))
    (job,) = jobs(outbox, "delayed")
    assert (job.attempts, job.deliveries) == (0, 0)
    assert job.due is not None
    assert time_now.now < job.due <= time_now.now + 10


# -- what the sender is told ---------------------------------------------------------------------------------------


def test_a_failure_for_good_is_reported_to_the_sender(
    outbox: Queue, server: Server, relay: Relay, time_now: FrozenClock
) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN}
    push(outbox, "ann@y.test", "ben@y.test")
    work(worker(outbox, relay))
    (report,) = reports(server)
    assert server.said("MAIL")[1].startswith("MAIL FROM:<> ")
    assert server.said("RCPT")[2].startswith("RCPT TO:<joe@ours.test>")
    assert report["Auto-Submitted"] == "auto-replied"
    message, about = fields(report)
    assert {"Reporting-MTA", "Arrival-Date", "X-Lamsonq-Queue-Id"} == set(message)
    assert about["Final-Recipient"] == "rfc822; ann@y.test"
    assert (about["Action"], about["Status"]) == ("failed", "5.1.1")
    assert about["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user"
    assert about["Remote-MTA"] == "dns; 127.0.0.1"
    assert "Last-Attempt-Date" in about
    assert "Will-Retry-Until" not in about
    assert all_failures(report)[1] == {b"ann@y.test"}
    bounce = request(report)
    assert bounce.is_bounce()
    assert bounce.bounce is not None
    assert bounce.bounce.is_hard()
    assert [(r.address, r.action) for r in bounce.bounce.recipients] == [("ann@y.test", "failed")]
    assert bounce.bounce.original is not None
    assert bounce.bounce.original["subject"] == "hi"
    assert [job.recipients for job in jobs(outbox, "dead")] == [("ann@y.test",)]


def test_all_who_fail_at_once_stand_in_one_report(outbox: Queue, server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN, "RCPT TO:<BEN": "552 5.2.2 full"}
    push(outbox, "ann@y.test", "ben@y.test", "cat@y.test")
    work(worker(outbox, relay))
    (report,) = reports(server)
    assert [(block["Final-Recipient"], block["Status"]) for block in fields(report)[1:]] == [
        ("rfc822; ann@y.test", "5.1.1"),
        ("rfc822; ben@y.test", "5.2.2"),
    ]


def test_a_delay_is_reported_once_after_four_hours_and_the_failure_after_five_days(
    outbox: Queue, server: Server, relay: Relay, time_now: FrozenClock
) -> None:
    server.answers = {"RCPT TO:<ANN": BUSY}
    push(outbox)
    put = time_now.now
    told: list[float] = []
    while outbox.backend.counts()["dead"] == 0:
        work(worker(outbox, relay))
        told += [time_now.now - put] * (len(reports(server)) - len(told))
        time_now.now = max(time_now.now, min((job.due or 0 for job in jobs(outbox, "delayed")), default=0)) + 1
    delayed, failed = reports(server)
    assert 4 * 3600 <= told[0] < 4 * 3600 + 10
    assert 5 * DAY <= told[1] < 5.3 * DAY
    assert fields(delayed)[1]["Action"] == "delayed"
    assert "Will-Retry-Until" in fields(delayed)[1]
    assert fields(failed)[1]["Action"] == "failed"
    assert request(delayed).is_bounce()
    assert all_failures(delayed)[1] == set()


def test_who_could_not_be_reached_at_all_is_reported_without_words_of_a_server(
    outbox: Queue, free_port: Callable[[], int], time_now: FrozenClock
) -> None:
    push(outbox)
    receiver = QueueReceiver(outbox, deliver=Outbox(Relay("127.0.0.1", free_port()), give_up_after=1).deliver)
    work(receiver)
    time_now.tick(100)
    work(receiver)
    (report,) = jobs(outbox, "delayed")  # it cannot leave either
    told = email.message_from_bytes(report.body, policy=email.policy.default)
    assert isinstance(told, EmailMessage)
    about = fields(told)[1]
    assert about["Status"] == "4.4.1"
    assert about["Diagnostic-Code"].startswith("x-lamsonq; relay 127.0.0.1:")
    assert "Remote-MTA" not in about


# -- what the sender wants to be told (RFC 3461) ---------------------------------------------------------------------


def asked(outbox: Queue, notify: Notify, to: str = "ann@y.test", data: bytes | None = None) -> None:
    """A message of somebody who had logged in."""
    envelope = Envelope("joe@ours.test", (to,), ("192.0.2.1", 1), 0.0, login="joe", notify=notify)
    data = data or b"Subject: hi\r\nMessage-ID: <1@ours.test>\r\n\r\nbody\r\n"
    Relay(deliver=outbox.push).deliver(MailRequest(None, "joe@ours.test", [to], data, envelope=envelope))


@pytest.mark.parametrize(
    ("notify", "answer", "count"),
    [
        ("NEVER", UNKNOWN, 0),
        ("SUCCESS", UNKNOWN, 0),
        ("DELAY", UNKNOWN, 0),
        ("FAILURE", UNKNOWN, 1),
        ("", UNKNOWN, 1),
        ("SUCCESS,FAILURE", "250 ok", 1),
        ("FAILURE", "250 ok", 0),
        ("", "250 ok", 0),
    ],
)
def test_notify_counts(notify: str, answer: str, count: int, outbox: Queue, server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<ANN": answer}
    asked(outbox, Notify(notify={"ann@y.test": notify} if notify else {}))
    work(worker(outbox, relay))
    assert len(reports(server)) == count


def test_a_success_that_was_asked_for_is_reported_as_relayed(outbox: Queue, server: Server, relay: Relay) -> None:
    asked(outbox, Notify(notify={"ann@y.test": "SUCCESS"}))
    work(worker(outbox, relay))
    (report,) = reports(server)
    assert fields(report)[1]["Action"] == "relayed"
    assert not request(report).is_bounce()


def test_over_lmtp_it_is_delivered(outbox: Queue) -> None:
    server = Server()
    asked(outbox, Notify(notify={"ann@y.test": "SUCCESS"}))
    relay = Relay("127.0.0.1", server.port, lmtp=True, timeout=PATIENCE)
    work(worker(outbox, relay))
    (report,) = reports(server)
    assert fields(report)[1]["Action"] == "delivered"
    relay.close()
    server.close()


def test_the_wishes_go_on_to_a_server_that_takes_them_and_it_reports_the_success(
    outbox: Queue, server: Server, relay: Relay
) -> None:
    server.offers.append("DSN")
    wishes = Notify("FULL", "x+2B1", {"ann@y.test": "SUCCESS,FAILURE"}, {"ann@y.test": "rfc822;old@y.test"})
    asked(outbox, wishes)
    work(worker(outbox, relay))
    assert server.said("MAIL")[0].endswith(" RET=FULL ENVID=x+2B1")
    assert server.said("RCPT") == ["RCPT TO:<ann@y.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;old@y.test"]
    assert reports(server) == []


def test_what_is_no_parameter_never_reaches_the_wire(outbox: Queue, server: Server, relay: Relay) -> None:
    server.offers.append("DSN")
    evil = "x\r\nRCPT TO:<evil@z.test>"
    asked(outbox, Notify(evil, evil, {"ann@y.test": evil}, {"ann@y.test": f"rfc822;{evil}"}))
    work(worker(outbox, relay))
    assert server.said("RCPT") == ["RCPT TO:<ann@y.test>"]
    assert "RET" not in server.said("MAIL")[0]


def test_envid_orcpt_and_ret_stand_in_the_report(outbox: Queue, server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN}
    asked(outbox, Notify("FULL", "id+2B1", {}, {"ann@y.test": "rfc822;old+2Bx@y.test"}))
    work(worker(outbox, relay))
    (report,) = reports(server)
    message, about = fields(report)
    assert message["Original-Envelope-Id"] == "id+1"
    assert about["Original-Recipient"] == "rfc822; old+x@y.test"
    whole = list(report.iter_parts())[2]
    assert whole.get_content_type() == "message/rfc822"
    assert b"body" in whole.as_bytes()
    assert report["In-Reply-To"] == "<1@ours.test>"


def test_without_ret_only_the_header_comes_back(outbox: Queue, server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN}
    asked(outbox, Notify())
    work(worker(outbox, relay))
    (report,) = reports(server)
    part = list(report.iter_parts())[2]
    assert part.get_content_type() == "text/rfc822-headers"
    assert "body" not in part.get_content()


# -- who may be told -------------------------------------------------------------------------------------------------

STRANGER = Job(key="k", body=b"Subject: x\r\n\r\n", sender="joe@y.test", recipients=("a@b.test",), peer="192.0.2.1:25")


def silence(job: Job, **options: object) -> str:
    return Outbox(Relay("127.0.0.1"), **options).silence(job)  # type: ignore[arg-type]


def with_session(**session: object) -> Job:
    envelope = Envelope("joe@y.test", ("a@b.test",), **session)  # type: ignore[arg-type]
    return replace(STRANGER, metadata=session_of(envelope))


def spf(result: str, domain: str) -> Auth:
    return Auth((Verdict("spf", result, "", {"smtp.mailfrom": f"joe@{domain}"}),))


def test_a_stranger_is_not_told_unless_he_is_no_stranger() -> None:
    assert "stranger" in silence(STRANGER)
    assert silence(with_session(login="joe")) == ""
    assert silence(with_session(auth=spf("pass", "Y.test"))) == ""
    assert "stranger" in silence(with_session(auth=spf("softfail", "y.test")))
    assert "stranger" in silence(with_session(auth=spf("pass", "other.test")))


def test_the_application_is_told_and_can_name_its_domains() -> None:
    written = replace(STRANGER, peer=None)
    assert silence(written) == ""
    assert silence(written, ours=["Y.test"]) == ""
    assert "none of our domains" in silence(written, ours=["ours.test"])


def test_the_null_sender_an_unknown_one_and_a_report_are_never_answered() -> None:
    written = replace(STRANGER, peer=None)
    assert silence(replace(written, sender=""))
    assert silence(replace(written, sender=None))
    assert silence(replace(written, body=b"Content-Type: Multipart/Report; x=y\r\n\r\n"))


def test_mail_that_strangers_sent_through_us_makes_no_backscatter(
    outbox: Queue, server: Server, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN}
    envelope = Envelope("forged@victim.test", ("ann@y.test",), ("192.0.2.1", 4), 0.0)
    message = MailRequest(
        ("192.0.2.1", 4), "forged@victim.test", ["ann@y.test"], b"Subject: x\r\n\r\n", envelope=envelope
    )
    Relay(deliver=outbox.push).deliver(message)
    with caplog.at_level("INFO"):
        work(worker(outbox, relay))
    assert server.messages == []
    assert "stranger" in caplog.text
    assert len(jobs(outbox, "dead")) == 1


def test_who_gives_a_message_another_sender_has_made_it_his_own(outbox: Queue, server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN}
    notify = Notify(notify={"ann@y.test": "NEVER"})
    envelope = Envelope("forged@victim.test", ("ann@y.test",), ("192.0.2.1", 4), 0.0, notify=notify)
    message = MailRequest(
        ("192.0.2.1", 4), "forged@victim.test", ["ann@y.test"], b"Subject: x\r\n\r\n", envelope=envelope
    )
    Relay(deliver=outbox.push).deliver(message, From="list-bounces@ours.test")
    work(worker(outbox, relay))
    assert server.said("RCPT")[-1] == "RCPT TO:<list-bounces@ours.test>"


def test_a_report_that_fails_makes_no_other(outbox: Queue, server: Server, relay: Relay) -> None:
    server.answers = {"RCPT": UNKNOWN}
    push(outbox)
    work(worker(outbox, relay))
    assert server.messages == []
    assert sorted(job.sender or "" for job in jobs(outbox, "dead")) == ["", "joe@ours.test"]


def test_what_came_too_late_is_reported(outbox: Queue, server: Server, relay: Relay, time_now: FrozenClock) -> None:
    outbox.push(MailResponse(From="joe@ours.test", To="ann@y.test", Subject="x", Body="y"), expires=10)
    time_now.tick(11)
    work(worker(outbox, relay))
    (report,) = reports(server)
    assert fields(report)[1]["Status"] == "5.4.7"


# -- what cannot be injected -----------------------------------------------------------------------------------------


def told(
    *fates: Fate, data: bytes = b"Subject: x\r\n\r\nbody\r\n", full: bool = False, to: str = "joe@x.test"
) -> bytes:
    return notification(
        data, to, fates, author="md@x.test", reporting="mx.x.test", arrived=1.0, now=2.0, envid="a+0D+0Ab", full=full
    )


@pytest.mark.parametrize(
    "said",
    [
        "550 x\r\nBcc: v@z.test",
        "550 x\r\n\r\n--boundary",
        "550 \x00\x1b[2J\x85\u2028X-Evil: 1",
        "550 \ud800\udfff",
        "550 " + "x" * 1_000_000,
        "550 " + "x " * 500_000,
        "550 用户不存在",
    ],
)
def test_nothing_that_a_server_says_becomes_a_field(said: str) -> None:
    wire = told(Fate("ann@y.test", FAILED, "5.0.0", said, "mx\r\nX: y", "rfc822;a+0D+0AX-Evil:+201"))
    assert len(wire) < 10_000
    assert max(map(len, wire.split(b"\r\n"))) <= 998
    assert b"\n" not in wire.replace(b"\r\n", b"")
    assert b"\x00" not in wire
    wire.decode()
    report = email.message_from_bytes(wire, policy=email.policy.default)
    assert isinstance(report, EmailMessage)
    assert len(list(report.iter_parts())) == 3
    assert not {"bcc", "x-evil", "x"} & {name.lower() for name in report}
    message, about = fields(report)
    assert set(about) <= {
        *("Original-Recipient", "Final-Recipient", "Action", "Status", "Remote-MTA", "Diagnostic-Code"),
        "Last-Attempt-Date",
    }
    assert message["Original-Envelope-Id"] == "a b"


def test_an_address_that_is_not_ascii_has_the_form_of_rfc_6533() -> None:
    assert typed_address("jö+x@y.test") == r"utf-8; j\x{F6}\x{2B}x@y.test"
    wire = told(Fate("jö@bücher.test", FAILED, "5.1.1", "550 no", "mx.test"), to="jö@x.test")
    report = MailRequest(None, "", ["jö@x.test"], wire)
    assert report.is_bounce()
    assert report.bounce is not None
    assert [r.address for r in report.bounce.recipients] == ["jö@bücher.test"]
    assert b"Content-Transfer-Encoding: 8bit" in wire


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"Subject: a\rX-Evil: 1\r\nTo: x\r\n\r\nbody\r\n", ("message/rfc822", "text/rfc822-headers")),
        ("Subject: ä\r\n\r\nbody\r\n".encode(), ("message/global", "message/global-headers")),
        (b"Subject: \xff\r\n\r\nbody\r\n", ("message/global", "text/rfc822-headers")),
        (b"Subject: x\n\n" + b"y" * 5000, ("text/rfc822-headers", "text/rfc822-headers")),
        (b"Subject: x\r\n\r\n" + b"y\r\n" * 600_000, ("text/rfc822-headers", "text/rfc822-headers")),
        (b"no header at all", ("message/rfc822", "text/rfc822-headers")),
        (b"", ("message/rfc822", "text/rfc822-headers")),
    ],
)
def test_what_comes_back_is_whole_and_harmless(data: bytes, kind: tuple[str, str], full: bool) -> None:
    wire = told(Fate("ann@y.test", FAILED, "5.0.0"), data=data, full=full)
    assert b"\n" not in wire.replace(b"\r\n", b"")
    assert b"\r" not in wire.replace(b"\r\n", b"")
    report = email.message_from_bytes(wire, policy=email.policy.default)
    assert isinstance(report, EmailMessage)
    assert list(report.iter_parts())[2].get_content_type() == kind[not full]


# -- the report and what it reports ----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.worker import QueueReceiver

at, seen = int(sys.argv[1]), 0
def counted(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        global seen
        if os.path.exists("armed"):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, call)
for name in ("open", "write", "fsync", "rename", "unlink", "link", "utime"):
    counted(name)

class Refusing(Relay):
    def transfer(self, message, To=None, From=None):
        open("armed", "w").close()
        return super().transfer(message, To, From)

QueueReceiver("run/outbox", deliver=Refusing("127.0.0.1", {port}).deliver).run_once()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_any_step_neither_loses_nor_doubles_the_report(here: Path, server: Server) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN, "RCPT TO:<BEN": BUSY}
    server.offers = ["fake.test"]
    outbox, steps = Queue("run/outbox"), 0
    while True:
        steps += 1
        for state in ("ready", "delayed", "dead"):
            outbox.backend.purge(state)
        Path("armed").unlink(missing_ok=True)
        push(outbox, "ann@y.test", "ben@y.test")
        script = KILLED.format(tests=str(Path(__file__).parents[2]), port=server.port)
        done = subprocess.run([sys.executable, "-c", script, str(steps)], check=False, capture_output=True)
        outbox.backend.release_stale()
        while outbox.backend.counts()["reserved"] or any(job.sender for job in jobs(outbox, "ready")):
            Path("armed").unlink(missing_ok=True)
            subprocess.run([sys.executable, "-c", script, "-1"], check=True, capture_output=True)
            outbox.backend.release_stale()
        assert [job.recipients for job in jobs(outbox, "dead")] == [("ann@y.test",)], steps
        assert [job.recipients for job in jobs(outbox, "delayed")] == [("ben@y.test",)], steps
        assert [job.recipients for job in jobs(outbox, "ready")] == [("joe@ours.test",)], steps
        if done.returncode != -signal.SIGKILL:
            assert steps > 5
            return


def test_message_of_a_report_is_from_the_null_sender(outbox: Queue, server: Server, relay: Relay) -> None:
    server.answers = {"RCPT TO:<ANN": UNKNOWN}
    push(outbox)
    assert worker(outbox, relay).run_once()
    (job,) = jobs(outbox, "ready")
    message = message_of(job, "outbox")
    assert message.From == ""
    assert not message.may_be_answered


@given(
    said=st.text(max_size=200),
    server=st.text(max_size=50),
    original=st.text(max_size=50),
    data=st.binary(max_size=300),
    full=st.booleans(),
)
def test_a_report_of_anything_has_three_parts_and_only_our_fields(
    said: str, server: str, original: str, data: bytes, full: bool
) -> None:
    wire = told(Fate("ann@y.test", FAILED, "5.0.0", said, server, original), data=data, full=full)
    assert b"\n" not in wire.replace(b"\r\n", b"")
    assert b"\r" not in wire.replace(b"\r\n", b"")
    report = MailRequest(None, "", ["joe@x.test"], wire)
    assert report.is_bounce()
    assert report.bounce is not None
    assert [(r.final, r.action) for r in report.bounce.recipients] == [("ann@y.test", "failed")]
    parsed = email.message_from_bytes(wire, policy=email.policy.compat32)
    parts = parsed.get_payload()
    assert isinstance(parts, list)
    assert len(parts) == 3
    assert parsed.keys()[:3] == ["From", "To", "Subject"]
