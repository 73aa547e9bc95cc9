"""Queue, as handlers and scripts use it."""

from __future__ import annotations

import email.message
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq import about, attempt, queue
from lamsonq.envelope import Envelope, Notify, restored, session_of
from lamsonq.errors import QueueError
from lamsonq.jobs import Job, Put
from lamsonq.keys import derived_key
from lamsonq.keys import new_key as new_id
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.queue import Queue, job_of, message_of
from lamsonq.verdicts import Auth, Verdict

BODY = b"From: Joe <joe@example.org>\r\nTo: a@b.example\r\nSubject: hi\r\n\r\nhello\x00\xff no end"


@pytest.fixture
def posts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.chdir(tmp_path)
    made = Queue("run/posts")
    yield made
    made.backend.close()


def request(sender: str | None = "Joe@Example.org", recipients: tuple[str, ...] = ("A@b.example",)) -> MailRequest:
    envelope = Envelope(sender, recipients, ("127.0.0.1", 4242), 1_700_000_000.5)
    return MailRequest(("127.0.0.1", 4242), sender, list(recipients), BODY, envelope=envelope)


def test_a_maildir_may_be_named_by_its_scheme(here: Path) -> None:
    assert Queue("maildir:run/posts").backend is Queue("run/posts").backend
    assert Queue("maildir:run/posts").dir == "run/posts"


def test_push_puts_a_file_into_new_and_gives_its_key(posts: Queue) -> None:
    key = posts.push(request())
    [name] = os.listdir("run/posts/new")
    assert name.startswith(f"{key},")
    assert Path("run/posts/new", name).read_bytes().endswith(BODY)
    assert (posts.count(), len(posts), posts.keys()) == (1, 1, [key])


@pytest.mark.parametrize("name", ["run/posts", "sqlite:run/q.db?queue=posts", "memory:posts"])
def test_a_queue_keeps_what_is_known_of_the_session_beside_the_message(here: Path, name: str) -> None:
    notify = Notify("HDRS", "QQ314159", {"A@b.example": "NEVER"}, {"A@b.example": "rfc822;old@b.example"})
    auth = Auth((Verdict("spf", "pass", "", {"smtp.mailfrom": "example.org"}),), "example.org")
    envelope = Envelope(
        "Joe@Example.org",
        ("A@b.example",),
        "queue",
        1.5,
        helo="mx",
        login="joe",
        tls="TLSv1.3",
        notify=notify,
        auth=auth,
    )
    queue = Queue(name)
    queue.push(MailRequest("peer", "Joe@Example.org", ["A@b.example"], BODY, envelope=envelope))
    _, message = queue.pop()
    assert message is not None
    assert message.envelope == envelope
    assert (message.auth.spf, message.auth.dkim) == ("pass", "none")
    queue.backend.close()


def test_what_is_kept_of_the_session_is_written_as_it_always_was() -> None:
    envelope = Envelope(
        "a@x", ("b@x",), "queue", 1.5, helo="mx", notify=Notify(notify={"b@x": "NEVER"}), trace="T: x\r\n"
    )
    kept = {"session": '{"helo":"mx","notify":{"notify":{"b@x":"NEVER"}},"trace":"T: x\\r\\n"}'}
    assert session_of(envelope) == kept
    assert restored("a@x", ("b@x",), "queue", 1.5, kept) == envelope
    assert session_of(Envelope("a@x", ("b@x",), "queue", 1.5)) == {}
    later = {"session": '{"helo":"mx","of_a_later_version":[1]}'}
    assert restored("a@x", (), None, 0.0, later) == Envelope("a@x", (), helo="mx")
    assert restored("a@x", (), None, 0.0, {"session": "somebody else's"}) == Envelope("a@x", ())


