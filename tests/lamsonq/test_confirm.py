"""Confirmations: outside of handlers, in handlers that fail, and what becomes of them in time."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import shelve
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq import view
from lamsonq.confirm import ConfirmationEngine, ConfirmationStorage, SQLiteConfirmationStorage
from lamsonq.errors import Later, SMTPError, Undelivered, UsageError
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.server import QueueReceiver

from .waiting import PATIENCE

Module = Callable[..., str]
DAY = 24 * 3600.0
POST = b"From: Alice <Alice@example.org>\r\nMessage-ID: <1@example.org>\r\nSubject: hi\r\n\r\nmy post \xff\r\n"
ALICE = "alice@example.org"


class Clock:
    """The time, moved on by hand."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Outbox:
    """A relay that keeps what it was given."""

    def __init__(self) -> None:
        self.sent: list[MailResponse] = []

    def deliver(self, message: MailResponse) -> None:
        self.sent.append(message)

    def addresses(self) -> list[str]:
        return [str(message["Reply-To"]) for message in self.sent]


@pytest.fixture(params=["dict", "sqlite"])
def storage(request: pytest.FixtureRequest, here: Path) -> ConfirmationStorage:
    return ConfirmationStorage() if request.param == "dict" else SQLiteConfirmationStorage("run/confirmations.db")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(storage: ConfirmationStorage, clock: Clock) -> ConfirmationEngine:
    return ConfirmationEngine("run/pending", storage, expires=2 * DAY, clock=clock)


@pytest.fixture
def templates(here: Path) -> Iterator[None]:
    (here / "text.txt").write_text("Answer to {{ confirm_address }}@{{ host }}, {{ message.From }}\n")
    (here / "own.msg").write_text("From: Desk <desk@{{ host }}>\nSubject: Sure?\nCc: spy@x.org\n\n{{ target }}\n")
    (here / "plain.msg").write_text("Note: this is text\n\nHello\n")
    before, view.LOADER = view.LOADER, view.templates(str(here))
    yield
    view.LOADER = before


def post(data: bytes = POST, sender: str = ALICE) -> MailRequest:
    return MailRequest("peer", sender, "blog@example.com", data)


def secret_in(address: str, target: str = "blog") -> str:
    found = re.fullmatch(rf"{target}-confirm-([a-z0-9]+)(@.*)?", address)
    assert found, address
    return found[1]


