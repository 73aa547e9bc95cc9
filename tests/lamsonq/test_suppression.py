"""Addresses that get nothing any more."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamsonq.errors import QueueError, SMTPError, Undelivered
from lamsonq.mail import MailResponse
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.suppression import Suppressions
from lamsonq.testing import frozen_clock
from lamsonq.verp import VERP
from lamsonq.worker import QueueReceiver

from .cli import lamsonq, refused
from .servers import Server
from .test_verp import PATHS, bounce
from .waiting import PATIENCE


@pytest.fixture
def store(here: Path) -> Suppressions:
    return Suppressions("run/suppressed.db")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def relay(server: Server, store: Suppressions) -> Iterator[Relay]:
    relay = Relay("127.0.0.1", server.port, timeout=PATIENCE, suppressions=store)
    yield relay
    relay.close()


def send(relay: Relay, *to: str) -> dict[str, Exception]:
    """Who did not get a message, and why."""
    try:
        relay.deliver(MailResponse(From="joe@ours.test", To=", ".join(to), Subject="x", Body="y"))
    except Undelivered as error:
        return {failure.recipient: failure.error for failure in error.failures}
    return {}


def test_an_address_counts_however_it_is_written(store: Suppressions) -> None:
    store.add('"Joe"@Y.org', "said so")
    assert store.among(["joe@y.org", "JOE@Y.ORG", "ann@y.org"]) == {"joe@y.org": "said so", "JOE@Y.ORG": "said so"}
    assert store.remove("JOE@y.org")
    assert not store.remove("joe@y.org")
    assert store.among(["joe@y.org"]) == {}


def test_soft_is_for_a_time_and_does_not_shorten_hard(store: Suppressions) -> None:
    with frozen_clock() as clock:
        store.add("soft@y.org", "full", 60)
        store.add("hard@y.org", "gone")
        store.add("hard@y.org", "full", 60)
        assert [one.expires is None for one in store.all()] == [True, False]
        clock.tick(61)
        assert store.among(["soft@y.org", "hard@y.org"]) == {"hard@y.org": "gone"}
        assert store.purge() == 1


def test_who_is_suppressed_gets_nothing_and_counts_as_refused_for_good(
    store: Suppressions, relay: Relay, server: Server
) -> None:
    store.add("ann@y.test", "bounced")
    failed = send(relay, "ann@y.test", "ben@y.test")
    assert {to: str(error) for to, error in failed.items()} == {"ann@y.test": "550 5.1.1 suppressed: bounced"}
    assert server.said("RCPT") == ["RCPT TO:<ben@y.test>"]


@pytest.mark.parametrize(
    ("answers", "is_learned"),
    [
        ({"RCPT": "550 5.1.1 no such user"}, True),
        ({"RCPT": "550 5.1.10 null mx"}, True),
        ({"RCPT": "550 no such user"}, False),
        ({"RCPT": "550 5.7.1 spam"}, False),
        ({"RCPT": "550 5.1.8 bad sender"}, False),
        ({"RCPT": "552 5.2.2 full"}, False),
        ({"RCPT": "450 5.1.1 odd"}, False),
        ({"MAIL": "550 5.1.1 odd"}, False),
        ({".": "550 5.1.1 odd"}, False),
    ],
)
def test_only_an_unknown_address_at_rcpt_is_learned(
    answers: dict[str, str], is_learned: bool, store: Suppressions, relay: Relay, server: Server
) -> None:
    server.answers = dict(answers)
    assert send(relay, "ann@y.test")
    assert [one.address for one in store.all()] == (["ann@y.test"] if is_learned else [])


def test_a_report_that_is_refused_suppresses_nobody(
    here: Path, store: Suppressions, relay: Relay, server: Server
) -> None:
    server.answers = {"RCPT": "550 5.1.1 no such user"}
    outbox = Queue("run/outbox")
    outbox.push(MailResponse(From="joe@ours.test", To="ann@y.test", Subject="x", Body="y"))
    receiver = QueueReceiver(outbox, deliver=relay.deliver)
    while receiver.run_once():
        pass
    assert server.said("RCPT") == ["RCPT TO:<ann@y.test>", "RCPT TO:<joe@ours.test>"]
    assert [one.address for one in store.all()] == ["ann@y.test"]


def test_a_suppressed_recipient_is_reported_once_and_no_report_loops(
    here: Path, store: Suppressions, relay: Relay, server: Server
) -> None:
    store.add("ann@y.test", "bounced")
    store.add("joe@ours.test", "gone too")
    outbox = Queue("run/outbox")
    outbox.push(MailResponse(From="joe@ours.test", To="ann@y.test", Subject="x", Body="y"))
    receiver = QueueReceiver(outbox, deliver=relay.deliver)
    while receiver.run_once():
        pass
    assert server.commands == []
    assert outbox.backend.counts()["dead"] == 2  # the message and its report


# -- learning from bounces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "action", "expires"),
    [("5.1.1", "failed", None), ("5.2.2", "failed", 60), ("4.4.7", "failed", 60), ("5.7.1", "failed", 60)],
)
def test_a_bounce_suppresses_for_good_or_for_a_time(
    status: str, action: str, expires: float | None, store: Suppressions
) -> None:
    with frozen_clock() as clock:
        learned = store.learn(bounce(PATHS.address("joe@y.org"), "x@z.org", status, action), PATHS, 60)
        assert learned == ["joe@y.org"]
        (one,) = store.all()
        assert (one.address, one.reason) == ("joe@y.org", "550 gone")
        assert one.expires == (None if expires is None else clock.now + expires)


def test_a_delay_a_success_and_a_letter_suppress_nobody(store: Suppressions) -> None:
    path = PATHS.address("joe@y.org")
    assert store.learn(bounce(path, status="4.4.1", action="delayed"), PATHS) == []
    assert store.learn(bounce(path, status="2.0.0", action="delivered"), PATHS) == []
    letter = bounce(path)
    letter["Content-Type"] = "text/plain"
    assert not store.path.exists()


def test_a_forged_bounce_suppresses_nobody_and_without_verp_everybody_is_believed(store: Suppressions) -> None:
    forged = bounce("bounces@ours.test")
    assert store.learn(forged, VERP("bounces@ours.test", "y" * 20)) == []
    assert store.learn(forged, None) == ["joe@y.org"]


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_private_and_may_be_used_by_many(store: Suppressions) -> None:
    fork = multiprocessing.get_context("fork")
    adders = [fork.Process(target=_add_many, args=(n,)) for n in range(4)]
    for adder in adders:
        adder.start()
    for adder in adders:
        adder.join()
    assert len(store.all()) == 80
    assert store.path.stat().st_mode & 0o777 == 0o600


def _add_many(number: int) -> None:
    for count in range(20):
        Suppressions("run/suppressed.db").add(f"{number}.{count}@y.org", "x")


def test_a_file_that_cannot_be_used_is_told_and_mail_waits(store: Suppressions, relay: Relay) -> None:
    store.path.parent.mkdir()
    store.path.write_text("no database")
    with pytest.raises(QueueError, match=r"run/suppressed\.db cannot be used"):
        store.add("a@y.org", "x")
    Queue("run/outbox").push(MailResponse(From="joe@ours.test", To="ann@y.test", Subject="x", Body="y"))
    QueueReceiver("run/outbox", deliver=relay.deliver).run_once()
    assert Queue("run/outbox").backend.counts()["delayed"] == 1


def test_a_later_version_is_left_untouched(store: Suppressions) -> None:
    store.add("a@y.org", "x")
    with sqlite3.connect(store.path) as database:
        database.execute("pragma user_version = 99")
    database.close()
    with pytest.raises(QueueError, match="version 99"):
        store.add("b@y.org", "x")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_adds_and_removes(here: Path) -> None:
    lamsonq("suppress", "add", "Joe@y.org", "ann@y.org", "-reason", "asked\x1b[2J for it", "--file", "run/s.db")
    lamsonq("suppress", "add", "ben@y.org", "-days", "2", "-file", "run/s.db")
    lines = lamsonq("suppress", "ls", "-file", "run/s.db").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ann@y.org", "ben@y.org", "joe@y.org"]
    assert "for good  asked [2J for it" in lines[0]
    assert "until " in lines[1]
    (found,) = json.loads(lamsonq("suppress", "ls", "JOE@y.org", "-json", "-file", "run/s.db").stdout)
    assert found["address"] == "joe@y.org"
    lamsonq("suppress", "rm", "joe@y.org", "-file", "run/s.db")
    assert refused("suppress", "rm", "joe@y.org", "-file", "run/s.db") == "ERROR: joe@y.org: not suppressed"
    assert refused("suppress", "ls", "joe@y.org", "-file", "run/s.db") == "ERROR: not suppressed"
    assert "no address" in refused("suppress", "add", "joe", "-file", "run/s.db")
    assert "needs an address" in refused("suppress", "add", "-file", "run/s.db", code=2)
    assert lamsonq("suppress", "ls").stdout == ""


def test_smtp_error_is_what_a_suppressed_one_gets(store: Suppressions, relay: Relay) -> None:
    store.add("ann@y.test", "x")
    (error,) = send(relay, "ann@y.test").values()
    assert isinstance(error, SMTPError)
    assert error.code == 550