def test_pop_gives_the_oldest_message_as_it_came_and_deletes_it(posts: Queue) -> None:
    first = posts.push(request())
    posts.push(b"second")
    key, message = posts.pop()
    assert key == first
    assert message is not None
    assert message.Data == BODY
    assert message.Peer == "run/posts"
    assert (message.From, message.To) == ("joe@example.org", "a@b.example")
    assert message.envelope == Envelope("Joe@Example.org", ("A@b.example",), "127.0.0.1:4242", 1_700_000_000.5)
    _, second = posts.pop()
    assert second is not None
    assert second.Data == b"second"
    assert posts.pop() == (None, None)


def test_an_empty_queue_is_still_a_queue(posts: Queue) -> None:
    assert posts
    assert (len(posts), posts.keys(), posts.get("x"), posts.pop()) == (0, [], None, (None, None))
    posts.remove("x")
    posts.clear()


def test_get_does_not_take(posts: Queue) -> None:
    key = posts.push(request())
    message = posts.get(key)
    assert message is not None
    assert message.Data == BODY
    assert posts.count() == 1
    posts.remove(key)
    assert posts.get(key) is None
    assert posts.count() == 0


def test_clear_empties_it(posts: Queue) -> None:
    for _ in range(5):
        posts.push(b"x")
    posts.clear()
    assert len(posts) == 0


def test_the_null_sender_stays_null(posts: Queue) -> None:
    posts.push(request(sender=""))
    _, message = posts.pop()
    assert message is not None
    assert message.From == ""
    assert message.envelope.mail_from == ""


def test_bytes_without_an_envelope_take_it_from_the_headers(posts: Queue) -> None:
    posts.push(BODY)
    _, message = posts.pop()
    assert message is not None
    assert (message.From, message.To) == ("joe@example.org", "a@b.example")
    assert message.envelope.mail_from is None


def test_a_message_for_many_keeps_them_all_as_they_were_written() -> None:
    job = job_of(request(recipients=("A@b.example", "B@b.example")), "k")
    assert job.recipients == ("A@b.example", "B@b.example")
    assert (job.sender, job.peer, job.received) == ("Joe@Example.org", "127.0.0.1:4242", 1_700_000_000.5)


def test_a_message_of_a_handler_keeps_its_one_recipient() -> None:
    message = request(recipients=("A@b.example", "B@b.example")).addressed("b@b.example")
    assert job_of(message, "k").recipients == ("B@b.example",)


def test_what_a_handler_changed_is_what_is_queued() -> None:
    message = request()
    message["Subject"] = "changed"
    job = job_of(message, "k")
    assert b"Subject: changed" in job.body
    assert job.body.endswith(b"hello\x00\xff no end")


def test_an_ip_version_6_peer_is_written_with_brackets() -> None:
    message = MailRequest(("::1", 4242, 0, 0), "a@b", "c@d", b"")
    assert job_of(message, "k").peer == "[::1]:4242"


def test_a_response_is_queued_with_its_recipients() -> None:
    response = MailResponse(To="A <a@b.example>", From="me@example.org", Subject="hi", Body="hello")
    response["Bcc"] = "secret@b.example"
    job = job_of(response, "k")
    assert job.sender == "me@example.org"
    assert job.recipients == ("a@b.example", "secret@b.example")
    assert b"secret" not in job.body


def test_whatever_is_a_message_can_be_queued() -> None:
    standard = email.message.EmailMessage()
    standard["Subject"] = "hi"
    assert job_of(standard, "k").body == b"Subject: hi\n\n"
    assert job_of("grüße\udcff", "k").body == "grüße".encode() + b"\xff"
    assert job_of(b"\x00\xff", "k").body == b"\x00\xff"


@pytest.mark.parametrize("nonsense", [None, 5, ["a"], {"a": 1}])
def test_what_is_no_message_is_refused(nonsense: Any) -> None:
    with pytest.raises(TypeError, match="a queue takes a MailRequest"):
        job_of(nonsense, "k")


def test_a_job_without_recipients_takes_them_from_the_headers() -> None:
    message = message_of(Job(key="k", body=BODY), "run/posts")
    assert (message.From, message.route_to) == ("joe@example.org", ["a@b.example"])