def run_together(functions: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


# Outside of handlers.


def test_a_secret_sets_the_message_free_once(engine: ConfirmationEngine) -> None:
    secret = secret_in(engine.register("blog", post()))
    original = engine.verify("blog", "Alice <ALICE@example.org>", secret)
    assert original is not None
    assert (original.Data, original.From, original.To) == (POST, ALICE, "blog@example.com")
    assert engine.verify("blog", ALICE, secret) is None
    assert engine.pending.count() == 1  # as Lamson has it; purge deletes it


@pytest.mark.parametrize(
    ("target", "sender", "change"),
    [
        ("other", ALICE, str),
        ("blog", "mallory@example.org", str),
        ("blog", ALICE, lambda secret: "0" + secret[1:] if secret[0] != "0" else "1" + secret[1:]),
        ("blog", ALICE, lambda secret: secret[:-1]),
        ("blog", ALICE, lambda _: ""),
        ("blog", ALICE, lambda _: "é" * 28),
        ("blog", "", str),
    ],
)
def test_nothing_else_does(engine: ConfirmationEngine, target: str, sender: str, change: Callable[[str], str]) -> None:
    secret = secret_in(engine.register("blog", post()))
    assert engine.verify(target, sender, change(secret)) is None
    assert engine.verify("blog", ALICE, secret.upper()) is not None


def test_the_latest_registration_counts(engine: ConfirmationEngine) -> None:
    first = secret_in(engine.register("blog", post()))
    second = secret_in(engine.register("blog", post(POST + b"again\r\n")))
    assert first != second
    assert engine.verify("blog", ALICE, first) is None
    found = engine.verify("blog", ALICE, second)
    assert found is not None
    assert found.Data == POST + b"again\r\n"


def test_targets_do_not_meet(engine: ConfirmationEngine) -> None:
    one, two = engine.register("one", post()), engine.register("two", post())
    assert engine.verify("two", ALICE, secret_in(two, "two")) is not None
    assert engine.verify("one", ALICE, secret_in(one, "one")) is not None


def test_addresses_and_targets_may_be_of_any_script(engine: ConfirmationEngine) -> None:
    message = post("From: 用户@例子.org\r\nSubject: x\r\n\r\n".encode(), "用户@例子.org")
    secret = secret_in(engine.register("größe", message), "größe")
    assert engine.verify("größe", "用户@例子.org", secret) is not None


def test_the_address_in_from_is_asked_else_the_envelopes(engine: ConfirmationEngine) -> None:
    secret = secret_in(engine.register("blog", post(sender="bounce-7@lists.example.org")))
    assert engine.verify("blog", ALICE, secret) is not None
    secret = secret_in(engine.register("blog", post(b"From: nonsense\r\n\r\n", "bob@example.org")))
    assert engine.verify("blog", "bob@example.org", secret) is not None


@pytest.mark.parametrize("target", ["x" * 30, "a b", "", "a:b", "a@b", "x\r\ny", "\udcff", "a\0b", "a\u202eb"])
def test_a_target_that_makes_no_address_is_refused(engine: ConfirmationEngine, target: str) -> None:
    with pytest.raises(SMTPError, match="553"):
        engine.register(target, post())
    assert (engine.pending.count(), list(engine.storage.entries())) == (0, [])


def test_a_target_as_long_as_the_tutorials_fits(engine: ConfirmationEngine) -> None:
    assert len(engine.register("test.blog.1244080328", post())) <= 64


def test_a_confirmation_is_cancelled_with_its_secret_only(engine: ConfirmationEngine) -> None:
    secret = secret_in(engine.register("blog", post()))
    engine.cancel("blog", ALICE, "wrong")
    assert engine.pending.count() == 1
    engine.cancel("blog", ALICE, secret)
    assert (engine.verify("blog", ALICE, secret), engine.pending.count()) == (None, 0)


def test_a_confirmation_expires(engine: ConfirmationEngine, clock: Clock) -> None:
    secret = secret_in(engine.register("blog", post()))
    clock.ahead = 2 * DAY + 60
    assert engine.verify("blog", ALICE, secret) is None
    clock.ahead = 2 * DAY - 60
    assert engine.verify("blog", ALICE, secret) is not None


def test_no_two_secrets_are_alike(engine: ConfirmationEngine) -> None:
    assert len({engine.make_random_secret() for _ in range(100)}) == 100
    assert len({engine.register("blog", post()) for _ in range(5)}) == 5


def test_of_many_threads_that_come_with_a_secret_at_once_one_gets_the_message(engine: ConfirmationEngine) -> None:
    for n in range(10):
        secret = secret_in(engine.register("blog", post(POST + b"%d\r\n" % n)))
        start = threading.Barrier(6)
        found: list[MailRequest | None] = []

        def verify(secret: str = secret, start: threading.Barrier = start, found: list[Any] = found) -> None:
            start.wait(10)
            found.append(engine.verify("blog", ALICE, secret))

        run_together([verify] * 6)
        assert len(found) == 6
        assert sum(message is not None for message in found) == 1


def test_a_message_without_a_sender_confirms_nothing(engine: ConfirmationEngine) -> None:
    secret = secret_in(engine.register("blog", post()))
    assert post(b"Subject: no From\r\n\r\n", sender="")["from"] is None
    assert engine.verify("blog", None, secret) is None
    assert engine.verify("blog", ALICE, secret) is not None


@pytest.mark.parametrize("text", ["\0", "\udcff@x.org", "a\r\nBcc: b@x.org", "x" * 1_000_000, "<" * 100_000, "../../x"])
def test_no_text_whatever_it_is_confirms_anything_or_fills_the_log(
    engine: ConfirmationEngine, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    secret = secret_in(engine.register("blog", post()))
    with caplog.at_level(logging.INFO):
        for asked in ((text, ALICE, secret), ("blog", text, secret), ("blog", ALICE, text)):
            assert engine.verify(*asked) is None
        engine.cancel("blog", ALICE, text)
    assert max(map(len, caplog.messages)) < 500
    assert all(message.isprintable() for message in caplog.messages)
    assert engine.get_pending(text) is None
    assert engine.verify("blog", ALICE, secret) is not None


def test_clear_forgets_everything(engine: ConfirmationEngine) -> None:
    secret = secret_in(engine.register("blog", post()))
    engine.clear()
    assert (engine.pending.count(), engine.verify("blog", ALICE, secret)) == (0, None)
    assert engine.storage.get("blog", ALICE) == (None, None)


# The storages.


def test_no_two_storages_share_a_dict() -> None:
    one, two = ConfirmationStorage(), ConfirmationStorage()
    one.store("blog", ALICE, "secret", "id")
    assert (one.get("blog", ALICE), two.get("blog", ALICE)) == (("secret", "id"), (None, None))


def test_a_shelf_is_a_storage_also_with_what_lamson_kept_in_it(here: Path) -> None:
    with shelve.open("confirmations") as shelf:
        shelf["blog:bob@example.org"] = ("secret", "id")  # Lamson's, which had no time in it
        storage = ConfirmationStorage(shelf)
        storage.store("blog", ALICE, "other", "id2")
    with shelve.open("confirmations") as shelf:
        storage = ConfirmationStorage(shelf)
        assert storage.get("blog", "Bob@example.org") == ("secret", "id")
        assert storage.get("blog", ALICE) == ("other", "id2")
        assert {entry.from_address for entry in storage.entries()} == {"bob@example.org", ALICE}
        storage.delete("blog", ALICE)
        storage.delete("blog", ALICE)
        assert storage.get("blog", ALICE) == (None, None)


def test_a_storage_of_ones_own_needs_four_methods(here: Path) -> None:
    class Own(ConfirmationStorage):
        def __init__(self) -> None:
            self.rows: dict[str, tuple[str, str]] = {}

        def clear(self) -> None:
            self.rows.clear()

        def get(self, target: str, from_address: str) -> tuple[str, str] | tuple[None, None]:
            return self.rows.get(self.key(target, from_address), (None, None))

        def delete(self, target: str, from_address: str) -> None:
            self.rows.pop(self.key(target, from_address), None)

        def store(self, target: str, from_address: str, expected_secret: str, pending_message_id: str) -> None:
            self.rows[self.key(target, from_address)] = (expected_secret, pending_message_id)

    engine = ConfirmationEngine("run/pending", Own())
    secret = secret_in(engine.register("blog", post()))
    with pytest.raises(NotImplementedError, match=r"Own needs entries\(\)"):
        engine.purge(0)
    assert engine.verify("blog", ALICE, secret) is not None


def test_a_storage_that_is_derived_from_nothing_may_have_the_four_alone(here: Path) -> None:
    class Own:
        def __init__(self) -> None:
            self.rows: dict[tuple[str, str], tuple[str, str]] = {}

        def clear(self) -> None:
            self.rows.clear()

        def get(self, target: str, address: str) -> tuple[str, str] | tuple[None, None]:
            return self.rows.get((target, address), (None, None))

        def delete(self, target: str, address: str) -> None:
            del self.rows[target, address]

        def store(self, target: str, address: str, secret: str, message: str) -> None:
            self.rows[target, address] = (secret, message)

    own = Own()
    engine = ConfirmationEngine("run/pending", own)
    secret = secret_in(engine.register("blog", post()))
    assert set(own.rows) == {("blog", ALICE)}
    assert engine.verify("blog", ALICE, "wrong") is None
    assert engine.verify("blog", ALICE, secret) is not None
    assert own.rows == {}
    engine.register("blog", post())
    with pytest.raises(NotImplementedError, match="Own has to be a ConfirmationStorage"):
        engine.purge(0)
    engine.clear()
    assert own.rows == {}


def test_a_storage_gives_away_what_it_keeps_once(storage: ConfirmationStorage) -> None:
    storage.store("blog", ALICE, "secret", "id")
    assert storage.take("blog", ALICE, "other") is None
    assert storage.take("blog", "bob@example.org", "secret") is None
    assert storage.take("blog", f"Alice <{ALICE}>", "SECRET") == "id"
    assert storage.take("blog", ALICE, "secret") is None


def test_a_newer_confirmation_is_not_taken_with_the_secret_of_an_older_one(storage: ConfirmationStorage) -> None:
    storage.store("blog", ALICE, "old", "1")
    storage.store("blog", ALICE, "new", "2")
    assert storage.take("blog", ALICE, "old") is None
    assert storage.get("blog", ALICE) == ("new", "2")


def _verify(secrets: list[str], start: Any, found: Any) -> None:
    engine = ConfirmationEngine("run/pending", SQLiteConfirmationStorage("run/confirmations.db"))
    for number, secret in enumerate(secrets):
        start.wait(30)
        if engine.verify(f"blog{number}", ALICE, secret) is not None:
            found.put(number)


@pytest.mark.slow
def test_of_many_processes_that_come_with_a_secret_at_once_one_gets_the_message(here: Path) -> None:
    engine = ConfirmationEngine("run/pending", SQLiteConfirmationStorage("run/confirmations.db"))
    secrets = [secret_in(engine.register(f"blog{n}", post()), f"blog{n}") for n in range(20)]
    spawn = multiprocessing.get_context("spawn")
    start, found = spawn.Barrier(3), spawn.Queue()
    children = [spawn.Process(target=_verify, args=(secrets, start, found)) for _ in range(3)]
    for child in children:
        child.start()
    confirmed = [found.get(timeout=30) for _ in secrets]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert (sorted(confirmed), found.empty()) == (list(range(20)), True)


def _store(path: str, number: int) -> None:
    SQLiteConfirmationStorage(path).store("blog", f"user{number}@example.org", f"secret{number}", "id")


def test_processes_share_a_sqlite_storage(here: Path) -> None:
    path = str(here / "run/confirmations.db")
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_store, args=(path, number)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sorted(entry.secret for entry in SQLiteConfirmationStorage(path).entries()) == ["secret0", "secret1"]
    assert Path(path).stat().st_mode & 0o077 == 0


def test_one_that_a_message_has_claimed_is_no_other_ones_until_it_is_released(here: Path) -> None:
    storage = SQLiteConfirmationStorage("run/confirmations.db")
    storage.store("blog", ALICE, "secret", "id")
    assert not storage.claim("blog", ALICE, "wrong", "one")
    assert storage.claim("blog", ALICE, "secret", "")
    assert [storage.claim("blog", ALICE, "secret", taker) for taker in ("one", "one", "two", "")] == [
        *(True, True, False, False)
    ]
    storage.release("blog", ALICE, "two")
    assert not storage.claim("blog", ALICE, "secret", "two")
    storage.release("blog", ALICE, "one")
    assert storage.claim("blog", ALICE, "secret", "two")
    storage.store("blog", ALICE, "new", "id2")  # another confirmation
    assert storage.claim("blog", ALICE, "new", "one")


def test_a_file_of_the_first_version_is_read_and_goes_on(here: Path) -> None:
    database = sqlite3.connect("old.db")
    database.executescript("""
        create table confirmations (key text primary key, secret text not null, pending text not null,
                                    stored real not null) without rowid;
        insert into confirmations values ('blog:alice@example.org', 'secret', 'id', 1.0);
        pragma user_version = 1;
    """)
    database.close()
    storage = SQLiteConfirmationStorage("old.db")
    assert [entry.stored for entry in storage.entries()] == [1.0]
    assert storage.claim("blog", ALICE, "secret", "one")
    assert not storage.claim("blog", ALICE, "secret", "two")
    assert storage.take("blog", ALICE, "secret") == "id"


def test_a_file_that_cannot_be_used_is_a_later_that_names_it(here: Path) -> None:
    Path("newer.db").touch()
    with sqlite3.connect("newer.db") as database:
        database.execute("pragma user_version = 3")
    database.close()
    with pytest.raises(Later, match=r"newer\.db was written by a newer lamsonq \(schema 3\)"):
        SQLiteConfirmationStorage("newer.db").get("blog", ALICE)
    Path("text.db").write_text("no database" * 100)
    with pytest.raises(Later, match=r"cannot use the confirmations in .*text\.db: file is not a database"):
        SQLiteConfirmationStorage("text.db").store("blog", ALICE, "s", "id")


# Asking.


def test_the_sender_is_asked_and_the_callers_variables_stay(engine: ConfirmationEngine, templates: None) -> None:
    relay, variables = Outbox(), {"host": "example.com"}
    assert engine.send(relay, "blog", post(), "text.txt", variables) is True
    [asking] = relay.sent
    secret = secret_in(asking.sender)
    assert variables == {"host": "example.com"}
    assert (asking.recipients, asking["Subject"]) == ([ALICE], "Confirmation required")
    assert asking["From"] == asking["Reply-To"] == f"blog-confirm-{secret}@example.com"
    assert (asking["Auto-Submitted"], asking["In-Reply-To"]) == ("auto-replied", "<1@example.org>")
    assert asking.Body == f"Answer to blog-confirm-{secret}@example.com, {ALICE}\n"
    assert engine.verify("blog", ALICE, secret) is not None


def test_a_msg_may_say_its_own_sender_and_subject_but_not_who_is_asked(
    engine: ConfirmationEngine, templates: None
) -> None:
    relay = Outbox()
    engine.send(relay, "blog", post(), "own.msg", {"host": "example.com"})
    engine.send(relay, "blog", post(), "plain.msg", {"host": "example.com"})
    own, plain = relay.sent
    assert (own["From"], own["Subject"], own.recipients) == ("Desk <desk@example.com>", "Sure?", [ALICE])
    assert secret_in(str(own["Reply-To"]))
    assert (plain["From"], plain["Subject"]) == (plain["Reply-To"], "Confirmation required")
    assert plain.Body == "Note: this is text\n\nHello\n"


@pytest.mark.parametrize(
    ("data", "sender"),
    [
        (POST, ""),
        (b"Auto-Submitted: auto-replied\r\n" + POST, ALICE),
        (b"Precedence: bulk\r\n" + POST, ALICE),
        (b"List-Id: <x.example.org>\r\n" + POST, ALICE),
    ],
)
def test_no_program_is_asked(
    engine: ConfirmationEngine, templates: None, caplog: pytest.LogCaptureFixture, data: bytes, sender: str
) -> None:
    relay = Outbox()
    with caplog.at_level(logging.INFO):
        assert engine.send(relay, "blog", post(data, sender), "text.txt", {"host": "example.com"}) is False
    assert (relay.sent, engine.pending.count()) == ([], 0)
    assert "no person wrote that message" in caplog.text


def test_the_host_must_be_known(engine: ConfirmationEngine, templates: None) -> None:
    with pytest.raises(UsageError, match=r"vars\['host'\]"):
        engine.send(Outbox(), "blog", post(), "text.txt", {})
    assert engine.pending.count() == 0


def test_a_secret_is_never_logged(
    engine: ConfirmationEngine, templates: None, caplog: pytest.LogCaptureFixture
) -> None:
    relay = Outbox()
    with caplog.at_level(logging.DEBUG):
        engine.send(relay, "blog", post(), "text.txt", {"host": "example.com"})
        secret = secret_in(relay.addresses()[0])
        engine.verify("other", ALICE, secret)
        engine.verify("blog", ALICE, secret)
        engine.verify("blog", ALICE, secret)
    assert "is refused" in caplog.text
    assert secret not in caplog.text


# Purging.


def test_purge_deletes_what_nobody_can_confirm_any_more(engine: ConfirmationEngine, clock: Clock) -> None:
    secret = secret_in(engine.register("old", post()), "old")
    engine.verify("old", ALICE, secret)  # confirmed: the message is left behind
    engine.register("expired", post())
    engine.register("replaced", post())
    clock.ahead = 1.5 * DAY
    replaced = secret_in(engine.register("replaced", post()), "replaced")
    fresh = secret_in(engine.register("fresh", post()), "fresh")
    assert engine.purge() == (0, 0)
    clock.ahead = 2 * DAY + 60
    assert engine.purge() == (1, 3)
    assert engine.purge() == (0, 0)
    assert engine.pending.count() == len(list(engine.storage.entries())) == 2
    assert engine.verify("fresh", ALICE, fresh) is not None
    assert engine.verify("replaced", ALICE, replaced) is not None


def test_purge_gives_up_a_registration_whose_message_is_gone(engine: ConfirmationEngine, clock: Clock) -> None:
    engine.register("blog", post())
    engine.pending.clear()
    assert engine.purge() == (0, 0)  # a handler may be about to publish it
    clock.ahead = DAY + 60
    assert engine.purge() == (1, 0)
    assert list(engine.storage.entries()) == []


def test_purge_may_be_told_the_age(engine: ConfirmationEngine, clock: Clock) -> None:
    engine.register("blog", post())
    clock.ahead = 100
    assert engine.purge(older_than=200) == (0, 0)
    assert engine.purge(older_than=50) == (1, 1)


# In handlers.

HANDLERS = """
    from threading import Event
    from lamsonq.attempt import current
    from lamsonq.queue import Queue

    BROKEN = set()
    HELD, ENTERED, GO_ON = [], Event(), Event()

    def fail_if(where):
        if where in BROKEN:
            raise Later(where)

    @route("(name)@example.com", name="blog")
    def START(message, name=None):
        CALLS.append(CONFIRM.send(relay, name, message, "text.txt", {"host": "example.com"}))
        fail_if("start")
        return CONFIRMING

    @route("(name)-confirm-(secret)@example.com", name="blog", secret="[a-z0-9]+")
    def CONFIRMING(message, name=None, secret=None):
        original = CONFIRM.verify(name, message["from"], secret)
        CALLS.append(original is not None)
        if original is None:
            return None
        Queue("run/posts").push(original)
        fail_if("confirming")
        return START

    @route("failing-(secret)@example.com", secret="[a-z0-9]+")
    @stateless
    def OUTER(message, secret=None):
        try:
            ROUTER.deliver(message.addressed(f"blog-confirm-{secret}@example.com"))
        except Undelivered:
            pass
        fail_if("outer")

    @route("twice-(secret)@example.com", secret="[a-z0-9]+")
    @stateless
    def TWICE(message, secret=None):
        for number in "1", "2":
            ROUTER.deliver(message.addressed(f"inner{number}-{secret}@example.com"))
        fail_if("outer")

    @route("inner[0-9]-(secret)@example.com", secret="[a-z0-9]+")
    @stateless
    def INNER(message, secret=None):
        CALLS.append(CONFIRM.verify("blog", message["from"], secret) is not None)

    @route("slow-(secret)@example.com", secret="[a-z0-9]+")
    @stateless
    def SLOW(message, secret=None):
        original = CONFIRM.verify("blog", message["from"], secret)
        CALLS.append(original is not None)
        if original is not None:
            Queue("run/posts").push(original)
            HELD.append(current())
            ENTERED.set()
            assert GO_ON.wait(60)
            if HELD[0].given_up:
                CONFIRM.verify("blog", message["from"], secret)
            fail_if("slow")

    @route("again-(secret)@example.com", secret="[a-z0-9]+")
    @stateless
    def AGAIN(message, secret=None):
        CALLS.append(CONFIRM.verify("blog", message["from"], secret) is not None)
        CALLS.append(CONFIRM.register("blog", message))
"""


@pytest.fixture
def project(router: RoutingBase, module: Module, templates: None) -> Any:
    """A blog whose posts are confirmed: its module."""
    name = module(HANDLERS)
    router.load([name])
    found: Any = sys.modules[name]
    found.CONFIRM = ConfirmationEngine("run/pending", SQLiteConfirmationStorage("run/confirmations.db"))
    found.relay, found.ROUTER = Outbox(), router
    return found


def answer(to: str, data: bytes = b"") -> MailRequest:
    return MailRequest(
        "peer", ALICE, to, data + b"From: alice@example.org\r\nSubject: Re: Confirmation required\r\n\r\n"
    )


def test_a_post_is_confirmed_by_an_answer(project: Any, router: RoutingBase) -> None:
    router.deliver(post())
    [address] = project.relay.addresses()
    router.deliver(answer(address))
    _, original = Queue("run/posts").pop()
    assert original is not None
    assert (original.Data, original.From) == (POST, ALICE)
    assert project.CALLS == [True, True]
    assert list(project.CONFIRM.storage.entries()) == []


def test_what_a_failed_handler_registered_cannot_be_confirmed_until_it_succeeds(
    project: Any, router: RoutingBase
) -> None:
    project.BROKEN.add("start")
    for _ in range(2):
        with pytest.raises(Undelivered):
            router.deliver(post())
    assert project.CONFIRM.pending.count() == 0
    [first, again] = project.relay.addresses()
    assert first == again  # the mails that went out by then stay good
    assert project.CONFIRM.verify("blog", ALICE, secret_in(first)) is None
    project.BROKEN.clear()
    router.deliver(post())
    assert project.relay.addresses()[2] == first
    assert project.CONFIRM.pending.count() == 1
    router.deliver(answer(first))
    assert Queue("run/posts").count() == 1


def test_another_message_never_takes_over_the_secret_of_one_that_failed(project: Any, router: RoutingBase) -> None:
    project.BROKEN.add("start")
    with pytest.raises(Undelivered):
        router.deliver(post())
    project.BROKEN.clear()
    router.deliver(post(POST.replace(b"my post", b"forged")))
    [first, second] = project.relay.addresses()
    assert first != second
    assert project.CONFIRM.verify("blog", ALICE, secret_in(first)) is None


def test_a_handler_that_fails_has_not_used_up_the_secret(project: Any, router: RoutingBase) -> None:
    router.deliver(post())
    [address] = project.relay.addresses()
    project.BROKEN.add("confirming")
    for _ in range(2):
        with pytest.raises(Undelivered):
            router.deliver(answer(address))
    assert Queue("run/posts").count() == 0
    project.BROKEN.clear()
    router.deliver(answer(address))
    assert Queue("run/posts").count() == 1
    assert project.CALLS == [True, True, True, True]
    assert list(project.CONFIRM.storage.entries()) == []


def test_an_inner_delivery_that_fails_uses_up_nothing_though_the_outer_one_succeeds(
    project: Any, router: RoutingBase
) -> None:
    router.deliver(post())
    secret = secret_in(project.relay.addresses()[0])
    project.BROKEN.add("confirming")
    router.deliver(answer(f"failing-{secret}@example.com"))
    assert len(list(project.CONFIRM.storage.entries())) == 1
    project.BROKEN.clear()
    router.deliver(answer(f"failing-{secret}@example.com"))
    assert list(project.CONFIRM.storage.entries()) == []
    assert project.CALLS == [True, True, True]


def test_an_inner_delivery_uses_up_nothing_before_the_outer_one_succeeds(project: Any, router: RoutingBase) -> None:
    router.deliver(post())
    secret = secret_in(project.relay.addresses()[0])
    project.BROKEN.add("outer")
    with pytest.raises(Undelivered):
        router.deliver(answer(f"failing-{secret}@example.com"))
    assert (project.CALLS, len(list(project.CONFIRM.storage.entries()))) == ([True, True], 1)


def test_a_handler_may_verify_one_and_register_the_next(project: Any, router: RoutingBase) -> None:
    router.deliver(post())
    secret = secret_in(project.relay.addresses()[0])
    router.deliver(answer(f"again-{secret}@example.com"))
    _, verified, address = project.CALLS
    assert verified
    assert project.CONFIRM.verify("blog", ALICE, secret) is None
    assert project.CONFIRM.verify("blog", ALICE, secret_in(address)) is not None


def confirmed_slowly(project: Any, router: RoutingBase) -> tuple[str, threading.Thread, list[Exception]]:
    """A secret, and a thread whose handler has just verified it and goes on when it is told so; what it raises."""
    router.deliver(post())
    secret = secret_in(project.relay.addresses()[0])
    raised: list[Exception] = []

    def deliver() -> None:
        try:
            router.deliver(answer(f"slow-{secret}@example.com"))
        except Undelivered as error:
            raised.append(error)

    thread = threading.Thread(target=deliver)
    thread.start()
    assert project.ENTERED.wait(PATIENCE)
    return secret, thread, raised


@pytest.mark.parametrize("data", [b"", b"Message-ID: <another@example.org>\r\n"])
def test_of_two_handlers_that_verify_a_secret_at_once_the_second_waits_for_the_first(
    project: Any, router: RoutingBase, data: bytes
) -> None:
    secret, thread, raised = confirmed_slowly(project, router)
    with pytest.raises(Undelivered) as found:
        router.deliver(answer(f"slow-{secret}@example.com", data))
    outcome = found.value.failures[0].outcome()
    assert isinstance(outcome, Later)
    assert not outcome.counted  # the one that waits is not at fault
    project.GO_ON.set()
    thread.join(PATIENCE)
    router.deliver(answer(f"slow-{secret}@example.com", data))
    assert (project.CALLS[1:], raised, Queue("run/posts").count()) == ([True, False], [], 1)


def test_many_handlers_that_verify_a_secret_at_once_confirm_it_once(project: Any, router: RoutingBase) -> None:
    project.GO_ON.set()
    router.deliver(post())
    secret = secret_in(project.relay.addresses()[0])

    def deliver() -> None:
        with contextlib.suppress(Undelivered):
            router.deliver(answer(f"slow-{secret}@example.com"))

    run_together([deliver] * 8)
    assert (project.CALLS.count(True), Queue("run/posts").count()) == (2, 1)  # asked, and confirmed once


def test_when_the_first_handler_fails_the_second_confirms(project: Any, router: RoutingBase) -> None:
    secret, thread, raised = confirmed_slowly(project, router)
    project.BROKEN.add("slow")
    project.GO_ON.set()
    thread.join(PATIENCE)
    assert len(raised) == 1
    project.BROKEN.clear()
    router.deliver(answer(f"slow-{secret}@example.com", b"Message-ID: <another@example.org>\r\n"))
    assert (project.CALLS[1:], Queue("run/posts").count()) == ([True, True], 1)


def test_a_handler_that_was_given_up_keeps_nobody_out_and_confirms_nothing(project: Any, router: RoutingBase) -> None:
    secret, thread, _ = confirmed_slowly(project, router)
    try:
        [held] = project.HELD
        assert held.give_up()
        assert project.CONFIRM.verify("blog", ALICE, secret) is not None
        held._settle(Later("it hung"), [])  # as a receiver does, in its place
    finally:
        project.GO_ON.set()
    thread.join(PATIENCE)
    assert (project.CONFIRM.verify("blog", ALICE, secret), Queue("run/posts").count()) == (None, 0)


def test_outside_a_secret_that_a_handler_has_just_verified_is_waited_for(
    project: Any, router: RoutingBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, thread, _ = confirmed_slowly(project, router)
    with monkeypatch.context() as patch:
        patch.setattr("lamsonq.confirm.PATIENCE", 0.05)
        with pytest.raises(Later):
            project.CONFIRM.verify("blog", ALICE, secret)
    found: list[object] = []
    outside = threading.Thread(target=lambda: found.append(project.CONFIRM.verify("blog", ALICE, secret)))
    outside.start()
    project.GO_ON.set()
    outside.join(PATIENCE)
    thread.join(PATIENCE)
    assert (found, Queue("run/posts").count()) == ([None], 1)


def test_of_two_inner_deliveries_the_first_confirms_and_the_outer_one_decides(
    project: Any, router: RoutingBase
) -> None:
    router.deliver(post())
    secret = secret_in(project.relay.addresses()[0])
    project.BROKEN.add("outer")
    with pytest.raises(Undelivered):
        router.deliver(answer(f"twice-{secret}@example.com"))
    project.BROKEN.clear()
    router.deliver(answer(f"twice-{secret}@example.com"))
    router.deliver(answer(f"twice-{secret}@example.com"))
    assert project.CALLS[1:] == [True, False, True, False, False, False]


PROCESS = r"""
import sys
from lamsonq.confirm import ConfirmationEngine, SQLiteConfirmationStorage
from lamsonq.errors import Later, Undelivered
from lamsonq.mail import MailRequest
from lamsonq.routing import Router
import handlers_of_processes as handlers

handlers.CONFIRM = ConfirmationEngine("run/pending", SQLiteConfirmationStorage("run/confirmations.db"))
Router.load(["handlers_of_processes"])
for line in sys.stdin:
    try:
        Router.deliver(MailRequest("peer", "alice@example.org", line.strip(), b"From: alice@example.org\r\n\r\n"))
        print("done", flush=True)
    except Undelivered as error:
        print(type(error.failures[0].outcome()).__name__, flush=True)
"""
HANDLERS_OF_PROCESSES = """
    import sys
    FOUND = []

    @route("(how)-(secret)@example.com", how="now|slow", secret="[a-z0-9]+")
    @stateless
    def START(message, how=None, secret=None):
        FOUND.append(CONFIRM.verify("blog", message["from"], secret) is not None)
        print(FOUND[-1], flush=True)
        if how == "slow" and FOUND[-1]:
            print("waits", flush=True)
            sys.stdin.readline()
"""


def test_processes_take_turns_too_and_what_one_that_is_killed_worked_on_may_come_again(
    here: Path, module: Module
) -> None:
    module(HANDLERS_OF_PROCESSES, "handlers_of_processes")
    engine = ConfirmationEngine("run/pending", SQLiteConfirmationStorage("run/confirmations.db"))
    secret = secret_in(engine.register("blog", post()))
    command = [sys.executable, "-c", PROCESS]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as one,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as two,
    ):

        def tell(process: Any, how: str, lines: int) -> list[str]:
            process.stdin.write(f"{how}-{secret}@example.com\n")
            return [process.stdout.readline().strip() for _ in range(lines)]

        assert tell(one, "slow", 2) == ["True", "waits"]
        assert tell(two, "now", 1) == ["Later"]
        one.kill()
        one.wait(10)
        assert tell(two, "now", 2) == ["False", "done"]  # the killed one may have succeeded
        assert tell(two, "slow", 2) == ["True", "waits"]  # the very message: then it had not
        assert tell(two, "go on", 1) == ["done"]
        assert tell(two, "slow", 2) == ["False", "done"]
        two.stdin.close()  # type: ignore[union-attr]
    assert engine.verify("blog", ALICE, secret) is None


@pytest.mark.parametrize("header", [b"Auto-Submitted: auto-replied\r\n", b"Precedence: bulk\r\n"])
def test_an_absence_notice_confirms_nothing(project: Any, router: RoutingBase, header: bytes) -> None:
    router.deliver(post())
    [address] = project.relay.addresses()
    router.deliver(answer(address, header))
    assert project.CALLS == [True, False]
    router.deliver(answer(address))
    assert project.CALLS == [True, False, True]


def test_behind_a_queue_it_is_the_same(project: Any, router: RoutingBase) -> None:
    incoming = Queue("run/incoming")

    def work() -> None:
        QueueReceiver("run/incoming", router=router).start(one_shot=True)

    incoming.push(post())
    work()
    [address] = project.relay.addresses()
    project.BROKEN.add("confirming")
    key = incoming.push(answer(address))
    work()
    assert (Queue("run/posts").count(), len(list(project.CONFIRM.storage.entries()))) == (0, 1)
    project.BROKEN.clear()
    for delayed in incoming.backend.keys("delayed"):
        assert incoming.backend.kick(delayed), key
    work()
    assert Queue("run/posts").count() == 1
    assert list(project.CONFIRM.storage.entries()) == []