class Running:
    """As much of an attempt as push knows."""

    def __init__(self) -> None:
        self.held: list[Put] = []

    def put(self, put: Put) -> None:
        self.held.append(put)


@pytest.mark.parametrize("parent", ["1244080328.M408474P3147Q4.host", "1.M2P3Q4R0R9010.host", "a stranger's key"])
def test_keys_that_are_derived_from_one_sort_in_the_order_of_their_numbers(parent: str) -> None:
    keys = [derived_key(parent, number) for number in range(1101)]
    assert keys == sorted(keys)
    assert len(set(keys)) == 1101
    ends = [8, 9, 10, 11, 98, 99, 100, 101, 999, 1000, 1001, 9999, 10_000, 99_999, 100_000]
    far = [derived_key(parent, number) for number in ends]
    assert far == sorted(far)
    assert len(set(far)) == len(ends)


@pytest.mark.parametrize("count", [9, 10, 11, 99, 101, 1001])
def test_what_is_kept_of_one_message_that_is_coming_in_stays_in_its_order(posts: Queue, count: int) -> None:
    with about.about(about.received(new_id())):
        keys = [queue.new_key(posts.backend) for _ in range(count)]
    assert keys == sorted(keys)
    posts.backend.put([Put(posts.backend, Job(key=key, body=b"x")) for key in reversed(keys)])
    assert posts.keys() == keys


def test_a_process_that_a_handler_forks_takes_no_key_of_its_parents(posts: Queue) -> None:
    with about.about(about.received(new_id())):
        first = posts.push(b"before")
        child = os.fork()
        if not child:
            try:
                posts.push(b"child")
                posts.push(b"child again")
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        others = [posts.push(b"parent"), posts.push(b"parent again")]
    kept = map(posts.backend.get, posts.keys())
    bodies = sorted(job.body for job in kept if job is not None)
    assert bodies == [b"before", b"child", b"child again", b"parent", b"parent again"]
    assert others == [derived_key(derived_key(first, 0), number) for number in (1, 2)]


def test_what_a_handler_pushes_is_held_until_it_has_returned(posts: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running()
    monkeypatch.setattr(attempt, "current", lambda: running)
    key = posts.push(request())
    assert posts.count() == 0
    [put] = running.held
    assert (put.store, put.job.key, put.job.body) == (posts.backend, key, BODY)
    now = posts.push(request(), now=True)
    assert posts.keys() == [now]


def test_a_push_that_fails_gives_the_message_back(posts: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").write_text("a file")
    message = request()
    with pytest.raises(QueueError, match="cannot write run/posts") as found:
        posts.push(message)
    assert found.value.data is message
    assert found.value.exit_code == 1


def test_a_message_that_cannot_be_read_stays_in_the_queue(posts: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    posts.push(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(queue, "message_of", _broken)
        with pytest.raises(RuntimeError):
            posts.pop()
    assert posts.count() == 1
    _, message = posts.pop()
    assert message is not None


def _broken(*_: object) -> MailRequest:
    raise RuntimeError("broken")


def test_a_message_over_the_limit_is_not_popped(posts: Queue) -> None:
    limited = Queue("run/posts", pop_limit=10, oversize_dir="run/big")
    small, large = limited.push(b"x" * 10), limited.push(b"x" * 11)
    assert limited.oversize(small)[0] is False
    too_large, path = limited.oversize(large)
    assert too_large
    assert Path(path).parent == Path("run/posts/new").absolute()
    assert limited.pop()[0] == small
    assert limited.pop() == (None, None)
    assert Queue("run/big").keys() == [large]
    with pytest.raises(KeyError):
        limited.oversize("x")
    limited.backend.close()


def test_queues_of_one_directory_share_their_store(posts: Queue) -> None:
    assert Queue("run/posts").backend is posts.backend
    assert repr(posts) == "<Queue run/posts>"
